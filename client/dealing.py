"""Shares of a client's two secrets: dealt to its neighbours in sealed packages, and opened by them.

A package is the share of the self seed and the share of the mask key, 66 bytes, sealed under a key
that only dealer and recipient can compute and bound to both, the cohort and the round, so that a
server can neither read it, nor change it, nor pass it to someone else. The dealer signs a hash of
each share: a holder keeps only what fits, so that a wrong share later names who lied.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedoppu.common.cohort import Cohort
from fedoppu.common.masking import KeyAgreement, seal, unseal
from fedoppu.common.rounds import ShareBundle
from fedoppu.common.secret_sharing import SHARE_BYTES, is_share, split
from fedoppu.common.signing import Identity, bundle_bytes, hash_share


@dataclass(frozen=True)
class Secrets:
    """What a client deals, and the key of the channels that it deals it through.

    Attributes:
        channel: X25519 private key for packages; never dealt.
        mask: X25519 private key for pairwise masks.
        seed: Self seed.
    """

    channel: bytearray = field(repr=False)
    mask: bytearray = field(repr=False)
    seed: bytearray = field(repr=False)


def deal(
    cohort: Cohort, identity: Identity, secrets: Secrets, *, entropy: Callable[[str, int], bytes]
) -> ShareBundle:
    """Deals shares of seed and mask key to each neighbour.

    Args:
        cohort: Of the attempt.
        identity: The dealer's.
        secrets: The dealer's.
        entropy: Uniform bytes for a use ("seed shares", "key shares") and a number.
    """
    scope, me = cohort.scope, identity.member
    packages = _plain_packages(cohort, me, secrets, entropy)
    agreement = KeyAgreement(secrets.channel)
    sealed, hashes = {}, {}
    for peer, package in packages.items():
        peer_key = cohort.adverts[peer].channel_key
        key = agreement.channel_key(peer_key, scope, sender=me, recipient=peer)
        sealed[peer] = seal(key, package, scope.bind("package", me, peer))
        hashes[peer] = hash_package(cohort, me, peer, package)
    unsigned = ShareBundle(me, sealed, hashes, b"")
    return replace(unsigned, signature=identity.sign(bundle_bytes(scope, unsigned)))


def _plain_packages(
    cohort: Cohort, owner: int, secrets: Secrets, entropy: Callable[[str, int], bytes]
) -> dict[int, bytes]:
    neighbours, threshold = cohort.graph.neighbours(owner), cohort.plan.threshold
    # In a complete graph the owner's own point counts as held, though it is never written down.
    holders = (*neighbours, owner) if cohort.graph.complete else neighbours
    seeds = split(
        secrets.seed,
        holders,
        threshold=threshold,
        entropy=lambda size: entropy("seed shares", size),
    )
    keys = split(
        secrets.mask, holders, threshold=threshold, entropy=lambda size: entropy("key shares", size)
    )
    return {peer: seeds[peer].value + keys[peer].value for peer in neighbours}


def open_package(
    cohort: Cohort, agreement: KeyAgreement, *, holder: int, bundle: ShareBundle
) -> bytes | None:
    """A dealer's package for a holder if it is the dealer's and fits its hash, else None.

    The hash's signature is the server's to check. A server that lies about the hash gains nothing:
    the holder keeps one share less.

    Args:
        cohort: Of the attempt.
        agreement: Of the holder's channel key.
        holder: Who opens it.
        bundle: The dealer's, its packages and hashes cut down to the holder's.
    """
    dealer, scope = bundle.member, cohort.scope
    if holder not in bundle.packages or dealer not in cohort.adverts:
        return None
    peer_key = cohort.adverts[dealer].channel_key
    key = agreement.channel_key(peer_key, scope, sender=dealer, recipient=holder)
    package = unseal(key, bundle.packages[holder], scope.bind("package", dealer, holder))
    if package is None or len(package) != 2 * SHARE_BYTES:
        return None
    fits = bundle.share_hashes.get(holder) == hash_package(cohort, dealer, holder, package)
    return package if fits and all(is_share(share) for share in halves(package)) else None


def halves(package: bytes | bytearray) -> tuple[bytes, bytes]:
    """The share of the self seed and the share of the mask key."""
    return bytes(package[:SHARE_BYTES]), bytes(package[SHARE_BYTES:])


def hash_package(cohort: Cohort, owner: int, holder: int, package: bytes) -> bytes:
    """The hashes of a package's two shares, one after the other."""
    seed, key = halves(package)
    return hash_share(cohort.scope, "seed", owner, holder=holder, share=seed) + hash_share(
        cohort.scope, "key", owner, holder=holder, share=key
    )
