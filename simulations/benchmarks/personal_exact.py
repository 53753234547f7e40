"""Whether the sides of the personal phase train the same: gradients, movements of adapters, scores.

The bounds are those of the specification, against the lean peft loop.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedoppu.client.batches import Row as TokenRow
from fedoppu.client.engine import engine_for
from fedoppu.client.jobs import ClientJob, Example, ModelQuery
from fedoppu.client.multi_lora import Level, stack_levels
from fedoppu.client.plans import Plan
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.common.adapters import Adapter
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.personal_cases import Case
from fedoppu.simulations.benchmarks.personal_sides import LeanLoop, Trained

MOST_FP32, MOST_GRADIENT, LEAST_COSINE = 2e-4, 1e-6, 0.99
RESAMPLES = 2000

Vectors = Mapping[str, NDArray[np.float32]]


def movements(case: Case, trained: Sequence[Trained]) -> Vectors:
    """By user: (num_params,) what training changed."""
    starts = {job.id: case.spec.flatten(job.start.tensors) for job in case.jobs}
    return {user.id: user.vector - starts[user.id] for user in trained}


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """L2 norm of the difference, relative to theirs."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Cosine of the angle between two vectors."""
    return float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))


# --- gradients -----------------------------------------------------------------------------------


def gradient_row(case: Case) -> Row:
    """One step's gradients of two users of different tasks, B not zero; float32.

    The note says how far peft itself is from peft in float64: how much of it is rounding.
    """
    lean, precise = (LeanLoop(case, dtype="float32") for _ in range(2))
    precise.compute_in_double()
    worst = rounding = 0.0
    for job in map(_moved, case.jobs[:2]):
        batch = Plan.of(job, case.bases["float32"]).batch(0)
        theirs = lean.gradient(job, batch)
        worst = max(worst, distance(_gradient(case, job, batch), theirs))
        rounding = max(rounding, distance(theirs, precise.gradient(job, batch)))
    return Row(
        f"{case.shape}: gradient of one step, relative L2 difference, fp32",
        worst,
        kind="bound",
        goal=MOST_GRADIENT,
        unit="",
        note=f"worst of two users, against peft; peft against itself in fp64: {rounding:.2g}",
    )


def _moved(job: ClientJob) -> ClientJob:
    """A job whose B is not zero: with B zero the gradient of A is."""
    rng = job.randomness.stream("moved")
    tensors = {
        name: value if name.endswith("A") else rng.normal(0, 0.02, value.shape).astype(np.float32)
        for name, value in job.start.tensors.items()
    }
    start = Adapter(job.start.spec, tensors, job.start.parent)
    return ClientJob(job.id, start, (), job.settings, job.examples, job.randomness)


def _gradient(case: Case, job: ClientJob, batch: Sequence[Example]) -> NDArray[np.float32]:
    """(num_params,) our gradient of the mean loss over the answers, at the job's start."""
    (level,) = stack_levels([(job.start,)])
    if not isinstance(level, Level):
        raise TypeError(f"a LoRA is stacked as a Level, got {type(level).__name__}")
    leaves = {
        f"{name}.{factor}": value.requires_grad_()
        for name, both in level.factors.items()
        for factor, value in (("A", both.a), ("B", both.b))
    }
    rows = [TokenRow(0, example, place) for place, example in enumerate(batch)]
    passes = engine_for(case.bases["float32"]).passes(rows, share=True)
    losses = [one.losses([level.take(np.zeros(len(one.picked), np.int64))]) for one in passes]
    found = torch.autograd.grad(torch.cat(losses).mean(), list(leaves.values()))
    return case.spec.flatten({k: part[0].numpy() for k, part in zip(leaves, found, strict=True)})


# --- movements -----------------------------------------------------------------------------------


def distance_row(case: Case, ours: Vectors, theirs: Vectors) -> Row:
    """How far our adapters ended from where the lean loop's did; users of both sides, float32."""
    users = [user for user in theirs if user in ours]
    return Row(
        f"{case.shape}: movement, relative L2 difference, fp32",
        max(distance(ours[user], theirs[user]) for user in users),
        kind="bound",
        goal=MOST_FP32,
        unit="",
        note=f"worst of {len(users)} users, against the lean loop in fp32",
    )


def cosine_row(case: Case, ours: Vectors, theirs: Vectors, *, theirs_in: str) -> Row:
    """The angle between our movement in bf16 and the lean loop's; users of both sides."""
    users = [user for user in theirs if user in ours]
    return Row(
        f"{case.shape}: movement, 1 - cosine, bf16 against the lean loop in {theirs_in}",
        max(1 - cosine(ours[user], theirs[user]) for user in users),
        kind="bound",
        goal=1 - LEAST_COSINE,
        unit="",
        note=f"worst of {len(users)} users",
    )


# --- scores --------------------------------------------------------------------------------------


def score_row(case: Case, ours: Sequence[Trained], theirs: Sequence[Trained]) -> Row:
    """Unseen items under both sides' adapters: the difference of means, and the bootstrap interval."""
    ids = {user.id for user in ours} & {user.id for user in theirs}
    left, right = (_scores(case, [u for u in side if u.id in ids]) for side in (ours, theirs))
    stream = Randomness.from_seed(0).stream("bootstrap")
    drawn = stream.integers(0, len(right), (RESAMPLES, len(right)))
    low, high = np.percentile(right[drawn].mean(1), (2.5, 97.5))
    return Row(
        f"{case.shape}: mean log-likelihood of the gold label, difference, bf16",
        abs(float(left.mean() - right.mean())),
        kind="bound",
        goal=float(high - low) / 2 if len(ids) > 1 else None,
        unit="nats",
        note=(
            f"{len(ids)} users, ours {left.mean():.4f}, the lean loop in bf16 {right.mean():.4f}; "
            "the bound is half its 95 % bootstrap interval"
        ),
    )


def _scores(case: Case, trained: Sequence[Trained]) -> NDArray[np.float64]:
    """(users,) mean log-likelihood of the gold label among all, sorted by user."""
    numbers = {job.id: number for number, job in enumerate(case.jobs)}
    means = []
    for user in sorted(trained, key=lambda user: numbers[user.id]):
        asked, job = case.asked[numbers[user.id]], case.jobs[numbers[user.id]]
        adapter = Adapter(case.spec, case.spec.unflatten(user.vector), job.start.parent)
        queries = [
            ModelQuery(str(index), one.prompt, (adapter,), one.labels)
            for index, one in enumerate(asked)
        ]
        found = BatchedPredictor(case.bases["float32"]).score(queries)
        logs = [scores - np.logaddexp.reduce(scores) for scores in found]
        means.append(np.mean([log[one.gold] for log, one in zip(logs, asked, strict=True)]))
    return np.array(means)
