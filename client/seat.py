"""What one client remembers of a federation between messages, in its `StateStore`.

Guarantee (spec of secure aggregation, rule 5): the attempt is stored before its keys go out, and
each stage's message before it is sent, so that after a crash it is repeated byte for byte or never.
Before the keys of a new attempt, those of the old one are overwritten.

Not covered: a store that is rolled back. It forgets what was answered, so this client can be made to
sign two survivor sets or to answer a round twice. Protocol state is therefore in no backup: a
restored vault enrols anew (client/enrolment.py). A silent rollback, of a disk or a virtual machine,
is seen by nobody; such a client is one of the corrupt members that every other client's policy
assumes, and the quorum of (n + c) / 2 signatures holds against it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from flwr.app import RecordDict

from fedoppu.client.policy import LastRound
from fedoppu.client.vault import StateStore
from fedoppu.common.errors import RefusedByPolicy
from fedoppu.common.messages import Stage, digest, pack, unpack
from fedoppu.common.rounds import RoundPlan

CONFIG, LAST, MACHINE, REPLY, ANSWERED = "config", "last", "machine", "reply", "answered"
SURVIVORS = "survivors"
MOST_SETS = 64  # survivor sets that are remembered, the latest


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
        """Refuses another round of a task from a model that was answered for, of whatever run.

        An honest round may leave the model as it was: where every update was zero, or the range so
        wide that all rounded to nothing. Then there is nothing more to learn from another one.

        Raises:
            RefusedByPolicy: An unmask reply was sent for this task and model in another round.
        """
        for known_task, model, run_id, number in self._answered():
            known, asked = (run_id, number), (plan.run_id, plan.round)
            if (known_task, model) == (task, plan.model_hash) and known != asked:
                where = f"round {number} of this run" if run_id == plan.run_id else "another run"
                raise RefusedByPolicy(
                    f"this client answered for task {task} and model {model[:12]} in {where}; two "
                    "sums from one model reveal their difference",
                    hint="a round that left the model as it was ends the run; only the owner can "
                    "allow another (policy.same_model)",
                )

    def _answered(self) -> list[tuple[str, str, str, int]]:
        return [tuple(entry) for entry in json.loads(self.store.get(ANSWERED) or b"[]")]

    @property
    def survivor_sets(self) -> list[list[int]]:
        """The latest survivor sets that were kept, over all runs; newest last."""
        return list(json.loads(self.store.get(SURVIVORS) or b"[]"))

    def keep_survivors(self, survivors: Sequence[int]) -> None:
        """Stores a survivor set before it is signed."""
        others = [known for known in self.survivor_sets if known != list(survivors)]
        kept = [*others, list(survivors)][-MOST_SETS:]
        self.store.put(SURVIVORS, json.dumps(kept).encode())

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
        answered = [*self._answered(), (task, plan.model_hash, plan.run_id, plan.round)]
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
