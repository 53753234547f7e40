"""Scores of each user: the user is the unit of every statistic.

A user's score is the mean over the user's own queries, so that a long history weighs no more than a
short one; LaMP's official metrics, weighted by queries, are kept beside it as sums. Three scores
are ours:

- *content gain*: accuracy minus its exact expectation after permuting the predictions within the
  user (ratings: the rise of the error). 0 means that the text of the query was not used: a label
  prior alone cannot move it.
- *within-user AUC*: how well the normalised label probabilities rank the user's items, averaged
  over the labels that have both outcomes among the queries. Label frequencies hardly move it. Users
  without such a label are left out.
- *loss*: nats per token of the gold answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.errors import DataError
from fedoppu.simulations import metrics

Floats = NDArray[np.float64]
Kind = Literal["classification", "rating", "generation"]
LABELLED: tuple[Kind, ...] = ("classification", "rating")
EVERY: tuple[Kind, ...] = ("classification", "rating", "generation")


class ScoredTask(Protocol):
    """What scoring needs to know of a task."""

    @property
    def name(self) -> str:
        """LaMP's name."""

    @property
    def kind(self) -> Kind:
        """Which metrics apply."""

    @property
    def labels(self) -> Sequence[str]:
        """The label set, empty for generation."""


@dataclass(frozen=True)
class QueryResult:
    """The answer to one query under one arm.

    Attributes:
        user: Whose query it is.
        query: Id of the query, unique for the user.
        gold: The gold answer.
        prediction: The greedy answer.
        label_log_likelihoods: (num_labels,) nats, end token included; None if labels were not
            scored.
        gold_log_likelihood: Nats, end token included; None if the gold was not scored.
        gold_tokens: Tokens of the gold answer, end token included.
    """

    user: str
    query: str
    gold: str
    prediction: str
    label_log_likelihoods: tuple[float, ...] | None
    gold_log_likelihood: float | None
    gold_tokens: int


@dataclass(frozen=True)
class Metric:
    """One column of numbers.

    Attributes:
        name: In table.json.
        kinds: Kinds of task that it applies to.
        sign: 1 if higher is better, else -1: a gain is sign * (left - right).
        combine: Of an official metric, its function of the users' summed `UserScores.sums`; None
            for a mean over users.
        pooled: Kinds whose tasks are pooled into the task "all".
        title: For people.
    """

    name: str
    kinds: tuple[Kind, ...]
    sign: int
    title: str
    combine: Callable[[Floats], Floats] | None = None
    pooled: tuple[Kind, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("accuracy", LABELLED, 1, "accuracy", pooled=("classification",)),
    Metric("mae", ("rating",), -1, "MAE", pooled=("rating",)),
    Metric("rouge1", ("generation",), 1, "ROUGE-1", pooled=("generation",)),
    Metric("rougeL", ("generation",), 1, "ROUGE-L", pooled=("generation",)),
    Metric("loss", EVERY, -1, "loss/token", pooled=EVERY),
    Metric("content_gain", LABELLED, 1, "content gain", pooled=("classification",)),
    Metric("within_user_auc", LABELLED, 1, "within-user AUC", pooled=("classification",)),
    Metric("accuracy_official", LABELLED, 1, "accuracy, by query", metrics.ratio),
    Metric("macro_f1", LABELLED, 1, "macro-F1", metrics.f1_of_counts),
    Metric("mae_official", ("rating",), -1, "MAE, official", metrics.ratio),
    Metric("rmse", ("rating",), -1, "RMSE, official", metrics.root_ratio),
    Metric("rmse_strict", ("rating",), -1, "RMSE, clamped", metrics.root_ratio),
    Metric("rouge1_official", ("generation",), 1, "ROUGE-1, by query", metrics.ratio),
    Metric("rougeL_official", ("generation",), 1, "ROUGE-L, by query", metrics.ratio),
    Metric("parse_failures", LABELLED, -1, "parse failures", metrics.ratio),
)


def metrics_of(kind: Kind) -> tuple[Metric, ...]:
    """The metrics of a kind of task, in the order of the table."""
    return tuple(metric for metric in METRICS if kind in metric.kinds)


