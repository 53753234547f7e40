"""The shared phase in Flower's simulation engine on Ray: an ordinary app, a model cached in the actor.

One actor answers the messages of all virtual users, one after another, on one core. The server is
Flower's FedAvg with its own sampling; every user has as many examples, so the mean is the plain one
and a round costs the same whoever is in it.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from fedoppu.simulations.benchmarks.shared_cases import Case, Vector, Work
from fedoppu.simulations.benchmarks.shared_peft import PeftModel, adamw

ARRAYS, METRICS = "arrays", "metrics"


@dataclass(frozen=True)
class Federation:
    """What both apps need to know; picklable.

    Attributes:
        folder: Of the base.
        work: Of each user.
        users: Virtual nodes.
        cohort: Of each round.
        rounds: Of federated averaging.
    """

    folder: Path
    work: Work
    users: int
    cohort: int
    rounds: int


class Learner:
    """A user's round on a model that stays loaded between messages."""

    def __init__(self, federation: Federation) -> None:
        """Load the base and inject the adapter."""
        torch.set_num_threads(1)
        self._case = Case.open(federation.folder, federation.work)
        self._model = PeftModel(self._case)

    def train(self, user: int, received: ArrayRecord) -> ArrayRecord:
        """Trains one user from what was received."""
        case, model = self._case, self._model
        parameters = list(model.factors.values())
        with torch.no_grad():
            for parameter, values in zip(parameters, received.to_numpy_ndarrays(), strict=True):
                parameter.copy_(torch.from_numpy(values.copy()))
        optimizer, settings = adamw(parameters, case), case.work.settings()
        rows = torch.from_numpy(case.rows(user))
        for batch in torch.split(rows, settings.batch_size):
            model.loss(batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return self.arrays()

    def arrays(self) -> ArrayRecord:
        """The adapter as it is."""
        values = [parameter.detach().numpy() for parameter in self._model.factors.values()]
        return ArrayRecord(values)

    def vector(self, arrays: ArrayRecord) -> Vector:
        """(num_params,) float32 of arrays in the order of the factors."""
        flat = [values.reshape(-1) for values in arrays.to_numpy_ndarrays()]
        return np.concatenate(flat).astype(np.float32)


@lru_cache(maxsize=1)
def _learner(federation: Federation) -> Learner:
    return Learner(federation)


def client_app(federation: Federation) -> ClientApp:
    """Answers train messages."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        user = int(context.node_config["partition-id"])
        learner = _learner(federation)
        arrays = learner.train(user, message.content.array_records[ARRAYS])
        metrics = MetricRecord({"num-examples": federation.work.batch * federation.work.steps})
        return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)

    return app


def run(federation: Federation) -> Vector:
    """Runs the rounds and gives the shared adapter, (num_params,) float32."""
    server = ServerApp()
    ended: list[Vector] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        learner = Learner(federation)
        strategy = FedAvg(
            fraction_train=federation.cohort / federation.users,
            min_train_nodes=federation.cohort,
            fraction_evaluate=0.0,
            min_available_nodes=federation.users,
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=learner.arrays(),
            num_rounds=federation.rounds,
            train_config=ConfigRecord(),
        )
        ended.append(learner.vector(result.arrays))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=server,
            client_app=client_app(federation),
            num_supernodes=federation.users,
            backend_config={
                "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
                "init_args": {"num_cpus": 1, "include_dashboard": False},
            },
        )
    return ended[0]
