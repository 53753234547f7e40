"""Flower's SecAgg+ (flwr 1.41.0), run by its own functions: what the benchmark compares with.

The client's stages are those of `secaggplus_mod`, the server's those of `SecAggPlusWorkflow`, called
as Flower calls them, with its default quantization. Only what costs nothing to the side that is
measured is replaced: the transport, and the answers of the other clients. All clients but the one
that is measured share one key pair and one set of shares; the values of keys and shares change no
cost.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
)
from flwr.common import (
    Code,
    FitRes,
    Parameters,
    Status,
    bytes_to_ndarray,
    ndarray_to_bytes,
    ndarrays_to_parameters,
)
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
)
from flwr.compat.common import recorddict_compat as compat
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import (
    SecAggPlusWorkflow,
    WorkflowState,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from flwr.supercore.task_identity import TaskIdentity

from fedoppu.simulations.benchmarks.meters import Stopwatch, cpu_seconds
from fedoppu.simulations.benchmarks.secagg_cases import Case

CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
EXAMPLES = 30
SHARES, MASKING = "share phase", "masking"


@dataclass(frozen=True)
class Pair:
    """An SECP384R1 key pair as PEM, Flower's form."""

    private: bytes
    public: bytes

    @classmethod
    def new(cls) -> "Pair":
        """A fresh pair."""
        private, public = generate_key_pairs()
        return cls(private_key_to_bytes(private), public_key_to_bytes(public))

    def shared_with(self, public: bytes) -> bytes:
        """Flower's shared key with the owner of a public key."""
        return generate_shared_key(bytes_to_private_key(self.private), bytes_to_public_key(public))


class FlowerClient:
    """One client among neighbours that are there already.

    Attributes:
        bytes_up: Of keys and shares, after a run.
        masked_bytes: Of the masked vector, after a run.
    """

    def __init__(self, case: Case, update: np.typing.NDArray[np.float32]) -> None:
        """Makes the neighbours' keys.

        Args:
            case: Its k + 1 holders include the client itself, as in Flower.
            update: (num_params,) float32.
        """
        self.case = case
        self.parameters: Parameters = ndarrays_to_parameters([update])
        self.neighbours = {nid: (Pair.new(), Pair.new()) for nid in range(1, case.neighbours + 1)}
        self.share = create_shares(bytes(32), 2, 2)[0]
        self.key_share = create_shares(Pair.new().private, 2, 2)[0]
        self.bytes_up = self.masked_bytes = 0

    def run(self) -> dict[str, float]:
        """Keys, shares and the masked vector, as the mod makes them: CPU seconds of each part."""
        watch, state = Stopwatch(), SecAggPlusState()
        with watch.part(SHARES):
            keys = _setup(state, self._setup())
            dealt = _share_keys(state, self._public_keys(state))
        delivered = self._deliver(state)
        with watch.part(MASKING):
            masked = _collect_masked_vectors(state, delivered, EXAMPLES, self.parameters)
        self.bytes_up = _size(keys) + _size(dealt)
        self.masked_bytes = _size(masked)
        return watch.seconds

    def _setup(self) -> ConfigRecord:
        case = self.case
        return ConfigRecord(
            {
                Key.SAMPLE_NUMBER: case.size,
                Key.SHARE_NUMBER: case.neighbours + 1,
                Key.THRESHOLD: case.threshold,
                Key.CLIPPING_RANGE: CLIPPING_RANGE,
                Key.TARGET_RANGE: TARGET_RANGE,
                Key.MOD_RANGE: MOD_RANGE,
                Key.MAX_WEIGHT: MAX_WEIGHT,
            }
        )

    def _public_keys(self, state: SecAggPlusState) -> ConfigRecord:
        keys = {str(nid): [a.public, b.public] for nid, (a, b) in self.neighbours.items()}
        return ConfigRecord({str(state.nid): [state.pk1, state.pk2], **keys})

    def _deliver(self, state: SecAggPlusState) -> ConfigRecord:
        """What the neighbours sealed for this client; their cost, not its own."""
        sealed = [
            encrypt(
                pair.shared_with(state.pk2),
                share_keys_plaintext_concat(nid, state.nid, self.share, self.key_share),
            )
            for nid, (_, pair) in self.neighbours.items()
        ]
        return ConfigRecord({Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: list(self.neighbours)})


