"""Write the results page, README.md beside the result files, from every JSON file there.

    python -m benchmarks.page            # after a new result, then commit both
    python -m benchmarks.page --check    # exit status 1 if the page is not what the files give

The page begins with `benchmarks/page.md`. A file of an unknown layout is listed with its command.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.page_tables import (
    Results,
    block_table,
    gradient_tables,
    link,
    products_table,
    sweep_tables,
    table,
    training_table,
    words_of,
)
from benchmarks.table import RESULTS, load, machine

INTRODUCTION = Path(__file__).with_suffix(".md")
# A file's theme is the longest of these with which its name begins, otherwise its first word. Each has its heading, and
# what must be known to read its tables.
THEMES = {
    "padded": ("Padded batches", ""),
    "packed": ("Packed rows", ""),
    "sft": ("Supervised fine-tuning with TRL", ""),
    "lightning": ("Lightning, padded batches", ""),
    "off": ("Every feature off", "What it costs to have the callback there with nothing switched on."),
    "metadata": ("Metadata once a batch", ""),
    "experts_block": (
        "One mixture-of-experts block",
        "Forward and backward; *faster* is the quotient of the two medians. Peak memory is above what the block, its "
        "input and the gradient of its output hold.",
    ),
    "experts_products": (
        "The grouped products of experts",
        "Each kernel forced, its rows sorted before; cuBLAS multiplies as many rows, all experts equally long.",
    ),
    "experts": ("Experts in whole models", ""),
    "checkpointing": (
        "Activation checkpointing",
        "Forward and backward; `planned@40` is planned in 40 GB. *Speed* is the median step of `plain` by this one's, "
        "*copying hidden* the part of the copies' time in which the computation did not wait for them, and *settling* "
        "what the steps took before the plan stayed as it is.",
    ),
    "gradients": (
        "Accuracy of gradients",
        "‖gradient − truth‖ / ‖truth‖ over all layers, the truth in fp64; below 1, *fastft / stock* says that ours is "
        "the smaller error. All runs send each token to the experts that the truth has chosen.",
    ),
}
# By the program that made it, which the command in a result names.
LAYOUTS: dict[str, Callable[[Results], str]] = {
    "run": training_table,
    "moe_block": block_table,
    "grouped_products": products_table,
    "checkpoint_sweep": sweep_tables,
    "gradient_accuracy": gradient_tables,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of the result files (this package's)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    file = options.folder / "README.md"
    try:
        text = page(options.folder)
    except ValueError as error:
        parser.error(str(error))
    if not options.check:
        file.write_text(text, encoding="utf-8")
        print(f"written to {file}")
        return 0
    found = file.read_text(encoding="utf-8") if file.exists() else ""
    if found == text:
        return 0
    changes = difflib.unified_diff(
        found.splitlines(), text.splitlines(), "the page", "what the files give", "", "", 0, ""
    )
    print(*list(changes)[:20], sep="\n", file=sys.stderr)
    print(f"{file} is not what the JSON files give: run python -m benchmarks.page and commit the page", file=sys.stderr)
    return 1


def page(folder: Path) -> str:
    """Raises ValueError, which names the file, for one that cannot be read or lacks part of its layout."""
    themes: dict[str, dict[str, dict[str, Any]]] = {}
    others: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        result = read(file)
        group = others if layout(result) is None else themes.setdefault(theme(file.stem), {})
        group[file.stem] = result
    parts = [
        "<!-- Made by python -m benchmarks.page from the JSON files here and benchmarks/page.md: do not edit. -->",
        INTRODUCTION.read_text(encoding="utf-8").strip(),
    ]
    for name in [*THEMES, *sorted(themes.keys() - THEMES)]:
        if name in themes:
            title, note = THEMES.get(name, (name.capitalize(), ""))
            parts += [f"## {title}", *filter(None, [note]), *section(folder, themes[name])]
    if others:
        parts += ["## Other files", table("file|command", [[link(name), command(one)] for name, one in others.items()])]
    return "\n\n".join(parts) + "\n"


def section(folder: Path, results: Results) -> list[str]:
    """The tables of one theme, its pictures, and of what each file was made."""
    parts = []
    for key, tables in LAYOUTS.items():
        if same := {name: result for name, result in results.items() if layout(result) == key}:
            parts.append(tables(same))
    parts += [f"![{name}]({name}.png)" for name in results if (folder / f"{name}.png").exists()]
    return [*parts, provenance(results)]


def read(file: Path) -> dict[str, Any]:
    """A result; one of a known layout is complete.

    Raises:
        ValueError: with the file's name.
    """
    try:
        result = load(file)
        if not isinstance(result, dict):
            return {}
        if key := layout(result):
            LAYOUTS[key]({file.stem: result})
            provenance({file.stem: result})
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: not a complete result ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return result


def layout(result: dict[str, Any]) -> str | None:
    """The program that made it, if its tables are known."""
    named = re.search(r"-m benchmarks\.(\w+)", str(result.get("command")))
    return named[1] if named and named[1] in LAYOUTS else None


def theme(name: str) -> str:
    return max((known for known in THEMES if name.startswith(known)), key=len, default=name.partition("_")[0])


def provenance(results: Results) -> str:
    rows = [
        [link(name), machine(one["environment"]), commit(one["commit"]), one["date"][:10], command(one)]
        for name, one in results.items()
    ]
    return table("file|machine|commit|date|command", rows)


def commit(name: str | None) -> str:
    number, _, dirty = (name or "unknown").partition("-")
    return number[:12] + (f"-{dirty}" if dirty else "")


def command(result: dict[str, Any]) -> str:
    """Without the file it wrote, which is nobody else's."""
    words = words_of(result)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return f"`{shlex.join(words)}`" if words else "unknown"


if __name__ == "__main__":
    sys.exit(main())
