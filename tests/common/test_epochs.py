"""Roster epochs: what follows what, and that nothing else does."""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.epoch_fields import (
    answer_values,
    epoch_values,
    read_answer,
    read_epoch,
)
from fedoppu.common.epochs import (
    Enrolled,
    EpochAnnounced,
    EpochAnswer,
    RosterEpoch,
    _signed,
    collect,
    countersign,
    countersigners,
    found,
    propose,
    require_authority,
    require_successor,
)
from fedoppu.common.errors import FedoppuError, ProtocolError, UsageError
from fedoppu.common.fields import Fields
from fedoppu.common.roster import Member, Roster
from tests.rosters import AUTHORITY, RUN, STRANGER, completed, founded, person, proposed, signed_by

FIRST = founded()
SECOND = completed(FIRST, proposed(FIRST, add=2, revoked={3}))
THIRD = completed(SECOND, proposed(SECOND, add=1, revoked={8}))


def signed_again(epoch: RosterEpoch, authority: Ed25519PrivateKey = AUTHORITY) -> RosterEpoch:
    """A changed epoch as the authority itself would show it, everyone's countersignature included."""
    return signed_by(FIRST, _signed(authority, epoch), range(20))


# --- what an epoch is ----------------------------------------------------------------------------


def test_members_of_an_epoch_are_the_entries_that_were_not_revoked() -> None:
    assert SECOND.members == {0, 1, 2, 4, 5, 6, 7, 8, 9}
    assert THIRD.members == {0, 1, 2, 4, 5, 6, 7, 9, 10}
    assert THIRD.entries[3] == Enrolled(3, person(3).enrolled.identity, 0, 1)
    assert THIRD.newcomers == {10}


def test_roster_of_an_epoch_is_the_roster_of_its_members_byte_for_byte() -> None:
    assert FIRST.roster == Roster(tuple(person(index).enrolled for index in range(8)))
    assert FIRST.roster.hash() == Roster(FIRST.roster.members).hash()


def test_young_members_age_by_epochs_and_founders_never_are() -> None:
    assert FIRST.young(5) == frozenset()
    assert [sorted(SECOND.young(epochs)) for epochs in (0, 1, 9)] == [[], [8, 9], [8, 9]]
    assert [sorted(THIRD.young(epochs)) for epochs in (1, 2)] == [[10], [9, 10]]


def test_hash_covers_everything_but_the_signatures() -> None:
    changes: list[dict[str, Any]] = [
        {"number": 2},
        {"previous": bytes(32)},
        {"authority": bytes(32)},
        {"run_id": "cd"},
        {"first_round": 5},
        {"entries": SECOND.entries[:-1]},
    ]
    others = [replace(SECOND, **change).digest for change in changes]
    assert len({SECOND.digest, *others}) == 7
    assert replace(SECOND, signature=bytes(64), countersignatures={}).digest == SECOND.digest


def _encoded(*parts: str | int | bytes) -> bytes:
    """Each part by its type, the length of its value in four bytes, and its value."""
    encoded = b""
    for part in parts:
        tag = {str: b"s", int: b"i", bytes: b"b"}[type(part)]
        value = part if isinstance(part, bytes) else str(part).encode()
        encoded += tag + struct.pack(">I", len(value)) + value
    return encoded


