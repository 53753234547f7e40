"""Rows are cut into batches of similar length without losing or mixing any."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.batches import Row, check_examples, pack, split_by_length
from fedoppu.client.jobs import Example
from fedoppu.common.errors import DataError

LENGTHS = st.lists(st.integers(1, 60), max_size=7)


def cost(lengths: list[int], batches: list[list[int]], pass_cost: int) -> int:
    padded = (len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return sum(padded) + pass_cost * len(batches)


@given(LENGTHS, st.integers(1, 100), st.integers(1, 200))
def test_every_row_is_in_one_batch_that_fits(
    lengths: list[int], pass_cost: int, max_tokens: int
) -> None:
    batches = split_by_length(lengths, pass_cost=pass_cost, max_tokens=max_tokens)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens
        assert batch == sorted(batch)


@given(LENGTHS, st.integers(1, 100))
def test_no_cut_of_the_sorted_rows_costs_less(lengths: list[int], pass_cost: int) -> None:
    found = cost(lengths, split_by_length(lengths, pass_cost=pass_cost), pass_cost)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    inner = range(1, len(order))
    cuts = itertools.chain(*(itertools.combinations(inner, n) for n in range(len(order))))
    for cut in cuts if order else ():
        edges = [0, *cut, len(order)]
        other = [order[start:end] for start, end in itertools.pairwise(edges)]
        assert found <= cost(lengths, other, pass_cost)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=9))
def test_packed_rows_predict_every_answer_token_from_what_precedes_it(
    shapes: list[tuple[int, int]],
) -> None:
    token = itertools.count(10)
    rows = [
        Row(0, Example(*(np.array([next(token) for _ in range(n)], np.int32) for n in shape)))
        for shape in shapes
    ]
    seen: dict[int, list[int]] = {index: [] for index in range(len(rows))}
    for batch in pack(rows, pad=0):
        places = zip(batch.outputs.rows, batch.outputs.positions, strict=True)
        for (row, at), target, source in zip(places, batch.targets, batch.sources, strict=True):
            assert batch.picked[row] == source
            assert int(batch.tokens[row, at]) == int(target) - 1  # tokens were counted up
            seen[int(source)].append(int(target))
    assert seen == {index: list(row.example.answer) for index, row in enumerate(rows)}


def test_the_last_answer_token_is_not_read() -> None:
    row = Row(0, Example(np.array([5, 6], np.int32), np.array([7, 8], np.int32)))
    (batch,) = pack([row], pad=0)
    assert batch.tokens.tolist() == [[5, 6, 7]]
    assert row.length == 3


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ([1], [], "example 0 has an empty answer"),
        ([], [1], "example 0 must have 1 to 4 tokens, got 0"),
        ([1, 2, 3], [1, 2], "example 0 has 5 tokens, the base takes 4"),
        ([1], [9], "outside the base's vocabulary of 9"),
        ([-1], [1], "outside the base's vocabulary of 9"),
    ],
)
def test_an_example_that_cannot_be_learnt_from_is_named(
    prompt: list[int], answer: list[int], message: str
) -> None:
    example = Example(np.array(prompt, np.int32), np.array(answer, np.int32))
    with pytest.raises(DataError, match=message):
        check_examples([example], vocab=9, max_tokens=4)
