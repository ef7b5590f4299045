"""How often the host waits for the GPU: in the move of a batch never, in a Trainer's whole step no more than stock."""

from __future__ import annotations

import itertools
import time
import warnings

import pytest
import torch
from gpu_helpers import host_syncs_are_errors
from hf_helpers import Pad, documents, make_trainer
from test_gpu import padded_batch, small_model
from transformers import TrainerCallback

from fastft_plugins import FastFTCallback
from fastft_plugins.kernels.download import Download
from fastft_plugins.kernels.transfer import _upload_queue
from fastft_plugins.packing import METADATA_KEY, PackedMetadata, PaddingFreeCollator

pytestmark = pytest.mark.gpu
TENSORS = ("cu_seqlens", "position_ids", "seq_idx")


def test_a_download_is_there_once_the_device_has_come_to_it():
    numbers = torch.arange(4, device="cuda")
    numbers += 0  # a kernel's first launch loads it, and a first download allocates page-locked memory: both wait
    Download(numbers)
    torch.cuda.synchronize()
    with host_syncs_are_errors():
        torch.cuda._sleep(100_000_000)
        numbers += 1
        download = Download(numbers)
        numbers += 1
        assert download.get() is None
    torch.cuda.synchronize()
    assert download.get() == [1, 2, 3, 4]


def packed(seed=0):
    return PaddingFreeCollator(lambda batch: batch)(padded_batch(seed))


def pinned(batch):
    """As a `DataLoader` with ``pin_memory=True`` leaves it."""
    return torch.utils.data._utils.pin_memory.pin_memory(batch)


@pytest.mark.parametrize("prepare", [lambda batch: batch, pinned], ids=["pageable", "pinned"])
def test_a_batch_moves_without_a_wait_and_arrives_whole(prepare):
    packed().to("cuda")  # the first one allocates page-locked memory
    host, batch = packed(), prepare(packed())
    with host_syncs_are_errors():
        moved = batch.to("cuda")
    for name, value in host.items():
        if isinstance(value, torch.Tensor):
            assert moved[name].is_cuda and moved[name].dtype == value.dtype and torch.equal(moved[name].cpu(), value)
    metadata = moved[METADATA_KEY]
    assert metadata.lengths == host[METADATA_KEY].lengths
    for name in TENSORS:
        assert torch.equal(getattr(metadata, name).cpu(), getattr(host[METADATA_KEY], name))
    assert moved["cu_seq_lens_q"] is metadata.cu_seqlens
    back = metadata.to("cpu")
    assert not back.cu_seqlens.is_cuda and torch.equal(back.cu_seqlens, host[METADATA_KEY].cu_seqlens)


def test_a_batch_arrives_while_the_step_before_computes():
    packed().to("cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(int(4e9))  # about two seconds
    moved = packed().to("cuda")
    queue, until = _upload_queue(moved["input_ids"].device), time.monotonic() + 1
    while not queue.query() and time.monotonic() < until:
        time.sleep(0.001)
    assert queue.query(), "the copies wait for the step before"
    assert not torch.cuda.current_stream().query()


def test_memory_of_batches_is_not_used_again_too_early():
    """The computation lags behind the moves of a hundred batches, of which the host keeps none."""
    expected, got = [], []
    for seed in range(100):
        batch = packed(seed)
        expected.append(int(batch["input_ids"].sum()) + int(batch[METADATA_KEY].seq_idx.sum()))
        torch.cuda._sleep(int(2e6))
        batch.to("cuda")
        got.append(batch["input_ids"].sum() + batch[METADATA_KEY].seq_idx.sum())
    assert [int(total) for total in got] == expected


def test_metadata_left_on_the_host_moves_without_a_wait():
    metadata = PackedMetadata.from_lengths([5, 3])
    metadata.to("cuda")
    with host_syncs_are_errors():
        moved = metadata.to(torch.device("cuda"))
    assert moved.cu_seqlens.tolist() == [0, 5, 8]


class Syncs(TrainerCallback):
    """Counts what `torch.cuda.set_sync_debug_mode` warns of, by step; a step ends with its last event."""

    def __init__(self, seen):
        self.seen, self.ends = seen, []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in self.seen))

    def by_step(self):
        """Of the steps after the second, when everything is warm: the move of the batch is a part of its step."""
        return [end - begin for begin, end in itertools.pairwise(self.ends[1:])]


def syncs_of_training(folder, callbacks, **options):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        counter = Syncs(seen)
        trainer = make_trainer(
            folder,
            small_model("llama"),
            collator=Pad(),
            callbacks=[counter, *callbacks],
            data=documents(64, longest=200),
            use_cpu=False,
            logging_strategy="no",
            max_steps=8,
            **options,
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counter.by_step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_num_workers": 2},
        {"dataloader_pin_memory": False},
        {"optim": "adamw_torch", "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "workers", "pageable", "accumulation", "checkpointing"],
)
def test_steps_that_do_not_log_wait_no_more_often_than_stocks(tmp_path, options):
    callback = FastFTCallback({"packing": "on"})
    stock = syncs_of_training(tmp_path, [], **options)
    ours = syncs_of_training(tmp_path, [callback], **options)
    print(f"host syncs by step: stock {stock}, ours {ours}")
    assert callback.report.features["packing"].metrics["packed_batches"] > 0
    assert len(ours) == len(stock) == 6 and min(stock) > 0
    assert all(mine <= theirs for mine, theirs in zip(ours, stock, strict=True))
