"""What the two servers agree on: pinned keys, sealed seeds, salted hashes, what is signed."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.errors import UsageError
from fedoppu.common.masking import add_masks
from fedoppu.common.rounds import Words
from fedoppu.common.two_server import (
    HelperKeys,
    MaskSum,
    SealedClaim,
    SealedUpdate,
    claim_bytes,
    hash_words,
    mask_sum_bytes,
    seal_info,
    sealed_bytes,
    seed_mask,
    suite,
)
from fedoppu.server.helper import HelperSecrets
from tests.integration.secagg_harness import HashKeys, unevenness

CONTEXT, OTHER = b"c" * 32, b"d" * 32
SEED = bytes(range(32))


def helper(*, hybrid: bool) -> HelperSecrets:
    return HelperSecrets.make(HashKeys("helper").secret, hybrid=hybrid)


# --- pinned keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("hybrid", "size"), [(False, 64), (True, 1248)])
def test_keys_are_pinned_as_hex_and_read_back(hybrid: bool, size: int) -> None:
    keys = helper(hybrid=hybrid).public()
    assert len(keys.text()) == 2 * size
    assert HelperKeys.parse(keys.text(), hybrid=hybrid) == keys
    assert keys.hybrid is hybrid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold 64 bytes for secagg.key_exchange=x25519, got 0"),
        ("zz", "secagg.helper must be hex"),
        ("00" * 63, "must hold 64 bytes"),
        ("00" * 64, "a key of low order"),
        (helper(hybrid=True).public().text(), "must hold 64 bytes .*, got 1248"),
    ],
)
def test_malformed_keys_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HelperKeys.parse(text, hybrid=False)


def test_hybrid_key_with_a_low_order_half_is_refused() -> None:
    keys = helper(hybrid=True).public()
    weak = HelperKeys(keys.seal[:-32] + bytes(32), keys.identity)
    with pytest.raises(UsageError, match="a key of low order"):
        HelperKeys.parse(weak.text(), hybrid=True)


# --- sealed seeds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hybrid", [False, True])
def test_sealed_seed_has_the_length_that_is_told(hybrid: bool) -> None:
    sealed = helper(hybrid=hybrid).public().seal_seed(SEED, CONTEXT, 3)
    assert len(sealed) == sealed_bytes(hybrid=hybrid) == (1168 if hybrid else 80)
    assert SEED not in sealed


def test_sealed_seed_opens_in_its_round_and_for_its_member_alone() -> None:
    secrets = helper(hybrid=False)
    sealed = secrets.public().seal_seed(SEED, CONTEXT, 3)
    key = X25519PrivateKey.from_private_bytes(secrets.seal)
    opened = suite(hybrid=False).decrypt(sealed, key, info=seal_info(CONTEXT, 3))
    assert opened == SEED
    for info in (seal_info(CONTEXT, 4), seal_info(OTHER, 3), b""):
        with pytest.raises(InvalidTag):
            suite(hybrid=False).decrypt(sealed, key, info=info)


def test_same_seed_is_sealed_to_other_bytes_each_time() -> None:
    keys = helper(hybrid=False).public()
    assert keys.seal_seed(SEED, CONTEXT, 3) != keys.seal_seed(SEED, CONTEXT, 3)


def test_mask_depends_on_seed_round_and_member() -> None:
    masks = {
        seed_mask(seed, context, member).key
        for seed in (SEED, bytes(32))
        for context in (CONTEXT, OTHER)
        for member in (0, 1)
    }
    assert len(masks) == 8


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_masked_words_are_uniform_and_bare_ones_are_not(dtype: type) -> None:
    words: Words = np.full(1 << 16, 255, dtype)
    assert unevenness(words) > 100
    add_masks(words, [seed_mask(SEED, CONTEXT, 3)])
    assert abs(unevenness(words)) < 6


# --- what is signed -------------------------------------------------------------------------------

CLAIM = SealedClaim(3, b"w" * 32, b"s" * 80, b"")


@pytest.mark.parametrize(
    "changes", [{"member": 4}, {"words_hash": b"v" * 32}, {"sealed": b"t" * 80}]
)
def test_claim_covers_member_words_and_seed(changes: dict[str, object]) -> None:
    changed = replace(CLAIM, **changes)  # type: ignore[arg-type]
    assert claim_bytes(CONTEXT, changed) != claim_bytes(CONTEXT, CLAIM)
    assert claim_bytes(OTHER, CLAIM) != claim_bytes(CONTEXT, CLAIM)


@given(
    left=st.tuples(st.binary(max_size=8), st.binary(max_size=8)),
    right=st.tuples(st.binary(max_size=8), st.binary(max_size=8)),
)
def test_no_two_claims_have_the_same_bytes(
    left: tuple[bytes, bytes], right: tuple[bytes, bytes]
) -> None:
    one, two = (SealedClaim(3, words, sealed, b"") for words, sealed in (left, right))
    assert (claim_bytes(CONTEXT, one) == claim_bytes(CONTEXT, two)) is (left == right)


def test_hash_of_words_is_of_no_use_without_the_salt() -> None:
    """The helper knows the mask: without a salt it could try whether a member sent zeros."""
    words = np.zeros(8, np.uint32)
    assert hash_words(b"a" * 32, words) != hash_words(b"b" * 32, words)
    assert hash_words(b"a" * 32, words) == hash_words(b"a" * 32, words.copy())


def test_hash_covers_every_word_and_its_width() -> None:
    salt, words = b"a" * 32, np.arange(8, dtype=np.uint16)
    changed = words.copy()
    changed[7] += 1
    assert hash_words(salt, changed) != hash_words(salt, words)
    assert hash_words(salt, words.view(np.uint32)) != hash_words(salt, words)
    assert hash_words(salt, words.astype(">u2")) == hash_words(salt, words)


def test_claim_of_an_update_holds_no_word_of_it() -> None:
    update = SealedUpdate(3, np.arange(8, dtype=np.uint32), b"a" * 32, b"s" * 80, b"g" * 64)
    claim = update.claim()
    assert claim == SealedClaim(3, hash_words(update.salt, update.words), b"s" * 80, b"g" * 64)
    assert update.salt not in vars(claim).values()


ANSWER = MaskSum(CONTEXT, (0, 1), (2,), np.arange(8, dtype=np.uint32), b"")


@pytest.mark.parametrize(
    "changes",
    [
        {"context": OTHER},
        {"survivors": (0, 3)},
        {"survivors": (0, 1, 2), "unsealed": ()},
        {"unsealed": ()},
        {"words": np.arange(1, 9, dtype=np.uint32)},
        {"words": np.arange(8, dtype=np.uint32).view(np.uint16)},
    ],
)
def test_helpers_signature_covers_round_set_and_sum(changes: dict[str, object]) -> None:
    assert mask_sum_bytes(replace(ANSWER, **changes)) != mask_sum_bytes(ANSWER)  # type: ignore[arg-type]
