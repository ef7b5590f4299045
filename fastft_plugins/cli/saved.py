"""Reading a report that was saved as JSON, for ``fastft report``."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.report import Report

_REMEDY = "Remedy: a file with json.dumps(report.to_dict()), or the report.json of a demo"


def show_saved(file: Path, console: Console) -> None:
    """Print the report in a file.

    Raises:
        FastFTConfigError: the file is missing, is not JSON or holds something else.
    """
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastFTConfigError(f"{file}: cannot be read ({error.strerror}). {_REMEDY}.") from error
    except UnicodeDecodeError as error:
        raise FastFTConfigError(f"{file}: not a text file. {_REMEDY}.") from error
    except json.JSONDecodeError as error:
        raise FastFTConfigError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}). {_REMEDY}.") from error
    if isinstance(saved, dict) and saved.get("kind") == "fastft demo":
        from fastft_plugins.demo.show import show

        try:
            return show(saved, console)
        except (KeyError, TypeError, ValueError) as error:
            raise FastFTConfigError(f"{file}: a demo's report, but not complete ({error!r}). {_REMEDY}.") from error
    if not isinstance(saved, dict):
        raise FastFTConfigError(f"{file}: a JSON {type(saved).__name__}, not an object. {_REMEDY}.")
    try:
        console.out(str(Report.from_dict(saved)), highlight=False)
    except FastFTConfigError as error:
        raise FastFTConfigError(f"{file}: {error}. {_REMEDY}.") from error
