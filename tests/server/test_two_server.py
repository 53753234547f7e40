"""The server of the two-server mode: one fixed set, and no answer for another."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedoppu.common.errors import DataError, ProtocolError, RoundAborted, UsageError
from fedoppu.common.signing import Identity
from fedoppu.common.two_server import MaskSum, SealedUpdate, mask_sum_bytes
from fedoppu.server.two_server import SealedServer, SealedStage
from tests.integration.two_server_harness import TwoServers, resign

SET = [0, 1, 2, 3]


def test_stages_follow_each_other() -> None:
    made = TwoServers()
    server = made.server()
    assert server.stage.value == SealedStage.SEALED
    assert [out.member for out in server.pending()] == [0, 1, 2, 3, 4]
    for member in SET:
        server.receive(made.update(member))
    assert [out.member for out in server.pending()] == [4]
    server.close()
    assert (server.stage, server.survivors, server.pending()) == (
        SealedStage.HELPER,
        (0, 1, 2, 3),
        [],
    )
    ready = server.unmask(made.helper.answer(server.request()))
    assert server.stage.value == SealedStage.DONE
    assert ready.survivors == (0, 1, 2, 3)
    assert (ready.words == made.plain_sum(SET)).all()


def test_masked_sum_without_the_helper_is_not_the_sum() -> None:
    made = TwoServers(num_params=200)
    server = made.asking(SET)
    differs = server._sum != made.plain_sum(SET)
    assert differs.mean() > 0.9


# --- answers --------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[SealedUpdate, TwoServers], SealedUpdate], str]] = {
    "short": (lambda update, made: replace(update, words=update.words[:-1]), "sent a vector of"),
    "narrow": (
        lambda update, made: replace(update, words=update.words.astype(np.uint16)),
        "sent a vector of",
    ),
    "long seed": (
        lambda update, made: replace(update, sealed=update.sealed + b"x"),
        "sealed its seed in 81 bytes, not 80",
    ),
    "changed words": (
        lambda update, made: replace(update, words=update.words + np.uint32(1)),
        "whose signature is not its own for this round",
    ),
    "changed salt": (
        lambda update, made: replace(update, salt=b"s" * 32),
        "whose signature is not its own for this round",
    ),
    "swapped seed": (
        lambda update, made: replace(update, sealed=made.update(1).sealed),
        "whose signature is not its own for this round",
    ),
    "forged": (
        lambda update, made: resign(update, made.people[1], made.plan),
        "whose signature is not its own for this round",
    ),
    "old round": (
        lambda update, made: made.update(3, made.plan_of(number=9)),
        "whose signature is not its own for this round",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answer_is_that_members_drop_and_is_named(name: str) -> None:
    made = TwoServers()
    server = made.server()
    change, fault = BAD[name]
    for member in SET:
        update = made.update(member)
        server.receive(change(update, made) if member == 3 else update)
    assert fault in server.liars[3]
    assert [out.member for out in server.pending()] == [4]
    server.receive(made.update(3))  # a second try is not taken
    server.close()
    ready = server.unmask(made.helper.answer(server.request()))
    assert (ready.words == made.plain_sum([0, 1, 2])).all()
    assert ready.liars == server.liars


def test_second_answer_is_named_and_a_repeat_is_not() -> None:
    made = TwoServers()
    server = made.server()
    update = made.update(0)
    server.receive(update)
    server.receive(update)
    other = replace(update, salt=b"s" * 32)
    assert server.liars == {}
    server.receive(resign(other, made.people[0], made.plan))
    assert server.liars == {0: "answered train.sealed twice"}


def test_answer_of_a_member_that_was_not_asked_is_named() -> None:
    made = TwoServers()
    server = SealedServer(made.plan, made.roster, invited=[0, 1, 2], helper=made.keys)
    server.receive(made.update(4))
    assert server.liars == {4: "answered train.sealed without being asked"}
    assert server.invited == (0, 1, 2)


def test_late_answer_is_refused_and_changes_nothing() -> None:
    made = TwoServers()
    server = made.asking(SET)
    before = server.dump()
    with pytest.raises(ProtocolError, match=r"member 4 came in stage helper\.sum: too late"):
        server.receive(made.update(4))
    assert server.dump() == before


# --- the set --------------------------------------------------------------------------------------


def test_too_few_answers_end_the_attempt() -> None:
    made = TwoServers()
    server = made.server()
    for member in (0, 1):
        server.receive(made.update(member))
    assert not server.sufficient
    with pytest.raises(RoundAborted, match="2 members of 5 asked sent masked words, 3 must"):
        server.close()
    assert server.stage is SealedStage.ABORTED
    with pytest.raises(ProtocolError, match="the helper has no part in stage aborted"):
        server.request()


def test_set_is_fixed_once() -> None:
    made = TwoServers()
    server = made.asking(SET)
    assert server.request() == server.request()
    with pytest.raises(ProtocolError, match="the set was fixed before"):
        server.close()


def test_helper_is_not_asked_before_the_set_is_fixed() -> None:
    with pytest.raises(ProtocolError, match=r"the helper has no part in stage train\.sealed"):
        TwoServers().server().request()


# --- the helper's answer --------------------------------------------------------------------------

LIES: dict[str, tuple[dict[str, object], str]] = {
    "another set": ({"survivors": (0, 1, 2, 4)}, "not the 4 it was asked for"),
    "one fewer": ({"survivors": (0, 1, 2)}, "not the 4 it was asked for"),
    "one more": ({"survivors": (0, 1, 2, 3, 4)}, "not the 4 it was asked for"),
    "twice": ({"unsealed": (3,)}, "not the 4 it was asked for"),
    "a stranger is bad": (
        {"survivors": (), "unsealed": (4,), "words": np.zeros(0, np.uint32)},
        "not the 4 it was asked for",
    ),
    "all but one are bad": (
        {"survivors": (0,), "unsealed": (1, 2, 3)},
        "answered for 1 members, the plan's min_cohort is 3",
    ),
    "another round": ({"context": b"c" * 32}, "for another round or attempt"),
    "short": ({"words": np.zeros(2, np.uint32)}, r"the mask sum has \(2,\) words"),
    "narrow": ({"words": np.zeros(10, np.uint16)}, "words of uint16"),
}


@pytest.mark.parametrize("name", LIES)
def test_answer_for_anything_else_is_refused_though_the_helper_signed_it(name: str) -> None:
    made = TwoServers()
    server = made.asking(SET)
    honest = made.helper.answer(server.request())
    changes, message = LIES[name]
    before = server.dump()
    with pytest.raises(ProtocolError, match=message):
        server.unmask(made.resigned(replace(honest, **changes)))  # type: ignore[arg-type]
    assert server.dump() == before
    assert (server.unmask(honest).words == made.plain_sum(SET)).all()


def test_answer_of_another_signer_is_refused() -> None:
    made = TwoServers()
    server = made.asking(SET)
    honest = made.helper.answer(server.request())
    stranger = Identity(0, b"k" * 32)
    forged = replace(honest, signature=stranger.sign(mask_sum_bytes(honest)))
    for answer in (forged, replace(honest, words=honest.words + np.uint32(1))):
        with pytest.raises(ProtocolError, match="is not signed by the helper"):
            server.unmask(answer)


def bad_seed(made: TwoServers, member: int) -> SealedUpdate:
    """An update whose seed does not open."""
    update = replace(made.update(member), sealed=b"x" * len(made.update(member).sealed))
    return resign(update, made.people[member], made.plan)


def with_bad(made: TwoServers, members: list[int], bad: list[int]) -> SealedServer:
    server = made.server()
    for member in members:
        server.receive(bad_seed(made, member) if member in bad else made.update(member))
    server.close()
    return server


@pytest.mark.parametrize("narrow", [False, True])
def test_words_of_a_bad_seed_are_taken_off_again(narrow: bool) -> None:
    made = TwoServers(narrow=narrow)
    server = with_bad(made, [0, 1, 2, 3, 4], [1, 4])
    ready = server.unmask(made.helper.answer(server.request()))
    assert ready.survivors == (0, 2, 3)
    assert (ready.words == made.plain_sum([0, 2, 3])).all()
    lie = "sealed no seed that the helper can open"
    assert ready.liars == {1: lie, 4: lie}


def test_too_few_good_seeds_end_the_attempt_and_are_named() -> None:
    made = TwoServers()
    server = with_bad(made, SET, [0, 2])
    answer = made.helper.answer(server.request())
    with pytest.raises(RoundAborted, match="2 seeds do not open, too few are left"):
        server.unmask(answer)
    assert set(server.liars) == {0, 2}
    assert server.stage is SealedStage.ABORTED
    assert not server._words
    assert not server._sum.any()


# --- restarts -------------------------------------------------------------------------------------


def reloaded(made: TwoServers, server: SealedServer) -> SealedServer:
    return SealedServer.load(server.dump(), made.roster, helper=made.keys)


def test_restart_between_set_and_answer_gives_the_same_sum() -> None:
    made = TwoServers(narrow=True)
    server = made.asking(SET)
    again = reloaded(made, server)
    assert again.request() == server.request()
    answer = made.helper.answer(again.request())
    assert (again.unmask(answer).words == server.unmask(answer).words).all()


def test_restart_before_the_set_is_fixed_asks_everybody_again() -> None:
    made = TwoServers()
    server = made.server()
    server.receive(made.update(0))
    again = reloaded(made, server)
    assert [out.member for out in again.pending()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("repeating", [[1], [0, 2, 3]])
def test_restart_and_a_bad_seed_are_mended_by_words_that_are_repeated(repeating: list[int]) -> None:
    """Those of the bad one are taken off, or those of all others added up."""
    made = TwoServers()
    sent = {m: bad_seed(made, m) if m == 1 else made.update(m) for m in SET}
    server = made.server()
    for update in sent.values():
        server.receive(update)
    server.close()
    again = reloaded(made, server)
    answer = made.helper.answer(again.request())
    assert [out.member for out in again.pending()] == SET
    with pytest.raises(ProtocolError, match="a restart has lost the words"):
        again.unmask(answer)
    for member in repeating:
        again.receive(sent[member])
    assert (again.unmask(answer).words == made.plain_sum([0, 2, 3])).all()


def test_other_words_after_a_restart_are_named_and_not_taken() -> None:
    made = TwoServers()
    again = reloaded(made, with_bad(made, SET, [1]))
    again.receive(made.update(2))  # sealed anew
    assert again.liars == {2: "sent other masked words than before"}
    assert [out.member for out in again.pending()] == SET


def test_dump_that_was_cut_is_refused() -> None:
    made = TwoServers()
    data = made.asking(SET).dump()
    with pytest.raises(DataError, match="the stored sum has"):
        SealedServer.load(data[:-4], made.roster, helper=made.keys)


# --- the opening ----------------------------------------------------------------------------------


def test_strangers_and_other_rosters_are_refused() -> None:
    made = TwoServers()
    with pytest.raises(ProtocolError, match=r"members \[9\] are not in it"):
        SealedServer(made.plan, made.roster, invited=[0, 9], helper=made.keys)
    other = replace(made.plan, roster_hash="00" * 32)
    with pytest.raises(ProtocolError, match="the plan is for another roster"):
        SealedServer(other, made.roster, invited=[0, 1], helper=made.keys)


def test_more_members_than_the_words_hold_are_refused() -> None:
    made = TwoServers(n=5)
    narrow = replace(made.plan, word_bits=16, level_bits=14)
    with pytest.raises(UsageError, match="overflow 16-bit words"):
        SealedServer(narrow, made.roster, invited=range(5), helper=made.keys)


def test_empty_answer_travels_as_nothing() -> None:
    made = TwoServers()
    empty = MaskSum(made.plan.context, (), (), np.zeros(0, np.uint32), b"")
    server = made.asking(SET)
    with pytest.raises(RoundAborted, match="0 seeds do not open"):
        server.unmask(made.resigned(empty))
