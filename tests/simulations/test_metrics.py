"""Metrics against hand-made numbers, against scikit-learn, and against LaMP's own reading of answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (  # type: ignore[import-untyped]
    f1_score,
    mean_absolute_error,
    mean_squared_error,
)

from fedoppu.common.errors import DataError
from fedoppu.simulations import metrics

LABELS = ("politics", "sports", "travel", "food")
RATINGS = ("1", "2", "3", "4", "5")


def official_mapping(text: str, gold: float) -> float:
    """What LaMP documents for ratings, written independently of the code under test."""
    try:
        return float(text)
    except ValueError:
        return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0


def test_accuracy_strips_answers_and_counts_an_unknown_string_wrong() -> None:
    predictions = [" politics\n", "sport", "travel", "sports"]
    golds = ["politics", "sports", "travel ", "travel"]
    assert metrics.accuracy(predictions, golds, LABELS) == 0.5


def test_an_unknown_answer_to_an_unknown_gold_is_still_wrong() -> None:
    assert metrics.accuracy(["cars"], ["cars"], LABELS) == 0.0


def test_absent_classes_count_zero_in_macro_f1() -> None:
    # politics 2 / 3, sports 2 / 3, travel and food never occur
    golds = ["politics", "politics", "sports"]
    predictions = ["politics", "sports", "sports"]
    assert metrics.macro_f1(predictions, golds, LABELS) == pytest.approx((2 / 3 + 2 / 3) / 4)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_equals_the_reference_over_all_labels(pairs: list[tuple[int, int]]) -> None:
    names = {**dict(enumerate(LABELS)), -1: "no such label"}
    predictions, golds = [names[p] for p, _ in pairs], [names[g] for _, g in pairs]
    expected = f1_score(
        [g for _, g in pairs],
        [p for p, _ in pairs],
        labels=range(4),
        average="macro",
        zero_division=0,
    )
    assert metrics.macro_f1(predictions, golds, LABELS) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=2, max_size=20))
def test_class_counts_add_up_over_any_split(pairs: list[tuple[int, int]]) -> None:
    names = {**dict(enumerate(LABELS)), -1: "?"}
    predictions, golds = [names[p] for p, _ in pairs], [names[g] for _, g in pairs]
    parts = [
        metrics.class_counts(predictions[a], golds[a], LABELS) for a in (slice(3), slice(3, 99))
    ]
    whole = metrics.class_counts(predictions, golds, LABELS)
    np.testing.assert_array_equal(sum(parts), whole)


@pytest.mark.parametrize(
    ("text", "gold", "official", "strict", "valid"),
    [
        ("4", 2.0, 4.0, 4.0, True),
        (" 4.5\n", 2.0, 4.5, 4.5, True),
        ("good", 1.0, 5.0, 5.0, False),
        ("good", 3.0, 5.0, 5.0, False),
        ("good", 4.0, 1.0, 1.0, False),
        ("", 5.0, 1.0, 1.0, False),
        ("400", 4.0, 400.0, 5.0, False),
        ("-3", 4.0, -3.0, 1.0, False),
        ("inf", 4.0, math.inf, 1.0, False),
    ],
)
def test_a_rating_is_read_as_lamp_does_and_strictly(
    text: str, gold: float, official: float, strict: float, valid: bool
) -> None:
    assert metrics.official_rating(text, gold) == official
    assert metrics.strict_rating(text, gold) == strict
    assert metrics.is_rating(text) is valid


def test_nan_poisons_the_official_error_and_not_the_strict_one() -> None:
    predictions, golds = ["nan", "4"], ["2", "4"]
    assert math.isnan(metrics.mae(predictions, golds))
    assert metrics.mae(predictions, golds, strict=True) == 1.5  # nan is read as 5, the farther end
    assert not metrics.is_rating("nan")


@given(st.text(max_size=8), st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]))
def test_any_text_gives_a_strict_rating_from_1_to_5(text: str, gold: float) -> None:
    assert 1.0 <= metrics.strict_rating(text, gold) <= 5.0


@given(st.text(max_size=8) | st.floats().map(str), st.sampled_from([1.0, 2.5, 3.0, 5.0]))
def test_any_text_is_read_as_the_official_mapping_reads_it(text: str, gold: float) -> None:
    np.testing.assert_equal(metrics.official_rating(text, gold), official_mapping(text, gold))


@given(st.lists(st.tuples(st.sampled_from(RATINGS), st.sampled_from(RATINGS)), min_size=1))
def test_rating_errors_equal_the_reference(pairs: list[tuple[str, str]]) -> None:
    predictions, golds = [p for p, _ in pairs], [g for _, g in pairs]
    numbers = [float(g) for g in golds], [float(p) for p in predictions]
    assert metrics.mae(predictions, golds) == pytest.approx(mean_absolute_error(*numbers))
    expected = math.sqrt(mean_squared_error(*numbers))
    assert metrics.rmse(predictions, golds) == pytest.approx(expected)
    assert metrics.rmse(predictions, golds, strict=True) == pytest.approx(expected)


def test_rouge_is_an_f_measure_without_stemmer() -> None:
    found = metrics.rouge(
        ["the cat sat", "cats", "police kill the gunman"],
        ["the cat", "cat", "police killed the gunman"],
    )
    assert found[0] == pytest.approx([0.8, 0.8])  # precision 2 / 3, recall 1
    assert found[1] == pytest.approx([0.0, 0.0])  # a stemmer would have given 1
    assert found[2] == pytest.approx([0.75, 0.75])


def test_rouge_l_wants_the_order_that_rouge_1_ignores() -> None:
    first, longest = metrics.rouge(["b a"], ["a b"])[0]
    assert (first, longest) == pytest.approx((1.0, 0.5))


def test_loss_is_nats_per_token_of_the_answer() -> None:
    assert metrics.loss_per_token(-6.0, 3) == 2.0


def test_a_ratio_of_nothing_is_not_a_number() -> None:
    assert math.isnan(metrics.ratio(np.array([0.0, 0.0])))
    np.testing.assert_allclose(metrics.root_ratio(np.array([[8.0, 2.0]])), [2.0])


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="at least one token, got 0"):
        metrics.loss_per_token(-1.0, 0)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="no queries to score"):
        metrics.accuracy([], [], LABELS)


def test_a_missing_gold_is_refused() -> None:
    with pytest.raises(DataError, match="2 predictions for 1 golds"):
        metrics.mae(["1", "2"], ["1"])


@pytest.mark.parametrize("gold", ["six", "6", "nan", ""])
def test_a_gold_that_is_no_rating_is_refused(gold: str) -> None:
    with pytest.raises(DataError, match="a gold rating must be a number from 1 to 5, got"):
        metrics.mae(["1"], [gold])
