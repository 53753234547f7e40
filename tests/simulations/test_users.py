"""Users get into a folder once, from a generator or from LaMP's files, and the folder vouches for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedoppu.client.vault import QUERY
from fedoppu.common.config import load_run_config
from fedoppu.common.errors import DataError, UsageError
from fedoppu.simulations import users as users_module
from fedoppu.simulations.users import FACTS, history_lengths, prepare_users
from fedoppu.simulations.virtual_users import VirtualUsers

GENERATED = load_run_config(["users=3", "base_users=4", "queries=2"])
ASKED = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
    "or 5 without further explanation. review: {}"
)


def question(id: str, text: str, *history: str) -> dict[str, Any]:
    items = [{"id": f"{id}{n}", "text": each, "score": "4"} for n, each in enumerate(history)]
    return {"id": id, "input": ASKED.format(text), "profile": items}


def write_part(folder: Path, part: str, questions: Sequence[dict[str, Any]]) -> None:
    golds = [{"id": one["id"], "output": "2"} for one in questions]
    (folder / part).mkdir(parents=True)
    (folder / part / f"{part}_questions.json").write_text(json.dumps(questions))
    (folder / part / f"{part}_outputs.json").write_text(
        json.dumps({"task": "LaMP_3", "golds": golds})
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three target users and three base users, who share some texts."""
    folder = tmp_path / "data"
    dev = [
        question("1", "seen in a history", "a", "b"),
        question("2", "seen in a query", "c"),
        question("3", "seen nowhere", "d", "e", "f"),
    ]
    train = [
        question("11", "seen  in a query", "g", "h"),
        question("12", "i", "seen in a history"),
        question("13", "j", "k"),
    ]
    write_part(folder, "dev", dev)
    write_part(folder, "train", train)
    return folder


def test_generated_users_are_a_function_of_settings_and_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_users(GENERATED, task="LaMP_3", seed=seed, folder=tmp_path / name)
    files = [(tmp_path / name / "users.jsonl").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_generated_users_have_an_oracle_for_every_query(tmp_path: Path) -> None:
    users = prepare_users(GENERATED, task="LaMP_3", seed=1, folder=tmp_path)
    vaults = VirtualUsers(tmp_path)
    assert (len(users.target), len(users.base)) == (3, 4)
    assert users.oracle is not None
    for user in users.target[::-1]:
        asked = {item.id for item in vaults.vault(user).history() if item.kind == QUERY}
        assert len(asked) == 2
        assert users.oracle.answers(user).keys() == asked
    assert users.recalled is None


def test_lengths_count_the_items_and_not_the_queries(tmp_path: Path, data: Path) -> None:
    users = prepare_users(load_run_config([f"data={data}"]), task="LaMP_3", seed=0, folder=tmp_path)
    assert history_lengths(users) == {"1": 2, "2": 1, "3": 3}


def test_users_that_are_there_are_not_made_again(tmp_path: Path, data: Path) -> None:
    run = load_run_config([f"data={data}"])
    first = prepare_users(run, task="LaMP_3", seed=0, folder=tmp_path / "users")
    (data / "dev" / "dev_questions.json").unlink()
    assert prepare_users(run, task="LaMP_3", seed=0, folder=tmp_path / "users") == first


def test_a_folder_without_facts_is_not_trusted(tmp_path: Path) -> None:
    first = prepare_users(GENERATED, task="LaMP_3", seed=1, folder=tmp_path)
    (tmp_path / FACTS).unlink()
    (tmp_path / "users.jsonl").write_text("half a line")
    assert prepare_users(GENERATED, task="LaMP_3", seed=1, folder=tmp_path) == first
    assert VirtualUsers(tmp_path).vault(first.target[0]).history()


def test_imported_users_come_from_dev_and_train_and_recall_is_counted(
    tmp_path: Path, data: Path
) -> None:
    run = load_run_config([f"data={data}", "users=3", "base_users=3"])
    users = prepare_users(run, task="LaMP_3", seed=0, folder=tmp_path / "users")
    assert (users.target, users.base) == (("1", "2", "3"), ("11", "12", "13"))
    assert (users.recalled, users.recalled_from_queries) == (1, 1)
    assert (users.oracle, users.notes) == (None, ())


def test_a_single_base_user_is_refused(tmp_path: Path, data: Path) -> None:
    one = [question("11", "a", "b")]
    (data / "train" / "train_questions.json").write_text(json.dumps(one))
    golds = {"task": "LaMP_3", "golds": [{"id": "11", "output": "2"}]}
    (data / "train" / "train_outputs.json").write_text(json.dumps(golds))
    run = load_run_config([f"data={data}"])
    with pytest.raises(DataError, match="has 1 base users with enough items, at least 2"):
        prepare_users(run, task="LaMP_3", seed=0, folder=tmp_path / "users")
    assert not (tmp_path / "users" / FACTS).exists()


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    run = load_run_config([f"data={tmp_path / 'nowhere'}"])
    with pytest.raises(UsageError, match="nowhere"):
        prepare_users(run, task="LaMP_3", seed=0, folder=tmp_path / "users")


def test_records_that_are_known_to_be_bad_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "LaMP_2N"
    asked = "Which category does this article relate to among the following categories? Just answer with the"
    good = {
        "input": f"{asked} category name without further explanation. categories: [travel, education, "
        "parents, style & beauty, entertainment, food & drink, science & technology, business, sports, "
        "healthy living, women, politics, crime, culture & arts, religion] article: a match",
        "profile": [{"id": "0", "title": "a", "text": "b", "category": "sports"}],
    }
    for part, ids in (("dev", ("109", "110")), ("train", ("1", "2"))):
        records = [good | {"id": id} for id in ids]
        if part == "dev":
            records[1] = records[1] | {"profile": [{"id": "0", "title": "a"}]}
        golds = [{"id": id, "output": "sports"} for id in ids]
        (folder / part).mkdir(parents=True)
        (folder / part / f"{part}_questions.json").write_text(json.dumps(records))
        text = json.dumps({"task": "LaMP_2", "golds": golds})
        (folder / part / f"{part}_outputs.json").write_text(text)
    run = load_run_config([f"data={tmp_path / 'data'}"])
    users = prepare_users(run, task="LaMP_2N", seed=0, folder=tmp_path / "users")
    assert users.target == ("109",)
    assert len(users.notes) == 1
    assert users.notes[0].startswith("left out, known to be bad: ")
    assert "(id 110)" in users.notes[0]


def test_of_a_huge_file_only_the_first_records_are_read(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users_module, "HUGE", 100)
    monkeypatch.setattr(users_module, "RECORDS_A_USER", 1)
    end = json.loads((data / "dev" / "dev_questions.json").read_text())
    end += [question("4", "never looked at") | {"profile": "broken"}]
    (data / "dev" / "dev_questions.json").write_text(json.dumps(end))
    run = load_run_config([f"data={data}", "users=1", "base_users=2"])
    users = prepare_users(run, task="LaMP_3", seed=0, folder=tmp_path / "users")
    assert (users.target, users.base) == (("1",), ("11", "12"))
    assert users.notes == ("a file is huge: only its first 3 records were read",)
