"""Ed25519 signatures, and the one byte string that each signature of a round is over.

Guarantee: two messages that differ in kind, round, cohort or any field have different byte strings
(tags and length-prefixed values), so no signature can be carried from one to another.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedoppu.common import merkle
from fedoppu.common.randomness import Key, encode_key
from fedoppu.common.roster import Member
from fedoppu.common.rounds import Advert, MaskedUpdate, ShareBundle, UnmaskReply

SHARE_HASH_BYTES = 10


class Identity:
    """A member's signing key. It is long-lived, belongs in the vault, and is never dumped."""

    def __init__(self, member: int, private_key: bytes) -> None:
        """Loads a key.

        Args:
            member: Index in the roster.
            private_key: 32 bytes, from the operating system on a device.
        """
        self.member = member
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)

    @property
    def enrolled(self) -> Member:
        """The roster entry of this identity."""
        return Member(self.member, self._key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._key.sign(message)


@lru_cache(maxsize=1 << 14)
def verify_public(identity: bytes | None, signature: bytes, message: bytes) -> bool:
    """`verify`, remembered: for adverts and survivor sets, which every member of a cohort checks.

    A pure function of public bytes. It spares virtual clients in one process n^2 verifications.
    """
    return verify(identity, signature, message)


def verify(identity: bytes | None, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is by `identity` over `message`; malformed input is simply not."""
    if identity is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Scope:
    """What everything after the adverts is bound to.

    Attributes:
        context: Hash of the plan.
        cohort: Hash of (context, sorted signed adverts).
    """

    context: bytes
    cohort: bytes

    def bind(self, tag: str, *parts: Key) -> bytes:
        """Canonical bytes of a tagged message in this scope."""
        return _encode_tag(tag) + self._prefix + encode_key(parts)

    @cached_property
    def _prefix(self) -> bytes:
        return encode_key((self.context, self.cohort))


@lru_cache(maxsize=64)
def _encode_tag(tag: str) -> bytes:
    return encode_key((f"fedoppu {tag}",))


def commit_seed(context: bytes, member: int, seed: bytes | bytearray) -> bytes:
    """Commitment to a self seed: SHA-256, hiding because the seed has 256 random bits."""
    return hashlib.sha256(encode_key(("fedoppu seed", context, member, bytes(seed)))).digest()


def hash_share(scope: Scope, kind: str, owner: int, *, holder: int, share: bytes) -> bytes:
    """10-byte hash of one share ("seed" or "key").

    It hides the share, which has 256 random bits. A holder that wants another share to pass for its
    dealer's needs 2^80 hashes. A dealer finds two shares for one hash with 2^40, which is of no use
    to it: either is on its polynomial or names it.
    """
    message = scope.bind("share", kind, owner, holder, bytes(share))
    return hashlib.sha256(message).digest()[:SHARE_HASH_BYTES]


def hash_cohort(context: bytes, adverts: Iterable[Advert]) -> bytes:
    """The cohort hash: over the context and the adverts with their signatures, by member."""
    ordered = sorted(adverts, key=lambda advert: advert.member)
    parts = [
        part for advert in ordered for part in (advert_bytes(context, advert), advert.signature)
    ]
    return hashlib.sha256(encode_key(("fedoppu cohort", context, *parts))).digest()


def advert_bytes(context: bytes, advert: Advert) -> bytes:
    """What an advert's signature is over."""
    keys = (advert.channel_key, advert.mask_key, advert.seed_commitment)
    return encode_key(("fedoppu advert", context, advert.member, *keys))


def bundle_bytes(scope: Scope, bundle: ShareBundle) -> bytes:
    """What a bundle's signature is over: the root of a Merkle tree of what is dealt to each.

    So a recipient can check the signature with its own part and a path of hashes alone.
    """
    return dealt_bytes(scope, bundle.member, merkle.root(dealt_leaves(bundle)))


def dealt_bytes(scope: Scope, dealer: int, root: bytes) -> bytes:
    """What a dealer signs, given the root of its tree."""
    return scope.bind("bundle", dealer, root)


def dealt_leaves(bundle: ShareBundle) -> list[bytes]:
    """The hashes of what a bundle holds for each recipient, in their order."""
    return [
        merkle.leaf(
            encode_key(
                (
                    recipient,
                    bundle.packages[recipient],
                    bundle.share_hashes.get(recipient, b""),
                    bundle.offers.get(recipient, b""),
                )
            )
        )
        for recipient in sorted(bundle.packages)
    ]


def masked_bytes(scope: Scope, dealers: Iterable[int], masked: MaskedUpdate) -> bytes:
    """What a masked vector's signature is over: its hash, complaints, and the share set."""
    words = masked.words
    little = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
    digest = hashlib.sha256(little.data).digest()
    parts = (_members(dealers), _members(masked.complaints), words.itemsize, words.size, digest)
    return scope.bind("masked", masked.member, *parts)


def survivors_bytes(scope: Scope, dealers: Iterable[int], survivors: Iterable[int]) -> bytes:
    """What a survivor signature is over: cohort, share set, survivor set."""
    return scope.bind("survivors", _members(dealers), _members(survivors))


def reply_bytes(scope: Scope, survivors: Iterable[int], reply: UnmaskReply) -> bytes:
    """What an unmask reply's signature is over."""
    shares = (
        encode_key(_flat(reply.seed_shares)),
        encode_key(_flat(reply.key_shares)),
    )
    return scope.bind("reply", reply.member, _members(survivors), *shares, reply.own_seed)


def _members(members: Iterable[int]) -> bytes:
    return _encode_members(tuple(members))


@lru_cache(maxsize=16)
def _encode_members(members: tuple[int, ...]) -> bytes:
    """Remembered, as a server binds the same two sets for each of its members, a thousand a set."""
    return encode_key(members)


def _flat(mapping: Mapping[int, bytes]) -> tuple[Key, ...]:
    return tuple(part for member in sorted(mapping) for part in (member, bytes(mapping[member])))
