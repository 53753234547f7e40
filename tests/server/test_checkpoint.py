"""Rounds are there whole or not at all, and nothing else is taken for one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedoppu.common.adapters import Adapter
from fedoppu.common.errors import DataError, UsageError
from fedoppu.common.privacy import PrivacySpent
from fedoppu.common.shared_adapter import initial_shared
from fedoppu.server.checkpoint import (
    AttemptLog,
    AttemptState,
    CheckpointStore,
    MemoryAttempts,
    RoundCheckpoint,
)
from fedoppu.server.metrics import RoundRecord, RoundTiming
from tests.fake_federation import SPEC

INITIAL = initial_shared(SPEC, 7)


def checkpoint(number: int, adapter: Adapter = INITIAL) -> RoundCheckpoint:
    record = RoundRecord(
        round=number,
        attempt=1,
        cohort=(1, 4, 5),
        survivors=(1, 5),
        drops={"train.masked": (4,)},
        bytes_up=10,
        bytes_down=20,
        held_out_loss=1.25,
        held_out_clients=2,
        weight=7,
        update_norm=0.5,
        clipped_share=0.0,
        clip=10.0,
        value_range=0.5,
        next_range=0.25,
        model_hash=adapter.digest(),
        liars={4: "sent one key twice"},
        aborted=("round 1 attempt 0 ended",),
    )
    return RoundCheckpoint("ab" * 16, "cd" * 32, adapter, record)


def store(folder: Path, config_hash: str = "cd" * 32) -> CheckpointStore:
    return CheckpointStore(folder, INITIAL, config_hash)


def test_committed_round_comes_back_as_it_was(tmp_path: Path) -> None:
    moved = replace(INITIAL, tensors={n: t + 1 for n, t in INITIAL.tensors.items()})
    saved = checkpoint(2, moved)
    store(tmp_path).commit(checkpoint(1))
    store(tmp_path).commit(saved)
    latest = store(tmp_path).latest()
    assert latest is not None
    assert (latest.run_id, latest.record) == (saved.run_id, saved.record)
    assert latest.adapter.digest() == moved.digest()
    assert store(tmp_path).rounds() == (1, 2)


def test_no_round_is_none(tmp_path: Path) -> None:
    assert store(tmp_path).latest() is None


def test_commit_that_was_cut_short_is_not_there(tmp_path: Path) -> None:
    (tmp_path / ".0003.tmp").mkdir(parents=True)
    (tmp_path / ".0003.tmp" / "shared.npy").write_bytes(b"half")
    (tmp_path / "0002").mkdir()
    assert store(tmp_path).latest() is None


def test_round_of_another_config_is_refused(tmp_path: Path) -> None:
    store(tmp_path).commit(checkpoint(1))
    with pytest.raises(UsageError, match="belongs to a federation with another configuration"):
        store(tmp_path, "ef" * 32).latest()


@pytest.mark.parametrize("name", ["round.json", "shared.npy"])
def test_damaged_round_is_refused(tmp_path: Path, name: str) -> None:
    store(tmp_path).commit(checkpoint(1))
    file = tmp_path / "0001" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="is not a committed round"):
        store(tmp_path).latest()


def test_changed_vector_is_refused(tmp_path: Path) -> None:
    store(tmp_path).commit(checkpoint(1))
    file = tmp_path / "0001" / "shared.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="its digest is not that of its record"):
        store(tmp_path).latest()


def test_record_is_plain_and_counts_members_once() -> None:
    record = replace(checkpoint(1).record, drops={"train.masked": (4,), "query.unmask": (4, 5)})
    data = json.loads(json.dumps(record.as_data()))
    assert data["kind"] == "round"
    assert data["dropped"] == 2
    assert RoundRecord.from_data(data) == record


SPENT = PrivacySpent(3, 1e-5, 2.5, math.inf, "add_remove", 4.0)


def test_record_without_a_mechanism_says_nothing_of_privacy() -> None:
    assert "privacy" not in checkpoint(1).record.as_data()


@pytest.mark.parametrize("server", [math.inf, 7.5])
def test_what_was_spent_is_plain_and_comes_back(server: float) -> None:
    record = replace(checkpoint(1).record, privacy=replace(SPENT, server=server))
    text = json.dumps(record.as_data(), allow_nan=False)
    assert json.loads(text)["privacy"]["server"] == (None if server == math.inf else server)
    assert RoundRecord.from_data(json.loads(text)) == record


def test_published_record_neither_names_nor_counts_members() -> None:
    record = replace(checkpoint(1).record, privacy=SPENT)
    published = record.published()
    data = json.loads(json.dumps(published.as_data()))
    counted = ("cohort", "survivors", "drops", "dropped", "liars", "aborted", "attempt")
    assert [data[name] for name in (*counted, "bytes_up", "bytes_down")] == [None] * 9
    assert data["privacy"]["rounds"] == 3
    assert published.dropped is None
    assert RoundRecord.from_data(data) == published


def test_private_record_is_whole_and_for_the_operator_alone(tmp_path: Path) -> None:
    record = replace(checkpoint(1).record, privacy=SPENT)
    store(tmp_path).keep_private(record)
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0
    data = json.loads((tmp_path / "private" / "0001.json").read_bytes())
    assert RoundRecord.from_data(data) == record
    assert store(tmp_path).rounds() == ()


def test_timing_has_a_row_for_each_stage() -> None:
    timing = RoundTiming(3, ((0, "query.keys", 0.5), (1, "query.keys", 0.25)))
    assert timing.as_data()["stages"][1] == {"attempt": 1, "stage": "query.keys", "seconds": 0.25}


ATTEMPT = AttemptState("ab" * 16, 3, 1, (1, 2), sitting_out=(4,), asked=(1,), machine=b"\x00sum")


def test_attempt_is_remembered(tmp_path: Path) -> None:
    log = AttemptLog(tmp_path)
    assert log.load() is None
    log.save(ATTEMPT)
    assert AttemptLog(tmp_path).load() == ATTEMPT
    log.save(replace(ATTEMPT, machine=b""))
    assert b"c3Vt" not in (tmp_path / "attempt.json").read_bytes()


def test_attempt_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    AttemptLog(tmp_path).save(ATTEMPT)
    (tmp_path / "attempt.json").write_text("{}")
    with pytest.raises(DataError, match="without it a round could be answered twice"):
        AttemptLog(tmp_path).load()


def test_memory_of_a_simulation_ends_with_its_process() -> None:
    attempts = MemoryAttempts()
    assert attempts.load() is None
    attempts.save(ATTEMPT)
    assert attempts.load() == ATTEMPT


def test_vector_is_a_file_that_numpy_reads(tmp_path: Path) -> None:
    store(tmp_path).commit(checkpoint(1))
    vector = np.load(tmp_path / "0001" / "shared.npy")
    assert vector.shape == (SPEC.num_params(),)
