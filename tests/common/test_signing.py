from dataclasses import replace

import numpy as np
import pytest

from fedoppu.common.rounds import Advert, MaskedUpdate, ShareBundle, UnmaskReply
from fedoppu.common.signing import (
    Identity,
    Scope,
    advert_bytes,
    bundle_bytes,
    commit_seed,
    hash_cohort,
    hash_share,
    masked_bytes,
    reply_bytes,
    survivors_bytes,
    verify,
    verify_public,
)

SCOPE = Scope(b"\x01" * 32, b"\x02" * 32)
ADVERT = Advert(1, b"\x03" * 32, b"\x04" * 32, b"\x05" * 32, b"\x06" * 64)
BUNDLE = ShareBundle(1, {2: b"sealed", 4: b"sealed"}, {2: b"\x07" * 20, 4: b"\x07" * 20}, b"")
MASKED = MaskedUpdate(1, np.arange(4, dtype=np.uint32), b"")
REPLY = UnmaskReply(1, {2: b"a"}, {3: b"b"}, b"seed", b"")


def test_signature_of_rfc_8032_comes_out() -> None:
    # Test 1 of section 7.1: the empty message.
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    identity = Identity(0, secret)
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert identity.enrolled.identity.hex() == public
    assert identity.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a")
    assert verify(identity.enrolled.identity, identity.sign(b""), b"")


@pytest.mark.parametrize("check", [verify, verify_public])
def test_malformed_signature_or_key_is_no_exception(check: object) -> None:
    assert callable(check)
    identity = Identity(0, bytes(32)).enrolled.identity
    for key, signature in (
        (None, b""),
        (identity, b""),
        (b"short", bytes(64)),
        (identity, bytes(64)),
    ):
        assert not check(key, signature, b"message")


def test_every_field_of_every_message_is_signed() -> None:
    context = SCOPE.context
    other = Scope(b"\x09" * 32, SCOPE.cohort)
    elsewhere = Scope(SCOPE.context, b"\x09" * 32)
    words = MASKED.words.copy()
    words[3] += 1
    messages = [
        advert_bytes(context, ADVERT),
        advert_bytes(other.context, ADVERT),
        *(
            advert_bytes(context, changed)
            for changed in (
                replace(ADVERT, channel_key=b"\x08" * 32),
                replace(ADVERT, mask_key=b"\x08" * 32),
                replace(ADVERT, seed_commitment=b"\x08" * 32),
            )
        ),
        advert_bytes(context, replace(ADVERT, member=2)),
        *(bundle_bytes(scope, BUNDLE) for scope in (SCOPE, other, elsewhere)),
        bundle_bytes(SCOPE, replace(BUNDLE, member=2)),
        bundle_bytes(SCOPE, replace(BUNDLE, packages={2: b"sealed", 4: b"other"})),
        bundle_bytes(SCOPE, replace(BUNDLE, packages={2: b"sealed", 5: b"sealed"})),
        bundle_bytes(SCOPE, replace(BUNDLE, share_hashes={2: b"\x07" * 20, 4: b"\x08" * 20})),
        bundle_bytes(SCOPE, replace(BUNDLE, offers={4: b"offer"})),
        *(masked_bytes(scope, (1, 2), MASKED) for scope in (SCOPE, other, elsewhere)),
        masked_bytes(SCOPE, (1, 3), MASKED),
        masked_bytes(SCOPE, (1, 2), replace(MASKED, complaints=(2,))),
        masked_bytes(SCOPE, (1, 2), replace(MASKED, words=words)),
        masked_bytes(SCOPE, (1, 2), replace(MASKED, words=MASKED.words.view(np.uint16))),
        *(survivors_bytes(scope, (1, 2), (1,)) for scope in (SCOPE, other, elsewhere)),
        survivors_bytes(SCOPE, (1,), (1, 2)),
        survivors_bytes(SCOPE, (1, 2, 3), (1,)),
        survivors_bytes(SCOPE, (1, 2), (2,)),
        *(reply_bytes(scope, (1,), REPLY) for scope in (SCOPE, other, elsewhere)),
        reply_bytes(SCOPE, (2,), REPLY),
        reply_bytes(SCOPE, (1,), replace(REPLY, seed_shares={}, key_shares={2: b"a", 3: b"b"})),
        reply_bytes(SCOPE, (1,), replace(REPLY, own_seed=b"other")),
    ]
    assert len(set(messages)) == len(messages)


def test_cohort_hash_covers_signatures_and_not_the_order() -> None:
    other = replace(ADVERT, member=2)
    base = hash_cohort(b"c", [ADVERT, other])
    assert base == hash_cohort(b"c", [other, ADVERT])
    assert base != hash_cohort(b"c", [replace(ADVERT, signature=bytes(64)), other])
    assert base != hash_cohort(b"d", [ADVERT, other])


def test_commitments_and_share_hashes_are_bound_to_their_owner() -> None:
    seeds = ((b"c", 1, b"seed"), (b"c", 2, b"seed"), (b"d", 1, b"seed"), (b"c", 1, b"other"))
    assert len({commit_seed(*parts) for parts in seeds}) == 4
    hashes = {
        hash_share(SCOPE, "seed", 1, holder=2, share=b"s"),
        hash_share(SCOPE, "key", 1, holder=2, share=b"s"),
        hash_share(SCOPE, "seed", 2, holder=1, share=b"s"),
        hash_share(SCOPE, "seed", 1, holder=3, share=b"s"),
    }
    assert len(hashes) == 4
