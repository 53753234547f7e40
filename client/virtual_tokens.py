"""Prompt tuning of many users in one pass: tokens whose embeddings come from each row's adapter.

Lester et al. 2021 (https://arxiv.org/abs/2104.08691), section 2. Virtual token i of a user is the
token id -1 - i at the beginning of its prompts. So positions, masks, padding, caches and shared
prefixes need to know nothing of them: only where embeddings are looked up are they told from the
vocabulary's, which begins at 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedoppu.client.devices import on_device
from fedoppu.client.hooks import after, before
from fedoppu.client.jobs import Example, ModelQuery, Tokens
from fedoppu.common.adapter_kinds import PromptSpec
from fedoppu.common.adapters import Spec
from fedoppu.common.errors import BaseModelError

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class VirtualTokens:
    """Prompt adapters at the top of the stacks of a batch.

    Attributes:
        embeddings: (adapters, virtual tokens, width) float32.
        slots: (rows,) which of the adapters each row of the batch uses.
    """

    embeddings: Tensor = field(repr=False)
    slots: Slots

    def take(self, rows: Slots) -> "VirtualTokens":
        """The level for some of the rows, or for rows repeated."""
        return replace(self, slots=self.slots[rows])


def virtual_count(spec: Spec) -> int:
    """Virtual tokens before every text under an adapter."""
    return spec.tokens if isinstance(spec, PromptSpec) else 0


def after_virtual(tokens: Tokens, count: int) -> Tokens:
    """(count + tokens,) int32: the text after its virtual tokens."""
    return np.concatenate([-1 - np.arange(count, dtype=np.int32), tokens]) if count else tokens


def examples_after_virtual(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """Examples whose prompts begin with virtual tokens."""
    if not count:
        return examples
    return [Example(after_virtual(one.prompt, count), one.answer) for one in examples]


def query_after_virtual(query: ModelQuery) -> ModelQuery:
    """A query whose prompt begins with the virtual tokens of its stack."""
    count = virtual_count(query.adapters[-1].spec) if query.adapters else 0
    return replace(query, prompt=after_virtual(query.prompt, count)) if count else query


def embed_virtual(model: PreTrainedModel, level: VirtualTokens) -> list[RemovableHandle]:
    """Hooks on the input embedding that give virtual tokens their rows' embeddings.

    Raises:
        BaseModelError: The model has no input embedding.
    """
    table = model.get_input_embeddings()
    if table is None:
        raise BaseModelError(f"a {type(model).__name__} has no input embedding")
    given: list[Tensor] = []

    def looked_up(tokens: Tensor) -> Tensor:
        given[:] = [tokens]
        return tokens.clamp(min=0)

    def replaced(output: Tensor, tokens: Tensor) -> Tensor:
        return with_embeddings(output, given.pop(), level)

    return [before(table, looked_up), after(table, replaced)]


def with_embeddings(output: Tensor, tokens: Tensor, level: VirtualTokens) -> Tensor:
    """(rows, length, width): the virtual tokens' embeddings in place of the vocabulary's.

    Args:
        output: (rows, length, width), what the vocabulary gives.
        tokens: (rows, length), negative where they are virtual.
        level: Of the rows.
    """
    rows, places = (tokens < 0).nonzero(as_tuple=True)
    slots = on_device(level.slots, tokens.device)[rows]
    own = level.embeddings[slots, -1 - tokens[rows, places]]
    return output.index_put((rows, places), own.to(output.dtype))
