"""What goes wrong silently when a transformers model is trained by Lightning, with or without this project."""

from __future__ import annotations

import logging
import sys

from torch import nn

from fastft_plugins.report import Report

logger = logging.getLogger("fastft")


def warn_about_traps(report: Report, module: nn.Module) -> None:
    """`from_pretrained` gives a model in eval mode, Lightning leaves it so, and checkpointing skips such layers."""
    if "transformers" not in sys.modules:
        return
    from fastft_hf.model import find_causal_lm

    causal_lm = find_causal_lm(module)
    if causal_lm is not None and is_checkpointing(causal_lm) and not causal_lm.training:
        note = (
            "gradient checkpointing is set, but the model is in eval mode, in which transformers skips it (and "
            "dropout): call model.train() before fit, Lightning does not"
        )
        report.notes.append(note)
        logger.warning("fastft: %s", note)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether activation checkpointing is set; transformers has renamed its own property for this."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
