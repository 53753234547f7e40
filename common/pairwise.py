"""How two members come to a sealed package and to a mask that only they know.

Two ways, one Protocol; a plan says which (`RoundPlan.hybrid`). In both a member has two key pairs
an attempt, each from 32 bytes: a *channel* key, which is never shared and opens the packages that
are sent to it, and a *mask* key, which is dealt in shares. Whoever restores the mask key of either
member of a pair gets the pair's mask; nobody gets a package with it.

- X25519: the package's AES-256-GCM key and the mask come from Diffie-Hellman secrets of the two
  members' keys.
- Hybrid: ML-KEM-768 and X25519 together, as the KEM of HPKE (RFC 9180; FIPS 203; the KEM is
  MLKEM768-X25519 of draft-ietf-hpke-pq), so that a round that is recorded today stays closed to
  a quantum computer. A KEM gives no secret to two keys by themselves, so in each pair the *lower*
  member makes the pair secret, of its mask key, and seals it to the *higher* one's mask key. The
  lower one's mask key gives the secret at once, the higher one's opens what was sealed.

What authenticates a package. A package is two shares, sealed, beside a hash of each that the dealer
published.

- X25519: the key is known to dealer and recipient alone and seals one message, bound to both, the
  cohort and the round.
- Hybrid: HPKE's base mode tells nobody who sealed. A server could seal shares, and worse, pair
  secrets of its own to a victim, and so know every mask that the victim adds. So what is dealt is
  signed (`common/signing.py`), and a recipient uses nothing that its dealer did not sign.

And a dealer's pair secret has a published hash too. So the secret that the higher member masked
with is the one that the lower one's restored key gives, or the liar is named.

HPKE draws its own randomness from the operating system: two simulations of one seed send other
ciphertexts, of the same secrets. Key objects of the library hold copies of keys that Python cannot
overwrite.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedoppu.common.hybrid_key import MLKEM_BYTES, hybrid_public_key
from fedoppu.common.masking import (
    KEY_BYTES,
    TAG_BYTES,
    KeyAgreement,
    Mask,
    derive,
    is_low_order,
    pair_mask,
    public_key,
    seal,
    unseal,
)
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.secret_sharing import SHARE_BYTES
from fedoppu.common.signing import Scope

PLAIN_BYTES = 2 * SHARE_BYTES  # a share of the self seed, a share of the mask key
_MLKEM_SEED_BYTES = 64
_COMMITMENT_BYTES = 16
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_SEAL_BYTES = hpke.KEM.MLKEM768_X25519.enc_length() + TAG_BYTES


@dataclass(frozen=True)
class Link:
    """One end's view of a pair of members.

    Attributes:
        scope: Context and cohort.
        own: This end's member.
        peer: The other's.
        key: The other's public key, of the kind that is meant, from a cohort, so not a weak one.
    """

    scope: Scope
    own: int
    peer: int
    key: bytes

    @property
    def pair(self) -> tuple[int, int]:
        """Both members, the lower first."""
        return min(self.own, self.peer), max(self.own, self.peer)

    def sent(self, purpose: str) -> bytes:
        """What a message from this end to the other is bound to."""
        return self.scope.bind(purpose, self.own, self.peer)

    def received(self, purpose: str) -> bytes:
        """What a message from the other end to this one is bound to."""
        return self.scope.bind(purpose, self.peer, self.own)


class KeyPair(Protocol):
    """One private key, loaded once for its many peers: a channel key or a mask key."""

    @property
    def public(self) -> bytes:
        """The public key."""

    def seal(self, plain: bytes, link: Link) -> bytes:
        """A package of `PLAIN_BYTES` for the peer, whose channel key the link has; called once."""

    def unseal(self, package: bytes, link: Link) -> bytes | None:
        """The content of the peer's package, or None if it cannot be opened."""

    def offer(self, link: Link) -> bytes:
        """The pair secret for the peer, whose mask key the link has; see `KeyExchange.heirs`."""

    def mask(self, link: Link, offered: bytes) -> Mask | None:
        """The own mask with the peer, whose mask key the link has; the peer's is its negative.

        Args:
            link: To the peer.
            offered: What the lower member of the pair offered the higher one, or nothing.

        Returns:
            None if this end needs what was offered, and that does not open to what was promised.
        """


class KeyExchange(Protocol):
    """One way to exchange keys."""

    @property
    def key_bytes(self) -> int:
        """Bytes of a public key."""

    @property
    def package_bytes(self) -> int:
        """Bytes of a sealed package."""

    @property
    def offer_bytes(self) -> int:
        """Bytes of a sealed pair secret with its hash; 0 if none is sent."""

    @property
    def authentic(self) -> bool:
        """Whether only its dealer can have made a package that fits its hashes.

        Where not, what was dealt is used only if the dealer's signature over it was checked.
        """

    def load(self, private_key: bytes | bytearray) -> KeyPair:
        """The key pair of 32 bytes."""

    def is_weak(self, key: bytes) -> bool:
        """Whether a public key has the wrong length, or no secret can be agreed with it."""

    def heirs(self, member: int, neighbours: tuple[int, ...]) -> tuple[int, ...]:
        """The neighbours that a member offers a pair secret."""


