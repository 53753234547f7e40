"""Rows of tokens of many users as padded batches that waste little.

Rows are padded on the right: with causal attention no real token sees what comes after it, so no
mask is needed, and attention takes its fast path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.client.devices import CPU, on_device
from fedoppu.client.jobs import Example
from fedoppu.client.multi_lora import Outputs
from fedoppu.common.errors import DataError

# what one more pass costs beyond its tokens, measured, in tokens of a small base
PASS_COST = 160
MAX_TOKENS = 2048


@dataclass(frozen=True)
class Row:
    """One example of one user.

    Attributes:
        owner: Index of the user in its group.
        example: Its prompt and answer.
        place: Position in its user's step.
    """

    owner: int
    example: Example = field(repr=False)
    place: int = 0

    @property
    def length(self) -> int:
        """Input tokens: the last token of the answer is only predicted, never read."""
        return len(self.example.prompt) + len(self.example.answer) - 1


@dataclass(frozen=True)
class TokenBatch:
    """Rows of similar length.

    Attributes:
        tokens: (rows, length) int64, padded on the right.
        picked: Index of each row in the sequence that was packed.
        outputs: Where the answers are predicted.
        targets: (outputs,) int64, the answers' tokens.
        sources: (outputs,) index of the row, in the sequence that was packed, of each target.
    """

    tokens: Tensor
    picked: NDArray[np.int64]
    outputs: Outputs
    targets: Tensor
    sources: NDArray[np.int64]


def check_examples(
    examples: Sequence[Example], *, vocab: int, max_tokens: int, virtual: int = 0
) -> None:
    """Checks that examples can be learnt from.

    Args:
        examples: As text: without virtual tokens.
        vocab: Size of the base's vocabulary.
        max_tokens: Longest text that the base takes.
        virtual: Number of virtual tokens that come before each.

    Raises:
        DataError: One has no answer or prompt, is too long, or has a token the base does not know.
    """
    for index, example in enumerate(examples):
        if not len(example.answer):
            raise DataError(f"example {index} has an empty answer: there is nothing to learn")
        length = virtual + len(example.prompt) + len(example.answer)
        check_tokens(f"example {index}", example.prompt, vocab=vocab, max_tokens=max_tokens)
        check_tokens(f"example {index}", example.answer, vocab=vocab, max_tokens=max_tokens)
        if length > max_tokens:
            of_them = f", {virtual} of them virtual" if virtual else ""
            raise DataError(
                f"example {index} has {length} tokens{of_them}, the base takes {max_tokens}"
            )


def check_tokens(name: str, tokens: NDArray[np.int32], *, vocab: int, max_tokens: int) -> None:
    """Checks token ids that are given to a base.

    Raises:
        DataError: There are none, or too many, or one is outside the vocabulary.
    """
    if not 0 < len(tokens) <= max_tokens:
        raise DataError(
            f"{name} must have 1 to {max_tokens} tokens, got {len(tokens)}",
            hint="lower prompt.text_tokens, prompt.retrieved_tokens or k",
        )
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise DataError(f"{name} has a token outside the base's vocabulary of {vocab}")


def split_by_length(
    lengths: Sequence[int], *, pass_cost: int = PASS_COST, max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """Cuts rows into batches of similar length at the least cost.

    The cost of a batch is its tokens with padding, rows * longest, plus `pass_cost`. Sorted by
    length, the best batches are runs, found exactly by dynamic programming.

    Args:
        lengths: Of the rows, tokens.
        pass_cost: What one more batch costs, in tokens.
        max_tokens: Most tokens of a batch with padding; a single row may exceed it.

    Returns:
        Indices of the rows of each batch, in their given order.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    best = [0.0]
    cut = [0]
    for end in range(1, len(order) + 1):
        longest = max(1, lengths[order[end - 1]])
        first = max(0, end - max(1, max_tokens // longest))
        costs = [best[start] + (end - start) * longest for start in range(first, end)]
        cheapest = int(np.argmin(costs))
        best.append(costs[cheapest] + pass_cost)
        cut.append(first + cheapest)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return batches[::-1]


def pad_rows(rows: Sequence[NDArray[np.int32]], pad: int, device: torch.device = CPU) -> Tensor:
    """Rows as one (rows, longest) int64 tensor, padded on the right."""
    padded = np.full((len(rows), max(len(row) for row in rows)), pad, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return on_device(padded, device)


def pack(rows: Sequence[Row], *, pad: int, device: torch.device = CPU) -> list[TokenBatch]:
    """Packs rows into batches; rows of one user that follow each other stay together."""
    lengths = [row.length for row in rows]
    return [_batch(rows, picked, pad, device=device) for picked in split_by_length(lengths)]


def _batch(rows: Sequence[Row], picked: list[int], pad: int, *, device: torch.device) -> TokenBatch:
    chosen = [rows[index].example for index in picked]
    answers = [len(example.answer) for example in chosen]
    inputs = [np.concatenate([example.prompt, example.answer[:-1]]) for example in chosen]
    starts = [len(example.prompt) - 1 for example in chosen]
    local = np.repeat(np.arange(len(chosen)), answers)
    positions = np.concatenate(
        [np.arange(start, start + count) for start, count in zip(starts, answers, strict=True)]
    )
    index = np.asarray(picked, np.int64)
    return TokenBatch(
        tokens=pad_rows(inputs, pad, device),
        picked=index,
        outputs=Outputs(on_device(local, device), on_device(positions, device)),
        targets=on_device(np.concatenate([e.answer for e in chosen]).astype(np.int64), device),
        sources=index[local],
    )
