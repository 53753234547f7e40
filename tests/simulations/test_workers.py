"""A worker is a function of its spec: base, prompts, users, profiles."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedoppu.client.jobs import TrainedAdapter
from fedoppu.client.model import resolve_base
from fedoppu.client.profile import template_profile
from fedoppu.common.adapters import AdapterSpec
from fedoppu.common.config import load_run_config
from fedoppu.common.defaults import federation, personal_settings
from fedoppu.simulations.users import prepare_users
from fedoppu.simulations.workers import WorkerSpec, open_worker
from tests.client.engine import fresh_job


def spec_of(folder: Path, *changes: str) -> WorkerSpec:
    """A federation on pocket with two target and two base users."""
    run = load_run_config(["task=LaMP_3", "users=2", "base_users=2", "queries=2", *changes])
    base = resolve_base(run.base)
    users = prepare_users(run, task="LaMP_3", seed=0, folder=folder)
    config = federation(
        run, base, task="LaMP_3", k=run.k[0], profile=run.profile[0], base_users=2, seed=0
    )
    personal = personal_settings(run, base, "LaMP_3")
    return WorkerSpec(run.base, users.folder, config.canonical(), personal, 0, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("users")


def test_the_last_worker_and_the_last_base_are_kept(folder: Path) -> None:
    first = open_worker(spec_of(folder))
    assert open_worker(spec_of(folder)) is first
    other = open_worker(spec_of(folder, "k=2"))
    assert other is not first
    assert other.base is first.base


def test_adapters_have_the_shapes_that_the_settings_name(folder: Path) -> None:
    changes = ("shared.adapter.rank=3", "personal.adapter.targets=v_proj")
    worker = open_worker(spec_of(folder, *changes))
    assert worker.shared_spec.rank == 3
    assert len(worker.shared_spec.targets) == len(worker.base.facts.linear)
    own = worker.fresh_personal(worker.randomness, None).spec
    assert isinstance(own, AdapterSpec)
    assert {target.name.rsplit(".", 1)[-1] for target in own.targets} == {"v_proj"}
    assert own.base_hash == worker.config.base_hash


def test_without_profile_there_is_none(folder: Path) -> None:
    worker = open_worker(spec_of(folder))
    assert worker.profile(worker.users.target[0], ()) is None


def test_a_template_profile_is_made_of_the_history(folder: Path) -> None:
    worker = open_worker(spec_of(folder, "profile=template"))
    user = worker.users.target[0]
    history = worker.task.history(worker.users.vault(user).history())
    assert worker.profile(user, history) == template_profile(worker.task, history)
    assert worker.profile(user, history[:3]) != worker.profile(user, history)


def test_a_written_profile_comes_from_the_base_and_is_repeatable(folder: Path) -> None:
    worker = open_worker(spec_of(folder, "profile=llm", "prompt.profile_tokens=6"))
    user = worker.users.target[0]
    history = worker.task.history(worker.users.vault(user).history())
    written = worker.profile(user, history)
    assert written is not None
    assert worker.profile(user, history) == written
    assert len(worker.base.tokenizer.encode(written)) <= 8  # what was cut may be split otherwise


@dataclass(frozen=True)
class OwnProfile:
    """Users who wrote their profiles themselves."""

    text: str

    def vault(self, user: str) -> "OwnProfile":
        return self

    @property
    def profile(self) -> str:
        return self.text


@pytest.mark.parametrize(("kind", "expected"), [("template", "I like jazz"), ("none", None)])
def test_a_users_own_profile_wins_where_profiles_are_used(
    folder: Path, kind: str, expected: str | None
) -> None:
    worker = open_worker(spec_of(folder, f"profile={kind}"))
    own = replace(worker, users=OwnProfile("I like jazz"))  # type: ignore[arg-type]
    assert own.profile("anyone", ()) == expected


def saved_and_trained(spec: WorkerSpec) -> tuple[int, str]:
    """Tensors that autograd is told to keep while a worker trains a job, and the digest it ends in."""
    worker = open_worker(spec)
    job = fresh_job(worker.shared_spec, 0, 3)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        (found,) = worker.trainer.update_many([job])
    assert isinstance(found, TrainedAdapter)
    return len(saved), found.adapter.digest()


def test_a_worker_that_checkpoints_keeps_less_and_trains_to_the_same_bytes(folder: Path) -> None:
    spec = spec_of(folder)
    keeping, anew = (
        saved_and_trained(replace(spec, checkpointing=checkpointing))
        for checkpointing in (False, True)
    )
    assert anew[0] < keeping[0] / 2
    assert anew[1] == keeping[1]
