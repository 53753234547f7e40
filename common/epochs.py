"""Roster epochs: how a roster changes, so that everyone who pins one follows to the same next one.

An epoch holds everybody who was ever enrolled, with the epoch that enrolled and the epoch that
revoked each. The next epoch keeps every entry, may mark members as revoked, and adds newcomers. It
names the hash of the one before; the roster authority signs it, whose Ed25519 key epoch 0 fixes;
and members of the one before countersign it (spec of secure aggregation, rule 13).

Guaranteed to a client that pins one epoch, if at most c members of it are corrupt:

- No two epochs with one number are ever accepted, by whomever. Each needs countersignatures of more
  than (m + c) / 2 of the m members before it, so two would share more than c signers, and an honest
  member countersigns one epoch per number. A roster cannot be forked, not even by the authority.
- Indices and identities are never used again, never move, and who was revoked stays so: the lists
  only grow, and both are unique over the whole list.
- Nobody joins in silence: most of the members before have seen the newcomer's epoch.

Not guaranteed: who is enrolled. Countersigning is what an honest client's software does for every
epoch that keeps the rules, so an authority that works with the server can still enrol its own
people, if only as fast as the owners' limits of growth let it. Nor that the chain goes on: whoever
holds the authority's key, or m - (m + c) / 2 absent members, can stop it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedoppu.common.errors import ProtocolError, UsageError
from fedoppu.common.randomness import Key, encode_key
from fedoppu.common.roster import IDENTITY_BYTES, Member, Roster
from fedoppu.common.signing import Identity, verify

HASH_BYTES = 32
NOTHING_BEFORE = bytes(HASH_BYTES)  # what epoch 0 has in place of a hash


@dataclass(frozen=True)
class Enrolled:
    """One who was ever enrolled.

    Attributes:
        index: In the roster; nobody else ever has it.
        identity: Ed25519 public key, 32 bytes; nobody else ever has it.
        epoch: The one that enrolled it.
        revoked: The epoch that revoked it; 0 while it is a member.
    """

    index: int
    identity: bytes
    epoch: int
    revoked: int = 0


@dataclass(frozen=True)
class RosterEpoch:
    """A roster, and how it came about.

    Attributes:
        number: From 0.
        previous: Hash of the epoch before, 32 bytes; zeros in epoch 0.
        authority: Ed25519 public key of the roster authority, the same in all epochs of a chain.
        run_id: Hex, of the run under way when it was announced; empty if there was none.
        first_round: The first round of that run that it holds for. It holds for all of any other.
        entries: Everybody who was ever enrolled, sorted by index.
        signature: Of the authority, 64 bytes.
        countersignatures: Member of the epoch before: its signature. Not in the hash.

    Raises:
        UsageError: The entries are not a list of unique members whose epochs are possible.
    """

    number: int
    previous: bytes
    authority: bytes
    run_id: str
    first_round: int
    entries: tuple[Enrolled, ...]
    signature: bytes = b""
    countersignatures: Mapping[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the entries by themselves."""
        Roster(tuple(Member(entry.index, entry.identity) for entry in self.entries))
        for entry in self.entries:
            if not 0 <= entry.epoch <= self.number or not (
                entry.revoked == 0 or entry.epoch < entry.revoked <= self.number
            ):
                raise UsageError(
                    f"member {entry.index} of roster epoch {self.number} was enrolled in epoch "
                    f"{entry.epoch} and revoked in {entry.revoked}: neither may be later than the "
                    "epoch itself, and a revocation comes after the enrolment"
                )
        if len(self.previous) != HASH_BYTES or len(self.authority) != IDENTITY_BYTES:
            raise UsageError("a roster epoch has a hash and an authority's key of 32 bytes each")

    @cached_property
    def roster(self) -> Roster:
        """Its members: what a plan names by its hash."""
        members = [entry for entry in self.entries if not entry.revoked]
        return Roster(tuple(Member(entry.index, entry.identity) for entry in members))

    @cached_property
    def members(self) -> frozenset[int]:
        """Indices of its members."""
        return frozenset(member.index for member in self.roster.members)

    def canonical(self) -> bytes:
        """The bytes that are hashed: all but the signatures."""
        flat: list[Key] = []
        for entry in self.entries:
            flat += [entry.index, entry.identity, entry.epoch, entry.revoked]
        head = (self.number, self.previous, self.authority, self.run_id, self.first_round)
        return encode_key(("fedoppu roster epoch", *head, *flat))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: what a client pins, and the next epoch names."""
        return hashlib.sha256(self.canonical()).digest()

    def young(self, epochs: int) -> frozenset[int]:
        """Members that were enrolled fewer than `epochs` epochs ago; the founders never are."""
        return frozenset(
            entry.index
            for entry in self.entries
            if not entry.revoked and entry.epoch > max(self.number - epochs, 0)
        )

    @property
    def newcomers(self) -> frozenset[int]:
        """Members that this epoch enrolled."""
        return self.young(1)


@dataclass(frozen=True)
class EpochAnnounced:
    """Server to client, `query.roster`: the next epoch, to countersign or, when enough did, to follow."""

    epoch: RosterEpoch


@dataclass(frozen=True)
class EpochAnswer:
    """Client to server, `query.roster`.

    Attributes:
        member: The sender.
        number: Of the epoch.
        countersignature: 64 bytes, or none where the epoch had enough of them and was followed.
    """

    member: int
    number: int
    countersignature: bytes


# --- the authority's side ------------------------------------------------------------------------


def found(authority: Ed25519PrivateKey, members: Iterable[Member]) -> RosterEpoch:
    """Epoch 0, signed: the members that every later epoch goes back to.

    Args:
        authority: The key of the roster authority. It never comes near a server's process.
        members: Sorted by index.
    """
    entries = tuple(Enrolled(member.index, member.identity, 0) for member in members)
    key = authority.public_key().public_bytes_raw()
    return _signed(authority, RosterEpoch(0, NOTHING_BEFORE, key, "", 0, entries))


def propose(
    authority: Ed25519PrivateKey,
    before: RosterEpoch,
    *,
    first: tuple[str, int],
    newcomers: Sequence[bytes] = (),
    revoked: Iterable[int] = (),
) -> RosterEpoch:
    """The next epoch, signed. Store it before it is shown: members countersign one per number.

    Args:
        authority: The key of the roster authority.
        before: The newest epoch.
        first: The run under way, and its first round that the new epoch shall hold for; members
            refuse to countersign one that comes sooner than the round after the next.
        newcomers: Their identities; they get the next free indices.
        revoked: Indices of members that are one no more.

    Raises:
        UsageError: Somebody is to be revoked who is no member, or an identity was used before.
    """
    number, gone = before.number + 1, frozenset(revoked)
    if not gone <= before.members:
        raise UsageError(f"member {min(gone - before.members)} is in no roster: nothing to revoke")
    kept = [
        replace(entry, revoked=number) if entry.index in gone else entry for entry in before.entries
    ]
    free = 1 + max((entry.index for entry in before.entries), default=-1)
    new = [Enrolled(free + place, identity, number) for place, identity in enumerate(newcomers)]
    run_id, first_round = first
    head = (number, before.digest, before.authority, run_id, first_round)
    return _signed(authority, RosterEpoch(*head, tuple(kept + new)))


def _signed(authority: Ed25519PrivateKey, epoch: RosterEpoch) -> RosterEpoch:
    return replace(epoch, signature=authority.sign(_authority_bytes(epoch)))


# --- signatures ----------------------------------------------------------------------------------


def countersign(epoch: RosterEpoch, identity: Identity) -> bytes:
    """A member's signature over an epoch, 64 bytes. It must remember the epoch before it signs."""
    return identity.sign(_countersign_bytes(epoch))


