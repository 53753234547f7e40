"""What a federation's config says about each of its rounds' plans.

A server builds its plans of this and a client holds them against it, so a server cannot send one client another clip
bound, layout or rotation than its config says.
"""

from typing import Any

from fedoppu.common.adapters import AdapterSpec
from fedoppu.common.config import FederationConfig
from fedoppu.common.rotation import rotation_seed
from fedoppu.common.shared_adapter import travelling


def agreed(config: FederationConfig, spec: AdapterSpec, round: int) -> dict[str, Any]:
    """Fields of a round's plan that follow from the config.

    Args:
        config: Of the federation.
        spec: Of the shared adapter.
        round: From 1.
    """
    factors = travelling(config.shared.aggregation, round)
    return {
        "num_params": spec.num_params(factors),
        "factors": "".join(factors),
        "clip": float(config.encoding.clip),
        "word_bits": config.encoding.word_bits,
        "level_bits": config.encoding.level_bits,
        "max_weight": config.shared.max_weight,
        "rotation": rotation_seed(config, round),
        "metrics": config.privacy.mechanism == "none",
        "hybrid": config.secagg.key_exchange == "hybrid",
    }
