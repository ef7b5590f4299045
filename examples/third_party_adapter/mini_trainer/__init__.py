"""A trainer that fastft-plugins has never heard of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader


class MiniTrainer:
    """Trains ``model`` for one epoch with plain SGD."""

    def __init__(self, model: nn.Module, rows: Sequence[Any], collate: Callable[[Any], Any], lr: float = 0.05) -> None:
        self.model, self.rows, self.collate, self.lr = model, rows, collate, lr
        self.losses: list[float] = []

    def fit(self) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)
        for batch in DataLoader(self.rows, batch_size=8, collate_fn=self.collate):  # type: ignore[arg-type]
            loss = self.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.item())
