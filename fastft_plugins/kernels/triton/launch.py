"""Starts Triton kernels in a third of the host time that Triton itself takes to find the compiled one.

At every launch Triton looks at all arguments, describes them in one long string, and finds the kernel by it. A layer of
experts starts 9 kernels in a step, 22 with LoRA, and at a few thousand tokens the GPU waits for them. Here a tuple
finds the kernel, and Triton is asked only the first time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# By kernel, device, constants and kinds of arguments: the compiled kernel, and the constants that are its parameters.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Tensor | int | None, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, on the current device, which must be the one of the first argument.

    Args:
        kernel: a function decorated with ``triton.jit`` at the top level of a module. Its parameters are first those
            for ``arguments``, then those for ``constants``.
        constants: compile-time constants, then Triton's options (``num_warps``, ``num_stages``).
    """
    first = arguments[0]
    if not isinstance(first, Tensor) or not first.is_cuda:  # for Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    key = launch_key(kernel, first.get_device(), arguments, constants)
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants)
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]
    else:
        compiled, parameters = known
        compiled[grid](*arguments, *parameters)


def launch_key(
    kernel: Any, device: int, arguments: tuple[Tensor | int | None, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """Two launches for which Triton would compile different kernels have different keys.

    Triton tells arguments apart by a number that is 1, a number or an address that 16 divides, and the size of the
    integer type that a number needs; by nothing else, and for some parameters by less (``do_not_specialize``).
    """
    kinds = [
        (argument == 1, argument % 16 == 0, argument >> 31) if type(argument) is int
        else (argument.dtype, argument.data_ptr() % 16 == 0) if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]  # fmt: skip
    return (id(kernel), device, *constants.values(), *kinds)
