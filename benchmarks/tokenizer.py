"""A tokenizer that knows one token, for what asks for a tokenizer and only uses its padding token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

_PAD = "<pad>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({_PAD: 0}, unk_token=_PAD))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_PAD, eos_token=_PAD)


def padding_collator() -> Callable[..., dict[str, Any]]:
    """transformers' own right-padding collator."""
    collator: Callable[..., dict[str, Any]] = DataCollatorForSeq2Seq(make_tokenizer())
    return collator
