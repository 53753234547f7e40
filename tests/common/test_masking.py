import hashlib
import json
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common import masking
from fedoppu.common.masking import (
    CHUNK_BYTES,
    KeyAgreement,
    Mask,
    add_masks,
    derive,
    is_low_order,
    public_key,
    random_words,
    self_mask,
)
from fedoppu.common.rounds import Words
from fedoppu.common.signing import Scope
from tests.integration.secagg_harness import identities, make_plan, roster_of, unevenness

SCOPE = Scope(b"\x01" * 32, b"\x02" * 32)
# AES-256 of the zero key on the blocks 0 and 1: test case 13 of the GCM specification.
ZERO_STREAM = bytes.fromhex("dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b")


def key(number: int) -> bytes:
    return hashlib.sha256(b"key %d" % number).digest()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_mask_stream_is_the_published_aes_counter_stream(dtype: str) -> None:
    expected = np.frombuffer(ZERO_STREAM, dtype)
    words = np.zeros(expected.size, expected.dtype)
    add_masks(words, [Mask(bytes(32))])
    assert (words == expected).all()
    assert (np.concatenate(list(random_words(bytes(32), dtype, expected.size))) == expected).all()


def test_hkdf_is_that_of_rfc_5869() -> None:
    # Test case 3: no salt, no info; the first 32 bytes of its output.
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert derive(b"\x0b" * 22, b"").hex() == expected


def test_context_is_the_tagged_hash_of_the_sorted_json() -> None:
    plan = make_plan(4, roster_of(identities(4)))
    fields = dict(sorted(vars(plan).items()))
    expected = b"fedoppu round 1\n" + json.dumps(fields, separators=(",", ":")).encode()
    assert plan.context == hashlib.sha256(expected).digest()


def test_keys_and_masks_of_a_pair_are_bound_to_what_they_are_for() -> None:
    ours, theirs = KeyAgreement(key(1)), KeyAgreement(key(2))
    there, back = public_key(key(2)), public_key(key(1))
    channel = ours.channel_key(there, b"1 to 2")
    assert theirs.channel_key(back, b"1 to 2") == channel
    assert ours.channel_key(there, b"2 to 1") != channel
    masks = {
        ours.mask(there, SCOPE, owner=1, other=2).key,
        ours.mask(there, SCOPE, owner=1, other=3).key,
        ours.mask(there, Scope(b"\x03" * 32, SCOPE.cohort), owner=1, other=2).key,
        ours.mask(there, Scope(SCOPE.context, b"\x03" * 32), owner=1, other=2).key,
        channel,
    }
    assert len(masks) == 5


def test_self_masks_are_bound_to_round_cohort_and_member() -> None:
    scopes = (SCOPE, Scope(b"\x03" * 32, SCOPE.cohort), Scope(SCOPE.context, b"\x03" * 32))
    keys = {self_mask(key(1), scope, 1).key for scope in scopes}
    keys |= {self_mask(key(1), SCOPE, 2).key, self_mask(key(2), SCOPE, 1).key}
    assert len(keys) == 5


def test_pairwise_masks_cancel() -> None:
    words = np.arange(1000, dtype=np.uint32)
    ours = KeyAgreement(key(1)).mask(public_key(key(2)), SCOPE, owner=1, other=2)
    theirs = KeyAgreement(key(2)).mask(public_key(key(1)), SCOPE, owner=2, other=1)
    assert ours.key == theirs.key
    assert ours.negative != theirs.negative
    add_masks(words, [ours])
    assert (words != np.arange(1000)).mean() > 0.99
    add_masks(words, [theirs])
    assert (words == np.arange(1000)).all()


@pytest.mark.parametrize("by_gcm", [False, True])
@given(
    length=st.sampled_from([0, 1, 2, 7, CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, 70_001, 140_001]),
    narrow=st.booleans(),
    signs=st.lists(st.booleans(), max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_one_pass_in_chunks_is_the_sum_of_whole_streams(
    by_gcm: bool, length: int, narrow: bool, signs: list[bool]
) -> None:
    dtype = np.dtype("<u2" if narrow else "<u4")
    masks = [Mask(key(i), negative) for i, negative in enumerate(signs)]
    words: Words = np.zeros(length, dtype)
    with patch.object(masking, "_gcm_is_faster", return_value=by_gcm):
        add_masks(words, masks)
    expected = np.zeros(length, np.int64)
    for mask in masks:
        parts = list(random_words(mask.key, dtype.str, length))
        stream = np.concatenate([np.zeros(0, dtype), *parts]).astype(np.int64)
        expected += -stream if mask.negative else stream
    assert (words == expected % (1 << 8 * dtype.itemsize)).all()


def test_stream_is_the_same_whichever_cipher_this_machine_runs_faster() -> None:
    long, expected = np.zeros(140_001, np.uint32), random_words(key(1), "<u4", 140_001)
    add_masks(long, [Mask(key(1))])
    assert (long == np.concatenate(list(expected))).all()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_masked_constant_looks_uniform(dtype: str) -> None:
    words = np.full(40_000, 7, dtype)
    assert unevenness(words) > 100
    add_masks(words, [self_mask(key(5), SCOPE, 3)])
    assert unevenness(words) < 5


LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
    "00" * 31 + "80",
]


@pytest.mark.parametrize("encoded", LOW_ORDER)
def test_low_order_keys_are_known_and_are_those_that_the_library_refuses(encoded: str) -> None:
    peer = bytes.fromhex(encoded)
    assert is_low_order(peer)
    with pytest.raises(ValueError, match=r"."):
        KeyAgreement(key(1)).channel_key(peer, b"")


def test_honest_keys_are_not_of_low_order_and_short_ones_are_no_keys() -> None:
    assert not any(is_low_order(public_key(key(i))) for i in range(50))
    assert is_low_order(bytes(31))
