"""Somebody else's code in a model: a replaced forward, a forward hook. What it does to the rows of a padded batch, a
loss per sequence say, it would do to the one row of a packed batch without a word."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fastft_hf.classes import written_class

# Packages whose forwards and hooks leave rows alone: precision, adapters, sharding, losses that are sums over tokens.
_KNOWN = ("torch", "transformers", "accelerate", "peft", "trl", "liger_kernel", "deepspeed", "lightning",
          "pytorch_lightning", "wandb")  # fmt: skip
# Packages whose layers treat each token by itself: of those above, and of quantization.
_KNOWN_LAYERS = (*_KNOWN, "bitsandbytes", "torchao", "gptqmodel", "auto_gptq", "awq", "hqq", "aqlm", "eetq", "optimum",
                 "compressed_tensors", "auto_round", "kernels")  # fmt: skip
_OURS = ("fastft_hf", "fastft_lightning", "fastft_plugins")


def replaced_forward(modules: Iterable[nn.Module]) -> str | None:
    """The reason if the forward of one of ``modules``, on the instance or its class, is code of unknown origin."""
    for module in modules:
        home = foreign_home(module.forward) or foreign_home(type(module).__call__)
        if home is not None:
            return f"the forward of {type(module).__name__} is replaced by code of {home}, which may look across rows"
    return None


def forward_hook(modules: Iterable[nn.Module]) -> str | None:
    """The reason if one of ``modules`` has a forward hook of unknown origin."""
    for module in modules:
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            home = foreign_home(hook)
            if home is not None:
                return f"{type(module).__name__} has a forward hook of {home}, which may change the batch or the loss"
    return None


def layer(modules: Iterable[nn.Module]) -> str | None:
    """The reason if one of ``modules`` is of a class of unknown origin."""
    for module in modules:
        written = written_class(module)
        if written.__module__.split(".")[0] not in (*_KNOWN_LAYERS, *_OURS):
            return f"{written.__name__}, of {written.__module__}, may look at other tokens than its own"
    return None


def foreign_home(function: Any) -> str | None:
    """The module of unknown origin that ``function``, or something it wraps, comes from; None if there is none."""
    homes = (home_of(each) for each in layers(function))
    return next((home for home in homes if home.split(".")[0] not in (*_KNOWN, *_OURS)), None)


def layers(function: Any) -> Iterator[Any]:
    """The function and what it wraps, outermost first."""
    while function is not None:
        if isinstance(function, functools.partial):
            yield from layers(function.func)
        else:
            function = getattr(function, "__func__", function)
            yield function
        function = getattr(function, "__wrapped__", None)


def home_of(function: Any) -> str:
    """The module whose code it is. Its ``__module__`` may be that of what it wraps: `functools.wraps` copies it."""
    namespace = getattr(function, "__globals__", None)
    return str(type(function).__module__ if namespace is None else namespace.get("__name__"))
