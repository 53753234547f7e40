"""A commit is there whole, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from fedoppu.common.commit import commit_file, commit_folder


def replace_with_a_failure(path: Path) -> None:
    with commit_folder(path) as folder:
        (folder / "a").write_text("new")
        (folder / "missing").read_text()


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "round") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "round").exists()
    assert (tmp_path / "round" / "a").read_text() == "1"


def test_an_exception_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "round") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_with_a_failure(tmp_path / "round")
    assert [path.name for path in tmp_path.iterdir()] == ["round"]
    assert (tmp_path / "round" / "a").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with commit_folder(tmp_path / "round") as folder:
            (folder / name).write_text(name)
    assert [path.name for path in (tmp_path / "round").iterdir()] == ["b"]


def test_left_over_temporary_folders_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".round.tmp").mkdir()
    (tmp_path / ".round.tmp" / "junk").write_text("")
    with commit_folder(tmp_path / "round") as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in (tmp_path / "round").iterdir()] == ["a"]


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    commit_file(tmp_path / "deep" / "table.json", b"{}")
    assert (tmp_path / "deep" / "table.json").read_bytes() == b"{}"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system tells it: without a name."""
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as told:
        commit_file(tmp_path / "table.json", b"{}")
    assert told.value.filename == str(tmp_path / "table.json")
    with pytest.raises(OSError, match="No space left") as told, commit_folder(tmp_path / "round"):
        pass
    assert told.value.filename == str(tmp_path / "round")
    assert list(tmp_path.iterdir()) == []
