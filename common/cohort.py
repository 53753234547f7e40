"""The cohort of one attempt: the valid adverts, their hash, and the graph over them.

Both sides build it with the same function from the same adverts, so that an invalid advert is that
member's drop on both, whether or not the server filtered it out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedoppu.common.graph import Graph
from fedoppu.common.pairwise import KeyExchange, Link, key_exchange
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import Advert, RoundPlan
from fedoppu.common.signing import Scope, advert_bytes, hash_cohort, verify_public


@dataclass(frozen=True)
class Cohort:
    """The members of one attempt.

    Attributes:
        plan: The attempt's plan.
        adverts: Valid adverts by member, sorted.
    """

    plan: RoundPlan
    adverts: Mapping[int, Advert]

    @cached_property
    def scope(self) -> Scope:
        """Context and cohort hash."""
        context = self.plan.context
        return Scope(context, hash_cohort(context, self.adverts.values()))

    @cached_property
    def graph(self) -> Graph:
        """The neighbour graph."""
        return Graph(self.scope.cohort, self.adverts, self.plan.neighbours)

    @property
    def exchange(self) -> KeyExchange:
        """How its members exchange keys."""
        return key_exchange(self.plan)

    def channel_link(self, own: int, peer: int) -> Link:
        """One end of a pair, for packages."""
        return Link(self.scope, own, peer, self.adverts[peer].channel_key)

    def mask_link(self, own: int, peer: int) -> Link:
        """One end of a pair, for its mask."""
        return Link(self.scope, own, peer, self.adverts[peer].mask_key)

    @property
    def members(self) -> tuple[int, ...]:
        """Sorted."""
        return tuple(self.adverts)

    def __len__(self) -> int:
        """Number of members."""
        return len(self.adverts)


def advert_fault(
    advert: Advert, context: bytes, roster: Roster, *, exchange: KeyExchange
) -> str | None:
    """What is wrong with an advert by itself, or None.

    Args:
        advert: What is judged.
        context: Of the plan that it should be for.
        roster: All members.
        exchange: Of that plan.
    """
    identity = roster.identity(advert.member)
    if identity is None:
        return "is not in the roster"
    if not verify_public(identity, advert.signature, advert_bytes(context, advert)):
        return "sent an advert whose signature is not its own for this plan"
    if exchange.is_weak(advert.channel_key) or exchange.is_weak(advert.mask_key):
        return "sent a key of low order or wrong length"
    if advert.channel_key == advert.mask_key:
        return "sent one key twice"
    return None


def form_cohort(
    plan: RoundPlan, adverts: Iterable[Advert], roster: Roster
) -> tuple[Cohort, dict[int, str]]:
    """The cohort of the valid adverts, and what is wrong with the members of the others.

    A key that two adverts share makes the later one (by member) invalid.
    """
    context, exchange = plan.context, key_exchange(plan)
    valid: dict[int, Advert] = {}
    faults: dict[int, str] = {}
    keys: set[bytes] = set()
    for advert in sorted(adverts, key=lambda advert: advert.member):
        fault = advert_fault(advert, context, roster, exchange=exchange)
        if fault is None and keys & {advert.channel_key, advert.mask_key}:
            fault = "sent a key of another member"
        if fault is not None:
            faults[advert.member] = fault
            continue
        valid[advert.member] = advert
        keys |= {advert.channel_key, advert.mask_key}
    return Cohort(plan, valid), faults
