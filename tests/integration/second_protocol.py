"""The protocol once more, written from docs/protocol.md alone: nothing of our code is imported.

It is what a program in another language would be, so it shows that the page is enough. Bytes are compared, not speed.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Part = str | int | bytes
Floats = NDArray[np.float32]
Array = NDArray[Any]
PRIME = 2**256 + 297
FACTORS = ("A", "B", "AB")
HEX = ("run_id", "config_hash", "roster_hash", "model_hash", "rotation")


# --- encodings -------------------------------------------------------------------------------------


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def encode(*parts: Part) -> bytes:
    made = b""
    for part in parts:
        tag = {str: b"s", int: b"i", bytes: b"b"}[type(part)]
        value = part if isinstance(part, bytes) else str(part).encode()
        made += tag + struct.pack(">I", len(value)) + value
    return made


def packed(members: Sequence[int]) -> bytes:
    made, before = b"", -1
    for member in members:
        gap, before = member - before - 1, member
        while gap >= 128:
            made, gap = made + bytes([gap % 128 + 128]), gap // 128
        made += bytes([gap])
    return made


def npy(vector: Array) -> bytes:
    kind = {"float32": "<f4", "uint16": "<u2", "uint32": "<u4"}[vector.dtype.name]
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({vector.size},), }}"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.encode().ljust(117) + b"\n"
    return head + vector.astype(kind).tobytes()


def canonical(plan: Mapping[str, Any]) -> bytes:
    """A plan's JSON, from its fields on the wire."""
    text = {name: bytes(plan[name]).hex() for name in HEX}
    flags = {name: plan[name] == 1 for name in ("metrics", "hybrid")}
    whole = {**plan, **text, **flags, "factors": FACTORS[plan["factors"]]}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()


def context_of(plan: Mapping[str, Any]) -> bytes:
    return sha(b"fedoppu round 1\n" + canonical(plan))


def hkdf(secret: bytes, info: bytes, length: int = 32) -> bytes:
    return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(secret)


