"""The wire form of a round: each event of `common/rounds.py` as a Flower RecordDict, and back.

Guarantee: a client's message has no field that could hold text. A record has exactly the fields of
its event, with exact types and sizes; anything else is a `ProtocolError` that names the sender's
stage and the field, never its content. Bytes and integers are in the ConfigRecord "event", a vector
is in the ArrayRecord "arrays", which Flower sends in chunks.

The only text is the canonical `FederationConfig` that the server sends in the first message, and it
must be exactly the canonical bytes of one. What is *not* hidden: sizes, times, who talks to whom,
and who drops.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedoppu.common.errors import ProtocolError
from fedoppu.common.fields import MAX_MEMBERS, Fields
from fedoppu.common.plan_fields import PLAN_FIELDS, plan_values, read_plan
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
    MaskedUpdate,
    RoundOpened,
    ServerEvent,
    ShareBundle,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
    Words,
)
from fedoppu.common.vectors import read_vector, write_vector

Stage = Literal[
    "query.hello",
    "query.keys",
    "query.shares",
    "train.masked",
    "query.consistency",
    "query.unmask",
    "train.plain",
]
HELLO: Stage = "query.hello"
PLAIN: Stage = "train.plain"
ROUND: tuple[Stage, ...] = (
    "query.keys",
    "query.shares",
    "train.masked",
    "query.consistency",
    "query.unmask",
)
Value = int | float | bytes | list[int] | list[bytes]
KEY, HASH, SIGNATURE = 32, 32, 64
MAX_PACKAGE = 512  # bytes of one encrypted share package
MAX_SHARE = 128  # bytes of one share of a secret
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


Request = Opening | CohortFixed | Training | SurvivorsProposed | UnmaskRequested | PlainTraining
Reply = Hello | ClientEvent | PlainUpdate


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


def _fields(
    where: str, content: RecordDict, names: Sequence[str], arrays: Sequence[str] = ()
) -> Fields:
    expected = ["event", "arrays"] if arrays else ["event"]
    if sorted(content) != sorted(expected):
        raise ProtocolError(
            f"{where}: must hold the records {', '.join(expected)}, got {len(content)} records"
        )
    record = content["event"]
    if not isinstance(record, ConfigRecord):
        raise ProtocolError(
            f"{where}: the record event must be a ConfigRecord, got {type(record).__name__}"
        )
    return Fields(where, dict(record)).require(*names)


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


def _finite(where: str, name: str, vector: NDArray[np.generic]) -> NDArray[np.generic]:
    if not np.isfinite(cast(NDArray[np.float32], vector)).all():
        raise ProtocolError(f"{where}: array {name} must be finite")
    return vector


def _of(name: str, mapping: Mapping[int, bytes]) -> dict[str, Value]:
    members = sorted(mapping)
    return {f"{name}_of": members, name: [mapping[member] for member in members]}


# --- plan, adverts and shares --------------------------------------------------------------------


def _read_opening(where: str, content: RecordDict) -> Opening:
    fields = _fields(where, content, (*PLAN_FIELDS, "config"))
    return Opening(RoundOpened(read_plan(fields)), fields.blob("config", 2, MAX_CONFIG))


def _read_plain_training(where: str, content: RecordDict) -> PlainTraining:
    fields = _fields(where, content, (*PLAN_FIELDS, "config"), ("model",))
    config = fields.blob("config", 2, MAX_CONFIG)
    return PlainTraining(RoundOpened(read_plan(fields)), config, _model(where, content))


_ADVERT = ("member", "channel_key", "mask_key", "seed_commitment", "signature")
_ADVERT_SIZES = {
    "channel_key": KEY,
    "mask_key": KEY,
    "seed_commitment": HASH,
    "signature": SIGNATURE,
}


def _read_advert(where: str, content: RecordDict) -> Advert:
    fields = _fields(where, content, _ADVERT)
    parts = {name: fields.blob(name, size) for name, size in _ADVERT_SIZES.items()}
    return Advert(fields.integer("member", 0, MAX_MEMBERS), **parts)


def _cohort_values(event: CohortFixed) -> dict[str, Value]:
    adverts = event.adverts
    values: dict[str, Value] = {
        name: [vars(advert)[name] for advert in adverts] for name in _ADVERT_SIZES
    }
    return values | {"members": [advert.member for advert in adverts]}


def _read_cohort(where: str, content: RecordDict) -> CohortFixed:
    fields = _fields(where, content, ("members", *_ADVERT_SIZES))
    members = fields.members("members")
    lists = [fields.blobs(name, size, count=len(members)) for name, size in _ADVERT_SIZES.items()]
    return CohortFixed(tuple(Advert(*row) for row in zip(members, *lists, strict=True)))


def _bundle_values(event: ShareBundle) -> dict[str, Value]:
    shares = _of("packages", event.packages) | _of("share_hashes", event.share_hashes)
    return shares | {"member": event.member, "signature": event.signature}


def _read_bundle(where: str, content: RecordDict) -> ShareBundle:
    names = ("member", "packages_of", "packages", "share_hashes_of", "share_hashes", "signature")
    fields = _fields(where, content, names)
    return ShareBundle(
        fields.integer("member", 0, MAX_MEMBERS),
        fields.mapping("packages", 1, MAX_PACKAGE),
        fields.mapping("share_hashes", HASH),
        fields.blob("signature", SIGNATURE),
    )


def _delivery_values(event: SharesDelivered) -> dict[str, Value]:
    """Bundles as flat lists: each dealer's counts, then all in a row."""
    bundles = [event.bundles[dealer] for dealer in sorted(event.bundles)]
    values: dict[str, Value] = {
        "dealers": list(event.dealers),
        "bundles": [bundle.member for bundle in bundles],
        "signatures": [bundle.signature for bundle in bundles],
    }
    for name in ("packages", "share_hashes"):
        mappings = [vars(bundle)[name] for bundle in bundles]
        values[f"{name}_count"] = [len(mapping) for mapping in mappings]
        values[f"{name}_of"] = [member for mapping in mappings for member in sorted(mapping)]
        values[name] = [mapping[member] for mapping in mappings for member in sorted(mapping)]
    return values


