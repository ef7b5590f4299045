"""Real training data: the standard library of the running Python, or a JSONL file.

A *record* is one document before tokenisation: a pair of texts, prompt and completion, of which only the completion
is trained. The prompt is empty for plain text.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastft_plugins.errors import FastFTConfigError

FORMS = '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Record:
    """One document: the messages of a chat, or a single text; ``where`` names its origin in errors."""

    where: str
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""


def standard_library(count: int, seed: int) -> list[Record]:
    """Return ``count`` random pairs "signature and docstring → body" from Python's own standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_DIRECTORIES)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    shuffle = random.Random(seed)
    shuffle.shuffle(files)
    # A pool some times larger than what is needed, so that neighbours in the sample come from different files.
    pool: list[Record] = []
    for file in files:
        pool += _functions(file)
        if len(pool) >= 20 * count:
            break
    if not pool:
        raise FastFTConfigError(f"{root}: no Python sources with docstrings here. Remedy: name a file with --data.")
    return shuffle.sample(pool, min(count, len(pool)))


def _functions(file: Path) -> Iterator[Record]:
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # a few test fixtures of the standard library are broken on purpose
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        first, second = node.body[0], node.body[1]
        if not ast.get_docstring(node) or first.end_lineno is None or second.lineno <= first.end_lineno:
            continue
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.end_lineno]))
        body = textwrap.dedent("\n".join(lines[first.end_lineno : node.end_lineno])).strip("\n")
        yield Record(
            f"{file}, line {node.lineno}",
            (
                {"role": "user", "content": f"Write the body of this Python function.\n\n{head}"},
                {"role": "assistant", "content": body},
            ),
        )


def read_jsonl(file: Path) -> list[Record]:
    """Read one record a line.

    Raises:
        FastFTConfigError: the file is missing, empty or no JSONL, or a record has no text; names file, line and remedy.
    """
    if not file.is_file():
        problem = "is a directory, not a file" if file.is_dir() else "no such file"
        raise FastFTConfigError(f"{file}: {problem}. Remedy: --data FILE.jsonl, with one record a line: {FORMS}.")
    records = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    records.append(_parse(line, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise FastFTConfigError(f"{file}: cannot be read as UTF-8 text ({error}). Remedy: save it as UTF-8.") from error
    if not records:
        raise FastFTConfigError(f"{file}: the file is empty. Remedy: write one record a line: {FORMS}.")
    return records


def _parse(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise FastFTConfigError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}). Remedy: one JSON object a line: {FORMS}."
        ) from error
    if not isinstance(value, dict):
        raise FastFTConfigError(f"{where}: a {type(value).__name__}, not an object. Remedy: write {FORMS}.")
    if "messages" in value:
        return Record(where, _messages(value["messages"], where))
    if "prompt" in value or "completion" in value:
        roles = (("user", "prompt"), ("assistant", "completion"))
        return Record(where, tuple({"role": role, "content": _text(value, key, where)} for role, key in roles))
    if "text" in value:
        return Record(where, text=_text(value, "text", where))
    found = ", ".join(map(repr, value)) or "none"
    raise FastFTConfigError(f"{where}: the record has no text; its keys: {found}. Remedy: write {FORMS}.")


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise FastFTConfigError(f"{where}: 'messages' is not a list of messages. Remedy: write {FORMS}.")
    if value[-1].get("role") != "assistant":
        raise FastFTConfigError(
            f"{where}: the last message has role {value[-1].get('role')!r}, and nothing in the record is trained. "
            "Remedy: end each record with a message of role 'assistant'."
        )
    return tuple(
        {"role": _text(message, "role", where), "content": _text(message, "content", where)} for message in value
    )


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise FastFTConfigError(f"{where}: the record has no text in {key!r} ({text!r}). Remedy: write {FORMS}.")
    return text


def tokenize(record: Record, tokenizer: Any, max_length: int) -> dict[str, list[int]] | None:
    """Return ``input_ids`` and ``labels`` of one document, or None if nothing within ``max_length`` is trained.

    The prompt's labels are -100: only the completion is trained.
    """
    prompt, full = _render(record, tokenizer)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    completion_ids = tokenizer(full[len(prompt) :], add_special_tokens=False)["input_ids"]
    input_ids = (prompt_ids + completion_ids)[:max_length]
    labels = ([-100] * len(prompt_ids) + completion_ids)[:max_length]
    # A document's first label has no token before it that could predict it.
    if all(label == -100 for label in labels[1:]):
        return None
    return {"input_ids": input_ids, "labels": labels}


def _render(record: Record, tokenizer: Any) -> tuple[str, str]:
    """Return the prompt and the whole document as texts; the first is a prefix of the second."""
    end = tokenizer.eos_token or ""
    if record.text:
        return "", record.text + end
    if tokenizer.chat_template:
        messages = list(record.messages)
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        # Some templates write the last turn differently when it is still to come: train from where they part.
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(asked, full, strict=False))
        return "".join(character for character, _ in shared), full
    if len(record.messages) > 2 or [message["role"] for message in record.messages] != ["user", "assistant"]:
        raise FastFTConfigError(
            f"{record.where}: this model's tokenizer has no chat template for 'messages'. "
            "Remedy: write prompt and completion, or text."
        )
    prompt, completion = (message["content"] for message in record.messages)
    return prompt, prompt + completion + end


def documents(
    records: Sequence[Record], tokenizer: Any, max_length: int, count: int, source: str
) -> list[dict[str, Any]]:
    """Tokenise ``records`` in their order until there are ``count`` documents, or no records are left."""
    found: list[dict[str, Any]] = []
    for record in records:
        if len(found) == count:
            break
        if (document := tokenize(record, tokenizer, max_length)) is not None:
            found.append(document)
    if not found:
        raise FastFTConfigError(
            f"{source}: no record has anything to train within {max_length} tokens. Remedy: raise --max-length."
        )
    return found


def repeated(found: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` documents, the ones given over and over if need be."""
    return [found[index % len(found)] for index in range(count)]
