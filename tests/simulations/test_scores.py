"""Scores of users: closed forms against brute force, known areas, and the user as the unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from fedoppu.common.errors import DataError
from fedoppu.simulations import metrics
from fedoppu.simulations.scores import (
    METRICS,
    Kind,
    QueryResult,
    auc,
    average_scores,
    labelled_result,
    log_softmax,
    metrics_of,
    permuted_accuracy,
    permuted_mae,
    predict,
    score_users,
    within_user_auc,
)

LABELS = ("a", "b", "c")
RATINGS = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class FakeTask:
    name: str
    kind: Kind
    labels: Sequence[str]


TOPICS = FakeTask("LaMP_2N", "classification", LABELS)
STARS = FakeTask("LaMP_3", "rating", RATINGS)
TITLES = FakeTask("LaMP_4", "generation", ())


def plain(user: str, query: str, gold: str, prediction: str) -> QueryResult:
    return QueryResult(user, query, gold, prediction, None, None, 1)


def scored(query: str, gold: str, scores: Sequence[float]) -> QueryResult:
    return labelled_result("u", query, gold=gold, scores=scores, labels=LABELS, gold_tokens=2)


def test_a_user_with_many_queries_weighs_no_more_than_one_with_few() -> None:
    many = [plain("many", f"{i}", "a", "a") for i in range(9)]
    scores = score_users([*many, plain("few", "0", "a", "b")], TOPICS)
    assert [one.user for one in scores] == ["few", "many"]
    assert np.mean([one.values["accuracy"] for one in scores]) == 0.5
    sums = np.sum([one.sums["accuracy_official"] for one in scores], axis=0)
    assert metrics.ratio(sums) == pytest.approx(0.9)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc?"), st.sampled_from("abc")), min_size=1, max_size=5))
def test_permuted_accuracy_is_the_mean_over_all_permutations(pairs: list[tuple[str, str]]) -> None:
    predictions, golds = [p for p, _ in pairs], [g for _, g in pairs]
    each = [metrics.accuracy(order, golds, LABELS) for order in permutations(predictions)]
    assert permuted_accuracy(predictions, golds, LABELS) == pytest.approx(np.mean(each))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from([*RATINGS, "bad", "nan", "400"]), st.sampled_from(RATINGS)),
        min_size=1,
        max_size=5,
    )
)
def test_permuted_error_is_the_mean_over_all_permutations(pairs: list[tuple[str, str]]) -> None:
    predictions, golds = [p for p, _ in pairs], [g for _, g in pairs]
    each = [metrics.mae(order, golds, strict=True) for order in permutations(predictions)]
    assert permuted_mae(predictions, golds) == pytest.approx(np.mean(each))


def test_content_gain_is_zero_for_a_constant_answer_however_often_it_is_right() -> None:
    results = [plain("u", f"{i}", gold, "a") for i, gold in enumerate("aaab")]
    assert score_users(results, TOPICS)[0].values["content_gain"] == 0.0


def test_content_gain_is_what_a_perfect_reader_loses_by_permutation() -> None:
    results = [plain("u", gold, gold, gold) for gold in "abc"]
    assert score_users(results, TOPICS)[0].values["content_gain"] == pytest.approx(2 / 3)


def test_content_gain_of_ratings_is_the_rise_of_the_error() -> None:
    results = [plain("u", gold, gold, gold) for gold in ("1", "5")]
    scores = score_users(results, STARS)[0]
    assert scores.values["mae"] == 0.0
    assert scores.values["content_gain"] == 2.0  # half of the permutations are off by 4


def test_content_gain_is_negative_for_an_answer_that_avoids_the_text() -> None:
    results = [plain("u", "0", "a", "b"), plain("u", "1", "b", "a")]
    assert score_users(results, TOPICS)[0].values["content_gain"] == pytest.approx(-0.5)


def test_known_areas_under_the_curve() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    assert auc(scores, np.array([True, True, False, False])) == 0.875
    assert auc(scores, np.array([False, False, True, True])) == 0.125
    assert auc(scores, np.array([True] * 4)) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_the_area_equals_the_reference(pairs: list[tuple[int, bool]]) -> None:
    scores, outcome = np.array([float(s) for s, _ in pairs]), np.array([o for _, o in pairs])
    if outcome.all() or not outcome.any():
        assert auc(scores, outcome) is None
    else:
        assert auc(scores, outcome) == pytest.approx(roc_auc_score(outcome, scores))


def test_within_user_auc_ranks_normalised_probabilities() -> None:
    # The raw score of "a" ranks the second item first; its share of the probability does not.
    results = [scored("0", "a", (-2.0, -9.0, -9.0)), scored("1", "b", (-1.0, -0.1, -9.0))]
    assert within_user_auc(results, LABELS) == 1.0


def test_within_user_auc_is_not_moved_by_a_label_prior() -> None:
    rng = np.random.default_rng(0)
    raw = [rng.normal(size=2) for _ in range(12)]
    golds = [str(rng.choice(["a", "b"])) for _ in raw]
    areas = []
    for prior in (0.0, 3.0):
        shifted = [
            labelled_result(
                "u",
                f"{i}",
                gold=g,
                scores=s + np.array([prior, 0.0]),
                labels=("a", "b"),
                gold_tokens=1,
            )
            for i, (s, g) in enumerate(zip(raw, golds, strict=True))
        ]
        areas.append(within_user_auc(shifted, ("a", "b")))
    assert areas[0] == pytest.approx(areas[1])


def test_a_user_without_a_label_of_both_outcomes_has_no_area() -> None:
    assert (
        within_user_auc([scored("0", "a", (0, 0, 0)), scored("1", "a", (0, 0, 0))], LABELS) is None
    )


def test_no_area_without_label_scores() -> None:
    assert within_user_auc([plain("u", "0", "a", "a"), plain("u", "1", "b", "a")], LABELS) is None


def test_loss_is_averaged_over_queries_and_missing_if_one_is_not_scored() -> None:
    one = QueryResult("u", "0", "x y", "x", None, -6.0, 3)
    two = QueryResult("u", "1", "x", "x", None, -4.0, 1)
    assert score_users([one, two], TITLES)[0].values["loss"] == 3.0
    unscored = QueryResult("u", "2", "x", "x", None, None, 1)
    assert score_users([one, unscored], TITLES)[0].values["loss"] is None


def test_generation_is_scored_by_rouge() -> None:
    scores = score_users([plain("u", "0", "a b", "a b"), plain("u", "1", "a b", "c")], TITLES)[0]
    assert scores.values == {"rouge1": 0.5, "rougeL": 0.5, "loss": None}
    np.testing.assert_allclose(scores.sums["rougeL_official"], [[1.0, 2.0]])


def test_ratings_keep_official_and_strict_errors_apart() -> None:
    scores = score_users([plain("u", "0", "4", "400"), plain("u", "1", "4", "4")], STARS)[0]
    assert scores.values["mae"] == 0.5
    assert metrics.ratio(scores.sums["mae_official"]) == 198.0
    assert metrics.root_ratio(scores.sums["rmse_strict"]) == pytest.approx(math.sqrt(0.5))
    assert metrics.ratio(scores.sums["parse_failures"]) == 0.5


def test_every_kind_gets_exactly_its_metrics() -> None:
    tasks = {
        "classification": (TOPICS, "a"),
        "rating": (STARS, "1"),
        "generation": (TITLES, "word"),
    }
    for kind, (task, answer) in tasks.items():
        scores = score_users([plain("u", "0", answer, answer)], task)[0]
        found = set(scores.values) | set(scores.sums)
        assert found == {metric.name for metric in METRICS if kind in metric.kinds}
        assert [m.name for m in metrics_of(task.kind) if m.combine] == [
            m.name for m in METRICS if m.name in scores.sums
        ]


def test_the_prediction_is_the_likeliest_label_and_the_first_of_equals() -> None:
    assert predict((-3.0, -1.0, -1.0), LABELS) == "b"
    result = scored("0", " b ", (-3.0, -1.0, -2.0))
    assert (result.prediction, result.gold, result.gold_log_likelihood) == ("b", "b", -1.0)


def test_log_softmax_survives_very_unlikely_labels() -> None:
    found = np.exp(log_softmax(np.array([-1000.0, -1000.0])))
    np.testing.assert_allclose(found, [0.5, 0.5])


def test_a_nan_score_is_refused() -> None:
    with pytest.raises(DataError, match="a label score is NaN"):
        predict((0.0, math.nan, 0.0), LABELS)


def test_a_missing_label_score_is_refused() -> None:
    with pytest.raises(DataError, match="2 label scores for 3 labels"):
        predict((0.0, 1.0), LABELS)


def test_a_query_that_is_scored_twice_is_refused() -> None:
    twice = [plain("u", "7", "a", "a"), plain("v", "7", "a", "a"), plain("u", "7", "a", "b")]
    with pytest.raises(DataError, match="query 7 of user u is scored twice"):
        score_users(twice, TOPICS)


def test_repetitions_are_averaged_for_each_user_and_each_metric() -> None:
    first = score_users([plain("u", "0", "a", "a"), plain("v", "0", "a", "a")], TOPICS)
    second = score_users([plain("u", "0", "a", "b")], TOPICS)
    (average,) = average_scores([first, second])  # v was not in the second
    assert (average.user, average.queries, average.values["accuracy"]) == ("u", 1, 0.5)
    assert average.sums["macro_f1"].shape == (2, 9)  # macro-F1 is averaged after it is computed
    assert average_scores([]) == ()
