"""Greedy answers with a key-value cache; a row that has ended costs nothing more.

Prompts are padded on the left, so that the newest token of each row is in the last column; the mask
hides the padding and positions count real tokens alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from fedoppu.client.devices import on_device
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import AnyLevel, adapted, stack_levels


def generate_batch(base: LoadedBase, queries: Sequence[ModelQuery]) -> list[tuple[int, ...]]:
    """The greedy answer of each query, without its end token.

    Args:
        base: The frozen base.
        queries: Their stacks have the same specs.
    """
    answers: list[list[int]] = [[] for _ in queries]
    rows = np.arange(len(queries))
    tokens, mask = _left_padded([query.prompt for query in queries], base)
    levels = stack_levels([query.adapters for query in queries], base.device)
    cache = DynamicCache(config=base.model.config)
    while len(rows):
        newest = _next_tokens(base, tokens, mask, cache=cache, levels=levels)
        going = _append(answers, rows, newest.tolist(), queries=queries, eos=base.tokenizer.eos)
        kept = on_device(going, base.device)
        if len(going) < len(rows):
            cache.batch_select_indices(kept)
            levels = tuple(level.take(going) for level in levels)
        rows, newest, mask = rows[going], newest[kept], mask[kept]
        tokens = newest.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return [tuple(answer) for answer in answers]


def _left_padded(prompts: Sequence[NDArray[np.int32]], base: LoadedBase) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), longest), base.tokenizer.pad, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return on_device(tokens, base.device), on_device(mask, base.device)


def _next_tokens(
    base: LoadedBase,
    tokens: Tensor,
    mask: Tensor,
    *,
    cache: DynamicCache,
    levels: Sequence[AnyLevel],
) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, -tokens.shape[1] :]
    with torch.no_grad(), adapted(base.model, levels):
        logits = base.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    newest: Tensor = logits[:, -1].argmax(-1)
    return newest


def _append(
    answers: list[list[int]],
    rows: NDArray[np.int64],
    newest: list[int],
    *,
    queries: Sequence[ModelQuery],
    eos: int,
) -> NDArray[np.int64]:
    """Adds each row's token to its answer; returns which of the rows go on."""
    going: list[int] = []
    for place, (row, token) in enumerate(zip(rows, newest, strict=True)):
        if token != eos:
            answers[row].append(token)
            if len(answers[row]) < queries[row].max_tokens:
                going.append(place)
    return np.array(going, np.int64)
