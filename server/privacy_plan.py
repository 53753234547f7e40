"""Before a federation with differential privacy is begun: which noise it needs, and whether a signal is left.

It computes what the server would: same sensitivity, scales, epsilons and refusals.
"""

import math
from dataclasses import dataclass, field, replace

from fedoppu.common.accounting import has_pld
from fedoppu.common.config import EncodingSettings, PrivacySettings, ThresholdSettings, require
from fedoppu.common.errors import UsageError
from fedoppu.common.matrix_factorization import error_ratio, largest_scale
from fedoppu.common.privacy import (
    Participation,
    PrivacySpent,
    affordable,
    amplifies,
    client_noise,
    largest_cohort,
    needed_multiplier,
    require_cohorts,
    require_scales,
    sensitivity,
    server_noise,
    spent,
    steady_ratio,
)
from fedoppu.common.quantization import LIMB_MAX, noise_tail
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.thresholds import plan_thresholds


@dataclass(frozen=True)
class Federation:
    """What is asked about.

    Attributes:
        users: Members of the federation.
        cohort: Members in a round, expected or exactly.
        rounds: Of the shared phase.
        parameters: That travel in a round (d).
        privacy: With a mechanism, and a budget or a noise multiplier.
        thresholds: Floors of a round.
        encoding: How updates become integers.
    """

    users: int = 1000
    cohort: int = 100
    rounds: int = 100
    parameters: int = 10_000
    privacy: PrivacySettings = field(default_factory=lambda: PrivacySettings("distributed"))
    thresholds: ThresholdSettings = field(default_factory=ThresholdSettings)
    encoding: EncodingSettings = field(default_factory=EncodingSettings)

    def __post_init__(self) -> None:
        """Check that they go together."""
        if self.privacy.mechanism == "none":
            raise UsageError(
                "privacy.mechanism=none promises nothing, so there is nothing to plan",
                hint="choose central, distributed or dp_ftrl",
            )
        require("users", self.users, 2, 1_000_000_000)
        require("cohort", self.cohort, 2)
        require("rounds", self.rounds, 1, 1_000_000)
        require("parameters", self.parameters, 1, 1_000_000_000_000)
        if self.cohort > self.users:
            raise UsageError(
                f"cohort must be at most the number of users, {self.users}, got {self.cohort}",
                hint="lower cohort or raise users",
            )
        if self.privacy.mechanism == "dp_ftrl":
            self._check_turns()

    def _check_turns(self) -> None:
        if self.privacy.sampling == "poisson":
            raise UsageError(
                "dp_ftrl takes members in turn, which is no Poisson sampling",
                hint="set sampling=fixed, or choose another mechanism",
            )
        most = self.users // self.cohort
        if self.privacy.separation > most:
            raise UsageError(
                f"privacy.separation must be at most users / cohort = {most}, got {self.privacy.separation}",
                hint="lower separation or cohort, or raise users",
            )

    def after(self, rounds: int) -> Participation:
        """Who took part after some rounds; without turns a member may have been in every one."""
        return Participation(
            members=self.users,
            cohort=self.cohort,
            floor=self.thresholds.least,
            rounds=rounds,
            most=math.ceil(rounds / self.privacy.separation),
        )


@dataclass(frozen=True)
class PrivacyPlan:
    """The answer.

    Attributes:
        noise_multiplier: z: the noise's deviation, of the most that one user can change a sum by.
        affordable_rounds: Rounds before the budget ends; all, if there is none.
        spent: After these.
        sensitivity: The most that one user can change a sum by, levels, L2.
        client_scale: Noise of each client, levels; 0 in the central modes.
        total_scale: Noise in a sum, levels; with dp_ftrl, in the last round's, which has most.
        effective_multiplier: total_scale / sensitivity; with dp_ftrl, of the independent noise that would leave the
            sums over the rounds the same error.
        signal: n / (effective_multiplier sqrt(parameters)): an update at the clip bound, over the noise of the mean.
        most_parameters: With more of them the noise is larger than the signal.
        least_cohort: With as many members the signal is as large as the noise.
        word_values: Of a word.
        used_values: Of these a sum may take, its noise included.
        amplified: Whether sampling lowers the released epsilon.
        exact_accounting: Whether sampled epsilons come from privacy loss distributions (the [dp] extra), and not from
            the larger bounds by Renyi divergences.
    """

    noise_multiplier: float
    affordable_rounds: int
    spent: PrivacySpent
    sensitivity: float
    client_scale: float
    total_scale: float
    effective_multiplier: float
    signal: float
    most_parameters: int
    least_cohort: int
    word_values: int
    used_values: int
    amplified: bool
    exact_accounting: bool

    @property
    def fits(self) -> bool:
        """Whether the words hold every sum (rule 10)."""
        return self.used_values <= self.word_values

    @property
    def survives(self) -> bool:
        """Whether the signal is at least as large as the noise."""
        return self.signal >= 1


