"""Lightning modules around a tiny model, and the entry points that this project declares, installed or not."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from hf_helpers import Pad, documents, tiny_model
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
GROUPS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")


def declare_entry_points(folder: Path) -> None:
    """Write the metadata of this project's Lightning entry points, as an installer would, into ``folder``."""
    text = (ROOT / "pyproject.toml").read_text()
    lines = []
    for group in GROUPS:
        (entry,) = re.findall(rf'^\[project\.entry-points\."{re.escape(group)}"\]\n(.*)$', text, re.MULTILINE)
        lines += [f"[{group}]", entry.replace('"', "")]
    metadata = folder / "fastft_declared-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fastft-declared\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


class Module(lightning.LightningModule):
    """The module most people write: the model's own loss, with the batch as keyword arguments."""

    def __init__(self, model: torch.nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.model = copy.deepcopy(model) if model is not None else tiny_model()
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(collator: Any = None, data: Any = None, **options: Any) -> DataLoader:
    return DataLoader(
        documents(22) if data is None else data, **({"batch_size": 4, "collate_fn": collator or Pad()} | options)
    )


def make_trainer(folder: Path | str, namespace: Any = lightning, **options: Any) -> Any:
    defaults = {
        "default_root_dir": str(folder),
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
    }
    return namespace.Trainer(**(defaults | options))


__all__ = ["DataLoader", "Module", "declare_entry_points", "loader", "make_trainer", "sys"]
