"""User-level differential privacy of the shared phase: sensitivity, noise scales, and what was spent.

The unit of privacy is the user: one client is one user, with weight 1 and one clipped vector a round. A client clips,
rotates, scales, clamps, rounds to levels and (distributed mode) adds integer noise; nothing comes after that but the
reduction modulo 2^w. So noise is measured in levels, against the L2 norm of the *rounded* vector.

Three views, three epsilons (rule 14 of the spec of secure aggregation):

- *released*: whoever gets the models, and does not know who was in a round's cohort. Poisson sampling amplifies it.
- *peers*: members also see the cohorts that they are in. Never amplified.
- *server*: sees cohorts and each round's sum as the clients sent it. Never amplified, and infinite in the central modes
  and in dp_ftrl, where that sum is exact: there the server is trusted with sums, and with nothing else.

Distributed noise and Poisson sampling: the variance of the noise would tell how many members added some, and so, in a
long vector, whether one more was there. The released epsilon is amplified only if the server tops the noise up to a
variance that is the same in every round (`top_up`).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedoppu.common.accounting import (
    calibrate,
    gaussian_epsilon,
    poisson_excess,
    poisson_shortfall,
    sampled_epsilon,
)
from fedoppu.common.config import PrivacySettings, ThresholdSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.thresholds import allowed_drops

Adjacency = Literal["add_remove", "zero_out"]
# Rotating and scaling in float32 may lengthen a vector: by 16 levels of a butterfly, 2^-24 each, and its norm's error.
_FLOAT_SLACK = 1 + 2.0**-16


LEAST_TOTAL_SCALE = 16.0  # levels; see require_scales
LEAST_CLIENT_SCALE = 4.0
SHORTFALL_SHARE = 0.1


@dataclass(frozen=True)
class PrivacySpent:
    """What has been spent so far; the unit of privacy is one user's whole history.

    Attributes:
        rounds: Rounds whose vectors were sent.
        delta: Of all epsilons; the chance of a cohort below the floor is in it.
        released: Epsilon against those who get the models.
        server: Epsilon against the server, which sees each sum as it was sent: infinite if that is exact.
        adjacency: Of `released`. "add_remove": one user is in the federation or not. "zero_out": one user's vectors
            are zero. The others are always "zero_out", since who takes part is no secret to them.
        peers: Epsilon against members, who get the models and see the cohorts.
    """

    rounds: int
    delta: float
    released: float
    server: float
    adjacency: Adjacency
    peers: float


@dataclass(frozen=True)
class Participation:
    """Who takes part, and how often.

    Attributes:
        members: Members of the roster that may be asked (N); the most, if it changed between the rounds.
        cohort: Members asked in a round: exactly (fixed), or expected (poisson: each with rate q = cohort / members).
        floor: Fewest members in a cohort; with poisson, a smaller one is no round.
        rounds: Rounds, or attempts at one, in which vectors were sent or will be.
        most: Most of these rounds that any one member sent a vector in.
        fewest: Least N of any of the rounds, if it changed; 0 if it did not.
    """

    members: int
    cohort: int
    floor: int
    rounds: int
    most: int
    fewest: int = 0

    @property
    def rate(self) -> float:
        """Largest chance of a member to be in a Poisson cohort (q)."""
        return self.cohort / (self.fewest or self.members)


def sensitivity(plan: RoundPlan) -> float:
    """Largest L2 norm of one client's rounded vector, in levels from the level of zero.

    clip * M / value_range, and sqrt(num_params) more because each coordinate is rounded away by less than one level;
    never above M sqrt(num_params), as each coordinate is clamped to +- M.

    Guarantee: it bounds what a client sends if it clips before it rotates and rounds, as client/release.py does. It
    binds honest clients only: whoever sends something else gives up its own privacy, and nobody else's.
    """
    middle = (1 << (plan.level_bits - 1)) - 1
    rounding = math.sqrt(plan.num_params)
    clipped = plan.clip * _FLOAT_SLACK * middle / plan.value_range
    return min(clipped + rounding, middle * rounding)


def client_noise(
    privacy: PrivacySettings, sensitivity: float, *, floor: int, corrupt: int
) -> float:
    """Scale of the discrete Gaussian that each client adds, in levels; 0 unless the mechanism is distributed.

    The noise in a sum is that of its honest survivors, at least floor - corrupt of them, so each adds
    z * sensitivity / sqrt(floor - corrupt).

    Args:
        privacy: With its noise_multiplier z set.
        sensitivity: Of the plan.
        floor: Fewest survivors that a client unmasks (the plan's min_cohort).
        corrupt: Members assumed corrupt; all may be among the survivors, adding no noise.

    Raises:
        UsageError: No honest survivor is left to add noise.
    """
    if privacy.mechanism != "distributed":
        return 0.0
    if floor <= corrupt:
        raise UsageError(
            f"distributed noise needs more survivors than corrupt members, got at least {floor} "
            f"survivors and {corrupt} corrupt",
            hint="raise cohort or thresholds.floor, or lower thresholds.corrupt",
        )
    return _multiplier(privacy) * sensitivity / math.sqrt(floor - corrupt)


def server_noise(privacy: PrivacySettings, sensitivity: float) -> float:
    """Scale of the discrete Gaussian that the server adds to a sum, in levels; 0 unless central."""
    return _multiplier(privacy) * sensitivity if privacy.mechanism == "central" else 0.0


def _multiplier(privacy: PrivacySettings) -> float:
    if privacy.noise_multiplier is None:
        raise UsageError(
            "privacy.noise_multiplier is not set", hint="set it, or privacy.epsilon to derive it"
        )
    return privacy.noise_multiplier


def top_up(target: float, client_scale: float, survivors: int) -> float:
    """Scale of the noise that the server adds so that the sum's has variance target^2 whoever dropped, in levels.

    Raises:
        UsageError: The clients added more already.
    """
    missing = target**2 - survivors * client_scale**2
    if missing < -1e-9 * target**2:
        raise UsageError(
            f"the noise of {survivors} clients, {client_scale:g} levels each, is above the target of {target:g}"
        )
    return math.sqrt(max(0.0, missing))


def steady_ratio(thresholds: ThresholdSettings, members: int) -> float:
    """Variance of the noise that clients may add in all, of the target's z^2 sensitivity^2, in the worst cohort.

    Each adds for the fewest survivors of its round's plan, less the corrupt; if nobody drops, and nobody is corrupt,
    their sum has more. Up to this the server tops up every round's (distributed noise, Poisson sampling).

    Args:
        thresholds: Of the federation.
        members: In the roster; a Poisson cohort may have any number of them.
    """
    least, worst = thresholds.least, 1.0
    for asked in range(least, members + 1):
        survivors = max(asked - allowed_drops(asked, thresholds.max_drop), least)
        worst = max(worst, asked / (survivors - thresholds.corrupt))
        beyond = asked * (1 - thresholds.max_drop) - thresholds.corrupt
        if beyond > 0 and asked / beyond <= worst * (1 + 1e-12):
            break  # no larger cohort's ratio is above this, which falls
    return worst


def require_scales(total: float, client: float = math.inf) -> None:
    """Refuses noise so small that the integers show: below it the accounting of the Gaussian would be off.

    A sum of discrete Gaussians of 4 levels differs from one of them by a factor of at most 1 + 1e-65 for each element
    (`accounting.sum_excess`). One of 16 levels has the Renyi divergences of the Gaussian (the sum over the integers of
    its density, moved by any real number, is 1 +- 2 exp(-2 pi^2 scale^2)), and, in one dimension and one round, where
    it shows most, its epsilon to 1e-3; 2e-2 at 2 levels.

    Args:
        total: Scale of the noise in a sum, levels.
        client: Scale of what each client adds, levels, where clients do.

    Raises:
        UsageError: A scale is too small.
    """
    for name, scale, least in (
        ("a sum", total, LEAST_TOTAL_SCALE),
        ("each client", client, LEAST_CLIENT_SCALE),
    ):
        if scale < least:
            raise UsageError(
                f"the noise of {name} must have a scale of at least {least:g} levels to be accounted "
                f"for as a Gaussian, got {scale:.3g}",
                hint="raise encoding.level_bits or privacy.noise_multiplier, or lower encoding.value_range",
            )


def spent(
    privacy: PrivacySettings, participation: Participation, *, steady: bool = False
) -> PrivacySpent:
    """What rounds of a federation cost, all of them together.

    Each member sent a vector in at most `participation.most` of them, so without amplification they are that many
    Gaussian mechanisms; dp_ftrl is the same by `matrix_factorization`, if a member's rounds are at least
    privacy.separation apart, which is the caller's to see to. Sampling is taken at its word: the server must draw
    cohorts as configured, and Poisson cohorts must be published to no one who only gets the models.

    Args:
        privacy: With its noise_multiplier set. Without a mechanism everything is infinite, once there was a round.
        participation: So far, or planned.
        steady: Distributed only: the server topped the noise up to the same variance in every round.
    """
    z = math.inf if participation.rounds == 0 else _noise(privacy)
    unamplified = gaussian_epsilon(z, participation.most, privacy.delta) if z > 0 else math.inf
    exact = privacy.mechanism != "distributed" and participation.rounds > 0
    result = PrivacySpent(
        rounds=participation.rounds,
        delta=privacy.delta,
        released=unamplified,
        server=math.inf if exact else unamplified,
        adjacency="zero_out",
        peers=unamplified,
    )
    if privacy.sampling != "poisson" or z == 0:
        return result
    result = replace(result, delta=privacy.delta + _shortfall(participation))
    if not amplifies(privacy, steady=steady):
        return result
    released = sampled_epsilon(z, participation.rate, participation.rounds, privacy.delta)
    return replace(result, released=released, adjacency="add_remove")


def amplifies(privacy: PrivacySettings, *, steady: bool = False) -> bool:
    """Whether sampling lowers the released epsilon."""
    sampled = privacy.mechanism == "central" or (privacy.mechanism == "distributed" and steady)
    return sampled and privacy.sampling == "poisson"


def affordable(
    privacy: PrivacySettings, participation: Participation, *, steady: bool = False
) -> bool:
    """Whether the rounds, the next one included, stay within the budget; always, if there is none."""
    if privacy.epsilon is None or privacy.mechanism == "none":
        return True
    return spent(privacy, participation, steady=steady).released <= privacy.epsilon


def needed_multiplier(
    privacy: PrivacySettings, participation: Participation, *, steady: bool = False
) -> float:
    """Least noise multiplier with which all rounds are affordable; the configured one, if there is one.

    Raises:
        UsageError: Neither a multiplier nor a budget is set, or no multiplier is enough.
    """
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.epsilon is None:
        raise UsageError(
            f"privacy.mechanism={privacy.mechanism} needs a budget or an amount of noise",
            hint="set privacy.epsilon or privacy.noise_multiplier",
        )
    amplified = amplifies(privacy, steady=steady)
    return calibrate(
        privacy.epsilon,
        privacy.delta,
        rate=participation.rate if amplified else 1.0,
        compositions=participation.rounds if amplified else participation.most,
    )


def require_cohorts(participation: Participation, delta: float) -> None:
    """Refuses a Poisson plan in which cohorts below the floor are likely enough to matter for delta.

    A round that cannot be held says that few were drawn; its chance, over all rounds, is added to delta, and may be at
    most a tenth of it.

    Raises:
        UsageError: It is more.
    """
    shortfall, most = _shortfall(participation), SHORTFALL_SHARE * delta
    if shortfall > most:
        raise UsageError(
            f"Poisson cohorts of {participation.cohort} expected members fall below the floor of "
            f"{participation.floor} in {participation.rounds} rounds with probability "
            f"{shortfall:.2g}, above {most:.2g}, a tenth of delta",
            hint="raise cohort, lower thresholds.floor, or set privacy.sampling=fixed",
        )


def largest_cohort(privacy: PrivacySettings, participation: Participation) -> int:
    """Members of the largest cohort, save with probability delta / 10 over all rounds: words must hold its sum.

    Args:
        privacy: Its sampling and delta.
        participation: Planned.
    """
    if privacy.sampling != "poisson":
        return participation.cohort
    low, high = participation.cohort, participation.members
    allowed = SHORTFALL_SHARE * privacy.delta / max(participation.rounds, 1)
    while low < high:
        middle = (low + high) // 2
        enough = poisson_excess(participation.members, participation.rate, middle) <= allowed
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _shortfall(participation: Participation) -> float:
    """Chance that any round's cohort is below the floor, at most (the sum over the rounds).

    It adds to delta as it stands, without exp(epsilon): one user turns a short cohort into a round only if one member
    lacked, and then only with chance `rate`.
    """
    rate = participation.cohort / participation.members  # of the most, whose cohorts vary most
    one = poisson_shortfall(participation.members, rate, participation.floor)
    return min(1.0, participation.rounds * one)


def _noise(privacy: PrivacySettings) -> float:
    """z; 0 without a mechanism."""
    return 0.0 if privacy.mechanism == "none" else _multiplier(privacy)
