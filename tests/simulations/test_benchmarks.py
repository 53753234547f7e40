import json
import re
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import (
    Row,
    check_target,
    in_words,
    machine,
    print_rows,
    write_result,
)
from fedoppu.simulations.benchmarks.meters import (
    PeakMeter,
    Stopwatch,
    cpu_seconds,
    interleave,
    peak_bytes,
    run_tree,
)
from fedoppu.simulations.benchmarks.secagg import GROUPS as NAMES
from fedoppu.simulations.benchmarks.secagg import app
from fedoppu.simulations.benchmarks.secagg_cases import Case, active, semi_honest
from fedoppu.simulations.benchmarks.secagg_flower import FlowerClient, FlowerServer, FlowerTerms
from fedoppu.simulations.benchmarks.secagg_ours import Cohort, OurRound, OurTerms
from fedoppu.simulations.benchmarks.secagg_rows import GROUPS, Scope, rows_of

SMALL = Case(10, 9, 7, 500)
FIELDS = {"name", "ours", "theirs", "ratio", "goal", "met"}


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (Row("cost", 2.0, 24.0, goal=12.0), 12.0, True),
        (Row("cost", 2.0, 23.9, goal=12.0), 11.95, False),
        (Row("rate", 7.0, 8.75, kind="rate", goal=0.8), 0.8, True),
        (Row("rate", 6.9, 8.75, kind="rate", goal=0.8), 6.9 / 8.75, False),
        (Row("bound", 4.02, kind="bound", goal=4.02), None, True),
        (Row("bound", 4.03, 8.0, kind="bound", goal=4.02), None, False),
        (Row("no goal", 1.0, 3.0), 3.0, None),
        (Row("nothing to compare", 1.0), None, None),
    ],
)
def test_ratio_is_more_where_ours_is_better(row: Row, ratio: float | None, met: bool) -> None:
    assert row.ratio == (None if ratio is None else pytest.approx(ratio))
    assert row.met is met
    written = row.as_dict()
    assert written.keys() >= FIELDS
    assert written["ratio"] == row.ratio
    if row.kind == "bound":
        assert written["theirs"] is None


@pytest.mark.parametrize(("low", "met"), [(9.5, True), (9.4, False), (None, False)])
def test_a_goal_may_be_one_of_the_worst_pair(low: float | None, met: bool) -> None:
    assert Row("rate", 12.0, 1.0, kind="rate", goal=10.0, low=low, low_share=0.95).met is met


def test_a_goal_without_a_ratio_is_missed() -> None:
    assert Row("cost", 1.0, None, goal=2.0).met is False
    assert Row("cost", 0.0, 1.0, goal=2.0).ratio is None


def test_table_says_goal_and_verdict_of_each_row() -> None:
    rows = [
        Row("fast", 0.05, 0.7, goal=12.0, low=13.0),
        Row("slow", 0.1, 0.7, goal=12.0, note="why"),
    ]
    rows += [Row("large", 135_001.0, kind="bound", goal=135_000.0, unit="B")]
    console = Console(width=150, highlight=False)
    with console.capture() as captured:
        print_rows("a machine", rows, console)
    text = captured.get()
    assert re.search(r"fast +50 ms +700 ms +14 +13 +>= 12 met", text)
    assert re.search(r"slow +100 ms +700 ms +7 +>= 12 missed +why", text)
    assert re.search(r"large +135 kB +<= 135 kB missed", text)


def test_progress_is_one_line_a_row() -> None:
    row = Row("fast", 0.05, 0.7, goal=12.0)
    assert in_words(row) == "fast: 50 ms, theirs 700 ms, ratio 14 >= 12 met"
    assert in_words(Row("size", 4.9e3, kind="bound", unit="B")) == "size: 4.9 kB"


