"""Our side of the shared phase: the engine and a mean. It loads no peft, which it does not need."""

from collections.abc import Sequence

import numpy as np

from fedoppu.client.jobs import TrainedAdapter
from fedoppu.client.training import BatchedTrainer
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations.benchmarks.shared_cases import Case, Vector


class Ours:
    """The batched trainer, as the Grid's executor runs it, and a mean of what it answers."""

    def __init__(self, case: Case, *, group: int) -> None:
        """Train in groups of `group` users."""
        self._case = case
        self._trainer = BatchedTrainer(case.base, group=group)

    def __call__(self, cohorts: Sequence[Sequence[int]]) -> Vector:
        """The shared adapter after the rounds, (num_params,) float32."""
        shared = self._case.start
        for users in cohorts:
            jobs = [self._case.job(user, shared) for user in users]
            total = np.zeros(self._case.spec.num_params())
            for answer in self._trainer.update_many(jobs):
                if not isinstance(answer, TrainedAdapter):
                    raise FedoppuError(f"a user was not trained: {answer.message}")
                total += self._case.vector(answer.adapter)
            shared = self._case.adapter((total / len(users)).astype(np.float32))
        return self._case.vector(shared)
