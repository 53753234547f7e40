"""What may be wrong with a client's answer. A fault is that client's drop, never an exception."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedoppu.common import merkle
from fedoppu.common.cohort import Cohort, advert_fault
from fedoppu.common.pairwise import key_exchange
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    MaskedUpdate,
    RoundPlan,
    ShareBundle,
    UnmaskReply,
)
from fedoppu.common.signing import (
    SHARE_HASH_BYTES,
    bundle_bytes,
    dealt_leaves,
    masked_bytes,
    reply_bytes,
    verify,
)
from fedoppu.server.unmasking import Evidence


def fault_in_advert(
    advert: Advert, plan: RoundPlan, roster: Roster, *, others: Iterable[Advert]
) -> str | None:
    """What is wrong with an advert; a key of `others`, who were first, is no key of its own."""
    taken = {key for other in others for key in (other.channel_key, other.mask_key)}
    if taken & {advert.channel_key, advert.mask_key}:
        return "sent a key of another member"
    return advert_fault(advert, plan.context, roster, exchange=key_exchange(plan))


def fault_in_bundle(bundle: ShareBundle, cohort: Cohort, roster: Roster) -> str | None:
    """What is wrong with a bundle; its packages cannot be read here."""
    exchange, neighbours = cohort.exchange, cohort.graph.neighbours(bundle.member)
    heirs = exchange.heirs(bundle.member, neighbours)
    dealt = (
        (bundle.packages, neighbours, exchange.package_bytes),
        (bundle.share_hashes, neighbours, 2 * SHARE_HASH_BYTES),
        (bundle.offers, heirs, exchange.offer_bytes),
    )
    for parts, recipients, size in dealt:
        if parts.keys() != set(recipients):
            return "dealt shares to others than its neighbours"
        if {len(part) for part in parts.values()} - {size}:
            return "dealt shares of a wrong size"
    return unsigned(bundle, bundle_bytes(cohort.scope, bundle), roster)


def fault_in_masked(
    masked: MaskedUpdate, cohort: Cohort, roster: Roster, *, dealers: Sequence[int]
) -> str | None:
    """What is wrong with a masked vector; its content cannot be judged."""
    layout, words = VectorLayout.of(cohort.plan), masked.words
    if words.shape != (layout.length,) or words.dtype != layout.dtype:
        return (
            f"sent a vector of {words.shape} {words.dtype}, not ({layout.length},) {layout.dtype}"
        )
    possible = set(cohort.graph.neighbours(masked.member)).intersection(dealers)
    if list(masked.complaints) != sorted(possible.intersection(masked.complaints)):
        return "complained about members that dealt it nothing"
    return unsigned(masked, masked_bytes(cohort.scope, dealers, masked), roster)


def fault_in_reply(reply: UnmaskReply, evidence: Evidence, roster: Roster) -> str | None:
    """What is wrong with an unmask reply; each share in it is judged when it is used."""
    neighbours = frozenset(evidence.cohort.graph.neighbours(reply.member))
    seeds = neighbours & evidence.survivors
    keys = neighbours.intersection(evidence.dropped)
    if not (reply.seed_shares.keys() <= seeds and reply.key_shares.keys() <= keys):
        return "revealed shares that were not asked for"
    survivors = sorted(evidence.survivors)
    return unsigned(reply, reply_bytes(evidence.cohort.scope, survivors, reply), roster)


def unsigned(event: ClientEvent, message: bytes, roster: Roster) -> str | None:
    """The fault of an answer that its sender did not sign for this round, or None."""
    if verify(roster.identity(event.member), event.signature, message):
        return None
    return f"sent a {type(event).__name__} whose signature is not its own for this round"


def proofs_of(bundle: ShareBundle) -> dict[int, tuple[bytes, ...]]:
    """Recipient: the path from its part of a bundle to what the dealer signed."""
    _, paths = merkle.tree(dealt_leaves(bundle))
    return dict(zip(sorted(bundle.packages), paths, strict=True))


def cut_down(bundle: ShareBundle, recipient: int, *, path: tuple[bytes, ...]) -> ShareBundle:
    """A bundle as one recipient needs it."""
    offered = bundle.offers.get(recipient)
    return replace(
        bundle,
        packages={recipient: bundle.packages[recipient]},
        share_hashes={recipient: bundle.share_hashes[recipient]},
        offers={} if offered is None else {recipient: offered},
        path=path,
    )
