"""One round of secure aggregation, as data: its plan, and the events of the two state machines.

The plan's SHA-256 is the *context*: it is in every signature, HKDF info, associated data, dither
and noise stream, so that nothing made for one attempt means anything in another (spec of secure
aggregation, rule 1). No other message sets any of these values.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32] | NDArray[np.uint16]
# Of docs/protocol.md; bound into every context, so that programs of two versions part at once.
PROTOCOL = 1


class Exchange(StrEnum):
    """The exchanges of a round, in their order; the values are Flower message types."""

    KEYS = "query.keys"
    SHARES = "query.shares"
    MASKED = "train.masked"
    CONSISTENCY = "query.consistency"
    UNMASK = "query.unmask"


@dataclass(frozen=True)
class RoundPlan:
    """Everything that changes from round to round.

    Attributes:
        run_id: Hex, fresh for a run.
        round: From 1.
        attempt: From 0.
        config_hash: Hex, of the FederationConfig.
        roster_hash: Hex, of the roster.
        model_hash: Hex, digest of the shared adapter that this round starts from.
        num_params: Length of the vector of parameters that travels.
        factors: Factors that travel, "A", "B" or "AB".
        clip: Bound of the L2 norm of an update.
        value_range: Coordinates are clamped to +- this.
        word_bits: Sums are modulo 2 ** word_bits.
        level_bits: Levels of a coordinate, 2 ** level_bits.
        max_weight: Weights are 1 to this, and scale an update by weight / max_weight.
        threshold: Shares that restore a secret (t).
        neighbours: Neighbours of each member in the graph (k).
        min_cohort: Fewest members in the cohort.
        max_drops: Most members of the cohort that may be missing from the survivor set.
        noise_scale: Standard deviation, in levels, of the integer noise that each client adds; 0 where none does.
        rotation: Hex, 32-byte public seed of the rotation; empty where vectors are not rotated.
        metrics: Whether weight, loss and counts travel beside the parameters; never with differential privacy.
        hybrid: Whether keys are agreed with MLKEM768 and X25519, and not with X25519 alone.
    """

    run_id: str
    round: int
    attempt: int
    config_hash: str
    roster_hash: str
    model_hash: str
    num_params: int
    factors: str
    clip: float
    value_range: float
    word_bits: int
    level_bits: int
    max_weight: int
    threshold: int
    neighbours: int
    min_cohort: int
    max_drops: int
    noise_scale: float = 0.0
    rotation: str = ""
    metrics: bool = True
    hybrid: bool = False

    def canonical(self) -> bytes:
        """JSON with sorted keys: the bytes that travel and that are hashed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def context(self) -> bytes:
        """SHA-256 of the protocol's version and the canonical bytes; every advert's check asks for it."""
        return hashlib.sha256(b"fedoppu round %d\n" % PROTOCOL + self.canonical()).digest()


@dataclass(frozen=True)
class RoundOpened:
    """Server to client: a plan is proposed."""

    plan: RoundPlan


@dataclass(frozen=True)
class Advert:
    """Client to server, `query.keys`: this attempt's keys.

    Attributes:
        member: Index in the roster.
        channel_key: Public key for the packages of shares, of the plan's key exchange.
        mask_key: Public key for the pairwise masks.
        seed_commitment: SHA-256 of the self-mask seed.
        signature: Ed25519 over all of it and the context.
    """

    member: int
    channel_key: bytes
    mask_key: bytes
    seed_commitment: bytes
    signature: bytes


@dataclass(frozen=True)
class CohortFixed:
    """Server to client, `query.shares`: all adverts of the cohort, sorted by member."""

    adverts: tuple[Advert, ...]


@dataclass(frozen=True)
class ShareBundle:
    """Client to server: one sealed package of shares for each neighbour.

    Attributes:
        member: The dealer.
        packages: Recipient: (share of self seed, share of mask key), sealed.
        share_hashes: Recipient: 20 bytes, a 10-byte hash of each of the two shares (only one of
            them is ever revealed), so that a wrong share names its dealer or holder.
        signature: Ed25519 over all of it, the cohort hash and the context.
        offers: Recipient: the sealed secret of the pair and its hash, for neighbours above the
            dealer; only in the hybrid exchange.
        path: In what is delivered of a bundle, in the hybrid exchange: hashes that lead from the
            recipient's part to what was signed.
    """

    member: int
    packages: Mapping[int, bytes]
    share_hashes: Mapping[int, bytes]
    signature: bytes
    offers: Mapping[int, bytes] = field(default_factory=dict)
    path: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class SharesDelivered:
    """Server to client, `train.masked`: the bundles for this client.

    Attributes:
        dealers: The share set, sorted: members whose bundles the server has.
        bundles: Dealer: the bundle, cut down to what is for this client.
    """

    dealers: tuple[int, ...]
    bundles: Mapping[int, ShareBundle]


@dataclass(frozen=True)
class UpdateReady:
    """The client's own runtime to its state machine: the integers to mask. Never on the wire."""

    words: Words = field(repr=False)


@dataclass(frozen=True)
class MaskedUpdate:
    """Client to server: the only model data that a client sends in a secure round.

    Attributes:
        member: The sender.
        words: (length,) uint32 or uint16, uniform to whoever lacks the masks.
        signature: Ed25519 over its hash, the complaints, the cohort hash and the context.
        complaints: Dealers, sorted, whose share the sender does not hold, because its package was
            missing, did not open or did not fit its hashes.
    """

    member: int
    words: Words = field(repr=False)
    signature: bytes
    complaints: tuple[int, ...] = ()


@dataclass(frozen=True)
class SurvivorsProposed:
    """Server to client, `query.consistency`: the share set, and whose vectors are in the sum.

    Both are sorted.
    """

    dealers: tuple[int, ...]
    survivors: tuple[int, ...]


@dataclass(frozen=True)
class SurvivorSignature:
    """Client to server: its signature over (cohort, share set, survivor set)."""

    member: int
    signature: bytes


@dataclass(frozen=True)
class UnmaskRequested:
    """Server to client, `query.unmask`: the signatures that show one survivor set to all."""

    signatures: Mapping[int, bytes]


@dataclass(frozen=True)
class UnmaskReply:
    """Client to server: for each owner one share of one secret, never of both.

    Attributes:
        member: The sender.
        seed_shares: Owner that survived: share of its self seed.
        key_shares: Owner that dropped after sharing: share of its mask key.
        own_seed: The sender's own self seed, checked against its commitment, so that Shamir is
            only for those who are gone.
        signature: Ed25519 over all of it.
    """

    member: int
    seed_shares: Mapping[int, bytes]
    key_shares: Mapping[int, bytes]
    own_seed: bytes
    signature: bytes


@dataclass(frozen=True)
class StageEnded:
    """The server's clock to its state machine: nobody else is waited for."""


@dataclass(frozen=True)
class Outgoing:
    """The server's state machine to its strategy: an event for one member."""

    member: int
    event: "ServerEvent"


@dataclass(frozen=True)
class SumReady:
    """The server's state machine to its strategy.

    Attributes:
        words: The exact sum of the survivors' integers, modulo 2 ** word_bits.
        survivors: Whose vectors are in it, sorted.
        liars: Member: what it did wrong.
    """

    words: Words = field(repr=False)
    survivors: tuple[int, ...]
    liars: Mapping[int, str]


ServerEvent = RoundOpened | CohortFixed | SharesDelivered | SurvivorsProposed | UnmaskRequested
ClientEvent = Advert | ShareBundle | MaskedUpdate | SurvivorSignature | UnmaskReply
