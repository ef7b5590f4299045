"""A tokenizer of three tokens, for what asks for a tokenizer and only uses its padding token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

# Of different kinds: one that pads with the end of a text counts as misconfigured with some.
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({_PAD: 0, _END: 1, _UNKNOWN: 2}, unk_token=_UNKNOWN))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN)


def padding_collator() -> Callable[..., dict[str, Any]]:
    """transformers' own right-padding collator."""
    collator: Callable[..., dict[str, Any]] = DataCollatorForSeq2Seq(make_tokenizer())
    return collator
