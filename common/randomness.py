"""Random choices as pure functions of a root, a purpose and a key.

Every random choice that shapes a result is `Randomness.stream(purpose, ...)`: no generator state is carried from one
choice to the next, so a result does not depend on the order of the work, on the number of workers or on a restart.

Not covered: keys and nonces of the protocol, which come from the operating system on a device.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Key = str | int | bytes


def encode_key(parts: tuple[Key, ...]) -> bytes:
    """Encodes a key so that no two different keys share an encoding (type, length, value of each part)."""
    encoded = bytearray()
    for part in parts:
        tag, value = _tagged(part)
        encoded += tag + len(value).to_bytes(4, "big") + value
    return bytes(encoded)


def _tagged(part: Key) -> tuple[bytes, bytes]:
    if isinstance(part, str):
        return b"s", part.encode()
    if isinstance(part, bytes):
        return b"b", part
    return b"i", str(int(part)).encode()


@dataclass(frozen=True)
class Randomness:
    """A root of random choices.

    Attributes:
        root: 32 bytes; the run's seed in a simulation, a secret on a device or a deployed server. Never printed.
    """

    root: bytes = field(repr=False)

    @classmethod
    def from_seed(cls, seed: int) -> "Randomness":
        """Root of a simulation: SHA-256 of the seed."""
        return cls(hashlib.sha256(b"fedoppu seed %d" % seed).digest())

    def secret(self, purpose: str, *key: Key, length: int = 32) -> bytes:
        """Bytes for (purpose, key): HKDF-SHA256 of the root, at most 8160 bytes."""
        info = encode_key((purpose, *key))
        return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(self.root)

    def stream(self, purpose: str, *key: Key) -> np.random.Generator:
        """A generator for (purpose, key), the same whenever and wherever it is asked for."""
        return np.random.Generator(
            np.random.PCG64(int.from_bytes(self.secret(purpose, *key), "big"))
        )

    def child(self, purpose: str, *key: Key) -> "Randomness":
        """A root of its own for (purpose, key), to hand to a part that must not see this one."""
        return Randomness(self.secret(purpose, *key))
