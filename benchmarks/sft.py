"""Measure TRL's stock SFTTrainer on rows that it packs itself (bfd): its stacks, by name, and one process of one."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from dataclasses import dataclass
from typing import Any

from benchmarks.documents import Document
from benchmarks.measure import (
    Clock,
    common_arguments,
    logged_losses,
    settle_garbage,
    steps_of,
    time_parts,
)
from benchmarks.recorder import Recorder
from benchmarks.settings import Settings
from benchmarks.shapes import build_model
from benchmarks.tokenizer import make_tokenizer

ROWS = 2  # packed rows of a batch, which share its tokens

HELP = """\
trl-ATTENTION[-liger][-nocheckpoint | -every-N]: SFTTrainer, packing with bfd into 2 rows of half the tokens each
    sdpa, flex       stock, with sdpa, as a plain install has it, or flex_attention
    fastft           the same trainer with SFTConfig(fastft=True), sdpa; checkpointing stays torch's own
    fastft-planned   and checkpointing="on": fastft decides which layers to keep
    -liger           use_liger_kernel=True, in stock stacks and ours alike
    -nocheckpoint    activation checkpointing off;  -every-N: every N-th layer only (every_n_layers)"""

_NAME = re.compile(
    r"trl-(?P<attention>sdpa|flex|fastft(?P<planned>-planned)?)(?P<liger>-liger)?"
    r"(?:-(?P<off>nocheckpoint)|-every-(?P<every>[1-9]\d*))?"
)


@dataclass(frozen=True)
class SftStack:
    """One way to train: what `HELP` says, taken apart."""

    flex: bool
    fastft: dict[str, str] | None  # the config's fastft_config, where fastft is on
    liger: bool
    checkpointing: bool
    every_n_layers: int = 1

    @classmethod
    def from_name(cls, name: str) -> SftStack:
        """Raises ValueError for a name that is none of these stacks."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a stack of SFTTrainer")
        fastft = None
        if match["attention"].startswith("fastft"):
            # "on", so that a run that cannot do what its name says fails instead of measuring something else.
            fastft = {"packing": "on", "checkpointing": "on" if match["planned"] else "off"}
        return cls(
            flex=match["attention"] == "flex",
            fastft=fastft,
            liger=match["liger"] is not None,
            checkpointing=match["off"] is None,
            every_n_layers=int(match["every"] or 1),
        )


def measure_sft(settings: Settings, stack: SftStack) -> dict[str, Any]:
    from trl import SFTTrainer

    recorder = Recorder(settings)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=build_model(settings, "flex_attention" if stack.flex else None),
            args=make_config(settings, stack, directory),
            train_dataset=make_dataset(settings),
            processing_class=make_tokenizer(),
            callbacks=[Clock(recorder)],
        )
        time_parts(trainer, recorder)
        settle_garbage()
        recorder.start()
        trainer.train()
    tokens, packed = packed_steps(trainer.train_dataset, settings)
    return {**recorder.result(tokens, logged_losses(trainer), _report(trainer, stack)), "packed": packed}


def make_config(settings: Settings, stack: SftStack, directory: str) -> Any:
    import trl

    import fastft_trl

    options = common_arguments(settings, directory, stack.liger) | {
        "per_device_train_batch_size": ROWS,
        "max_length": settings.tokens // settings.accumulate // ROWS,
        "packing": True,
        "packing_strategy": "bfd",
        "shuffle_dataset": True,  # bfd packs the longest documents first; in every stack the rows come in one order
        "gradient_checkpointing": settings.checkpointing and stack.checkpointing,
    }
    if stack.every_n_layers > 1:
        options["gradient_checkpointing_kwargs"] = {"every_n_layers": stack.every_n_layers}
    if stack.fastft is None:
        return trl.SFTConfig(**options)
    return fastft_trl.SFTConfig(**options, fastft=True, fastft_config=stack.fastft)


def make_dataset(settings: Settings) -> Any:
    """The comparison's documents as a dataset, and some more: packed, they may fill fewer rows than they are tokens."""
    from datasets import Dataset

    more = dataclasses.replace(settings, steps=settings.steps + settings.total_steps // 20 + 1)
    documents: list[Document] = [document for step in steps_of(more) for document in step]
    return Dataset.from_dict({"input_ids": documents})


def packed_steps(rows: Any, settings: Settings) -> tuple[list[int], dict[str, Any]]:
    """The real tokens of each step, and what a result records about the packed rows the steps were made of."""
    per_step = ROWS * settings.accumulate
    count = settings.total_steps * per_step
    if len(rows) < count:
        raise RuntimeError(f"{settings.total_steps} steps need {count} packed rows, and there are {len(rows)}")
    trained = rows.select(range(count))
    ids = list(trained["input_ids"])
    tokens = [sum(map(len, ids[start : start + per_step])) for start in range(0, count, per_step)]
    packed = {"tokens_per_step": tokens, "digest": hashlib.sha256(repr(ids).encode()).hexdigest()[:16]}
    if "seq_lengths" in trained.column_names:
        documents = [len(lengths) for lengths in trained["seq_lengths"]]
        packed["documents_per_step"] = [sum(documents[at : at + per_step]) for at in range(0, count, per_step)]
    return tokens, packed


def _report(trainer: Any, stack: SftStack) -> dict[str, Any] | None:
    if stack.fastft is None:
        return None
    from fastft_trl import report_of

    report: dict[str, Any] = report_of(trainer).to_dict()
    return report
