"""`launch` asks Triton for a kernel once, and again where Triton might compile another one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel

from fastft_plugins.kernels.triton.launch import launch


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True

    def get_device(self):
        return 0


class Kernel:
    """Writes down how it is started: ``asked`` through Triton, ``started`` as the compiled kernel."""

    arg_names = ("x_ptr", "y_ptr", "width", "ROWS", "FLAG")

    def __init__(self, compiles=True):
        self.asked, self.started, self.compiles = [], [], compiles

    def __getitem__(self, grid):
        def ask(*arguments, **constants):
            self.asked.append((grid, arguments, constants))
            return Compiled(self) if self.compiles else None

        return ask


class Compiled(CompiledKernel):
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.started.append((grid, arguments))


def on_gpu(size=64, start=0):
    return torch.zeros(size + start)[start:].as_subclass(OnGpu)


CONSTANTS = {"num_warps": 4, "FLAG": True, "ROWS": 16}


def test_the_second_launch_takes_the_compiled_kernel():
    kernel, x, y = Kernel(), on_gpu(), on_gpu()
    launch(kernel, (3, 1, 1), x, None, 32, **CONSTANTS)
    launch(kernel, (5, 1, 1), y, None, 48, **CONSTANTS)
    assert kernel.asked == [((3, 1, 1), (x, None, 32), CONSTANTS)]
    ((grid, arguments),) = kernel.started
    assert grid == (5, 1, 1) and arguments[0] is y
    assert arguments[1:] == (None, 48, 16, True)  # the constants as the kernel names them, without Triton's options


def test_another_kind_of_argument_asks_triton_again():
    kernel, x = Kernel(), on_gpu()
    calls = [
        ((x, None, 32), CONSTANTS),
        ((on_gpu(start=1), None, 32), CONSTANTS),
        ((x.to(torch.float64), None, 32), CONSTANTS),
        ((x, x, 32), CONSTANTS),
        ((x, None, 1), CONSTANTS),
        ((x, None, 33), CONSTANTS),
        ((x, None, 2**31), CONSTANTS),
        ((x, None, 32), {**CONSTANTS, "ROWS": 32}),
        ((x, None, 32), {**CONSTANTS, "num_warps": 8}),
    ]
    for _ in range(2):
        for arguments, constants in calls:
            launch(kernel, (1, 1, 1), *arguments, **constants)
    assert len(kernel.asked) == len(kernel.started) == len(calls)


def test_another_kernel_and_another_device_have_kernels_of_their_own(monkeypatch):
    first, second, x = Kernel(), Kernel(), on_gpu()
    launch(first, (1, 1, 1), x, None, 32, **CONSTANTS)
    launch(second, (1, 1, 1), x, None, 32, **CONSTANTS)
    monkeypatch.setattr(OnGpu, "get_device", lambda self: 1)
    launch(second, (1, 1, 1), x, None, 32, **CONSTANTS)
    assert (len(first.asked), len(second.asked)) == (1, 2)
    assert not first.started and not second.started


@pytest.mark.parametrize("kernel, x", [(Kernel(), torch.zeros(64)), (Kernel(compiles=False), on_gpu())])
def test_without_a_compiled_kernel_everything_is_left_to_triton(kernel, x):
    """On a CPU, and under Triton's interpreter."""
    for _ in range(2):
        launch(kernel, (1, 1, 1), x, None, 32, **CONSTANTS)
    assert len(kernel.asked) == 2
    assert not kernel.started
