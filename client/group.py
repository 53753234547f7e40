"""A group of users that are trained together: one forward and backward for all of them a step.

The users of a group share a spec, the trainable factors and the specs of what is frozen under
them. They do not share anything else: each has its own settings, examples, order, learning rates,
number of steps, gradient norm and dropout. Users are sorted by their number of steps, so that those
who are not finished are the first rows of every matrix, and the others are not touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.client.batches import Row
from fedoppu.client.devices import CPU, as_array, on_device
from fedoppu.client.engine import Engine, Pass
from fedoppu.client.multi_lora import AnyLevel, Level, level_of, stack_levels, stack_tensors
from fedoppu.client.optimizer import UserAdamW, user_rules
from fedoppu.client.plans import Plan
from fedoppu.common.adapters import Adapter, Factor
from fedoppu.common.errors import ClientFailed


@dataclass
class Tally:
    """What one user's training has seen so far.

    Attributes:
        tokens: Input tokens that went forward and backward.
        loss: Sum of the answer tokens' losses over the last epoch, nats.
        answer_tokens: Number of them.
        error: Why the user's training was given up, or None.
    """

    tokens: int = 0
    loss: float = 0.0
    answer_tokens: int = 0
    error: ClientFailed | None = None


class Group:
    """Trains the users of some plans; nothing of the base or of the plans is changed.

    Attributes:
        plans: Sorted by their number of steps, most first; a user's index is its row.
        tallies: Of each user.
    """

    def __init__(self, engine: Engine, plans: Sequence[Plan], device: torch.device = CPU) -> None:
        """Stack the plans' adapters; they share a spec, the trainable factors, the frozen specs.

        Args:
            engine: Computes their losses.
            plans: Of the users.
            device: Of the base.
        """
        self.plans = sorted(plans, key=lambda plan: -plan.steps)
        self.tallies = [Tally() for _ in self.plans]
        self._engine = engine
        jobs = [plan.job for plan in self.plans]
        self._spec = jobs[0].start.spec
        self._trainable: tuple[Factor, ...] = jobs[0].trainable
        starts = [job.start for job in jobs]
        self._frozen = stack_levels([job.frozen for job in jobs], device)
        self._fixed, self._slots = stack_tensors(starts, device)
        self._start = level_of(self._spec, self._fixed, self._slots)
        self._optimizer = UserAdamW(
            np.stack([self._spec.flatten(start.tensors, self._trainable) for start in starts]),
            user_rules(
                [job.settings for job in jobs],
                [job.anchor for job in jobs],
                starts,
                factors=self._trainable,
                device=device,
            ),
        )
        self._active = 0
        self._leaves: dict[str, tuple[Tensor, Tensor]] = {}
        self._own = self._start

    @property
    def steps(self) -> int:
        """Steps of the user with most of them."""
        return self.plans[0].steps

    def held_out_losses(self) -> list[float | None]:
        """Of each user: mean over its held-out examples of the mean token loss under the start."""
        rows = [
            Row(owner, example)
            for owner, plan in enumerate(self.plans)
            for example in plan.job.held_out
        ]
        means = np.zeros(len(rows))
        with torch.no_grad():
            for batch in self._engine.passes(rows, share=True):
                levels = self._levels(self._start, rows, batch)
                loss = as_array(batch.losses(levels).double())
                counts = np.bincount(batch.sources, minlength=len(rows))[batch.sources]
                np.add.at(means, batch.sources, loss / counts)
        owners = np.array([row.owner for row in rows], np.int64)
        return [
            float(means[owners == owner].mean()) if plan.job.held_out else None
            for owner, plan in enumerate(self.plans)
        ]

    def step(self, step: int) -> int:
        """One optimiser step of each user that has not finished.

        Returns:
            The number of those users.
        """
        active = sum(plan.steps > step for plan in self.plans)
        self._activate(active)
        rows = self._rows(active, step)
        counts = np.zeros(active)
        for row in rows:
            counts[row.owner] += len(row.example.answer)
        losses = np.zeros(active)
        dropping = any(plan.job.settings.dropout for plan in self.plans[:active])
        for batch in self._engine.passes(rows, share=not dropping):
            owners = np.array([rows[source].owner for source in batch.sources])
            own = self._own
            if dropping and isinstance(own, Level):
                own = self._dropping(own, rows, batch, step=step)
            loss = batch.losses(self._levels(own, rows, batch))
            weights = on_device(1.0 / counts[owners], loss.device).to(loss.dtype)
            self._add_gradients((loss * weights).sum())
            np.add.at(losses, owners, as_array(loss.double()))
        for row in rows:
            self.tallies[row.owner].tokens += row.length
        self._record(step, losses, counts)
        rates = np.array([plan.rates[step] for plan in self.plans[:active]])
        self._optimizer.step(active, step, rates)
        return active

    def adapter(self, owner: int) -> Adapter:
        """The trained adapter of one user; factors that were not trained are the start's own.

        Raises:
            ClientFailed: Its training did not stay finite.
        """
        start = self.plans[owner].job.start
        if not self.plans[owner].steps:
            return start
        vector = as_array(self._optimizer.values[owner]).copy()
        error = self.tallies[owner].error
        if error is None and not np.isfinite(vector).all():
            error = _diverged("the adapter", self.plans[owner], self.plans[owner].steps)
        if error is not None:
            raise error
        tensors = {**start.tensors, **self._spec.unflatten(vector, self._trainable)}
        return Adapter(self._spec, tensors, start.parent)

    def _rows(self, active: int, step: int) -> list[Row]:
        """The examples of one step, user by user; those who diverged have none any more."""
        return [
            Row(owner, example, place)
            for owner in range(active)
            if self.tallies[owner].error is None
            for place, example in enumerate(self.plans[owner].batch(step))
        ]

    def _record(self, step: int, losses: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
        for owner, (loss, count) in enumerate(zip(losses, counts, strict=True)):
            plan, tally = self.plans[owner], self.tallies[owner]
            if not np.isfinite(loss):
                tally.error = _diverged("the loss", plan, step)
            elif plan.in_last_epoch(step):
                tally.loss += float(loss)
                tally.answer_tokens += int(count)

    def _activate(self, active: int) -> None:
        """Makes leaves of the first `active` rows; their values are views of the matrix."""
        if active == self._active:
            return
        self._active = active
        self._leaves = {}
        device, start = self._optimizer.values.device, 0
        for name, (rows, columns) in self._spec.shapes(self._trainable).items():
            part = slice(start, start + rows * columns)
            start += rows * columns
            leaf = self._optimizer.values[:active, part].view(active, rows, columns).detach()
            gradient = self._optimizer.gradients[:active, part].view(active, rows, columns)
            self._leaves[name] = (leaf.requires_grad_(), gradient)
        fixed = {
            name: tensor if len(tensor) == 1 else tensor[on_device(self._slots[:active], device)]
            for name, tensor in self._fixed.items()
            if name not in self._leaves
        }
        leaves = {name: leaf for name, (leaf, _) in self._leaves.items()}
        self._own = level_of(self._spec, fixed | leaves, np.arange(active))

    def _add_gradients(self, loss: Tensor) -> None:
        leaves = [leaf for leaf, _ in self._leaves.values()]
        found = torch.autograd.grad(loss, leaves)
        for (_, gradient), part in zip(self._leaves.values(), found, strict=True):
            gradient.add_(part)

    def _levels(self, own: AnyLevel, rows: Sequence[Row], batch: Pass) -> list[AnyLevel]:
        owners = np.array([rows[index].owner for index in batch.picked])
        return [level.take(owners) for level in (*self._frozen, own)]

    def _dropping(self, own: Level, rows: Sequence[Row], batch: Pass, *, step: int) -> Level:
        """The trained level with each row's own masks of this step.

        A mask is drawn for each row alone, so that it does not depend on padding, packing or users.
        """
        chosen = [rows[index] for index in batch.picked]
        jobs = [self.plans[row.owner].job for row in chosen]
        roots = [
            job.randomness.child("dropout", step, row.place)
            for job, row in zip(jobs, chosen, strict=True)
        ]

        def mask(name: str) -> Tensor:
            parts, width = [], own.factors[name].a.shape[-1]
            for row, job, root in zip(chosen, jobs, roots, strict=True):
                share, shape = job.settings.dropout, (row.length, width)
                kept = np.ones(shape, np.float32)
                if share:
                    draw = root.stream("mask", name).random(shape, np.float32)
                    kept = (draw >= share) / np.float32(1.0 - share)
                parts.append(kept)
            return batch.spread(parts)

        return replace(own, dropout=mask)


def _diverged(what: str, plan: Plan, step: int) -> ClientFailed:
    return ClientFailed(
        f"training {plan.job.id} diverged: {what} is not finite after {step} of {plan.steps} steps",
        hint="lower training.learning_rate or training.clip_norm",
    )
