"""Defaults that depend on the task and on the size of the base, and the federations that a run stands for.

The values were chosen on base users, never on those who are scored; the paper's own are in
`simulations/configs/paper.yaml` (Tan et al. 2024, https://arxiv.org/abs/2402.04401).
"""

import math
from dataclasses import dataclass, replace

from fedoppu.common.adapter_kinds import Ia3Spec, PromptSpec
from fedoppu.common.adapter_settings import AdapterKind, AdapterSettings, PersonalAdapterSettings
from fedoppu.common.adapters import AdapterSpec, Spec
from fedoppu.common.base import BaseFacts
from fedoppu.common.config import (
    Aggregation,
    EncodingSettings,
    FederationConfig,
    PersonalSettings,
    PrivacySettings,
    RunConfig,
    SharedSettings,
    TrainingSettings,
)
from fedoppu.common.errors import UsageError
from fedoppu.common.privacy import Participation, needed_multiplier, require_cohorts
from fedoppu.common.shared_adapter import travelling

SMALL = 20_000_000
LARGE = 1_000_000_000
ALL_LINEAR = ("all-linear",)
SCALED = ("k_proj", "v_proj", "down_proj")
IA3_RATE, SMALL_IA3_RATE, PROMPT_RATE = 3e-3, 3e-2, 3e-2
# tasks whose history is trained on as text to be written, not as labels to be chosen
GENERATIVE = ("LaMP_1", "LaMP_4", "LaMP_5", "LaMP_7")
PASSES = 3
# with differential privacy: the range, in deviations of a rotated update's coordinates
RANGE_DEVIATIONS = 6.0


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


def _of_kind(defaults: _Defaults, kind: AdapterKind, parameters: int) -> _Defaults:
    """The defaults for another kind: few numbers, each of which must move far.

    (IA)^3: the targets and 3e-3 of its paper (Liu et al. 2022, section 3.3); 3e-2 for small bases, chosen on generated
    base users, as ours for LoRA are.
    Prompt tuning: 3e-2, as in peft's examples of prompt tuning with AdamW; its paper's .3 is Adafactor's (Lester et al.
    2021, section 3).
    """
    if kind == "ia3":
        rate = SMALL_IA3_RATE if parameters < SMALL else IA3_RATE
        return replace(defaults, targets=SCALED, learning_rate=rate)
    return replace(defaults, targets=(), learning_rate=PROMPT_RATE)


def _fill_training(settings: TrainingSettings, defaults: _Defaults) -> TrainingSettings:
    return replace(
        settings,
        learning_rate=defaults.learning_rate
        if settings.learning_rate is None
        else settings.learning_rate,
        epochs=defaults.epochs if settings.epochs is None else settings.epochs,
        newest=defaults.newest if settings.newest is None else settings.newest,
    )


def adapter_spec(base: BaseFacts, settings: AdapterSettings) -> AdapterSpec:
    """The shapes of a LoRA adapter on a base.

    Raises:
        BaseModelError: The base lacks a module that the settings name; the message lists its own.
    """
    return AdapterSpec.from_base(
        base, settings.targets or (), rank=settings.rank, alpha=settings.alpha
    )


def personal_spec(base: BaseFacts, settings: PersonalAdapterSettings) -> Spec:
    """The shapes of a personal adapter on a base.

    Raises:
        BaseModelError: The base lacks a module that the settings name, or has no room for the virtual tokens.
    """
    targets = settings.targets or ()
    if settings.kind == "prompt":
        return PromptSpec.from_base(base, settings.tokens)
    if settings.kind == "ia3":
        return Ia3Spec.from_base(base, targets, feedforward=settings.feedforward)
    return AdapterSpec.from_base(base, targets, rank=settings.rank, alpha=settings.alpha)


def shared_settings(run: RunConfig, base: BaseFacts) -> SharedSettings:
    """The shared phase without any null."""
    defaults = _shared_defaults(base.num_parameters, run.shared.aggregation)
    training = _fill_training(run.shared.training, defaults)
    settings = run.shared.adapter
    adapter = replace(settings, targets=settings.targets or defaults.targets)
    return replace(run.shared, adapter=adapter, training=training)


