"""The pool of host buffers, and how much memory it may take."""

from __future__ import annotations

from pathlib import Path

import pytest
from lazy_transfer import LazyTransfer

from fastft_plugins.kernels.host_memory import available_host_bytes, fair_share
from fastft_plugins.kernels.pinned import HostPool, rounded

MB = 2**20


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 3 * MB, 5 * MB + 1, 134_217_728, 134_217_729])
def test_sizes_are_whole_pages_and_waste_little(nbytes: int) -> None:
    size = rounded(nbytes)
    assert size >= nbytes and size % 4096 == 0
    assert size - nbytes < max(4096, nbytes / 8)
    assert rounded(size) == size


def test_buffers_are_used_again_the_smallest_that_fits_first() -> None:
    pool = HostPool(LazyTransfer(), 100 * MB)
    large, small = pool.take(8 * MB), pool.take(2 * MB)
    assert large is not None and small is not None
    pool.give_back(small)
    pool.give_back(large)
    assert pool.take(1 * MB) is small
    assert pool.take(2 * MB) is large
    assert pool.allocations == 2


def test_growing_rows_leave_no_small_buffers_behind() -> None:
    transfer = LazyTransfer()
    pool = HostPool(transfer, 100 * MB)
    for size in range(1, 9):
        buffers = [pool.take(size * MB) for _ in range(3)]
        for buffer in buffers:
            assert buffer is not None
            pool.give_back(buffer)
    assert transfer.live == [8 * MB] * 3
    assert pool.allocated == 24 * MB


def test_the_budget_holds_and_the_oldest_make_way() -> None:
    transfer = LazyTransfer()
    pool = HostPool(transfer, 10 * MB)
    buffers = [pool.take(MB) for _ in range(10)]
    assert pool.take(MB) is None
    for buffer in buffers[:5]:
        assert buffer is not None
        pool.give_back(buffer)
    assert pool.take(4 * MB) is not None
    assert pool.allocated <= 10 * MB
    assert sum(transfer.live) == pool.allocated


def test_closing_frees_what_is_free_and_later_what_is_in_use() -> None:
    transfer = LazyTransfer()
    pool = HostPool(transfer, 10 * MB)
    one, two = pool.take(MB), pool.take(MB)
    assert one is not None and two is not None
    pool.give_back(one)
    del one
    pool.close()
    assert transfer.live == [MB]
    pool.give_back(two)
    del two
    assert transfer.live == [] and pool.allocated == 0


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 800 * 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 800 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "5000\n",
                "sys/fs/cgroup/a/memory.current": "2000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 300\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
            },
            3300,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n4:memory:/docker/1\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
            },
            5000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            800 * 1024,
        ),
    ],
    ids=["no groups", "unlimited", "a parent's limit", "version 1 in a container", "version 1 unlimited"],
)
def test_available_memory_respects_the_container(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_host_bytes(machine(tmp_path, files)) == expected


def test_processes_of_one_machine_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fair_share(machine(tmp_path, {})) == 100 * 1024


def test_unknown_memory_is_none(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path) == 0
