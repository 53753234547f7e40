"""The hybrid public key is both halves, each where the other side looks for it."""

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedoppu.common.hybrid_key import MLKEM_BYTES, hybrid_public_key

SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def test_what_is_sealed_to_the_bytes_is_opened_with_both_halves() -> None:
    lattice, curve = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
    halves = (lattice.public_key().public_bytes_raw(), curve.public_key().public_bytes_raw())
    assert len(halves[0]) == MLKEM_BYTES
    sealed = SUITE.encrypt(b"seed", hybrid_public_key(b"".join(halves)), info=b"here")
    both = hpke.MLKEM768X25519PrivateKey(lattice, curve)
    assert SUITE.decrypt(sealed, both, info=b"here") == b"seed"


def test_a_coefficient_that_is_not_below_the_modulus_is_no_key() -> None:
    with pytest.raises(ValueError, match="ML-KEM-768 public key"):
        hybrid_public_key(b"\xff" * (MLKEM_BYTES + 32))