def test_hash_and_signatures_of_an_epoch_are_these_published_values() -> None:
    """Test vectors: the authority's key is SHA-256 of "authority", member i's of "identity i"."""
    first = founded(2)
    second = proposed(first, add=1, revoked={0})  # run abab..., first round 4
    one, two, three = (person(index).enrolled.identity for index in range(3))
    canonical = _encoded(
        *("fedoppu roster epoch", 1, first.digest, first.authority, "ab" * 16, 4),
        *(0, one, 0, 1),
        *(1, two, 0, 0),
        *(2, three, 1, 0),
    )
    assert second.digest == hashlib.sha256(canonical).digest()
    assert first.digest.hex() == "73ebb5f4c606d58d16b0ddfb7697f8ed5c50f4646bb495e113e740567ce62bd6"
    assert second.digest.hex() == "6be3d22da19ae701723fe4e629cf567aacffeff06f73d863a0eb6c3262102155"
    signed = AUTHORITY.sign(_encoded("fedoppu roster authority", 1, second.digest))
    assert second.signature == signed
    assert signed.hex().startswith("c3aeaf2d80cb75e8028ef803e781e1a1")
    assert countersign(second, person(1)) == person(1).sign(
        _encoded("fedoppu roster countersignature", 1, second.digest)
    )


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (Enrolled(8, bytes(32), 1), "member 8 of roster epoch 0 was enrolled in epoch 1"),
        (Enrolled(8, bytes(32), -1), "was enrolled in epoch -1"),
        (Enrolled(8, bytes(32), 0, 1), "revoked in 1: neither may be later"),
        (Enrolled(7, bytes(32), 0), "sorted, unique indices"),
        (Enrolled(8, b"short", 0), "member 8 must have 32 bytes"),
        (Enrolled(8, FIRST.entries[0].identity, 0), "two roster members have one identity"),
    ],
)
def test_impossible_entry_is_refused(entry: Enrolled, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        replace(FIRST, entries=(*FIRST.entries, entry))


def test_short_hash_or_key_is_refused() -> None:
    with pytest.raises(UsageError, match="a hash and an authority's key of 32 bytes each"):
        replace(FIRST, previous=b"")


# --- the authority's and the server's side --------------------------------------------------------


def test_authority_cannot_revoke_a_stranger_or_enrol_a_key_twice() -> None:
    with pytest.raises(UsageError, match="member 3 is in no roster: nothing to revoke"):
        proposed(SECOND, revoked={3})
    with pytest.raises(UsageError, match="two roster members have one identity"):
        propose(AUTHORITY, SECOND, first=(RUN, 9), newcomers=[person(3).enrolled.identity])


def test_newcomers_of_an_empty_roster_begin_at_index_zero() -> None:
    empty = found(AUTHORITY, [])
    epoch = propose(AUTHORITY, empty, first=("", 0), newcomers=[bytes(32)])
    assert epoch.roster.members == (Member(0, bytes(32)),)


def test_server_collects_only_good_countersignatures() -> None:
    epoch = proposed(FIRST)
    good = countersign(epoch, person(2))
    answers = [
        EpochAnswer(2, 1, good),
        EpochAnswer(3, 1, good),
        EpochAnswer(4, 2, countersign(epoch, person(4))),
        EpochAnswer(5, 1, b""),
        EpochAnswer(8, 1, countersign(epoch, person(8))),
    ]
    found_ = collect(FIRST, epoch, answers)
    assert found_ == replace(epoch, countersignatures={2: good})
    later = collect(FIRST, found_, [EpochAnswer(6, 1, countersign(epoch, person(6)))])
    assert sorted(later.countersignatures) == [2, 6]


def test_only_members_of_the_epoch_before_count_as_countersigners() -> None:
    epoch = signed_by(FIRST, proposed(FIRST, add=2), range(12))
    assert countersigners(FIRST, epoch) == frozenset(range(8))
    third = signed_by(SECOND, proposed(SECOND), range(12))
    assert countersigners(SECOND, third) == SECOND.members  # neither 3, who was revoked, nor 10


def test_signature_for_one_epoch_or_use_means_nothing_for_another() -> None:
    epoch, other = proposed(FIRST), proposed(FIRST, first=9)
    moved = replace(epoch, countersignatures={2: countersign(other, person(2)), 3: epoch.signature})
    assert countersigners(FIRST, moved) == frozenset()
    swapped = replace(epoch, signature=other.signature)
    with pytest.raises(ProtocolError, match="epoch 1 is not signed by the roster authority"):
        require_authority(swapped)


# --- the rules of the chain ----------------------------------------------------------------------


@given(
    size=st.integers(1, 10),
    steps=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 30))), max_size=4),
)
@settings(max_examples=40)
def test_random_chains_are_followed_link_by_link(
    size: int, steps: list[tuple[int, set[int]]]
) -> None:
    before, members, used = founded(size), set(range(size)), size
    for add, revoked in steps:
        gone = revoked & members
        epoch = completed(before, proposed(before, add=add, revoked=gone))
        require_successor(before, epoch)
        members = (members - gone) | set(range(used, used + add))
        used += add
        assert epoch.members == members
        assert countersigners(before, epoch) == before.members
        before = epoch


Mutation = Callable[[RosterEpoch], RosterEpoch]


def _entry(place: int, **changes: Any) -> Mutation:
    def change(epoch: RosterEpoch) -> RosterEpoch:
        entries = list(epoch.entries)
        entries[place] = replace(entries[place], **changes)
        return replace(epoch, entries=tuple(entries))

    return change


# what not even the authority and all members together may do, with good signatures
FORBIDDEN: list[tuple[Mutation, str]] = [
    (lambda e: replace(e, number=3), "roster epoch 3 does not follow epoch 1"),
    (lambda e: replace(e, number=1, entries=SECOND.entries), "epoch 1 does not follow epoch 1"),
    (lambda e: replace(e, previous=FIRST.digest), "the roster was forked"),
    (lambda e: replace(e, authority=person(0).enrolled.identity), "names another authority"),
    (lambda e: replace(e, first_round=SECOND.first_round), "a later epoch begins later"),
    (_entry(0, identity=bytes(32)), "changes the entry of member 0"),
    (_entry(0, epoch=1), "changes the entry of member 0"),
    (_entry(0, revoked=1), "changes the entry of member 0"),
    (_entry(3, revoked=0), "changes the entry of member 3"),
    (_entry(3, revoked=2), "changes the entry of member 3"),
    (lambda e: replace(e, entries=e.entries[1:]), "changes the entry of member 0"),
    (lambda e: replace(e, entries=(*e.entries[:3], *e.entries[4:])), "the entry of member 3"),
    (_entry(-1, index=20, epoch=1), "adds member 20 as enrolled in epoch 1"),
    (_entry(-1, epoch=0), "adds member 10 as enrolled in epoch 0"),
    (_entry(-1, epoch=1, revoked=2), "adds member 10 as enrolled in epoch 1"),
]


