"""A roster epoch as fields of a message, and back, strictly: numbers and bytes alone, no text."""

from fedoppu.common.epochs import HASH_BYTES, Enrolled, EpochAnnounced, EpochAnswer, RosterEpoch
from fedoppu.common.errors import UsageError
from fedoppu.common.event_fields import SIGNATURE, Value, by_member
from fedoppu.common.fields import MAX_MEMBERS, Fields
from fedoppu.common.roster import IDENTITY_BYTES

_EPOCH = (
    "number",
    "previous",
    "authority",
    "run_id",
    "first_round",
    "members",
    "identities",
    "enrolled",
    "revoked",
    "signature",
    "countersignatures_of",
    "countersignatures",
)


def epoch_values(event: EpochAnnounced) -> dict[str, Value]:
    """An epoch: its entries are four lists, its run's hex is bytes."""
    epoch = event.epoch
    values: dict[str, Value] = {
        "number": epoch.number,
        "previous": epoch.previous,
        "authority": epoch.authority,
        "run_id": bytes.fromhex(epoch.run_id),
        "first_round": epoch.first_round,
        "members": [entry.index for entry in epoch.entries],
        "identities": [entry.identity for entry in epoch.entries],
        "enrolled": [entry.epoch for entry in epoch.entries],
        "revoked": [entry.revoked for entry in epoch.entries],
        "signature": epoch.signature,
    }
    return values | by_member("countersignatures", epoch.countersignatures)


def read_epoch(fields: Fields) -> EpochAnnounced:
    """The epoch in these fields.

    Raises:
        ProtocolError: A field is missing, unknown, or of another type or size, or the entries are
            no roster.
    """
    fields.require(*_EPOCH)
    members = fields.members("members")
    count = len(members)
    rows = zip(
        members,
        fields.blobs("identities", IDENTITY_BYTES, count=count),
        fields.integers("enrolled", count),
        fields.integers("revoked", count),
        strict=True,
    )
    head = (
        fields.integer("number", 0, MAX_MEMBERS),
        fields.blob("previous", HASH_BYTES),
        fields.blob("authority", IDENTITY_BYTES),
        fields.blob("run_id", 0, 32).hex(),
        fields.integer("first_round"),
    )
    tail = (
        fields.blob("signature", SIGNATURE),
        fields.mapping("countersignatures", SIGNATURE),
    )
    try:
        return EpochAnnounced(RosterEpoch(*head, tuple(Enrolled(*row) for row in rows), *tail))
    except UsageError as error:
        fields.refuse("members", f"must be a roster: {error}")


def answer_values(answer: EpochAnswer) -> dict[str, Value]:
    """A client's answer."""
    return {
        "member": answer.member,
        "number": answer.number,
        "countersignature": answer.countersignature,
    }


def read_answer(fields: Fields) -> EpochAnswer:
    """The answer in these fields."""
    fields.require("member", "number", "countersignature")
    number = fields.integer("number", 0, MAX_MEMBERS)
    return EpochAnswer(fields.member(), number, fields.blob("countersignature", 0, SIGNATURE))
