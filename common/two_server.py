"""The two-server mode, as clients, server and helper agree on it: one message, no work for drops.

A client masks its words with one AES-256-CTR stream of a seed of its own. The server gets the
masked words; the seed goes to the *helper*, a second operator, sealed by HPKE (RFC 9180) to the key
that the federation's config pins. The helper adds up the mask streams of one set of members, and
the server takes that off the sum of their masked words. (Additive shares at two servers, as in
Prio, Corrigan-Gibbs and Boneh 2017, https://arxiv.org/abs/1703.06255, section 3; the helper's share
is the seed, and there is no proof of validity.)

Guaranteed, if at least one of server and helper is honest: the other one learns of a member's words
nothing beyond the sum over one set of at least the plan's `min_cohort` members. The server sees
uniform words, sealed seeds and the sum. The helper sees who took part, the seeds, and hashes that
are salted, so that no guess of a vector can be tried against them.
Not guaranteed: anything, if server and helper collude. Nobody proves that a client's words are
valid, nor that the sum is right: a helper that lies spoils it. The helper's key is as old as the
federation: who steals it, and has what clients sent, can unmask all of it.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    Suite,
)

from fedoppu.common.errors import UsageError
from fedoppu.common.hybrid_key import MLKEM_BYTES, hybrid_public_key
from fedoppu.common.masking import KEY_BYTES, Mask, derive, is_low_order
from fedoppu.common.randomness import encode_key
from fedoppu.common.rounds import RoundPlan, Words

SEED_BYTES, SALT_BYTES, IDENTITY_BYTES = 32, 32, 32
_SEALED, _SEALED_HYBRID = 32 + SEED_BYTES + 16, 1120 + SEED_BYTES + 16  # encapsulation, seed, tag


@dataclass(frozen=True)
class HelperKeys:
    """The helper's public keys.

    Attributes:
        seal: HPKE public key: X25519, 32 bytes; or ML-KEM-768 followed by X25519, 1,216 bytes.
        identity: Ed25519 public key, 32 bytes.
    """

    seal: bytes
    identity: bytes

    @property
    def hybrid(self) -> bool:
        """Whether the key is of MLKEM768 and X25519."""
        return len(self.seal) > KEY_BYTES

    def text(self) -> str:
        """Hex of both, as a config pins them."""
        return (self.seal + self.identity).hex()

    @classmethod
    def parse(cls, text: str, *, hybrid: bool) -> "HelperKeys":
        """The keys that a config pins as `secagg.helper`.

        Raises:
            UsageError: They are not hex, of another length, or of low order.
        """
        size = (MLKEM_BYTES if hybrid else 0) + KEY_BYTES
        try:
            data = bytes.fromhex(text)
        except ValueError:
            raise UsageError("secagg.helper must be hex") from None
        if len(data) != size + IDENTITY_BYTES:
            raise UsageError(
                f"secagg.helper must hold {size + IDENTITY_BYTES} bytes for "
                f"secagg.key_exchange={'hybrid' if hybrid else 'x25519'}, got {len(data)}",
                hint="ask the helper's operator for its public keys",
            )
        if is_low_order(data[size - KEY_BYTES : size]):
            raise UsageError("secagg.helper holds a key of low order, which would seal nothing")
        return cls(data[:size], data[size:])

    def seal_seed(self, seed: bytes | bytearray, context: bytes, member: int) -> bytes:
        """A seed that only the helper can open, and for this member and round alone.

        Args:
            seed: 32 bytes.
            context: Of the round's plan.
            member: Whose seed it is.
        """
        info = seal_info(context, member)
        if self.hybrid:
            both = hybrid_public_key(self.seal)
            return suite(hybrid=True).encrypt(bytes(seed), both, info=info)
        key = X25519PublicKey.from_public_bytes(self.seal)
        return suite(hybrid=False).encrypt(bytes(seed), key, info=info)


def suite(*, hybrid: bool) -> Suite:
    """The HPKE suite: X25519 or MLKEM768-X25519, with HKDF-SHA256 and AES-256-GCM."""
    kem = KEM.MLKEM768_X25519 if hybrid else KEM.X25519
    return Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def sealed_bytes(*, hybrid: bool) -> int:
    """Length of a sealed seed: encapsulated key, seed, tag."""
    return _SEALED_HYBRID if hybrid else _SEALED


def seal_info(context: bytes, member: int) -> bytes:
    """HPKE info of a member's seed: it opens in no other round, and for no other member."""
    return encode_key(("fedoppu sealed seed", context, member))


