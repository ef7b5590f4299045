"""Random weights in a folder, for stacks that load a model instead of making one: those in 4 bits, and Unsloth's.

Every stack of a comparison then loads the same weights in the way its users do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import BitsAndBytesConfig

from benchmarks.settings import Settings
from benchmarks.shapes import build_model
from benchmarks.tokenizer import make_tokenizer


def main(settings_file: str, folder: str) -> None:
    save(Settings(**json.loads(Path(settings_file).read_text())), folder)


@contextlib.contextmanager
def saved_weights(settings: Settings) -> Iterator[Settings]:
    """Settings whose ``weights`` are in a folder that is there for the block."""
    with tempfile.TemporaryDirectory() as folder:
        settings_file = Path(folder, "settings.json")
        settings_file.write_text(json.dumps(dataclasses.asdict(settings)))
        # A process of its own: this one would keep a part of the GPU's memory from all the others.
        subprocess.run([sys.executable, "-m", "benchmarks.weights", str(settings_file), folder], check=True)
        yield dataclasses.replace(settings, weights=folder)


def save(settings: Settings, folder: str) -> None:
    """Write the shape's model as ``from_pretrained`` reads it, its linear layers in 4 bits if asked for."""
    model: Any = build_model(dataclasses.replace(settings, trainable="full"))
    if settings.quantize == "nf4":
        model.config.quantization_config = quantise(model, settings.torch_dtype())
    save_model(model, str(Path(folder, "model.safetensors")), metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def quantise(model: Any, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Replace the linear layers below the head by bitsandbytes' nf4 layers, one by one, as QLoRA has them."""
    import bitsandbytes as bnb

    skipped = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if isinstance(linear, nn.Linear) and linear is not skipped:
                device = linear.weight.device
                layer = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                layer.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
                )
                layer.bias = linear.bias
                setattr(parent, name, layer.to(device))  # the move to its device quantises
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