@pytest.mark.parametrize(("mutation", "match"), FORBIDDEN)
def test_no_signatures_make_up_for_a_broken_rule(mutation: Mutation, match: str) -> None:
    require_successor(SECOND, THIRD)
    with pytest.raises(ProtocolError, match=match):
        require_successor(SECOND, signed_again(mutation(THIRD)))


def test_index_that_moves_to_another_identity_is_refused() -> None:
    """Of one who was revoked, too: nobody ever gets a used index or key."""
    with pytest.raises(ProtocolError, match="changes the entry of member 3"):
        require_successor(SECOND, signed_again(_entry(3, identity=bytes(32))(THIRD)))
    moved = (*THIRD.entries[:3], *THIRD.entries[4:], Enrolled(11, THIRD.entries[3].identity, 2))
    with pytest.raises(ProtocolError, match="changes the entry of member 3"):
        require_successor(SECOND, signed_again(replace(THIRD, entries=moved)))


CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "number": st.integers(0, 5),
    "previous": st.binary(min_size=32, max_size=32),
    "authority": st.sampled_from([person(0).enrolled.identity, bytes(32)]),
    "run_id": st.sampled_from(["", "cd" * 16]),
    "first_round": st.integers(0, 99),
    "signature": st.binary(max_size=64),
}


@given(data=st.data())
@settings(max_examples=80)
def test_any_single_change_of_what_was_signed_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*CHANGES, "entries"]))
    if name in CHANGES:
        value = data.draw(CHANGES[name].filter(lambda drawn: drawn != vars(THIRD)[name]))
        mutation: Mutation = lambda epoch: replace(epoch, **{name: value})  # noqa: E731
    else:
        place = data.draw(st.integers(0, len(THIRD.entries) - 1))
        part = data.draw(st.sampled_from(["index", "identity", "epoch", "revoked"]))
        new = bytes(32) if part == "identity" else data.draw(st.integers(0, 20))
        if vars(THIRD.entries[place])[part] == new:
            return
        mutation = _entry(place, **{part: new})
    with pytest.raises(FedoppuError):
        require_successor(SECOND, mutation(THIRD))


def test_authority_with_another_key_is_refused() -> None:
    forged = signed_again(proposed(FIRST), STRANGER)
    with pytest.raises(ProtocolError, match="is not signed by the roster authority"):
        require_successor(FIRST, forged)


# --- the wire ------------------------------------------------------------------------------------


def test_epoch_and_answer_come_back_from_the_wire() -> None:
    for epoch in (FIRST, SECOND, THIRD):
        fields = Fields("query.roster of the server", epoch_values(EpochAnnounced(epoch)))
        assert read_epoch(fields).epoch == epoch
        assert read_epoch(fields).epoch.digest == epoch.digest
    answer = EpochAnswer(3, 2, bytes(64))
    assert read_answer(Fields("query.roster of member 3", answer_values(answer))) == answer


def test_wire_form_has_no_text() -> None:
    values = epoch_values(EpochAnnounced(THIRD)).values()
    for value in values:
        for entry in value if isinstance(value, list) else [value]:
            assert isinstance(entry, int | bytes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"diary": b"dear"}, "1 unknown fields"),
        ({"members": [0, 0]}, "field members must be strictly ascending"),
        ({"identities": [bytes(32)]}, "field identities must have 8 entries"),
        ({"identities": [bytes(32)] * 8}, "field members must be a roster: two roster members"),
        ({"enrolled": [0] * 7}, "field enrolled must have 8 entries"),
        ({"revoked": [9] * 8}, "field members must be a roster: member 0 of roster epoch 0"),
        ({"signature": b""}, "field signature must have 64 bytes, got 0"),
        ({"run_id": "ab"}, "field run_id must be bytes, got str"),
        ({"run_id": bytes(33)}, "field run_id must have 0 to 32 bytes"),
        ({"number": -1}, "field number must be between 0"),
        ({"previous": b"x"}, "field previous must have 32 bytes"),
    ],
)
def test_malformed_epoch_is_refused_and_named(changes: dict[str, Any], match: str) -> None:
    values = epoch_values(EpochAnnounced(FIRST)) | changes
    with pytest.raises(ProtocolError, match=f"query.roster of the server: .*{match}"):
        read_epoch(Fields("query.roster of the server", values))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"countersignature": bytes(65)}, "must have 0 to 64 bytes"),
        ({"member": -1}, "field member must be between 0"),
        ({"note": 1}, "1 unknown fields"),
    ],
)
def test_malformed_answer_is_refused_and_named(changes: dict[str, Any], match: str) -> None:
    values = dict(answer_values(EpochAnswer(3, 2, b""))) | changes
    with pytest.raises(ProtocolError, match=match):
        read_answer(Fields("query.roster of member 3", values))
