"""What a user can set: one mode for each feature, and whether an unsupported case is an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from fastft_plugins.errors import FastFTConfigError, not_yaml

Mode = Literal["auto", "on", "off"]

_LEAST_BYTES = 2**20  # below it, an integer was meant as a fraction

FEATURES = ("packing", "checkpointing", "moe", "bookkeeping")
MODES: tuple[Mode, ...] = ("auto", "on", "off")


@dataclass(frozen=True)
class FastFTConfig:
    """The settings of one run.

    ``packing``, ``checkpointing``, ``moe`` and ``bookkeeping`` are each ``"auto"`` (on where it is safe and helps),
    ``"on"`` (or raise before the first step, with the reason) or ``"off"``. ``strict=True`` raises wherever the stock
    path would be kept with a warning; where there is nothing to win, it is kept without one.

    ``memory_budget`` is the device memory that checkpointing may let tensors take in all: ``"auto"`` (what is there,
    less some head-room), bytes as an integer of at least 2**20, or a fraction of the device's memory, above 0.0 and at
    most 1.0.

    ``max_tokens_per_batch`` lets transformers' Trainer fill each packed batch with documents up to that many real
    tokens, in place of ``per_device_train_batch_size`` documents; None keeps the Trainer's own batches. A document that
    is longer has a batch of its own.
    """

    packing: Mode | bool = "auto"
    checkpointing: Mode | bool = "auto"
    moe: Mode | bool = "auto"
    bookkeeping: Mode | bool = "auto"
    strict: bool = False
    memory_budget: int | float | str = "auto"
    max_tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        for feature in FEATURES:
            value = getattr(self, feature)
            if isinstance(value, bool):  # YAML reads a bare on or off as a boolean
                value = "on" if value else "off"
            elif not isinstance(value, str) or value not in MODES:
                raise FastFTConfigError(_wrong_value(feature, value, MODES, "; True means 'on' and False means 'off'"))
            object.__setattr__(self, feature, value)
        if not isinstance(self.strict, bool):
            raise FastFTConfigError(_wrong_value("strict", self.strict, (True, False)))
        if not _is_memory_budget(self.memory_budget):
            raise FastFTConfigError(
                f"memory_budget={self.memory_budget!r} is not allowed; allowed: 'auto', a number of bytes (an integer, "
                f"at least {_LEAST_BYTES:,}), or a fraction of the device's memory (above 0.0, at most 1.0; 1.0 is all)"
            )
        self._check_max_tokens()

    def _check_max_tokens(self) -> None:
        value = self.max_tokens_per_batch
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FastFTConfigError(
                f"max_tokens_per_batch={value!r} is not allowed; allowed: None (the trainer's own batches), or how "
                "many tokens a batch may hold, an integer above 0, such as 8192"
            )
        if self.packing == "off":
            raise FastFTConfigError(
                f"max_tokens_per_batch={value!r} is not allowed with packing='off': padded batches hold more than "
                "their real tokens; allowed: None. Set packing='auto', or leave max_tokens_per_batch out"
            )

    def mode(self, feature: str) -> Mode:
        """Return the mode of one of `FEATURES`."""
        if feature not in FEATURES:
            raise FastFTConfigError(
                f"{feature!r} is not a feature; allowed: {_listed(FEATURES)}" + _nearest(feature, FEATURES)
            )
        return cast(Mode, getattr(self, feature))

    def to_dict(self) -> dict[str, Any]:
        """Return plain strings, booleans and numbers, as `from_dict` and YAML take them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> FastFTConfig:
        """Build a config from a mapping; what it leaves out keeps its default."""
        if not isinstance(settings, Mapping):
            raise FastFTConfigError(
                f"the settings must be a mapping of {_listed(_names())}, not {type(settings).__name__} {settings!r}"
            )
        for key in settings:
            if key not in _names():
                raise FastFTConfigError(
                    f"unknown field {key!r} (value {settings[key]!r}); allowed: {_listed(_names())}"
                    + _nearest(key, _names())
                )
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: str | Path) -> FastFTConfig:
        """Read a YAML file that holds one mapping; an empty file means the defaults."""
        import yaml

        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FastFTConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or a date like 2026-99-99
            raise FastFTConfigError(not_yaml(path, error)) from error
        try:
            return cls.from_dict({} if settings is None else settings)
        except FastFTConfigError as error:
            raise FastFTConfigError(f"{path}: {error}") from error

    @classmethod
    def coerce(cls, value: FastFTConfig | Mapping[str, Any] | None) -> FastFTConfig:
        """Accept what users pass as ``config=``: a config, a mapping, or None for the defaults."""
        if value is None:
            return cls()
        return value if isinstance(value, FastFTConfig) else cls.from_dict(value)


def _is_memory_budget(value: object) -> bool:
    if isinstance(value, float):
        return 0 < value <= 1
    return value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= _LEAST_BYTES)


def _names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(FastFTConfig))


def _wrong_value(field: str, value: object, allowed: Sequence[object], remark: str = "") -> str:
    return f"{field}={value!r} is not allowed; allowed: {_listed(allowed)}{remark}" + _nearest(value, allowed)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(repr, values))


def _nearest(value: object, allowed: Sequence[object]) -> str:
    if not isinstance(value, str):  # None would come out nearest to 'on'
        return ""
    by_text = {str(choice).lower(): choice for choice in allowed}
    match = difflib.get_close_matches(value.lower(), by_text, n=1)
    return f". Did you mean {by_text[match[0]]!r}?" if match else ""
