"""The wire form of a round: each event of `common/rounds.py` as a Flower RecordDict, and back.

Guarantee: a client's message has no field that could hold text. A record has exactly the fields of
its event, with exact types and sizes; anything else is a `ProtocolError` that names the sender's
stage and the field, never its content. Bytes and integers are in the ConfigRecord "event", a vector
is in the ArrayRecord "arrays", which Flower sends in chunks.

The only text is the canonical `FederationConfig` that the server sends in the first message, and it
must be exactly the canonical bytes of one. What is *not* hidden: sizes, times, who talks to whom,
and who drops.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Literal, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from numpy.typing import NDArray

from fedoppu.common.epoch_fields import answer_values, epoch_values, read_answer, read_epoch
from fedoppu.common.epochs import EpochAnnounced, EpochAnswer
from fedoppu.common.errors import ProtocolError
from fedoppu.common.event_fields import (
    SIGNATURE,
    Value,
    advert_values,
    bundle_values,
    by_member,
    cohort_values,
    delivery_values,
    masked_values,
    read_advert,
    read_bundle,
    read_cohort,
    read_delivery,
    read_masked,
    read_unmask_reply,
    unmask_values,
)
from fedoppu.common.fields import Fields
from fedoppu.common.plan_fields import PLAN_FIELDS, plan_values, read_plan
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
    MaskedUpdate,
    RoundOpened,
    ShareBundle,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
    Words,
)
from fedoppu.common.sealed_fields import (
    mask_request_from,
    mask_request_values,
    mask_sum_from,
    mask_sum_values,
    read_sealed,
    sealed_values,
)
from fedoppu.common.two_server import MaskSum, MaskSumRequest, SealedUpdate
from fedoppu.common.vectors import read_vector, write_vector

Stage = Literal[
    "query.hello",
    "query.roster",
    "query.keys",
    "query.shares",
    "train.masked",
    "query.consistency",
    "query.unmask",
    "train.sealed",
    "train.plain",
]
HELLO: Stage = "query.hello"
ROSTER: Stage = "query.roster"
PLAIN: Stage = "train.plain"
SEALED: Stage = "train.sealed"
ROUND: tuple[Stage, ...] = (
    "query.keys",
    "query.shares",
    "train.masked",
    "query.consistency",
    "query.unmask",
)
MAX_CONFIG = 1 << 16


class ReplyCode(IntEnum):
    """Codes of a client's Error replies; Flower's own are below 100."""

    DROPPED = 1101  # a simulated drop, not a failure
    FAILED = 1102
    REFUSED = 1103


@dataclass(frozen=True)
class Hello:
    """Client to server, `query.hello`: the member that answers at this node (a claim)."""

    member: int


@dataclass(frozen=True)
class Opening:
    """Server to client, `query.keys`: the plan, and the config whose hash is in it."""

    event: RoundOpened
    config: bytes = field(repr=False)


@dataclass(frozen=True)
class Training:
    """Server to client, `train.masked`: the share set, and the round's model.

    Attributes:
        event: The bundles for this client.
        model: (num_params,) float32, the factors of the shared adapter that the client cannot
            derive itself.
    """

    event: SharesDelivered
    model: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True)
class SealedTraining:
    """Server to client, `train.sealed`, two-server mode: plan, config and model in one message."""

    event: RoundOpened
    config: bytes = field(repr=False)
    model: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True)
class PlainTraining:
    """Server to client, `train.plain`, research only: plan, config and model in one message."""

    event: RoundOpened
    config: bytes = field(repr=False)
    model: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True)
class PlainUpdate:
    """Client to server, `train.plain`, research only: the clipped update itself, in clear.

    Attributes:
        member: The sender.
        vector: (num_params,) float32.
        weight: Number of examples, at most the plan's max_weight.
        held_out: Whether `held_out_loss` counts.
        held_out_loss: Nats; 0 where it does not count.
    """

    member: int
    vector: NDArray[np.float32] = field(repr=False)
    weight: int
    held_out: bool
    held_out_loss: float


Whole = SealedTraining | PlainTraining  # a round in one message
Request = (
    EpochAnnounced | Opening | CohortFixed | Training | SurvivorsProposed | UnmaskRequested | Whole
)
Reply = Hello | EpochAnswer | ClientEvent | SealedUpdate | PlainUpdate


# --- records -------------------------------------------------------------------------------------


def _record(
    values: Mapping[str, Value], arrays: Mapping[str, NDArray[np.generic]] | None = None
) -> RecordDict:
    content = RecordDict({"event": ConfigRecord(dict(values))})
    if arrays:
        content["arrays"] = ArrayRecord({name: _array(vector) for name, vector in arrays.items()})
    return content


def _array(vector: NDArray[np.generic]) -> Array:
    return Array(vector.dtype.name, (vector.shape[0],), "numpy.ndarray", write_vector(vector))


def _vector(
    where: str, content: RecordDict, name: str, dtypes: tuple[str, ...]
) -> NDArray[np.generic]:
    """The one array of a record, read without numpy's file parser and without a copy."""
    record = content["arrays"]
    if not isinstance(record, ArrayRecord) or list(record) != [name]:
        raise ProtocolError(
            f"{where}: the record arrays must be an ArrayRecord with the one array {name}"
        )
    array = record[name]
    if array.stype != "numpy.ndarray" or array.dtype not in dtypes or len(array.shape) != 1:
        raise ProtocolError(f"{where}: array {name} must be a vector of {' or '.join(dtypes)}")
    return read_vector(
        f"{where}: array {name}", array.data, dtype=array.dtype, length=array.shape[0]
    )


