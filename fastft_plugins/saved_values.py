"""Whether what was read from JSON has the shape that was saved; the error names the first field that has not."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from fastft_plugins.errors import FastFTConfigError

_WORDS = {str: "text", float: "a number", int: "a whole number", bool: "true or false"}
_LARGEST = 2**1000  # a whole number above it cannot be shown as a float


def check(value: Any, expected: Any, where: str = "") -> None:
    """Raise unless ``value`` is as ``expected`` describes.

    A type stands for itself, ``[what]`` for a list of it, ``{str: what}`` for an object with any keys, and
    ``{"name": what, "name?": what}`` for one with these keys, of which those with a question mark may be missing.

    Raises:
        FastFTConfigError: names the field, its value and what should be there.
    """
    if isinstance(expected, list):
        _require(isinstance(value, list), value, "a list", where)
        for index, one in enumerate(value):
            check(one, expected[0], f"{where}[{index}]")
    elif isinstance(expected, dict):
        _require(isinstance(value, Mapping), value, "an object", where)
        _check_fields(value, expected, f"{where}." if where else "")
    else:
        kinds = (int, float) if expected is float else expected
        is_too_large = isinstance(value, int) and abs(value) > _LARGEST
        _require(isinstance(value, kinds) and not is_too_large, value, _WORDS[expected], where)


def _check_fields(value: Mapping[str, Any], expected: dict[Any, Any], prefix: str) -> None:
    if str in expected:
        for key, one in value.items():
            _require(isinstance(key, str), key, "text", f"a key of {prefix.rstrip('.')}")
            check(one, expected[str], f"{prefix}{key}")
        return
    for name, what in expected.items():
        key = name.rstrip("?")
        if key in value:
            check(value[key], what, f"{prefix}{key}")
        elif key == name:
            raise FastFTConfigError(f"{prefix}{key} is missing")


def _require(is_right: bool, value: Any, wanted: str, where: str) -> None:
    if not is_right:
        raise FastFTConfigError(f"{where or 'the whole'} is {reprlib.repr(value)}, not {wanted}")
