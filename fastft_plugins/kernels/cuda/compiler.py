"""Compiles CUDA C++ by NVRTC, which torch's recent CUDA builds bring along with its Python bindings. Needs no GPU."""

from __future__ import annotations

from typing import Any

_OLDEST = (12, 4)  # 12.0 to 12.3 make every wgmma wait for the one before


def compile_cuda(source: str, name: str, architecture: str) -> bytes:
    """The machine code (cubin) of ``source``.

    Args:
        name: the file's name in messages.
        architecture: such as ``sm_90a``.

    Raises:
        ImportError: the package cuda-bindings is missing.
        RuntimeError: the NVRTC library is missing or too old, or with the compiler's messages.
    """
    from cuda.bindings import nvrtc

    status, *version = nvrtc.nvrtcVersion()
    if int(status) != 0 or tuple(version) < _OLDEST:
        raise RuntimeError(f"needs NVRTC {_OLDEST[0]}.{_OLDEST[1]} or newer, found {version[0]}.{version[1]}")
    program = _result(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        options = [f"-arch={architecture}".encode(), b"-std=c++17", b"-lineinfo"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = bytearray(_result(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC cannot compile {name}: {log.decode(errors='replace').strip(chr(0)).strip()}")
        cubin = bytearray(_result(nvrtc.nvrtcGetCUBINSize(program)))
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _result(returned: tuple[Any, Any]) -> Any:
    status, value = returned
    if int(status) != 0:
        raise RuntimeError(f"NVRTC failed: {status}")
    return value
