"""The protocol's events as fields of a message, and back, strictly.

A mapping from members is two lists of one length. Readers refuse what does not fit with a
`ProtocolError` that names the field; see `common/fields.py`. Sizes that follow from the plan's key
exchange are bounded here, for nobody knows the plan, and checked exactly by the state machines.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from fedoppu.common.fields import MAX_MEMBERS, Fields
from fedoppu.common.pairwise import HYBRID
from fedoppu.common.rounds import (
    Advert,
    CohortFixed,
    MaskedUpdate,
    ShareBundle,
    SharesDelivered,
    UnmaskReply,
    Words,
)
from fedoppu.common.signing import SHARE_HASH_BYTES

Value = int | float | bytes | list[int] | list[bytes]
KEY, HASH, SIGNATURE = 32, 32, 64
SEED = 32
MAX_KEY = HYBRID.key_bytes
MAX_PACKAGE = HYBRID.package_bytes  # bytes of one sealed package of shares
MAX_OFFER = HYBRID.offer_bytes
MAX_PATH = 20  # hashes, for a tree over a whole roster
SHARE_HASHES = 2 * SHARE_HASH_BYTES
MAX_SHARE = 128  # bytes of one share of a secret


def by_member(name: str, mapping: Mapping[int, bytes]) -> dict[str, Value]:
    """Bytes by member as two lists, `{name}_of` ascending and `{name}`."""
    members = sorted(mapping)
    return {f"{name}_of": members, name: [mapping[member] for member in members]}


ADVERT = ("member", "channel_key", "mask_key", "seed_commitment", "signature")
ADVERT_SIZES = {
    "channel_key": (KEY, MAX_KEY),
    "mask_key": (KEY, MAX_KEY),
    "seed_commitment": (HASH, HASH),
    "signature": (SIGNATURE, SIGNATURE),
}


def advert_values(event: Advert) -> dict[str, Value]:
    """One advert."""
    return {name: vars(event)[name] for name in ADVERT}


def read_advert(fields: Fields) -> Advert:
    """The advert in these fields."""
    fields.require(*ADVERT)
    parts = {name: fields.blob(name, *size) for name, size in ADVERT_SIZES.items()}
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
    lists = [fields.blobs(name, *size, count=len(members)) for name, size in ADVERT_SIZES.items()]
    return CohortFixed(tuple(Advert(*row) for row in zip(members, *lists, strict=True)))


def pack_members(members: Sequence[int]) -> bytes:
    """Ascending members as the gaps between them, seven bits a byte, the lowest first (LEB128)."""
    packed = bytearray()
    for before, member in pairwise((-1, *members)):
        gap = member - before - 1
        while gap > 0x7F:
            packed.append(gap & 0x7F | 0x80)
            gap >>= 7
        packed.append(gap)
    return bytes(packed)


def unpack_members(fields: Fields, name: str) -> tuple[int, ...]:
    """The inverse of `pack_members`, in whose form alone they are taken."""
    packed = fields.blob(name, 0, 3 * MAX_MEMBERS)
    members, last, gap, shift = [], -1, 0, 0
    for byte in packed:
        gap |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            last += gap + 1
            members.append(last)
            gap, shift = 0, 0
        if last > MAX_MEMBERS or shift > 21:
            fields.refuse(name, f"must hold members up to {MAX_MEMBERS}")
    if pack_members(members) != packed:
        fields.refuse(name, "must be the shortest form of ascending members")
    return tuple(members)


def bundle_values(event: ShareBundle) -> dict[str, Value]:
    """A dealer's bundle; its recipients are named once for all that is dealt to them."""
    recipients = sorted(event.packages)
    return {
        "member": event.member,
        "recipients": pack_members(recipients),
        "packages": [event.packages[recipient] for recipient in recipients],
        "share_hashes": [event.share_hashes[recipient] for recipient in recipients],
        "offers": [event.offers[recipient] for recipient in sorted(event.offers)],
        "signature": event.signature,
    }