class FlowerServer:
    """The workflow's last two stages over answers that are there already.

    Its first two stages only sort messages; they are left out, in Flower's favour.
    """

    def __init__(self, case: Case, *, distinct: bool = False) -> None:
        """Makes keys, shares and one masked vector.

        Args:
            case: Its gone members send no vector.
            distinct: Whether each answer holds a vector of its own, as when they come by network.
        """
        self.case, self.distinct = case, distinct
        self.pair, self.seed = Pair.new(), bytes(range(32))
        count, threshold = case.neighbours + 1, case.threshold
        self.shares = (
            create_shares(self.seed, threshold, count),
            create_shares(self.pair.private, threshold, count),
        )
        words = np.random.default_rng(0).integers(0, MOD_RANGE, case.num_params, dtype=np.int64)
        self.masked = [ndarray_to_bytes(array) for array in (np.array([TARGET_RANGE]), words)]

    def run(self) -> dict[str, float]:
        """CPU seconds of sum and unmasking, without those of making the answers."""
        watch, state, context = Stopwatch(), self._state(), self._context()
        workflow = SecAggPlusWorkflow(self.case.neighbours + 1, self.case.threshold)
        vectors, shares = self._grid(watch, self._vectors), self._grid(watch, self._revealed)
        _identify()
        with watch.part("all"):
            summed = workflow.collect_masked_vectors_stage(vectors, context, state)
            unmasked = workflow.unmask_stage(shares, context, state)
        if not (summed and unmasked):
            raise RuntimeError("Flower's workflow halted: its figures would mean nothing")
        return {"server": watch.seconds["all"] - watch.seconds["answers"]}

    def collect(self) -> None:
        """The sum alone, for its memory."""
        workflow = SecAggPlusWorkflow(self.case.neighbours + 1, self.case.threshold)
        _identify()
        grid = self._grid(Stopwatch(), self._vectors)
        workflow.collect_masked_vectors_stage(grid, self._context(), self._state())

    def _state(self) -> WorkflowState:
        case, everyone = self.case, range(self.case.size)
        return WorkflowState(
            nid_to_proxies=cast(Any, dict.fromkeys(everyone)),
            nid_to_fitins={nid: RecordDict() for nid in everyone},
            sampled_node_ids=set(everyone),
            active_node_ids=set(everyone),
            num_shares=case.neighbours + 1,
            threshold=case.threshold,
            clipping_range=CLIPPING_RANGE,
            quantization_range=TARGET_RANGE,
            mod_range=MOD_RANGE,
            max_weight=MAX_WEIGHT,
            nid_to_neighbours={nid: set(self._around(nid)) for nid in everyone},
            nid_to_publickeys={nid: [self.pair.public, self.pair.public] for nid in everyone},
            forward_srcs={nid: [] for nid in everyone},
            forward_ciphertexts={nid: [] for nid in everyone},
        )

    def _around(self, nid: int) -> Iterable[int]:
        """Flower's ring, itself among them; here without the shuffle, which changes no count."""
        half, size = (self.case.neighbours + 1) // 2, self.case.size
        return ((nid + offset) % size for offset in range(-half, half + 1))

    def _context(self) -> Any:
        record = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
        records = SimpleNamespace(config_records={MAIN_CONFIGS_RECORD: record})
        strategy = SimpleNamespace(aggregate_fit=lambda *_: (None, {}))
        return SimpleNamespace(state=records, strategy=strategy)

    def _grid(self, watch: Stopwatch, answer: Callable[[Message], dict[str, Any]]) -> Any:
        """A transport that answers at once for those who are left."""
        live = set(self.case.live)

        def send_and_receive(messages: Sequence[Message], timeout: float | None) -> list[Message]:
            with watch.part("answers"):
                asked = [message for message in messages if message.metadata.dst_node_id in live]
                return [_reply(message, answer(message)) for message in asked]

        return SimpleNamespace(send_and_receive=send_and_receive)

    def _vectors(self, _: Message) -> dict[str, Any]:
        copies = [bytes(bytearray(data)) if self.distinct else data for data in self.masked]
        return {Key.MASKED_PARAMETERS: copies}

    def _revealed(self, message: Message) -> dict[str, Any]:
        config = message.content.config_records[RECORD_KEY_CONFIGS]
        holder = message.metadata.dst_node_id
        active = cast(list[int], config[Key.ACTIVE_NODE_ID_LIST])
        dead = cast(list[int], config[Key.DEAD_NODE_ID_LIST])
        shares = [self.shares[0][self._place(owner, holder)] for owner in active]
        shares += [self.shares[1][self._place(owner, holder)] for owner in dead]
        return {Key.NODE_ID_LIST: active + dead, Key.SHARE_LIST: shares}

    def _place(self, owner: int, holder: int) -> int:
        """Which of the owner's shares a holder has: different for each holder."""
        half = (self.case.neighbours + 1) // 2
        return (holder - owner + half) % self.case.size


