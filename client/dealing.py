"""Shares of a client's two secrets: dealt to its neighbours in sealed packages, and taken by them.

A package is the share of the self seed and the share of the mask key, 66 bytes, sealed for its
recipient and bound to dealer, cohort and round, so that a server can neither read it, nor change
it, nor pass it to someone else. The dealer publishes a hash of each share: a holder keeps only what
fits, so that a wrong share later names who lied. In the hybrid exchange the dealer also offers the
secret of the pair to each neighbour above it (`common/pairwise.py`).

What a recipient does with bad ones:

- A package that is missing, does not open or does not fit its hashes is a share that is not held.
  The recipient says so with its masked vector (a complaint), and reveals one share less.
- Masks follow the signed share set all the same: the dealer adds its mask with this recipient
  whatever came of the package. With X25519 the recipient can always compute that mask.
- In the hybrid exchange a recipient that got no valid offer of a lower dealer cannot. A vector
  without one of its masks would spoil the sum, and a server that withholds all offers would read
  the vector of the highest member. It cannot mask as if the dealer were not in the share set
  either, for the sum would be right only if the dealer's vector were left out, which nobody can
  promise here. So it sends no vector, says whose offer it was and drops out. Its own mask key is
  then restored like any other's that dropped, and opens what was offered: if that is no secret,
  the server names the dealer, whose lie costs the round, as a spoiled vector would.
- Nothing that is not signed by its dealer counts in the hybrid exchange, for anyone could have made
  it. An offer of the server's own would let it take that mask off the victim's vector.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedoppu.common import merkle
from fedoppu.common.cohort import Cohort
from fedoppu.common.errors import ProtocolError
from fedoppu.common.pairwise import PLAIN_BYTES, KeyPair
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import ShareBundle, SharesDelivered
from fedoppu.common.secret_sharing import SHARE_BYTES, is_share, split
from fedoppu.common.signing import (
    Identity,
    bundle_bytes,
    dealt_bytes,
    dealt_leaves,
    hash_share,
    verify,
)


@dataclass(frozen=True)
class Secrets:
    """What a client deals, and the key of the channels that it deals it through.

    Attributes:
        channel: Private key for packages; never dealt.
        mask: Private key for pairwise masks.
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
    me, exchange = identity.member, cohort.exchange
    plain = _plain_packages(cohort, me, secrets, entropy)
    channel, mask = exchange.load(secrets.channel), exchange.load(secrets.mask)
    unsigned = ShareBundle(
        me,
        {peer: channel.seal(plain[peer], cohort.channel_link(me, peer)) for peer in plain},
        {peer: hash_package(cohort, me, peer, plain[peer]) for peer in plain},
        b"",
        {peer: mask.offer(cohort.mask_link(me, peer)) for peer in exchange.heirs(me, tuple(plain))},
    )
    return replace(unsigned, signature=identity.sign(bundle_bytes(cohort.scope, unsigned)))


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


@dataclass(frozen=True)
class Taken:
    """What a client takes from the dealers of its share set.

    Attributes:
        held: Owner: its two shares.
        pairs: Neighbour: key of the pairwise mask.
        complaints: Neighbours whose share is not held, sorted.
    """

    held: dict[int, bytearray] = field(default_factory=dict, repr=False)
    pairs: dict[int, bytearray] = field(default_factory=dict, repr=False)
    complaints: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Taking:
    """A recipient, for as long as it opens what was dealt to it.

    Attributes:
        cohort: Of the attempt.
        roster: The members' identities.
        holder: The recipient.
        channel: Its channel key.
        mask: Its mask key.
    """

    cohort: Cohort
    roster: Roster
    holder: int
    channel: KeyPair = field(repr=False)
    mask: KeyPair = field(repr=False)

    def take(self, event: SharesDelivered) -> Taken:
        """Opens what the neighbours in the share set dealt.

        Raises:
            ProtocolError: A dealer offered no pair secret that is signed by it and opens.
        """
        taken, dealers = Taken(), frozenset(event.dealers)
        for dealer in self.cohort.graph.neighbours(self.holder):
            if dealer not in dealers:
                continue
            bundle = self._dealt(dealer, event.bundles.get(dealer))
            taken.pairs[dealer] = self._pair_key(dealer, bundle)
            package = None if bundle is None else self._open(bundle)
            if package is None:
                taken.complaints.append(dealer)
            else:
                taken.held[dealer] = bytearray(package)
        return taken

    def _dealt(self, dealer: int, bundle: ShareBundle | None) -> ShareBundle | None:
        """The dealer's bundle if there is one, and in an exchange that needs it, if it is signed."""
        if bundle is None or bundle.member != dealer or self.holder not in bundle.packages:
            return None
        signed = self.cohort.exchange.authentic or is_signed(
            self.cohort, self.roster, holder=self.holder, bundle=bundle
        )
        return bundle if signed else None

    def _pair_key(self, dealer: int, bundle: ShareBundle | None) -> bytearray:
        offered = b"" if bundle is None else bundle.offers.get(self.holder, b"")
        mask = self.mask.mask(self.cohort.mask_link(self.holder, dealer), offered)
        if mask is None:
            raise ProtocolError(
                f"member {dealer} offered member {self.holder} no pair secret that is signed by it "
                "and opens: without that mask this client sends no vector and drops out"
            )
        return bytearray(mask.key)

    def _open(self, bundle: ShareBundle) -> bytes | None:
        """A dealer's package if it is the dealer's and fits its hashes, else None.

        With X25519 nobody checks here that the hashes are signed; that is the server's part. One
        that lies about them gains nothing: the holder keeps a share less.
        """
        dealer, holder = bundle.member, self.holder
        link = self.cohort.channel_link(holder, dealer)
        package = self.channel.unseal(bundle.packages[holder], link)
        if package is None or len(package) != PLAIN_BYTES:
            return None
        hashed = hash_package(self.cohort, dealer, holder, package)
        fits = bundle.share_hashes.get(holder) == hashed
        return package if fits and all(is_share(share) for share in halves(package)) else None


def is_signed(cohort: Cohort, roster: Roster, *, holder: int, bundle: ShareBundle) -> bool:
    """Whether the dealer signed what was delivered of its bundle: package, hashes and offer.

    Args:
        cohort: Of the attempt.
        roster: The members' identities.
        holder: The recipient.
        bundle: The dealer's, cut down to the holder's part, with the path from it to the root.
    """
    recipients = cohort.graph.neighbours(bundle.member)
    part = replace(bundle, packages={holder: bundle.packages[holder]})
    root = merkle.climb(
        dealt_leaves(part)[0],
        recipients.index(holder),
        count=len(recipients),
        path=bundle.path,
    )
    if root is None:
        return False
    message = dealt_bytes(cohort.scope, bundle.member, root)
    return verify(roster.identity(bundle.member), bundle.signature, message)


def halves(package: bytes | bytearray) -> tuple[bytes, bytes]:
    """The share of the self seed and the share of the mask key."""
    return bytes(package[:SHARE_BYTES]), bytes(package[SHARE_BYTES:])


def hash_package(cohort: Cohort, owner: int, holder: int, package: bytes) -> bytes:
    """The hashes of a package's two shares, one after the other."""
    seed, key = halves(package)
    return hash_share(cohort.scope, "seed", owner, holder=holder, share=seed) + hash_share(
        cohort.scope, "key", owner, holder=holder, share=key
    )
