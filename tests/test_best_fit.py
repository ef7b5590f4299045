"""Batches by a number of tokens: every document once, never more tokens than allowed, always the same number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, SequentialSampler

from fastft_plugins.errors import FastFTError
from fastft_plugins.packing.best_fit import best_fit, count_batches, plan
from fastft_plugins.packing.token_batches import TokenBatchSampler, TokenBatchStream, tokens_of

LENGTHS = st.lists(st.integers(0, 30), max_size=60)
BUDGETS = st.integers(1, 40)


def assert_holds(batches, documents, lengths, budget):
    assert sorted(document for batch in batches for document in batch) == sorted(documents)
    assert all(batch for batch in batches)
    assert all(sum(map(lengths.__getitem__, batch)) <= budget for batch in batches if len(batch) > 1)


def naive_best_fit(lengths, budget, buffer):
    """The rule word by word, with a list that is searched from end to end."""
    coming, waiting, batches = list(range(len(lengths))), [], []
    while coming or waiting:
        batch, room = [], None
        while True:
            while coming and len(waiting) < buffer:
                waiting.append(coming.pop(0))
            fitting = [document for document in waiting if room is None or lengths[document] <= room]
            if not fitting:
                break
            chosen = fitting[0] if room is None else max(fitting, key=lambda document: (lengths[document], -document))
            waiting.remove(chosen)
            batch.append(chosen)
            room = (budget if room is None else room) - lengths[chosen]
        batches.append(batch)
    return batches


@settings(deadline=None)
@given(LENGTHS, BUDGETS, st.integers(1, 20))
def test_best_fit_is_the_rule(lengths, budget, buffer):
    batches = list(best_fit(range(len(lengths)), lengths.__getitem__, budget, buffer))
    assert batches == naive_best_fit(lengths, budget, buffer)
    assert_holds(batches, range(len(lengths)), lengths, budget)


def test_the_stream_is_read_no_further_ahead_than_the_buffer():
    read = []
    batches = best_fit((read.append(number) or number for number in range(1000)), lambda _: 1, 10, buffer=7)
    for number in range(1, 20):
        next(batches)
        assert len(read) <= 10 * number + 7


@settings(deadline=None)
@given(st.data(), LENGTHS.filter(bool), BUDGETS)
def test_every_order_has_the_planned_number_of_batches(data, lengths, budget):
    documents = range(len(lengths))
    typical, order = (data.draw(st.permutations(documents)) for _ in range(2))
    count = count_batches(typical, lengths, budget)
    more = data.draw(st.integers(count, len(lengths)))
    for number in (count, more):
        batches = plan(order, lengths, budget, number)
        assert len(batches) == number
        assert_holds(batches, documents, lengths, budget)


def test_an_order_that_packs_worse_than_the_typical_one_gets_a_larger_buffer(monkeypatch):
    monkeypatch.setattr("fastft_plugins.packing.best_fit.BUFFER", 2)
    lengths = [3] * 20 + [7] * 20
    mixed = [document for pair in zip(range(20), range(20, 40), strict=True) for document in pair]
    count = count_batches(mixed, lengths, 10)
    assert count == 20 and len(list(best_fit(range(40), lengths.__getitem__, 10, 2))) > count
    batches = plan(range(40), lengths, 10, count)
    assert len(batches) == count
    assert_holds(batches, range(40), lengths, 10)


def test_an_order_that_packs_worse_with_any_buffer_is_sorted():
    lengths = [2, 6, 4, 3, 4]
    count = count_batches([1, 2, 4, 3, 0], lengths, 10)
    assert count == 2 and len(list(best_fit(range(5), lengths.__getitem__, 10, 5))) == 3
    assert plan(range(5), lengths, 10, count) == [[4, 3, 0], [1, 2]]


@settings(deadline=None)
@given(LENGTHS.filter(bool), BUDGETS, st.integers(1, 4), st.booleans())
def test_processes_share_the_batches_of_every_epoch(lengths, budget, processes, shuffled):
    def samplers():
        generator = torch.Generator().manual_seed(5)
        sampler = RandomSampler(lengths, generator=generator) if shuffled else SequentialSampler(lengths)
        return [TokenBatchSampler(sampler, lengths, budget, (rank, processes)) for rank in range(processes)], generator

    if processes > len(lengths):
        with pytest.raises(ValueError, match=f"lengths: {len(lengths)} documents cannot fill"):
            samplers()
        return
    try:
        ranks, generator = samplers()
    except ValueError:  # so many documents with a batch of their own that one more batch cannot be made
        assert count_batches(range(len(lengths)), lengths, budget) > len(lengths) - processes
        return
    for _ in range(3):
        state, batches = generator.get_state(), []
        for rank in ranks:
            generator.set_state(state)
            own = list(rank)
            assert len(own) == len(rank) == len(ranks[0])
            batches += own
        assert_holds(batches, range(len(lengths)), lengths, budget)


def test_planning_draws_no_random_numbers():
    before = torch.get_rng_state()
    TokenBatchSampler(RandomSampler(range(20)), [3] * 20, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ({"input_ids": [1, 2, 3]}, 3),
        ({"input_ids": torch.ones(5)}, 5),
        ({"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]}, 3),
        ({"input_ids": torch.ones(4), "attention_mask": torch.tensor([0, 0, 1, 1])}, 2),
        ({"input_ids": [1], "attention_mask": None}, 1),
    ],
)
def test_the_tokens_of_a_row_are_its_real_ones(row, tokens):
    assert tokens_of(row) == tokens


@pytest.mark.parametrize(("row", "what"), [({"text": "a b"}, "a row has 'text'"), ([1, 2], "a row is a list")])
def test_a_row_without_tokens_says_what_to_do(row, what):
    with pytest.raises(FastFTError, match=f"max_tokens_per_batch.*{what}.*tokenize before the collator"):
        list(TokenBatchStream([row], 8))