def _identify() -> None:
    """Gives this process the identity that Flower's messages ask for."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def _reply(message: Message, values: dict[str, Any]) -> Message:
    """An answer with the records that Flower's workflow reads, from the node that was asked."""
    status = Status(Code.OK, "")
    content = compat.fitres_to_recorddict(FitRes(status, Parameters([], ""), EXAMPLES, {}), False)
    content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord(values, False)
    reply = SimpleNamespace(
        content=content,
        metadata=SimpleNamespace(src_node_id=message.metadata.dst_node_id),
        has_error=lambda: False,
    )
    return cast(Message, reply)


def _size(values: dict[str, Any]) -> int:
    """Bytes of a stage's answer: 8 for a number, without names and framing, as we count ours."""
    flat = [
        entry
        for value in values.values()
        for entry in (value if isinstance(value, list) else [value])
    ]
    return sum(len(entry) if isinstance(entry, bytes) else 8 for entry in flat)


class FlowerTerms:
    """What the server's last two stages do once for each vector, secret or mask, to be multiplied.

    For cohorts in which the whole would take many minutes. `counted` multiplies what
    `SecAggPlusWorkflow` repeats: among it, that it combines all shares that came, not only as many
    as the threshold, and that it takes masks between two dropped members off as well.
    """

    def __init__(self, case: Case) -> None:
        """Makes one answer and the shares of two secrets, as many as come of k + 1."""
        self.case = case
        server = FlowerServer(case)
        live = set(case.live)
        came = [owner in live for owner in range(case.neighbours + 1)]
        self.shares = [
            [share for share, here in zip(shares, came, strict=True) if here]
            for shares in server.shares
        ]
        self.pair, self.masked = server.pair, server.masked
        self.vector = [bytes_to_ndarray(data) for data in server.masked]

    def run(self) -> dict[str, float]:
        """CPU seconds of one of each."""
        seeds, keys = self.shares
        return {
            "vector": cpu_seconds(self._add),
            "seed": cpu_seconds(lambda: combine_shares(seeds)),
            "key": cpu_seconds(lambda: combine_shares(keys)),
            "agreement": cpu_seconds(lambda: self.pair.shared_with(self.pair.public)),
            "mask": cpu_seconds(self._unmask),
            "end": cpu_seconds(self._end),
        }

    def counted(self) -> dict[str, float]:
        """CPU seconds of sum and unmasking, of the terms' medians of three."""
        live, gone = len(self.case.live), len(self.case.gone)
        runs = [self.run() for _ in range(3)]
        each = {term: median(run[term] for run in runs) for term in runs[0]}
        pairs = gone * self.case.neighbours
        counts = {"vector": live, "seed": live, "key": gone, "agreement": pairs, "end": 1}
        counts["mask"] = live + pairs
        return {"server": sum(counts[term] * cost for term, cost in each.items())}

    def _add(self) -> None:
        parameters_addition(self.vector, [bytes_to_ndarray(data) for data in self.masked])

    def _unmask(self) -> None:
        mask = pseudo_rand_gen(bytes(range(32)), MOD_RANGE, [v.shape for v in self.vector])
        parameters_subtraction(self.vector, mask)

    def _end(self) -> None:
        """The mean, from the unmasked sum."""
        total, levels = factor_extract(parameters_mod(self.vector, MOD_RANGE))
        for vector in dequantize(levels, CLIPPING_RANGE, TARGET_RANGE):
            vector += CLIPPING_RANGE
            vector *= TARGET_RANGE / total
