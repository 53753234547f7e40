"""A public random rotation of an update, so that no coordinate stands out when it is rounded."""

from fedoppu.common.config import FederationConfig
from fedoppu.common.randomness import Randomness


def rotation_seed(config: FederationConfig, round: int) -> str:
    """Hex of a round's 32-byte rotation seed, from the federation's public seed; empty without rotation."""
    if not config.encoding.rotation:
        return ""
    return Randomness.from_seed(config.public_seed).secret("rotation", round).hex()
