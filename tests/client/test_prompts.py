"""Prompts: the formats, the budgets and the causal rule."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.prompts import PromptBuilder
from fedoppu.client.tasks import TASKS, Task
from fedoppu.client.vault import HistoryItem
from fedoppu.common.config import PromptSettings, RetrieverSettings
from fedoppu.common.errors import BaseModelError, DataError, UsageError

LIKE_QUERIES = ["LaMP_2N", "LaMP_2M", "LaMP_3", "LaMP_4", "LaMP_5"]
FIRST, SECOND, LIKED = "review: a\nscore: 1\n", "review: a b c\nscore: 5\n", "profile: p q\n"
WIDE = {"text_tokens": 500, "retrieved_tokens": 500, "profile_tokens": 500, "answer_tokens": 4}


@dataclass
class WordTokenizer:
    """A token for each word with the space before it, for each newline and each other space."""

    bos: int | None = 1
    eos: int = 2
    has_chat: bool = True
    vocabulary: list[str] = field(default_factory=lambda: ["", "<s>", "</s>", "<user>", "<bot>"])

    def encode(self, text: str) -> list[int]:
        found = re.findall(r"\n| ?[^\s]+| ", text)
        assert "".join(found) == text
        self.vocabulary += sorted({word for word in found if word not in self.vocabulary})
        return [self.vocabulary.index(word) for word in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.vocabulary[token] for token in tokens)

    def chat(self, user_text: str) -> list[int]:
        if not self.has_chat:
            raise BaseModelError("there is no chat template")
        return [3, *self.encode(user_text), 4]


@dataclass(frozen=True)
class Setting:
    k: int = 0
    max_tokens: int = 5000
    style: Literal["plain", "chat"] = "plain"
    bos: int | None = 1


def make(name: str, setting: Setting, **budgets: int) -> tuple[PromptBuilder, WordTokenizer]:
    tokenizer = WordTokenizer(bos=setting.bos)
    builder = PromptBuilder(
        TASKS[name],
        tokenizer,
        prompt=PromptSettings(style=setting.style, **{**WIDE, **budgets}),
        retriever=RetrieverSettings(),
        k=setting.k,
        max_tokens=setting.max_tokens,
    )
    return builder, tokenizer


def answer_of(task: Task, number: int) -> str:
    if task.items_are_queries and task.labels:
        return task.labels[number % len(task.labels)]
    return f"answer{number}"


def item(task: Task, number: int, words: str = "") -> HistoryItem:
    """An item whose text and free answer hold marker words that no other item has."""
    fields = {name: f"{name}{number} {words}" for name in task.item_fields}
    if task.items_are_queries:
        fields[task.items[0].target] = answer_of(task, number)
    return HistoryItem(str(number), "", "test", task.name, fields)


def query(name: str, gold: str = "", **fields: str) -> HistoryItem:
    text = TASKS[name].render_input(fields)
    return HistoryItem("q", "", "test", "query", {"input": text, "gold": gold})


def review(number: int, text: str, score: str) -> HistoryItem:
    return HistoryItem(str(number), "", "test", "LaMP_3", {"text": text, "score": score})


HISTORIES = {
    "LaMP_1": ({"title": "T", "abstract": "A"}, "paper:", " T"),
    "LaMP_2N": (
        {"text": "X", "title": "H", "category": "food & drink"},
        "article: X\ncategory:",
        " food & drink",
    ),
    "LaMP_2M": ({"description": "X", "tag": "sci-fi"}, "movie: X\ntag:", " sci-fi"),
    "LaMP_3": ({"text": "X", "score": "4"}, "review: X\nscore:", " 4"),
    "LaMP_4": ({"text": "X", "title": "A b"}, "article: X\nheadline:", " A b"),
    "LaMP_5": ({"abstract": "X", "title": "A b"}, "abstract: X\ntitle:", " A b"),
    "LaMP_7": ({"text": "X y"}, "tweet:", " X y"),
}
QUERIES = {
    "LaMP_1": (
        {"title": "T", "option_1": "A", "option_2": "B c"},
        "paper: T\n[1] A\n[2] B c\nreference:",
    ),
    "LaMP_2N": ({"text": "X"}, "article: X\ncategory:"),
    "LaMP_2M": ({"description": "X"}, "movie: X\ntag:"),
    "LaMP_3": ({"text": "X"}, "review: X\nscore:"),
    "LaMP_4": ({"text": "X"}, "article: X\nheadline:"),
    "LaMP_5": ({"abstract": "X"}, "abstract: X\ntitle:"),
    "LaMP_7": ({"text": "X"}, "tweet: X\nparaphrase:"),
}
BLOCKS = {
    "LaMP_1": "paper: T\n",
    "LaMP_2N": "article: X\ncategory: food & drink\n",
    "LaMP_2M": "movie: X\ntag: sci-fi\n",
    "LaMP_3": "review: X\nscore: 4\n",
    "LaMP_4": "article: X\nheadline: A b\n",
    "LaMP_5": "abstract: X\ntitle: A b\n",
    "LaMP_7": "tweet: X y\n",
}


@pytest.mark.parametrize("name", sorted(HISTORIES))
def test_a_history_item_becomes_prompt_and_answer(name: str) -> None:
    fields, prompt, answer = HISTORIES[name]
    builder, tokenizer = make(name, Setting())
    (example,) = builder.history_examples([HistoryItem("1", "", "", name, fields)], profile=None)
    assert tokenizer.decode(example.prompt.tolist()) == "<s>" + prompt
    assert tokenizer.decode(example.answer.tolist()) == answer + "</s>"
    assert [str(example.prompt.dtype), str(example.answer.dtype)] == ["int32", "int32"]


def test_a_paper_with_a_citation_is_trained_on_it() -> None:
    builder, tokenizer = make("LaMP_1", Setting())
    fields = {"title": "T", "abstract": "", "citation": "C"}
    (example,) = builder.history_examples(
        [HistoryItem("1", "", "", "LaMP_1", fields)], profile=None
    )
    assert tokenizer.decode(example.prompt.tolist()) == "<s>paper: T\nreference:"
    assert tokenizer.decode(example.answer.tolist()) == " C</s>"


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_profile_retrieved_item_and_query_stand_in_this_order(name: str) -> None:
    fields, prompt = QUERIES[name]
    builder, tokenizer = make(name, Setting(k=1))
    history = [HistoryItem("1", "", "", name, HISTORIES[name][0])]
    prepared = builder.query(history, query(name, **fields), profile="likes  tea")
    expected = f"<s>profile: likes tea\n{BLOCKS[name]}{prompt}"
    assert tokenizer.decode(prepared.prompt.tolist()) == expected


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_labels_are_tokenised_in_the_tasks_order(name: str) -> None:
    builder, tokenizer = make(name, Setting())
    prepared = builder.query([], query(name, **QUERIES[name][0]), profile=None)
    labels = [tokenizer.decode(label.tolist()) for label in prepared.labels]
    assert labels == [f" {label}</s>" for label in TASKS[name].labels]
    assert builder.label_tokens() is prepared.labels


def test_the_most_relevant_item_comes_first() -> None:
    builder, tokenizer = make("LaMP_3", Setting(k=2, bos=None))
    history = [review(1, "good tea", "5"), review(2, "good tea pot", "3"), review(3, "car", "1")]
    prepared = builder.query(history, query("LaMP_3", text="good tea"), profile=None)
    assert tokenizer.decode(prepared.prompt.tolist()) == (
        "review: good tea\nscore: 5\nreview: good tea pot\nscore: 3\nreview: good tea\nscore:"
    )


def test_gold_and_its_tokens_are_kept() -> None:
    builder, tokenizer = make("LaMP_4", Setting())
    prepared = builder.query([], query("LaMP_4", "Big  News", text="x"), profile=None)
    assert prepared.gold == "Big  News"
    assert tokenizer.decode(prepared.gold_tokens.tolist()) == " Big News</s>"


def test_a_query_without_gold_can_be_asked_but_not_trained_on() -> None:
    builder, _ = make("LaMP_4", Setting())
    asked = HistoryItem(
        "q7", "", "", "query", {"input": TASKS["LaMP_4"].render_input({"text": "x"})}
    )
    prepared = builder.query([], asked, profile=None)
    assert (prepared.gold, len(prepared.gold_tokens)) == ("", 0)
    with pytest.raises(DataError, match="LaMP_4: query q7 has no gold to train on"):
        builder.query_examples([], [asked], profile=None)


def test_query_examples_are_the_queries_with_their_golds() -> None:
    builder, _ = make("LaMP_3", Setting(k=1))
    history = [review(1, "tea", "5"), review(2, "car", "2")]
    asked = [query("LaMP_3", "4", text="tea"), query("LaMP_3", "1", text="car")]
    examples = builder.query_examples(history, asked, profile="p")
    for example, one in zip(examples, asked, strict=True):
        prepared = builder.query(history, one, profile="p")
        np.testing.assert_array_equal(example.prompt, prepared.prompt)
        np.testing.assert_array_equal(example.answer, prepared.gold_tokens)


def test_queries_of_one_user_equal_each_by_itself() -> None:
    builder, _ = make("LaMP_3", Setting(k=2))
    history = [review(i, f"w{i % 3} tea", "5") for i in range(6)]
    asked = [query("LaMP_3", "4", text=f"w{i}") for i in range(3)]
    together = builder.queries(history, asked, profile=None)
    for found, one in zip(together, asked, strict=True):
        alone = builder.query(history, one, profile=None)
        np.testing.assert_array_equal(found.prompt, alone.prompt)


@given(
    name=st.sampled_from(sorted(TASKS)),
    size=st.integers(0, 7),
    k=st.integers(0, 4),
    style=st.sampled_from(["plain", "chat"]),
    words=st.lists(st.sampled_from(["tea", "car", "rain"]), min_size=7, max_size=7),
    room=st.sampled_from([90, 200, 5000]),
)
def test_the_prompt_of_an_item_holds_nothing_of_itself_but_its_input_and_nothing_later(
    name: str,
    size: int,
    k: int,
    style: Literal["plain", "chat"],
    words: list[str],
    room: int,
) -> None:
    task = TASKS[name]
    builder, tokenizer = make(name, Setting(k=k, style=style, max_tokens=room))
    history = [item(task, number, words[number]) for number in range(size)]
    examples = builder.history_examples(history, profile=None)
    assert len(examples) == size
    for i, example in enumerate(examples):
        text = tokenizer.decode(example.prompt.tolist())
        seen = {
            int(number)
            for number in re.findall(r"(?:text|title|description|abstract|answer)(\d)", text)
        }
        assert seen <= set(range(i + 1))
        assert f"answer{i}" not in text
        if not task.items_are_queries:
            assert seen == set()
        elif room == 5000:
            assert len(seen - {i}) == min(k, i)


@given(name=st.sampled_from(LIKE_QUERIES), size=st.integers(1, 6), change=st.integers(0, 5))
def test_changing_a_later_item_changes_no_earlier_prompt(name: str, size: int, change: int) -> None:
    task = TASKS[name]
    builder, _ = make(name, Setting(k=2))
    at = change % size
    history = [item(task, number, "tea") for number in range(size)]
    other = [*history[:at], item(task, 9, "rain"), *history[at + 1 :]]
    pairs = zip(
        builder.history_examples(history, profile=None),
        builder.history_examples(other, profile=None),
        strict=True,
    )
    for one, two in list(pairs)[:at]:
        np.testing.assert_array_equal(one.prompt, two.prompt)
        np.testing.assert_array_equal(one.answer, two.answer)


@given(
    name=st.sampled_from(sorted(TASKS)),
    style=st.sampled_from(["plain", "chat"]),
    max_tokens=st.integers(80, 200),
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    profile=st.integers(0, 40),
)
def test_prompt_and_longest_answer_always_fit_and_no_answer_is_cut(
    name: str,
    style: Literal["plain", "chat"],
    max_tokens: int,
    lengths: list[int],
    profile: int,
) -> None:
    task = TASKS[name]
    builder, tokenizer = make(name, Setting(k=3, style=style, max_tokens=max_tokens))
    history = [item(task, number, "tea " * length) for number, length in enumerate(lengths)]
    text = "fine " * profile
    gold = answer_of(task, 1) if name != "LaMP_1" else "[2]"
    asked = query(name, gold, **dict.fromkeys(task.input_fields, "tea " * max(lengths)))
    longest = max([4 if task.kind == "generation" else 0, *map(len, builder.label_tokens())])
    for example, one in zip(builder.history_examples(history, profile=text), history, strict=True):
        answer = " ".join(one.fields[task.item_format(one.fields).target].split())
        assert tokenizer.decode(example.answer.tolist()).strip() == f"{answer}</s>"
        assert len(example.prompt) + max(longest, len(example.answer)) <= max_tokens
    prepared = builder.query(history, asked, profile=text)
    assert len(prepared.prompt) + max(longest, len(prepared.gold_tokens)) <= max_tokens


def test_budgets_cut_text_items_and_profile() -> None:
    builder, tokenizer = make(
        "LaMP_3", Setting(k=1), text_tokens=2, retrieved_tokens=7, profile_tokens=3
    )
    history = [review(1, "a b c d e f", "5")]
    asked = query("LaMP_3", text="a x y z")
    prepared = builder.query(history, asked, profile="p q r s")
    # Seven tokens of the retrieved item: "review:", " a", " b", "\n", "score:", " 5", "\n".
    assert tokenizer.decode(prepared.prompt.tolist()) == (
        "<s>profile: p q r\nreview: a b\nscore: 5\nreview: a x\nscore:"
    )


def test_a_retrieved_answer_is_cut_only_where_it_does_not_fit_by_itself() -> None:
    builder, tokenizer = make("LaMP_4", Setting(k=1, bos=None), retrieved_tokens=6)
    history = [HistoryItem("1", "", "", "LaMP_4", {"text": "a b c", "title": "t u v w"})]
    prepared = builder.query(history, query("LaMP_4", text="x"), profile=None)
    assert tokenizer.decode(prepared.prompt.tolist()) == (
        "article:\nheadline: t u\narticle: x\nheadline:"
    )


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (27, f"<s>{LIKED}{SECOND}{FIRST}review: a b c\nscore:"),
        (26, f"<s>{LIKED}{SECOND}review: a b c\nscore:"),
        (21, f"<s>{LIKED}{SECOND}review: a b c\nscore:"),
        (20, f"<s>{LIKED}review: a b c\nscore:"),
        (13, f"<s>{LIKED}review: a b c\nscore:"),
        (12, "<s>review: a b c\nscore:"),
        (9, "<s>review: a b c\nscore:"),
        (8, "<s>review: a b\nscore:"),
        (6, "<s>review:\nscore:"),
    ],
)
def test_what_does_not_fit_goes_least_relevant_item_first_then_profile_then_text(
    max_tokens: int, expected: str
) -> None:
    builder, tokenizer = make("LaMP_3", Setting(k=2, max_tokens=max_tokens))
    history = [review(1, "a", "1"), review(2, "a b c", "5")]
    prepared = builder.query(history, query("LaMP_3", text="a b c"), profile="p q")
    assert tokenizer.decode(prepared.prompt.tolist()) == expected


def test_a_prompt_that_cannot_fit_is_an_error_that_names_the_item() -> None:
    builder, _ = make("LaMP_3", Setting(max_tokens=5))
    with pytest.raises(DataError, match=r"LaMP_3: q does not fit.*need 6 tokens, the base has 5"):
        builder.query([], query("LaMP_3", text="a"), profile=None)


def test_an_answer_longer_than_the_base_is_an_error() -> None:
    builder, _ = make("LaMP_7", Setting(max_tokens=20))
    tweet = HistoryItem("t3", "", "", "LaMP_7", {"text": "x " * 30})
    with pytest.raises(DataError, match="LaMP_7: t3 does not fit"):
        builder.history_examples([tweet], profile=None)


def test_each_text_of_a_query_with_three_is_cut_evenly() -> None:
    builder, tokenizer = make("LaMP_1", Setting(max_tokens=18, bos=None))
    fields = dict.fromkeys(("title", "option_1", "option_2"), "a b c d e")
    prepared = builder.query([], query("LaMP_1", **fields), profile=None)
    assert tokenizer.decode(prepared.prompt.tolist()) == (
        "paper: a b c\n[1] a b c\n[2] a b c\nreference:"
    )


def test_white_space_in_a_text_becomes_single_spaces() -> None:
    builder, tokenizer = make("LaMP_3", Setting())
    prepared = builder.query([], query("LaMP_3", text=" a\n\n b\t{c} "), profile=None)
    assert tokenizer.decode(prepared.prompt.tolist()) == "<s>review: a b {c}\nscore:"


def test_an_empty_text_leaves_the_format() -> None:
    builder, tokenizer = make("LaMP_3", Setting())
    prepared = builder.query([], query("LaMP_3", text=""), profile=None)
    assert tokenizer.decode(prepared.prompt.tolist()) == "<s>review:\nscore:"


@pytest.mark.parametrize("profile", [None, "", " \n"])
def test_no_profile_leaves_no_trace(profile: str | None) -> None:
    builder, tokenizer = make("LaMP_3", Setting())
    prepared = builder.query([], query("LaMP_3", text="a"), profile=profile)
    assert tokenizer.decode(prepared.prompt.tolist()) == "<s>review: a\nscore:"


@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_7"])
def test_neither_profile_nor_items_where_the_history_has_another_format(name: str) -> None:
    task = TASKS[name]
    builder, tokenizer = make(name, Setting(k=2))
    history = [item(task, number) for number in range(3)]
    for example in builder.history_examples(history, profile="secret"):
        text = tokenizer.decode(example.prompt.tolist())
        assert text == f"<s>{task.items[-1].prompt}"


@pytest.mark.parametrize("name", LIKE_QUERIES)
def test_items_are_trained_with_profile_and_earlier_items(name: str) -> None:
    task = TASKS[name]
    builder, tokenizer = make(name, Setting(k=1))
    history = [item(task, 0), item(task, 1)]
    _, second = builder.history_examples(history, profile="fine")
    text = tokenizer.decode(second.prompt.tolist())
    assert text.startswith(f"<s>profile: fine\n{task.block.partition(':')[0]}: {task.text}0\n")


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_short_histories_are_no_trouble(name: str, size: int) -> None:
    task = TASKS[name]
    builder, _ = make(name, Setting(k=4))
    history = [item(task, number) for number in range(size)]
    assert len(builder.history_examples(history, profile=None)) == size
    prepared = builder.query(history, query(name, **QUERIES[name][0]), profile=None)
    assert len(prepared.prompt) > 0


def test_the_chat_style_wraps_instruction_and_item_and_answers_without_a_space() -> None:
    builder, tokenizer = make("LaMP_3", Setting(k=1, style="chat"))
    history = [review(1, "a", "5")]
    prepared = builder.query(history, query("LaMP_3", "2", text="b"), profile="p")
    text = tokenizer.decode(prepared.prompt.tolist())
    assert text == (
        f"<user>{TASKS['LaMP_3'].query.instruction}\n\n"
        "profile: p\nreview: a\nscore: 5\nreview: b\nscore:<bot>"
    )
    assert tokenizer.decode(prepared.gold_tokens.tolist()) == "2</s>"
    assert tokenizer.decode(prepared.labels[0].tolist()) == "1</s>"


def test_the_chat_style_cuts_texts_in_tokens_too() -> None:
    builder, tokenizer = make(
        "LaMP_3", Setting(k=1, style="chat"), text_tokens=2, retrieved_tokens=6
    )
    prepared = builder.query([review(1, "a b c", "5")], query("LaMP_3", text="x y z"), profile=None)
    text = tokenizer.decode(prepared.prompt.tolist())
    assert text.endswith("\n\nreview: a\nscore: 5\nreview: x y\nscore:<bot>")


def test_a_base_without_chat_template_says_so() -> None:
    tokenizer = WordTokenizer(has_chat=False)
    builder = PromptBuilder(
        TASKS["LaMP_3"],
        tokenizer,
        prompt=PromptSettings(style="chat"),
        retriever=RetrieverSettings(),
        k=0,
        max_tokens=99,
    )
    with pytest.raises(BaseModelError, match="there is no chat template"):
        builder.query([], query("LaMP_3", text="a"), profile=None)


def test_an_answer_is_decoded_up_to_the_end_token_and_stripped() -> None:
    builder, tokenizer = make("LaMP_4", Setting())
    tokens = tokenizer.encode(" Big News ")
    assert builder.answer(tokens) == "Big News"
    assert builder.answer([*tokens, 2, *tokens]) == "Big News"
    assert builder.answer([]) == ""


def test_an_item_of_another_task_is_refused() -> None:
    builder, _ = make("LaMP_3", Setting())
    with pytest.raises(DataError, match="LaMP_3: item 1 is of the kind LaMP_4"):
        builder.history_examples([item(TASKS["LaMP_4"], 1)], profile=None)


def test_an_item_without_answer_is_refused() -> None:
    builder, _ = make("LaMP_3", Setting())
    with pytest.raises(DataError, match="item 7: LaMP_3: an item needs a score"):
        builder.history_examples([review(7, "a", "")], profile=None)


def test_an_item_without_text_field_is_refused() -> None:
    builder, _ = make("LaMP_3", Setting())
    broken = HistoryItem("7", "", "", "LaMP_3", {"score": "1"})
    with pytest.raises(DataError, match="LaMP_3: item 7: the field text is missing"):
        builder.history_examples([broken], profile=None)


def test_an_answer_that_is_no_label_is_refused() -> None:
    builder, _ = make("LaMP_3", Setting())
    with pytest.raises(DataError, match="LaMP_3: the answer of 7 is none of the labels"):
        builder.history_examples([review(7, "a", "6")], profile=None)
    with pytest.raises(DataError, match="LaMP_3: the answer of q is none of the labels"):
        builder.query([], query("LaMP_3", "6", text="a"), profile=None)
    other, _ = make("LaMP_1", Setting())
    asked = query("LaMP_1", "[3]", **QUERIES["LaMP_1"][0])
    with pytest.raises(DataError, match="LaMP_1: the answer of q is none of the labels"):
        other.query([], asked, profile=None)


def test_a_query_that_cannot_be_read_is_named() -> None:
    builder, _ = make("LaMP_3", Setting())
    with pytest.raises(DataError, match="query q: LaMP_3: an input must begin with"):
        builder.query([], query("LaMP_4", text="a"), profile=None)
    with pytest.raises(DataError, match="LaMP_3: query q has no input"):
        builder.query([], HistoryItem("q", "", "", "query", {}), profile=None)


@pytest.mark.parametrize(("k", "max_tokens"), [(-1, 10), (0, 0)])
def test_impossible_numbers_are_refused(k: int, max_tokens: int) -> None:
    with pytest.raises(UsageError, match="k must be at least 0 and max_tokens 1, got"):
        make("LaMP_3", Setting(k=k, max_tokens=max_tokens))


def test_a_budget_that_cannot_hold_an_items_format_is_refused() -> None:
    builder, _ = make("LaMP_3", Setting(k=1), retrieved_tokens=3)
    with pytest.raises(UsageError, match="retrieved_tokens must be at least 4, got 3"):
        builder.query([review(1, "a", "1")], query("LaMP_3", text="a"), profile=None)


def test_the_profile_question_shows_the_newest_items_first_and_leaves_room() -> None:
    builder, tokenizer = make("LaMP_3", Setting(max_tokens=24, bos=None), profile_tokens=5)
    history = [review(number, f"w{number}", "5") for number in range(1, 5)]
    prompt = builder.profile_prompt(history)
    assert tokenizer.decode(prompt.tolist()) == (
        "review: w4\nscore: 5\nreview: w3\nscore: 5\nprofile:"
    )
    assert len(prompt) + 6 <= 24


def test_the_profile_question_refuses_items_of_another_task() -> None:
    builder, _ = make("LaMP_3", Setting())
    with pytest.raises(DataError, match="LaMP_3: item 1 is of the kind LaMP_4"):
        builder.profile_prompt([item(TASKS["LaMP_4"], 1)])


def test_the_profile_question_needs_room() -> None:
    builder, _ = make("LaMP_3", Setting(max_tokens=3))
    with pytest.raises(DataError, match="the profile does not fit"):
        builder.profile_prompt([])
