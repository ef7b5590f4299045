"""Documents of random tokens whose lengths follow a named distribution, grouped into steps of about equal size."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Document = list[int]

# A step's real tokens differ from the target by at most this share, so that steps can be compared with each other.
TOLERANCE = 0.02
_DRAWS = 500


@dataclass(frozen=True)
class Lengths:
    """A distribution of document lengths."""

    mean: float
    low: int
    high: int
    draw: Callable[[random.Random], int]


def parse_lengths(name: str) -> Lengths:
    """`loguniform-A-B` and `uniform-A-B` draw from A to B inclusive, `fixed-N` always gives N."""
    if match := re.fullmatch(r"fixed-(\d+)", name):
        low = high = int(match[1])
    elif match := re.fullmatch(r"(?:loguniform|uniform)-(\d+)-(\d+)", name):
        low, high = int(match[1]), int(match[2])
    else:
        raise ValueError(f"lengths {name!r}: use loguniform-A-B, uniform-A-B or fixed-N")
    if not 2 <= low <= high:
        raise ValueError(f"lengths {name!r}: a document has at least 2 tokens, and A is not above B")
    if name.startswith("loguniform") and low < high:
        log_low, log_high = math.log(low), math.log(high)
        return Lengths(
            mean=(high - low) / (log_high - log_low),
            low=low,
            high=high,
            draw=lambda rng: round(math.exp(rng.uniform(log_low, log_high))),
        )
    return Lengths(mean=(low + high) / 2, low=low, high=high, draw=lambda rng: rng.randint(low, high))


def documents_per_step(tokens: int, lengths: str, accumulate: int = 1) -> int:
    """How many documents make about `tokens`: the same number each step, as a Trainer's batch size asks for."""
    mean = parse_lengths(lengths).mean
    return max(1, round(tokens / mean / accumulate)) * accumulate


def make_steps(
    steps: int, tokens: int, lengths: str, vocab_size: int, seed: int = 0, accumulate: int = 1
) -> list[list[Document]]:
    """`steps` lists of documents. The same arguments give the same documents in every process."""
    rng = random.Random(seed)
    distribution = parse_lengths(lengths)
    count = documents_per_step(tokens, lengths, accumulate)
    return [
        [
            [rng.randrange(1, vocab_size) for _ in range(length)]
            for length in _draw_step(rng, distribution, count, tokens)
        ]
        for _ in range(steps)
    ]


def describe(steps: list[list[Document]]) -> dict[str, Any]:
    """What a result file records about its documents; the digest shows that two processes had the same ones."""
    lengths = [[len(document) for document in step] for step in steps]
    flat = sorted(length for step in lengths for length in step)
    padded = sum(max(step) * len(step) for step in lengths)
    return {
        "per_step": len(steps[0]),
        "tokens_per_step": [sum(step) for step in lengths],
        "min": flat[0],
        "median": flat[len(flat) // 2],
        "max": flat[-1],
        "padding_share": round(1 - sum(flat) / padded, 4),
        "lengths": lengths,
        "digest": hashlib.sha256(repr(steps).encode()).hexdigest()[:16],
    }


def _draw_step(rng: random.Random, lengths: Lengths, count: int, tokens: int) -> list[int]:
    """Draw whole steps until one is close to the target, so that no document has to be cut to fit."""
    best: list[int] = []
    for _ in range(_DRAWS):
        drawn = [lengths.draw(rng) for _ in range(count)]
        if not best or abs(sum(drawn) - tokens) < abs(sum(best) - tokens):
            best = drawn
        if abs(sum(best) - tokens) <= TOLERANCE * tokens:
            break
    return best
