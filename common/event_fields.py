"""The protocol's events as fields of a message, and back, strictly.

A mapping from members is two lists of one length. Readers refuse what does not fit with a
`ProtocolError` that names the field; see `common/fields.py`.
"""

from collections.abc import Mapping

from fedoppu.common.fields import Fields
from fedoppu.common.rounds import (
    Advert,
    CohortFixed,
    ShareBundle,
    SharesDelivered,
    UnmaskReply,
)

Value = int | float | bytes | list[int] | list[bytes]
KEY, HASH, SIGNATURE = 32, 32, 64
MAX_PACKAGE = 512  # bytes of one encrypted share package
MAX_SHARE = 128  # bytes of one share of a secret


def by_member(name: str, mapping: Mapping[int, bytes]) -> dict[str, Value]:
    """Bytes by member as two lists, `{name}_of` ascending and `{name}`."""
    members = sorted(mapping)
    return {f"{name}_of": members, name: [mapping[member] for member in members]}


ADVERT = ("member", "channel_key", "mask_key", "seed_commitment", "signature")
ADVERT_SIZES = {
    "channel_key": KEY,
    "mask_key": KEY,
    "seed_commitment": HASH,
    "signature": SIGNATURE,
}


def advert_values(event: Advert) -> dict[str, Value]:
    """One advert."""
    return {name: vars(event)[name] for name in ADVERT}


def read_advert(fields: Fields) -> Advert:
    """The advert in these fields."""
    fields.require(*ADVERT)
    parts = {name: fields.blob(name, size) for name, size in ADVERT_SIZES.items()}
    return Advert(fields.member(), **parts)


def cohort_values(event: CohortFixed) -> dict[str, Value]:
    """All adverts, each part as a list."""
    adverts = event.adverts
    values: dict[str, Value] = {
        name: [vars(advert)[name] for advert in adverts] for name in ADVERT_SIZES
    }
    return values | {"members": [advert.member for advert in adverts]}


def read_cohort(fields: Fields) -> CohortFixed:
    """The adverts in these fields."""
    fields.require("members", *ADVERT_SIZES)
    members = fields.members("members")
    lists = [fields.blobs(name, size, count=len(members)) for name, size in ADVERT_SIZES.items()]
    return CohortFixed(tuple(Advert(*row) for row in zip(members, *lists, strict=True)))


def bundle_values(event: ShareBundle) -> dict[str, Value]:
    """A dealer's bundle."""
    shares = by_member("packages", event.packages) | by_member("share_hashes", event.share_hashes)
    return shares | {"member": event.member, "signature": event.signature}


def read_bundle(fields: Fields) -> ShareBundle:
    """The bundle in these fields."""
    names = ("member", "packages_of", "packages", "share_hashes_of", "share_hashes", "signature")
    fields.require(*names)
    return ShareBundle(
        fields.member(),
        fields.mapping("packages", 1, MAX_PACKAGE),
        fields.mapping("share_hashes", HASH),
        fields.blob("signature", SIGNATURE),
    )


def delivery_values(event: SharesDelivered) -> dict[str, Value]:
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


def unmask_values(event: UnmaskReply) -> dict[str, Value]:
    """An unmask reply."""
    shares = by_member("seed_shares", event.seed_shares) | by_member("key_shares", event.key_shares)
    return shares | {
        "member": event.member,
        "own_seed": event.own_seed,
        "signature": event.signature,
    }


def read_unmask_reply(fields: Fields) -> UnmaskReply:
    """The unmask reply in these fields."""
    names = (
        "seed_shares_of",
        "seed_shares",
        "key_shares_of",
        "key_shares",
        "member",
        "own_seed",
        "signature",
    )
    fields.require(*names)
    return UnmaskReply(
        fields.member(),
        fields.mapping("seed_shares", 1, MAX_SHARE),
        fields.mapping("key_shares", 1, MAX_SHARE),
        fields.blob("own_seed", 0, KEY),
        fields.blob("signature", SIGNATURE),
    )


def read_delivery(fields: Fields) -> SharesDelivered:
    """The share set and the bundles in these fields."""
    fields.require(*_DELIVERY)
    senders = fields.members("bundles")
    rows = zip(
        senders,
        _read_mappings(fields, "packages", 1, MAX_PACKAGE, count=len(senders)),
        _read_mappings(fields, "share_hashes", HASH, HASH, count=len(senders)),
        fields.blobs("signatures", SIGNATURE, count=len(senders)),
        strict=True,
    )
    bundles = {row[0]: ShareBundle(*row) for row in rows}
    return SharesDelivered(fields.members("dealers"), bundles)
