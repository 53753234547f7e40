"""Finished groups are not worked on again, and read back as they were."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedoppu.common.errors import ClientFailed, DataError
from fedoppu.simulations.ledger import Ledger

GROUPS = [("a", "b"), ("c", "d"), ("e",)]


class Here:
    """Works at once, and notes on what; fails at one group."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.seen: list[int] = []
        self.fails_at = fails_at

    def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
        for group in groups:
            if group == self.fails_at:
                raise ClientFailed("a worker process died")
            self.seen.append(group)
            yield work(None, group)


def third(worker: Any, group: int) -> float:
    return group / 3


def finish(ledger: Ledger, executor: Here) -> list[int]:
    return list(ledger.finish(executor, third, reference=lambda n: n, record=lambda r: [r]))


def test_every_group_is_worked_on_once_in_order_and_read_back_exactly(tmp_path: Path) -> None:
    ledger, executor = Ledger(tmp_path, GROUPS), Here()
    assert finish(ledger, executor) == executor.seen == [0, 1, 2]
    assert list(ledger.records()) == [[0 / 3], [1 / 3], [2 / 3]]
    assert ledger.missing() == []


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_after_a_failure_only_the_missing_groups_are_worked_on(
    tmp_path: Path, fails_at: int
) -> None:
    ledger, again = Ledger(tmp_path, GROUPS), Here()
    with pytest.raises(ClientFailed):
        finish(ledger, Here(fails_at=fails_at))
    assert ledger.missing() == list(range(fails_at, 3))
    assert finish(ledger, again) == again.seen == list(range(fails_at, 3))


def test_a_group_counts_when_it_is_yielded_not_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, GROUPS)
    steps = ledger.finish(Here(), third, reference=lambda n: n, record=lambda r: r)
    assert ledger.missing() == [0, 1, 2]
    assert next(steps) == 0
    assert ledger.missing() == [1, 2]


def test_references_are_made_when_their_turn_comes(tmp_path: Path) -> None:
    made: list[int] = []

    def reference(number: int) -> int:
        made.append(number)
        return number

    steps = Ledger(tmp_path, GROUPS).finish(Here(), third, reference=reference, record=lambda r: r)
    next(steps)
    assert made == [0]


def test_a_half_written_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".00001.json.tmp").write_text("[")
    assert Ledger(tmp_path, GROUPS).missing() == [0, 1, 2]


def test_no_groups_are_no_work(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, [])
    assert finish(ledger, Here()) == list(ledger.records()) == []


@pytest.mark.parametrize("content", ["", "[1]", "{}", json.dumps({"users": ["x"], "record": 1})])
def test_a_changed_file_is_named_with_a_remedy(tmp_path: Path, content: str) -> None:
    ledger = Ledger(tmp_path, GROUPS)
    finish(ledger, Here())
    (tmp_path / "00001.json").write_text(content)
    with pytest.raises(DataError, match=r"00001\.json is") as told:
        list(ledger.records())
    assert "delete the file and resume" in told.value.hint