def test_file_holds_machine_command_and_rows(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    facts = machine(["numpy"])
    write_result(target, [Row("one", 1.0, 2.0, goal=3.0)], facts)
    read = json.loads(target.read_text())
    assert read["machine"] == facts
    assert read["machine"]["versions"] == {"numpy": np.__version__}
    assert {"cpu", "flags", "cores", "load", "threads"} <= read["machine"].keys()
    assert (read["rows"][0]["ratio"], read["rows"][0]["met"]) == (2.0, False)
    assert str(Path.home()) not in read["command"].split(" ", 1)[0]


def test_result_file_must_be_writable_before_anything_is_measured(tmp_path: Path) -> None:
    check_target(tmp_path / "new.json")
    with pytest.raises(UsageError, match="it is a folder"):
        check_target(tmp_path)
    with pytest.raises(UsageError, match=r"there is no folder .*missing"):
        check_target(tmp_path / "missing" / "new.json")


# --- costs ---------------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_is_that_of_work_and_not_of_waiting() -> None:
    assert cpu_seconds(lambda: time.sleep(0.05)) < 0.03
    assert 0.03 <= cpu_seconds(lambda: spin(0.03)) < 0.3


def test_stopwatch_adds_up_the_visits_of_each_part() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("a"):
            spin(0.01)
    with watch.part("b"):
        spin(0.01)
    assert 0.02 <= watch.seconds["a"] < 0.2
    assert watch.total == pytest.approx(watch.seconds["a"] + watch.seconds["b"])


def test_sides_take_turns_and_the_bound_is_the_worst_pair() -> None:
    order: list[str] = []
    costs = {"a": iter([1.0, 2.0, 9.0]), "b": iter([10.0, 30.0, 36.0])}

    def side(name: str) -> dict[str, float]:
        order.append(name)
        return {"work": next(costs[name])}

    found = interleave(lambda: side("a"), lambda: side("b"), 3)["work"]
    assert "".join(order) == "ababab"
    assert (found.ours, found.theirs, found.low, found.pairs) == (2.0, 30.0, 4.0, 3)


def test_no_pair_is_refused() -> None:
    with pytest.raises(UsageError, match="pairs must be at least 1, got 0"):
        interleave(dict, dict, 0)


def test_peak_memory_is_the_most_that_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            np.ones(100_000)

    assert 0.8e6 <= peak_bytes(work) < 1.7e6


def test_peak_meter_keeps_the_largest_block_and_ignores_what_was_there() -> None:
    meter = PeakMeter()

    def work() -> None:
        kept = np.ones(1_000_000)
        for size in (50_000, 200_000):
            with meter.part("block"):
                np.ones(size)
        assert kept.size

    peak_bytes(work)
    assert 1.6e6 <= meter.peak < 2.5e6


def test_a_command_is_measured_with_its_descendants() -> None:
    grandchild = "x = bytearray(60_000_000); import time; time.sleep(.3); sum(range(3_000_000))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    cost = run_tree([sys.executable, "-c", code])
    assert cost.exit_code == 0
    assert cost.cpu_seconds > 0.02
    assert cost.wall_seconds > 0.3
    assert cost.peak_bytes > 60_000_000
    assert run_tree([sys.executable, "-c", "raise SystemExit(3)"]).exit_code == 3


# --- both sides of secure aggregation ------------------------------------------------------------


def test_cases_are_those_of_the_goals_and_of_the_calculator() -> None:
    assert semi_honest(100, 10**6).name == "n=100 d=1e6 (54, 36)"
    for size in (10, 100, 1000):
        case = active(size, 1000)
        # more than half of the holders and of the corrupt ones: no view can be split
        assert 2 * case.threshold > case.neighbours
        assert len(case.gone) == size // 10
        assert "active" in case.name


def test_flowers_server_does_as_much_as_its_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers that we feed it make it combine, agree and unmask as often as real ones would."""
    module = import_module("flwr.server.workflow.secure_aggregation.secaggplus_workflow")
    calls: Counter[str] = Counter()
    for name in ("combine_shares", "pseudo_rand_gen", "generate_shared_key"):
        real = getattr(module, name)

        def counted(*args: Any, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            if name == "combine_shares":
                calls["shares"] += len(args[0])
            return real(*args)

        monkeypatch.setattr(module, name, counted)
    case = Case(30, 8, 5, 50)
    FlowerServer(case).run()
    live, gone = len(case.live), len(case.gone)
    assert calls["combine_shares"] == case.size
    assert calls["generate_shared_key"] == gone * case.neighbours
    assert calls["pseudo_rand_gen"] == live + gone * case.neighbours
    assert calls["shares"] == live * (case.neighbours + 1)


def test_flowers_terms_count_what_its_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = FlowerTerms(Case(30, 8, 5, 50))
    each = {"vector": 1.0, "seed": 1e2, "key": 1e4, "agreement": 1e6, "mask": 1e9, "end": 1e12}
    monkeypatch.setattr(terms, "run", lambda: each)
    assert terms.counted()["server"] == 27 + 27e2 + 3e4 + 24e6 + 51e9 + 1e12


def test_flowers_client_sends_what_the_mod_sends() -> None:
    client = FlowerClient(SMALL, np.zeros(SMALL.num_params, np.float32))
    cost = client.run()
    assert set(cost) == {"share phase", "masking"}
    assert client.masked_bytes > 8 * SMALL.num_params
    assert client.bytes_up > 500 * SMALL.neighbours


def test_our_round_is_measured_only_if_its_sum_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OurRound(Cohort.of(SMALL), Stopwatch())
    ours.run()
    assert ours.held > 4 * SMALL.num_params
    spoiled = OurRound(Cohort.of(SMALL), Stopwatch())
    words = spoiled._words
    monkeypatch.setattr(spoiled, "_words", lambda member: words(member + len(spoiled.seen)))
    with pytest.raises(RuntimeError, match="the sum is wrong"):
        spoiled.run()


def test_counted_terms_are_near_a_whole_round() -> None:
    """Both lengths are measured: counting on from the shorter one gives the longer one."""
    short, long = (Cohort.of(Case(20, 19, 13, length)) for length in (1_000, 200_000))
    watches = [Stopwatch(), Stopwatch()]
    for cohort, watch in zip((short, long), watches, strict=True):
        OurRound(cohort, watch).run()
    counted = watches[0].total + OurTerms(long).counted() - OurTerms(short).counted()
    assert 0.4 < counted / watches[1].total < 2.5


# --- the command ---------------------------------------------------------------------------------


def test_every_group_of_the_help_is_measured() -> None:
    assert tuple(GROUPS) == NAMES


def test_rows_with_goals_are_those_of_the_specification() -> None:
    scope = Scope((10,), (1000,), 1)
    rows = list(rows_of(["bytes", "stream"], scope))
    assert all(row.goal is None for row in rows)
    assert len({row.name for row in rows}) == len(rows)


def test_quick_command_prints_a_table_and_writes_a_file(tmp_path: Path) -> None:
    target = tmp_path / "secagg.json"
    command = [
        sys.executable,
        "-m",
        "fedoppu.simulations.benchmarks.secagg",
        "--quick",
        "--pairs",
        "1",
    ]
    done = subprocess.run(  # noqa: S603
        [*command, "--json", str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "client n=10 d=2000 (9, 7)" in done.stdout
    read = json.loads(target.read_text())
    assert read["machine"]["threads"] == "1"
    assert read["command"].startswith("python")
    names = [row["name"] for row in read["rows"]]
    assert len(set(names)) == len(names)
    for start in (
        "mask stream",
        "client",
        "server",
        "two-server",
        "masked vector",
        "advert and own",
    ):
        assert any(name.startswith(start) for name in names)
    assert all(row.keys() >= FIELDS for row in read["rows"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--only", "clients"], "--only must be one of stream, client, .*, got clients"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["--json", "/"], "it is a folder"),
    ],
)
def test_wrong_input_gets_one_line_before_anything_runs(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert re.search(line, result.stderr)
    assert len(result.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in result.stderr


def test_measuring_loads_no_numeric_library_before_its_threads_are_set() -> None:
    code = "import sys; import fedoppu.simulations.benchmarks.secagg; print('numpy' in sys.modules)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
