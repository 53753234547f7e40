"""The lines of the peak benchmark: how fast the machine multiplies, what the engine uses of it, memory."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import torch
from torch.nn import functional

from fedoppu.client.model import DTYPES, Dtype
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.meters import cpu_seconds, run_tree
from fedoppu.simulations.benchmarks.personal_cases import Case, Shape, Work, opened
from fedoppu.simulations.benchmarks.personal_flops import training_flops
from fedoppu.simulations.benchmarks.personal_memory import MODULE
from fedoppu.simulations.benchmarks.personal_sides import Ours
from fedoppu.simulations.benchmarks.personal_turns import spread

GROUP: Final = 16
TOKENS: Final = 2048  # of a pass, about
SQUARES: Final = (1024, 2048)
SECONDS: Final = 0.3  # that one shape is multiplied for
MOST_BYTES: Final = 1.6e9

Product = tuple[int, int, int]


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        shapes: Of the bases.
        folders: Shape: folder of its base.
        pairs: How often the peak and a training are measured, by turns.
        work: What the users of a shape have; four of them for 135m.
    """

    shapes: tuple[Shape, ...]
    folders: Mapping[Shape, Path] = field(default_factory=dict)
    pairs: int = 5
    work: Work = field(default_factory=lambda: Work(users=GROUP, queries=0))


def peak_rows(scope: Scope) -> Iterator[Row]:
    """The peak itself, the share of it that each shape reaches, and the memory of one group."""
    for dtype in DTYPES:
        yield _peak_row(dtype)
    for shape in scope.shapes:
        users = min(scope.work.users, 4 if shape == "135m" else GROUP)
        work = Work(users, scope.work.items, 0, scope.work.instruction, longest=scope.work.longest)
        with opened(shape, scope.folders.get(shape), work) as case:
            yield from _shape_rows(case, scope.pairs)
    if "house" in scope.shapes:
        yield from memory_rows(scope)


# --- products ------------------------------------------------------------------------------------


def rate(dtype: Dtype, product: Product) -> float:
    """Operations a CPU second of (rows, in) x (out, in) transposed, as a linear layer multiplies."""
    rows, width, out = product
    x, weight = (torch.randn(size, width, dtype=DTYPES[dtype]) for size in (rows, out))
    functional.linear(x, weight)
    once = max(cpu_seconds(lambda: functional.linear(x, weight)), 1e-6)
    times = max(3, int(SECONDS / once))

    def work() -> None:
        for _ in range(times):
            functional.linear(x, weight)

    return 2 * rows * width * out * times / cpu_seconds(work)


def peak(dtype: Dtype) -> tuple[float, Product]:
    """The best of some squares, and which it was."""
    found = {(size, size, size): rate(dtype, (size, size, size)) for size in SQUARES}
    best = max(found, key=lambda product: found[product])
    return found[best], best


def _peak_row(dtype: Dtype) -> Row:
    best, (size, _, _) = peak(dtype)
    name = f"matmul peak, {_short(dtype)}, one thread"
    note = f"{size} x {size} x {size}"
    return Row(name, best / 1e9, kind="rate", unit="GFLOP/s", note=note)


def products(case: Case) -> list[Product]:
    """Distinct products of a layer, for a pass of `TOKENS` tokens."""
    layer = case.bases["bfloat16"].model.get_submodule("model.layers.0")
    shapes = {
        tuple(parameter.shape)
        for name, parameter in layer.named_parameters()
        if name.endswith("proj.weight")
    }
    return [(TOKENS, width, out) for out, width in sorted(cast(Any, shapes))]


def _short(dtype: Dtype) -> str:
    return "fp32" if dtype == "float32" else "bf16"


# --- share of the peak ---------------------------------------------------------------------------


def _shape_rows(case: Case, pairs: int) -> Iterator[Row]:
    for dtype in DTYPES:
        yield _alone_row(case, dtype)
        yield _share_row(case, dtype, pairs)


def _alone_row(case: Case, dtype: Dtype) -> Row:
    """A base's products by themselves: what its sizes allow."""
    found = {product: rate(dtype, product) / 1e9 for product in products(case)}
    note = ", ".join(f"{a} x {b} x {c}: {value:.0f}" for (a, b, c), value in found.items())
    name = f"{case.shape}: its products alone, {_short(dtype)}, the slowest"
    return Row(name, min(found.values()), kind="rate", unit="GFLOP/s", note=note)


def _share_row(case: Case, dtype: Dtype, pairs: int) -> Row:
    """Operations of the frozen base's products a CPU second of training, as a share of the peak."""
    group = len(case.jobs)
    counted = training_flops(case.bases[dtype], case.jobs, group=group)
    side = Ours(case, dtype=dtype, group=group)
    side(case.jobs[:1])
    peaks, rates = [], []
    for _ in range(pairs):
        peaks.append(peak(dtype)[0])
        rates.append(counted.total / cpu_seconds(lambda: side(case.jobs)))
    shares = [100 * ours / most for ours, most in zip(rates, peaks, strict=True)]
    return Row(
        f"{case.shape}: share of the {_short(dtype)} peak in training, groups of {group}",
        median(shares),
        kind="rate",
        unit="%",
        note=(
            f"{len(shares)} runs; {spread(shares)} %; {median(rates) / 1e9:.0f} of "
            f"{median(peaks) / 1e9:.0f} GFLOP/s; {counted.tokens:,} tokens after sharing"
        ),
    )


# --- memory --------------------------------------------------------------------------------------


def memory_rows(scope: Scope) -> Iterator[Row]:
    """A process of its own that trains one group of 16 users on house."""
    folder = scope.folders.get("house")
    for dtype in ("bfloat16", "float32"):
        loaded = _child(("house", "0", dtype), folder)
        whole = _child(("house", str(GROUP), dtype), folder)
        name = f"house: peak memory of a process that trains {GROUP} users, {_short(dtype)}"
        note = f"of it {loaded / 1e6:.0f} MB are there before: libraries, base, users' tokens"
        yield Row(name, whole, kind="bound", goal=MOST_BYTES, unit="B", note=note)


def _child(words: Sequence[str], folder: Path | None) -> int:
    command = [sys.executable, "-m", MODULE, *words, *([str(folder)] if folder else [])]
    cost = run_tree(command)
    if cost.exit_code:
        raise FedoppuError(f"the process that was measured ended with {cost.exit_code}")
    return cost.peak_bytes
