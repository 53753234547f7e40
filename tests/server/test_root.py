from pathlib import Path

import pytest

from fedoppu.common.errors import DataError
from fedoppu.server.root import server_root


def test_root_is_made_once_and_its_owner_alone_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "root"
    made = server_root(path)
    assert len(made.root) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert server_root(path) == made
    assert [file.name for file in tmp_path.iterdir()] == ["root"]


def test_two_servers_have_two_roots_and_neither_is_printed(tmp_path: Path) -> None:
    first, second = server_root(tmp_path / "a"), server_root(tmp_path / "b")
    assert first != second
    assert first.root.hex() not in repr(first)
    assert str(first.root) not in repr(first)


def test_root_of_another_process_that_was_quicker_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "root"
    first = server_root(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)
        assert server_root(path) == first
    assert [file.name for file in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_root_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "root"
    server_root(path)
    path.chmod(mode)
    with pytest.raises(DataError, match=f"mode {mode:o}") as told:
        server_root(path)
    assert "chmod 600" in (told.value.hint or "")


def test_cut_root_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "root"
    path.write_bytes(bytes(31))
    path.chmod(0o600)
    with pytest.raises(DataError, match="must hold 32 bytes, got 31"):
        server_root(path)
