"""LaMP's and OPPU's files: what is read, and what is refused with its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedoppu.client.importers.lamp import (
    detect_tasks,
    read_lamp,
    read_oppu,
    read_questions,
)
from fedoppu.client.tasks import TASKS
from fedoppu.common.errors import DataError, UsageError

LAMP = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "lamp_style"
Records = list[dict[str, Any]]


def review(id: str, **changes: Any) -> dict[str, Any]:
    return {"id": id, "text": f"text {id}", "score": "5"} | changes


def question(id: str, *profile: dict[str, Any], **changes: Any) -> dict[str, Any]:
    text = TASKS["LaMP_3"].render_input({"text": f"asked {id}"})
    return {"id": id, "input": text, "profile": list(profile)} | changes


def write(folder: Path, records: object, golds: object = None, *, part: str = "dev") -> None:
    """Writes a part of a data set; without golds each record has the gold "3"."""
    folder = folder / part
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}_questions.json").write_text(json.dumps(records))
    if golds is None:
        assert isinstance(records, list)
        answers = [{"id": record["id"], "output": "3"} for record in records]
        golds = {"task": "LaMP_3", "golds": answers}
    (folder / f"{part}_outputs.json").write_text(json.dumps(golds))


def read(folder: Path) -> Any:
    part = folder / "dev"
    return read_questions(part / "dev_questions.json", part / "dev_outputs.json", task="LaMP_3")


def test_a_record_becomes_a_user(tmp_path: Path) -> None:
    write(tmp_path, [question("7", review("a"), review("b", category="Music"), user_id="u")])
    (user,) = read(tmp_path)
    assert (user.user_id, user.task) == ("u", "LaMP_3")
    assert [(item.id, item.kind, item.time) for item in user.history] == [
        ("a", "LaMP_3", ""),
        ("b", "LaMP_3", ""),
    ]
    assert user.history[1].fields == {"text": "text b", "score": "5", "category": "Music"}
    (query,) = user.queries
    assert (query.id, query.kind, query.fields["gold"]) == ("7", "query", "3")
    assert TASKS["LaMP_3"].parse_input(query.fields["input"]) == {"text": "asked 7"}


def test_a_record_without_user_id_is_a_user_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, [question("7"), question("8")])
    assert [user.user_id for user in read(tmp_path)] == ["7", "8"]


def test_numbers_become_strings(tmp_path: Path) -> None:
    record = question("7", review("1", score=5.0) | {"id": 1}, review("2", score=4), user_id=12)
    golds = {"task": "LaMP_3", "golds": [{"id": 7, "output": 3}]}
    write(tmp_path, [record | {"id": 7}], golds)
    (user,) = read(tmp_path)
    assert (user.user_id, user.queries[0].id, user.queries[0].fields["gold"]) == ("12", "7", "3")
    assert [(item.id, item.fields["score"]) for item in user.history] == [("1", "5"), ("2", "4")]


def test_history_is_sorted_by_date_and_ties_keep_the_files_order(tmp_path: Path) -> None:
    dates = ["2011-10-2", "2011-9-30", "2011-09-30", 2010]
    items = [review(str(n), date=date) for n, date in enumerate(dates)]
    write(tmp_path, [question("7", *items)])
    (user,) = read(tmp_path)
    assert [(item.id, item.time) for item in user.history] == [
        ("3", "2010"),
        ("1", "2011-09-30"),
        ("2", "2011-09-30"),
        ("0", "2011-10-02"),
    ]
    assert "date" not in user.history[0].fields


def test_without_dates_the_files_order_is_kept(tmp_path: Path) -> None:
    write(tmp_path, [question("7", review("b"), review("a"), review("c"))])
    assert [item.id for item in read(tmp_path)[0].history] == ["b", "a", "c"]


def test_an_empty_history_is_a_history(tmp_path: Path) -> None:
    write(tmp_path, [question("7")])
    assert read(tmp_path)[0].history == ()


def test_records_of_one_user_become_queries_after_one_history(tmp_path: Path) -> None:
    early, middle = review("a", date="2001"), review("b", date="2002")
    # The answer to the first question is in the history of the second.
    answered = review("c", text="asked 1", date="2003")
    write(
        tmp_path,
        [
            question("2", early, middle, answered, user_id="u"),
            question("9", user_id="v"),
            question("1", early, middle, user_id="u"),
        ],
    )
    first, second = read(tmp_path)
    assert (first.user_id, second.user_id) == ("u", "v")
    assert [item.id for item in first.history] == ["a", "b"]
    assert [query.id for query in first.queries] == ["1", "2"]


def test_without_dates_the_history_without_any_query_is_taken(tmp_path: Path) -> None:
    window = [review("x"), review("y")]
    answered = [review("y"), review("c", text="asked 1")]
    write(tmp_path, [question("2", *answered, user_id="u"), question("1", *window, user_id="u")])
    (user,) = read(tmp_path)
    assert [item.id for item in user.history] == ["x", "y"]


def test_a_query_whose_id_an_item_has_is_renamed(tmp_path: Path) -> None:
    write(tmp_path, [question("7", review("7"))])
    assert read(tmp_path)[0].queries[0].id == "query 7"


def change_item(**changes: Any) -> Callable[[Records], None]:
    return lambda records: records[1]["profile"][0].update(changes)


def change_record(**changes: Any) -> Callable[[Records], None]:
    return lambda records: records[1].update(changes)


def drop(name: str) -> Callable[[Records], None]:
    return lambda records: records[1]["profile"][0].pop(name)


def test_records_that_are_not_changed_are_read(tmp_path: Path) -> None:
    write(tmp_path, [question("5"), question("7", review("a"))])
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("text"), "profile 0: id a: field text: is missing"),
        (drop("id"), "profile 0: field id: is missing"),
        (change_item(text=None), "profile 0: id a: field text: must be text, got NoneType"),
        (change_item(text=["x"]), "profile 0: id a: field text: must be text, got list"),
        (change_item(text=True), "profile 0: id a: field text: must be text, got bool"),
        (change_item(text=float("1e999")), "not JSON: Infinity is no number"),
        (change_item(score="6"), "profile 0: id a: LaMP_3: an answer must be one of 1, 2"),
        (change_item(score=""), "profile 0: id a: LaMP_3: an item needs a score"),
        (change_item(date="1 May"), "id a: field date: must be numbers with dashes, got '1 May'"),
        (change_record(profile=None), "field profile: must be a list, got NoneType"),
        (change_record(profile=["x"]), "profile 0: must be an object"),
        (
            change_record(profile=[review("a"), review("a")]),
            "profile item with id a is there twice",
        ),
        (
            change_record(profile=[review("a", date="2001"), review("b")]),
            "1 of 2 profile items have no date",
        ),
        (change_record(input="Hello"), "LaMP_3: an input must begin with 'What is the score"),
        (change_record(input=3), "LaMP_3: an input must begin with"),
        (change_record(user_id=None), "field user_id: must be text, got NoneType"),
        (change_record(id="6"), "dev_outputs.json has no output for it"),
        (change_record(id="5"), "dev_outputs.json has no output for it, or it is there twice"),
    ],
)
def test_a_malformed_record_is_refused_with_its_place(
    tmp_path: Path, change: Callable[[Records], None], message: str
) -> None:
    records = [question("5"), question("7", review("a"))]
    golds = {"task": "LaMP_3", "golds": [{"id": r["id"], "output": "3"} for r in records]}
    change(records)
    write(tmp_path, records, golds)
    with pytest.raises(DataError, match=r"dev_questions\.json: ") as error:
        read(tmp_path)
    assert message in str(error.value)
    assert "record 1 (id" in str(error.value) or "line 1" in str(error.value)


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    record = question("7")
    del record["profile"]
    write(tmp_path, [record])
    with pytest.raises(DataError, match=r"record 0 \(id 7\): field profile: .* got nothing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("golds", "message"),
    [
        ([], "must hold an object, got a list"),
        ({"golds": []}, "task must be one of LaMP_1.*got 'None'"),
        ({"task": "LaMP_6", "golds": []}, "task must be one of LaMP_1.*got 'LaMP_6'"),
        ({"task": "LaMP_5", "golds": []}, "holds LaMP_5, not LaMP_3"),
        ({"task": "LaMP_2", "golds": []}, "holds LaMP_2N or LaMP_2M, not LaMP_3"),
        ({"task": "LaMP_3"}, "outputs: field golds: must be a list, got nothing"),
        ({"task": "LaMP_3", "golds": [1]}, "gold 0: must be an object"),
        ({"task": "LaMP_3", "golds": [{"id": "7"}]}, "gold 0: field output: is missing"),
        ({"task": "LaMP_3", "golds": [{"id": "7", "output": "3"}] * 2}, "id 7 is there twice"),
        (
            {"task": "LaMP_3", "golds": [{"id": i, "output": "3"} for i in "789"]},
            "2 outputs have no question in dev_questions.json, the first has id 8",
        ),
        (
            {"task": "LaMP_3", "golds": [{"id": "7", "output": "9"}]},
            "one of 1, 2, 3, 4, 5, got '9'",
        ),
    ],
)
def test_outputs_that_do_not_match_are_refused(tmp_path: Path, golds: object, message: str) -> None:
    write(tmp_path, [question("7")], golds)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_the_task_is_read_from_the_outputs(tmp_path: Path) -> None:
    write(tmp_path, [question("7")])
    assert detect_tasks(tmp_path / "dev" / "dev_outputs.json") == ("LaMP_3",)
    write(tmp_path, [], {"task": "LaMP_2", "golds": []})
    assert detect_tasks(tmp_path / "dev" / "dev_outputs.json") == ("LaMP_2N", "LaMP_2M")


def test_lamps_own_name_for_both_second_tasks_is_accepted(tmp_path: Path) -> None:
    task = TASKS["LaMP_2M"]
    record = {"id": "1", "input": task.render_input({"description": "d"}), "profile": []}
    golds = {"task": "LaMP_2", "golds": [{"id": "1", "output": "action"}]}
    write(tmp_path, [record], golds)
    write(tmp_path, [], {"task": "LaMP_2", "golds": []}, part="train")
    assert read_lamp(tmp_path, "LaMP_2M").target[0].user_id == "1"
    with pytest.raises(DataError, match="LaMP_2N: an input"):
        read_lamp(tmp_path, "LaMP_2N")


def test_lamps_damaged_record_is_left_out_and_listed(tmp_path: Path) -> None:
    task = TASKS["LaMP_2M"]
    good = {"id": "1", "input": task.render_input({"description": "d"}), "profile": []}
    bad = {"id": "110", "input": "torn", "profile": []}
    golds = {"task": "LaMP_2M", "golds": [{"id": i, "output": "action"} for i in ("1", "110")]}
    write(tmp_path, [good, bad], golds)
    write(tmp_path, [], {"task": "LaMP_2M", "golds": []}, part="train")
    data = read_lamp(tmp_path, "LaMP_2M")
    assert [user.user_id for user in data.target] == ["1"]
    (line,) = data.left_out
    assert "record 1 (id 110): LaMP_2M: an input must begin with" in line


def test_a_damaged_record_of_another_id_is_refused(tmp_path: Path) -> None:
    bad = {"id": "111", "input": "torn", "profile": []}
    write(tmp_path, [bad], {"task": "LaMP_2M", "golds": [{"id": "111", "output": "action"}]})
    write(tmp_path, [], {"task": "LaMP_2M", "golds": []}, part="train")
    with pytest.raises(DataError, match="LaMP_2M: an input must begin with"):
        read_lamp(tmp_path, "LaMP_2M")


@pytest.mark.parametrize("nested", [True, False])
def test_a_folder_has_target_and_base_users(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "LaMP_3" if nested else tmp_path
    write(folder, [question("1"), question("2")])
    write(folder, [question("3")], part="train")
    data = read_lamp(tmp_path, "LaMP_3")
    assert [user.user_id for user in data.target] == ["1", "2"]
    assert [user.user_id for user in data.base] == ["3"]
    assert data.left_out == ()


def test_a_limit_reads_the_first_records_only(tmp_path: Path) -> None:
    write(tmp_path, [question("1"), question("2")])
    write(tmp_path, [question("3")], part="train")
    path = tmp_path / "dev" / "dev_questions.json"
    path.write_text(path.read_text()[:-30])  # what is not read cannot be malformed
    assert len(read_lamp(tmp_path, "LaMP_3", limit=1).target) == 1


def test_what_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file or folder .*nowhere"):
        read_lamp(tmp_path / "nowhere", "LaMP_3")
    with pytest.raises(UsageError, match="holds neither dev/ and train/, nor a folder LaMP_3"):
        read_lamp(tmp_path, "LaMP_3")
    with pytest.raises(UsageError, match="task must be one of"):
        read_lamp(tmp_path, "LaMP_6")
    for part in ("dev", "train"):
        (tmp_path / part).mkdir()
    with pytest.raises(UsageError, match=r"there is no file .*dev_outputs\.json"):
        read_lamp(tmp_path, "LaMP_3")
    write(tmp_path, [])
    (tmp_path / "dev" / "dev_questions.json").unlink()
    with pytest.raises(UsageError, match=r"there is no file .*dev_questions\.json"):
        read_lamp(tmp_path, "LaMP_3")


def oppu_user(name: str, *asked: dict[str, Any]) -> dict[str, Any]:
    return {"user_id": name, "profile": [review("a", date="2001")], "query": list(asked)}


def asked(id: str, **changes: Any) -> dict[str, Any]:
    text = TASKS["LaMP_3"].render_input({"text": f"asked {id}"})
    return {"id": id, "input": text} | changes


def labels(**golds: str) -> str:
    pairs = [{"id": id, "output": gold} for id, gold in golds.items()]
    return json.dumps({"task": "LaMP_3", "golds": pairs})


def test_oppus_layout_is_read(tmp_path: Path) -> None:
    file = tmp_path / "users.json"
    file.write_text(json.dumps([oppu_user("u", asked("1", gold="4"), asked("2", gold=5))]))
    data = read_lamp(file, "LaMP_3")
    (user,) = data.target
    assert data.base == ()
    assert [query.fields["gold"] for query in user.queries] == ["4", "5"]
    assert [item.id for item in user.history] == ["a"]


def test_oppus_labels_may_be_apart_and_two_files_are_target_and_base(tmp_path: Path) -> None:
    longest = tmp_path / "user_top_100_history.json"
    longest.write_text(json.dumps([oppu_user("u", asked("1"), asked("2", gold="2"))]))
    (tmp_path / "user_top_100_history_label.json").write_text(labels(**{"1": "1", "2": "2"}))
    (tmp_path / "user_others.json").write_text(
        json.dumps([oppu_user("v", asked("1", gold="5")), oppu_user("w")])
    )
    data = read_lamp(tmp_path, "LaMP_3")
    assert [query.fields["gold"] for query in data.target[0].queries] == ["1", "2"]
    assert [user.user_id for user in data.base] == ["v", "w"]


@pytest.mark.parametrize(
    ("users", "golds", "message"),
    [
        ([oppu_user("u", asked("1"))], None, "query 0: field gold: is missing"),
        ([oppu_user("u", asked("1"))], labels(x="1"), "has no output for it"),
        ([oppu_user("u")], labels(x="1"), "1 outputs have no question in users.json"),
        ([oppu_user("u", asked("1", gold="2"))], labels(**{"1": "1"}), "gold: differs"),
        ([oppu_user("u"), oppu_user("u")], None, "the user with id u is there twice"),
        (
            [oppu_user("u", asked("1", gold="1"), asked("1", gold="1"))],
            None,
            "the query with id 1 is there twice",
        ),
        ([{"user_id": "u", "profile": []}], None, "field query: must be a list, got nothing"),
        ([oppu_user("u", "x")], None, "query 0: must be an object"),  # type: ignore[arg-type]
        (
            [{"profile": [], "query": []}],
            None,
            r"record 0 \(id missing\): field user_id: is missing",
        ),
    ],
)
def test_a_malformed_file_of_oppu_is_refused(
    tmp_path: Path, users: Records, golds: str | None, message: str
) -> None:
    file = tmp_path / "users.json"
    file.write_text(json.dumps(users))
    if golds:
        (tmp_path / "users_label.json").write_text(golds)
    with pytest.raises(DataError, match=message):
        read_oppu(file, task="LaMP_3")


@pytest.mark.skipif(not LAMP.is_dir(), reason="needs ../shared/data/lamp_style")
@pytest.mark.parametrize(
    ("name", "target", "queries", "base"),
    [
        ("LaMP_1", 30, 61, 98),
        ("LaMP_2M", 28, 28, 86),
        ("LaMP_2N", 22, 22, 68),
        ("LaMP_3", 56, 56, 915),
        ("LaMP_4", 31, 31, 101),
        ("LaMP_5", 55, 55, 224),
    ],
)
def test_the_real_files_are_read(name: str, target: int, queries: int, base: int) -> None:
    data = read_lamp(LAMP, name)
    assert (len(data.target), len(data.base), data.left_out) == (target, base, ())
    assert sum(len(user.queries) for user in data.target) == queries
    for user in (*data.target, *data.base):
        times = [item.time for item in user.history]
        assert times == sorted(times)
        assert user.history
        asked_for = {
            TASKS[name].parse_input(query.fields["input"])[TASKS[name].text]
            for query in user.queries
        }
        if len(user.queries) > 1:
            assert asked_for.isdisjoint(item.fields[TASKS[name].text] for item in user.history)
