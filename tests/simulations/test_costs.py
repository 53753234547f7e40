"""What a run cost, added up over the processes that worked on it."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedoppu.common.config import RunConfig
from fedoppu.simulations import costs as module
from fedoppu.simulations.costs import TIMING, Costs, begin_process, processes, read_lines, total

STAGES = [{"attempt": 0, "stage": "train.masked", "seconds": 1.5}]


class Clock:
    """Ticks only when it is told to; wall time goes twice as fast as CPU time."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return 2 * self.now

    def process_time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Elsewhere:
    """Works at once, and says that another process did."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
        for group in groups:
            _, _, result = work(None, group)
            yield ("far away", 1), 5.0, result


class Here:
    """Works at once, in this process."""

    def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
        return (work(None, group) for group in groups)


def phases(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / TIMING) if line["kind"] == "phases"]


def test_each_process_adds_a_line_and_the_sums_are_of_all(tmp_path: Path, clock: Clock) -> None:
    for process, seconds in ((1, 3.0), (2, 4.0)):
        costs = Costs(tmp_path, process)
        clock.now += seconds
        costs.spend("shared")
        clock.now += 1
        costs.spend("personal")
    lines = costs.lines
    assert [line["process"] for line in lines] == [1, 2]
    assert total(lines, "shared_seconds") == 14
    assert total(lines, "shared_cpu_seconds") == 7
    assert total(lines, "personal_seconds") == 4
    assert phases(tmp_path) == list(lines)


def test_groups_of_other_processes_are_added_and_our_own_are_not_counted_twice(
    tmp_path: Path, clock: Clock
) -> None:
    def work(worker: Any, group: int) -> int:
        clock.now += 2
        return 2 * group

    costs = Costs(tmp_path, 1)
    assert list(costs.metered(Elsewhere(clock), "shared").map(work, [1, 2, 3])) == [2, 4, 6]
    assert total(costs.lines, "shared_cpu_seconds") == 6 + 3 * 5
    assert list(costs.metered(Here(), "personal").map(work, [4])) == [8]
    assert total(costs.lines, "personal_cpu_seconds") == 2


def test_it_is_written_now_and_then(tmp_path: Path, clock: Clock) -> None:
    costs = Costs(tmp_path, 1)
    clock.now += 0.4
    costs.spend("shared")
    assert not (tmp_path / TIMING).exists()
    clock.now += 0.4
    costs.spend("shared")
    assert phases(tmp_path)[0]["shared_seconds"] == pytest.approx(1.6)


def test_a_round_of_an_earlier_process_keeps_its_wall_times(tmp_path: Path) -> None:
    first = Costs(tmp_path, 1)
    first.round_done({"kind": "round", "round": 1, "stages": STAGES})
    first.write()
    again = Costs(tmp_path, 2)
    again.round_done({"kind": "round", "round": 1, "stages": []})
    again.round_done({"kind": "round", "round": 2, "stages": []})
    assert [line.get("stages") for line in again.lines[:2]] == [STAGES, []]
    again.round_done({"kind": "round", "round": 1, "stages": STAGES * 2})  # it was replayed
    assert again.lines[0]["stages"] == STAGES * 2


def test_processes_are_counted(tmp_path: Path) -> None:
    assert begin_process(tmp_path, RunConfig()) == 1
    assert begin_process(tmp_path, RunConfig(engine="ray", workers=3)) == 2
    told = [(line["process"], line["engine"], line["workers"]) for line in processes(tmp_path)]
    assert told == [(1, "local", 1), (2, "ray", 3)]


@pytest.mark.parametrize("torn", ["", "[", "[1]\n", '{"kind": "phases", "pro'])
def test_a_file_that_was_cut_costs_its_last_line_only(tmp_path: Path, torn: str) -> None:
    begin_process(tmp_path, RunConfig())
    with (tmp_path / TIMING).open("a") as stream:
        stream.write(torn)
    assert begin_process(tmp_path, RunConfig()) == 2
    for line in (tmp_path / TIMING).read_text().splitlines():
        assert json.loads(line)["kind"] == "process"
