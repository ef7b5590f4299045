"""Reading a report that was saved as JSON, and a plot of it, for ``fastft report``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fastft_plugins.cli.plots import draw_run
from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.report import Report

_REMEDY = "Remedy: a file of `fastft run --report FILE`, of json.dumps(report.to_dict()), or the report.json of a demo"


def show_saved(file: Path, console: Console) -> Callable[[Path], None]:
    """Print the report in a file; returns what draws a plot of it into a file.

    Raises:
        FastFTConfigError: the file is missing, is not JSON or holds something else.
    """
    saved = _read(file)
    if not isinstance(saved, dict):
        raise FastFTConfigError(f"{file}: a JSON {type(saved).__name__}, not an object. {_REMEDY}.")
    try:
        if saved.get("kind") == "fastft demo":
            from fastft_plugins.demo import output
            from fastft_plugins.demo.saved import check_result
            from fastft_plugins.demo.show import show

            check_result(saved)
            show(saved, console)
            return partial(output.plot, saved)
        report = Report.from_dict(saved)
        console.out(report.to_text(min(console.width, 100)), highlight=False)
        return partial(draw_run, report)
    except FastFTConfigError as error:
        raise FastFTConfigError(f"{file}: {error}. {_REMEDY}.") from error


def _read(file: Path) -> Any:
    try:
        saved = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(saved, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but cannot be printed
    except OSError as error:
        raise FastFTConfigError(f"{file}: cannot be read ({error.strerror}). {_REMEDY}.") from error
    except json.JSONDecodeError as error:
        raise FastFTConfigError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}). {_REMEDY}.") from error
    except UnicodeError as error:
        raise FastFTConfigError(f"{file}: not a text file in UTF-8. {_REMEDY}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise FastFTConfigError(f"{file}: cannot be read as JSON ({error}). {_REMEDY}.") from error
    return saved
