"""What may be wrong with a client's answer. A fault is that client's drop, never an exception."""

from collections.abc import Iterable, Sequence

from fedoppu.common.cohort import Cohort, advert_fault
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
from fedoppu.common.secret_sharing import SHARE_BYTES
from fedoppu.common.signing import (
    bundle_bytes,
    masked_bytes,
    reply_bytes,
    verify,
)
from fedoppu.server.unmasking import Evidence

PACKAGE_BYTES = 2 * SHARE_BYTES + 16
HASH_BYTES = 32


def fault_in_advert(
    advert: Advert, plan: RoundPlan, roster: Roster, *, others: Iterable[Advert]
) -> str | None:
    """What is wrong with an advert; a key of `others`, who were first, is no key of its own."""
    taken = {key for other in others for key in (other.channel_key, other.mask_key)}
    if taken & {advert.channel_key, advert.mask_key}:
        return "sent a key of another member"
    return advert_fault(advert, plan.context, roster)


def fault_in_bundle(bundle: ShareBundle, cohort: Cohort, roster: Roster) -> str | None:
    """What is wrong with a bundle; its packages cannot be read here."""
    neighbours = set(cohort.graph.neighbours(bundle.member))
    if bundle.packages.keys() != neighbours or bundle.share_hashes.keys() != neighbours:
        return "dealt shares to others than its neighbours"
    package_sizes = {len(package) for package in bundle.packages.values()}
    hash_sizes = {len(value) for value in bundle.share_hashes.values()}
    if package_sizes - {PACKAGE_BYTES} or hash_sizes - {HASH_BYTES}:
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
