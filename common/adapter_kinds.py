"""The kinds that a personal adapter may have beside LoRA: (IA)^3 and prompt tuning.

Both lie on top of a stack: what is under them (the federation's shared LoRA) is part of what they act on. So an
adapter of either kind on a shared LoRA is the same adapter on a base into whose weights that LoRA was merged, and the
same as peft's on that base. No adapter can be trained on top of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.adapters import (
    BOTH,
    Adapter,
    Factor,
    Tensors,
    chosen_targets,
    count,
    flattened,
    unflattened,
)
from fedoppu.common.base import BaseFacts
from fedoppu.common.errors import BaseModelError

VIRTUAL = "virtual_tokens"


@dataclass(frozen=True)
class Scaled:
    """One scaled activation: the name of its module in the base, and its width."""

    name: str
    features: int


@dataclass(frozen=True)
class Ia3Spec:
    """(IA)^3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3): learned vectors that scale activations.

    A module of `outputs` gives l * (W x + b), one of `inputs` W (l * x) + b, element by element; every l begins at one.
    With a LoRA under it, l scales the output of module and LoRA together, or the input of both.

    Attributes:
        base_hash: Hash of the base it is made for.
        outputs: Modules whose output is scaled (keys and values in the paper), sorted by name.
        inputs: Modules whose input is scaled (the last one of the MLP in the paper), sorted by name.
    """

    base_hash: str
    outputs: tuple[Scaled, ...]
    inputs: tuple[Scaled, ...]

    @classmethod
    def from_base(
        cls, base: BaseFacts, targets: tuple[str, ...], *, feedforward: tuple[str, ...]
    ) -> "Ia3Spec":
        """Reads the scaled modules off a base.

        Args:
            base: Facts of the base.
            targets: Endings of module names ("k_proj"), or ("all-linear",) for each linear layer but the output head.
            feedforward: Endings among the targets' whose input is scaled; those that are no target are passed over.

        Raises:
            BaseModelError: A target names no linear layer of the base; the message lists those that it has.
        """
        chosen = chosen_targets(base, targets)
        inputs = [one for one in chosen if one.name.rsplit(".", 1)[-1] in feedforward]
        return cls(
            base.hash,
            tuple(Scaled(one.name, one.out_features) for one in chosen if one not in inputs),
            tuple(Scaled(one.name, one.in_features) for one in inputs),
        )

    @property
    def identity(self) -> str:
        """The kind; names and shapes say the rest."""
        return "ia3"

    def shapes(self, factors: tuple[Factor, ...] = BOTH) -> dict[str, tuple[int, int]]:
        """Names and shapes in the order of the flat vector: "{module}.l", (out, 1) or (1, in), as peft has them."""
        scaled = {f"{one.name}.l": (one.features, 1) for one in self.outputs}
        return scaled | {f"{one.name}.l": (1, one.features) for one in self.inputs}

    def num_params(self, factors: tuple[Factor, ...] = BOTH) -> int:
        """Length of the flat vector."""
        return count(self.shapes())

    def flatten(self, tensors: Tensors, factors: tuple[Factor, ...] = BOTH) -> NDArray[np.float32]:
        """The vectors as one (num_params,) float32 vector."""
        return flattened(tensors, self.shapes())

    def unflatten(
        self, vector: NDArray[np.float32], factors: tuple[Factor, ...] = BOTH
    ) -> dict[str, NDArray[np.float32]]:
        """The inverse of `flatten`.

        Raises:
            AdapterError: The vector has another length than the adapter has parameters.
        """
        return unflattened(vector, self.shapes())


@dataclass(frozen=True)
class PromptSpec:
    """Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2): virtual tokens before the text.

    Their embeddings are learned; their positions are the first, and those of the text follow.

    Attributes:
        base_hash: Hash of the base it is made for.
        tokens: Number of virtual tokens; at least 1.
        width: Of an embedding of the base.
    """

    base_hash: str
    tokens: int
    width: int

    @classmethod
    def from_base(cls, base: BaseFacts, tokens: int) -> "PromptSpec":
        """Reads the width off a base.

        Raises:
            BaseModelError: The base has no embedding that we know by name, or no room for so many tokens.
        """
        if not base.width:
            raise BaseModelError(
                f"the width of the embeddings of base {base.name} is not known",
                hint="set personal.adapter.kind=lora or ia3",
            )
        if tokens >= base.max_tokens:
            raise BaseModelError(
                f"base {base.name} takes {base.max_tokens} tokens, which leaves no room beside"
                f" {tokens} virtual ones",
                hint="lower personal.adapter.tokens",
            )
        return cls(base.hash, tokens, base.width)

    @property
    def identity(self) -> str:
        """The kind; the shape says the rest."""
        return "prompt"

    def shapes(self, factors: tuple[Factor, ...] = BOTH) -> dict[str, tuple[int, int]]:
        """The one tensor: "virtual_tokens", (tokens, width)."""
        return {VIRTUAL: (self.tokens, self.width)}

    def num_params(self, factors: tuple[Factor, ...] = BOTH) -> int:
        """Length of the flat vector."""
        return count(self.shapes())

    def flatten(self, tensors: Tensors, factors: tuple[Factor, ...] = BOTH) -> NDArray[np.float32]:
        """The embeddings as one (num_params,) float32 vector."""
        return flattened(tensors, self.shapes())

    def unflatten(
        self, vector: NDArray[np.float32], factors: tuple[Factor, ...] = BOTH
    ) -> dict[str, NDArray[np.float32]]:
        """The inverse of `flatten`.

        Raises:
            AdapterError: The vector has another length than the adapter has parameters.
        """
        return unflattened(vector, self.shapes())


def initial_ia3(spec: Ia3Spec, *, parent: str | None = None) -> Adapter:
    """A fresh (IA)^3 adapter: every vector is one, so that it changes nothing yet."""
    ones = {name: np.ones(shape, np.float32) for name, shape in spec.shapes().items()}
    return Adapter(spec, ones, parent)


def initial_prompt(
    spec: PromptSpec, embeddings: NDArray[np.float32], *, parent: str | None = None
) -> Adapter:
    """A fresh prompt adapter that begins at some embeddings of the base, (tokens, width)."""
    return Adapter(spec, spec.unflatten(embeddings.reshape(-1)), parent)
