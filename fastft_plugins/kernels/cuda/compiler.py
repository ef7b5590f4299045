"""Compiles CUDA C++ by NVRTC, which torch's CUDA builds bring along with Python bindings. Needs no GPU."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def compiler_fails(architecture: str) -> str | None:
    """Why nothing can be compiled for ``architecture`` here, or None."""
    try:
        compile_cuda('extern "C" __global__ void probe() {}', "probe.cu", architecture)
    except Exception as error:  # a missing package, a missing library, an old compiler
        return f"needs NVRTC for {architecture}: {type(error).__name__}: {error}"
    return None


def compile_cuda(source: str, name: str, architecture: str) -> bytes:
    """The machine code (cubin) of ``source``.

    Args:
        name: the file's name in messages.
        architecture: such as ``sm_90a``.

    Raises:
        ImportError: the package cuda-bindings or the NVRTC library is missing.
        RuntimeError: with the compiler's messages.
    """
    from cuda.bindings import nvrtc

    program = _result(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    options = [f"-arch={architecture}".encode(), b"-std=c++17", b"-lineinfo"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_result(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC cannot compile {name}: {log.decode(errors='replace').strip(chr(0)).strip()}")
    cubin = bytearray(_result(nvrtc.nvrtcGetCUBINSize(program)))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _result(returned: tuple[Any, Any]) -> Any:
    status, value = returned
    if int(status) != 0:
        raise RuntimeError(f"NVRTC failed: {status}")
    return value