def _model(where: str, content: RecordDict) -> NDArray[np.float32]:
    return cast(
        NDArray[np.float32], _finite(where, "model", _vector(where, content, "model", ("float32",)))
    )


def _words(where: str, content: RecordDict) -> Words:
    return cast(Words, _vector(where, content, "words", ("uint16", "uint32")))


def _finite(where: str, name: str, vector: NDArray[np.generic]) -> NDArray[np.generic]:
    if not np.isfinite(cast(NDArray[np.float32], vector)).all():
        raise ProtocolError(f"{where}: array {name} must be finite")
    return vector


# --- plan, adverts and shares --------------------------------------------------------------------


def _open(where: str, content: RecordDict, array: str = "") -> Fields:
    """The fields of a message that holds one event, and one array if that has a name."""
    expected = ["event", "arrays"] if array else ["event"]
    if sorted(content) != sorted(expected):
        names = ", ".join(expected)
        raise ProtocolError(f"{where}: must hold the records {names}, got {len(content)} records")
    record = content["event"]
    if not isinstance(record, ConfigRecord):
        kind = type(record).__name__
        raise ProtocolError(f"{where}: the record event must be a ConfigRecord, got {kind}")
    return Fields(where, dict(record))


def _read_opening(where: str, content: RecordDict) -> Opening:
    fields = _open(where, content).require(*PLAN_FIELDS, "config")
    return Opening(RoundOpened(read_plan(fields)), fields.blob("config", 2, MAX_CONFIG))


def _read_training(where: str, content: RecordDict) -> Training:
    return Training(read_delivery(_open(where, content, "model")), _model(where, content))


def _read_whole(
    kind: type[SealedTraining] | type[PlainTraining], where: str, content: RecordDict
) -> SealedTraining | PlainTraining:
    fields = _open(where, content, "model").require(*PLAN_FIELDS, "config")
    config = fields.blob("config", 2, MAX_CONFIG)
    return kind(RoundOpened(read_plan(fields)), config, _model(where, content))


def _read_masked(where: str, content: RecordDict) -> MaskedUpdate:
    fields = _open(where, content, "words")
    return read_masked(fields, _words(where, content))


