"""Who may take part: members and their Ed25519 identities, pinned by hash.

Guarantee: whoever pins a roster's hash accepts signatures of its members alone, so a server cannot
slip in a stranger or another key for a member. Not covered: who is enrolled. A roster that the
server alone fills can be full of its own members (Sybils), and no protocol mends that. How a
roster changes is in common/epochs.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import encode_key

IDENTITY_BYTES = 32


@dataclass(frozen=True)
class Member:
    """One enrolled member.

    Attributes:
        index: Its number, at least 0; sampling and randomness speak of it.
        identity: Ed25519 public key, 32 bytes.
    """

    index: int
    identity: bytes


@dataclass(frozen=True)
class Roster:
    """All members of a federation, sorted by index.

    Attributes:
        members: Unique indices, unique identities.

    Raises:
        UsageError: Indices are not sorted and unique, or an identity is malformed or used twice.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        """Check that indices and identities are unique."""
        indices = [member.index for member in self.members]
        if indices != sorted(set(indices)) or (indices and indices[0] < 0):
            raise UsageError("roster members must have sorted, unique indices from 0")
        for member in self.members:
            if len(member.identity) != IDENTITY_BYTES:
                raise UsageError(
                    f"the identity of member {member.index} must have {IDENTITY_BYTES} bytes, "
                    f"got {len(member.identity)}"
                )
        if len({member.identity for member in self.members}) != len(self.members):
            raise UsageError("two roster members have one identity; each enrols its own key")

    def __len__(self) -> int:
        """Number of members."""
        return len(self.members)

    def __contains__(self, index: object) -> bool:
        """Whether a member has this index."""
        return index in self._identities

    def identity(self, index: int) -> bytes | None:
        """Ed25519 public key of a member, or None if nobody has this index."""
        return self._identities.get(index)

    def canonical(self) -> bytes:
        """The bytes that are hashed: index and identity of each member, in order."""
        parts = [part for member in self.members for part in (member.index, member.identity)]
        return encode_key(("fedoppu roster", *parts))

    def hash(self) -> str:
        """SHA-256 of the canonical bytes, hex: what a client pins and a plan names."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        """Made once: each member of a cohort compares it in each stage, 15 ms for 10,000 members."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @cached_property
    def _identities(self) -> Mapping[int, bytes]:
        return {member.index: member.identity for member in self.members}
