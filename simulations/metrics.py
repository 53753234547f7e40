"""Metrics of answers: LaMP's official ones, and stricter ones where the official ones break.

Every metric that is weighted by queries is computed in two steps: sums that add up over queries
(and so over users, which the bootstrap resamples), and a function of the sums. Pure functions, no
state.

Official behaviour (LaMP, Salemi et al. 2024, https://arxiv.org/abs/2304.11406): texts are stripped;
a string outside the label set is class -1 and always wrong; macro-F1 runs over all labels, absent
ones count 0; a rating that is no number becomes 1 or 5, whichever is farther from the gold (5 at
gold 3), and "400" or "nan" is taken at its word; ROUGE is `rouge_score` without stemmer, F-measure,
averaged. LaMP's own script prints a bootstrap median of that average, which is the average up to
its random noise.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.errors import DataError

Floats = NDArray[np.float64]
LOWEST, HIGHEST = 1.0, 5.0


def label_index(text: str, labels: Sequence[str]) -> int:
    """Index of a stripped answer among the labels, or -1."""
    answer = text.strip()
    return labels.index(answer) if answer in labels else -1


def is_correct(prediction: str, gold: str, labels: Sequence[str]) -> bool:
    """Whether the prediction is the gold label; an unknown string is never right."""
    found = label_index(prediction, labels)
    return found >= 0 and found == label_index(gold, labels)


def accuracy(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str]) -> float:
    """Share of predictions that are the gold label.

    Raises:
        DataError: There is nothing to score, or the two differ in length.
    """
    require_pairs(predictions, golds)
    right = [is_correct(p, g, labels) for p, g in zip(predictions, golds, strict=True)]
    return sum(right) / len(right)


def class_counts(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str]) -> Floats:
    """True positives, false positives and false negatives by label, (3 * num_labels,) float64."""
    counts = np.zeros((3, len(labels)))
    for prediction, gold in zip(predictions, golds, strict=True):
        found, wanted = label_index(prediction, labels), label_index(gold, labels)
        if found >= 0 and found == wanted:
            counts[0, found] += 1
            continue
        if found >= 0:
            counts[1, found] += 1
        if wanted >= 0:
            counts[2, wanted] += 1
    return counts.ravel()


def f1_of_counts(counts: Floats) -> Floats:
    """Macro-F1 of `class_counts`, (..., 3 * num_labels) to (...): an absent label counts 0."""
    right, false, missed = np.moveaxis(counts.reshape(*counts.shape[:-1], 3, -1), -2, 0)
    total = 2 * right + false + missed
    scores: Floats = np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(scores.mean(axis=-1))


def macro_f1(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str]) -> float:
    """Macro-F1 over all labels.

    Raises:
        DataError: There is nothing to score, or the two differ in length.
    """
    require_pairs(predictions, golds)
    return float(f1_of_counts(class_counts(predictions, golds, labels)))


def ratio(sums: Floats) -> Floats:
    """First sum over second, (..., 2) to (...): a mean; NaN where nothing was counted."""
    above, below = sums[..., 0], sums[..., 1]
    return np.asarray(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))


def root_ratio(sums: Floats) -> Floats:
    """Square root of a mean, (..., 2) to (...)."""
    return np.asarray(np.sqrt(ratio(sums)))


def gold_rating(text: str) -> float:
    """A gold rating.

    Raises:
        DataError: It is no number from 1 to 5.
    """
    value = _number(text)
    if value is None or not LOWEST <= value <= HIGHEST:
        raise DataError(f"a gold rating must be a number from 1 to 5, got {text!r}")
    return value


def official_rating(text: str, gold: float) -> float:
    """LaMP's reading of a rating: any number at its word, even NaN; else the farther end."""
    value = _number(text)
    return worst_rating(gold) if value is None else value


def strict_rating(text: str, gold: float) -> float:
    """A rating that cannot break a mean: clamped to 1 to 5; not finite is the farther end."""
    value = _number(text)
    if value is None or not math.isfinite(value):
        return worst_rating(gold)
    return min(max(value, LOWEST), HIGHEST)


def worst_rating(gold: float) -> float:
    """1 or 5, whichever is farther from the gold; 5 at gold 3."""
    return LOWEST if abs(LOWEST - gold) > abs(HIGHEST - gold) else HIGHEST


def is_rating(text: str) -> bool:
    """Whether the text is a number from 1 to 5."""
    value = _number(text)
    return value is not None and LOWEST <= value <= HIGHEST


def mae(predictions: Sequence[str], golds: Sequence[str], *, strict: bool = False) -> float:
    """Mean absolute error of ratings; official unless strict.

    Raises:
        DataError: There is nothing to score, the two differ in length, or a gold is no rating.
    """
    return float(np.abs(_errors(predictions, golds, strict=strict)).mean())


def rmse(predictions: Sequence[str], golds: Sequence[str], *, strict: bool = False) -> float:
    """Root of the mean squared error of ratings; official unless strict.

    Raises:
        DataError: There is nothing to score, the two differ in length, or a gold is no rating.
    """
    return float(np.sqrt(np.square(_errors(predictions, golds, strict=strict)).mean()))


def _errors(predictions: Sequence[str], golds: Sequence[str], *, strict: bool) -> Floats:
    require_pairs(predictions, golds)
    read = strict_rating if strict else official_rating
    wanted = [gold_rating(gold) for gold in golds]
    return np.array([read(p, g) - g for p, g in zip(predictions, wanted, strict=True)])


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Floats:
    """ROUGE-1 and ROUGE-L F-measures of each pair, (pairs, 2) float64, without stemmer.

    Raises:
        DataError: There is nothing to score, or the two differ in length.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]  # imports a tokeniser library: seconds

    require_pairs(predictions, references)
    names = ["rouge1", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    pairs = zip(predictions, references, strict=True)
    found = [scorer.score(reference.strip(), text.strip()) for text, reference in pairs]
    return np.array([[scores[name].fmeasure for name in names] for scores in found])


def loss_per_token(log_likelihood: float, tokens: int) -> float:
    """Loss of one answer per token of it (end token included), nats.

    Raises:
        DataError: The answer has no token.
    """
    if tokens < 1:
        raise DataError(f"an answer has at least one token, got {tokens}")
    return -log_likelihood / tokens


def require_pairs(predictions: Sequence[str], golds: Sequence[str]) -> None:
    """Checks that there is something to score and a gold for each prediction.

    Raises:
        DataError: There is nothing to score, or the two differ in length.
    """
    if len(predictions) != len(golds):
        raise DataError(f"{len(predictions)} predictions for {len(golds)} golds: give one each")
    if not golds:
        raise DataError("there are no queries to score: the set needs at least one")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
