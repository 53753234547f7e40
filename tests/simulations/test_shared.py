"""The shared phase of a run, with made-up training: rounds, records, drops, warnings, errors."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fedoppu.client.jobs import ClientFailure, LocalUpdate
from fedoppu.client.model import resolve_base
from fedoppu.common.accounting import gaussian_epsilon
from fedoppu.common.config import load_run_config
from fedoppu.common.defaults import federation, personal_settings
from fedoppu.common.errors import BaseModelError, ClientFailed, RoundAborted, UsageError
from fedoppu.common.rounds import RoundPlan
from fedoppu.simulations.console import Console
from fedoppu.simulations.costs import Costs
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.shared import SharedPhase, train_shared
from fedoppu.simulations.users import PreparedUsers
from tests.fake_federation import FakeExecutor, made_up

QUIET = Console(progress=False, table=False)


def phase(folder: Path, *changes: str, members: int = 6) -> SharedPhase:
    """One federation on pocket whose users nobody reads."""
    run = load_run_config(["task=LaMP_3", "cohort=4", "rounds=2", "group_users=2", *changes])
    base = resolve_base("pocket")
    config = federation(
        run, base, task="LaMP_3", k=0, profile="none", base_users=members, seed=run.seed
    )
    names = tuple(f"base-{member}" for member in range(members))
    users = PreparedUsers(folder / "users", ("target-0",), names, None)
    return SharedPhase(run, base, config, run.seed, users, folder)


def train(own: SharedPhase, executor: FakeExecutor | None = None) -> Any:
    trained = cast(GroupExecutor, executor or FakeExecutor())
    return train_shared(own, trained, Costs(own.folder, 1), console=QUIET)


def test_rounds_are_recorded_committed_and_their_model_is_the_result(tmp_path: Path) -> None:
    adapter, records = train(phase(tmp_path))
    assert [record["round"] for record in records] == [1, 2]
    assert adapter.digest() == records[-1]["model_hash"]
    assert adapter.parent is None
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir())[:2] == ["0001", "0002"]


def test_the_same_seed_gives_the_same_rounds_and_another_one_does_not(tmp_path: Path) -> None:
    first, again = (train(phase(tmp_path / name))[1] for name in "ab")
    assert first == again
    assert train(phase(tmp_path / "c", "seed=1"))[1] != first


def test_groups_are_of_the_configured_size(tmp_path: Path) -> None:
    executor = FakeExecutor()
    train(phase(tmp_path, "rounds=1", "cohort=5", "group_users=3"), executor)
    assert [len(group) for group in executor.groups] == [3, 2]


def test_without_rounds_the_result_is_the_initial_adapter(tmp_path: Path) -> None:
    adapter, records = train(phase(tmp_path, "rounds=0"))
    assert records == ()
    assert not any(adapter.tensors[name].any() for name in adapter.tensors if name.endswith(".B"))


def test_plain_updates_print_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(phase(tmp_path / "secure"))
    assert "warning" not in capsys.readouterr().err
    train(phase(tmp_path / "plain", "research.plain_updates=true"))
    assert "updates travel in clear and the server sees each" in capsys.readouterr().err


def test_dropouts_are_recorded_and_the_rounds_go_on(tmp_path: Path) -> None:
    own = phase(tmp_path, "research.dropout=0.2", "rounds=6", "cohort=10", members=20)
    _, records = train(own)
    assert len(records) == 6
    dropped = [record for record in records if record["dropped"]]
    assert dropped
    for record in dropped:
        gone = {member for members in record["drops"].values() for member in members}
        assert gone <= set(record["cohort"])
        assert len(gone) == record["dropped"]


def test_when_all_drop_the_run_ends_and_says_who(tmp_path: Path) -> None:
    with pytest.raises(RoundAborted, match=r"given up after 3 attempts: .*simulated drop"):
        train(phase(tmp_path, "research.dropout=1"))


def test_a_members_failure_is_told_in_full_and_ends_the_rounds(tmp_path: Path) -> None:
    def fails(member: int, plan: RoundPlan) -> LocalUpdate | ClientFailure:
        if plan.round == 2:
            return ClientFailure(str(member), f"user base-{member}: ValueError: item 9 is empty")
        return made_up(member, plan)

    with pytest.raises(
        ClientFailed, match=r"member \d, train.masked: .*user base-\d: .*item 9"
    ) as e:
        train(phase(tmp_path), FakeExecutor(fails))
    assert e.value.hint == ""
    assert (tmp_path / "rounds" / "0001").is_dir()
    assert not (tmp_path / "rounds" / "0002").exists()


def test_targets_that_the_base_lacks_are_refused_for_either_adapter(tmp_path: Path) -> None:
    own = phase(tmp_path)
    personal = personal_settings(own.run, own.base, "LaMP_3")
    SharedPhase.check(own.config, own.base, personal)
    wrong = replace(personal, adapter=replace(personal.adapter, targets=("c_attn",)))
    with pytest.raises(BaseModelError, match="no target module c_attn; it has down_proj"):
        SharedPhase.check(own.config, own.base, wrong)
    foreign = replace(own.config.shared.adapter, targets=("c_attn",))
    shared = replace(own.config.shared, adapter=foreign)
    with pytest.raises(BaseModelError, match="no target module c_attn"):
        SharedPhase.check(replace(own.config, shared=shared), own.base, personal)


# --- differential privacy ------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["central", "distributed", "dp_ftrl"])
def test_private_rounds_end_with_the_budget_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mechanism: str
) -> None:
    own = phase(
        tmp_path,
        *("rounds=5", f"privacy.mechanism={mechanism}", "privacy.noise_multiplier=2"),
        "privacy.epsilon=3",
    )
    adapter, records = train(own)
    done = len(records)
    assert gaussian_epsilon(2.0, done, 1e-5) <= 3 < gaussian_epsilon(2.0, done + 1, 1e-5)
    assert adapter.digest() == records[-1]["model_hash"]
    err = capsys.readouterr().err
    assert f"{own.name}: stopped after round {done} of 5: one more would exceed" in err


def test_the_signal_is_told_beside_the_noise(tmp_path: Path) -> None:
    assert phase(tmp_path).noise_note == ""
    own = phase(tmp_path, "privacy.mechanism=central", "privacy.noise_multiplier=0.5")
    match = re.search(r"is ([\d.]+) times the noise in its ([\d,]+) parameters", own.noise_note)
    assert match is not None
    length = int(match[2].replace(",", ""))
    assert float(match[1]) == pytest.approx(4 / (0.5 * length**0.5), rel=0.02)


def test_noise_is_checked_before_users_are_there(tmp_path: Path) -> None:
    changes = ["privacy.mechanism=central", "privacy.noise_multiplier=1"]
    own = phase(tmp_path, *changes)
    SharedPhase.check_noise(own.config, own.base, 6)
    SharedPhase.check_noise(phase(tmp_path).config, own.base, 6)
    narrow = phase(
        tmp_path,
        "privacy.mechanism=central",
        "privacy.noise_multiplier=40",
        "encoding.word_bits=16",
        "encoding.level_bits=8",
    )
    with pytest.raises(UsageError, match="overflow 16-bit words") as error:
        SharedPhase.check_noise(narrow.config, own.base, 6)
    assert "lower privacy.noise_multiplier" in error.value.hint


def test_words_must_hold_the_largest_poisson_cohort_and_not_only_the_expected_one(
    tmp_path: Path,
) -> None:
    """A draw that overflows would end the run, and by that tell its size."""
    settings = (
        "privacy.mechanism=central",
        "privacy.noise_multiplier=0.4",
        "encoding.word_bits=16",
        "encoding.level_bits=8",
    )
    own = phase(tmp_path, *settings)
    fixed = replace(own.config, cohort=100)
    SharedPhase.check_noise(fixed, own.base, 2000)
    drawn = replace(fixed, privacy=replace(fixed.privacy, sampling="poisson"))
    with pytest.raises(UsageError, match="overflow 16-bit words"):
        SharedPhase.check_noise(drawn, own.base, 2000)


def test_distributed_noise_is_checked_with_the_plan_that_the_largest_poisson_cohort_would_get(
    tmp_path: Path,
) -> None:
    """A client's share of the noise is of its round's cohort: of the expected one it would be too large for 24."""
    own = phase(
        tmp_path,
        *("cohort=16", "encoding.clip=0.5", "privacy.mechanism=distributed"),
        *("privacy.noise_multiplier=1.5", "privacy.epsilon=4", "privacy.sampling=poisson"),
    )
    SharedPhase.check_noise(own.config, own.base, 24)
