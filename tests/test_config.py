from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastft_plugins.config import FEATURES, MODES, FastFTConfig
from fastft_plugins.errors import FastFTConfigError

settings = st.fixed_dictionaries(
    {},
    optional={feature: st.sampled_from((*MODES, True, False)) for feature in FEATURES}
    | {
        "strict": st.booleans(),
        "memory_budget": st.just("auto") | st.integers(2**20) | st.floats(0, 1, exclude_min=True),
    },
)


def test_defaults() -> None:
    assert FastFTConfig().to_dict() == dict.fromkeys(FEATURES, "auto") | {
        "strict": False,
        "memory_budget": "auto",
        "max_tokens_per_batch": None,
    }


def test_is_frozen_and_hashable() -> None:
    config = FastFTConfig(moe=True)
    with pytest.raises(FrozenInstanceError):
        config.moe = "off"  # type: ignore[misc]
    assert hash(config) == hash(FastFTConfig(moe="on"))


@given(settings)
def test_dict_and_yaml_round_trips(given_settings: dict[str, Any]) -> None:
    config = FastFTConfig.from_dict(given_settings)
    assert FastFTConfig.from_dict(config.to_dict()) == config
    assert FastFTConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert FastFTConfig.coerce(given_settings) == config
    for feature in FEATURES:
        expected = given_settings.get(feature, "auto")
        assert config.mode(feature) == {True: "on", False: "off"}.get(expected, expected)


@pytest.mark.parametrize("word, mode", [("on", "on"), ("yes", "on"), ("true", "on"), ("off", "off"), ("auto", "auto")])
def test_yaml_files_may_use_bare_words(tmp_path: Path, word: str, mode: str) -> None:
    file = tmp_path / "fastft.yaml"
    file.write_text(f"packing: {word}  # a comment\nstrict: yes\n")
    config = FastFTConfig.from_yaml(file)
    assert (config.mode("packing"), config.mode("moe"), config.strict) == (mode, "auto", True)


def test_an_empty_yaml_file_means_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "fastft.yaml"
    file.write_text("# nothing set yet\n")
    assert FastFTConfig.from_yaml(str(file)) == FastFTConfig()


def test_coerce() -> None:
    config = FastFTConfig(packing="off")
    assert FastFTConfig.coerce(config) is config
    assert FastFTConfig.coerce(None) == FastFTConfig()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("value", ["onn", "", "ON", None, 1, 0, 1.0, ["on"], {"mode": "on"}])
def test_a_wrong_mode_names_field_value_and_allowed(feature: str, value: Any) -> None:
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig.from_dict({feature: value})
    message = str(raised.value)
    assert f"{feature}={value!r}" in message
    assert "allowed: 'auto', 'on', 'off'" in message


@pytest.mark.parametrize("value, nearest", [("onn", "on"), ("of", "off"), ("Auto", "auto"), ("aut", "auto")])
def test_a_wrong_mode_suggests_the_nearest(value: Any, nearest: str) -> None:
    with pytest.raises(FastFTConfigError, match=f"Did you mean '{nearest}'"):
        FastFTConfig(packing=value)


@pytest.mark.parametrize("value", [None, 1, ["on"]])
def test_what_is_not_text_gets_no_suggestion(value: Any) -> None:
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig.from_dict({"packing": value})
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize("value", ["on", "true", 1, None])
def test_strict_is_a_boolean(value: Any) -> None:
    with pytest.raises(FastFTConfigError, match=r"strict=.* allowed: True, False"):
        FastFTConfig(strict=value)


@given(st.data())
def test_a_mistyped_field_suggests_the_right_one(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from((*FEATURES, "strict")))
    position = data.draw(st.integers(0, len(name) - 1))
    mistyped = name[:position] + name[position + 1 :]
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig.from_dict({mistyped: "on"})
    for part in (
        f"unknown field {mistyped!r}",
        "'on'",
        "'packing', 'checkpointing', 'moe', 'bookkeeping', 'strict', 'memory_budget'",
        f"mean {name!r}",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("value", [0, -1, 1, 2**20 - 1, True, 0.0, 1.5, float("nan"), "40GB", None])
def test_a_wrong_memory_budget(value: Any) -> None:
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig(memory_budget=value)
    for part in (f"memory_budget={value!r}", "'auto'", "a number of bytes", "a fraction of the device's memory"):
        assert part in str(raised.value)


def test_a_field_that_resembles_nothing_gets_no_suggestion() -> None:
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig.from_dict({"zzz": 1})
    assert "Did you mean" not in str(raised.value)


def test_a_key_that_is_not_text() -> None:
    with pytest.raises(FastFTConfigError, match="unknown field True"):
        FastFTConfig.from_dict({True: "packing"})  # type: ignore[dict-item]  # YAML reads the key `on` so


@pytest.mark.parametrize("value", ["on", ["packing"], True, 3])
def test_settings_must_be_a_mapping(value: Any) -> None:
    with pytest.raises(FastFTConfigError, match="must be a mapping of 'packing'"):
        FastFTConfig.coerce(value)


def test_mode_of_an_unknown_feature() -> None:
    with pytest.raises(FastFTConfigError, match="Did you mean 'packing'"):
        FastFTConfig().mode("pakcing")


@pytest.mark.parametrize(
    "content, place",
    [
        (b"packing: on\nmoe: [on\n", ", line 3"),
        (b"packing: on\n\tmoe: on\n", ", line 2"),
        (b"packing: \xff\n", ""),
        (b"packing: 2026-99-99\n", ""),
        (b"- packing\n- moe\n", ""),
        (b"on\n", ""),
        (b"packing: fast\n", ": packing='fast'"),
        (b"pakcing: on\n", ": unknown field 'pakcing'"),
    ],
)
def test_a_malformed_yaml_file_is_named_with_the_line(tmp_path: Path, content: bytes, place: str) -> None:
    file = tmp_path / "fastft.yaml"
    file.write_bytes(content)
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig.from_yaml(file)
    assert f"{file}{place}" in str(raised.value)


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):  # a directory is no file either
        with pytest.raises(FastFTConfigError, match=str(path)):
            FastFTConfig.from_yaml(path)
