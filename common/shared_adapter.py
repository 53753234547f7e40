"""The shared adapter of a federation: where it starts, what of it travels, how a mean is applied.

With `ffa` A is derived from the federation's public seed by every party and never travels, in
either direction (Sun et al. 2024, https://arxiv.org/abs/2403.12313). With `alternating` B moves in
odd rounds and A in even ones (Chen et al. 2025, https://arxiv.org/abs/2502.01755). Both make the
mean of the factors the mean of the products; with `fedavg`, where both move, it is not.
"""

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.adapters import BOTH, Adapter, AdapterSpec, Factor, initial_adapter
from fedoppu.common.config import Aggregation
from fedoppu.common.randomness import Randomness

Vector = NDArray[np.float32] | NDArray[np.float64]


def travelling(aggregation: Aggregation, round_number: int) -> tuple[Factor, ...]:
    """Factors that are trained and travel in a round; rounds count from 1."""
    if aggregation == "fedavg":
        return BOTH
    if aggregation == "ffa":
        return ("B",)
    return ("B",) if round_number % 2 else ("A",)


def sent_down(aggregation: Aggregation) -> tuple[Factor, ...]:
    """Factors that the server sends: those that a client cannot derive itself."""
    return ("B",) if aggregation == "ffa" else BOTH


def initial_shared(spec: AdapterSpec, public_seed: int) -> Adapter:
    """The shared adapter before the first round: a function of the federation's public seed."""
    return initial_adapter(spec, Randomness.from_seed(public_seed), "shared")


def rebuild_shared(
    initial: Adapter, vector: NDArray[np.float32], aggregation: Aggregation
) -> Adapter:
    """The shared adapter from what the server sent.

    Args:
        initial: `initial_shared` of the same federation.
        vector: (num_params,) of the factors that are sent down.
        aggregation: Of the federation.

    Raises:
        AdapterError: The vector has another length.
    """
    received = initial.spec.unflatten(vector, sent_down(aggregation))
    return Adapter(initial.spec, {**initial.tensors, **received}, initial.parent)


def apply_mean(adapter: Adapter, mean: Vector, factors: tuple[Factor, ...]) -> Adapter:
    """The shared adapter after a round: the mean update added to the factors that travelled.

    Args:
        adapter: The round's model.
        mean: (num_params,) weighted mean of the updates.
        factors: Those that travelled; the others stay byte for byte.

    Raises:
        AdapterError: The vector has another length.
    """
    update = adapter.spec.unflatten(mean.astype(np.float32), factors)
    moved = {name: adapter.tensors[name] + change for name, change in update.items()}
    return Adapter(adapter.spec, {**adapter.tensors, **moved}, adapter.parent)
