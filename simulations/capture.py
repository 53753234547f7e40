"""Records all that travels between server and clients, and looks for what must not.

`CaptureGrid` wraps any Grid; `Detector` reads a capture. What is looked for: text of a history (in
UTF-8, UTF-16, hex or base64), a known tensor or update (as 16, 32 or 64 bit floats), any text field
or float vector from a client, and a "masked" vector that is not uniform.

Not covered: text or tensors that were compressed, encrypted or permuted, and whatever sizes and
times say. A clean capture is evidence, not a proof.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from numpy.typing import NDArray

from fedoppu.common.messages import pack

Direction = Literal["down", "up"]
Kind = Literal["text", "tensor", "plain update", "not uniform", "text field"]
FRAGMENT = 16  # characters of a text that are looked for together
WINDOW = 6  # values of a tensor that are looked for together
READABLE = re.compile(rb"[\t\n\r -~]+")
RUNS = re.compile(rb"[\t\n\r -~]{8,}")
LEAST_WORDS = 2048  # fewer say nothing about uniformity
UNIFORM_BOUND = 255 + 10 * (2 * 255) ** 0.5  # of chi-square with 255 degrees of freedom


@dataclass(frozen=True)
class Captured:
    """One message.

    Attributes:
        direction: down (to a client) or up (from one).
        stage: Message type.
        node: The client's node id.
        group: Flower's group id: the round.
        content: Of the message; empty for an Error.
        error: Reason of an Error, or an empty string.
    """

    direction: Direction
    stage: str
    node: int
    group: str
    content: RecordDict = field(repr=False)
    error: str = ""

    def data(self) -> bytes:
        """Everything in it, as the bytes of the wire form."""
        return pack(self.content) + self.error.encode()


class CaptureGrid(Grid):
    """Passes everything on and keeps a copy.

    Attributes:
        messages: All that travelled, in order.
    """

    def __init__(self, inner: Grid) -> None:
        """Wraps a Grid."""
        self._inner = inner
        self._nodes: dict[str, int] = {}
        self.messages: list[Captured] = []

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message to a node."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Records messages to clients and passes them on."""
        pushed = list(messages)
        self.messages += [_captured("down", each, each.metadata.dst_node_id) for each in pushed]
        ids = list(self._inner.push_messages(pushed))
        self._nodes |= {each.metadata.message_id: each.metadata.dst_node_id for each in pushed}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Records replies and passes them on."""
        replies = list(self._inner.pull_messages(message_ids))
        for reply in replies:
            node = self._nodes.get(reply.metadata.reply_to_message_id, 0)
            self.messages.append(_captured("up", reply, node))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not recorded, so not allowed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a capture records push_messages and pull_messages alone")


def _captured(direction: Direction, message: Message, node: int) -> Captured:
    stage, group = message.metadata.message_type, message.metadata.group_id
    if message.has_error():
        return Captured(direction, stage, node, group, RecordDict(), message.error.reason or "")
    return Captured(direction, stage, node, group, message.content)


@dataclass(frozen=True)
class Finding:
    """Something that must not travel.

    Attributes:
        kind: What it is.
        message: Index in the capture.
        stage: Of the message.
        node: The client's node id.
        detail: Where it is; never the secret itself.
    """

    kind: Kind
    message: int
    stage: str
    node: int
    detail: str


@dataclass(frozen=True)
class Detector:
    """Looks for secrets in a capture.

    Attributes:
        texts: Texts that must not travel, in any direction.
        tensors: Name: values that must not travel, in any direction (a personal adapter).
        updates: Name: clear updates, which must not travel up.
    """

    texts: Sequence[str] = field(default=(), repr=False)
    tensors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    updates: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    def findings(self, capture: Sequence[Captured]) -> list[Finding]:
        """All findings, in the order of the messages."""
        needles = [(f"text {i}", _fragments(text)) for i, text in enumerate(self.texts)]
        found: list[Finding] = []
        for index, message in enumerate(capture):
            data = message.data()
            rows = [*self._texts(data, needles), *self._tensors(message.direction, data)]
            if message.direction == "up":
                rows += _structure(message)
            found += [
                Finding(kind, index, message.stage, message.node, what) for kind, what in rows
            ]
        return found

    def _texts(
        self, data: bytes, needles: Sequence[tuple[str, Sequence[bytes]]]
    ) -> Iterator[tuple[Kind, str]]:
        # random bytes are rarely readable for long: what is not, is not searched for plain text
        readable = b"\n".join(RUNS.findall(data))
        for name, fragments in needles:
            if any(each in (readable if READABLE.fullmatch(each) else data) for each in fragments):
                yield "text", name

    def _tensors(self, direction: Direction, data: bytes) -> Iterator[tuple[Kind, str]]:
        for name, tensor in self.tensors.items():
            if _holds(data, tensor):
                yield "tensor", name
        if direction == "up":
            for name, update in self.updates.items():
                if _holds(data, update):
                    yield "plain update", name


def _fragments(text: str) -> list[bytes]:
    """Three places of a text in several encodings; a short text whole."""
    middle, end = max((len(text) - FRAGMENT) // 2, 0), max(len(text) - FRAGMENT, 0)
    plain = {text[at : at + FRAGMENT] for at in (0, middle, end)}
    encoded: list[bytes] = []
    for part in sorted(plain):
        if len(part) < FRAGMENT // 2:
            continue
        raw = part.encode()
        encoded += [raw, part.encode("utf-16-le"), raw.hex().encode()]
        # base64 depends on the place modulo three: the inner characters of each of the three
        for shift in range(3):
            coded = base64.b64encode(bytes(shift) + raw)
            encoded.append(coded[4 : 4 * ((shift + len(raw)) // 3)])
    return [each for each in encoded if len(each) >= FRAGMENT // 2]


def _holds(data: bytes, tensor: NDArray[np.float32]) -> bool:
    """Whether a few of the tensor's values follow each other in the data, in a usual float type."""
    values = tensor.reshape(-1)
    places = np.flatnonzero(values)[:: max(1, np.count_nonzero(values) // 4)][:4]
    for place in places:
        window = values[place : place + WINDOW]
        if np.count_nonzero(window) < min(WINDOW, values.size) // 2 + 1:
            continue
        if any(window.astype(kind).tobytes() in data for kind in ("<f4", "<f2", "<f8")):
            return True
    return False


def _structure(message: Captured) -> Iterator[tuple[Kind, str]]:
    """What no client's message may look like, whatever its values."""
    for name, record in message.content.items():
        if isinstance(record, ConfigRecord):
            for key, value in record.items():
                first = value[0] if isinstance(value, list) and value else value
                if isinstance(first, str):
                    yield "text field", f"{name}.{key}" if key.isidentifier() else name
        elif isinstance(record, ArrayRecord):
            for key, array in record.items():
                if np.dtype(array.dtype).kind == "f":
                    yield "plain update", f"{name}.{key} holds floats"
                elif not _is_uniform(array.data):
                    yield "not uniform", f"{name}.{key}"


def _is_uniform(data: bytes) -> bool:
    """Chi-square of the bytes of a vector; the header of its file is left out."""
    body = np.frombuffer(data[128:], np.uint8)
    if body.size < LEAST_WORDS:
        return True
    counts = np.bincount(body, minlength=256)
    expected = body.size / 256
    return bool(np.sum(np.square(counts - expected)) / expected <= UNIFORM_BOUND)
