"""What each step of the engine gains: rungs that are put together of its parts.

All rungs train the same users in bf16 to the same adapters, up to rounding; a rung has what the one
before it has, and one thing more. The rungs before the last are engines of this file around the
engine's own parts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedoppu.client.batches import MAX_TOKENS, Row, TokenBatch, pad_rows
from fedoppu.client.engine import Engine, GenericEngine, PaddedPass, Pass, engine_for
from fedoppu.client.llama import LlamaEngine, PackedPass
from fedoppu.client.llama_adapters import PackedAdapters
from fedoppu.client.llama_packing import filled
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import AnyLevel, Outputs, logits_at, only_lora
from fedoppu.simulations.benchmarks.bench import Row as TableRow
from fedoppu.simulations.benchmarks.personal_cases import Case
from fedoppu.simulations.benchmarks.personal_rows import Contest, Scope, groups_of
from fedoppu.simulations.benchmarks.personal_sides import Ours, Side

# users that train together on the rungs below the last ones
USERS: Final = 4


class Unsorted:
    """The generic path without batches of similar length: rows as they come, padded."""

    def __init__(self, base: LoadedBase, *, everywhere: bool) -> None:
        """Compute logits at all tokens, or at answers alone."""
        self._base, self._everywhere = base, everywhere

    def passes(self, rows: Sequence[Row], *, share: bool) -> Sequence[Pass]:
        """Rows in their order; each pass as large as the generic path's."""
        made: list[Pass] = []
        for picked in _chunks(rows):
            batch = _padded([rows[index] for index in picked], picked, self._base.tokenizer.pad)
            one = PaddedPass(self._base, batch)
            made.append(Everywhere(one) if self._everywhere else one)
        return made


def _chunks(rows: Sequence[Row]) -> Iterator[NDArray[np.int64]]:
    longest = max((row.length for row in rows), default=1)
    size = max(1, MAX_TOKENS // longest)
    for start in range(0, len(rows), size):
        yield np.arange(start, min(start + size, len(rows)))


def _padded(rows: Sequence[Row], picked: NDArray[np.int64], pad: int) -> TokenBatch:
    """The rows in one padded batch, whatever their lengths."""
    examples = [row.example for row in rows]
    counts = [len(example.answer) for example in examples]
    local = np.repeat(np.arange(len(rows)), counts)
    firsts = [len(example.prompt) - 1 for example in examples]
    positions = [first + np.arange(count) for first, count in zip(firsts, counts, strict=True)]
    answers = np.concatenate([example.answer for example in examples]).astype(np.int64)
    inputs = [np.concatenate([example.prompt, example.answer[:-1]]) for example in examples]
    return TokenBatch(
        tokens=pad_rows(inputs, pad),
        picked=picked,
        outputs=Outputs(torch.from_numpy(local), torch.from_numpy(np.concatenate(positions))),
        targets=torch.from_numpy(answers),
        sources=picked[local],
    )


@dataclass(frozen=True)
class Everywhere:
    """A padded pass whose logits are computed at every token; an `engine.Pass`."""

    one: PaddedPass

    @property
    def picked(self) -> NDArray[np.int64]:
        """(rows,) index of each row among those that were given."""
        return self.one.picked

    @property
    def sources(self) -> NDArray[np.int64]:
        """(outputs,) index of the row of each answer token."""
        return self.one.sources

    def spread(self, parts: Sequence[NDArray[np.float32]]) -> Tensor:
        """Lays out what each row has for each of its tokens."""
        return self.one.spread(parts)

    def losses(self, levels: Sequence[AnyLevel]) -> Tensor:
        """(outputs,) float32 losses of the answer tokens, nats."""
        batch, base = self.one.batch, self.one.base
        rows, length = batch.tokens.shape
        every = Outputs(
            torch.arange(rows).repeat_interleave(length), torch.arange(length).repeat(rows)
        )
        logits = logits_at(base.model, batch.tokens, every, levels=levels)
        wanted = batch.outputs.rows * length + batch.outputs.positions
        return functional.cross_entropy(logits[wanted], batch.targets, reduction="none")


class Unshared:
    """An engine whose users' common beginnings are computed for each of their rows."""

    def __init__(self, engine: LlamaEngine, *, whole: bool = False) -> None:
        """Compute the last layer at all tokens too if `whole`."""
        self._engine, self._whole = engine, whole

    def passes(self, rows: Sequence[Row], *, share: bool) -> Sequence[Pass]:
        """Those of the engine without anything shared."""
        made = self._engine.passes(rows, share=False)
        return [WholeLast(one) for one in made] if self._whole else made


@dataclass(frozen=True)
class WholeLast:
    """A packed pass whose last layer is computed at every token; an `engine.Pass`."""

    one: PackedPass = field(repr=False)

    @property
    def picked(self) -> NDArray[np.int64]:
        """(rows,) index of each row among those that were given."""
        return self.one.picked

    @property
    def sources(self) -> NDArray[np.int64]:
        """(outputs,) index of the row of each answer token."""
        return self.one.sources

    def spread(self, parts: Sequence[NDArray[np.float32]]) -> Tensor:
        """Lays out what each row has for each of its tokens."""
        return self.one.spread(parts)

    def losses(self, levels: Sequence[AnyLevel]) -> Tensor:
        """(outputs,) float32 losses of the answer tokens, nats."""
        engine, packed = self.one.engine, self.one.packed
        whole = filled(packed)
        every = replace(whole, outputs=np.arange(len(whole.tokens)), last=whole.stretches)
        adapters = PackedAdapters(only_lora(levels), packed.starts)
        hidden = engine.hidden(every, (adapters, adapters), engine._attended(every))
        logits = engine.logits(hidden[torch.from_numpy(packed.outputs)])
        return functional.cross_entropy(logits, self.one.targets, reduction="none")


RUNGS: Final[Mapping[str, Callable[[LoadedBase], Engine]]] = {
    "generic path: padded, hooks, logits everywhere": lambda base: Unsorted(base, everywhere=True),
    "+ logits at answers alone": lambda base: Unsorted(base, everywhere=False),
    "+ batches of similar length": GenericEngine,
    "+ own forward and backward, packed": lambda base: Unshared(
        LlamaEngine(base.model), whole=True
    ),
    "+ last layer where it matters": lambda base: Unshared(LlamaEngine(base.model)),
    "+ common beginning once": engine_for,
}


def ladder_rows(scope: Scope) -> Iterator[TableRow]:
    """All shapes: each rung beside the one before it."""
    for case in scope.cases():
        yield from _climb(case, scope)


def _climb(case: Case, scope: Scope) -> Iterator[TableRow]:
    base = case.bases["bfloat16"]
    users = min(USERS, groups_of(case)[-1])
    sides: dict[str, tuple[Side, int]] = {
        name: (Ours(case, dtype="bfloat16", group=users, engine=build(base)), users)
        for name, build in RUNGS.items()
    }
    groups = {f"groups of {size}": size for size in groups_of(case) if size != users}
    for name, size in groups.items():
        sides[name] = (Ours(case, dtype="bfloat16", group=size), max(size, users))
    turns = Contest(case, sides).run(scope.pairs, tell=scope.tell)
    names = list(RUNGS)
    yield turns.alone(_title(case, names[0], users), names[0])
    for before, name in pairwise(names):
        yield turns.row(_title(case, name, users), ours=name, theirs=before)
    for name in groups:
        yield turns.row(f"{case.shape}: {name} instead", ours=name, theirs=names[-1])


def _title(case: Case, name: str, users: int) -> str:
    return f"{case.shape}: {name} (groups of {users})"
