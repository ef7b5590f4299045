"""Lightning modules around a tiny model, and the entry points that this project declares, installed or not."""

from __future__ import annotations

import copy
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning
import torch
from hf_helpers import Pad, documents, tiny_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
GROUPS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")


def declare_entry_points(folder: Path) -> None:
    """Write this project's Lightning entry points into ``folder`` as an installer would, unless they are installed."""
    if all(entry_points(group=group, name="fastft") for group in GROUPS):
        return
    text, lines = (ROOT / "pyproject.toml").read_text(), []
    for group in GROUPS:
        (entry,) = re.findall(rf'^\[project\.entry-points\."{re.escape(group)}"\]\n(.*)$', text, re.MULTILINE)
        lines += [f"[{group}]", entry.replace('"', "")]
    metadata = folder / "fastft_declared-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fastft-declared\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


class Steps:
    """What a module does in training, for the `LightningModule` of either namespace."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.model = tiny_model() if model is None else copy.deepcopy(model)
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
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Module(Steps, lightning.LightningModule):
    """The module most people write: the batch as keyword arguments, the model's own loss."""


class NamedArguments(Module):
    def loss(self, batch):
        return self.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss


class TuningItsRate(Module):
    """Has what `LearningRateFinder` sets."""

    lr = 0.05

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class DictOutput(Module):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx) * 0.5, "rows": len(batch["input_ids"])}


class Accuracy(Module):
    """Looks at the logits in the padded shape, for a metric only."""

    def loss(self, batch):
        output = self.model(**batch)
        predicted, labels = output.logits.argmax(-1)[:, :-1], batch["labels"][:, 1:]
        trained = labels != -100
        self.log("accuracy", (predicted == labels)[trained].float().mean(), on_epoch=True)
        return output.loss


class OwnLoss(Module):
    """A mean per sequence, from the logits alone."""

    def loss(self, batch):
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return self.mean_per_sequence(logits, batch["labels"])

    @staticmethod
    def mean_per_sequence(logits, labels):
        token_losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        trained = labels[:, 1:] != -100
        return ((token_losses * trained).sum(1) / trained.sum(1)).mean()


class OwnLossBesideTheModels(OwnLoss):
    """Passes labels, and then makes another loss from the logits."""

    def loss(self, batch):
        output = self.model(**batch)
        return output.loss + self.mean_per_sequence(output.logits, batch["labels"])


class LabelsOfItsOwn(Module):
    def loss(self, batch):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss


def loader(collator: Any = None, data: Any = None, **options: Any) -> DataLoader:
    defaults = {"batch_size": 4, "collate_fn": collator or Pad("right", 1)}
    return DataLoader(documents(22) if data is None else data, **(defaults | options))


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