def _read_survivors(where: str, content: RecordDict) -> SurvivorsProposed:
    fields = _open(where, content).require("dealers", "survivors")
    return SurvivorsProposed(fields.members("dealers"), fields.members("survivors"))


def _read_survivor_signature(where: str, content: RecordDict) -> SurvivorSignature:
    fields = _open(where, content).require("member", "signature")
    return SurvivorSignature(fields.member(), fields.blob("signature", SIGNATURE))


def _read_unmask_request(where: str, content: RecordDict) -> UnmaskRequested:
    fields = _open(where, content).require("signatures_of", "signatures")
    return UnmaskRequested(fields.mapping("signatures", SIGNATURE))


def _read_plain_update(where: str, content: RecordDict) -> PlainUpdate:
    fields = _open(where, content, "update")
    fields.require("member", "weight", "held_out", "held_out_loss")
    vector = _finite(where, "update", _vector(where, content, "update", ("float32",)))
    return PlainUpdate(
        fields.member(),
        cast(NDArray[np.float32], vector),
        fields.integer("weight"),
        fields.integer("held_out", 0, 1) == 1,
        fields.number("held_out_loss"),
    )


def _read_hello(where: str, content: RecordDict) -> Hello:
    return Hello(_open(where, content).require("member").member())


# --- both directions -----------------------------------------------------------------------------


def write_requests(requests: Mapping[int, Request]) -> dict[int, RecordDict]:
    """Messages to many members; a model that several share is written once."""
    contents: dict[int, RecordDict] = {}
    packed: dict[int, ArrayRecord] = {}
    for member, request in requests.items():
        if isinstance(request, Training | Whole):
            key = id(request.model)
            if key not in packed:
                packed[key] = _model_record(request.model)
            contents[member] = write_request(request, model=packed[key])
        else:
            contents[member] = write_request(request)
    return contents


def write_request(request: Request, *, model: ArrayRecord | None = None) -> RecordDict:
    """A server's message as a RecordDict.

    Args:
        request: The message.
        model: Its model as it was written before, so that it is not written again.
    """
    content = _record(_request_values(request))
    if isinstance(request, Training | Whole):
        content["arrays"] = model or _model_record(request.model)
    return content


def _model_record(model: NDArray[np.float32]) -> ArrayRecord:
    return ArrayRecord({"model": _array(model.astype(np.float32))})


def _request_values(request: Request) -> Mapping[str, Value]:
    match request:
        case Opening(event, config):
            return plan_values(event.plan) | {"config": config}
        case CohortFixed():
            return cohort_values(request)
        case Training(event):
            return delivery_values(event)
        case SurvivorsProposed(dealers, survivors):
            return {"dealers": list(dealers), "survivors": list(survivors)}
        case UnmaskRequested(signatures):
            return by_member("signatures", signatures)
        case SealedTraining(event, config) | PlainTraining(event, config):
            return plan_values(event.plan) | {"config": config}
        case EpochAnnounced():
            return epoch_values(request)


def write_reply(reply: Reply) -> RecordDict:
    """A client's message as a RecordDict."""
    match reply:
        case Hello(member):
            return _record({"member": member})
        case EpochAnswer():
            return _record(answer_values(reply))
        case Advert():
            return _record(advert_values(reply))
        case ShareBundle():
            return _record(bundle_values(reply))
        case MaskedUpdate():
            return _record(masked_values(reply), {"words": reply.words})
        case SurvivorSignature(member, signature):
            return _record({"member": member, "signature": signature})
        case UnmaskReply():
            return _record(unmask_values(reply))
        case SealedUpdate():
            return _record(sealed_values(reply), {"words": reply.words})
        case PlainUpdate(member, vector, weight, held_out, loss):
            values: dict[str, Value] = {
                "member": member,
                "weight": weight,
                "held_out": int(held_out),
            }
            return _record(
                values | {"held_out_loss": float(loss)}, {"update": vector.astype(np.float32)}
            )


