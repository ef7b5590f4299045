"""How much host memory this process may still take: the machine's own figure, and its container's limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number of about 2**63


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that are available to this process; 0 where nothing tells (no ``/proc``).

    Args:
        root: where ``proc`` and ``sys`` are found.
    """
    machine = _meminfo(root / "proc/meminfo")
    return max(0, min([machine, *_container_rooms(root)])) if machine else 0


def fair_share(root: Path = Path("/")) -> int:
    """Half of the available host memory, divided among the training processes of this machine."""
    return available_host_bytes(root) // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _meminfo(path: Path) -> int:
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _container_rooms(root: Path) -> Iterator[int]:
    """What each control group this process is in leaves of its limit; a parent's limit holds for its children."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        # Inside a container the path may be the one outside; then only the container's own root can be read.
        for folder in {top, group, *(parent for parent in group.parents if parent.is_relative_to(top))}:
            value = _read(folder / limit).strip()
            if value.isdigit() and int(value) < _UNLIMITED:
                yield int(value) - int(_read(folder / used).strip() or 0) + _file_cache(folder)


def _file_cache(group: Path) -> int:
    """Bytes that count as used, and that the kernel gives back when they are wanted."""
    for line in _read(group / "memory.stat").splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
