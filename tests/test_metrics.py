"""fastft's own numbers in the trainers' logs: where users look, and nowhere else."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from hf_helpers import documents, losses, make_trainer, tiny_model
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_helpers import Module, loader
from lightning_helpers import make_trainer as make_lightning_trainer
from moe_helpers import tiny_causal_lm
from transformers import TrainerCallback

from fastft_lightning import FastFTLightningCallback
from fastft_plugins import FastFTCallback, apply
from fastft_plugins.metrics import Window
from fastft_plugins.moe import load

PACKING = {"fastft/real_tokens_per_second", "fastft/padding_share"}


class Reporter(TrainerCallback):
    """What a reporting integration sees: they come before the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def train(tmp_path: Any, callbacks: list[Any], **options: Any) -> tuple[Any, Reporter]:
    trainer, reporter = make_trainer(tmp_path, tiny_model(), callbacks=callbacks, **options), Reporter()
    trainer.callback_handler.callbacks.insert(0, reporter)
    trainer.train()
    return trainer, reporter


def test_a_trainer_logs_them_beside_the_loss(tmp_path: Any) -> None:
    options = {"logging_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    stock, their_reporter = train(tmp_path, [], trainer_options={"eval_dataset": documents(4)}, **options)
    callback = FastFTCallback({"packing": "on"})
    ours, reporter = train(tmp_path, [callback], trainer_options={"eval_dataset": documents(4)}, **options)
    assert losses(ours) == pytest.approx(losses(stock), rel=2e-6)
    for mine, theirs in ((ours.state.log_history, stock.state.log_history), (reporter.seen, their_reporter.seen)):
        assert [own(entry, "stock") for entry in mine] == [own(entry, "stock") for entry in theirs]
        logged = [own(entry, "ours") for entry in mine if own(entry, "ours")]
        assert len(logged) == 2 and all(keys == PACKING for keys in logged)
    assert all("loss" in entry for entry in ours.state.log_history if own(entry, "ours"))
    assert [entry["step"] for entry in callback.report.history] == [2, 4]
    metrics = callback.report.features["packing"].metrics
    shares = [entry["padding_share"] for entry in callback.report.history]
    assert min(shares) <= metrics["padding_share"] <= max(shares)
    assert "log" not in vars(ours)


def own(entry: dict[str, float], whose: str) -> set[str]:
    return {name for name in entry if name.startswith("fastft/") == (whose == "ours")}


def test_a_block_around_a_trainer_logs_them_too(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, tiny_model())
    with apply(trainer) as run:
        trainer.train()
    assert sum(bool(own(entry, "ours")) for entry in trainer.state.log_history) == 5 == len(run.report.history)


def test_steps_that_do_not_log_are_not_measured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    close = Window.close
    monkeypatch.setattr(Window, "close", lambda window, step: steps.append(step) or close(window, step))
    train(tmp_path, [FastFTCallback()], logging_steps=3, max_steps=7)
    assert steps == [3, 6]


def test_nothing_is_logged_where_nothing_is_on(tmp_path: Any) -> None:
    trainer, _ = train(tmp_path, [FastFTCallback({"packing": "off", "moe": "off"})])
    assert not any(own(entry, "ours") for entry in trainer.state.log_history)


def test_the_load_of_the_experts(tmp_path: Any) -> None:
    callback = FastFTCallback({"moe": "on", "packing": "off"})
    trainer = make_trainer(tmp_path, tiny_causal_lm(), callbacks=[callback])
    trainer.train()
    (experts,) = {module.num_experts for module in trainer.model.modules() if hasattr(module, "has_gate")}
    logged = [entry["fastft/expert_imbalance"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 5 and all(1 <= value <= experts for value in logged)
    assert load.imbalance(trainer.model) is None  # nothing is kept


def test_imbalance() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    load.remember(model[0], torch.tensor([2, 2, 2, 2], dtype=torch.int32))
    load.remember(model[1], torch.tensor([8, 0, 0, 0], dtype=torch.int32))
    assert load.imbalance(model) == pytest.approx((1 + 4) / 2)


class Records(Logger):
    """Keeps what it is given, by step."""

    name, version = "records", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightnings_loggers_get_them(tmp_path: Any, accumulate: int) -> None:
    recorded = []
    for callbacks in ([], [FastFTLightningCallback({"packing": "on"})]):
        logger = Records()
        options = {"log_every_n_steps": 2, "max_steps": 4, "max_epochs": 4, "accumulate_grad_batches": accumulate}
        trainer = make_lightning_trainer(tmp_path, logger=logger, callbacks=callbacks, **options)
        trainer.fit(Module(), loader())
        recorded.append(logger.rows)
    stock, ours = recorded
    logged = [row for row in ours if own(row, "ours")]
    assert [row["step"] for row in logged] == [1, 3] and all(own(row, "ours") == PACKING for row in logged)
    assert [row.keys() for row in ours if not own(row, "ours")] == [row.keys() for row in stock]


def test_lightning_without_a_logger_logs_no_step(tmp_path: Any, monkeypatch: Any) -> None:
    """Taking the numbers may wait for the GPU, and stock does not wait where nobody is given any."""
    closed: list[int] = []
    monkeypatch.setattr(Window, "close", lambda self, step: closed.append(step) or {})
    for logger in (Records(), False):
        options = {"log_every_n_steps": 2, "callbacks": [FastFTLightningCallback()]}
        make_lightning_trainer(tmp_path, logger=logger, **options).fit(Module(), loader())
    assert closed == [1, 3, 5]


def test_lightnings_csv_file_gets_them(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    options = {"log_every_n_steps": 2, "callbacks": [FastFTLightningCallback({"packing": "on"})]}
    make_lightning_trainer(tmp_path, logger=logger, **options).fit(Module(), loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss_step", *PACKING):
        assert [row["step"] for row in rows if row[name]] == ["1", "3", "5"]
