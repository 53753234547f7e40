"""The shared phase in apple/pfl-research, in one process: its own FederatedAveraging and backend.

Nothing is evaluated, which is in its favour: it evaluates in its iteration 0, so its rounds begin
with iteration 1. Users' data are tensors that are ready before anything is timed.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import nn

from fedoppu.simulations.benchmarks.shared_cases import Case, Vector
from fedoppu.simulations.benchmarks.shared_peft import PeftModel, adamw

FIRST = 1


class Pfl:
    """Rounds of pfl; the model stays loaded."""

    def __init__(self, case: Case, users: Iterable[int]) -> None:
        """Make the model and the data of the users.

        Args:
            case: Base and work.
            users: All that will be in a cohort.
        """
        self._case, self._model = case, PeftModel(case)
        self._rows = {user: torch.from_numpy(case.rows(user)) for user in users}
        parameters = list(self._model.factors.values())
        self._adapter = _module("model.pytorch").PyTorchModel(
            model=self._model,
            local_optimizer_create=self._optimizer,
            central_optimizer=torch.optim.SGD(parameters, lr=1.0),
        )

    def __call__(self, cohorts: Sequence[Sequence[int]]) -> Vector:
        """The shared adapter after the rounds, (num_params,) float32."""
        self._model.reset()
        algorithm = _module("algorithm.federated_averaging").FederatedAveraging()
        algorithm._current_central_iteration = FIRST
        last = FIRST + len(cohorts)
        params = _module("algorithm.base").NNAlgorithmParams(
            central_num_iterations=last,
            evaluation_frequency=last + 1,
            train_cohort_size=len(cohorts[0]),
            val_cohort_size=0,
        )
        algorithm.run(
            algorithm_params=params,
            backend=self._backend(cohorts),
            model=self._adapter,
            model_train_params=self._training(),
            send_metrics_to_platform=False,
        )
        return self._model.vector()

    def _optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = adamw(trained, self._case)
        optimizer.param_groups[0]["lr"] = lr
        return optimizer

    def _training(self) -> Any:
        settings = self._case.work.settings()
        return _module("hyperparam").NNTrainHyperParams(
            local_num_epochs=settings.epochs,
            local_learning_rate=settings.learning_rate,
            local_batch_size=settings.batch_size,
            local_max_grad_norm=settings.clip_norm,
        )

    def _backend(self, cohorts: Sequence[Sequence[int]]) -> Any:
        dataset, order = _module("data.pytorch").PyTorchTensorDataset, chain(*cohorts)
        data = _module("data.federated_dataset").FederatedDataset(
            lambda user: dataset((self._rows[user],), user_id=str(user)), lambda: next(order)
        )
        weighting = _module("aggregate.weighting").WeightByUser()
        return _module("aggregate.simulate").SimulatedBackend(data, data, [weighting])


def _module(name: str) -> Any:
    return import_module(f"pfl.{name}")