def personal_settings(run: RunConfig, base: BaseFacts, task: str) -> PersonalSettings:
    """The personal phase of a task without any null."""
    settings = run.personal.adapter
    defaults = _personal_defaults(base.num_parameters, task)
    if settings.kind != "lora":
        defaults = _of_kind(defaults, settings.kind, base.num_parameters)
    adapter = replace(settings, targets=settings.targets or defaults.targets or None)
    training = _fill_training(run.personal.training, defaults)
    return replace(run.personal, adapter=adapter, training=training)


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
    """What all parties of one federation of a run agree on.

    With differential privacy each client has weight 1, the noise multiplier is resolved, and the range of a rotated
    update follows from the clip bound.

    Raises:
        UsageError: The privacy settings contradict each other or the rest.
    """
    shared, rounds = shared_settings(run, base), rounds_of(run, base_users)
    cohort, encoding, privacy = min(run.cohort, base_users), run.encoding, run.privacy
    check_privacy(run)
    if privacy.mechanism != "none":
        # no loss travels, so no item is held out for one
        shared = replace(shared, max_weight=1, held_out=0)
        encoding = _private_encoding(encoding, shared, base)
        planned = Participation(
            members=base_users,
            cohort=cohort,
            floor=run.thresholds.least,
            rounds=rounds,
            most=math.ceil(rounds / privacy.separation),
        )
        privacy = resolve_privacy(privacy, planned)
    return FederationConfig(
        task=task,
        k=k,
        profile=profile,  # type: ignore[arg-type]
        base_hash=base.hash,
        rounds=rounds,
        cohort=cohort,
        public_seed=seed,
        dtype=run.dtype,
        shared=shared,
        prompt=run.prompt,
        retriever=run.retriever,
        encoding=encoding,
        thresholds=run.thresholds,
        secagg=run.secagg,
        privacy=privacy,
        plain_updates=run.research.plain_updates,
    )


# --- differential privacy ------------------------------------------------------------------------


def check_privacy(run: RunConfig) -> None:
    """Whether the privacy settings go together.

    Raises:
        UsageError: They do not; the message says what to set.
    """
    privacy = run.privacy
    if privacy.mechanism == "none":
        given = [
            name for name in ("epsilon", "noise_multiplier") if vars(privacy)[name] is not None
        ]
        if given:
            raise UsageError(
                f"privacy.{given[0]} is set, but privacy.mechanism is none",
                hint="set privacy.mechanism to central, distributed or dp_ftrl",
            )
        if privacy.sampling == "poisson":
            raise UsageError(
                "privacy.sampling=poisson amplifies nothing without a privacy.mechanism",
                hint="set privacy.mechanism, or privacy.sampling=fixed",
            )
        return
    if run.research.plain_updates:
        raise UsageError(
            "research.plain_updates cannot be private: the server would see each update in clear",
            hint="set privacy.mechanism=none or research.plain_updates=false",
        )
    if privacy.mechanism == "dp_ftrl" and privacy.sampling == "poisson":
        raise UsageError(
            "privacy.mechanism=dp_ftrl takes members in turn, which is no Poisson sampling",
            hint="set privacy.sampling=fixed",
        )
    if privacy.mechanism == "dp_ftrl" and run.shared.aggregation == "alternating":
        raise UsageError(
            "privacy.mechanism=dp_ftrl correlates the noise of all rounds, and alternating rounds "
            "move different factors",
            hint="set shared.aggregation=ffa or fedavg",
        )
    if privacy.mechanism != "dp_ftrl" and privacy.separation != 1:
        raise UsageError(
            "privacy.separation is for privacy.mechanism=dp_ftrl alone",
            hint="set privacy.separation=1",
        )


def resolve_privacy(privacy: PrivacySettings, planned: Participation) -> PrivacySettings:
    """The settings with a noise multiplier: as set, or the least that keeps all rounds within epsilon.

    Distributed noise under Poisson sampling counts as amplified, because the server tops it up to the same variance in
    every round (server/privacy.py).

    Args:
        privacy: With a mechanism, and with epsilon or a noise multiplier.
        planned: Of all rounds.

    Raises:
        UsageError: Neither is set or no noise is enough; the groups of dp_ftrl are smaller than a cohort; or Poisson
            cohorts are too likely to be too small.
    """
    if planned.members // privacy.separation < planned.cohort:
        raise UsageError(
            f"privacy.separation={privacy.separation} makes groups of "
            f"{planned.members // privacy.separation} of {planned.members} members, a cohort has "
            f"{planned.cohort}",
            hint="lower cohort or privacy.separation, or take more base users",
        )
    if privacy.sampling == "poisson":
        require_cohorts(planned, privacy.delta)
    return replace(privacy, noise_multiplier=needed_multiplier(privacy, planned, steady=True))


def _private_encoding(
    encoding: EncodingSettings, shared: SharedSettings, base: BaseFacts
) -> EncodingSettings:
    """The encoding with a range that fits every update and never moves.

    A rotation spreads a vector of norm `clip` to d coordinates of about clip / sqrt(d); the range is six of those. A
    wider one costs nothing but the rounding, which is small beside the noise. Without a rotation the range stays as it
    was set.
    """
    if not encoding.rotation:
        return encoding
    adapter = shared.adapter
    spec = adapter_spec(base, adapter)
    moves = [travelling(shared.aggregation, round_number) for round_number in (1, 2)]
    fewest = min(spec.num_params(factors) for factors in moves)
    return replace(encoding, value_range=fitting_range(encoding.clip, fewest))


def fitting_range(clip: float, parameters: int) -> float:
    """Value range that a rotated update of L2 norm `clip` stays within, to three digits."""
    return float(f"{RANGE_DEVIATIONS * clip / math.sqrt(parameters):.3g}")
