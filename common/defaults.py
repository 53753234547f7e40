"""Defaults that depend on the task and on the size of the base, and the federations that a run stands for.

The values were chosen on base users, never on those who are scored; the paper's own are in
`simulations/configs/paper.yaml` (Tan et al. 2024, https://arxiv.org/abs/2402.04401).
"""

import math
from dataclasses import dataclass, replace

from fedoppu.common.base import BaseFacts
from fedoppu.common.config import (
    AdapterSettings,
    Aggregation,
    FederationConfig,
    PersonalSettings,
    RunConfig,
    SharedSettings,
    TrainingSettings,
)

SMALL = 20_000_000
LARGE = 1_000_000_000
ALL_LINEAR = ("all-linear",)
# tasks whose history is trained on as text to be written, not as labels to be chosen
GENERATIVE = ("LaMP_1", "LaMP_4", "LaMP_5", "LaMP_7")
PASSES = 3


@dataclass(frozen=True)
class _Defaults:
    """What replaces None in adapter and training settings."""

    targets: tuple[str, ...]
    learning_rate: float
    epochs: int = 1
    newest: int = 0


def _shared_defaults(parameters: int, aggregation: Aggregation) -> _Defaults:
    # with A frozen, B alone needs about ten times the learning rate
    factor = 10.0 if aggregation == "ffa" else 1.0
    if parameters < SMALL:
        return _Defaults(ALL_LINEAR, 3e-3 * factor)
    if parameters < LARGE:
        return _Defaults(ALL_LINEAR, 3e-4 * factor)
    return _Defaults(("q_proj", "k_proj", "v_proj"), 1e-4 * factor)


def _personal_defaults(parameters: int, task: str) -> _Defaults:
    attention = ("q_proj", "v_proj")
    if parameters >= LARGE:
        return _Defaults(attention, 1e-4, epochs=2)
    if parameters >= SMALL:
        generative = _Defaults(ALL_LINEAR, 1e-3, epochs=2, newest=48)
        return generative if task in GENERATIVE else _Defaults(attention, 1e-3, epochs=4, newest=64)
    return (
        _Defaults(ALL_LINEAR, 1e-3, epochs=5)
        if task in GENERATIVE
        else _Defaults(attention, 3e-3, epochs=5)
    )


def _fill_adapter(settings: AdapterSettings, defaults: _Defaults) -> AdapterSettings:
    return replace(settings, targets=settings.targets or defaults.targets)


def _fill_training(settings: TrainingSettings, defaults: _Defaults) -> TrainingSettings:
    return replace(
        settings,
        learning_rate=defaults.learning_rate
        if settings.learning_rate is None
        else settings.learning_rate,
        epochs=defaults.epochs if settings.epochs is None else settings.epochs,
        newest=defaults.newest if settings.newest is None else settings.newest,
    )


def shared_settings(run: RunConfig, base: BaseFacts) -> SharedSettings:
    """The shared phase without any null."""
    defaults = _shared_defaults(base.num_parameters, run.shared.aggregation)
    training = _fill_training(run.shared.training, defaults)
    return replace(
        run.shared, adapter=_fill_adapter(run.shared.adapter, defaults), training=training
    )


def personal_settings(run: RunConfig, base: BaseFacts, task: str) -> PersonalSettings:
    """The personal phase of a task without any null."""
    defaults = _personal_defaults(base.num_parameters, task)
    training = _fill_training(run.personal.training, defaults)
    return replace(
        run.personal, adapter=_fill_adapter(run.personal.adapter, defaults), training=training
    )


def rounds_of(run: RunConfig, base_users: int) -> int:
    """Rounds of the shared phase: as set, or so many that the base users' items are passed over three times."""
    return (
        run.rounds
        if run.rounds is not None
        else math.ceil(PASSES * base_users / min(run.cohort, base_users))
    )


def federation(
    run: RunConfig, base: BaseFacts, *, task: str, k: int, profile: str, base_users: int, seed: int
) -> FederationConfig:
    """What all parties of one federation of a run agree on."""
    return FederationConfig(
        task=task,
        k=k,
        profile=profile,  # type: ignore[arg-type]
        base_hash=base.hash,
        rounds=rounds_of(run, base_users),
        cohort=min(run.cohort, base_users),
        public_seed=seed,
        dtype=run.dtype,
        shared=shared_settings(run, base),
        prompt=run.prompt,
        retriever=run.retriever,
        encoding=run.encoding,
        thresholds=run.thresholds,
        secagg=run.secagg,
        privacy=run.privacy,
        plain_updates=run.research.plain_updates,
    )
