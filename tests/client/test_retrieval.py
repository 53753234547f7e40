"""The causal retriever equals an index rebuilt for each prefix."""

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client import retrieval
from fedoppu.client.retrieval import CausalIndex, words
from fedoppu.common.config import RetrieverSettings
from fedoppu.common.errors import UsageError

SETTINGS = RetrieverSettings()
WORDS = ["a", "b", "c", "d", "e", "f", "ab", "Ab,", "c-d", "é", "1"]
TEXTS = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join),
    max_size=12,
)


def reference(documents: Sequence[str], query: str, settings: RetrieverSettings) -> list[float]:
    """BM25 written out: a loop over documents and over the query's words, as rank_bm25 does it."""
    split = [words(document) for document in documents]
    average = sum(map(len, split)) / len(split) if split else 0.0
    scores = []
    for document in split:
        score = 0.0
        for word in words(query):
            f = document.count(word)
            n = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
            if f:
                norm = 1 - settings.b + settings.b * len(document) / average
                score += idf * f * (settings.k1 + 1) / (f + settings.k1 * norm)
        scores.append(score)
    return scores


@given(
    texts=TEXTS,
    k1=st.sampled_from([0.0, 0.5, 1.5, 100.0]),
    b=st.sampled_from([0.0, 0.75, 1.0]),
)
def test_scores_of_each_prefix_equal_the_formula(texts: list[str], k1: float, b: float) -> None:
    settings = RetrieverSettings(k1=k1, b=b)
    scores = CausalIndex(texts, settings).causal_scores(texts)
    for i, (text, found) in enumerate(zip(texts, scores, strict=True)):
        np.testing.assert_allclose(found, reference(texts[:i], text, settings), rtol=0, atol=1e-12)


@given(texts=TEXTS, k=st.integers(0, 5))
def test_one_pass_gives_what_rebuilding_gives(texts: list[str], k: int) -> None:
    passed = CausalIndex(texts, SETTINGS).causal_top_k(texts, k)
    rebuilt = [CausalIndex(texts[:i], SETTINGS).top_k(text, k) for i, text in enumerate(texts)]
    assert passed == rebuilt


@given(texts=TEXTS)
def test_scores_of_one_pass_equal_those_of_rebuilding_bit_for_bit(texts: list[str]) -> None:
    passed = CausalIndex(texts, SETTINGS).causal_scores(texts)
    for i, (text, found) in enumerate(zip(texts, passed, strict=True)):
        assert found.tobytes() == CausalIndex(texts[:i], SETTINGS).scores(text).tobytes()


@given(texts=TEXTS, queries=TEXTS, block=st.sampled_from([1, 7, 40]))
def test_blocks_change_nothing(texts: list[str], queries: list[str], block: int) -> None:
    asked = (queries + texts)[: len(texts)]
    whole = CausalIndex(texts, SETTINGS).causal_scores(asked)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(retrieval, "BLOCK", block)
        parts = CausalIndex(texts, SETTINGS).causal_scores(asked)
    assert [scores.tobytes() for scores in parts] == [scores.tobytes() for scores in whole]


@given(texts=TEXTS, k=st.integers(1, 20))
def test_the_best_come_first_and_the_newer_among_equals(texts: list[str], k: int) -> None:
    for query in texts:
        index = CausalIndex(texts, SETTINGS)
        scores = index.scores(query).tolist()
        expected = sorted(range(len(texts)), key=lambda i: (-scores[i], -i))[:k]
        assert list(index.top_k(query, k)) == expected


@given(texts=TEXTS, later=TEXTS)
def test_later_documents_change_nothing(texts: list[str], later: list[str]) -> None:
    alone = CausalIndex(texts, SETTINGS).causal_top_k(texts, 3)
    followed = CausalIndex(texts + later, SETTINGS).causal_top_k(texts + later, 3)
    assert followed[: len(texts)] == alone


