"""Members in few bytes, in one form alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.errors import ProtocolError
from fedoppu.common.event_fields import pack_members, read_bundle, read_delivery, unpack_members
from fedoppu.common.fields import MAX_MEMBERS, Fields

MEMBERS = st.lists(st.integers(0, MAX_MEMBERS), unique=True, max_size=30).map(sorted)


def unpacked(data: bytes) -> tuple[int, ...]:
    return unpack_members(Fields("here", {"recipients": data}), "recipients")


@given(MEMBERS)
def test_packed_members_come_back(members: list[int]) -> None:
    assert unpacked(pack_members(members)) == tuple(members)


def test_neighbours_in_one_row_take_a_byte_each() -> None:
    assert len(pack_members(range(100, 154))) == 54
    assert len(pack_members(range(0, 54 * 128, 128))) == 54
    assert len(pack_members(range(0, 54 * 16_384, 16_384))) == 107


@given(st.binary(max_size=12))
def test_bytes_are_members_in_their_shortest_form_or_refused(data: bytes) -> None:
    try:
        members = unpacked(data)
    except ProtocolError:
        return
    assert pack_members(members) == data
    assert list(members) == sorted(set(members))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x80\x00", "must be the shortest form of ascending members"),
        (b"\x05\x80", "must be the shortest form"),
        (b"\xff\xff\xff\x7f", "must hold members up to 1048576"),
        (b"\xff\xff\x7f", "must hold members up to 1048576"),
        (b"\x80" * 9, "must hold members up to 1048576"),
    ],
)
def test_other_forms_are_refused(data: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=f"here: field recipients {problem}"):
        unpacked(data)


def bundle(**changes: object) -> Fields:
    values: dict[str, object] = {
        "member": 2,
        "recipients": pack_members([1, 3, 4]),
        "packages": [b"p"] * 3,
        "share_hashes": [bytes(20)] * 3,
        "offers": [],
        "signature": bytes(64),
    }
    return Fields("here", values | changes)


def test_offers_are_for_all_above_the_dealer_or_for_no_one() -> None:
    assert read_bundle(bundle()).offers == {}
    assert read_bundle(bundle(offers=[b"a", b"b"])).offers == {3: b"a", 4: b"b"}
    with pytest.raises(ProtocolError, match="field offers must have 2 entries, got 1"):
        read_bundle(bundle(offers=[b"a"]))
    with pytest.raises(ProtocolError, match="field offers must be a list, got bytes"):
        read_bundle(bundle(offers=b"ab"))


def test_path_of_half_a_hash_is_refused() -> None:
    values: dict[str, object] = {"dealers": [], "bundles": [1], "signatures": [bytes(64)]}
    values |= {"paths": [bytes(33)]}
    for name in ("packages", "share_hashes", "offers"):
        values |= {f"{name}_count": [0], f"{name}_of": [], name: []}
    with pytest.raises(ProtocolError, match="field paths must hold hashes of 32 bytes"):
        read_delivery(Fields("here", values))
