"""What holds a run, who may work on it, and what it may be resumed with."""

import json
import os
from pathlib import Path

import pytest

from fedoppu.common.config import load_run_config
from fedoppu.common.errors import UsageError
from fedoppu.simulations.run_folder import MARK, begin, held, is_finished, read_run, take_up

BEGUN = load_run_config(["users=3", "seed=4"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin(tmp_path / "run", BEGUN, "ab12")
    return tmp_path / "run"


def test_a_run_is_read_back_with_the_settings_that_it_began_with(folder: Path) -> None:
    assert read_run(folder) == (BEGUN, BEGUN)
    assert not is_finished(folder)


def test_only_where_the_groups_are_worked_on_may_differ(folder: Path) -> None:
    begun, place = read_run(folder, ["workers=7", "seed=4"])
    assert (begun, place.workers) == (BEGUN, 7)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=5", "seed"),
        ("group_users=2", "group_users"),
        ("personal.training.epochs=9", r"personal\.training\.epochs"),
        ("out=elsewhere", "out"),
        ("engine=flower", "engine"),
    ],
)
def test_what_could_change_a_result_is_refused_by_name(folder: Path, change: str, key: str) -> None:
    with pytest.raises(UsageError, match=f"was begun with another {key}: ") as told:
        read_run(folder, [change])
    assert "workers" in told.value.hint


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"there is no run in .*: it has no config\.yaml"):
            read_run(path)


@pytest.mark.parametrize(
    ("mark", "found"),
    [
        (None, r"left no run\.json"),
        ("[", r"left no run\.json"),
        (json.dumps({"format": 1, "fedoppu": "0.0.1"}), r"is of fedoppu 0\.0\.1, format 1"),
        (json.dumps({"format": 2, "fedoppu": "9"}), "is of fedoppu 9, format 2"),
    ],
)
def test_a_run_of_another_version_is_named(folder: Path, mark: str | None, found: str) -> None:
    (folder / MARK).unlink()
    if mark is not None:
        (folder / MARK).write_text(mark)
    with pytest.raises(UsageError, match=found):
        read_run(folder)


def test_a_changed_base_is_refused(folder: Path) -> None:
    take_up(folder, "ab12")
    with pytest.raises(UsageError, match="the base was changed since the run in"):
        take_up(folder, "cd34")


def test_what_was_half_written_is_cleared_away(folder: Path) -> None:
    (folder / "a" / ".u1.tmp").mkdir(parents=True)
    (folder / "a" / ".u1.tmp" / ".weights.tmp").write_text("half")
    (folder / "a" / ".u2.old").mkdir()
    (folder / ".table.json.tmp").write_text("half")
    (folder / "a" / "kept.json").write_text("whole")
    take_up(folder, "ab12")
    assert {path.name for path in folder.rglob("*")} == {"a", "kept.json", "config.yaml", MARK}


def test_a_folder_is_begun_once(folder: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already, which did not end") as told:
        begin(folder, BEGUN, "ab12")
    assert f"fedoppu simulate --resume {folder} goes on" in told.value.hint
    (folder / "report.html").write_text("")
    with pytest.raises(UsageError, match=r"holds a run already$"):
        begin(folder, BEGUN, "ab12")


def test_one_at_a_time_works_on_a_folder(tmp_path: Path) -> None:
    with (
        held(tmp_path),
        pytest.raises(UsageError, match="another process works on"),
        held(tmp_path),
    ):
        pytest.fail("two hold it")  # pragma: no cover
    with held(tmp_path):
        pass


def test_a_process_that_ends_hard_leaves_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        held(tmp_path).__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot be written to: Not a directory"),
        held(tmp_path / "file" / "run"),
    ):
        pytest.fail("it is held")  # pragma: no cover
