"""User-level differential privacy of the shared phase, as numbers: sensitivity, noise scales, what was spent.

The unit of privacy is the user: one client is one user, with weight 1 and one clipped vector a round. A client clips,
rotates, scales, clamps, rounds to levels and (distributed mode) adds integer noise; nothing comes after that but the
reduction modulo 2^w. So the noise is measured in levels, against the L2 norm of the *rounded* vector.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fedoppu.common.config import PrivacySettings
from fedoppu.common.errors import UsageError
from fedoppu.common.rounds import RoundPlan

Adjacency = Literal["add_remove", "zero_out"]
# Rotating and scaling in float32 may lengthen a vector: by 16 levels of a butterfly, 2^-24 each, and its norm's error.
_FLOAT_SLACK = 1 + 2.0**-16


@dataclass(frozen=True)
class PrivacySpent:
    """What has been spent so far; the unit of privacy is one user's whole history.

    Attributes:
        rounds: Rounds whose vectors were sent.
        delta: Of both epsilons; the chance of a cohort below the floor is in it.
        released: Epsilon against those who get the models.
        server: Epsilon against the server and the peers, who see a round's exact masked sum; infinite in the central
            modes, where the server sees it without noise.
        adjacency: "add_remove": one user is in the federation or not. "zero_out": one user's vectors are zero.
    """

    rounds: int
    delta: float
    released: float
    server: float
    adjacency: Adjacency


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
