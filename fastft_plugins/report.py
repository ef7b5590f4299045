"""What a run did and why, for people (`str`) and for programs (`to_dict`)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastft_plugins.config import FEATURES
from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.saved_values import check

_WIDTH = 100  # columns of the terminal that the table is written for
_LEAST_WIDTH = 40  # below it, the column of reasons has no room left
_FEATURE = {"name": str, "enabled?": bool, "reason?": str, "changes?": [str], "metrics?": {str: float}}
_SAVED = {
    "features": {str: _FEATURE},
    **dict.fromkeys(("framework?", "model?", "state?"), str),
    "notes?": [str],
    "history?": [{str: float}],
}


@dataclass
class FeatureReport:
    """One feature in one run: whether it was on, why, what it changed and what it measured."""

    name: str
    enabled: bool = False
    reason: str = "not decided yet"
    changes: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """The whole run. ``features`` always holds every one of `FEATURES`; a plugin's own features follow them.

    ``history`` has one entry for each step that the trainer logged: its number, and what was measured up to it.
    """

    features: dict[str, FeatureReport] = field(default_factory=dict)
    framework: str = ""
    model: str = ""
    state: str = "not started"
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = self.features
        self.features = {name: given.get(name) or FeatureReport(name) for name in FEATURES} | {
            name: feature for name, feature in given.items() if name not in FEATURES
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Report:
        """Rebuild a report from `to_dict`'s result, for instance after reading it from JSON.

        Raises:
            FastFTConfigError: ``saved`` is something else; names the field and its value.
        """
        try:
            check(saved, _SAVED)
            features = {name: FeatureReport(**feature) for name, feature in saved["features"].items()}
            return cls(features, **{key: value for key, value in saved.items() if key != "features"})
        except (FastFTConfigError, TypeError) as error:  # TypeError: a field that a report does not have
            raise FastFTConfigError(
                f"this is not a saved fastft report ({error}); pass what Report.to_dict() returned"
            ) from error

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = _WIDTH) -> str:
        """Return the table with its texts broken at ``width`` columns."""
        return "\n".join(self._lines(max(width, _LEAST_WIDTH)))

    def _lines(self, width: int) -> Iterator[str]:
        title = ", ".join(part for part in (self.model, self.framework, self.state) if part)
        yield from _wrapped(width, "fastft: ", title)
        yield ""
        name_width = max(map(len, ["feature", *self.features]))
        blank = " " * (name_width + 7)
        yield f"{'feature':{name_width}}  {'':3}  why"
        yield f"{'-' * name_width}  {'-' * 3}  {'-' * (width - len(blank))}"
        for name, feature in self.features.items():
            state = "on" if feature.enabled else "off"
            yield from _wrapped(width, f"{name:{name_width}}  {state:3}  ", feature.reason)
            for change in feature.changes:
                yield from _wrapped(width, f"{blank}- ", change)
            key_width = max(map(len, feature.metrics), default=0)
            for key, value in feature.metrics.items():
                yield f"{blank}{key:{key_width}}  {format_metric(key, value):>12}".rstrip()
        if self.notes:
            yield ""
            yield "notes"
        for note in self.notes:
            yield from _wrapped(width, "- ", note)


def format_metric(name: str, value: float) -> str:
    """Write a number as a person would: 1,234; 12.3; 0.0123; and a name that ends in ``_share`` as a percentage."""
    if not math.isfinite(value):
        return str(value)
    if name.endswith("_share"):
        return f"{100 * value:.1f} %"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _wrapped(width: int, first: str, text: str) -> list[str]:
    """Break text at ``width``, with the later lines indented to where the first one's text begins."""
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
    return lines or [first.rstrip()]