def seed_mask(seed: bytes | bytearray, context: bytes, member: int) -> Mask:
    """The one mask of a member's words."""
    return Mask(derive(seed, encode_key(("fedoppu sealed mask", context, member))))


# --- what members and helper sign ----------------------------------------------------------------


@dataclass(frozen=True)
class SealedClaim:
    """What a member signed of its message: all that the helper gets to see of it.

    Attributes:
        member: Index in the roster.
        words_hash: 32 bytes, `hash_words`.
        sealed: The sealed seed.
        signature: Ed25519 over `claim_bytes`.
    """

    member: int
    words_hash: bytes
    sealed: bytes
    signature: bytes


@dataclass(frozen=True)
class SealedUpdate:
    """Client to server, `train.sealed`: all that a client sends in a round of this mode.

    Attributes:
        member: The sender.
        words: (length,) uint32 or uint16, uniform to whoever lacks the seed.
        salt: 32 bytes; keeps the hash of the words from saying anything to the helper.
        sealed: The seed, sealed to the helper.
        signature: Ed25519 over `claim_bytes`.
    """

    member: int
    words: Words = field(repr=False)
    salt: bytes
    sealed: bytes = field(repr=False)
    signature: bytes

    def claim(self) -> SealedClaim:
        """What the helper gets."""
        digest = hash_words(self.salt, self.words)
        return SealedClaim(self.member, digest, self.sealed, self.signature)


@dataclass(frozen=True)
class MaskSumRequest:
    """Server to helper: the one set of a round.

    Attributes:
        plan: Of the round.
        claims: Of the set's members, sorted by member.
    """

    plan: RoundPlan
    claims: tuple[SealedClaim, ...]

    def digest(self) -> bytes:
        """SHA-256 of everything in it: requests with one digest are the same."""
        parts = [
            part
            for claim in self.claims
            for part in (claim_bytes(self.plan.context, claim), claim.signature)
        ]
        return hashlib.sha256(encode_key(("fedoppu mask request", *parts))).digest()


@dataclass(frozen=True)
class MaskSum:
    """Helper to server.

    Attributes:
        context: Of the plan.
        survivors: Members whose masks are in the sum, sorted; none if too few seeds were good.
        unsealed: Members of the request whose seed does not open, sorted.
        words: (length,) sum of the survivors' mask streams modulo 2 ** word_bits; empty without
            survivors.
        signature: The helper's Ed25519 over `mask_sum_bytes`.
    """

    context: bytes
    survivors: tuple[int, ...]
    unsealed: tuple[int, ...]
    words: Words = field(repr=False)
    signature: bytes


def hash_words(salt: bytes, words: Words) -> bytes:
    """SHA-256 of masked words, salted: without the salt it says nothing of them.

    The helper knows the mask, so a hash without salt would let it try guesses: that a member sent
    zeros, for example.
    """
    head = encode_key(("fedoppu sealed words", salt, words.itemsize, words.size))
    return _hash(head, words)


def claim_bytes(context: bytes, claim: SealedClaim) -> bytes:
    """What a member's signature is over: round, member, words and sealed seed, all at once."""
    sealed = hashlib.sha256(claim.sealed).digest()
    return encode_key(("fedoppu sealed", context, claim.member, claim.words_hash, sealed))


def mask_sum_bytes(answer: MaskSum) -> bytes:
    """What the helper's signature is over."""
    words = answer.words
    members = (encode_key(answer.survivors), encode_key(answer.unsealed))
    digest = _hash(encode_key((words.itemsize, words.size)), words)
    return encode_key(("fedoppu mask sum", answer.context, *members, digest))


def _hash(head: bytes, words: Words) -> bytes:
    """SHA-256 of a head and little-endian words."""
    total = hashlib.sha256(head)
    total.update(np.ascontiguousarray(words, words.dtype.newbyteorder("<")).data)
    return total.digest()
