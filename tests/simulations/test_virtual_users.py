"""Virtual users: one file, an index, and a vault for each that keeps the vaults' contract."""

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fedoppu.client.importers.lamp import LampUser
from fedoppu.client.vault import QUERY, HistoryItem, Vault
from fedoppu.common.errors import DataError
from fedoppu.simulations.virtual_users import FileOutbox, MemoryOutbox, VirtualUsers, write_users
from tests.client.vault_contract import ITEMS, check_vault


def user(name: str, items: Sequence[HistoryItem] = ITEMS) -> LampUser:
    history = tuple(item for item in items if item.kind != QUERY)
    queries = tuple(item for item in items if item.kind == QUERY)
    return LampUser(name, "LaMP_3", history, queries)


@pytest.mark.parametrize("in_files", [False, True])
def test_virtual_vaults_keep_the_contract(tmp_path: Path, in_files: bool) -> None:
    def open_vault(folder: Path, items: Sequence[HistoryItem]) -> Vault:
        if not folder.exists():
            write_users(folder, [user("t")], [user("u/1 é", items)])
        return VirtualUsers(folder, base_name="pocket", state_in_files=in_files).vault("u/1 é")

    check_vault(open_vault, tmp_path)


def test_state_in_files_outlives_its_process(tmp_path: Path) -> None:
    write_users(tmp_path, [], [user("u")])
    VirtualUsers(tmp_path, state_in_files=True).vault("u").state.put("round", b"3")
    assert VirtualUsers(tmp_path, state_in_files=True).vault("u").state.get("round") == b"3"
    assert VirtualUsers(tmp_path).vault("u").state.get("round") is None


def test_roles_and_their_order_are_kept(tmp_path: Path) -> None:
    write_users(tmp_path, [user("t2"), user("t1")], [user("b"), user("a")])
    users = VirtualUsers(tmp_path)
    assert users.target == ("t2", "t1")
    assert users.base == ("b", "a")
    assert users.vault("a").user_id == "a"


def test_user_that_appears_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="user u appears twice"):
        write_users(tmp_path, [user("u")], [user("u")])
    with pytest.raises(DataError, match=r"holds no users: it has no users\.index\.json"):
        VirtualUsers(tmp_path)


def test_unknown_user_is_named(tmp_path: Path) -> None:
    write_users(tmp_path, [], [user("u")])
    with pytest.raises(DataError, match="has no user v"):
        VirtualUsers(tmp_path).vault("v")


@pytest.mark.parametrize("content", ["[]", "{", '{"target": [], "base": [["u", "x", 1]]}'])
def test_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    write_users(tmp_path, [], [user("u")])
    (tmp_path / "users.index.json").write_text(content)
    with pytest.raises(DataError, match="is malformed"):
        VirtualUsers(tmp_path)


def test_users_changed_after_their_index_are_refused(tmp_path: Path) -> None:
    write_users(tmp_path, [], [user("u"), user("v")])
    users = VirtualUsers(tmp_path)
    lines = (tmp_path / "users.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "users.jsonl").write_bytes(b"".join(reversed(lines)))
    with pytest.raises(DataError, match="user u is not where"):
        users.vault("u").history()


def test_memory_stays_flat_whatever_the_histories_hold(tmp_path: Path) -> None:
    def many() -> Iterator[LampUser]:
        for number in range(300):
            text = f"{number} " + "words " * 2000
            items = [HistoryItem(str(i), "", "test", "LaMP_3", {"text": text}) for i in range(10)]
            yield user(f"u{number}", items)

    write_users(tmp_path, [], many())
    size = (tmp_path / "users.jsonl").stat().st_size
    tracemalloc.start()
    users = VirtualUsers(tmp_path)
    for name in users.base:
        assert len(users.vault(name).history()) == 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 30e6
    assert peak < 3e6


def test_outboxes_are_chains_that_show_a_removed_record(tmp_path: Path) -> None:
    outboxes = (MemoryOutbox(), FileOutbox(tmp_path / "a" / "outbox.jsonl"))
    for outbox in outboxes:
        for number in range(3):
            outbox.append("query.keys", number, bytes([number]) * 32)
        first, second, third = outbox.sent
        assert first.previous == ""
        assert (second.previous, third.previous) == (first.chained(), second.chained())
        assert third.previous != first.chained()
    assert outboxes[0].sent == outboxes[1].sent
    assert json.loads((tmp_path / "a" / "outbox.jsonl").read_text().splitlines()[2])["size"] == 2
