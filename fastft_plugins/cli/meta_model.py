"""The model that ``fastft doctor`` is asked about: its config, and itself on torch's meta device."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.shapes import SHAPES

_LONGEST = 300  # characters of an error of somebody else's


def read_config(path: Path | None, shape: str | None) -> tuple[str, Any]:
    """The config of a model folder, of a config.json, or of a known shape; with the name to show for it.

    Raises:
        FastFTConfigError: names what was given, and what is allowed.
        ImportError: with the pip command, if transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("fastft doctor needs 'transformers': pip install 'fastft-plugins[hf]'") from error
    if (path is None) == (shape is None):
        raise FastFTConfigError("give one of the two: a model's folder or config.json, or --shape NAME")
    if shape is not None:
        if shape not in SHAPES:
            raise FastFTConfigError(f"--shape {shape}: is not known; allowed: {', '.join(SHAPES)}")
        return shape, AutoConfig.for_model(**SHAPES[shape])
    assert path is not None
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        found = f"no {file.name} here" if path.is_dir() else "no such folder or file"
        raise FastFTConfigError(f"{path}: {found}. Remedy: a local model folder, its config.json, or --shape NAME")
    try:
        return str(path), AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, from the JSON parser to each config's own checks
        raise FastFTConfigError(
            f"{file}: transformers cannot read this config ({one_line(error)}). Remedy: {_remedy(file, error)}"
        ) from error


def build_on_meta(source: str, config: Any, dtype: torch.dtype) -> Any:
    """A causal language model where transformers has one for the config, in training mode and without memory.

    Raises:
        FastFTConfigError: transformers cannot make it.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    maker = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    try:
        with torch.device("meta"):
            return maker.from_config(config, dtype=dtype, trust_remote_code=False).train()
    except Exception as error:
        raise FastFTConfigError(f"{source}: transformers cannot make this model ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    """An error in one line of at most 300 characters: its first paragraph, since advice and stack traces follow it."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _remedy(file: Path, error: Exception) -> str:
    from transformers import CONFIG_MAPPING

    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return "a config.json as save_pretrained() writes it"
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return "a config of a model type that the installed transformers knows, without code of its own"
    field = re.match(r"Validation error for field '(\w+)'", str(error))  # other errors do not say which one it is
    return f"mend {field[1] if field else 'its values'} in this file; its model type, {model_type}, is known"
