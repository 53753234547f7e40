"""Controls: what a user's own labels say, and who else is asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.errors import DataError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.baselines import (
    OwnHistory,
    Pool,
    label_shift,
    majority,
    majority_answer,
    prior_shift,
    wrong_users,
)
from fedoppu.simulations.scores import QueryResult, labelled_result

LABELS = ("a", "b")
ROOT = Randomness.from_seed(3)


def result(user: str, query: str, scores: tuple[float, float], gold: str = "a") -> QueryResult:
    return labelled_result(user, query, gold=gold, scores=scores, labels=LABELS, gold_tokens=1)


def test_majority_is_the_most_frequent_answer() -> None:
    assert majority_answer(["a", " b", "b ", "a", "b"], "classification") == "b"


def test_of_equally_frequent_answers_the_last_given_wins() -> None:
    assert majority_answer(["a", "b", "b", "a", "c"], "classification") == "a"


def test_majority_of_ratings_is_the_median() -> None:
    assert majority_answer(["1", "5", "5", "4", "1"], "rating") == "4"


def test_of_two_middle_ratings_the_last_given_wins() -> None:
    assert majority_answer(["2", "4"], "rating") == "4"
    assert majority_answer(["4", "2"], "rating") == "2"


def test_there_is_no_majority_of_texts_or_of_nothing() -> None:
    assert majority_answer(["a title"], "generation") is None
    assert majority_answer([], "classification") is None


def test_the_majority_arm_answers_the_same_queries_without_any_model() -> None:
    results = [result("u", "0", (-1, -2)), result("new", "0", (-1, -2))]
    (found,) = majority(results, {"u": ["b", "b", "a"], "new": []}, "classification")
    assert (found.user, found.query, found.gold, found.prediction) == ("u", "0", "a", "b")
    assert found.label_log_likelihoods is None
    assert found.gold_log_likelihood is None


def test_label_shift_by_hand() -> None:
    scores = np.log(np.array([[0.9, 0.1], [0.7, 0.3]]))
    shift = label_shift(OwnHistory(["b", "b"], scores), LABELS)
    expected = np.log([1 / 4, 3 / 4]) - np.log([0.8, 0.2])
    np.testing.assert_allclose(shift, expected)


def test_label_shift_normalises_what_the_model_left_to_other_texts() -> None:
    scores = np.log(np.array([[0.09, 0.01], [0.07, 0.03]]))
    whole = np.log(np.array([[0.9, 0.1], [0.7, 0.3]]))
    np.testing.assert_allclose(
        label_shift(OwnHistory(["a", "b"], scores), LABELS),
        label_shift(OwnHistory(["a", "b"], whole), LABELS),
    )


def test_nothing_is_shifted_without_a_history() -> None:
    np.testing.assert_array_equal(label_shift(OwnHistory([], np.zeros((0, 2))), LABELS), [0, 0])


def test_a_label_that_shared_never_predicts_gives_a_finite_shift() -> None:
    shift = label_shift(OwnHistory(["b"], np.array([[0.0, -1e6]])), LABELS)
    assert np.isfinite(shift).all()


def test_scores_of_another_number_of_items_are_refused() -> None:
    with pytest.raises(DataError, match="1 scored items for 2 answers"):
        label_shift(OwnHistory(["a", "b"], np.zeros((1, 2))), LABELS)


def test_prior_shift_follows_the_user_and_keeps_the_mass_of_all_labels() -> None:
    unsure = result("u", "0", (np.log(0.3), np.log(0.2)))
    history = OwnHistory(["b"] * 8, np.zeros((8, 2)))
    (found,) = prior_shift([unsure], {"u": history}, LABELS)
    assert (unsure.prediction, found.prediction) == ("a", "b")
    assert found.label_log_likelihoods is not None
    # odds 3 : 2 times (1 / 10) : (9 / 10)
    np.testing.assert_allclose(np.exp(found.label_log_likelihoods), [0.5 * 3 / 21, 0.5 * 18 / 21])
    assert found.gold_log_likelihood == found.label_log_likelihoods[0]


def test_prior_shift_is_empty_for_generation() -> None:
    text = QueryResult("u", "0", "a title", "a title", None, -3.0, 3)
    assert prior_shift([text], {}, ()) == ()


def all_wrong(users: list[str], seed: int) -> dict[str, tuple[str, ...]]:
    others = wrong_users(users, 3, randomness=Randomness.from_seed(seed))
    assert others is not None
    return {user: others(user) for user in users}


@given(st.integers(4, 12), st.integers(0, 5))
def test_wrong_users_are_distinct_others(count: int, seed: int) -> None:
    users = [f"u{i}" for i in range(count)]
    for user, others in all_wrong(users, seed).items():
        assert len(set(others)) == 3
        assert user not in others
        assert set(others) <= set(users)


def test_wrong_users_depend_on_the_seed_and_not_on_the_order() -> None:
    users = [f"u{i}" for i in range(20)]
    first = all_wrong(users, 3)
    assert first == all_wrong(users[::-1], 3)
    assert first != all_wrong(users, 4)


def test_the_control_is_null_with_fewer_than_four_users() -> None:
    assert wrong_users(["a", "b", "c"], 3, randomness=ROOT) is None
    assert wrong_users(["a", "b", "c", "d"], 3, randomness=ROOT) is not None


def test_a_user_named_twice_is_refused() -> None:
    with pytest.raises(DataError, match="1 target users are named twice"):
        wrong_users(["a", "a", "b", "c", "d"], 3, randomness=ROOT)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9)), st.integers(0, 30))
def test_pooled_items_are_drawn_from_the_items_of_the_others(
    sizes: dict[str, int], newest: int
) -> None:
    sizes = {"c": 4} | sizes
    drawn = Pool(sizes, ROOT).items("c", newest)
    others = [(user, item) for user in sorted(sizes) if user != "c" for item in range(sizes[user])]
    amount = min(sizes["c"], newest or 9, len(others))
    chosen = ROOT.stream("population", "c").choice(len(others), amount, replace=False)
    assert list(drawn) == [others[index] for index in sorted(chosen)]


@pytest.mark.parametrize(("newest", "amount"), [(0, 9), (5, 5), (100, 9)])
def test_as_many_items_are_pooled_as_the_own_adapter_is_trained_on(
    newest: int, amount: int
) -> None:
    assert len(Pool({"a": 9, "b": 30, "c": 30}, ROOT).items("a", newest)) == amount


def test_pooled_items_come_from_every_user_in_proportion() -> None:
    drawn = Pool({"me": 200, "small": 100, "large": 300}, ROOT).items("me", 0)
    assert 35 <= sum(user == "small" for user, _ in drawn) <= 65  # 50 expected


def test_all_items_of_the_others_are_drawn_if_asked_for() -> None:
    drawn = Pool({"me": 9, "x": 2, "empty": 0, "y": 1}, ROOT).items("me", 9)
    assert drawn == (("x", 0), ("x", 1), ("y", 0))