def read_bundle(fields: Fields) -> ShareBundle:
    """The bundle in these fields."""
    fields.require("member", "recipients", "packages", "share_hashes", "offers", "signature")
    member, recipients = fields.member(), unpack_members(fields, "recipients")
    count = len(recipients)
    packages = fields.blobs("packages", 1, MAX_PACKAGE, count=count)
    hashes = fields.blobs("share_hashes", SHARE_HASHES, count=count)
    heirs = [recipient for recipient in recipients if recipient > member]
    if fields.values["offers"] == []:
        heirs = []
    offers = fields.blobs("offers", 1, MAX_OFFER, count=len(heirs))
    return ShareBundle(
        member,
        dict(zip(recipients, packages, strict=True)),
        dict(zip(recipients, hashes, strict=True)),
        fields.blob("signature", SIGNATURE),
        dict(zip(heirs, offers, strict=True)),
    )


_DEALT = {
    "packages": (1, MAX_PACKAGE),
    "share_hashes": (SHARE_HASHES, SHARE_HASHES),
    "offers": (1, MAX_OFFER),
}


def delivery_values(event: SharesDelivered) -> dict[str, Value]:
    """Bundles as flat lists: each dealer's counts, then all in a row."""
    bundles = [event.bundles[dealer] for dealer in sorted(event.bundles)]
    values: dict[str, Value] = {
        "dealers": list(event.dealers),
        "bundles": [bundle.member for bundle in bundles],
        "signatures": [bundle.signature for bundle in bundles],
        "paths": [b"".join(bundle.path) for bundle in bundles],
    }
    for name in _DEALT:
        mappings = [vars(bundle)[name] for bundle in bundles]
        values[f"{name}_count"] = [len(mapping) for mapping in mappings]
        values[f"{name}_of"] = [member for mapping in mappings for member in sorted(mapping)]
        values[name] = [mapping[member] for mapping in mappings for member in sorted(mapping)]
    return values


_DELIVERY = (
    "dealers",
    "bundles",
    "signatures",
    "paths",
    *(f"{name}{end}" for name in _DEALT for end in ("_count", "_of", "")),
)


def read_delivery(fields: Fields) -> SharesDelivered:
    """The share set and the bundles in these fields."""
    fields.require(*_DELIVERY)
    senders = fields.members("bundles")
    count = len(senders)
    packages, hashes, offers = (
        _read_mappings(fields, name, *size, count=count) for name, size in _DEALT.items()
    )
    signatures = fields.blobs("signatures", SIGNATURE, count=count)
    paths = [
        _hashes(fields, path) for path in fields.blobs("paths", 0, MAX_PATH * HASH, count=count)
    ]
    rows = zip(senders, packages, hashes, signatures, offers, paths, strict=True)
    bundles = {row[0]: ShareBundle(*row) for row in rows}
    return SharesDelivered(fields.members("dealers"), bundles)


def _hashes(fields: Fields, joined: bytes) -> tuple[bytes, ...]:
    if len(joined) % HASH:
        fields.refuse("paths", f"must hold hashes of {HASH} bytes")
    return tuple(joined[start : start + HASH] for start in range(0, len(joined), HASH))


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


def masked_values(event: MaskedUpdate) -> dict[str, Value]:
    """A masked update without its words."""
    return {
        "member": event.member,
        "signature": event.signature,
        "complaints": list(event.complaints),
    }


def read_masked(fields: Fields, words: Words) -> MaskedUpdate:
    """The masked update of these fields and words."""
    fields.require("member", "signature", "complaints")
    signature = fields.blob("signature", SIGNATURE)
    return MaskedUpdate(fields.member(), words, signature, fields.members("complaints"))


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
        fields.blob("own_seed", 0, SEED),
        fields.blob("signature", SIGNATURE),
    )