_DELIVERY = (
    "dealers",
    "bundles",
    "signatures",
    *(f"{name}{end}" for name in ("packages", "share_hashes") for end in ("_count", "_of", "")),
)


def _read_mappings(
    fields: Fields, name: str, low: int, high: int, *, count: int
) -> list[dict[int, bytes]]:
    counts = fields.integers(f"{name}_count", count)
    members = fields.integers(f"{name}_of", sum(counts))
    blobs = fields.blobs(name, low, high, count=sum(counts))
    mappings, start = [], 0
    for length in counts:
        rows = slice(start, start + length)
        Fields(fields.where, {f"{name}_of": list(members[rows])}).members(f"{name}_of")
        mappings.append(dict(zip(members[rows], blobs[rows], strict=True)))
        start += length
    return mappings


def _read_training(where: str, content: RecordDict) -> Training:
    fields = _fields(where, content, _DELIVERY, ("model",))
    senders = fields.members("bundles")
    rows = zip(
        senders,
        _read_mappings(fields, "packages", 1, MAX_PACKAGE, count=len(senders)),
        _read_mappings(fields, "share_hashes", HASH, HASH, count=len(senders)),
        fields.blobs("signatures", SIGNATURE, count=len(senders)),
        strict=True,
    )
    bundles = {row[0]: ShareBundle(*row) for row in rows}
    return Training(SharesDelivered(fields.members("dealers"), bundles), _model(where, content))


# --- vectors and unmasking -----------------------------------------------------------------------


def _read_masked(where: str, content: RecordDict) -> MaskedUpdate:
    fields = _fields(where, content, ("member", "signature"), ("words",))
    words = cast(Words, _vector(where, content, "words", ("uint16", "uint32")))
    return MaskedUpdate(
        fields.integer("member", 0, MAX_MEMBERS), words, fields.blob("signature", SIGNATURE)
    )


def _read_survivors(where: str, content: RecordDict) -> SurvivorsProposed:
    fields = _fields(where, content, ("dealers", "survivors"))
    return SurvivorsProposed(fields.members("dealers"), fields.members("survivors"))


def _read_survivor_signature(where: str, content: RecordDict) -> SurvivorSignature:
    fields = _fields(where, content, ("member", "signature"))
    return SurvivorSignature(
        fields.integer("member", 0, MAX_MEMBERS), fields.blob("signature", SIGNATURE)
    )


