"""How much of the copies of activations was hidden, in the logs of each framework's trainer."""

from __future__ import annotations

import lightning_helpers
import pytest
import test_checkpointing_hf
import trl_helpers
from hf_helpers import make_trainer, tiny_model
from test_checkpointing_hf import ONLY, OPTIONS, checkpointed_model
from test_metrics import Records
from transformers import TrainerCallback

from fastft_lightning import FastFTLightningCallback
from fastft_plugins import FastFTCallback

lazy, room = test_checkpointing_hf.lazy, test_checkpointing_hf.room  # fixtures


def rows_of(framework, folder):
    """What the trainer of ``framework`` logs every second one of six steps."""
    options = {"logging_steps": 2, "max_steps": 6}
    if framework == "lightning":
        logger, module = Records(), lightning_helpers.Module(checkpointed_model())
        options = {"logger": logger, "log_every_n_steps": 2, "callbacks": [FastFTLightningCallback(ONLY)]}
        lightning_helpers.make_trainer(folder, **options).fit(module, lightning_helpers.loader())
        return logger.rows
    if framework == "trl":
        options |= OPTIONS | {"fastft": True, "fastft_config": ONLY}
        trainer = trl_helpers.sft_trainer(folder, trl_helpers.tokens(), **options)
    else:
        trainer = make_trainer(folder, tiny_model(), callbacks=[FastFTCallback(ONLY)], **OPTIONS, **options)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("framework", ["transformers", "trl", "lightning"])
def test_trainers_log_how_much_of_the_copies_was_hidden(framework, lazy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(lazy, "hidden_share", lambda: asked.append(lazy.copies) or 0.75)
    shares = [row["fastft/overlap"] for row in rows_of(framework, tmp_path) if "fastft/overlap" in row]
    # The first of the three logs comes before anything is offloaded, and only steps that log are measured.
    assert shares == [0.75, 0.75] and len(asked) == 2 and lazy.copies


class RoomLater(TrainerCallback):
    """From the step after ``step`` on, there is room to keep every layer."""

    def __init__(self, room, step):
        self.room, self.step = room, step

    def on_step_end(self, args, state, control, **kwargs):
        self.room.bytes = 2**40 if state.global_step >= self.step else 0


def test_it_is_not_logged_of_copies_that_were_logged_before(lazy, room, tmp_path):
    callbacks = [FastFTCallback(ONLY), RoomLater(room, 5)]
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=callbacks, max_steps=8, logging_steps=1, **OPTIONS)
    trainer.train()
    steps = [row["step"] for row in trainer.state.log_history if "fastft/overlap" in row]
    assert steps == [3, 4, 5], "two steps are stock, and after the fifth nothing is copied"
