"""Who masks with whom: everyone with everyone up to 64 members, above that a k-regular ring.

The ring is a Harary graph over the members in an order that the cohort hash draws (Bell et al.
2020, https://eprint.iacr.org/2020/704, section 3): each member's k neighbours are a uniform
random set. Every client recomputes it, so a server cannot choose a victim's neighbours. What a
server can do is try many cohorts of its own adverts; the thresholds are computed with sigma = 64
against it.
"""

import hashlib
from collections.abc import Collection, Iterable

from fedoppu.common.randomness import encode_key

COMPLETE_UP_TO = 64


def is_complete(size: int, neighbours: int) -> bool:
    """Whether a cohort of this size uses the complete graph."""
    return size <= COMPLETE_UP_TO or neighbours >= size - 1


class Graph:
    """The neighbour graph of one cohort.

    Attributes:
        members: Sorted.
        complete: Whether everyone is everyone's neighbour. Then an owner counts as a holder of one
            share of its own secrets, and the threshold is one over the whole cohort.
    """

    def __init__(self, cohort_hash: bytes, members: Iterable[int], neighbours: int) -> None:
        """Draws the graph.

        Args:
            cohort_hash: 32 bytes.
            members: Of the cohort.
            neighbours: Of each member, an even number; ignored where the graph is complete.
        """
        self.members = tuple(sorted(members))
        self.complete = is_complete(len(self.members), neighbours)
        half = self._half = neighbours // 2
        ring = sorted(self.members, key=lambda member: _rank(cohort_hash, member))
        self._place = {member: place for place, member in enumerate(ring)}
        # closed at both ends, so that a member's neighbours are two slices
        self._ring = ring[len(ring) - half :] + ring + ring[:half]

    def neighbours(self, member: int) -> tuple[int, ...]:
        """Neighbours of a member, sorted."""
        if self.complete:
            return tuple(other for other in self.members if other != member)
        return tuple(sorted(self._around(member)))

    def live_holders(self, owner: int, live: Collection[int]) -> int:
        """How many of `live`, a set of members, hold a share of the owner's secrets."""
        if self.complete:
            return len(live)
        return sum(map(live.__contains__, self._around(owner)))

    def _around(self, member: int) -> list[int]:
        place, half = self._place[member], self._half
        middle, end = place + half, place + 2 * half + 1
        return self._ring[place:middle] + self._ring[middle + 1 : end]


def _rank(cohort_hash: bytes, member: int) -> bytes:
    return hashlib.sha256(encode_key(("fedoppu graph", cohort_hash, member))).digest()
