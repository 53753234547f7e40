"""A Flower Grid in this process: nodes are members, and the ClientApp is called directly.

The same ServerApp and ClientApp run here, in Flower's simulation engine and deployed; only the
transport differs. A train stage is seen whole: the runtime cuts it into groups, and the members of
a group are answered before the next group is trained, so that one group's updates are held at a
time.

Guarantee: what a client gets is its own copy of each record, and a vector that it cannot write to.
Not covered: time. Nothing is late here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.app.message.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedoppu.common.errors import FedoppuError
from fedoppu.common.messages import ReplyCode, Stage

SERVER_NODE = 1
FIRST_NODE = 1000
RUN_ID = 1


class StageRuntime(Protocol):
    """Gets a whole stage ready before its messages are handed to the ClientApp."""

    def ready(self, stage: Stage, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, ...]]:
        """Yields the members of a stage, group by group, each when it can be answered."""


class Unprepared:
    """A StageRuntime that prepares nothing: one group of all members, in their order."""

    def ready(self, stage: Stage, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, ...]]:
        """Yields all members."""
        yield tuple(requests)


ClientApp = Callable[[Message, Context], Message]
UserConfig = dict[str, bool | float | int | str]  # Flower's


@dataclass(frozen=True)
class LocalNode:
    """A virtual node.

    Attributes:
        member: Its member.
        context: What Flower keeps for it between messages.
    """

    member: int
    context: Context = field(repr=False)


class LocalGrid(Grid):
    """A Grid over the members 0 to `members` - 1."""

    def __init__(
        self,
        client_app: ClientApp,
        members: int,
        runtime: StageRuntime,
        *,
        run_config: UserConfig | None = None,
    ) -> None:
        """Opens the Grid; a node is made when a message goes to it.

        Args:
            client_app: Flower's ClientApp, or anything that answers a message.
            members: Number of members.
            runtime: Prepares a stage.
            run_config: What each context holds of the run's settings.
        """
        self._run_config = run_config or {}
        self._app = client_app
        self._runtime = runtime
        self._members = members
        self._kept: dict[int, LocalNode] = {}
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._run = Run.create_empty(RUN_ID)
        # Flower's Message reads who sends it from here, as in each of its own runtimes
        TaskIdentity.run_id = RUN_ID
        TaskIdentity.node_id = SERVER_NODE
        TaskIdentity.task_id = RUN_ID

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of all members."""
        return [node_id(member) for member in range(self._members)]

    def node(self, node: int) -> LocalNode:
        """A node with what was left in its context; one where nothing was left is made anew."""
        member = node - FIRST_NODE
        return self._kept.get(node) or LocalNode(member, self._context(member))

    def _context(self, member: int) -> Context:
        place: UserConfig = {"partition-id": member, "num-partitions": self._members}
        return Context(RUN_ID, node_id(member), place, RecordDict(), dict(self._run_config))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answers messages of one or more stages; the replies wait to be pulled."""
        pushed = list(messages)
        ids = [self._accept(message) for message in pushed]
        for stage in dict.fromkeys(message.metadata.message_type for message in pushed):
            self._answer_stage(
                stage, [each for each in pushed if each.metadata.message_type == stage]
            )
        return ids

    def _accept(self, message: Message) -> str:
        if not 0 <= message.metadata.dst_node_id - FIRST_NODE < self._members:
            raise ValueError(f"there is no node {message.metadata.dst_node_id}")
        self._sent += 1
        message.metadata.__dict__["_message_id"] = f"message-{self._sent}"
        return message.metadata.message_id

    def _answer_stage(self, stage: str, messages: Iterable[Message]) -> None:
        waiting = {m.metadata.dst_node_id - FIRST_NODE: m for m in messages}
        requests = {member: message.content for member, message in waiting.items()}
        for group in self._runtime.ready(stage, requests):  # type: ignore[arg-type]
            for member in group:
                message = waiting.pop(member)
                self._replies[message.metadata.message_id] = self._answer(message)

    def _answer(self, message: Message) -> Message:
        node = self.node(message.metadata.dst_node_id)
        received = make_message(message.metadata, _copied(message.content))
        try:
            reply = self._app(received, node.context)
        except Exception as error:  # as Flower's engines do: one client's error is its reply
            reply = Message(Error(ReplyCode.FAILED, _reason(error)), reply_to=message)
        if len(node.context.state):
            self._kept[message.metadata.dst_node_id] = node
        reply.metadata.__dict__["_message_id"] = f"reply-{message.metadata.message_id}"
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages; each is given once."""
        return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pushes messages and pulls their replies."""
        return self.pull_messages(self.push_messages(messages))


def node_id(member: int) -> int:
    """Node id of a member: the same in every run."""
    return FIRST_NODE + member


def _copied(content: RecordDict) -> RecordDict:
    """A copy whose records belong to the receiver; arrays hold bytes, which nobody can write to."""
    copy = RecordDict()
    for name, record in content.items():
        if isinstance(record, ConfigRecord):
            values = {k: list(v) if isinstance(v, list) else v for k, v in record.items()}
            copy[name] = ConfigRecord(values)  # type: ignore[arg-type]
        elif isinstance(record, MetricRecord):
            copy[name] = MetricRecord(dict(record))
        else:
            copy[name] = ArrayRecord(dict(record))
    return copy


def _reason(error: Exception) -> str:
    """One line; only errors of ours have a message that is known to hold none of a user's data."""
    if isinstance(error, FedoppuError):
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return type(error).__name__
