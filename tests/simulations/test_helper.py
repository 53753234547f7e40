"""The helper of a simulation: keys of the seed, inside the Grid alone; and the main job with it."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedoppu.client.app import build_client_app
from fedoppu.common.adapter_files import load_adapter
from fedoppu.common.config import SecAggSettings, load_run_config
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.common.two_server import HelperKeys
from fedoppu.server.app import run_rounds
from fedoppu.simulations.app import members_of, spec_of
from fedoppu.simulations.executors import InProcess
from fedoppu.simulations.grid import LocalGrid
from fedoppu.simulations.helper import pinned_helper, simulated_helper
from fedoppu.simulations.key_source import GridMarker
from fedoppu.simulations.runtime import SimulatedUsers, simulated_server
from tests.fake_federation import CONFIG, federation
from tests.small_run import command, finish, results, settings

ROOT = Randomness.from_seed(3)
TWO = replace(CONFIG, secagg=SecAggSettings("two_server"))
SMALL = (
    *("task=LaMP_3", "users=1", "base_users=5", "queries=2", "cohort=4", "rounds=2"),
    *("shared.adapter.rank=2", "prompt.text_tokens=12"),
)
ONE = [
    *("task=LaMP_3", "users=2", "base_users=5", "queries=2", "rounds=1", "cohort=4"),
    *("group_users=1", "arms=base,shared", "resamples=50", "secagg.mode=two_server"),
]


@pytest.mark.parametrize("exchange", ["x25519", "hybrid"])
def test_keys_are_pinned_and_follow_from_the_seed(exchange: Any) -> None:
    config = replace(CONFIG, secagg=SecAggSettings("two_server", exchange))
    pinned = pinned_helper(config, ROOT)
    assert pinned == pinned_helper(config, Randomness.from_seed(3))
    assert pinned.secagg.helper != pinned_helper(config, Randomness.from_seed(4)).secagg.helper
    keys = HelperKeys.parse(pinned.secagg.helper, hybrid=exchange == "hybrid")
    assert keys.hybrid is (exchange == "hybrid")
    assert replace(pinned, secagg=config.secagg) == config


def test_graph_federation_has_no_helper(tmp_path: Path) -> None:
    assert pinned_helper(CONFIG, ROOT) is CONFIG
    assert federation(tmp_path).members.helper is None


def test_helper_that_the_settings_name_is_refused() -> None:
    config = replace(CONFIG, secagg=SecAggSettings("two_server", helper="ab"))
    with pytest.raises(UsageError, match=r"secagg\.helper cannot be set in a simulation"):
        pinned_helper(config, ROOT)


def test_helper_lives_in_an_open_grid_alone(tmp_path: Path) -> None:
    roster, config = federation(tmp_path).members.roster, pinned_helper(TWO, ROOT)
    closed = GridMarker()
    closed.open = False
    with pytest.raises(UsageError, match="only inside a simulation's Grid"):
        simulated_helper(config, roster, ROOT, marker=closed)
    assert simulated_helper(config, roster, ROOT, marker=GridMarker()) is not None


def trained(folder: Path, base: Path, *changes: str) -> Any:
    """The shared adapter of a run with the real trainer, over our own Grid."""
    run = load_run_config([*SMALL, f"base={base}", *changes])
    spec = spec_of(run, folder / "users")
    members = members_of(spec)
    users = SimulatedUsers(members, InProcess(spec.worker))
    server = simulated_server(
        members, folder / "rounds", progress=lambda *_: None, warn=lambda line: None
    )
    run_rounds(server, LocalGrid(build_client_app(users), len(members.roster), users))
    latest = server.checkpoints.latest()
    assert latest is not None
    return latest.adapter.spec.flatten(latest.adapter.tensors, ("B",))


def test_real_training_leads_to_nearly_the_graph_modes_adapter(
    tiny_base: Path, tmp_path: Path
) -> None:
    """The sum is exact in both; only the dither differs, which is bound to the config."""
    graph = trained(tmp_path / "graph", tiny_base)
    two = ("secagg.mode=two_server", "secagg.key_exchange=hybrid")
    sealed = trained(tmp_path / "sealed", tiny_base, *two)
    assert not np.array_equal(graph, sealed)
    assert np.linalg.norm(graph - sealed) < 0.01 * np.linalg.norm(graph)


def test_setting_a_helper_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    ended = command(*ONE, "secagg.helper=ab", f"out={tmp_path / 'run'}", "-q")
    assert ended.exit_code == 2
    assert "secagg.helper cannot be set in a simulation" in ended.stderr
    assert not (tmp_path / "run").exists()


# --- the main job ---------------------------------------------------------------------------------


def shared(folder: Path) -> Any:
    adapter = load_adapter(folder / "seed-0" / "LaMP_3" / "k0-none" / "shared")
    return adapter.spec.flatten(adapter.tensors)


def one(folder: Path, *changes: str, start: Sequence[str] = ONE) -> Path:
    return finish(settings(*changes, f"out={folder}", start=list(start)))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["x25519", "hybrid"])
def test_main_job_runs_and_is_reproducible(tmp_path: Path, exchange: str) -> None:
    change = f"secagg.key_exchange={exchange}"
    first = one(tmp_path / "a", change)
    assert results(one(tmp_path / "b", change, "workers=2")) == results(first)
    graph = one(tmp_path / "c", "secagg.mode=graph")
    ours, theirs = shared(first), shared(graph)
    assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_flowers_engine_gives_the_bytes_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="engine=flower needs the extra fedoppu[flower]")
    ours = one(tmp_path / "ours", "secagg.key_exchange=hybrid")
    changes = ("secagg.key_exchange=hybrid", "engine=flower", f"out={tmp_path / 'flowers'}", "-q")
    words = [sys.executable, "-m", "fedoppu", "simulate", *ONE, *changes]
    subprocess.run(words, check=True, capture_output=True)  # noqa: S603
    assert results(tmp_path / "flowers") == results(ours)


@pytest.mark.slow
def test_members_drop_out_and_the_main_job_goes_on(tmp_path: Path) -> None:
    changes = ("research.dropout=0.2", "rounds=3", "base_users=12", "cohort=8")
    assert (one(tmp_path / "run", *changes) / "table.json").exists()
