"""Lightning: one plugin. The module is an ordinary one, and its training_step still sees the padded batch."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning
import torch
from tiny import ROWS, pad, tiny_model
from torch.utils.data import DataLoader

from fastft_plugins import FastFTPlugin


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


plugin = FastFTPlugin()
with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        max_epochs=1, plugins=[plugin], default_root_dir=folder, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(ROWS, batch_size=8, collate_fn=pad))
print(plugin.report)
