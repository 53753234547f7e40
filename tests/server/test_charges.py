"""The server's charges are durable, counted once, and missed when they are lost."""

from pathlib import Path

import pytest

from fedoppu.common.errors import DataError
from fedoppu.server.charges import CHARGES, Charge, ChargeLedger

FIRST, AGAIN, SECOND = (Charge("ab" * 16, *at, 8) for at in ((1, 0), (1, 1), (2, 0)))


def test_charges_are_there_for_the_next_process(tmp_path: Path) -> None:
    found = ChargeLedger(tmp_path).all(committed=0)
    for charge in (FIRST, AGAIN, SECOND):
        found = ChargeLedger(tmp_path).add(charge, found)
    assert found == ChargeLedger(tmp_path).all(committed=2) == (FIRST, AGAIN, SECOND)


def test_repeated_charge_changes_nothing(tmp_path: Path) -> None:
    ledger = ChargeLedger(tmp_path)
    found = ledger.add(FIRST, ())
    before = (tmp_path / CHARGES).read_bytes()
    assert ledger.add(FIRST, found) == (FIRST,)
    assert (tmp_path / CHARGES).read_bytes() == before


def test_fewer_rounds_than_were_committed_stop_the_run(tmp_path: Path) -> None:
    ledger = ChargeLedger(tmp_path)
    ledger.add(AGAIN, ledger.add(FIRST, ()))
    with pytest.raises(DataError, match="lacks some of the 2 committed rounds"):
        ledger.all(committed=2)


@pytest.mark.parametrize("text", ["", "{", '[{"round": 1}]', "[3]"])
def test_malformed_file_is_no_empty_ledger(tmp_path: Path, text: str) -> None:
    (tmp_path / CHARGES).write_text(text)
    with pytest.raises(DataError, match="the privacy budget could be exceeded"):
        ChargeLedger(tmp_path).all(committed=0)
