import hashlib
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.errors import ProtocolError
from fedoppu.common.secret_sharing import (
    PRIME,
    SHARE_BYTES,
    Share,
    is_share,
    restore,
    restore_checked,
    split,
)

SECRET = bytes(range(32))


def entropy(length: int) -> bytes:
    return hashlib.shake_256(b"coefficients").digest(length)


def test_field_is_prime_and_the_least_above_two_to_the_256() -> None:
    def passes_miller_rabin(n: int, base: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        x = pow(base, odd, n)
        return x in (1, n - 1) or any(pow(x, 2**i, n) == n - 1 for i in range(1, twos))

    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    assert all(passes_miller_rabin(PRIME, base) for base in bases)
    below = range(2**256 + 1, PRIME, 2)
    assert not any(all(passes_miller_rabin(n, base) for base in bases[:3]) for n in below)


def test_shares_are_those_of_the_published_example() -> None:
    # f(x) = 1234 + 166 x + 94 x^2, the example of the Wikipedia article on Shamir's secret sharing.
    chosen = (166).to_bytes(48, "big") + (94).to_bytes(48, "big")
    secret = (1234).to_bytes(32, "big")
    shares = split(secret, range(6), threshold=3, entropy=lambda length: chosen[:length])
    values = [int.from_bytes(shares[holder].value, "big") for holder in range(6)]
    assert values == [1494, 1942, 2578, 3402, 4414, 5614]
    assert restore([shares[1], shares[3], shares[4]], 3) == secret


@given(data=st.data(), secret=st.binary(min_size=32, max_size=32))
@settings(max_examples=60, deadline=None)
def test_any_threshold_shares_restore_and_fewer_are_refused(
    data: st.DataObject, secret: bytes
) -> None:
    holders = data.draw(st.lists(st.integers(0, 500), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(holders)))
    shares = split(secret, holders, threshold=threshold, entropy=entropy)
    chosen = data.draw(st.permutations(holders))
    assert restore([shares[holder] for holder in chosen[:threshold]], threshold) == secret
    with pytest.raises(ProtocolError, match=f"needs {threshold} shares, got {threshold - 1}"):
        restore([shares[holder] for holder in chosen[: threshold - 1]], threshold)


def test_largest_secret_survives() -> None:
    shares = split(b"\xff" * 32, range(3), threshold=2, entropy=entropy)
    assert restore(shares.values(), 2) == b"\xff" * 32


def test_one_share_less_says_nothing() -> None:
    # For every candidate secret there is a polynomial through the t - 1 shares.
    shares = split(SECRET, range(3), threshold=2, entropy=entropy)
    for candidate in (bytes(32), b"\x01" * 32):
        slope = (int.from_bytes(shares[0].value, "big") - int.from_bytes(candidate, "big")) % PRIME
        other = split(candidate, [0, 1], threshold=2, entropy=partial(int.to_bytes, slope))
        assert other[0].value == shares[0].value


def test_two_shares_of_one_holder_are_refused() -> None:
    shares = split(SECRET, range(3), threshold=2, entropy=entropy)
    with pytest.raises(ProtocolError, match="two shares of one holder"):
        restore([shares[0], shares[0]], 2)


@pytest.mark.parametrize("value", [b"", bytes(32), bytes(34), b"\xff" * 33])
def test_malformed_share_is_refused(value: bytes) -> None:
    shares = split(SECRET, range(3), threshold=2, entropy=entropy)
    assert not is_share(value)
    with pytest.raises(ProtocolError, match="holder 9 is not 33 bytes"):
        restore([shares[0], Share(9, value)], 2)


def test_wrong_share_never_gives_the_right_secret() -> None:
    shares = split(SECRET, range(3), threshold=3, entropy=entropy)
    wrong = Share(1, bytes(SHARE_BYTES))
    assert restore([shares[0], wrong, shares[2]], 3) != SECRET


def test_result_above_a_secret_is_refused() -> None:
    with pytest.raises(ProtocolError, match="restore no 32-byte secret"):
        restore([Share(0, (PRIME - 1).to_bytes(SHARE_BYTES, "big"))], 1)


@pytest.mark.parametrize(("holders", "threshold"), [([0, 1], 3), ([0, 1], 0), ([0, 0, 1], 2)])
def test_impossible_dealing_is_refused(holders: list[int], threshold: int) -> None:
    with pytest.raises(ProtocolError, match="a secret needs between 1 and"):
        split(SECRET, holders, threshold=threshold, entropy=entropy)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_wrong_shares_are_skipped_and_named_while_half_the_surplus_is_right(
    data: st.DataObject,
) -> None:
    size = data.draw(st.integers(3, 20))
    threshold = data.draw(st.integers(1, size))
    wrong = data.draw(
        st.lists(st.integers(0, size - 1), max_size=(size - threshold) // 2, unique=True)
    )
    shares = split(SECRET, range(size), threshold=threshold, entropy=entropy)
    for holder in wrong:
        value = (int.from_bytes(shares[holder].value, "big") + 1 + holder) % PRIME
        shares[holder] = Share(holder, value.to_bytes(SHARE_BYTES, "big"))
    restored = restore_checked(shares.values(), threshold, check=lambda found: found == SECRET)
    assert restored is not None
    assert restored.secret == SECRET
    assert restored.wrong == tuple(sorted(wrong))


@pytest.mark.parametrize("wrong", [[0], [0, 1], [1, 4]])
def test_few_shares_are_tried_in_all_subsets(wrong: list[int]) -> None:
    shares = split(SECRET, range(5), threshold=3, entropy=entropy)
    for holder in wrong:
        shares[holder] = Share(holder, bytes(SHARE_BYTES))
    restored = restore_checked(shares.values(), 3, check=lambda found: found == SECRET)
    assert restored is not None
    assert restored.wrong == tuple(wrong)


@given(
    values=st.lists(st.just(0) | st.integers(0, PRIME - 1), min_size=1, max_size=9),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_shares_are_the_answer_is_a_polynomial_or_none(
    values: list[int], data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, len(values)))
    shares = [Share(i, value.to_bytes(SHARE_BYTES, "big")) for i, value in enumerate(values)]
    assert restore_checked(shares, threshold, check=lambda found: False) is None
    restored = restore_checked(shares, threshold, check=lambda found: True)
    assert restored is None or len(values) - len(restored.wrong) >= threshold


def test_too_many_wrong_shares_restore_nothing() -> None:
    shares = split(SECRET, range(5), threshold=4, entropy=entropy)
    for holder in (0, 1):
        shares[holder] = Share(holder, bytes(SHARE_BYTES))
    assert restore_checked(shares.values(), 4, check=lambda found: found == SECRET) is None


def test_liar_to_many_of_138_holders_costs_little() -> None:
    """Too many wrong shares to decode, too many ways to leave some out: it is given up at once."""
    shares = split(SECRET, range(138), threshold=102, entropy=entropy)
    for holder in range(30):
        shares[holder] = Share(holder, bytes(SHARE_BYTES))
    tried: list[bytes] = []

    def check(found: bytes) -> bool:
        tried.append(found)
        return found == SECRET

    assert restore_checked(shares.values(), 102, check=check) is None
    assert len(tried) <= 1


def test_shares_of_another_secret_are_tried_once() -> None:
    shares = split(bytes(32), range(20), threshold=10, entropy=entropy)
    tried: list[bytes] = []

    def check(found: bytes) -> bool:
        tried.append(found)
        return False

    assert restore_checked(shares.values(), 10, check=check) is None
    assert tried == [bytes(32)]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_wrong_shares_beyond_half_the_surplus_are_found_where_few_can_be_left_out(
    data: st.DataObject,
) -> None:
    threshold = data.draw(st.integers(1, 30))
    size = threshold + data.draw(st.integers(1, 2))
    wrong = data.draw(
        st.lists(
            st.integers(0, size - 1),
            min_size=1,
            max_size=size - threshold,
            unique=True,
        )
    )
    shares = split(SECRET, range(size), threshold=threshold, entropy=entropy)
    for holder in wrong:  # errors of their own: see the next test
        error = int.from_bytes(hashlib.sha256(b"%d" % holder).digest(), "big")
        value = (int.from_bytes(shares[holder].value, "big") + error) % PRIME
        shares[holder] = Share(holder, value.to_bytes(SHARE_BYTES, "big"))
    restored = restore_checked(shares.values(), threshold, check=lambda found: found == SECRET)
    assert restored is not None
    assert restored.wrong == tuple(sorted(wrong))


def test_errors_that_cancel_at_zero_restore_the_secret_and_may_name_the_wrong_holders() -> None:
    """Both wrong shares and the secret are on a line: whoever dealt them so is the liar anyway."""
    shares = split(SECRET, range(4), threshold=2, entropy=entropy)
    for holder in (1, 3):  # places 2 and 4: errors 2 and 4 times the same
        value = (int.from_bytes(shares[holder].value, "big") + 7 * (holder + 1)) % PRIME
        shares[holder] = Share(holder, value.to_bytes(SHARE_BYTES, "big"))
    restored = restore_checked(shares.values(), 2, check=lambda found: found == SECRET)
    assert restored is not None
    assert restored.secret == SECRET
    assert restored.wrong in ((1, 3), (0, 2))
