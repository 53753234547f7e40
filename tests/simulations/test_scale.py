"""The benchmark of scale: what its rows are made of, and that it runs."""

import json
from pathlib import Path

import pytest

from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.meters import TreeCost
from fedoppu.simulations.benchmarks.scale import Cost, benchmark, scale_rows, sizes_of


def cost(peak: int, cpu: float) -> Cost:
    return Cost(TreeCost(cpu, peak, 0.0, 0), TreeCost(9.0, peak, 0.0, 0), files=5000, size=90_000)


def by_name(costs: dict[int, list[Cost]]) -> dict[str, Row]:
    return {row.name: row for row in scale_rows(costs)}


COSTS = {
    200: [cost(500_000_000, 12.0), cost(510_000_000, 18.0), cost(520_000_000, 11.0)],
    2000: [cost(515_000_000, 48.0)],
    10000: [cost(559_000_000, 216.0)],
}


def test_the_peak_is_compared_at_the_ends_and_a_further_user_is_told_beside_it() -> None:
    rows = by_name(COSTS)
    peak = rows["peak memory, 10,000 users over 200"]
    assert (round(peak.ours, 3), peak.goal, peak.met) == (1.096, 1.1, True)
    assert rows["peak memory, a further user"].ours == pytest.approx(5000)
    assert rows["files and folders, a user"].ours == 0.5


def test_cpu_time_is_compared_by_slopes_so_that_start_up_counts_for_nothing() -> None:
    rows = by_name(COSTS)
    assert rows["CPU time, a further user"].ours == pytest.approx(0.021)
    ratio = rows["CPU time a user"]
    assert ratio.ours == pytest.approx(0.021 / 0.02)
    assert ratio.met


def test_two_sizes_have_one_slope_and_no_ratio_of_slopes() -> None:
    rows = by_name({size: COSTS[size] for size in (200, 2000)})
    assert "CPU time a user" not in rows
    assert "CPU time, a further user" in rows


@pytest.mark.parametrize("text", ["200", "200,100", "200,x", "1,9", ""])
def test_sizes_that_cannot_be_compared_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--sizes takes at least two ascending numbers"):
        sizes_of(text)


@pytest.mark.slow
def test_it_runs_and_writes_its_file(tiny_base: Path, tmp_path: Path) -> None:
    benchmark(sizes="4,6", pairs=1, base=str(tiny_base), json=tmp_path / "scale.json")
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert len(rows) == 10
    assert all(row["ours"] is not None for row in rows)
