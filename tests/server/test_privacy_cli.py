"""The `fedoppu privacy plan` command from outside, and what it prints."""

import json
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedoppu.common import accounting
from fedoppu.server import privacy_plan
from fedoppu.server.privacy_cli import app, describe, read_federation
from fedoppu.server.privacy_plan import plan_privacy


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def data(*arguments: str) -> dict[str, Any]:
    ended = run(*arguments, "--format", "json")
    assert ended.exit_code == 0, ended.output
    envelope: dict[str, Any] = json.loads(ended.stdout)
    assert envelope["status"] == "ok"
    return dict(envelope["data"])


def text(*settings: str) -> str:
    federation = read_federation(list(settings))
    return "\n".join(describe(federation, plan_privacy(federation)))


def test_the_specification_s_plan_as_json() -> None:
    plan = data("noise_multiplier=1", "mechanism=central")
    assert plan["spent"]["released"] == pytest.approx(7.05, abs=0.02)
    assert plan["spent"]["adjacency"] == "add_remove"
    assert plan["spent"]["server"] is None  # no bound
    assert plan["signal"] == pytest.approx(1.0)
    assert plan["survives"]
    assert plan["fits"]
    assert plan["federation"]["privacy"]["sampling"] == "poisson"
    assert plan["federation"]["encoding"]["value_range"] == 0.6


def test_a_surviving_signal_is_said_in_words() -> None:
    printed = run("noise_multiplier=1", "mechanism=central", "parameters=2500")
    assert printed.exit_code == 0
    assert "n / (z sqrt(d)) = 2, with z = 1" in printed.stdout
    assert "the signal survives: in a round's mean the noise is 0.5 of an update" in printed.stdout
    assert "equal with 10,000 parameters, or cohorts of 50" in printed.stdout
    assert "one user is in the federation, or not" in printed.stdout
    assert "no bound" in printed.stdout


def test_a_lost_signal_names_its_remedies() -> None:
    printed = text("noise_multiplier=1", "mechanism=central", "parameters=1.44e6")
    assert "the noise is 12 times the update: use rank 1, fewer modules, or more users" in printed
    assert "cohorts of 1,200" in printed
    printed = text("noise_multiplier=1", "mechanism=central", "parameters=40000")
    assert "2 times the update: use rank 1, fewer modules, or larger cohorts" in printed


def test_distributed_noise_is_shown_for_each_client_and_topped_up() -> None:
    printed = text("noise_multiplier=1")
    assert "each client adds discrete Gaussian noise of" in printed
    assert "tops a sum up to" in printed
    fixed = text("noise_multiplier=1", "sampling=fixed")
    assert "tops a sum up" not in fixed
    assert "if nobody drops" in fixed


def test_correlated_noise_takes_turns_by_default() -> None:
    plan = data("mechanism=dp_ftrl", "noise_multiplier=5")
    assert plan["federation"]["privacy"]["separation"] == 10
    assert plan["spent"]["released"] == pytest.approx(2.59, abs=0.005)
    assert "correlated over 10 rounds" in text("mechanism=dp_ftrl", "noise_multiplier=5")


def test_a_budget_that_ends_early_and_words_that_overflow_are_said() -> None:
    printed = text(
        "noise_multiplier=1",
        "epsilon=8",
        "sampling=fixed",
        "encoding.word_bits=16",
        "encoding.level_bits=8",
    )
    assert "stops         after round 2" in printed
    none = text("noise_multiplier=1", "epsilon=1", "sampling=fixed")
    assert "stops         before the first round" in none
    assert "OVERFLOW" in printed


def test_delta_says_what_small_cohorts_add() -> None:
    printed = text("noise_multiplier=1", "thresholds.floor=50", "mechanism=central")
    assert "of it for cohorts below the floor of 50" in printed


def test_bounds_without_the_extra_are_said_to_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install" not in text("noise_multiplier=1")
    for module in (accounting, privacy_plan):
        monkeypatch.setattr(module, "has_pld", lambda: False)
    printed = text("noise_multiplier=1")
    assert "by Renyi bounds; pip install 'fedoppu[dp]' shows less epsilon" in printed
    assert "released    7.98" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cohort=2000"], "cohort must be at most the number of users, 1000, got 2000"),
        (["epsilon=0"], "privacy.epsilon must be between 1e-06 and 1000000, got 0.0"),
        (["epsilon=-1"], "privacy.epsilon must be between"),
        (["epsilon=nan"], "privacy.epsilon must be"),
        (["delta=1"], "privacy.delta must be between 1e-12 and 0.1, got 1.0"),
        (["delta=0"], "privacy.delta must be between"),
        (["users=-3"], "users must be between 2 and 1e+09, got -3"),
        (["users=ten"], "users must be a whole number, got ten"),
        (["rounds=1.5"], "rounds must be a whole number, got 1.5"),
        (["rounds=0"], "rounds must be between 1 and 1000000, got 0"),
        (["parameters=0"], "parameters must be between 1 and"),
        (["noise_multiplier=0"], "privacy.noise_multiplier must be between 0.001"),
        (["mechanism=gauss"], "privacy.mechanism must be one of"),
        (["mechanism=none"], "privacy.mechanism=none promises nothing"),
        (
            ["mechanism=dp_ftrl", "separation=11"],
            "privacy.separation must be at most users / cohort",
        ),
        (["thresholds.floor=90"], "fall below the floor of 90"),
        (["userz=3"], "unknown key: userz. Did you mean: 'users'?"),
        (["users 3"], "settings are key=value"),
        (["users=50", "cohort=10"], "above 1e-06, a tenth of delta"),
    ],
)
def test_wrong_settings_are_one_line_with_exit_code_2(settings: list[str], message: str) -> None:
    ended = run(*settings)
    assert ended.exit_code == 2
    assert message in ended.stderr
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert not ended.stdout
    envelope = json.loads(run(*settings, "--format", "json").stdout)
    assert envelope["error_code"] == "usage"
    assert message in envelope["message"]


def test_counts_may_be_written_with_an_exponent() -> None:
    federation = read_federation(["users=1e6", "cohort=1e3", "parameters=1e5"])
    assert (federation.users, federation.cohort, federation.parameters) == (10**6, 1000, 100_000)


def test_no_epsilon_that_is_shown_is_below_what_it_is() -> None:
    told = text("noise_multiplier=0.9", "rounds=37")
    plan = plan_privacy(read_federation(["noise_multiplier=0.9", "rounds=37"]))
    for what, value in (("released", plan.spent.released), ("members", plan.spent.peers)):
        shown = float(told.split(what)[1].split()[0])
        assert value <= shown < value * 1.01
