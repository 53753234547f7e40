"""From replies to the sum: secrets restored and checked, masks removed, liars named.

Only what is needed is restored: the self seed of a survivor that is gone, and the mask key of a
member that dealt shares and then dropped. Never both of one member: the replies that the server's
machine accepts hold shares of one kind for each owner.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedoppu.common.cohort import Cohort
from fedoppu.common.masking import Mask, self_mask
from fedoppu.common.rounds import ShareBundle, UnmaskReply
from fedoppu.common.secret_sharing import Share, is_share, restore_checked
from fedoppu.common.signing import SHARE_HASH_BYTES, commit_seed, hash_share

SEED, KEY = "seed", "key"


@dataclass(frozen=True)
class Evidence:
    """Everything that the server has when it unmasks.

    Attributes:
        cohort: Of the attempt.
        bundles: The share set, by dealer.
        survivors: Whose vectors are in the sum.
        replies: Accepted replies, by sender.
    """

    cohort: Cohort
    bundles: Mapping[int, ShareBundle]
    survivors: frozenset[int]
    replies: Mapping[int, UnmaskReply]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Members whose pairwise masks are in the sum without their vector, sorted."""
        return tuple(sorted(self.bundles.keys() - self.survivors))


@dataclass
class Unmasking:
    """What came out.

    Attributes:
        masks: To add to the masked sum.
        liars: Member: what it did wrong.
        lost: Members whose secret cannot be restored; no sum if there is one.
    """

    masks: list[Mask] = field(default_factory=list, repr=False)
    liars: dict[int, str] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)


def own_seed_fits(cohort: Cohort, reply: UnmaskReply) -> bool:
    """Whether a reply's self seed is the one that its sender committed to."""
    commitment = cohort.adverts[reply.member].seed_commitment
    return commit_seed(cohort.scope.context, reply.member, reply.own_seed) == commitment


def share_fits(evidence: Evidence, reply: UnmaskReply, kind: str, owner: int) -> bool:
    """Whether a revealed share is the one whose hash the dealer signed."""
    value = (reply.seed_shares if kind == SEED else reply.key_shares)[owner]
    signed = evidence.bundles[owner].share_hashes[reply.member]
    start = 0 if kind == SEED else SHARE_HASH_BYTES
    expected = signed[start : start + SHARE_HASH_BYTES]
    scope = evidence.cohort.scope
    fits = hash_share(scope, kind, owner, holder=reply.member, share=value) == expected
    return fits and is_share(value)


def good_shares(evidence: Evidence, kind: str, owner: int) -> list[Share]:
    """The revealed shares of one secret that fit what their dealer signed."""
    found = []
    for reply in evidence.replies.values():
        shares = reply.seed_shares if kind == SEED else reply.key_shares
        if owner in shares and share_fits(evidence, reply, kind, owner):
            found.append(Share(reply.member, shares[owner]))
    return found


def owed_secrets(evidence: Evidence) -> list[tuple[str, int]]:
    """The secrets that shares must restore: kind and owner."""
    gone = [
        member
        for member in sorted(evidence.survivors)
        if member not in evidence.replies
        or not own_seed_fits(evidence.cohort, evidence.replies[member])
    ]
    return [(SEED, owner) for owner in gone] + [(KEY, owner) for owner in evidence.dropped]


def lacking(evidence: Evidence) -> list[int]:
    """Owners of whose owed secret fewer good shares than the threshold came."""
    threshold = evidence.cohort.plan.threshold
    return [
        owner
        for kind, owner in owed_secrets(evidence)
        if len(good_shares(evidence, kind, owner)) < threshold
    ]


def unmask(evidence: Evidence) -> Unmasking:
    """Restores what is owed and lists the masks that turn the masked sum into the sum."""
    result = Unmasking()
    _name_holders(evidence, result)
    seeds = {
        member: reply.own_seed
        for member, reply in evidence.replies.items()
        if own_seed_fits(evidence.cohort, reply)
    }
    keys: dict[int, bytes] = {}
    for kind, owner in owed_secrets(evidence):
        secret = _restore(evidence, kind, owner, result)
        if secret is not None:
            (seeds if kind == SEED else keys)[owner] = secret
    if not result.lost:
        result.masks += _self_masks(evidence, seeds)
        for dropped in evidence.dropped:
            _add_pair_masks(evidence, dropped, keys[dropped], result)
    return result


def _name_holders(evidence: Evidence, result: Unmasking) -> None:
    for member, reply in evidence.replies.items():
        if not own_seed_fits(evidence.cohort, reply):
            result.liars[member] = "revealed a self seed that is not the one it committed to"
        revealed = [(SEED, owner) for owner in reply.seed_shares]
        revealed += [(KEY, owner) for owner in reply.key_shares]
        wrong = [owner for kind, owner in revealed if not share_fits(evidence, reply, kind, owner)]
        if wrong:
            result.liars[member] = f"revealed a wrong share of member {wrong[0]}"


def _restore(evidence: Evidence, kind: str, owner: int, result: Unmasking) -> bytes | None:
    """One secret that fits its commitment or its public key; names the dealer where none does."""
    shares, threshold = good_shares(evidence, kind, owner), evidence.cohort.plan.threshold
    if len(shares) < threshold:
        result.lost.append(owner)
        return None
    advert, context = evidence.cohort.adverts[owner], evidence.cohort.scope.context

    def fits(secret: bytes) -> bool:
        if kind == SEED:
            return commit_seed(context, owner, secret) == advert.seed_commitment
        return evidence.cohort.exchange.load(secret).public == advert.mask_key

    restored = restore_checked(shares, threshold, check=fits)
    if restored is None:
        result.liars[owner] = "dealt shares that restore no secret of its advert"
        result.lost.append(owner)
        return None
    if restored.wrong:
        result.liars[owner] = f"dealt a wrong share to member {restored.wrong[0]}"
    return restored.secret


def _self_masks(evidence: Evidence, seeds: Mapping[int, bytes]) -> Iterable[Mask]:
    """The negatives of the self masks that are in the sum."""
    scope = evidence.cohort.scope
    for member in sorted(evidence.survivors):
        yield Mask(self_mask(seeds[member], scope, member).key, negative=True)


def _add_pair_masks(evidence: Evidence, dropped: int, key: bytes, result: Unmasking) -> None:
    """The dropped member's own masks with survivors, which are the negatives of the survivors'.

    What the lower member of a pair offered must be the secret that it promised. If it is not, the
    lower one lied, whether it is here or gone, and the mask cannot be taken off.
    """
    cohort = evidence.cohort
    pair = cohort.exchange.load(key)
    for member in cohort.graph.neighbours(dropped):
        if member not in evidence.survivors:
            continue
        low, high = sorted((dropped, member))
        offered = evidence.bundles[low].offers.get(high, b"")
        mask = pair.mask(cohort.mask_link(dropped, member), offered)
        if mask is None:
            result.liars[low] = f"offered member {high} another pair secret than it promised"
            result.lost.append(dropped)
            return
        result.masks.append(mask)
