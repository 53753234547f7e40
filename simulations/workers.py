"""What a worker process holds: one loaded base, and the users, prompts and settings of the federation it works for.

A worker is a pure function of its `WorkerSpec`, so any process can rebuild it and the result does not depend on which
process did the work. One base is kept loaded from one federation to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from fedoppu.client.devices import chosen_device, make_deterministic
from fedoppu.client.fresh import fresh_adapter
from fedoppu.client.jobs import LocalTrainer, Predictor
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.client.profile import template_profile, written_profile
from fedoppu.client.prompts import PromptBuilder
from fedoppu.client.tasks import TASKS, Task
from fedoppu.client.training import BatchedTrainer
from fedoppu.client.vault import HistoryItem
from fedoppu.common.adapters import Adapter, AdapterSpec
from fedoppu.common.config import Device, FederationConfig, PersonalSettings
from fedoppu.common.defaults import adapter_spec
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.virtual_users import VirtualUsers


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker needs to know; small and picklable.

    Attributes:
        base: pocket, a transformers folder, or a GGUF file.
        users: Folder of the virtual users.
        federation: Canonical bytes of the federation's config.
        personal: The personal phase, without any null.
        seed: Root of the run's random choices.
        threads: Intra-op threads of torch; part of the result.
        group_users: Users trained in one pass; part of the result.
        device: Where the base computes; part of the result.
        checkpointing: Whether the trainer saves memory for time; no part of the result.
    """

    base: str
    users: Path
    federation: bytes
    personal: PersonalSettings
    seed: int
    threads: int
    group_users: int
    device: Device = "cpu"
    checkpointing: bool = False


@dataclass(frozen=True)
class Worker:
    """A process's view of one federation."""

    spec: WorkerSpec
    config: FederationConfig
    task: Task
    base: LoadedBase
    trainer: LocalTrainer
    predictor: Predictor
    prompts: PromptBuilder
    users: VirtualUsers
    randomness: Randomness

    def profile(self, user: str, history: Sequence[HistoryItem]) -> str | None:
        """The profile that precedes the user's prompts, or None: the user's own, or one made from the history."""
        if self.config.profile == "none":
            return None
        own = self.users.vault(user).profile
        if own is not None or self.config.profile == "template":
            return own if own is not None else template_profile(self.task, history)
        return written_profile(self.task, history, self.prompts, self.predictor)

    @property
    def shared_spec(self) -> AdapterSpec:
        """Shapes of the shared adapter."""
        settings = self.config.shared.adapter
        return adapter_spec(self.base.facts, settings)

    def fresh_personal(self, owner: Randomness, parent: str | None) -> Adapter:
        """What the training of an owner's personal adapter starts from."""
        return fresh_adapter(self.base, self.spec.personal.adapter, owner, parent=parent)


@lru_cache(maxsize=1)
def _open_base(
    name: str, dtype: Literal["float32", "bfloat16"], device: torch.device
) -> LoadedBase:
    make_deterministic(device)
    return load_base(resolve_base(name), dtype=dtype, device=device)


@lru_cache(maxsize=1)
def open_worker(spec: WorkerSpec) -> Worker:
    """Builds the worker of a spec; the last one is kept."""
    torch.set_num_threads(spec.threads)
    config = FederationConfig.from_canonical(spec.federation)
    base = _open_base(spec.base, config.dtype, chosen_device(spec.device))
    task = TASKS[config.task]
    prompts = PromptBuilder(
        task,
        base.tokenizer,
        prompt=config.prompt,
        retriever=config.retriever,
        k=config.k,
        max_tokens=base.facts.max_tokens,
    )
    return Worker(
        spec=spec,
        config=config,
        task=task,
        base=base,
        trainer=BatchedTrainer(base, group=spec.group_users, checkpointing=spec.checkpointing),
        predictor=BatchedPredictor(base),
        prompts=prompts,
        users=VirtualUsers(spec.users),
        randomness=Randomness.from_seed(spec.seed),
    )
