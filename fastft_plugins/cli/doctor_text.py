"""`fastft_plugins.cli.doctor`'s findings for people."""

from __future__ import annotations

import textwrap
from typing import Any


def as_text(found: dict[str, Any], width: int) -> str:
    """Return one block for each feature, with its lines broken at ``width``."""
    lines = [
        f"{found['class']} ({found['model']}), {_count(found['parameters'])} parameters, on {found['machine']}",
        "",
    ]
    for name, feature in found["features"].items():
        lines.append(f"{name}: {'on' if feature['enabled'] else 'off'}")
        lines += _item("why", feature["reason"], width)
        for kernel in feature["kernels"]:
            lines += _item("kernel", kernel, width)
        if feature["enabled"]:
            lines += _item("gain", feature["expected_gain"], width)
    lines += _item("dry run", found["dry_run"], width, indent="")
    for note in found["notes"]:
        lines += _item("note", note, width, indent="")
    return "\n".join(lines)


def _count(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:,.2f} {word}"
    return f"{number:,}"


def _item(label: str, text: str, width: int, indent: str = "  ") -> list[str]:
    first = f"{indent}{label:8}"
    return textwrap.wrap(
        text, max(width, 40), initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )
