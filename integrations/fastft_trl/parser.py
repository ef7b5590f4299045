"""TRL's parser for ``trl sft``, which refuses what it does not know, and says what was meant.

TRL's own script lets unknown fields of its file pass: under ``trl sft`` they are options of ``accelerate launch``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.utils import DatasetConfig

from fastft_plugins.errors import FastFTConfigError, not_yaml
from fastft_trl.configs import SFTConfig

_CONFIGS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
_COMMAND = "python -m fastft_trl.sft"
_HELP = f"; {_COMMAND} --help lists all"


def parse(arguments: Sequence[str]) -> tuple[Any, ...]:
    """The four configs that TRL's script takes, from the command line and the YAML file that it names.

    Raises:
        FastFTConfigError: the file cannot be read, or an argument or a field of the file is wrong.
    """
    arguments = _spaced(arguments)
    file = _file_in(arguments)
    try:
        *configs, unknown = _Parser(file).parse_args_and_config(arguments, return_remaining_strings=True)
    except OSError as error:
        if error.filename != file:  # nothing to do with the file: a bug, or an output folder
            raise
        raise FastFTConfigError(
            f"--config: cannot read the config file {file} ({error.strerror}); allowed: a YAML file that is there"
        ) from error
    except yaml.YAMLError as error:
        raise FastFTConfigError(f"--config: {not_yaml(file, error)}") from error
    except _UnknownField:
        raise
    except ValueError as error:  # of transformers, TRL or fastft: a value that a config does not take
        place = f" (in {file} or on the command line)" if file is not None else ""
        raise FastFTConfigError(f"{error}{place}") from error
    if unknown:
        name = unknown[0].split("=")[0]
        meant = _nearest(name.lstrip("-"), _names(), "--") if name.startswith("-") else ""
        raise FastFTConfigError(f"unknown argument {' '.join(unknown)!r} on the command line{_HELP}{meant}")
    return tuple(configs)


class _UnknownField(FastFTConfigError):
    """The file has a field that nothing reads; the message names both."""


class _Parser(TrlParser):
    def __init__(self, file: str | None) -> None:
        self._file = file
        super().__init__(_CONFIGS, prog=_COMMAND)

    def error(self, message: str) -> NoReturn:
        """Without argparse's usage, which has hundreds of lines here."""
        raise FastFTConfigError(f"{message}{_HELP}")

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """What TRL calls with the content of the file, less ``env``, before it builds any config."""
        self._refuse_unknown(settings, _names(), "field")
        datasets = settings.get("datasets")
        for dataset in datasets if isinstance(datasets, list) else []:
            if isinstance(dataset, Mapping):
                self._refuse_unknown(dataset, {field.name for field in fields(DatasetConfig)}, "field of 'datasets'")
        rest: list[str] = super().set_defaults_with_config(**settings)
        return rest

    def _refuse_unknown(self, settings: Mapping[str, Any], allowed: Collection[str], kind: str) -> None:
        wrong = [
            f"unknown {kind} {name!r} (value {value!r}){_remedy(name, value, allowed)}"
            for name, value in settings.items()
            if name not in allowed
        ]
        if wrong:
            raise _UnknownField(f"{self._file}: {'; '.join(wrong)}{_HELP}")


def _names() -> set[str]:
    """The fields that a file may have."""
    return {field.name for config in _CONFIGS for field in fields(config) if field.init} | {"env"}


def _remedy(name: str, value: object, allowed: Collection[str]) -> str:
    # `trl sft` starts `accelerate launch` with these; this command runs below it, when it is too late.
    if name == "accelerate_config" or name in vars(launch_command_parser().parse_args(["a script"])):
        option = "config_file" if name == "accelerate_config" else name
        given = f"--{option}" if value is True else f"--{option} {value}"
        return f", which is for the launcher: accelerate launch {given} -m fastft_trl.sft"
    return _nearest(name, allowed)


def _nearest(name: str, allowed: Collection[str], before: str = "") -> str:
    matches = difflib.get_close_matches(name.lower(), sorted(allowed))
    return f", did you mean {' or '.join(repr(before + match) for match in matches)}?" if matches else ""


def _spaced(arguments: Sequence[str]) -> list[str]:
    """``--config=FILE`` as ``--config FILE``, the one form that TRL knows."""
    spaced: list[str] = []
    for argument in arguments:
        spaced += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    return spaced


def _file_in(arguments: Sequence[str]) -> str | None:
    if "--config" not in arguments:
        return None
    after = arguments[arguments.index("--config") + 1 :]
    if not after:
        raise FastFTConfigError("--config has no value; allowed: a YAML file, as in --config sft.yaml")
    return after[0]
