"""Adapters as plain arrays: which they have, and one flat vector of them.

A LoRA adapter of a matrix W (out, in) is A (rank, in) and B (out, rank), and adds (alpha / rank) B A to W
(Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1). It is the only kind that a federation shares; the
kinds that a personal adapter may have beside it are in `adapter_kinds`. Nothing here needs torch: the server can
initialise, aggregate and export an adapter without a model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.base import BaseFacts
from fedoppu.common.errors import AdapterError, BaseModelError
from fedoppu.common.randomness import Randomness

Factor = Literal["A", "B"]
BOTH: tuple[Factor, ...] = ("A", "B")
Tensors = Mapping[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, int]]


class Spec(Protocol):
    """What an adapter of some kind looks like: `AdapterSpec`, or one of `adapter_kinds`; hashable."""

    @property
    def base_hash(self) -> str:
        """Hash of the base it is made for."""

    @property
    def identity(self) -> str:
        """What a digest binds beside the base, the names, the shapes and the values."""

    def shapes(self, factors: tuple[Factor, ...] = BOTH) -> dict[str, tuple[int, int]]:
        """Names and shapes in the order of the flat vector; only a LoRA tells its factors apart."""

    def num_params(self, factors: tuple[Factor, ...] = BOTH) -> int:
        """Length of the flat vector."""

    def flatten(self, tensors: Tensors, factors: tuple[Factor, ...] = BOTH) -> NDArray[np.float32]:
        """The tensors as one (num_params,) float32 vector."""

    def unflatten(
        self, vector: NDArray[np.float32], factors: tuple[Factor, ...] = BOTH
    ) -> dict[str, NDArray[np.float32]]:
        """The inverse of `flatten`.

        Raises:
            AdapterError: The vector has another length than the adapter has parameters.
        """


def count(shapes: Shapes) -> int:
    """Number of parameters."""
    return sum(rows * columns for rows, columns in shapes.values())


def flattened(tensors: Tensors, shapes: Shapes) -> NDArray[np.float32]:
    """The named tensors as one (num_params,) float32 vector."""
    return np.concatenate([tensors[name].reshape(-1) for name in shapes]).astype(np.float32)


def unflattened(vector: NDArray[np.float32], shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """The inverse of `flattened`; no tensor shares memory with the vector.

    Raises:
        AdapterError: The vector has another length than the shapes have parameters.
    """
    if vector.shape != (count(shapes),):
        raise AdapterError(
            f"an adapter vector must have shape ({count(shapes)},), got {vector.shape}"
        )
    tensors: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name, (rows, columns) in shapes.items():
        part = vector[start : start + rows * columns]
        tensors[name] = part.reshape(rows, columns).astype(np.float32)
        start += rows * columns
    return tensors


@dataclass(frozen=True)
class Target:
    """One adapted matrix: its module name in the base, and its shape (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int


def chosen_targets(base: BaseFacts, targets: tuple[str, ...]) -> tuple[Target, ...]:
    """The linear layers of a base that some endings of module names choose, sorted by name.

    Raises:
        BaseModelError: A target names no linear layer of the base; the message lists those that it has.
    """
    chosen = [
        name
        for name in base.linear
        if targets == ("all-linear",) or name.rsplit(".", 1)[-1] in targets
    ]
    kinds = {name.rsplit(".", 1)[-1] for name in base.linear}
    missing = set(targets) - kinds - {"all-linear"}
    if missing or not chosen:
        wanted, there = ", ".join(sorted(missing)), ", ".join(sorted(kinds))
        raise BaseModelError(
            f"base {base.name} has no target module {wanted}; it has {there}",
            hint="set shared.adapter.targets and personal.adapter.targets to some of these, or to all-linear",
        )
    return tuple(Target(name, *base.linear[name]) for name in sorted(chosen))


@dataclass(frozen=True)
class AdapterSpec:
    """What a LoRA adapter of one base looks like.

    Attributes:
        base_hash: Hash of the base it is made for.
        targets: The adapted matrices, sorted by name.
        rank: Columns of B and rows of A; at least 1.
        alpha: The update is scaled by alpha / rank.
    """

    base_hash: str
    targets: tuple[Target, ...]
    rank: int = 8
    alpha: float = 8.0

    @classmethod
    def from_base(
        cls, base: BaseFacts, targets: tuple[str, ...], *, rank: int, alpha: float
    ) -> "AdapterSpec":
        """Reads the adapted matrices off a base.

        Args:
            base: Facts of the base.
            targets: Endings of module names ("q_proj"), or ("all-linear",) for each linear layer but the output head.
            rank: Rank of the adapter.
            alpha: Numerator of the scale.

        Raises:
            BaseModelError: A target names no linear layer of the base; the message lists those that it has.
        """
        return cls(
            base.hash,
            chosen_targets(base, targets),
            rank,
            alpha,
        )

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    @property
    def identity(self) -> str:
        """Rank and alpha; 8 and 8.0 are the same scale."""
        return f"{self.rank} {float(self.alpha)!r}"

    def shapes(self, factors: tuple[Factor, ...] = BOTH) -> dict[str, tuple[int, int]]:
        """Names and shapes in the order of the flat vector: "{module}.A" (rank, in), "{module}.B" (out, rank)."""
        shapes: dict[str, tuple[int, int]] = {}
        for target in self.targets:
            if "A" in factors:
                shapes[f"{target.name}.A"] = (self.rank, target.in_features)
            if "B" in factors:
                shapes[f"{target.name}.B"] = (target.out_features, self.rank)
        return shapes

    def num_params(self, factors: tuple[Factor, ...] = BOTH) -> int:
        """Length of the flat vector."""
        return count(self.shapes(factors))

    def flatten(self, tensors: Tensors, factors: tuple[Factor, ...] = BOTH) -> NDArray[np.float32]:
        """The chosen factors as one (num_params,) float32 vector."""
        return flattened(tensors, self.shapes(factors))

    def unflatten(
        self, vector: NDArray[np.float32], factors: tuple[Factor, ...] = BOTH
    ) -> dict[str, NDArray[np.float32]]:
        """The inverse of `flatten`.

        Raises:
            AdapterError: The vector has another length than the adapter has parameters.
        """
        return unflattened(vector, self.shapes(factors))


@dataclass(frozen=True)
class Adapter:
    """An adapter and what it belongs to. Treat the arrays as read-only.

    Attributes:
        spec: Its shapes and its base.
        tensors: By the names of the spec, float32; of a LoRA "{module}.A" (rank, in) and "{module}.B" (out, rank).
        parent: Digest of the shared adapter that was frozen under it, or None.
    """

    spec: Spec
    tensors: Tensors
    parent: str | None = None

    def digest(self) -> str:
        """SHA-256 over base, parent, the spec's identity, names, shapes and values, as hex."""
        digest = hashlib.sha256(
            f"{self.spec.base_hash} {self.parent} {self.spec.identity}".encode()
        )
        for name, shape in self.spec.shapes().items():
            digest.update(f"{name} {shape}".encode())
            digest.update(np.ascontiguousarray(self.tensors[name], dtype="<f4").tobytes())
        return digest.hexdigest()

    def require(self, *, base_hash: str, parent: str | None) -> "Adapter":
        """Returns itself if it was made for this base and this shared adapter.

        Raises:
            AdapterError: It was made for another; the message names both.
        """
        if self.spec.base_hash != base_hash:
            raise AdapterError(
                f"the adapter was made for base {self.spec.base_hash[:12]}, not for {base_hash[:12]}",
                hint="load the base that it was made for, or train a new adapter",
            )
        if self.parent != parent:
            raise AdapterError(
                f"the adapter was trained on shared adapter {_short(self.parent)}, not on {_short(parent)}",
                hint="load the shared adapter that it was trained on, or train a new adapter",
            )
        return self


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def initial_adapter(
    spec: AdapterSpec, randomness: Randomness, *key: str | int, parent: str | None = None
) -> Adapter:
    """A fresh LoRA adapter: A uniform in +-1/sqrt(in), as PEFT draws it, B zero, so that it changes nothing yet.

    Args:
        spec: Its shapes.
        randomness: The federation's public root for a shared adapter, the owner's for a personal one.
        key: What the adapter is for.
        parent: Digest of the shared adapter under it.
    """
    tensors: dict[str, NDArray[np.float32]] = {}
    for target in spec.targets:
        bound = 1.0 / np.sqrt(target.in_features)
        stream = randomness.stream("adapter", target.name, *key)
        tensors[f"{target.name}.A"] = stream.uniform(
            -bound, bound, (spec.rank, target.in_features)
        ).astype(np.float32)
        tensors[f"{target.name}.B"] = np.zeros((target.out_features, spec.rank), np.float32)
    return Adapter(spec, tensors, parent)
