"""What a federation's config says about each of its rounds' plans.

A server builds its plans of this and a client holds them against it, so a server cannot send one client another clip
bound, layout, rotation or noise than its config says.
"""

from typing import Any

from fedoppu.common.adapters import Spec
from fedoppu.common.config import FederationConfig
from fedoppu.common.privacy import client_noise, sensitivity
from fedoppu.common.rotation import rotation_seed
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.shared_adapter import travelling


def agreed(config: FederationConfig, spec: Spec, round: int) -> dict[str, Any]:
    """Fields of a round's plan that follow from the config.

    With differential privacy the range is among them: it never moves, because nothing exact may move it.

    Args:
        config: Of the federation.
        spec: Of the shared adapter.
        round: From 1.
    """
    factors = travelling(config.shared.aggregation, round)
    private = config.privacy.mechanism != "none"
    fixed = {"value_range": float(config.encoding.value_range)} if private else {}
    return fixed | {
        "num_params": spec.num_params(factors),
        "factors": "".join(factors),
        "clip": float(config.encoding.clip),
        "word_bits": config.encoding.word_bits,
        "level_bits": config.encoding.level_bits,
        "max_weight": config.shared.max_weight,
        "rotation": rotation_seed(config, round),
        "metrics": not private,
        "hybrid": config.secagg.key_exchange == "hybrid",
    }


def agreed_noise(config: FederationConfig, plan: RoundPlan) -> float:
    """The noise_scale that follows from the config and the rest of a plan: levels, 0 where no client adds noise.

    Args:
        config: Of the federation.
        plan: Its own noise_scale is not read.

    Raises:
        UsageError: The plan's smallest cohort could be corrupt as a whole.
    """
    return client_noise(
        config.privacy,
        sensitivity(plan),
        floor=plan.min_cohort,
        corrupt=config.thresholds.corrupt,
    )


def range_bounds(clip: float) -> tuple[float, float]:
    """Least and largest range that a plan may have: 2 ** 24 around the clip bound.

    A finer one than float32 tells an update of that norm says nothing more of it, and with a
    coarser one nothing is left of an update. Servers keep to them, and clients refuse what does not.
    """
    return clip * 2.0**-24, clip * 2.0**24
