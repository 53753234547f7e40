"""Controls that a claim of personalization must beat: all but the personal reading of a text.

- `majority`: the user's own most frequent answer (ratings: the median).
- `prior_shift`: the shared model plus the user's label frequencies; no adapter is trained.
- wrong user: other target users' adapters, each alone, averaged.
- population: an adapter trained on as many items, pooled from other target users.

Answers of the user's own history are used, never golds of queries.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
) -> Callable[[str], tuple[str, ...]] | None:
    """Assigns to each user `count` other users, whose adapters are each tried alone.

    Each user's draw depends on the seed and the set of users only, so it is made when it is asked
    for. None with fewer than count + 1 users (four by default): the control is then null.

    Raises:
        DataError: A user is named twice.
    """
    names = _distinct(users)
    if len(names) < count + 1:
        return None

    def others(user: str) -> tuple[str, ...]:
        own = bisect_left(names, user)
        stream = randomness.stream("wrong_user", user)
        drawn = stream.choice(len(names) - 1, count, replace=False)  # of all but the user
        return tuple(names[index + (index >= own)] for index in drawn)

    return others


class Pool:
    """The items of all target users, from which population arms draw."""

    def __init__(self, sizes: Mapping[str, int], randomness: Randomness) -> None:
        """Lays the items side by side, user by user.

        Args:
            sizes: Number of items of every target user, in any order.
            randomness: Of the seed.
        """
        self._names = sorted(sizes)
        self._sizes = np.array([sizes[name] for name in self._names], dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._randomness = randomness

    def items(self, user: str, newest: int) -> tuple[tuple[str, int], ...]:
        """Draws items of others for a user's population adapter, each at most once.

        Args:
            user: Gets none of their own.
            newest: As many are drawn as the personal adapter is trained on: at most so many, 0 for
                no bound; fewer if the others have no more.

        Returns:
            (other user, index of the item) pairs, sorted; empty without other users.
        """
        own = bisect_left(self._names, user)
        size, end = int(self._sizes[own]), int(self._ends[own])
        total = int(self._ends[-1]) - size
        amount = min(size, newest) if newest else size
        stream = self._randomness.stream("population", user)
        drawn = np.sort(stream.choice(total, min(amount, total), replace=False))
        drawn += np.where(drawn >= end - size, size, 0)  # over the user's own items
        owners = np.searchsorted(self._ends, drawn, side="right")
        first = self._ends[owners] - self._sizes[owners]
        return tuple(
            (self._names[owner], int(index))
            for owner, index in zip(owners, drawn - first, strict=True)
        )


def _distinct(users: Sequence[str]) -> list[str]:
    names = sorted(set(users))
    if len(names) < len(users):
        raise DataError(f"{len(users) - len(names)} target users are named twice; keep each once")
    return names
