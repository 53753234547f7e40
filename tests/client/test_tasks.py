"""The seven tasks: their inputs are read and written exactly."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.tasks import MOVIE_TAGS, NEWS_CATEGORIES, TASKS, Task, get_task
from fedoppu.client.vault import HistoryItem
from fedoppu.common import config
from fedoppu.common.errors import DataError, UsageError

LAMP = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "lamp_style"
# Texts made to collide with what surrounds them in an input string.
AWKWARD = st.lists(
    st.one_of(
        st.sampled_from(
            [
                '"',
                "\n",
                "[",
                "]",
                "[1]: ",
                "[2]: ",
                '" [2]: "',
                '", which reference is related?',
                "article: ",
                "] article: ",
                "description: ",
                "tags: [",
                "review: ",
                "Paraphrase the following tweet",
                "{text}",
                " ",
            ]
        ),
        st.text(max_size=8),
    ),
    max_size=6,
).map("".join)

EXPECTED = {
    "LaMP_1": (
        {"title": "T", "option_1": "A", "option_2": "B"},
        'For an author who has written the paper with the title "T", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "A" [2]: "B"',
    ),
    "LaMP_2N": (
        {"text": "T"},
        "Which category does this article relate to among the following categories? Just answer "
        "with the category name without further explanation. categories: [travel, education, "
        "parents, style & beauty, entertainment, food & drink, science & technology, business, "
        "sports, healthy living, women, politics, crime, culture & arts, religion] article: T",
    ),
    "LaMP_2M": (
        {"description": "T"},
        "Which tag does this movie relate to among the following tags? Just answer with the tag "
        "name without further explanation. tags: [sci-fi, based on a book, comedy, action, twist "
        "ending, dystopia, dark comedy, classic, psychology, fantasy, romance, thought-provoking, "
        "social commentary, violence, true story] description: T",
    ),
    "LaMP_3": (
        {"text": "T"},
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, "
        "3, 4, or 5 without further explanation. review: T",
    ),
    "LaMP_4": ({"text": "T"}, "Generate a headline for the following article: T"),
    "LaMP_5": (
        {"abstract": "T"},
        "Generate a title for the following abstract of a paper: T",
    ),
    "LaMP_7": (
        {"text": "T"},
        "Paraphrase the following tweet without any explanation before or after it: T",
    ),
}
TAGGED = EXPECTED["LaMP_2M"][1]


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def test_there_are_the_tasks_that_the_configuration_knows() -> None:
    assert tuple(TASKS) == config.TASKS


def test_the_tasks_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        TASKS["LaMP_6"] = TASKS["LaMP_4"]  # type: ignore[index]


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"task must be one of LaMP_1, LaMP_2N.*got LaMP_6"):
        get_task("LaMP_6")


def test_each_input_string_of_lamp_is_read(task: Task) -> None:
    fields, text = EXPECTED[task.name]
    assert task.parse_input(text) == fields


def test_each_input_string_of_lamp_is_written(task: Task) -> None:
    fields, text = EXPECTED[task.name]
    assert task.render_input(fields) == text


@given(data=st.data(), name=st.sampled_from(sorted(TASKS)))
def test_what_is_written_is_read_back_whatever_the_text(data: st.DataObject, name: str) -> None:
    task = TASKS[name]
    fields = {field: data.draw(AWKWARD) for field in task.input_fields}
    try:
        text = task.render_input(fields)
    except DataError:
        # Only LaMP_1 may refuse, and only where a title holds a whole separator.
        assert name == "LaMP_1"
        joined = '"'.join([*fields.values(), ""])
        assert any(literal[1:-1] in joined for literal in task.literals[1:-1])
    else:
        assert task.parse_input(text) == fields


@given(text=AWKWARD, name=st.sampled_from(sorted(TASKS)))
def test_what_is_read_is_written_back(text: str, name: str) -> None:
    task = TASKS[name]
    whole = task.literals[0] + text + '", "'.join(task.literals[1:])
    try:
        fields = task.parse_input(whole)
    except DataError:
        assert name == "LaMP_1"
    else:
        assert task.render_input(fields) == whole


def test_titles_with_quotes_and_brackets_are_read() -> None:
    fields = {"title": 'On "A" [1]: x', "option_1": '"Q" [2]', "option_2": "\n[2]: "}
    task = TASKS["LaMP_1"]
    assert task.parse_input(task.render_input(fields)) == fields


def test_a_title_with_a_whole_separator_is_refused_both_ways() -> None:
    task = TASKS["LaMP_1"]
    fields = {"title": "T", "option_1": 'a" [2]: "b', "option_2": "c"}
    with pytest.raises(DataError, match=r"LaMP_1: the input holds .* twice and reads in two ways"):
        task.render_input(fields)
    text = EXPECTED["LaMP_1"][1].replace('"B"', '"B" [2]: "C"')
    with pytest.raises(DataError, match="twice and reads in two ways"):
        task.parse_input(text)


def test_an_overlapping_separator_is_refused() -> None:
    task = TASKS["LaMP_1"]
    with pytest.raises(DataError, match="reads in two ways"):
        task.render_input({"title": "T", "option_1": "x", "option_2": ' [2]: "y'})


@pytest.mark.parametrize("name", sorted(TASKS))
def test_another_tasks_input_is_refused(name: str) -> None:
    other = "LaMP_3" if name == "LaMP_4" else "LaMP_4"
    with pytest.raises(DataError, match=f"{name}: an input must begin with"):
        TASKS[name].parse_input(EXPECTED[other][1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "LaMP_1: an input must begin with 'For an author"),
        (EXPECTED["LaMP_1"][1][:-1], "LaMP_1: an input must end with '\"'"),
        (EXPECTED["LaMP_1"][1].replace("[1]: ", "[a]: "), "LaMP_1: the input lacks"),
    ],
)
def test_a_torn_input_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASKS["LaMP_1"].parse_input(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TAGGED.replace("dystopia, ", ""), r"lacks \['dystopia'\] and has the unknown \[\]"),
        (TAGGED.replace("dystopia", "western"), r"lacks \['dystopia'\].*unknown \['western'\]"),
        (
            TAGGED.replace("sci-fi, based on a book", "based on a book, sci-fi"),
            "label list must be in the order sci-fi, based on a book",
        ),
    ],
)
def test_a_label_list_that_is_not_the_tasks_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"LaMP_2M: an input's .*{message}"):
        TASKS["LaMP_2M"].parse_input(text)


def test_an_error_does_not_repeat_the_text() -> None:
    with pytest.raises(DataError) as error:
        TASKS["LaMP_4"].parse_input("my secret diary")
    assert "secret" not in str(error.value)


def test_an_input_needs_all_its_fields() -> None:
    with pytest.raises(DataError, match="LaMP_1: an input needs option_1, option_2"):
        TASKS["LaMP_1"].render_input({"title": "T"})


@pytest.mark.parametrize("name", ["LaMP_2N", "LaMP_2M", "LaMP_3", "LaMP_4", "LaMP_5"])
def test_an_item_becomes_a_query_that_holds_all_but_its_answer(name: str) -> None:
    task = TASKS[name]
    fields = {key: f"<{key}>" for key in task.item_fields}
    pair = task.as_query(fields)
    assert pair is not None
    text, gold = pair
    assert gold == fields[task.items[0].target]
    assert gold not in text
    assert task.parse_input(text)[task.text] == fields[task.text]


@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_7"])
def test_items_of_another_format_become_no_query(name: str) -> None:
    fields = dict.fromkeys(TASKS[name].item_fields, "x")
    assert TASKS[name].as_query(fields) is None


def test_a_citation_is_the_answer_where_there_is_one() -> None:
    task = TASKS["LaMP_1"]
    item = {"title": "T", "abstract": ""}
    assert task.item_format(item).prompt == "paper:"
    assert task.item_format({**item, "citation": "C"}).target == "citation"
    assert task.item_format({**item, "citation": " "}).target == "title"


def test_an_item_without_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="LaMP_2M: an item needs a tag that is not empty"):
        TASKS["LaMP_2M"].item_format({"description": "x", "tag": " "})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LaMP_2N", "Politics", "LaMP_2N: an answer must be one of travel.*got 'Politics'"),
        ("LaMP_3", "6", "LaMP_3: an answer must be one of 1, 2, 3, 4, 5, got '6'"),
        ("LaMP_4", "  ", "LaMP_4: an answer must not be empty"),
    ],
)
def test_an_answer_that_the_task_does_not_know_is_refused(
    name: str, value: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TASKS[name].check_target(value)


def test_labels_and_free_text_are_answers() -> None:
    TASKS["LaMP_2N"].check_target("style & beauty")
    TASKS["LaMP_5"].check_target("Anything")


def test_only_items_of_label_tasks_have_a_label() -> None:
    assert TASKS["LaMP_3"].history_label({"text": "x", "score": "4"}) == "4"
    assert TASKS["LaMP_1"].history_label({"title": "x", "abstract": ""}) is None
    assert TASKS["LaMP_4"].history_label({"text": "x", "title": "y"}) is None


@pytest.mark.parametrize("name", ["LaMP_2N", "LaMP_2M", "LaMP_3", "LaMP_4", "LaMP_5"])
def test_the_retrievers_documents_hold_no_answer_unless_asked(name: str) -> None:
    task = TASKS[name]
    fields = {key: f"<{key}>" for key in task.item_fields}
    answer = fields[task.items[0].target]
    assert answer not in task.document(fields)
    assert answer in task.document(fields, with_answer=True)
    assert fields[task.text] in task.document(fields)


def test_documents_and_lookups_use_lamps_fields() -> None:
    news = {"text": "t", "title": "h", "category": "c"}
    assert TASKS["LaMP_2N"].document(news) == "h t"
    assert TASKS["LaMP_2N"].lookup(news) == "t"
    query = {"title": "t", "option_1": "a", "option_2": "b"}
    assert TASKS["LaMP_1"].lookup(query) == "a b"
    assert TASKS["LaMP_7"].document({"text": "t"}, with_answer=True) == "t"


def test_a_task_finds_its_items_and_queries_among_all_that_a_vault_holds() -> None:
    owned = [
        HistoryItem("1", "", "", "LaMP_4", {"text": "x", "title": "y"}),
        HistoryItem("2", "", "", "LaMP_3", {"text": "x", "score": "1"}),
        HistoryItem("3", "", "", "query", {"input": EXPECTED["LaMP_4"][1], "gold": "y"}),
        HistoryItem("4", "", "", "query", {"input": EXPECTED["LaMP_3"][1], "gold": "1"}),
    ]
    assert [item.id for item in TASKS["LaMP_4"].history(owned)] == ["1"]
    assert [item.id for item in TASKS["LaMP_4"].queries(owned)] == ["3"]


def test_labels_have_lamps_order() -> None:
    assert TASKS["LaMP_2N"].labels == NEWS_CATEGORIES
    assert TASKS["LaMP_2M"].labels == MOVIE_TAGS
    assert (len(set(NEWS_CATEGORIES)), len(set(MOVIE_TAGS))) == (15, 15)
    assert TASKS["LaMP_3"].labels == ("1", "2", "3", "4", "5")


@pytest.mark.skipif(not LAMP.is_dir(), reason="needs ../shared/data/lamp_style")
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"LaMP_7"}))
@pytest.mark.parametrize("part", ["dev", "train"])
def test_every_input_of_the_real_files_round_trips(name: str, part: str) -> None:
    records = json.loads((LAMP / name / part / f"{part}_questions.json").read_text())
    for record in records:
        fields = TASKS[name].parse_input(record["input"])
        assert TASKS[name].render_input(fields) == record["input"]
