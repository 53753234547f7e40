"""The main job with differential privacy, as a user starts it."""

import json
from pathlib import Path

import pytest

from tests.small_run import command, federations, finish, lines, results, settings

PRIVATE = [
    *("task=LaMP_3", "users=2", "base_users=24", "queries=2", "rounds=3", "cohort=16"),
    *("arms=base,shared", "resamples=10", "encoding.clip=0.5"),
    *("privacy.mechanism=central", "privacy.noise_multiplier=1.5", "privacy.epsilon=4"),
    "privacy.sampling=poisson",
]


def test_run_that_its_budget_ends_is_done_and_says_so_everywhere(tmp_path: Path) -> None:
    ended = command(*PRIVATE, f"out={tmp_path / 'run'}", "--format", "json")
    assert ended.exit_code == 0
    (spent,) = json.loads(ended.stdout)["data"]["privacy"]
    assert 0 < spent["rounds_done"] < spent["rounds_planned"] == 3
    assert spent["released"] <= 4 < spent["peers"]
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["kind"] for line in found] == ["round"] * spent["rounds_done"] + ["privacy"]
    assert found[-1] == spent
    assert found[-2]["privacy"]["released"] == spent["released"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"after {spent['rounds_done']} of 3 rounds" in page
    assert "the privacy budget ended the shared phase" in page


def test_settings_that_do_not_go_together_are_a_usage_error(tmp_path: Path) -> None:
    ended = command("privacy.epsilon=8", f"out={tmp_path / 'run'}")
    assert ended.exit_code == 2
    assert "set privacy.mechanism to central, distributed or dp_ftrl" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["central", "distributed", "dp_ftrl"])
def test_private_run_gives_the_same_bytes_for_one_and_two_workers(
    tmp_path: Path, mechanism: str
) -> None:
    changes = [*PRIVATE, f"privacy.mechanism={mechanism}"]
    if mechanism == "dp_ftrl":
        changes.append("privacy.sampling=fixed")
    one = finish(settings(*changes, f"out={tmp_path / 'one'}", start=[]))
    two = finish(settings(*changes, "workers=2", f"out={tmp_path / 'two'}", start=[]))
    assert results(one) == results(two)
    assert len(federations(one)) == 1