# --- X25519 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class X25519Pair:
    """An X25519 key pair.

    Attributes:
        public: 32 bytes.
        agreement: The private key, loaded.
    """

    public: bytes
    agreement: KeyAgreement = field(repr=False)

    def seal(self, plain: bytes, link: Link) -> bytes:
        """The package under AES-256-GCM."""
        bound = link.sent("package")
        return seal(self.agreement.channel_key(link.key, bound), plain, bound)

    def unseal(self, package: bytes, link: Link) -> bytes | None:
        """What the peer sealed for this end."""
        bound = link.received("package")
        return unseal(self.agreement.channel_key(link.key, bound), package, bound)

    def offer(self, link: Link) -> bytes:
        """Nothing: both ends have the secret already."""
        return b""

    def mask(self, link: Link, offered: bytes) -> Mask | None:
        """The mask of the Diffie-Hellman secret."""
        return self.agreement.mask(link.key, link.scope, owner=link.own, other=link.peer)


@dataclass(frozen=True)
class X25519Exchange:
    """Diffie-Hellman on Curve25519 (RFC 7748); the attributes are those of `KeyExchange`."""

    key_bytes: int = KEY_BYTES
    package_bytes: int = PLAIN_BYTES + TAG_BYTES
    offer_bytes: int = 0
    authentic: bool = True

    def load(self, private_key: bytes | bytearray) -> X25519Pair:
        """The 32 bytes are the private key."""
        return X25519Pair(public_key(private_key), KeyAgreement(private_key))

    def is_weak(self, key: bytes) -> bool:
        """Whether the key is of low order."""
        return is_low_order(key)

    def heirs(self, member: int, neighbours: tuple[int, ...]) -> tuple[int, ...]:
        """Nobody."""
        return ()


# --- hybrid --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HybridPair:
    """A key pair of MLKEM768-X25519.

    Attributes:
        public: 1,216 bytes: the ML-KEM key, the X25519 key.
        master: The 32 bytes that all is made of.
        private: Made of the master.
    """

    public: bytes
    master: bytes = field(repr=False)
    private: hpke.MLKEM768X25519PrivateKey = field(repr=False)

    def seal(self, plain: bytes, link: Link) -> bytes:
        """The package under HPKE, to the peer's channel key."""
        return _SUITE.encrypt(plain, hybrid_public_key(link.key), info=link.sent("package"))

    def unseal(self, package: bytes, link: Link) -> bytes | None:
        """What this channel key opens."""
        return self._open(package, link.received("package"))

    def offer(self, link: Link) -> bytes:
        """The pair secret under HPKE, to the peer's mask key, and the hash of the secret."""
        secret = self._secret(link)
        sealed = _SUITE.encrypt(secret, hybrid_public_key(link.key), info=link.sent("pair secret"))
        return sealed + _commit(link, secret)

    def mask(self, link: Link, offered: bytes) -> Mask | None:
        """The mask of the pair secret: made here by the lower member, opened by the higher one.

        Either way it must fit the published hash, where one was offered: a lower member that still
        holds its key has no need of it, a server that restored the key does.
        """
        lower, sealed = link.own < link.peer, offered[:-_COMMITMENT_BYTES]
        secret = self._secret(link) if lower else self._open(sealed, link.received("pair secret"))
        if secret is None:
            return None
        held_to_it = bool(offered) or not lower
        if held_to_it and offered[-_COMMITMENT_BYTES:] != _commit(link, secret):
            return None
        return pair_mask(secret, link.scope, owner=link.own, other=link.peer)

    def _secret(self, link: Link) -> bytes:
        return derive(self.master, link.scope.bind("pair secret", *link.pair))

    def _open(self, sealed: bytes, info: bytes) -> bytes | None:
        try:
            return _SUITE.decrypt(sealed, self.private, info=info)
        except (InvalidTag, ValueError):
            return None


@dataclass(frozen=True)
class HybridExchange:
    """MLKEM768-X25519 in HPKE; the attributes are those of `KeyExchange`."""

    key_bytes: int = MLKEM_BYTES + KEY_BYTES
    package_bytes: int = _SEAL_BYTES + PLAIN_BYTES
    offer_bytes: int = _SEAL_BYTES + KEY_BYTES + _COMMITMENT_BYTES
    authentic: bool = False

    def load(self, private_key: bytes | bytearray) -> HybridPair:
        """Both keys are made of the 32 bytes (HKDF-SHA256)."""
        master = bytes(private_key)
        made = derive(master, b"fedoppu hybrid key pair", _MLKEM_SEED_BYTES + KEY_BYTES)
        lattice = MLKEM768PrivateKey.from_seed_bytes(made[:_MLKEM_SEED_BYTES])
        curve = X25519PrivateKey.from_private_bytes(made[_MLKEM_SEED_BYTES:])
        public = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
        return HybridPair(public, master, hpke.MLKEM768X25519PrivateKey(lattice, curve))

    def is_weak(self, key: bytes) -> bool:
        """Whether half of the key is none: of low order, or no ML-KEM key (FIPS 203, 7.2)."""
        if len(key) != self.key_bytes or is_low_order(key[MLKEM_BYTES:]):
            return True
        try:
            hybrid_public_key(key)
        except ValueError:  # a coefficient is not below the modulus
            return True
        return False

    def heirs(self, member: int, neighbours: tuple[int, ...]) -> tuple[int, ...]:
        """All above it."""
        return tuple(peer for peer in neighbours if peer > member)


def _commit(link: Link, secret: bytes) -> bytes:
    message = link.scope.bind("pair hash", *link.pair, secret)
    return hashlib.sha256(message).digest()[:_COMMITMENT_BYTES]


X25519 = X25519Exchange()
HYBRID = HybridExchange()


def key_exchange(plan: RoundPlan) -> KeyExchange:
    """The exchange that a plan names."""
    return HYBRID if plan.hybrid else X25519
