"""Trainers whose batches hold a number of tokens, and a stock Trainer that is fed the same groups of documents."""

from __future__ import annotations

from typing import Any

import torch
from hf_helpers import Pad, documents, make_trainer
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from fastft_plugins import FastFTCallback

BUDGET = 64
EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
NOT_DISPATCHED = {"accelerator_config": {"dispatch_batches": False}}


class Recorder(Pad):
    """Pads, and remembers the token ids of the documents of each batch it was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[list[list[int]]] = []

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        self.batches.append([list(feature["input_ids"]) for feature in features])
        return super().__call__(features)


class Stream(IterableDataset):
    """Documents of which each worker reads its share; epochs differ."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        rows = self.rows[self.epoch :] + self.rows[: self.epoch]
        return iter(rows if worker is None else rows[worker.id :: worker.num_workers])


class Replay(Trainer):
    """A stock Trainer whose epochs consist of the batches in ``groups``, lists of indices, one after the other."""

    groups: list[list[list[int]]]

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(self.unprepared())

    def unprepared(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_sampler=_Groups(self.groups), collate_fn=self.data_collator)


class _Groups:
    def __init__(self, epochs: list[list[list[int]]]) -> None:
        self.epochs, self.coming = epochs, iter(epochs)

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Any:
        return iter(next(self.coming))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def budget_trainer(folder: Any, model: torch.nn.Module, *more: Any, config: Any = None, **options: Any) -> Any:
    """A Trainer with a budget of `BUDGET` tokens, and its callback."""
    callback = FastFTCallback({"max_tokens_per_batch": BUDGET} | (config or {}))
    return make_trainer(folder, model, callbacks=[callback, *more], **options), callback


def epochs_of(batches: list[Any], per_epoch: int) -> list[list[Any]]:
    return [batches[start : start + per_epoch] for start in range(0, len(batches), per_epoch)]


def indices_of(batches: list[list[list[int]]], rows: list[dict[str, list[int]]] | None = None) -> list[list[int]]:
    """Which document each row of each batch is."""
    rows = documents() if rows is None else rows
    index = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}
    assert len(index) == len(rows)
    return [[index[tuple(ids)] for ids in batch] for batch in batches]


def tokens(batches: list[list[list[int]]]) -> list[int]:
    return [sum(map(len, batch)) for batch in batches]
