"""Random choices are functions of (root, purpose, key)."""

from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.randomness import Randomness, encode_key

part = st.one_of(st.text(max_size=8), st.binary(max_size=8), st.integers())
keys = st.lists(part, max_size=4).map(tuple)


@given(keys, keys)
def test_no_two_keys_share_an_encoding(
    one: tuple[str | int | bytes, ...], other: tuple[str | int | bytes, ...]
) -> None:
    same = [type(a) for a in one] == [type(b) for b in other] and one == other
    assert (encode_key(one) == encode_key(other)) == same


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    root = Randomness.from_seed(3)
    first = root.stream("cohort", 1).random(4).tolist()
    root.stream("cohort", 2).random(100)
    assert root.stream("cohort", 1).random(4).tolist() == first


def test_seeds_purposes_keys_and_children_all_differ() -> None:
    root = Randomness.from_seed(0)
    others = [
        Randomness.from_seed(1).secret("a"),
        root.secret("b"),
        root.secret("a", 1),
        root.child("a").secret("a"),
    ]
    assert len({root.secret("a"), *others}) == 5


def test_the_root_is_not_printed() -> None:
    assert Randomness.from_seed(0).root.hex() not in repr(Randomness.from_seed(0))
    assert "root" not in repr(Randomness.from_seed(0))


def test_a_seed_means_the_same_bytes_for_ever() -> None:
    assert Randomness.from_seed(0).secret("cohort", 1).hex() == (
        "b6adee57b87102a1a7f3f47b177a031cd93149d17fb03bc844d90c47e6cdd470"
    )