def plan_privacy(federation: Federation) -> PrivacyPlan:
    """Answers for a federation.

    Raises:
        UsageError: It would be refused: cohorts below the floor, too little noise for integers, a budget that no noise
            can keep.
    """
    privacy, participation = federation.privacy, federation.after(federation.rounds)
    if privacy.sampling == "poisson":
        require_cohorts(participation, privacy.delta)
    z = needed_multiplier(privacy, participation, steady=True)
    privacy = replace(privacy, noise_multiplier=z)
    plan = _round_plan(federation)
    bound = sensitivity(plan)
    client = client_noise(
        privacy, bound, floor=plan.min_cohort, corrupt=federation.thresholds.corrupt
    )
    total = _total_scale(federation, privacy, bound, client)
    affordable_rounds = _affordable_rounds(federation, privacy)
    require_scales(total, client or math.inf)
    effective = total / bound
    if privacy.mechanism == "dp_ftrl":
        effective = z * math.sqrt(error_ratio(federation.rounds, privacy.separation))
    most = (federation.cohort / effective) ** 2
    return PrivacyPlan(
        noise_multiplier=z,
        affordable_rounds=affordable_rounds,
        spent=spent(privacy, federation.after(affordable_rounds), steady=True),
        sensitivity=bound,
        client_scale=client,
        total_scale=total,
        effective_multiplier=effective,
        signal=math.sqrt(most / federation.parameters),
        most_parameters=math.floor(most),
        least_cohort=math.ceil(effective * math.sqrt(federation.parameters)),
        word_values=1 << plan.word_bits,
        used_values=_used_values(federation, plan, total),
        amplified=amplifies(privacy, steady=True),
        exact_accounting=has_pld(),
    )


def _affordable_rounds(federation: Federation, privacy: PrivacySettings) -> int:
    """How many of the rounds the budget lasts for."""
    low, high = 0, federation.rounds
    if affordable(privacy, federation.after(high), steady=True):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        enough = affordable(privacy, federation.after(middle), steady=True)
        low, high = (middle, high) if enough else (low, middle)
    return low


def _round_plan(federation: Federation) -> RoundPlan:
    """A round of the expected cohort."""
    thresholds = plan_thresholds(federation.cohort, federation.thresholds)
    encoding = federation.encoding
    return RoundPlan(
        run_id="",
        round=1,
        attempt=0,
        config_hash="",
        roster_hash="",
        model_hash="",
        num_params=federation.parameters,
        factors="",
        clip=encoding.clip,
        value_range=encoding.value_range,
        word_bits=encoding.word_bits,
        level_bits=encoding.level_bits,
        max_weight=1,
        threshold=thresholds.threshold,
        neighbours=thresholds.neighbours,
        min_cohort=thresholds.min_cohort,
        max_drops=thresholds.max_drops,
        metrics=False,
    )


def _total_scale(
    federation: Federation, privacy: PrivacySettings, bound: float, client: float
) -> float:
    """Of the noise in the sum of a cohort of which nobody drops, levels."""
    z = privacy.noise_multiplier or 0.0
    if privacy.mechanism == "distributed" and privacy.sampling == "poisson":
        return z * bound * math.sqrt(steady_ratio(federation.thresholds, federation.users))
    if privacy.mechanism == "distributed":
        return client * math.sqrt(federation.cohort)
    if privacy.mechanism == "dp_ftrl":
        return z * bound * largest_scale(federation.rounds, privacy.separation)
    return server_noise(privacy, bound)


def _used_values(federation: Federation, plan: RoundPlan, total: float) -> int:
    """Levels of the largest cohort's sum, n (2^level_bits - 1), and the noise's tails."""
    asked = largest_cohort(federation.privacy, federation.after(federation.rounds))
    tail = noise_tail(replace(plan, noise_scale=total / math.sqrt(asked)), asked)
    return asked * int(max((1 << plan.level_bits) - 1, LIMB_MAX)) + 2 * tail
