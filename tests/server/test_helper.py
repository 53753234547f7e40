"""The helper: one set a round, whatever a server tries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import DataError, ProtocolError, RefusedByPolicy, UsageError
from fedoppu.common.messages import pack, write_mask_sum
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.signing import verify
from fedoppu.common.two_server import MaskSumRequest, SealedClaim, claim_bytes, mask_sum_bytes
from fedoppu.server.helper import Helper, HelperPolicy, HelperSecrets, HelperService
from tests.fake_federation import CONFIG
from tests.integration.secagg_harness import HashKeys, identities
from tests.integration.two_server_harness import TwoServers

SET = [0, 1, 2, 3]


def claims(made: TwoServers, members: list[int], plan: RoundPlan | None = None) -> MaskSumRequest:
    chosen = plan or made.plan
    found = tuple(made.update(member, chosen).claim() for member in members)
    return MaskSumRequest(chosen, found)


def test_answer_is_signed_for_exactly_this_round_and_set() -> None:
    made = TwoServers()
    answer = made.helper.answer(claims(made, SET))
    assert (answer.context, answer.survivors) == (made.plan.context, tuple(SET))
    assert verify(made.keys.identity, answer.signature, mask_sum_bytes(answer))
    for change in ({"survivors": (0, 1)}, {"unsealed": (4,)}, {"context": b"c" * 32}):
        changed = replace(answer, **change)
        assert not verify(made.keys.identity, answer.signature, mask_sum_bytes(changed))


# --- one set a round ------------------------------------------------------------------------------


def test_same_request_is_answered_byte_for_byte_again() -> None:
    made = TwoServers()
    request = claims(made, SET)
    first, second = (pack(write_mask_sum(made.helper.answer(request))) for _ in range(2))
    assert first == second


def test_same_request_is_answered_byte_for_byte_after_a_restart() -> None:
    made = TwoServers()
    request = claims(made, SET)
    first = made.helper.answer(request)
    again = made.new_helper()
    again.restore(made.helper.dump())
    assert pack(write_mask_sum(again.answer(request))) == pack(write_mask_sum(first))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("second", [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 4]])
def test_sums_over_abc_and_ab_are_not_both_told(second: list[int], restarted: bool) -> None:
    made = TwoServers()
    made.helper.answer(claims(made, SET))
    helper = made.helper
    if restarted:
        helper = made.new_helper()
        helper.restore(made.helper.dump())
    with pytest.raises(ProtocolError, match="round 1 was answered for another set"):
        helper.answer(claims(made, second))


def test_without_its_memory_the_second_set_would_reveal_a_member() -> None:
    """The control: the rule switched off."""
    made = TwoServers()
    first = made.run(SET)
    made.helper = made.new_helper()
    second = made.run([0, 1, 2])
    assert (first.words - second.words == made.words(3)).all()


def test_another_attempt_of_an_answered_round_is_refused() -> None:
    made = TwoServers()
    made.helper.answer(claims(made, SET))
    later = made.plan_of(attempt=1)
    with pytest.raises(ProtocolError, match="round 1 was answered for another set"):
        made.helper.answer(claims(made, SET, later))


@pytest.mark.parametrize("changes", [{"run_id": "bb" * 16}, {"round": 2}])
def test_same_model_in_another_run_or_round_is_refused(changes: dict[str, object]) -> None:
    made = TwoServers()
    made.helper.answer(claims(made, SET))
    other = replace(made.plan, **changes)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="was answered for another set"):
        made.helper.answer(claims(made, [0, 1, 2], other))


def test_next_round_with_another_model_is_answered() -> None:
    made = TwoServers()
    assert made.run(SET).survivors == (0, 1, 2, 3)
    later = made.plan_of(number=2)
    assert (made.run([1, 2, 3, 4], later).words == made.plain_sum([1, 2, 3, 4])).all()


def test_refused_request_leaves_the_round_open() -> None:
    made = TwoServers()
    with pytest.raises(RefusedByPolicy, match="a set of 3 members is too small"):
        made.helper.answer(claims(made, [0, 1, 2], replace(made.plan, min_cohort=4)))
    assert made.run(SET).survivors == (0, 1, 2, 3)


# --- what is in a set -----------------------------------------------------------------------------


def forged(claim: SealedClaim, made: TwoServers) -> SealedClaim:
    stranger = identities(9)[8]
    return replace(claim, signature=stranger.sign(claim_bytes(made.plan.context, claim)))


FORGERIES: dict[str, Callable[[SealedClaim, TwoServers], SealedClaim]] = {
    "signature": forged,
    "words": lambda claim, made: replace(claim, words_hash=b"w" * 32),
    "sealed seed": lambda claim, made: replace(claim, sealed=made.update(1).sealed),
    "member": lambda claim, made: replace(claim, member=4),
    "stranger": lambda claim, made: replace(claim, member=77),
    "old round": lambda claim, made: made.update(3, made.plan_of(number=7)).claim(),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_claim_that_its_member_did_not_sign_is_refused_and_named(name: str) -> None:
    made = TwoServers()
    request = claims(made, SET)
    changed = FORGERIES[name](request.claims[3], made)
    bad = replace(request, claims=(*request.claims[:3], changed))
    with pytest.raises(ProtocolError, match=rf"member {changed.member} did not sign this claim"):
        made.helper.answer(bad)


def test_sealed_seed_of_another_member_opens_for_nobody_else() -> None:
    """A member that signs a copy of its neighbour's sealed seed: the server's own helper in the cohort."""
    made = TwoServers()
    request = claims(made, SET)
    copied = replace(request.claims[3], sealed=request.claims[1].sealed)
    message = claim_bytes(made.plan.context, copied)
    own = replace(copied, signature=made.people[3].sign(message))
    answer = made.helper.answer(replace(request, claims=(*request.claims[:3], own)))
    assert (answer.survivors, answer.unsealed) == ((0, 1, 2), (3,))


def test_sealed_seed_of_an_old_round_does_not_open_in_a_new_one() -> None:
    """Signed anew by a member that works with the server, so only the HPKE info stops it."""
    made = TwoServers()
    old = made.plan_of(number=7)
    request = claims(made, SET)
    replayed = replace(request.claims[3], sealed=made.update(3, old).sealed)
    message = claim_bytes(made.plan.context, replayed)
    own = replace(replayed, signature=made.people[3].sign(message))
    answer = made.helper.answer(replace(request, claims=(*request.claims[:3], own)))
    assert answer.unsealed == (3,)


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [1, 0, 2, 3]])
def test_each_member_counts_once(order: list[int]) -> None:
    made = TwoServers()
    with pytest.raises(ProtocolError, match="must be sorted and name each member once"):
        made.helper.answer(claims(made, order))


def test_own_floor_holds_whatever_the_plan_says() -> None:
    made = TwoServers(policy=HelperPolicy(floor=3, corrupt=1))
    low = replace(made.plan, min_cohort=2)
    with pytest.raises(RefusedByPolicy, match="takes no fewer than 4"):
        made.helper.answer(claims(made, [0, 1, 2], low))
    assert made.helper.answer(claims(made, SET, low)).survivors == (0, 1, 2, 3)


def test_more_members_than_were_asked_are_refused() -> None:
    made = TwoServers()
    small = replace(made.plan, min_cohort=3, max_drops=1)
    with pytest.raises(ProtocolError, match="a set of 5 members: the plan asked 4"):
        made.helper.answer(claims(made, [0, 1, 2, 3, 4], small))


@pytest.mark.parametrize("changes", [{"config_hash": "00" * 32}, {"roster_hash": "00" * 32}])
def test_plan_of_another_federation_is_refused(changes: dict[str, str]) -> None:
    made = TwoServers()
    other = replace(made.plan, **changes)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="for another federation or roster"):
        made.helper.answer(claims(made, SET, other))


# --- seeds that do not open -----------------------------------------------------------------------


def with_bad(made: TwoServers, members: list[int], bad: dict[int, bytes]) -> MaskSumRequest:
    """A request in which some members sealed something else, and signed it."""
    found = []
    for claim in claims(made, members).claims:
        if claim.member in bad:
            changed = replace(claim, sealed=bad[claim.member])
            signed = made.people[claim.member].sign(claim_bytes(made.plan.context, changed))
            found.append(replace(changed, signature=signed))
        else:
            found.append(claim)
    return MaskSumRequest(made.plan, tuple(found))


@pytest.mark.parametrize("hybrid", [False, True])
def test_bad_seeds_are_left_out_by_name_and_the_set_is_fixed(hybrid: bool) -> None:
    made = TwoServers(hybrid=hybrid)
    short = made.keys.seal_seed(b"s" * 31, made.plan.context, 2)
    request = with_bad(made, [0, 1, 2, 3, 4], {2: short})
    answer = made.helper.answer(request)
    assert (answer.survivors, answer.unsealed) == ((0, 1, 3, 4), (2,))
    with pytest.raises(ProtocolError, match="round 1 was answered for another set"):
        made.helper.answer(claims(made, [0, 1, 3, 4]))
    assert pack(write_mask_sum(made.helper.answer(request))) == pack(write_mask_sum(answer))


def test_below_the_floor_nothing_is_summed_and_the_round_stays_open() -> None:
    made = TwoServers(n=5)
    answer = made.helper.answer(with_bad(made, SET, {1: b"x" * 80, 3: b""}))
    assert (answer.survivors, answer.unsealed, answer.words.size) == ((), (1, 3), 0)
    assert verify(made.keys.identity, answer.signature, mask_sum_bytes(answer))
    assert made.run([0, 1, 2, 4]).survivors == (0, 1, 2, 4)


@settings(max_examples=30)
@given(data=st.binary(max_size=200))
def test_whatever_was_sealed_is_a_bad_seed_and_no_exception(data: bytes) -> None:
    made = TwoServers()
    answer = made.helper.answer(with_bad(made, [0, 1, 2, 3, 4], {0: data}))
    assert answer.unsealed == (0,)


# --- its keys and its memory ----------------------------------------------------------------------


def test_helper_of_other_keys_than_the_pinned_ones_does_not_start() -> None:
    made = TwoServers()
    other = HelperSecrets.make(HashKeys("another helper").secret, hybrid=False)
    with pytest.raises(UsageError, match="pins another helper's keys"):
        Helper(other, made.roster, made.config, policy=made.policy)


def test_helper_of_a_graph_federation_does_not_start() -> None:
    made = TwoServers()
    with pytest.raises(UsageError, match=r"needs secagg\.mode=two_server, not graph"):
        Helper(made.secrets, made.roster, CONFIG, policy=made.policy)


def test_memory_holds_no_key_and_no_seed() -> None:
    made = TwoServers()
    made.helper.answer(claims(made, SET))
    dumped = made.helper.dump()
    seeds = [HashKeys(f"client {m}").secret(seed_purpose(made, m), 32) for m in SET]
    for secret in (made.secrets.seal, made.secrets.identity, *seeds):
        assert secret.hex().encode() not in dumped
        assert secret not in dumped


def seed_purpose(made: TwoServers, member: int) -> str:
    return f"sealed seed {made.plan.context.hex()} {member}"


def test_secrets_are_not_shown() -> None:
    made = TwoServers()
    assert made.secrets.seal.hex() not in repr(made.secrets)
    assert repr(made.secrets) == "HelperSecrets()"


def test_malformed_memory_is_refused() -> None:
    with pytest.raises(DataError, match="stored state is not a _State"):
        TwoServers().helper.restore(b"{}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"floor": 1}, r"helper\.floor"), ({"corrupt": -1}, r"helper\.corrupt")],
)
def test_policy_out_of_range_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HelperPolicy(**changes)


def test_service_stores_the_set_before_it_tells_the_sum() -> None:
    made = TwoServers()
    saved: list[bytes] = []
    HelperService(made.helper, saved.append).ask(claims(made, SET))
    assert saved == [made.helper.dump()]
    assert made.plan.model_hash.encode() in saved[0]


def test_service_remembers_in_a_file_over_restarts(tmp_path: Path) -> None:
    made, path = TwoServers(), tmp_path / "helper.json"
    request = claims(made, SET)
    first = HelperService.stored(made.helper, path).ask(request)
    again = HelperService.stored(made.new_helper(), path)
    assert pack(write_mask_sum(again.ask(request))) == pack(write_mask_sum(first))
    with pytest.raises(ProtocolError, match="round 1 was answered for another set"):
        again.ask(claims(made, [0, 1, 2]))
    path.write_text("{}")
    with pytest.raises(DataError, match="stored state is not"):
        HelperService.stored(made.new_helper(), path)


def test_two_requests_at_once_get_one_answer() -> None:
    made = TwoServers()
    service = HelperService(made.helper, save=lambda dump: None)
    requests = [claims(made, SET), claims(made, [0, 1, 2])]
    answers: list[object] = []

    def ask(request: MaskSumRequest) -> None:
        try:
            answers.append(service.ask(request).survivors)
        except ProtocolError as error:
            answers.append(error)

    threads = [Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(each, tuple) for each in answers) == 1


def test_service_that_cannot_store_tells_nothing() -> None:
    made = TwoServers()

    def full(dump: bytes) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        HelperService(made.helper, full).ask(claims(made, SET))


def test_plan_asks_for_the_floors_of_the_settings() -> None:
    made = TwoServers(settings=ThresholdSettings(floor=3, corrupt=1, max_drop=0.3))
    assert (made.plan.neighbours, made.plan.threshold) == (1, 1)
    assert (made.plan.min_cohort, made.plan.max_drops) == (4, 1)