@dataclass(frozen=True)
class UserScores:
    """One user's scores under one arm.

    Attributes:
        user: Id.
        queries: Number of queries.
        values: Score by metric; None where it does not apply to this user or arm.
        sums: Of each official metric, (replicas, width) float64: sums over the user's queries, one
            row for each repetition whose metrics are averaged (adapters of the wrong-user control,
            seeds on data).
    """

    user: str
    queries: int
    values: Mapping[str, float | None]
    sums: Mapping[str, Floats]


def predict(label_log_likelihoods: Sequence[float] | Floats, labels: Sequence[str]) -> str:
    """The label of the highest log-likelihood, the first of equals: the greedy answer.

    Raises:
        DataError: There is not one number for each label, or one is NaN.
    """
    scores = np.asarray(label_log_likelihoods, dtype=np.float64)
    if scores.shape != (len(labels),) or not labels:
        raise DataError(f"{scores.size} label scores for {len(labels)} labels: give one each")
    if np.isnan(scores).any():
        raise DataError(
            "a label score is NaN: the adapter or the base holds a value that is not finite"
        )
    return labels[int(scores.argmax())]


def labelled_result(
    user: str,
    query: str,
    *,
    gold: str,
    scores: Sequence[float] | Floats,
    labels: Sequence[str],
    gold_tokens: int,
) -> QueryResult:
    """The result of a query whose labels were scored; its gold's log-likelihood is the label's."""
    found = metrics.label_index(gold, labels)
    log_likelihoods = tuple(float(score) for score in scores)
    of_gold = log_likelihoods[found] if found >= 0 else None
    return QueryResult(
        user, query, gold.strip(), predict(scores, labels), log_likelihoods, of_gold, gold_tokens
    )


def score_users(results: Sequence[QueryResult], task: ScoredTask) -> tuple[UserScores, ...]:
    """Scores each user, in the order of their ids.

    Raises:
        DataError: A query of a user comes twice, or a gold cannot be.
    """
    ordered = sorted(results, key=lambda result: (result.user, result.query))
    keys = [(result.user, result.query) for result in ordered]
    for before, after in pairwise(keys):
        if before == after:
            raise DataError(f"query {after[1]} of user {after[0]} is scored twice; keep one")
    groups = groupby(ordered, key=lambda result: result.user)
    return tuple(_score_user(user, list(own), task) for user, own in groups)


def _score_user(user: str, results: list[QueryResult], task: ScoredTask) -> UserScores:
    if task.kind == "generation":
        values, sums = _generation(results)
    elif task.kind == "rating":
        values, sums = _rating(results, task.labels)
    else:
        values, sums = _classification(results, task.labels)
    stacked = {name: np.asarray(parts, dtype=np.float64)[None] for name, parts in sums.items()}
    return UserScores(user, len(results), values | {"loss": _loss(results)}, stacked)


Scored = tuple[dict[str, float | None], dict[str, Sequence[float] | Floats]]


def _generation(results: list[QueryResult]) -> Scored:
    pairs = metrics.rouge([r.prediction for r in results], [r.gold for r in results])
    first, longest = (float(total) for total in pairs.sum(axis=0))
    count = len(results)
    return (
        {"rouge1": first / count, "rougeL": longest / count},
        {"rouge1_official": (first, count), "rougeL_official": (longest, count)},
    )


def _classification(results: list[QueryResult], labels: Sequence[str]) -> Scored:
    predictions, golds = [r.prediction for r in results], [r.gold for r in results]
    right = metrics.accuracy(predictions, golds, labels)
    values: dict[str, float | None] = {
        "accuracy": right,
        "content_gain": right - permuted_accuracy(predictions, golds, labels),
        "within_user_auc": within_user_auc(results, labels),
    }
    return values, _label_sums(predictions, golds, labels) | {
        "parse_failures": (
            sum(metrics.label_index(p, labels) < 0 for p in predictions),
            len(results),
        )
    }


