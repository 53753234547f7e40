"""What one client remembers of a federation between messages, in its `StateStore`.

Guarantee (spec of secure aggregation, rule 5): the attempt is stored before its keys go out, and
each stage's message before it is sent, so that after a crash it is repeated byte for byte or never.
Before the keys of a new attempt, those of the old one are overwritten.

Not covered: a store that is rolled back. It must not be part of a backup.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field

from flwr.app import RecordDict

from fedoppu.client.policy import LastRound
from fedoppu.client.vault import StateStore
from fedoppu.common.errors import RefusedByPolicy
from fedoppu.common.messages import Stage, digest, pack, unpack
from fedoppu.common.rounds import RoundPlan

CONFIG, LAST, MACHINE, REPLY, ANSWERED = "config", "last", "machine", "reply", "answered"


@dataclass(frozen=True)
class Seat:
    """A member's memory.

    Attributes:
        store: Where it is kept.
    """

    store: StateStore = field(repr=False)

    @property
    def config(self) -> bytes | None:
        """The pinned config."""
        return self.store.get(CONFIG)

    @property
    def last(self) -> LastRound | None:
        """The last attempt that keys were sent for."""
        data = self.store.get(LAST)
        return LastRound(**json.loads(data)) if data else None

    def last_in(self, run_id: str) -> LastRound | None:
        """The last attempt of a run that keys were sent for, whatever other runs came after it."""
        data = self.store.get(_run_key(run_id))
        return LastRound(**json.loads(data)) if data else None

    @property
    def machine(self) -> bytes | None:
        """The state machine of the attempt under way, as it was dumped."""
        return self.store.get(MACHINE) or None

    def pin(self, config: bytes) -> None:
        """Keeps the first config, and refuses any other.

        Raises:
            RefusedByPolicy: Another config was pinned before.
        """
        self.require_pinned(config)
        self.store.put(CONFIG, config)

    def require_pinned(self, config: bytes) -> None:
        """Refuses a config beside the pinned one, and pins none itself.

        Raises:
            RefusedByPolicy: Another config was pinned before.
        """
        pinned = self.store.get(CONFIG)
        if pinned is not None and pinned != config:
            raise RefusedByPolicy(
                f"the server's config {_short(config)} is not {_short(pinned)}, which this client "
                "took part with",
                hint="a changed config is a new federation: join it anew",
            )

    def require_unanswered(self, task: str, plan: RoundPlan) -> None:
        """Refuses a second run of a task from a model that was answered for.

        Raises:
            RefusedByPolicy: An unmask reply was sent for this task and model in another run.
        """
        if any(
            (task, plan.model_hash) == (known[0], known[1]) and plan.run_id != known[2]
            for known in self._answered()
        ):
            raise RefusedByPolicy(
                f"this client answered for task {task} and model {plan.model_hash[:12]} in another "
                "run; two sums from one model reveal their difference",
                hint="only the owner can allow it",
            )

    def _answered(self) -> list[list[str]]:
        return list(json.loads(self.store.get(ANSWERED) or b"[]"))

    def save(self, machine: bytes, last: LastRound | None) -> None:
        """Stores the machine, overwriting the one before, and the attempt."""
        self.store.put(MACHINE, machine)
        if last is not None:
            data = json.dumps(asdict(last)).encode()
            # each run has a memory of its own: a server that goes to another run and back finds it
            self.store.put(_run_key(last.run_id), data)
            self.store.put(LAST, data)

    def finish(self, task: str, plan: RoundPlan) -> None:
        """Remembers that an unmask reply was made."""
        answered = [*self._answered(), [task, plan.model_hash, plan.run_id]]
        self.store.put(ANSWERED, json.dumps(answered).encode())

    def repeat(self, stage: Stage, request: RecordDict) -> RecordDict | None:
        """The reply that was stored for exactly this request, or None."""
        stored = self.store.get(REPLY)
        key = _key(stage, request)
        return unpack(stored[len(key) :]) if stored and stored.startswith(key) else None

    def keep(self, stage: Stage, request: RecordDict, reply: RecordDict) -> None:
        """Stores a reply before it is sent; the one of the stage before is overwritten."""
        self.store.put(REPLY, _key(stage, request) + pack(reply))


def _run_key(run_id: str) -> str:
    return f"{LAST}.{run_id}"


def _key(stage: Stage, request: RecordDict) -> bytes:
    return hashlib.sha256(stage.encode() + b"\n" + digest(request)).digest()


def _short(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()[:12]