def test_each_prefix_has_the_scores_and_the_ranking_of_rank_bm25_with_lucenes_idf() -> None:
    bm25 = pytest.importorskip("rank_bm25")
    generator = np.random.default_rng(0)
    texts = [
        " ".join(map(str, generator.zipf(1.5, generator.integers(3, 30)).clip(0, 60)))
        for _ in range(120)
    ]
    index = CausalIndex(texts, SETTINGS)
    found = zip(index.causal_scores(texts), index.causal_top_k(texts, len(texts)), strict=True)
    for i, (scores, order) in enumerate(found):
        if not i:
            continue
        split = [words(text) for text in texts[:i]]
        other = bm25.BM25Okapi(split, k1=SETTINGS.k1, b=SETTINGS.b)
        held = Counter(word for text in split for word in set(text))
        other.idf = {word: math.log(1 + (i - n + 0.5) / (n + 0.5)) for word, n in held.items()}
        theirs = other.get_scores(words(texts[i]))
        np.testing.assert_allclose(scores, theirs, rtol=0, atol=1e-12)
        assert sorted(order) == list(range(i))
        # the same order, but among documents that rounding alone tells apart
        assert (np.diff(theirs[list(order)]) <= 1e-12).all()


def test_an_empty_history_gives_nothing() -> None:
    index = CausalIndex([], SETTINGS)
    assert (len(index), index.top_k("a", 3), index.causal_top_k([], 3)) == (0, (), [])


def test_the_first_item_gets_nothing_and_the_second_the_first() -> None:
    assert CausalIndex(["a"], SETTINGS).causal_top_k(["a"], 2) == [()]
    assert CausalIndex(["a", "b"], SETTINGS).causal_top_k(["a", "b"], 2) == [(), (0,)]


def test_one_matching_document_among_two_scores_above_zero_and_wins() -> None:
    index = CausalIndex(["apple pie", "banana split"], SETTINGS)
    assert index.top_k("apple", 1) == (0,)
    assert index.scores("apple")[0] > 0
    assert CausalIndex(["apple"], SETTINGS).scores("apple")[0] > 0


def test_without_any_match_the_newest_come_first() -> None:
    assert CausalIndex(["a", "b", "c"], SETTINGS).top_k("x", 2) == (2, 1)


def test_equal_documents_come_newest_first() -> None:
    assert CausalIndex(["a b", "c", "a b"], SETTINGS).top_k("b a", 3) == (2, 0, 1)


def test_k_zero_gives_nothing() -> None:
    index = CausalIndex(["a", "a"], SETTINGS)
    assert index.top_k("a", 0) == ()
    assert index.causal_top_k(["a", "a"], 0) == [(), ()]


def test_more_than_there_are_gives_all() -> None:
    assert CausalIndex(["a", "b"], SETTINGS).top_k("a", 9) == (0, 1)


def test_empty_documents_are_no_trouble() -> None:
    index = CausalIndex(["", "!?", ""], SETTINGS)
    assert index.top_k("a", 2) == (2, 1)
    assert index.scores("a").tolist() == [0.0, 0.0, 0.0]


def test_a_repeated_word_of_the_query_counts_each_time() -> None:
    index = CausalIndex(["a b", "b c"], SETTINGS)
    np.testing.assert_allclose(index.scores("a a"), 2 * index.scores("a"), rtol=1e-15)


def test_words_are_lower_cased_runs_of_letters_and_digits() -> None:
    assert words("Don't STOP: é1_x, 3.5") == ["don", "t", "stop", "é1_x", "3", "5"]


def test_a_negative_k_is_refused() -> None:
    index = CausalIndex(["a"], SETTINGS)
    with pytest.raises(UsageError, match="k must be at least 0, got -1"):
        index.top_k("a", -1)
    with pytest.raises(UsageError, match="k must be at least 0, got -1"):
        index.causal_top_k(["a"], -1)


@pytest.mark.parametrize("k", [0, 1])
def test_each_document_needs_its_query(k: int) -> None:
    with pytest.raises(UsageError, match="there must be 2 queries, one a document, got 1"):
        CausalIndex(["a", "b"], SETTINGS).causal_top_k(["a"], k)


def test_a_thousand_items_take_a_fraction_of_a_second() -> None:
    generator = np.random.default_rng(0)
    texts = [
        " ".join(f"w{word}" for word in generator.zipf(1.3, 50).clip(0, 20_000))
        for _ in range(1000)
    ]
    start = time.process_time()
    CausalIndex(texts, SETTINGS).causal_top_k(texts, 2)
    assert time.process_time() - start < 2  # .1 on a quiet machine; this one may be shared
