"""The demo's data: what is read, what is trained, and errors that name file, line and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from demo_helpers import chat_tokenizer

from fastft_plugins import FastFTConfigError
from fastft_plugins.demo import data


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_standard_library_gives_docstrings_and_bodies() -> None:
    records = data.standard_library(30, seed=0)
    assert len(records) == 30
    assert [record.where for record in records] == [record.where for record in data.standard_library(30, seed=0)]
    for record in records:
        user, assistant = record.messages
        assert "def " in user["content"] and (
            '"""' in user["content"] or "'" in user["content"] or '"' in user["content"]
        )
        assert assistant["content"].strip()
    assert len({record.where for record in records}) == 30


def test_another_seed_gives_another_sample() -> None:
    assert data.standard_library(30, seed=0) != data.standard_library(30, seed=1)


def test_three_forms_of_records(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return a + b"}]
    file = write(
        tmp_path, {"messages": messages}, "", {"prompt": "add", "completion": "return a + b"}, {"text": "return a + b"}
    )
    chat, pair, text = (data.tokenize(record, tokenizer, 64) for record in data.read_jsonl(file))
    assert chat == pair
    assert chat is not None and text is not None
    trained = [label for label in chat["labels"] if label != -100]
    assert tokenizer.decode(trained).replace(" ", "").startswith("returna+b")
    assert chat["labels"][0] == -100
    assert text["labels"] == text["input_ids"]


def test_completion_only_and_cut_at_max_length(tokenizer: Any) -> None:
    record = data.Record("here", ({"role": "user", "content": "add"}, {"role": "assistant", "content": "return " * 50}))
    whole = data.tokenize(record, tokenizer, 1000)
    assert whole is not None
    masked = whole["labels"].count(-100)
    cut = data.tokenize(record, tokenizer, masked + 5)
    assert cut is not None
    assert cut["input_ids"] == whole["input_ids"][: masked + 5]
    assert data.tokenize(record, tokenizer, masked) is None


def test_chat_records_need_a_chat_template(tmp_path: Path) -> None:
    plain = chat_tokenizer()
    plain.chat_template = None
    conversation = [{"role": role, "content": "add"} for role in ("system", "user", "assistant")]
    (record,) = data.read_jsonl(write(tmp_path, {"messages": conversation}))
    with pytest.raises(FastFTConfigError, match=r"data\.jsonl, line 1: .*chat template.*Remedy"):
        data.tokenize(record, plain, 64)
    (pair,) = data.read_jsonl(write(tmp_path, {"prompt": "add", "completion": "return"}))
    assert data.tokenize(pair, plain, 64) is not None


def test_records_repeat_until_there_are_enough(tokenizer: Any) -> None:
    records = [data.Record("a", text="return a"), data.Record("b", text="return b b")]
    usable = data.documents(records, tokenizer, 64, 5, "source")
    assert len(usable) == 2
    documents = data.repeated(usable, 5)
    assert len(documents) == 5
    assert documents[0] == documents[2] == documents[4] != documents[1]


def test_nothing_to_train_within_max_length(tokenizer: Any) -> None:
    records = [data.Record("a", ({"role": "user", "content": "add " * 50}, {"role": "assistant", "content": "a"}))]
    with pytest.raises(FastFTConfigError, match=r"source: .* 8 tokens\. Remedy: raise --max-length"):
        data.documents(records, tokenizer, 8, 4, "source")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "not valid JSON"),
        ("[1, 2]", "a list, not an object"),
        ({"texts": "typo"}, "no text; its keys: 'texts'"),
        ({}, "no text; its keys: none"),
        ({"text": "  "}, "no text in 'text'"),
        ({"text": 3}, "no text in 'text'"),
        ({"prompt": "add"}, "no text in 'completion'"),
        ({"prompt": "", "completion": "a"}, "no text in 'prompt'"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["hello"]}, "not a list of messages"),
        ({"messages": [{"role": "user", "content": "add"}]}, "last message has role 'user'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "no text in 'content'"),
    ],
)
def test_a_bad_record_names_file_line_and_remedy(tmp_path: Path, line: Any, problem: str) -> None:
    file = write(tmp_path, {"text": "a good one"}, "", line)
    with pytest.raises(FastFTConfigError) as caught:
        data.read_jsonl(file)
    message = str(caught.value)
    assert f"{file}, line 3: " in message
    assert problem in message
    assert "Remedy: " in message


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(FastFTConfigError, match=r"data\.jsonl: the file is empty\. Remedy"):
        data.read_jsonl(file)


def test_missing_folder_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(FastFTConfigError, match=r"nowhere\.jsonl: no such file\. Remedy"):
        data.read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(FastFTConfigError, match=r"is a directory, not a file\. Remedy"):
        data.read_jsonl(tmp_path)
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FastFTConfigError, match=r"data\.jsonl: cannot be read as UTF-8.*Remedy"):
        data.read_jsonl(file)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n', encoding="utf-8-sig")
    assert [record.text for record in data.read_jsonl(file)] == ["fine"]
