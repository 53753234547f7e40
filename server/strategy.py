"""The Flower strategy: every round is several exchanges, which `server/rounds.py` makes.

Flower's own loop makes one exchange a round, so `start` is replaced. A killed server goes on after
the last committed round.
"""

from collections.abc import Callable, Iterable
from typing import NoReturn

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedoppu.common.adapters import Adapter
from fedoppu.common.errors import UsageError
from fedoppu.server.exchange import Exchanger
from fedoppu.server.metrics import RoundTiming
from fedoppu.server.rounds import Rounds, Standing
from fedoppu.server.runtime import ServerRuntime

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
PLAIN_WARNING = (
    "research.plain_updates=true: updates travel in clear and the server sees each of them; "
    "never use it with people's data"
)


class OppuStrategy(Strategy):
    """Learns the shared adapter by secure aggregation.

    Args:
        runtime: The server's side of the federation.
    """

    def __init__(self, runtime: ServerRuntime) -> None:
        """Keep the runtime."""
        self._runtime = runtime

    # --- Flower's interface ----------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Runs the rounds that are not committed yet, or as many as the privacy budget allows.

        Args:
            grid: Reaches the members.
            initial_arrays: The adapter before the first round; must be the runtime's.
            num_rounds: Rounds in all.
            timeout: Seconds that each stage of a round waits.
            train_config: Not used: a round's settings are its plan.
            evaluate_config: Not used: the held-out loss is part of the masked vector.
            evaluate_fn: Is given each round's adapter.

        Returns:
            The adapter after the last round.

        Raises:
            RoundAborted: A round failed `thresholds.attempts` times, or too few members are left.
            ClientFailed: An exception in a client.
            DeadlineExceeded: Not all members came.
        """
        if set(initial_arrays) != set(self._runtime.initial.tensors):
            raise UsageError("initial_arrays are not the arrays of the runtime's initial adapter")
        if self._runtime.config.plain_updates:
            self._runtime.warn(PLAIN_WARNING)
        standing = Standing.resume(self._runtime)
        for record in self._runtime.checkpoints.records():
            self._runtime.progress(record, RoundTiming(record.round, ()))
        result = Result()
        if standing.round < num_rounds:
            nodes = self._runtime.directory.members(grid)
            deadline = min(timeout, self._runtime.deadline)
            rounds = Rounds(self._runtime, Exchanger(grid, nodes, deadline, self._runtime.poll))
        while standing.round < num_rounds:
            after = rounds.run(standing)
            if after is None:
                self._runtime.stopped(_budget_spent(standing.round, num_rounds, self._runtime))
                break
            standing = after
            _evaluate(result, standing, evaluate_fn)
        result.arrays = to_arrays(standing.adapter)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not one exchange: see `start`."""
        self._only_start()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not one exchange: see `start`."""
        self._only_start()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not an exchange of its own: see `start`."""
        self._only_start()

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Not an exchange of its own: see `start`."""
        self._only_start()

    def summary(self) -> None:
        """Says nothing: progress is told by the runtime."""

    def _only_start(self) -> NoReturn:
        raise UsageError(
            "OppuStrategy makes several exchanges a round and the federated loss is in the masked "
            "vector",
            hint="call start()",
        )


def to_arrays(adapter: Adapter) -> ArrayRecord:
    """An adapter as Flower arrays, by tensor name."""
    return ArrayRecord({name: Array(tensor) for name, tensor in adapter.tensors.items()})


def _budget_spent(done: int, planned: int, runtime: ServerRuntime) -> str:
    """Why a run ends before its last round, which is no error."""
    privacy = runtime.config.privacy
    return (
        f"stopped after round {done} of {planned}: one more would exceed the privacy budget of "
        f"epsilon {privacy.epsilon:g} (delta {privacy.delta:g})"
    )


def _evaluate(result: Result, standing: Standing, evaluate_fn: Evaluate | None) -> None:
    metrics = evaluate_fn(standing.round, to_arrays(standing.adapter)) if evaluate_fn else None
    if metrics is not None:
        result.evaluate_metrics_serverapp[standing.round] = metrics
