"""Measure TRL's stock SFTTrainer on rows that it packs itself (bfd), in this process."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
from typing import Any

import torch
import trl

import fastft_trl
from benchmarks.documents import Document
from benchmarks.measure import Clock, common_arguments, logged_losses, settle_garbage, steps_of, time_parts
from benchmarks.recorder import Recorder
from benchmarks.settings import Settings
from benchmarks.sft_names import SftStack
from benchmarks.shapes import LORA, build_model
from benchmarks.stacks import OFF
from benchmarks.tokenizer import make_tokenizer

ROWS = 2  # packed rows of a batch, which share its tokens

_FASTFT = {
    # "on", so that a run that cannot do what its name says fails instead of measuring something else.
    "fastft": {"packing": "on", "checkpointing": "off"},
    "fastft-planned": {"packing": "on", "checkpointing": "on"},
    "fastft-off": OFF,
}


def measure_sft(settings: Settings, stack: SftStack) -> dict[str, Any]:
    recorder = Recorder(settings)
    with tempfile.TemporaryDirectory() as directory:
        trainer = trl.SFTTrainer(
            model=make_model(settings, stack),
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


def make_model(settings: Settings, stack: SftStack) -> torch.nn.Module:
    if stack.kind == "unsloth":
        return _unsloth_model(settings, stack)
    return build_model(settings, "flex_attention" if stack.kind == "flex" else None)


def make_config(settings: Settings, stack: SftStack, directory: str) -> Any:
    options = common_arguments(settings, directory, stack.liger) | {
        "per_device_train_batch_size": ROWS,
        "max_length": settings.tokens // settings.accumulate // ROWS,
        "packing": True,
        "packing_strategy": "bfd",
        "shuffle_dataset": True,  # bfd packs the longest documents first; in every stack the rows come in one order
    }
    checkpointing = settings.checkpointing and stack.checkpointing
    if not (checkpointing and stack.kind == "unsloth"):  # its model comes with its own
        options["gradient_checkpointing"] = checkpointing
    if stack.every_n_layers > 1:
        options["gradient_checkpointing_kwargs"] = {"every_n_layers": stack.every_n_layers}
    if stack.kind in _FASTFT:
        return fastft_trl.SFTConfig(**options, fastft=True, fastft_config=_FASTFT[stack.kind])
    return trl.SFTConfig(**options)


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
    if stack.kind not in _FASTFT:
        return None
    report: dict[str, Any] = fastft_trl.report_of(trainer).to_dict()
    return report


def _unsloth_model(settings: Settings, stack: SftStack) -> torch.nn.Module:
    if "unsloth" not in sys.modules:
        raise RuntimeError("Unsloth must be imported before transformers: it has no turn in --one-process")
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        settings.weights,
        max_seq_length=settings.tokens // settings.accumulate // ROWS,
        dtype=settings.torch_dtype(),
        load_in_4bit=settings.quantize == "nf4",
    )
    adapted: torch.nn.Module = FastLanguageModel.get_peft_model(
        model,
        r=LORA["r"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=LORA["lora_dropout"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if settings.checkpointing and stack.checkpointing else False,
        random_state=settings.seed,
    )
    return adapted
