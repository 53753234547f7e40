"""A public key of ML-KEM-768 with X25519, as bytes: the lattice half, then the curve half."""

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

MLKEM_BYTES = 1184  # of an ML-KEM-768 public key (FIPS 203, table 3)


def hybrid_public_key(key: bytes) -> MLKEM768X25519PublicKey:
    """The key that HPKE seals to.

    Args:
        key: 1,216 bytes.

    Raises:
        ValueError: The lattice half is no key: a coefficient is not below the modulus (FIPS 203, 7.2).
    """
    lattice = MLKEM768PublicKey.from_public_bytes(key[:MLKEM_BYTES])
    return MLKEM768X25519PublicKey(lattice, X25519PublicKey.from_public_bytes(key[MLKEM_BYTES:]))
