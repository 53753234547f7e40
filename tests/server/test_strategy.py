"""The strategy as Flower sees it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fedoppu.common.errors import DataError, DeadlineExceeded, RoundAborted, UsageError
from fedoppu.server.app import build_server_app
from fedoppu.server.checkpoint import AttemptLog, AttemptState
from fedoppu.server.cohort import PoissonSampler
from fedoppu.server.directory import HelloDirectory
from fedoppu.server.secagg import SecAggServer
from fedoppu.server.strategy import OppuStrategy, to_arrays
from tests.fake_federation import CONFIG, federation, shown


def test_server_app_runs_all_rounds(tmp_path: Path) -> None:
    made = federation(tmp_path)
    context = Context(1, 1, {}, RecordDict(), {})
    build_server_app(made.runtime)(made.grid, context)
    assert made.runtime.checkpoints.rounds() == (1, 2)


def test_result_holds_the_last_adapter_and_what_was_evaluated(tmp_path: Path) -> None:
    made = federation(tmp_path)

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        return MetricRecord({"arrays": len(arrays)}) if number == 2 else None

    strategy = OppuStrategy(made.runtime)
    strategy.summary()
    initial = to_arrays(made.runtime.initial)
    result = strategy.start(made.grid, initial, num_rounds=2, evaluate_fn=evaluate)
    latest = made.runtime.checkpoints.latest()
    assert latest is not None
    np.testing.assert_array_equal(
        result.arrays["layer.q_proj.B"].numpy(), latest.adapter.tensors["layer.q_proj.B"]
    )
    assert dict(result.evaluate_metrics_serverapp[2]) == {"arrays": 4}
    assert 1 not in result.evaluate_metrics_serverapp


def test_run_that_is_complete_asks_nobody(tmp_path: Path) -> None:
    made = federation(tmp_path)
    made.run()
    again = federation(tmp_path, members=2)
    assert again.run().record.round == 2
    assert again.records == made.records


def test_foreign_arrays_are_refused(tmp_path: Path) -> None:
    made = federation(tmp_path)
    arrays = ArrayRecord({"other": Array(np.zeros(2, np.float32))})
    with pytest.raises(UsageError, match="are not the arrays of the runtime's initial adapter"):
        OppuStrategy(made.runtime).start(made.grid, arrays)


def test_flowers_single_exchanges_are_refused(tmp_path: Path) -> None:
    made = federation(tmp_path)
    strategy, arrays, config = OppuStrategy(made.runtime), ArrayRecord(), ConfigRecord()
    calls: list[Any] = [
        lambda: strategy.configure_train(1, arrays, config, made.grid),
        lambda: strategy.configure_evaluate(1, arrays, config, made.grid),
        lambda: strategy.aggregate_train(1, []),
        lambda: strategy.aggregate_evaluate(1, []),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="makes several exchanges a round"):
            call()


def test_members_that_never_come_end_the_run(tmp_path: Path) -> None:
    directory = HelloDirectory(range(9), deadline=0.02, poll=0.001)
    with pytest.raises(DeadlineExceeded, match="8 of 9 members answered"):
        federation(tmp_path, directory=directory).run()


def test_members_do_not_suffice_for_the_floor(tmp_path: Path) -> None:
    config = replace(CONFIG, thresholds=replace(CONFIG.thresholds, floor=9))
    with pytest.raises(RoundAborted, match="8 members may still be asked, 9 are needed"):
        federation(tmp_path, config).run()


def test_poisson_cohort_below_the_floor_is_passed_over(tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=3, thresholds=replace(CONFIG.thresholds, floor=3, attempts=20))
    made = federation(tmp_path, config, sampler=PoissonSampler(0.35))
    made.run()
    assert any("cohort of" in reason for record in made.records for reason in shown(record.aborted))
    assert all(len(shown(record.cohort)) >= 3 for record in made.records)


def test_sum_that_could_overflow_is_a_usage_error(tmp_path: Path) -> None:
    encoding = replace(CONFIG.encoding, word_bits=16, level_bits=14)
    with pytest.raises(UsageError, match="overflow 16-bit words"):
        federation(tmp_path, replace(CONFIG, encoding=encoding)).run()


class Stopped(Exception):
    """The process is gone."""


class StoppingLog(AttemptLog):
    """An AttemptLog whose process is killed once the masked sum is durable."""

    def save(self, state: AttemptState) -> None:
        super().save(state)
        if state.machine:
            raise Stopped


def test_stored_attempt_of_another_cohort_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, replays=False)
    made.runtime.__dict__["attempts"] = StoppingLog(tmp_path)
    with pytest.raises(Stopped):
        made.run()
    state = AttemptLog(tmp_path).load()
    assert state is not None
    assert SecAggServer.load(state.machine, made.members.roster).survivors == state.asked
    AttemptLog(tmp_path).save(replace(state, cohort=state.cohort[:-1]))
    made.runtime = replace(made.runtime)
    with pytest.raises(DataError, match="has another plan than this run would make"):
        made.run()
