"""A roster authority, its members and their epochs: what the tests of rosters share."""

import hashlib
from collections.abc import Collection
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedoppu.common.epochs import (
    EpochAnswer,
    RosterEpoch,
    collect,
    countersign,
    found,
    propose,
)
from fedoppu.common.signing import Identity

AUTHORITY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"authority").digest())
STRANGER = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"stranger").digest())
RUN = "ab" * 16


class Store:
    """A StateStore in memory; `saved` and `roll_back` are what a disk image does."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value


def person(index: int) -> Identity:
    return Identity(index, hashlib.sha256(b"identity %d" % index).digest())


def founded(size: int = 8) -> RosterEpoch:
    return found(AUTHORITY, [person(index).enrolled for index in range(size)])


def proposed(
    before: RosterEpoch, *, add: int = 1, revoked: Collection[int] = (), first: int = 0
) -> RosterEpoch:
    """The next epoch; newcomers have the keys of `person`, first is round 4 times the number."""
    free = 1 + before.entries[-1].index
    keys = [person(free + place).enrolled.identity for place in range(add)]
    first_round = first or 4 * (before.number + 1)
    return propose(
        AUTHORITY, before, first=(RUN, first_round), newcomers=keys, revoked=sorted(revoked)
    )


def signed_by(before: RosterEpoch, epoch: RosterEpoch, signers: Collection[int]) -> RosterEpoch:
    """The epoch with countersignatures of these people, members or not, none of them checked."""
    return replace(
        epoch, countersignatures={one: countersign(epoch, person(one)) for one in sorted(signers)}
    )


def completed(before: RosterEpoch, epoch: RosterEpoch) -> RosterEpoch:
    """The epoch with the countersignatures of all members before."""
    return collect(
        before,
        epoch,
        [EpochAnswer(one, epoch.number, countersign(epoch, person(one))) for one in before.members],
    )
