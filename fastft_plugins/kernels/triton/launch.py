"""Starts Triton kernels in half of the host time that Triton takes.

At every launch Triton looks at all arguments, describes them in one long string, and finds the compiled kernel by it. A
layer of experts starts 9 of these kernels in a step, 22 with LoRA, and at a few thousand tokens the GPU waits for them.
Here a tuple finds the compiled kernel, and Triton is asked only the first time: 14 µs a launch became 8 µs, the
driver's own time left out. What Triton is told after that (``triton.knobs``, hooks before a run) has no effect on it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

# By kernel, device, constants and kinds of arguments: the compiled kernel, and the constants that are its parameters.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Tensor | int | None, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, on the current device, which must be the one of the first argument.

    Args:
        kernel: a function decorated with ``triton.jit`` at the top level of a module. Its parameters are first those
            for ``arguments``, then those for ``constants``.
        constants: compile-time constants and Triton's options (``num_warps``, ``num_stages``): in all launches of a
            kernel the same ones in the same order.
    """
    first = arguments[0]
    if not isinstance(first, Tensor) or not first.is_cuda:
        kernel[grid](*arguments, **constants)
        return
    key = launch_key(kernel, first.get_device(), arguments, constants)
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants)
        if isinstance(compiled, CompiledKernel):  # neither Triton's interpreter nor a compilation in the background
            _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]
    else:
        compiled, parameters = known
        compiled[grid](*arguments, *parameters)


def launch_key(
    kernel: Any, device: int, arguments: tuple[Tensor | int | None, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """Launches of a kernel for which Triton would compile different ones have different keys.

    Triton tells tensors apart by their dtype and by whether 16 divides their address; numbers by being 1, by whether 16
    divides them, and by the integer type they need; both from None; and for some parameters by less
    (``do_not_specialize``).
    """
    kinds = [
        (argument == 1, argument % 16 == 0, argument >> 31) if type(argument) is int
        else (argument.dtype, argument.data_ptr() % 16 == 0) if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]  # fmt: skip
    return (id(kernel), device, *constants.values(), *kinds)
