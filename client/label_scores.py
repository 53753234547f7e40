"""Log-likelihoods of all labels of a query in one row: the prompt once, then each label's tail.

A label of n tokens needs the logits at the end of the prompt, and after each of its first n - 1
tokens (its tail). The tails of all labels are laid out behind the prompt; each tail sees the prompt
and itself alone, and its positions continue the prompt's. So one pass scores every label exactly,
and the prompt is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.client.batches import pad_rows
from fedoppu.client.devices import as_array, on_device
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import Outputs, logits_at, stack_levels


def input_length(query: ModelQuery) -> int:
    """Tokens of a query's row."""
    return len(query.prompt) + sum(len(label) - 1 for label in query.labels)


def score_batch(base: LoadedBase, queries: Sequence[ModelQuery]) -> list[NDArray[np.float64]]:
    """The (num_labels,) log-likelihoods of each query's labels, nats.

    Args:
        base: The frozen base.
        queries: Their stacks have the same specs; each has at least one label.
    """
    layouts = [_Layout.of(query) for query in queries]
    device = base.device
    tokens = pad_rows([layout.tokens for layout in layouts], base.tokenizer.pad, device)
    rows = np.repeat(np.arange(len(queries)), [len(layout.sources) for layout in layouts])
    sources = np.concatenate([layout.sources for layout in layouts])
    targets = np.concatenate([layout.targets for layout in layouts])
    with torch.no_grad():
        logits = logits_at(
            base.model,
            tokens,
            Outputs(on_device(rows, device), on_device(sources, device)),
            levels=stack_levels([query.adapters for query in queries], device),
            layout=_attention(layouts, tokens.shape[1], base),
        )
        chosen = torch.log_softmax(logits, -1).gather(1, on_device(targets, device).unsqueeze(1))
    found = as_array(chosen.squeeze(1).double())
    ends = np.cumsum([len(layout.sources) for layout in layouts])[:-1]
    return [
        np.bincount(layout.labels, weights=part, minlength=len(query.labels)).astype(np.float64)
        for layout, part, query in zip(layouts, np.split(found, ends), queries, strict=True)
    ]


@dataclass(frozen=True)
class _Layout:
    """One query as a row.

    Attributes:
        tokens: (length,) prompt and tails.
        positions: (length,) position of each token in its own text.
        tails: (length,) label whose tail a token belongs to, -1 in the prompt.
        sources: (outputs,) where in the row each label token is predicted.
        targets: (outputs,) that token.
        labels: (outputs,) its label.
    """

    tokens: NDArray[np.int32] = field(repr=False)
    positions: NDArray[np.int64] = field(repr=False)
    tails: NDArray[np.int64] = field(repr=False)
    sources: NDArray[np.int64] = field(repr=False)
    targets: NDArray[np.int64] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, query: ModelQuery) -> "_Layout":
        prompt = len(query.prompt)
        lengths = np.array([len(label) for label in query.labels])
        starts = prompt + np.cumsum(lengths - 1) - (lengths - 1)
        sources = [
            np.concatenate([[prompt - 1], np.arange(start, start + length - 1)])
            for start, length in zip(starts, lengths, strict=True)
        ]
        tails = [np.arange(prompt, prompt + length - 1) for length in lengths]
        numbers = np.arange(len(lengths))
        return cls(
            tokens=np.concatenate([query.prompt, *(label[:-1] for label in query.labels)]),
            positions=np.concatenate([np.arange(prompt), *tails]),
            tails=np.concatenate([np.full(prompt, -1), np.repeat(numbers, lengths - 1)]),
            sources=np.concatenate(sources).astype(np.int64),
            targets=np.concatenate(query.labels).astype(np.int64),
            labels=np.repeat(numbers, lengths),
        )


def _attention(
    layouts: Sequence[_Layout], length: int, base: LoadedBase
) -> dict[str, Tensor] | None:
    """Positions and mask of the rows; none where there are only prompts."""
    if all(len(layout.tokens) == int((layout.tails < 0).sum()) for layout in layouts):
        return None
    positions = np.zeros((len(layouts), length), np.int64)
    tails = np.full((len(layouts), length), -2)  # padding is seen by padding alone
    for row, layout in enumerate(layouts):
        positions[row, : len(layout.positions)] = layout.positions
        tails[row, : len(layout.tails)] = layout.tails
    query, key = tails[:, :, None], tails[:, None, :]
    causal = np.tri(length, dtype=bool)
    seen = causal & ((query == key) | ((key == -1) & (query >= 0)))
    device, dtype = base.device, base.model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    mask.masked_fill_(on_device(~seen, device), torch.finfo(dtype).min)
    return {"attention_mask": mask.unsqueeze(1), "position_ids": on_device(positions, device)}