def _rating(results: list[QueryResult], labels: Sequence[str]) -> Scored:
    predictions, golds = [r.prediction for r in results], [r.gold for r in results]
    count, error = len(results), metrics.mae(predictions, golds, strict=True)
    values: dict[str, float | None] = {
        "mae": error,
        "accuracy": metrics.accuracy(predictions, golds, labels),
        "content_gain": permuted_mae(predictions, golds) - error,
        "within_user_auc": within_user_auc(results, labels),
    }
    return values, _label_sums(predictions, golds, labels) | {
        "mae_official": (metrics.mae(predictions, golds) * count, count),
        "rmse": (metrics.rmse(predictions, golds) ** 2 * count, count),
        "rmse_strict": (metrics.rmse(predictions, golds, strict=True) ** 2 * count, count),
        "parse_failures": (sum(not metrics.is_rating(p) for p in predictions), count),
    }


def _label_sums(
    predictions: list[str], golds: list[str], labels: Sequence[str]
) -> dict[str, Sequence[float] | Floats]:
    counts = metrics.class_counts(predictions, golds, labels)
    return {"accuracy_official": (counts[: len(labels)].sum(), len(golds)), "macro_f1": counts}


def _loss(results: list[QueryResult]) -> float | None:
    losses = [
        metrics.loss_per_token(result.gold_log_likelihood, result.gold_tokens)
        for result in results
        if result.gold_log_likelihood is not None
    ]
    return float(np.mean(losses)) if len(losses) == len(results) else None


def permuted_accuracy(
    predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str]
) -> float:
    """Expected accuracy after a uniformly random permutation of the predictions.

    Under it each prediction meets each gold with the same chance, so the expectation over all n!
    permutations is sum over labels of (predicted y) * (gold y) / n ** 2.
    """
    found = np.array([metrics.label_index(p, labels) for p in predictions])
    wanted = np.array([metrics.label_index(g, labels) for g in golds])
    return float(((found[:, None] == wanted[None, :]) & (found[:, None] >= 0)).mean())


def permuted_mae(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Expected strict MAE after a random permutation: the mean over all pairs."""
    wanted = [metrics.gold_rating(gold) for gold in golds]
    errors = [[abs(metrics.strict_rating(p, g) - g) for g in wanted] for p in predictions]
    return float(np.mean(errors))


def within_user_auc(results: Sequence[QueryResult], labels: Sequence[str]) -> float | None:
    """Mean over labels of the AUC of the label's normalised probability; ties count half.

    None without label scores, or if no label has both outcomes among the queries.
    """
    scores = [r.label_log_likelihoods for r in results if r.label_log_likelihoods is not None]
    if len(scores) < len(results):
        return None
    # The rank of log-probabilities is the rank of probabilities, without their underflow.
    ranked = log_softmax(np.asarray(scores, dtype=np.float64))
    wanted = np.array([metrics.label_index(r.gold, labels) for r in results])
    areas = [auc(ranked[:, y], wanted == y) for y in range(len(labels))]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def auc(scores: Floats, outcome: NDArray[np.bool_]) -> float | None:
    """Chance that a positive item outranks a negative one, ties half; None without both."""
    positive, negative = scores[outcome], scores[~outcome]
    if not positive.size or not negative.size:
        return None
    above = positive[:, None] > negative[None, :]
    level = positive[:, None] == negative[None, :]
    return float(above.mean() + level.mean() / 2)


def log_softmax(scores: Floats) -> Floats:
    """Normalised log-probabilities over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    total: Floats = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(shifted - total)


def average_scores(replicas: Sequence[Sequence[UserScores]]) -> tuple[UserScores, ...]:
    """Averages scores over repetitions: other users' adapters, each alone, or seeds on data.

    Users that are missing in a repetition are left out of the average; the table counts who is in
    it.
    """
    by_user = [{scores.user: scores for scores in replica} for replica in replicas]
    common = set(by_user[0]).intersection(*by_user[1:]) if by_user else set()
    return tuple(_average([of[user] for of in by_user]) for user in sorted(common))


def _average(scores: Sequence[UserScores]) -> UserScores:
    first = scores[0]
    values = {name: _mean([one.values[name] for one in scores]) for name in first.values}
    sums = {name: np.concatenate([one.sums[name] for one in scores]) for name in first.sums}
    return UserScores(first.user, first.queries, values, sums)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
