"""Floating-point operations of the frozen base's products in a training pass, by formula.

Counted are the products with frozen matrices that the method needs, of the tokens that are left
after prefixes are shared: forward through every linear layer, backward with respect to their inputs
(frozen weights have no gradient), the last layer's questions and MLP at answer tokens alone, nothing
below the first adapter. Not counted: attention, adapters, norms, the loss, padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from transformers import PreTrainedModel

from fedoppu.client.batches import Row
from fedoppu.client.jobs import ClientJob
from fedoppu.client.llama import LlamaEngine
from fedoppu.client.model import LoadedBase
from fedoppu.client.plans import Plan

ATTENTION: Final = ("q_proj", "k_proj", "v_proj")
EVERYWHERE: Final = ("k_proj", "v_proj")  # at all tokens in the last layer too
PER_PRODUCT: Final = 2  # a multiplication and an addition


@dataclass(frozen=True)
class Counted:
    """Operations of some passes.

    Attributes:
        forward: Of the forward products.
        backward: Of the backward ones.
        tokens: That went through the layers, prefixes counted once.
    """

    forward: int = 0
    backward: int = 0
    tokens: int = 0

    @property
    def total(self) -> int:
        """Both directions."""
        return self.forward + self.backward

    def __add__(self, other: "Counted") -> "Counted":
        """Both together."""
        return Counted(
            self.forward + other.forward,
            self.backward + other.backward,
            self.tokens + other.tokens,
        )


def pass_flops(model: PreTrainedModel, tokens: int, outputs: int) -> Counted:
    """Operations of one pass with adapters in the first layer's attention.

    Args:
        model: A Llama-shaped base.
        tokens: Of the pass.
        outputs: Answer tokens of the pass.
    """
    parts = _multiplications(model)
    layers = cast(Any, model).config.num_hidden_layers
    head = cast(Any, model).lm_head.weight.numel()
    below = tokens * sum(parts.values())
    own = sum(size for name, size in parts.items() if name in EVERYWHERE)
    last = tokens * own + outputs * (sum(parts.values()) - own)
    forward = (layers - 1) * below + last + outputs * head
    # what the first layer's adapters read is the embedding, which has no gradient
    asked = outputs if layers == 1 else tokens
    first = asked * parts["q_proj"] + tokens * own
    return Counted(PER_PRODUCT * forward, PER_PRODUCT * (forward - first), tokens)


def _multiplications(model: PreTrainedModel) -> Mapping[str, int]:
    """Multiplications a token of each linear part of one layer."""
    layer = model.get_submodule("model.layers.0")
    attention = [f"self_attn.{name}" for name in (*ATTENTION, "o_proj")]
    mlp = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return {
        path.rpartition(".")[2]: layer.get_parameter(f"{path}.weight").numel()
        for path in (*attention, *mlp)
    }


def training_flops(base: LoadedBase, jobs: Sequence[ClientJob], *, group: int) -> Counted:
    """Operations of the whole training of some users in groups, from the passes that it makes."""
    engine, counted = LlamaEngine(base.model), Counted()
    for start in range(0, len(jobs), group):
        plans = [Plan.of(job, base) for job in jobs[start : start + group]]
        for step in range(max(plan.steps for plan in plans)):
            rows = [
                Row(owner, example, place)
                for owner, plan in enumerate(plans)
                if step < plan.steps
                for place, example in enumerate(plan.batch(step))
            ]
            for one in engine.passes(rows, share=True):
                laid = one.packed
                counted += pass_flops(base.model, len(laid.tokens), len(laid.outputs))
    return counted
