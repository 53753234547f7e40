"""Profiles: deterministic, of the items given, and empty without any."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedoppu.client.jobs import ModelQuery
from fedoppu.client.profile import SAMPLE, sample, template_profile, written_profile
from fedoppu.client.prompts import PromptBuilder
from fedoppu.client.tasks import TASKS
from fedoppu.client.vault import HistoryItem
from fedoppu.common.config import PromptSettings, RetrieverSettings
from fedoppu.common.errors import DataError


class LetterTokenizer:
    """A token for each character."""

    bos = None
    eos = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def chat(self, user_text: str) -> list[int]:
        return self.encode(user_text)


@dataclass
class Recorder:
    """A predictor that answers with fixed words and keeps what it was asked."""

    asked: list[ModelQuery] = field(default_factory=list)

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[NDArray[np.float64]]:
        raise AssertionError("a profile is generated, not scored")

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, ...]]:
        self.asked += queries
        return iter([tuple(map(ord, " likes\n tea "))] * len(queries))


def items(name: str, *fields: dict[str, str]) -> list[HistoryItem]:
    return [HistoryItem(str(n), "", "", name, values) for n, values in enumerate(fields)]


def news(text: str, category: str) -> dict[str, str]:
    return {"text": text, "title": "", "category": category}


def numbered(size: int) -> list[HistoryItem]:
    return items("LaMP_3", *({"text": f"text{n}", "score": "5"} for n in range(size)))


def builder(name: str) -> PromptBuilder:
    return PromptBuilder(
        TASKS[name],
        LetterTokenizer(),
        prompt=PromptSettings(profile_tokens=7, retrieved_tokens=40),
        retriever=RetrieverSettings(),
        k=0,
        max_tokens=2000,
    )


@pytest.mark.parametrize("name", sorted(TASKS))
def test_no_items_give_no_profile(name: str) -> None:
    predictor = Recorder()
    assert template_profile(TASKS[name], []) == ""
    assert written_profile(TASKS[name], [], builder(name), predictor) == ""
    assert predictor.asked == []


@pytest.mark.parametrize("name", sorted(TASKS))
def test_one_item_is_enough_for_a_profile_of_one_line(name: str) -> None:
    fields = dict.fromkeys(TASKS[name].item_fields, "Storm warning")
    target = TASKS[name].items[0].target
    fields |= {target: "4"} if name == "LaMP_3" else {}
    profile = template_profile(TASKS[name], items(name, fields))
    assert "storm" in profile
    assert "\n" not in profile


def test_labels_come_with_their_shares_the_most_frequent_first() -> None:
    history = items(
        "LaMP_2N",
        news("budget vote", "politics"),
        news("budget talk", "politics"),
        news("bread budget", "food & drink"),
        news("the goal", "sports"),
    )
    assert template_profile(TASKS["LaMP_2N"], history) == (
        "mostly politics (50 %), food & drink (25 %), sports (25 %); "
        "often about budget, bread, goal, talk, vote"
    )


def test_ratings_give_mean_and_most_frequent() -> None:
    history = items(
        "LaMP_3",
        {"text": "great strings", "score": "5"},
        {"text": "great tuner", "score": "5"},
        {"text": "broken", "score": "1"},
    )
    assert template_profile(TASKS["LaMP_3"], history) == (
        "gives 3.7 on average, mostly 5; often writes great, broken, strings, tuner"
    )


def test_titles_give_length_habits_and_words() -> None:
    history = items(
        "LaMP_4",
        {"text": "x", "title": "Why Storms Matter?"},
        {"text": "x", "title": "Is This the Storm?"},
    )
    assert template_profile(TASKS["LaMP_4"], history) == (
        "writes about 4 words with questions, capitals; often writes matter, storm, storms"
    )


def test_a_paper_profile_names_words_of_the_titles() -> None:
    history = items("LaMP_1", {"title": "Parsing with Grammars", "abstract": "secret"})
    assert template_profile(TASKS["LaMP_1"], history) == "works on grammars, parsing"


def test_a_word_counts_once_a_text_and_common_words_do_not_count() -> None:
    history = items(
        "LaMP_2M",
        {"description": "spy spy spy and the war", "tag": "action"},
        {"description": "war 1914", "tag": "action"},
    )
    assert template_profile(TASKS["LaMP_2M"], history).endswith("often about war, spy")


def test_items_without_words_are_no_trouble() -> None:
    history = items("LaMP_3", {"text": "", "score": "1"})
    assert template_profile(TASKS["LaMP_3"], history).endswith("often writes little")


def test_the_order_of_the_items_changes_nothing_in_a_template() -> None:
    history = items(
        "LaMP_3", *({"text": f"w{n % 7} tea", "score": str(n % 5 + 1)} for n in range(20))
    )
    forwards = template_profile(TASKS["LaMP_3"], history)
    assert forwards == template_profile(TASKS["LaMP_3"], history[::-1])


def test_a_profile_of_a_prefix_knows_nothing_later() -> None:
    history = items("LaMP_3", {"text": "early", "score": "1"}, {"text": "late", "score": "5"})
    assert "late" not in template_profile(TASKS["LaMP_3"], history[:1])


def test_an_item_without_answer_is_refused() -> None:
    with pytest.raises(DataError, match="LaMP_3: an item needs a score"):
        template_profile(TASKS["LaMP_3"], items("LaMP_3", {"text": "x", "score": ""}))


@given(size=st.integers(0, 60), wanted=st.integers(1, 12))
def test_a_sample_is_spread_over_the_history_with_the_newest_item(size: int, wanted: int) -> None:
    history = numbered(size)
    chosen = [int(item.id) for item in sample(history, wanted)]
    assert len(chosen) == min(size, wanted)
    assert chosen == sorted(set(chosen))
    if chosen:
        assert chosen[-1] == size - 1
        steps = [after - before for before, after in pairwise([-1, *chosen])]
        assert max(steps) - min(steps) <= 1


def test_a_written_profile_is_asked_of_the_base_alone_with_a_bounded_answer() -> None:
    predictor = Recorder()
    history = numbered(30)
    profile = written_profile(TASKS["LaMP_3"], history, builder("LaMP_3"), predictor)
    assert profile == "likes tea"
    (query,) = predictor.asked
    assert (query.adapters, query.max_tokens) == ((), 7)
    shown = LetterTokenizer().decode(query.prompt.tolist())
    assert shown.count("review:") == SAMPLE
    assert shown.startswith("review: text29\nscore: 5\nreview: text26")
    assert shown.endswith("\nprofile:")


def test_a_written_profile_asks_the_same_for_the_same_history() -> None:
    one, two = Recorder(), Recorder()
    for predictor in (one, two):
        written_profile(TASKS["LaMP_3"], numbered(12), builder("LaMP_3"), predictor)
    np.testing.assert_array_equal(one.asked[0].prompt, two.asked[0].prompt)


def test_a_written_profile_refuses_items_of_another_task() -> None:
    with pytest.raises(DataError, match="LaMP_4: item 0 is of the kind LaMP_3"):
        written_profile(TASKS["LaMP_4"], numbered(1), builder("LaMP_4"), Recorder())
