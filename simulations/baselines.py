"""Controls that a claim of personalization must beat: all but the personal reading of a text.

- `majority`: the user's own most frequent answer (ratings: the median).
- `prior_shift`: the shared model plus the user's label frequencies; no adapter is trained.
- wrong user: other target users' adapters, each alone, averaged.
- population: an adapter trained on as many items, pooled from other target users.

Answers of the user's own history are used, never golds of queries.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.errors import DataError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations import metrics
from fedoppu.simulations.scores import Kind, QueryResult, log_softmax, predict

Floats = NDArray[np.float64]
LEAST_LOG_PROBABILITY = (
    -100.0
)  # a label that shared never predicts must not become infinitely likely


@dataclass(frozen=True)
class OwnHistory:
    """What shared says about a user's own history.

    Attributes:
        answers: The user's answers, oldest first.
        scores: (items, num_labels) shared's label log-likelihoods of the same items, nats.
    """

    answers: Sequence[str]
    scores: Floats = field(repr=False)


def majority_answer(answers: Sequence[str], kind: Kind) -> str | None:
    """The answer that a user gives anyway.

    Classification: the most frequent; of equally frequent ones the one given last. Rating: the
        median; of two middle values the one given last. None for generation and for an empty
        history.

    Args:
        answers: Of the user's own history, oldest first.
        kind: Of the task.
    """
    given = [answer.strip() for answer in answers]
    if kind == "generation" or not given:
        return None
    last = {answer: position for position, answer in enumerate(given)}
    if kind == "rating":
        ordered = sorted(given, key=metrics.gold_rating)
        middle = {ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]}
        return max(middle, key=lambda answer: last[answer])
    counts = Counter(given)
    return max(counts, key=lambda answer: (counts[answer], last[answer]))


def majority(
    results: Sequence[QueryResult], histories: Mapping[str, Sequence[str]], kind: Kind
) -> tuple[QueryResult, ...]:
    """The majority arm over the queries of another arm's results; empty for generation.

    A user with an empty history has no majority and no results: a difference is taken over the
    others.

    Args:
        results: Of any arm; only users, queries and golds are used.
        histories: The answers of each user's own history, oldest first.
        kind: Of the task.
    """
    answers = {user: majority_answer(given, kind) for user, given in histories.items()}
    return tuple(
        replace(result, prediction=answer, label_log_likelihoods=None, gold_log_likelihood=None)
        for result in results
        if (answer := answers.get(result.user)) is not None
    )


def label_shift(history: OwnHistory, labels: Sequence[str]) -> Floats:
    """Log of the own label frequencies minus log of those that shared predicts, (num_labels,).

    log((n_y + 1) / (n + L)) - log of the mean predicted distribution on the own history.

    Zero for an empty history: nothing is known, nothing is shifted. Answers outside the label set
    are not counted.

    Raises:
        DataError: Scores and answers differ in number.
    """
    if len(history.answers) != len(history.scores):
        raise DataError(
            f"{len(history.scores)} scored items for {len(history.answers)} answers: give one each"
        )
    found = [metrics.label_index(answer, labels) for answer in history.answers]
    counts = np.array([found.count(y) for y in range(len(labels))], dtype=np.float64)
    if not counts.sum():
        return np.zeros(len(labels))
    own = np.log((counts + 1) / (counts.sum() + len(labels)))
    predicted = np.exp(log_softmax(np.asarray(history.scores, dtype=np.float64))).mean(axis=0)
    floor = np.exp(LEAST_LOG_PROBABILITY)
    return np.asarray(own - np.log(np.maximum(predicted, floor)))


def prior_shift(
    results: Sequence[QueryResult], histories: Mapping[str, OwnHistory], labels: Sequence[str]
) -> tuple[QueryResult, ...]:
    """Shared's results with each user's label prior corrected; empty for generation.

    The chance that shared gives to all labels together stays as it was, so that the loss per token
    compares with that of other arms.

    Args:
        results: Shared's, with label scores.
        histories: What shared says about each user's own history.
        labels: The label set.
    """
    shifts = {user: label_shift(history, labels) for user, history in histories.items()}
    return tuple(
        _shifted(result, shifts[result.user], labels)
        for result in results
        if result.label_log_likelihoods is not None
    )


def _shifted(result: QueryResult, shift: Floats, labels: Sequence[str]) -> QueryResult:
    scores = np.asarray(result.label_log_likelihoods, dtype=np.float64)
    mass = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    moved = tuple(float(score) for score in mass + log_softmax(scores + shift))
    gold = metrics.label_index(result.gold, labels)
    return replace(
        result,
        prediction=predict(moved, labels),
        label_log_likelihoods=moved,
        gold_log_likelihood=moved[gold] if gold >= 0 else None,
    )


def wrong_users(
    users: Sequence[str], count: int, *, randomness: Randomness
) -> Mapping[str, tuple[str, ...]] | None:
    """Assigns to each user `count` other users, whose adapters are each tried alone.

    Each user's draw depends on the seed and the set of users only. None with fewer than count + 1
    users (four by default): the control is then null.

    Raises:
        DataError: A user is named twice.
    """
    names = _distinct(users)
    if len(names) < count + 1:
        return None
    assigned = {}
    for user in names:
        others = [other for other in names if other != user]
        drawn = randomness.stream("wrong_user", user).choice(len(others), count, replace=False)
        assigned[user] = tuple(others[index] for index in drawn)
    return assigned


def population_items(
    sizes: Mapping[str, int], user: str, amount: int, *, randomness: Randomness
) -> tuple[tuple[str, int], ...]:
    """Draws items of other users for `user`'s population adapter, each at most once.

    Args:
        sizes: Number of items of every target user, in any order.
        user: Gets none of their own.
        amount: As many as the user's personal adapter is trained on; fewer if the others have no
            more.
        randomness: Of the seed.

    Returns:
        (other user, index of the item) pairs, sorted; empty without other users.
    """
    others = [other for other in sorted(sizes) if other != user]
    ends = np.cumsum([sizes[other] for other in others], dtype=np.int64)
    total = int(ends[-1]) if others else 0
    stream = randomness.stream("population", user)
    drawn = np.sort(stream.choice(total, min(amount, total), replace=False))
    owners = np.searchsorted(ends, drawn, side="right")
    return tuple(
        (others[owner], int(place - ends[owner] + sizes[others[owner]]))
        for owner, place in zip(owners, drawn, strict=True)
    )


def _distinct(users: Sequence[str]) -> list[str]:
    names = sorted(set(users))
    if len(names) < len(users):
        raise DataError(f"{len(users) - len(names)} target users are named twice; keep each once")
    return names