def _read_unmask_request(where: str, content: RecordDict) -> UnmaskRequested:
    fields = _fields(where, content, ("signatures_of", "signatures"))
    return UnmaskRequested(fields.mapping("signatures", SIGNATURE))


def _unmask_values(event: UnmaskReply) -> dict[str, Value]:
    shares = _of("seed_shares", event.seed_shares) | _of("key_shares", event.key_shares)
    return shares | {
        "member": event.member,
        "own_seed": event.own_seed,
        "signature": event.signature,
    }


def _read_unmask_reply(where: str, content: RecordDict) -> UnmaskReply:
    names = (
        "seed_shares_of",
        "seed_shares",
        "key_shares_of",
        "key_shares",
        "member",
        "own_seed",
        "signature",
    )
    fields = _fields(where, content, names)
    return UnmaskReply(
        fields.integer("member", 0, MAX_MEMBERS),
        fields.mapping("seed_shares", 1, MAX_SHARE),
        fields.mapping("key_shares", 1, MAX_SHARE),
        fields.blob("own_seed", 0, KEY),
        fields.blob("signature", SIGNATURE),
    )


def _read_plain_update(where: str, content: RecordDict) -> PlainUpdate:
    fields = _fields(where, content, ("member", "weight", "held_out", "held_out_loss"), ("update",))
    vector = _finite(where, "update", _vector(where, content, "update", ("float32",)))
    return PlainUpdate(
        fields.integer("member", 0, MAX_MEMBERS),
        cast(NDArray[np.float32], vector),
        fields.integer("weight"),
        fields.integer("held_out", 0, 1) == 1,
        fields.number("held_out_loss"),
    )


def _read_hello(where: str, content: RecordDict) -> Hello:
    return Hello(_fields(where, content, ("member",)).integer("member", 0, MAX_MEMBERS))


# --- both directions -----------------------------------------------------------------------------


def write_request(request: Request) -> RecordDict:
    """A server's message as a RecordDict."""
    match request:
        case Opening(event, config):
            return _record(plan_values(event.plan) | {"config": config})
        case CohortFixed():
            return _record(_cohort_values(request))
        case Training(event, model):
            return _record(_delivery_values(event), {"model": model.astype(np.float32)})
        case SurvivorsProposed(dealers, survivors):
            return _record({"dealers": list(dealers), "survivors": list(survivors)})
        case UnmaskRequested(signatures):
            return _record(_of("signatures", signatures))
        case PlainTraining(event, config, model):
            return _record(
                plan_values(event.plan) | {"config": config}, {"model": model.astype(np.float32)}
            )


def write_reply(reply: Reply) -> RecordDict:
    """A client's message as a RecordDict."""
    match reply:
        case Hello(member):
            return _record({"member": member})
        case Advert():
            return _record({name: vars(reply)[name] for name in _ADVERT})
        case ShareBundle():
            return _record(_bundle_values(reply))
        case MaskedUpdate(member, words, signature):
            return _record({"member": member, "signature": signature}, {"words": words})
        case SurvivorSignature(member, signature):
            return _record({"member": member, "signature": signature})
        case UnmaskReply():
            return _record(_unmask_values(reply))
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
    "query.keys": _read_opening,
    "query.shares": _read_cohort,
    "train.masked": _read_training,
    "query.consistency": _read_survivors,
    "query.unmask": _read_unmask_request,
    "train.plain": _read_plain_training,
}
_REPLIES: Mapping[Stage, Callable[[str, RecordDict], Reply]] = {
    "query.hello": _read_hello,
    "query.keys": _read_advert,
    "query.shares": _read_bundle,
    "train.masked": _read_masked,
    "query.consistency": _read_survivor_signature,
    "query.unmask": _read_unmask_reply,
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


def payload_bytes(content: RecordDict) -> int:
    """Bytes of all values and names of a message, without Flower's own framing."""
    return sum(record.count_bytes() for record in content.values())


def is_server_event(request: Request) -> ServerEvent:
    """The protocol's event inside a request."""
    return request.event if isinstance(request, Opening | Training | PlainTraining) else request