_REQUESTS: Mapping[Stage, Callable[[str, RecordDict], Request]] = {
    "query.roster": lambda where, content: read_epoch(_open(where, content)),
    "query.keys": _read_opening,
    "query.shares": lambda where, content: read_cohort(_open(where, content)),
    "train.masked": _read_training,
    "query.consistency": _read_survivors,
    "query.unmask": _read_unmask_request,
    "train.sealed": partial(_read_whole, SealedTraining),
    "train.plain": partial(_read_whole, PlainTraining),
}
_REPLIES: Mapping[Stage, Callable[[str, RecordDict], Reply]] = {
    "query.hello": _read_hello,
    "query.roster": lambda where, content: read_answer(_open(where, content)),
    "query.keys": lambda where, content: read_advert(_open(where, content)),
    "query.shares": lambda where, content: read_bundle(_open(where, content)),
    "train.masked": _read_masked,
    "query.consistency": _read_survivor_signature,
    "query.unmask": lambda where, content: read_unmask_reply(_open(where, content)),
    "train.sealed": lambda where, content: read_sealed(
        _open(where, content, "words"), _words(where, content)
    ),
    "train.plain": _read_plain_update,
}


def read_request(stage: Stage, content: RecordDict) -> Request:
    """A server's message of a stage.

    Raises:
        ProtocolError: A field is unknown, missing, or of another type or size; the message names
            stage and field.
    """
    return _REQUESTS[stage](f"{stage} of the server", content)


def read_reply(stage: Stage, content: RecordDict, sender: str) -> Reply:
    """A client's message of a stage; `sender` names it in errors ("member 3").

    Raises:
        ProtocolError: A field is unknown, missing, or of another type or size; the message names
            stage and field.
    """
    return _REPLIES[stage](f"{stage} of {sender}", content)


def write_mask_request(request: MaskSumRequest) -> RecordDict:
    """A server's question to the helper as a RecordDict."""
    return _record(mask_request_values(request))


def read_mask_request(content: RecordDict) -> MaskSumRequest:
    """A server's question to the helper.

    Raises:
        ProtocolError: As for `read_request`.
    """
    return mask_request_from(_open("helper.sum of the server", content))


def write_mask_sum(answer: MaskSum) -> RecordDict:
    """The helper's answer as a RecordDict."""
    return _record(mask_sum_values(answer), {"words": answer.words})


def read_mask_sum(content: RecordDict) -> MaskSum:
    """The helper's answer.

    Raises:
        ProtocolError: As for `read_request`.
    """
    where = "helper.sum of the helper"
    return mask_sum_from(_open(where, content, "words"), _words(where, content))


def pack(content: RecordDict) -> bytes:
    """A message as bytes; the same content gives the same bytes."""
    data: bytes = recorddict_to_proto(content).SerializeToString(deterministic=True)
    return data


def digest(content: RecordDict) -> bytes:
    """SHA-256 of a message; its arrays are hashed where they are, without a copy."""
    total = hashlib.sha256()
    for name, record in sorted(content.items()):
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                head = f"{name} {key} {array.dtype} {array.shape} {len(array.data)}\n"
                total.update(head.encode() + hashlib.sha256(array.data).digest())
        else:
            total.update(pack(RecordDict({name: record})))
    return total.digest()


def unpack(data: bytes) -> RecordDict:
    """The inverse of `pack`, for bytes of one's own."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def payload_bytes(content: RecordDict) -> int:
    """Bytes of all values of a message: 8 for a number; without names and Flower's framing."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        else:
            total += sum(_size(value) for value in record.values())
    return total


def _size(value: object) -> int:
    if isinstance(value, list):
        return sum(_size(entry) for entry in value)
    return len(value) if isinstance(value, bytes | str) else 8
