"""Masks and packages: X25519, HKDF-SHA256, AES-256-CTR streams added to integers, AES-256-GCM.

A mask is uniform in Z_2^w to whoever lacks its key (AES-256-CTR as a pseudo-random generator). The
self mask hides a vector until its owner is in an agreed survivor set; the pairwise masks of two
members cancel in the sum (Bonawitz et al. 2017, https://eprint.iacr.org/2017/281, section 4).

Every key is derived from one secret, the round's context, the cohort hash and who it is for, and
encrypts one thing, so all nonces are zero. Not covered: `cryptography` and OpenSSL keep copies of
keys that Python cannot overwrite.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedoppu.common.rounds import Words
from fedoppu.common.signing import Scope

KEY_BYTES = 32
# Stream, zeros and the chunk of the vector fit a second-level cache of 1 MiB side by side.
CHUNK_BYTES = 1 << 17
_BLOCK = 16
TAG_BYTES = 16
_GCM_NONCE_BYTES = 12
_GCM_SKIPS = 2 * _BLOCK  # blocks 0 and 1 of a key make GCM's tag
_FIELD = 2**255 - 19
# The u-coordinates of the points of order 1, 2, 4 and 8 on the curve and its twist (RFC 7748).
_LOW_ORDER = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)


@dataclass(frozen=True)
class Mask:
    """One mask of a vector.

    Attributes:
        key: AES-256 key of its stream.
        negative: Whether it is subtracted.
    """

    key: bytes = field(repr=False)
    negative: bool = False


def is_low_order(public_key: bytes) -> bool:
    """Whether an X25519 public key has the wrong length or gives everyone the same zero secret."""
    if len(public_key) != KEY_BYTES:
        return True
    coordinate = int.from_bytes(public_key, "little") & ((1 << 255) - 1)
    return coordinate % _FIELD in _LOW_ORDER


def public_key(private_key: bytes | bytearray) -> bytes:
    """X25519 public key of a private key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


class KeyAgreement:
    """One X25519 private key, loaded once for its many peers."""

    def __init__(self, private_key: bytes | bytearray) -> None:
        """Loads a 32-byte private key."""
        self._key = X25519PrivateKey.from_private_bytes(private_key)

    def channel_key(self, peer: bytes, info: bytes) -> bytes:
        """AES-256 key of the one message that `info` names.

        Args:
            peer: Public key, not of low order.
            info: Who sends what to whom, and when.
        """
        return derive(self._shared(peer), info)

    def mask(self, peer: bytes, scope: Scope, *, owner: int, other: int) -> Mask:
        """The owner's pairwise mask with another member; the other's is its negative."""
        return pair_mask(self._shared(peer), scope, owner=owner, other=other)

    def _shared(self, peer: bytes) -> bytes:
        return self._key.exchange(X25519PublicKey.from_public_bytes(peer))


def derive(secret: bytes | bytearray, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 without salt, at most 8,160 bytes (RFC 5869)."""
    return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(bytes(secret))


def seal(key: bytes, plain: bytes, associated: bytes) -> bytes:
    """AES-256-GCM under a key that encrypts this one message; 16 bytes longer than `plain`."""
    return AESGCM(key).encrypt(bytes(_GCM_NONCE_BYTES), plain, associated)


def unseal(key: bytes, package: bytes, associated: bytes) -> bytes | None:
    """The inverse of `seal`, or None if the package was made for another or changed."""
    try:
        return AESGCM(key).decrypt(bytes(_GCM_NONCE_BYTES), package, associated)
    except (InvalidTag, ValueError):
        return None


def pair_mask(secret: bytes, scope: Scope, *, owner: int, other: int) -> Mask:
    """The owner's mask of the secret of a pair; the other's is its negative."""
    low, high = sorted((owner, other))
    key = derive(secret, scope.bind("pair mask", low, high))
    return Mask(key, negative=owner > other)


def self_mask(seed: bytes | bytearray, scope: Scope, member: int) -> Mask:
    """The mask that a member alone adds to its vector."""
    return Mask(derive(seed, scope.bind("self mask", member)))


def add_masks(words: Words, masks: Iterable[Mask]) -> None:
    """Adds mask streams to a vector in place, modulo 2 ** word_bits.

    One pass over the vector in chunks; each chunk takes all masks while it is in the cache. The
    key stream of AES-GCM (SP 800-38D) with a zero nonce is that of AES-CTR from block 2 on. Where
    the processor has instructions for it, OpenSSL makes it a quarter faster than CTR, tag and all.

    Args:
        words: (length,) uint32 or uint16, contiguous, changed in place.
        masks: Their streams are read as little-endian words.
    """
    chosen = list(masks)
    head = words.size
    if words.nbytes > 2 * CHUNK_BYTES and _gcm_is_faster():
        head = _GCM_SKIPS // words.itemsize
    _accumulate(words[:head], [(_stream(mask.key), mask.negative) for mask in chosen])
    if head < words.size:
        _accumulate(words[head:], [(_gcm_stream(mask.key), mask.negative) for mask in chosen])


def _accumulate(words: Words, streams: list[tuple[CipherContext, bool]]) -> None:
    """Adds or subtracts streams; what can be made before the loop is, for Python's calls count."""
    zeros, buffer = memoryview(bytes(CHUNK_BYTES)), bytearray(CHUNK_BYTES + _BLOCK)
    room = memoryview(buffer)
    block: NDArray[np.unsignedinteger] = np.frombuffer(
        buffer, words.dtype.newbyteorder("<"), count=CHUNK_BYTES // words.itemsize
    )
    steps = [
        (stream.update_into, np.subtract if negative else np.add) for stream, negative in streams
    ]
    for start in range(0, words.size, block.size):
        chunk = words[start : start + block.size]
        nothing, stream = zeros[: chunk.nbytes], block[: chunk.size]
        for encrypt_into, combine in steps:
            encrypt_into(nothing, room)
            combine(chunk, stream, out=chunk)


@cache
def _gcm_is_faster() -> bool:
    """Whether this machine makes the same stream faster as GCM: measured once, in a millisecond."""
    zeros, room = bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES + _BLOCK)

    def seconds(stream: CipherContext) -> float:
        times = []
        for _ in range(8):
            start = perf_counter()
            stream.update_into(zeros, room)
            times.append(perf_counter() - start)
        return min(times)

    return seconds(_gcm_stream(bytes(KEY_BYTES))) < seconds(_stream(bytes(KEY_BYTES)))


def _gcm_stream(key: bytes) -> CipherContext:
    return Cipher(AES256(key), GCM(bytes(_GCM_NONCE_BYTES))).encryptor()


def _stream(key: bytes) -> CipherContext:
    return Cipher(AES256(key), CTR(bytes(_BLOCK))).encryptor()


def random_words(key: bytes, dtype: str, length: int) -> Iterator[NDArray[np.unsignedinteger]]:
    """The AES-256-CTR stream of a key as little-endian words, in chunks of at most 128 KiB.

    Args:
        key: 32 bytes, used for nothing else.
        dtype: "<u2" or "<u4".
        length: Words in all.
    """
    stream, size = _stream(key), np.dtype(dtype).itemsize
    step = CHUNK_BYTES // size
    for start in range(0, length, step):
        count = min(step, length - start)
        yield np.frombuffer(stream.update(bytes(count * size)), dtype=dtype)
