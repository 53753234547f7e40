"""The trainer: many jobs, trained in groups, answered one by one.

Each step of a user minimises the mean loss over the answer tokens of its batch (as PEFT with
transformers does), with AdamW, its own gradient norm clipped. It equals training that user alone;
only float rounding depends on who shares its group, and the same group gives the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence

from fedoppu.client.engine import Engine, Engines
from fedoppu.client.failure import describe
from fedoppu.client.group import Group
from fedoppu.client.jobs import ClientFailure, ClientJob, Progress, TrainedAdapter
from fedoppu.client.model import LoadedBase
from fedoppu.client.plans import Plan, planned_steps
from fedoppu.common.config import require

Answer = TrainedAdapter | ClientFailure


class BatchedTrainer:
    """Trains many users' adapters on one frozen base; a `jobs.LocalTrainer`."""

    def __init__(
        self,
        base: LoadedBase,
        *,
        group: int = 8,
        engine: Engine | None = None,
        checkpointing: bool = False,
    ) -> None:
        """Train on `base`, which is never changed.

        Args:
            base: A loaded base, shared with whoever else uses it.
            group: Users in one pass. It shapes float rounding, so it is part of a result.
            engine: How the base computes; for each stack the fastest that takes it if None.
            checkpointing: Less memory for more time, the same bits; see `Engines`.

        Raises:
            UsageError: The group is smaller than 1.
        """
        require("group", group, 1)
        self._base = base
        self._group = group
        self._engine = engine
        self._engines = Engines(base, checkpointing=checkpointing)

    def update_many(
        self,
        jobs: Sequence[ClientJob],
        on_progress: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Answer]:
        """Trains each job's adapter; a job that fails is a `ClientFailure` and stops no other.

        Args:
            jobs: Cut into groups of neighbours.
            on_progress: Called after each step of a group with the steps of all users.
            should_stop: Asked before each step; true ends the answers before this group's.
        """
        total = sum(planned_steps(job) for job in jobs)
        done = 0
        for start in range(0, len(jobs), self._group):
            group = jobs[start : start + self._group]
            answers: dict[int, Answer] = {}
            alike = self._plan(group, answers)
            done += sum(planned_steps(group[index]) for index in answers)
            for members in alike:
                running = self._running(list(members.values()))
                held_out = running.held_out_losses()
                for step in range(running.steps):
                    if should_stop():
                        return
                    done += running.step(step)
                    on_progress(Progress(done, total))
                answers |= _answers(running, held_out, members)
            yield from (answers[index] for index in range(len(group)))

    def _running(self, plans: Sequence[Plan]) -> Group:
        """A group of plans that share the specs of their stacks."""
        job = plans[0].job
        specs = [adapter.spec for adapter in (*job.frozen, job.start)]
        return Group(self._engine or self._engines.of(specs), plans, self._base.device)

    def _plan(self, jobs: Sequence[ClientJob], answers: dict[int, Answer]) -> list[dict[int, Plan]]:
        """Checks the jobs and sorts them by what must be equal in one pass."""
        alike: dict[object, dict[int, Plan]] = {}
        for index, job in enumerate(jobs):
            try:
                plan = Plan.of(job, self._base)
            except Exception as error:
                answers[index] = ClientFailure(job.id, describe(error))
                continue
            frozen = tuple(adapter.spec for adapter in job.frozen)
            alike.setdefault((job.start.spec, frozen, job.trainable), {})[index] = plan
        return list(alike.values())


def _answers(
    group: Group, held_out: Sequence[float | None], members: dict[int, Plan]
) -> dict[int, Answer]:
    owner = {id(plan): index for index, plan in enumerate(group.plans)}
    return {index: _answer(group, held_out, owner[id(plan)]) for index, plan in members.items()}


def _answer(group: Group, held_out: Sequence[float | None], owner: int) -> Answer:
    plan, tally = group.plans[owner], group.tallies[owner]
    try:
        adapter = group.adapter(owner)
    except Exception as error:
        return ClientFailure(plan.job.id, describe(error))
    return TrainedAdapter(
        id=plan.job.id,
        adapter=adapter,
        examples=len(plan.examples),
        steps=plan.steps,
        tokens=tally.tokens,
        train_loss=tally.loss / tally.answer_tokens if tally.answer_tokens else float("nan"),
        held_out_loss=held_out[owner],
    )
