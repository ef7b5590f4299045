from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft_plugins.config import FEATURES
from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.report import FeatureReport, Report, format_metric

words = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), max_size=300)
feature_reports = st.builds(
    FeatureReport,
    name=st.just("packing"),
    enabled=st.booleans(),
    reason=words,
    changes=st.lists(words, max_size=3),
    metrics=st.dictionaries(st.from_regex(r"[a-z_]{1,30}", fullmatch=True), st.floats(allow_nan=False), max_size=4),
)
reports = st.builds(
    Report,
    features=st.fixed_dictionaries({}, optional=dict.fromkeys((*FEATURES, "a_plugins_own"), feature_reports)),
    framework=words,
    model=words,
    state=words,
    notes=st.lists(words, max_size=3),
)


def full_report() -> Report:
    report = Report(framework="transformers Trainer", model="LlamaForCausalLM", state="finished", notes=["all good"])
    packing = report.features["packing"]
    packing.enabled = True
    packing.reason = "a causal language model with its own loss, and more than half of each batch is padding. " * 3
    packing.changes.append("Trainer.data_collator wrapped")
    packing.metrics |= {"padding_share": 0.562, "real_tokens": 1234.0, "step_ms": 12.345}
    return report


def test_every_feature_is_always_there() -> None:
    for report in (
        Report(),
        Report({"moe": FeatureReport("moe", True, "asked for")}),
        Report.from_dict({"features": {}}),
    ):
        assert tuple(report.features) == FEATURES
        assert all(feature.name == name for name, feature in report.features.items())
    assert not Report().features["packing"].enabled
    assert Report().state == "not started"


def test_a_plugins_own_feature_follows_ours() -> None:
    report = Report({"theirs": FeatureReport("theirs", True, "asked for")})
    assert tuple(report.features) == (*FEATURES, "theirs")
    assert "theirs" in str(report)


def test_two_reports_share_nothing() -> None:
    Report().features["packing"].metrics["steps"] = 1.0
    assert Report().features["packing"].metrics == {}


@given(reports)
def test_survives_json_and_stays_within_the_terminal(report: Report) -> None:
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    # A number alone may be wider than the terminal; text never is.
    numbers = [
        format_metric(key, value) for feature in report.features.values() for key, value in feature.metrics.items()
    ]
    assert all(len(line) <= 100 or line.endswith(tuple(numbers)) for line in str(report).splitlines())


def test_the_table_shows_everything_a_reader_needs() -> None:
    text = str(full_report())
    for part in ("LlamaForCausalLM, transformers Trainer, finished", "- Trainer.data_collator wrapped", "- all good"):
        assert part in text
    rows = [line.split() for line in text.splitlines()]
    assert ["padding_share", "56.2", "%"] in rows
    assert ["real_tokens", "1,234"] in rows
    assert ["step_ms", "12.3"] in rows
    assert ["packing", "on"] in [row[:2] for row in rows]
    assert ["checkpointing", "off"] in [row[:2] for row in rows]


def test_reasons_are_wrapped_under_their_column() -> None:
    lines = str(full_report()).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("packing"))
    column = lines[first].index("a causal")
    assert lines[first + 1][:column].isspace() and not lines[first + 1][column].isspace()


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("padding_share", 0.562, "56.2 %"),
        ("padding_share", 0.0, "0.0 %"),
        ("padding_share", 1, "100.0 %"),
        ("padding_share", float("nan"), "nan"),
        ("share_of_steps", 0.5, "0.5"),
        ("tokens", 1234.0, "1,234"),
        ("tokens", 1234.4, "1,234"),
        ("tokens", 12345678, "12,345,678"),
        ("batches_left_padded", 0.0, "0"),
        ("step_ms", 12.345, "12.3"),
        ("step_ms", 3.14159, "3.14"),
        ("difference", -0.0001234, "-0.000123"),
        ("difference", 1.5e-7, "1.5e-07"),
        ("difference", float("inf"), "inf"),
    ],
)
def test_format_metric(name: str, value: float, text: str) -> None:
    assert format_metric(name, value) == text


@pytest.mark.parametrize(
    "saved, reason",
    [
        ({}, "features is missing"),
        ([], r"the whole is \[\], not an object"),
        ({"features": []}, r"features is \[\], not an object"),
        ({"features": {"packing": {}}}, "features.packing.name is missing"),
        ({"features": {"packing": {"name": "packing", "speed": 1}}}, "speed"),
        ({"features": {"packing": {"name": "packing", "reason": None}}}, "features.packing.reason is None, not text"),
        ({"features": {"packing": {"name": "packing", "metrics": None}}}, "packing.metrics is None, not an object"),
        ({"features": {"packing": {"name": "packing", "metrics": {"a": "b"}}}}, "metrics.a is 'b', not a number"),
        ({"features": {"packing": {"name": "packing", "metrics": {"a": 10**400}}}}, "metrics.a is 1.*0, not a number"),
        ({"features": {"packing": {"name": "packing", "changes": [1]}}}, r"changes\[0\] is 1, not text"),
        ({"features": {}, "model": 1}, "model is 1, not text"),
        ({"features": {}, "speed": 1}, "speed"),
    ],
)
def test_what_is_not_a_report_is_refused(saved: Any, reason: str) -> None:
    with pytest.raises(FastFTConfigError, match=f"not a saved fastft report .*{reason}"):
        Report.from_dict(saved)


@pytest.mark.parametrize("width", [1, 60, 80])
def test_texts_are_broken_at_any_width(width: int) -> None:
    report = full_report()
    assert max(map(len, report.to_text(width).splitlines())) <= max(width, 60)  # words and numbers stay whole
    assert "".join(report.to_text(width).split()).replace("-", "") == "".join(str(report).split()).replace("-", "")