def countersigners(before: RosterEpoch, epoch: RosterEpoch) -> frozenset[int]:
    """Members of the epoch before whose countersignature is good; others count for nothing."""
    message = _countersign_bytes(epoch)
    return frozenset(
        member
        for member, signature in epoch.countersignatures.items()
        if verify(before.roster.identity(member), signature, message)
    )


def collect(before: RosterEpoch, epoch: RosterEpoch, answers: Iterable[EpochAnswer]) -> RosterEpoch:
    """The epoch with the good countersignatures of these answers added: the server's side.

    Clients decide when they are enough, each by its own policy; a server goes on asking until
    `countersigners` are more than (m + c) / 2 for the largest c that its members assume.
    """
    told = {
        answer.member: answer.countersignature
        for answer in answers
        if answer.number == epoch.number and answer.countersignature
    }
    full = replace(epoch, countersignatures={**epoch.countersignatures, **told})
    good = sorted(countersigners(before, full))
    return replace(full, countersignatures={one: full.countersignatures[one] for one in good})


def _authority_bytes(epoch: RosterEpoch) -> bytes:
    return encode_key(("fedoppu roster authority", epoch.number, epoch.digest))


def _countersign_bytes(epoch: RosterEpoch) -> bytes:
    return encode_key(("fedoppu roster countersignature", epoch.number, epoch.digest))


