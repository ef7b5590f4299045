"""FASTFT_TRACE=1: one log line for each hook call, with the plugins asked, the arguments and the result."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import pluggy


def trace_hook_calls(manager: pluggy.PluginManager, logger: logging.Logger) -> None:
    """Log every hook call of ``manager`` at INFO, to stderr if the program has configured no logging."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(_OnePrefix())
        logger.addHandler(handler)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)

    def before(name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        """pluggy wants both; a call is logged once, when its result is known."""

    def after(
        outcome: pluggy.Result[Any],
        name: str,
        implementations: Sequence[pluggy.HookImpl],
        arguments: Mapping[str, Any],
    ) -> None:
        asked = ", ".join(implementation.plugin_name for implementation in reversed(implementations)) or "no plugin"
        given = ", ".join(f"{key}={_short(value)}" for key, value in arguments.items())
        error = outcome.exception
        result = _short(outcome.get_result()) if error is None else f"raised {type(error).__name__}: {error}"
        logger.info("%s(%s) by %s -> %s", name, given, asked, result)

    manager.add_hookcall_monitoring(before, after)


class _OnePrefix(logging.Formatter):
    """Puts the logger's name before a message that does not begin with it already."""

    def format(self, record: logging.LogRecord) -> str:
        text, prefix = super().format(record), f"{record.name}: "
        return text if text.startswith(prefix) else prefix + text


def _short(value: object) -> str:
    """Name a value in a few characters; a model's or a trainer's own repr would fill the screen."""
    if value is None or isinstance(value, (str, int, float)):
        return reprlib.repr(value)
    if isinstance(value, (list, tuple)):
        shown = [_short(one) for one in value[:4]] + ["..."] * (len(value) > 4)
        return f"[{', '.join(shown)}]"
    return str(getattr(value, "__qualname__", f"<{type(value).__qualname__}>"))
