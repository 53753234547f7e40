import pytest

from fedoppu.common.errors import UsageError
from fedoppu.common.roster import Member, Roster
from tests.integration.secagg_harness import identities, roster_of

ROSTER = roster_of(identities(3))


def test_members_are_found_by_index() -> None:
    assert ROSTER.identity(2) == identities(3)[2].enrolled.identity
    assert ROSTER.identity(3) is None
    assert (2 in ROSTER, 3 in ROSTER, len(ROSTER)) == (True, False, 3)


def test_hash_depends_on_every_index_and_key() -> None:
    keys = [member.identity for member in ROSTER.members]
    others = [
        Roster(ROSTER.members[:2]),
        Roster((*ROSTER.members[:2], Member(5, keys[2]))),
        Roster(tuple(Member(i, key) for i, key in enumerate(reversed(keys)))),
    ]
    assert len({roster.hash() for roster in [ROSTER, *others]}) == 4


@pytest.mark.parametrize("indices", [(1, 0), (0, 0), (-1, 0)])
def test_indices_must_be_sorted_and_unique(indices: tuple[int, int]) -> None:
    keys = [member.identity for member in ROSTER.members]
    with pytest.raises(UsageError, match="sorted, unique indices"):
        Roster(tuple(Member(i, key) for i, key in zip(indices, keys, strict=False)))


def test_short_or_shared_identity_is_refused() -> None:
    with pytest.raises(UsageError, match="member 0 must have 32 bytes, got 3"):
        Roster((Member(0, b"abc"),))
    with pytest.raises(UsageError, match="two roster members have one identity"):
        Roster((Member(0, bytes(32)), Member(1, bytes(32))))