# --- the rules of the chain ----------------------------------------------------------------------


def require_authority(epoch: RosterEpoch) -> None:
    """Refuses an epoch that the authority it names has not signed.

    Raises:
        ProtocolError: The signature is not good.
    """
    if not verify(epoch.authority, epoch.signature, _authority_bytes(epoch)):
        raise ProtocolError(f"roster epoch {epoch.number} is not signed by the roster authority")


def require_successor(before: RosterEpoch, epoch: RosterEpoch) -> None:
    """Refuses what is not an epoch that may come after another, countersignatures apart.

    Raises:
        ProtocolError: It is not the next, has another past or authority or no good signature of
            it, loses, changes or brings back an entry, or begins no later than the one before.
    """
    number = epoch.number
    if number != before.number + 1:
        raise ProtocolError(
            f"roster epoch {number} does not follow epoch {before.number}: send each epoch in turn"
        )
    if epoch.previous != before.digest:
        raise ProtocolError(
            f"roster epoch {number} follows {epoch.previous.hex()[:12]}, this client's epoch "
            f"{before.number} is {before.digest.hex()[:12]}: the roster was forked"
        )
    if epoch.authority != before.authority:
        raise ProtocolError(f"roster epoch {number} names another authority than epoch 0")
    require_authority(epoch)
    _require_kept(before, epoch)
    same_run = epoch.run_id != "" and epoch.run_id == before.run_id
    if same_run and epoch.first_round <= before.first_round:
        raise ProtocolError(
            f"roster epoch {number} holds from round {epoch.first_round}, epoch {before.number} "
            f"from round {before.first_round}: a later epoch begins later"
        )


def _require_kept(before: RosterEpoch, epoch: RosterEpoch) -> None:
    """Every entry stays as it was, revoked at most; every other is enrolled by this epoch."""
    number = epoch.number
    after = {entry.index: entry for entry in epoch.entries}
    for entry in before.entries:
        now = after.pop(entry.index, None)
        gone = replace(entry, revoked=number) if not entry.revoked else entry
        if now not in (entry, gone):
            raise ProtocolError(
                f"roster epoch {number} changes the entry of member {entry.index}: an index keeps "
                "its identity for good, and who was revoked does not come back"
            )
    for entry in after.values():
        if entry.epoch != number or entry.revoked:
            raise ProtocolError(
                f"roster epoch {number} adds member {entry.index} as enrolled in epoch "
                f"{entry.epoch}: newcomers are enrolled by the epoch that adds them"
            )
