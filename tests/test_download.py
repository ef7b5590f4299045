"""Numbers for the host, where the device is the host itself; `test_host_syncs_gpu.py` has those of a GPU."""

from __future__ import annotations

import torch

from fastft_plugins.kernels.download import Download


def test_a_download_is_of_the_values_when_it_began() -> None:
    numbers = torch.arange(4)[::2]
    download = Download(numbers)
    numbers += 1
    assert download.get() == [0, 2]