def signs(identity: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def sign(private: bytes, message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).sign(message)


def identity_of(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


# --- what is signed and hashed ---------------------------------------------------------------------


def commitment(context: bytes, member: int, seed: bytes) -> bytes:
    return sha(encode("fedoppu seed", context, member, seed))


def advert_signed(context: bytes, advert: Mapping[str, Any]) -> bytes:
    keys = (advert["channel_key"], advert["mask_key"], advert["seed_commitment"])
    return encode("fedoppu advert", context, advert["member"], *keys)


def cohort_hash(context: bytes, adverts: Sequence[Mapping[str, Any]]) -> bytes:
    parts = [part for one in adverts for part in (advert_signed(context, one), one["signature"])]
    return sha(encode("fedoppu cohort", context, *parts))


@dataclass(frozen=True)
class Scope:
    """Context and cohort hash."""

    context: bytes
    cohort: bytes

    def scoped(self, tag: str, *parts: Part) -> bytes:
        return encode(f"fedoppu {tag}", self.context, self.cohort, *parts)

    def share_hash(self, kind: str, owner: int, holder: int, share: bytes) -> bytes:
        return sha(self.scoped("share", kind, owner, holder, share))[:10]

    def masked_signed(
        self, member: int, dealers: Sequence[int], complaints: Sequence[int], words: Array
    ) -> bytes:
        little = words.astype(words.dtype.newbyteorder("<")).tobytes()
        sets = (encode(*dealers), encode(*complaints))
        return self.scoped("masked", member, *sets, words.itemsize, words.size, sha(little))

    def survivors_signed(self, dealers: Sequence[int], survivors: Sequence[int]) -> bytes:
        return self.scoped("survivors", encode(*dealers), encode(*survivors))

    def reply_signed(self, survivors: Sequence[int], reply: Mapping[str, Any]) -> bytes:
        shares = [
            encode(
                *(
                    part
                    for row in zip(reply[f"{name}_of"], reply[name], strict=True)
                    for part in row
                )
            )
            for name in ("seed_shares", "key_shares")
        ]
        return self.scoped("reply", reply["member"], encode(*survivors), *shares, reply["own_seed"])


def leaf(recipient: int, package: bytes, hashes_: bytes, offer: bytes) -> bytes:
    return sha(b"\x00" + encode(recipient, package, hashes_, offer))


def root(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    half = 1
    while 2 * half < len(leaves):
        half *= 2
    return sha(b"\x01" + root(leaves[:half]) + root(leaves[half:]))


def ring(cohort: bytes, members: Sequence[int], k: int) -> list[list[int]]:
    """Neighbours of each member, sorted."""
    if len(members) <= 64 or k >= len(members) - 1:
        return [[other for other in members if other != member] for member in members]
    order = sorted(members, key=lambda member: sha(encode("fedoppu graph", cohort, member)))
    near = [step for step in range(-(k // 2), k // 2 + 1) if step]
    places = {member: place for place, member in enumerate(order)}
    return [sorted(order[(places[m] + step) % len(order)] for step in near) for m in members]


# --- keys, shares and masks ------------------------------------------------------------------------


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def dh(private: bytes, peer: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(peer)
    )


def seal(private: bytes, peer: bytes, info: bytes, plain: bytes) -> bytes:
    return AESGCM(hkdf(dh(private, peer), info)).encrypt(bytes(12), plain, info)


def unseal(private: bytes, peer: bytes, info: bytes, package: bytes) -> bytes:
    return AESGCM(hkdf(dh(private, peer), info)).decrypt(bytes(12), package, info)


def hybrid_keys(master: bytes) -> tuple[bytes, hpke.MLKEM768X25519PrivateKey]:
    """Public key, and the private key for HPKE."""
    made = hkdf(master, b"fedoppu hybrid key pair", 96)
    lattice = MLKEM768PrivateKey.from_seed_bytes(made[:64])
    curve = X25519PrivateKey.from_private_bytes(made[64:])
    shown = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return shown, hpke.MLKEM768X25519PrivateKey(lattice, curve)


HYBRID_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
X25519_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def stream(key: bytes, length: int) -> bytes:
    return Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(length))


def mask(key: bytes, like: Array) -> Array:
    made = stream(key, like.nbytes)
    return np.frombuffer(made, like.dtype.newbyteorder("<")).astype(like.dtype)


def pair_key(scope: Scope, secret: bytes, one: int, other: int) -> bytes:
    return hkdf(secret, scope.scoped("pair mask", min(one, other), max(one, other)))


def self_key(scope: Scope, seed: bytes, member: int) -> bytes:
    return hkdf(seed, scope.scoped("self mask", member))


def deal(secret: bytes, entropy: bytes, holders: Sequence[int]) -> dict[int, bytes]:
    drawn = [entropy[start : start + 48] for start in range(0, len(entropy), 48)]
    polynomial = [int.from_bytes(part, "big") for part in (secret, *drawn)]
    return {
        holder: (sum(c * (holder + 1) ** i for i, c in enumerate(polynomial)) % PRIME).to_bytes(
            33, "big"
        )
        for holder in holders
    }


def restore(shares: Mapping[int, bytes]) -> bytes:
    total, xs = 0, [holder + 1 for holder in shares]
    for x, share in zip(xs, shares.values(), strict=True):
        weight = int.from_bytes(share, "big")
        for other in xs:
            if other != x:
                weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        total += weight
    return (total % PRIME).to_bytes(32, "big")


# --- numbers ---------------------------------------------------------------------------------------


def hadamard(values: Floats) -> Floats:
    """Of the columns, in float32, without a factor."""
    half = 1
    while half < len(values):
        made = values.copy()
        for start in range(0, len(values), 2 * half):
            low, high = slice(start, start + half), slice(start + half, start + 2 * half)
            made[low], made[high] = values[low] + values[high], values[low] - values[high]
        values, half = made, 2 * half
    return values


def rotate(vector: Floats, seed: bytes) -> Floats:
    d, turned = vector.size, vector.copy()
    w = min(1 << 16, 1 << (d.bit_length() - 1))
    r = 1
    while r * w < 8 * d and 2 * r <= d:
        r *= 2
    c, left = d // r, d - r * (d // r)
    blocks = [(np.arange(r * c).reshape(r, c), False)]
    if left:
        blocks.append((left + np.arange(r * c).reshape(r, c)[:, c - min(left, c) :], False))
    high = 1 << ((w.bit_length() - 1 + 1) // 2)
    for start in [*range(0, d - w, w), d - w]:
        blocks.append((np.arange(start, start + w).reshape(high, w // high), True))
    bits = np.unpackbits(np.frombuffer(stream(seed, 8 * d), np.uint8), bitorder="little")
    for places, window in blocks:
        flips, bits = bits[: places.size].reshape(places.shape), bits[places.size :]
        values = hadamard(np.where(flips == 1, -turned[places], turned[places]))
        if window:
            values = hadamard(values.T.copy()).T
        turned[places] = values * np.float32((places.size if window else len(places)) ** -0.5)
    return turned


def levels(values: Floats, value_range: float, level_bits: int, key: bytes) -> list[int]:
    m = (1 << (level_bits - 1)) - 1
    dither = np.frombuffer(stream(key, 4 * values.size), "<u4") / 2**32
    return [
        min(int(float(x) * (m / value_range) + u + m), 2 * m)
        for x, u in zip(values, dither, strict=True)
    ]


def limbs(value: int, largest: int) -> list[int]:
    count = max(1, -(-largest.bit_length() // 8))
    return [value >> (8 * place) & 255 for place in range(count)]
