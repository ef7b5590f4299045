"""The exceptions that users and plugin authors meet."""

from __future__ import annotations


class FastFTError(Exception):
    """Base class of every error this package raises on purpose."""


class FastFTConfigError(FastFTError, ValueError):
    """A setting is wrong. The message names the field, the value, what is allowed and the remedy."""


def not_yaml(path: object, error: Exception) -> str:
    """What to say of a config file that YAML's parser refused, or that is no text: where, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    place = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
    return f"the config file is not valid YAML ({place}): {getattr(error, 'problem', None) or error}"


class Declined(FastFTError):
    """A feature or an adapter cannot serve this run; its only argument is the reason, shown in the report.

    Under ``"auto"`` the stock path is kept; under ``"on"`` or ``strict=True`` the run raises `FastFTError`.
    """


class NoAdapter(Declined):
    """No plugin has anything to change in this target."""


class NothingToWin(Declined):
    """A feature has nothing to serve or to gain in this run, which is no shortcoming: no warning, not even strict."""
