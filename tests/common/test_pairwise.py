"""Both exchanges: what two members share, what a server restores, and what bad input does."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.pairwise import (
    HYBRID,
    PLAIN_BYTES,
    X25519,
    KeyExchange,
    Link,
)
from fedoppu.common.signing import Scope

SCOPE = Scope(b"\x01" * 32, b"\x02" * 32)
BOTH = pytest.mark.parametrize("exchange", [X25519, HYBRID], ids=["x25519", "hybrid"])
LOW, HIGH = 3, 8
PLAIN = bytes(range(PLAIN_BYTES))


def key(number: int) -> bytes:
    return hashlib.sha256(b"pair key %d" % number).digest()


def link(exchange: KeyExchange, own: int, peer: int, scope: Scope = SCOPE) -> Link:
    """From one member to another, whose private key is `key(peer)`."""
    return Link(scope, own, peer, exchange.load(key(peer)).public)


def offer(exchange: KeyExchange) -> bytes:
    return exchange.load(key(LOW)).offer(link(exchange, LOW, HIGH))


@BOTH
def test_sizes_are_those_that_are_told(exchange: KeyExchange) -> None:
    pair = exchange.load(key(LOW))
    assert len(pair.public) == exchange.key_bytes
    assert len(pair.seal(PLAIN, link(exchange, LOW, HIGH))) == exchange.package_bytes
    assert len(offer(exchange)) == exchange.offer_bytes


def test_sizes_are_those_of_the_specification() -> None:
    assert (X25519.key_bytes, X25519.package_bytes, X25519.offer_bytes) == (32, 82, 0)
    assert (HYBRID.key_bytes, HYBRID.package_bytes, HYBRID.offer_bytes) == (1216, 1202, 1184)


def test_hybrid_key_pair_is_a_function_of_its_32_bytes() -> None:
    public = HYBRID.load(bytes(32)).public
    assert public == HYBRID.load(bytearray(32)).public
    assert public != HYBRID.load(bytes(31) + b"\x01").public
    expected = "d97bb3590782aa9fe4a07e54399f10f2d0a609598d46a0fd8e86e63b1fcf7738"
    assert hashlib.sha256(public).hexdigest() == expected  # a test vector of the wire protocol


@BOTH
def test_masks_of_a_pair_cancel_whoevers_key_is_restored(exchange: KeyExchange) -> None:
    offered = offer(exchange)
    lower = exchange.load(key(LOW)).mask(link(exchange, LOW, HIGH), offered)
    higher = exchange.load(key(HIGH)).mask(link(exchange, HIGH, LOW), offered)
    at_home = exchange.load(key(LOW)).mask(link(exchange, LOW, HIGH), b"")
    assert lower is not None
    assert higher is not None
    assert lower == at_home
    assert lower.key == higher.key
    assert (lower.negative, higher.negative) == (False, True)


@BOTH
def test_masks_are_bound_to_round_cohort_and_pair(exchange: KeyExchange) -> None:
    pair = exchange.load(key(LOW))
    scopes = (SCOPE, replace(SCOPE, context=bytes(32)), replace(SCOPE, cohort=bytes(32)))
    keys = set()
    for scope in scopes:
        for peer in (HIGH, HIGH + 1):
            made = pair.mask(Link(scope, LOW, peer, exchange.load(key(peer)).public), b"")
            assert made is not None
            keys.add(made.key)
    assert len(keys) == 6


@BOTH
def test_package_opens_for_its_recipient_alone(exchange: KeyExchange) -> None:
    sealed = exchange.load(key(LOW)).seal(PLAIN, link(exchange, LOW, HIGH))
    opener = exchange.load(key(HIGH))
    assert opener.unseal(sealed, link(exchange, HIGH, LOW)) == PLAIN
    other_scope = replace(SCOPE, cohort=bytes(32))
    wrong = [
        exchange.load(key(9)).unseal(sealed, link(exchange, HIGH, LOW)),
        opener.unseal(sealed, link(exchange, HIGH, LOW, other_scope)),
        opener.unseal(sealed, replace(link(exchange, HIGH, LOW), own=9)),
        opener.unseal(sealed, replace(link(exchange, HIGH, LOW), peer=9)),
        exchange.load(key(LOW)).unseal(sealed, link(exchange, LOW, HIGH)),
    ]
    assert wrong == [None] * 5


@BOTH
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_changed_package_or_offer_opens_to_nothing_and_is_never_an_exception(
    exchange: KeyExchange, data: st.DataObject
) -> None:
    def changed(whole: bytes) -> bytes:
        place = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytearray(whole)
        flipped[place] ^= data.draw(st.integers(1, 255))
        return data.draw(st.sampled_from([bytes(flipped), whole[:place]]))

    opener = exchange.load(key(HIGH))
    sealed = exchange.load(key(LOW)).seal(PLAIN, link(exchange, LOW, HIGH))
    assert opener.unseal(changed(sealed), link(exchange, HIGH, LOW)) is None
    if exchange is HYBRID:
        assert opener.mask(link(exchange, HIGH, LOW), changed(offer(exchange))) is None


def test_offer_for_another_pair_round_or_secret_is_none() -> None:
    opener, there = HYBRID.load(key(HIGH)), link(HYBRID, HIGH, LOW)
    good = offer(HYBRID)
    assert opener.mask(there, good) is not None
    for other in (
        HYBRID.load(key(9)).offer(link(HYBRID, LOW, HIGH))[:-16] + good[-16:],  # another secret
        HYBRID.load(key(LOW)).offer(link(HYBRID, 2, HIGH)),
        HYBRID.load(key(LOW)).offer(Link(replace(SCOPE, cohort=bytes(32)), LOW, HIGH, there.key)),
        good[:-1],
        b"",
    ):
        assert opener.mask(there, other) is None


def test_lower_member_is_held_to_what_it_promised() -> None:
    """A restored key whose secret is not the one that was offered is no mask, but a lie."""
    there = link(HYBRID, LOW, HIGH)
    assert HYBRID.load(key(9)).mask(there, offer(HYBRID)) is None


def test_higher_neighbours_are_offered_a_secret() -> None:
    assert HYBRID.heirs(3, (1, 2, 4, 7)) == (4, 7)
    assert X25519.heirs(3, (1, 2, 4, 7)) == ()


@BOTH
def test_key_of_another_size_is_weak_and_an_honest_one_is_not(exchange: KeyExchange) -> None:
    good = exchange.load(key(1)).public
    assert not exchange.is_weak(good)
    assert all(exchange.is_weak(bad) for bad in (b"", good[:-1], good + b"\x00", bytes(32)))


def test_hybrid_key_with_one_bad_half_is_weak() -> None:
    good = HYBRID.load(key(1)).public
    assert HYBRID.is_weak(good[:-32] + bytes(32))
    # FIPS 203, section 7.2: every coefficient must be below the modulus 3329.
    assert HYBRID.is_weak(b"\xff\xff\xff" + good[3:])


@given(st.binary(min_size=1216, max_size=1216))
@settings(max_examples=30, deadline=None)
def test_any_bytes_as_a_hybrid_key_are_weak_or_can_be_used(data: bytes) -> None:
    if not HYBRID.is_weak(data):
        there = Link(SCOPE, LOW, HIGH, data)
        assert len(HYBRID.load(key(LOW)).seal(PLAIN, there)) == HYBRID.package_bytes
        assert len(HYBRID.load(key(LOW)).offer(there)) == HYBRID.offer_bytes
