"""What ``fastft run`` starts: a command whose Python processes all read `fastft_plugins.autostart` first."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fastft_plugins
from fastft_plugins import auto
from fastft_plugins.config import FastFTConfig
from fastft_plugins.errors import FastFTConfigError

_AUTOSTART = Path(fastft_plugins.__file__).parent / "autostart"


def launch(command: Sequence[str], settings: Sequence[str], report: Path | None) -> NoReturn:
    """Become ``command``: its exit code, its signals and its terminal are its own.

    Raises:
        FastFTConfigError: there is no such script or program, or a setting is wrong.
    """
    arguments, environment = resolve(command), environment_for(settings, report, os.environ)
    sys.stdout.flush()
    try:
        os.execve(arguments[0], arguments, environment)
    except OSError as error:
        raise FastFTConfigError(f"{arguments[0]}: cannot be started ({error.strerror})") from error


def resolve(command: Sequence[str]) -> list[str]:
    """A script and ``-m module`` go to this Python; anything else is a program, looked for beside it and in PATH."""
    first = command[0]
    if first == "-m":
        if len(command) == 1:
            raise FastFTConfigError("-m: names no module; allowed: fastft run -m MODULE [ARGUMENT]...")
        return [sys.executable, *command]
    if first.startswith("-"):
        raise FastFTConfigError(f"{first}: is no option of fastft run; allowed: --config, --report, -m")
    if first.endswith((".py", ".pyz")) or os.path.isdir(first):  # as Python itself runs them
        if not os.path.exists(first):
            raise FastFTConfigError(f"{first}: no such script in {os.getcwd()}")
        return [sys.executable, *command]
    beside = os.path.dirname(sys.executable)  # an environment that is used without being activated
    program = shutil.which(first, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if program is None:
        raise FastFTConfigError(f"{first}: neither a Python script (*.py) nor a program that can be found in PATH")
    return [program, *command[1:]]


def environment_for(settings: Sequence[str], report: Path | None, inherited: Mapping[str, str]) -> dict[str, str]:
    """``inherited`` with what the processes below need. Without ``settings`` an inherited FASTFT_CONFIG stays."""
    environment = dict(inherited)
    paths = [entry for entry in inherited.get("PYTHONPATH", "").split(os.pathsep) if entry != str(_AUTOSTART)]
    environment["PYTHONPATH"] = os.pathsep.join([str(_AUTOSTART), *filter(None, paths)])
    environment[auto.AUTO] = "1"
    if settings:
        environment[auto.CONFIG] = json.dumps(_config(settings).to_dict())
    else:
        auto.config()  # a wrong one should not wait until a model has been loaded
    if report is not None:
        if not report.absolute().parent.is_dir():
            raise FastFTConfigError(f"--report {report}: the folder {report.parent} does not exist")
        environment[auto.REPORT] = str(report.absolute())
    return environment


def _config(settings: Sequence[str]) -> FastFTConfig:
    import yaml

    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise FastFTConfigError(f"--config {setting}: is not FIELD=VALUE; for instance --config packing=on")
        try:
            values[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FastFTConfigError(f"--config {setting}: the value is not valid YAML") from error
    try:
        return FastFTConfig.from_dict(values)
    except FastFTConfigError as error:
        raise FastFTConfigError(f"--config: {error}") from error
