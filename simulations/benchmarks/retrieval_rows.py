"""The lines of the retrieval benchmark: ours, rank_bm25 and bm25s over the same history.

The history has words of Zipf's law, 53 an item on the average. Each item is looked up with its own
text among the items before it. Ours gets texts and splits them into words; the others are given the
words, and an index of the items before it for each item, as their libraries offer it. All three
have Lucene's idf; bm25s leaves out the factor k1 + 1, which changes no ranking.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.retrieval import CausalIndex, words
from fedoppu.common.config import RetrieverSettings
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.meters import cpu_seconds, interleave
from fedoppu.simulations.benchmarks.personal_turns import LOW_SHARE

GOAL = 130.0
WORDS, VOCABULARY = 53, 8000
K = 4  # items that are looked for
EQUAL = 1e-12

Scores = NDArray[np.float64]
Rebuilt = Callable[[Sequence[Sequence[str]], RetrieverSettings], Iterator[Scores]]


def history(items: int) -> list[str]:
    """Texts of 33 to 73 words whose frequencies follow Zipf's law; the same each time."""
    draw = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    lengths = draw.integers(WORDS - 20, WORDS + 21, items)
    drawn = (draw.choice(VOCABULARY, length, p=shares / shares.sum()) for length in lengths)
    return [" ".join(f"w{word}" for word in text) for text in drawn]


def rows_of(items: int, *, pairs: int, promised: bool) -> Iterator[Row]:
    """Costs and equality beside both libraries.

    Args:
        items: Of the history, at least 2.
        pairs: Measurements of each side.
        promised: Whether the goals hold for this history.
    """
    texts, settings = history(items), RetrieverSettings()
    split = [words(text) for text in texts]
    CausalIndex(texts, settings).causal_top_k(texts, K)  # the first call pays for memory
    for name, rebuilt in REBUILT.items():
        ours, theirs = partial(_ours, texts, settings), partial(_theirs, rebuilt, split, settings)
        found = interleave(_timed(ours), _timed(theirs), pairs)["all"]
        yield Row(
            f"causal BM25 of {items} items, {name} rebuilt for each",
            found.ours,
            found.theirs,
            goal=GOAL if promised else None,
            low=found.low,
            low_share=LOW_SHARE if promised else None,
            note=f"{found.pairs} pairs, top {K}; ours splits words, theirs is given them",
        )
        yield from _equality(name, texts, settings)


def _ours(texts: Sequence[str], settings: RetrieverSettings) -> list[tuple[int, ...]]:
    return CausalIndex(texts, settings).causal_top_k(texts, K)


def _theirs(
    rebuilt: Rebuilt, split: Sequence[Sequence[str]], settings: RetrieverSettings
) -> list[list[int]]:
    """The newest of equal ones first, as ours."""
    return [
        (len(scores) - 1 - np.argsort(-scores[::-1], kind="stable")[:K]).tolist()
        for scores in rebuilt(split, settings)
    ]


def _timed(work: Callable[[], object]) -> Callable[[], Mapping[str, float]]:
    return lambda: {"all": cpu_seconds(work)}


# --- the libraries -------------------------------------------------------------------------------


def rank_bm25(split: Sequence[Sequence[str]], settings: RetrieverSettings) -> Iterator[Scores]:
    """Scores of the items before each item but the first, from a new BM25Okapi each time."""
    okapi: Any = import_module("rank_bm25").BM25Okapi
    lucene = type("Lucene", (okapi,), {"_calc_idf": _lucene_idf})
    for i in range(1, len(split)):
        yield lucene(split[:i], k1=settings.k1, b=settings.b).get_scores(split[i])


def _lucene_idf(index: Any, held: Mapping[str, int]) -> None:
    """Takes the place of its own idf, which is negative for common words and then replaced."""
    size = index.corpus_size
    index.idf = {word: math.log(1 + (size - n + 0.5) / (n + 0.5)) for word, n in held.items()}


def bm25s(
    split: Sequence[Sequence[str]], settings: RetrieverSettings, *, dtype: str = "float32"
) -> Iterator[Scores]:
    """Scores of the items before each item but the first, from a new index each time."""
    library: Any = import_module("bm25s")
    for i in range(1, len(split)):
        index = library.BM25(method="lucene", k1=settings.k1, b=settings.b, dtype=dtype)
        index.index(split[:i], show_progress=False)
        yield index.get_scores(split[i])


def _bm25s_whole(split: Sequence[Sequence[str]], settings: RetrieverSettings) -> Iterator[Scores]:
    """In float64 and with the factor that it leaves out, to be compared."""
    for scores in bm25s(split, settings, dtype="float64"):
        yield scores * (settings.k1 + 1)


REBUILT: Mapping[str, Rebuilt] = {"rank_bm25": rank_bm25, "bm25s": bm25s}
COMPARED: Mapping[str, Rebuilt] = {"rank_bm25": rank_bm25, "bm25s": _bm25s_whole}


# --- equality ------------------------------------------------------------------------------------


def _equality(name: str, texts: Sequence[str], settings: RetrieverSettings) -> Iterator[Row]:
    distance, otherwise = compare(texts, settings, COMPARED[name])
    yield Row(
        f"- largest difference of scores from {name}",
        distance,
        kind="bound",
        goal=EQUAL,
        unit="",
    )
    yield Row(
        f"- items ranked otherwise than by {name}",
        otherwise,
        kind="bound",
        goal=0,
        unit="items",
        note="whole ranking; items whose scores are within 1e-12 are equal",
    )


def compare(
    texts: Sequence[str], settings: RetrieverSettings, rebuilt: Rebuilt
) -> tuple[float, int]:
    """Largest difference of any score, and the number of items whose whole ranking differs."""
    index, split = CausalIndex(texts, settings), [words(text) for text in texts]
    ours = index.causal_scores(texts)[1:]
    orders = index.causal_top_k(texts, len(texts))[1:]
    distance, otherwise = 0.0, 0
    for scores, order, theirs in zip(ours, orders, rebuilt(split, settings), strict=True):
        distance = max(distance, float(np.abs(scores - theirs).max()))
        descends = bool((np.diff(theirs[list(order)]) <= EQUAL).all())
        otherwise += not (descends and len(set(order)) == len(theirs))
    return distance, otherwise
