"""The client's machine: its table, and the attacks that it closes, each as a script."""

from dataclasses import replace

import pytest

from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.secagg import TRANSITIONS, OsKeySource, Phase, Pins, SecAggClient
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import DataError, ProtocolError, RefusedByPolicy
from fedoppu.common.masking import public_key
from fedoppu.common.rounds import (
    Advert,
    CohortFixed,
    Exchange,
    RoundOpened,
    RoundPlan,
    ShareBundle,
    SharesDelivered,
    SurvivorsProposed,
    UnmaskRequested,
    UpdateReady,
)
from fedoppu.common.signing import Identity, advert_bytes
from tests.integration.secagg_harness import (
    CONFIG_HASH,
    Federation,
    HashKeys,
    event_for,
    identities,
    make_plan,
    roster_of,
)

PHASES = {
    Phase.NEW: Exchange.KEYS,
    Phase.ADVERTISED: Exchange.SHARES,
    Phase.SHARED: Exchange.MASKED,
    Phase.MASKED: Exchange.CONSISTENCY,
    Phase.SIGNED: Exchange.UNMASK,
}


def client_of(n: int = 5, policy: ClientPolicy | None = None, member: int = 0) -> SecAggClient:
    people = identities(n)
    pins = Pins(roster_of(people), CONFIG_HASH)
    policy = policy or ClientPolicy.for_simulation()
    return SecAggClient(people[member], pins, policy=policy, keys=HashKeys("one"))


def at(phase: Phase, *, hybrid: bool = False) -> tuple[Federation, SecAggClient]:
    """A federation of five, and its member 0 in a phase."""
    federation = Federation(5, hybrid=hybrid)
    if phase in PHASES:
        federation.until(PHASES[phase])
    elif phase is Phase.READY:
        outgoing = federation.until(Exchange.MASKED)
        federation.clients[0].receive(event_for(outgoing, 0))
    elif phase is Phase.DONE:
        federation.run()
    else:
        federation.clients[0].erase()
    assert federation.clients[0].phase is phase
    return federation, federation.clients[0]


def samples(federation: Federation) -> dict[type, object]:
    dealers = (0, 1, 2, 3, 4)
    return {
        RoundOpened: RoundOpened(federation.plan),
        CohortFixed: CohortFixed(()),
        SharesDelivered: SharesDelivered(dealers, {}),
        UpdateReady: UpdateReady(federation.words(0)),
        SurvivorsProposed: SurvivorsProposed(dealers, dealers),
        UnmaskRequested: UnmaskRequested({}),
    }


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", list(Phase))
def test_illegal_event_raises_and_nothing_changes(phase: Phase) -> None:
    federation, client = at(phase)
    before = client.dump()
    for kind, event in samples(federation).items():
        if kind not in TRANSITIONS[phase]:
            with pytest.raises(ProtocolError, match=f"does not belong after {phase.value}"):
                client.receive(event)  # type: ignore[arg-type]
    assert client.dump() == before


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("phase", list(Phase))
def test_state_survives_a_dump(phase: Phase, hybrid: bool) -> None:
    federation, client = at(phase, hybrid=hybrid)
    again = federation.reloaded(client)
    assert again.dump() == client.dump()
    assert again.phase is phase


def test_dump_of_something_else_is_refused() -> None:
    client = client_of()
    with pytest.raises(DataError, match="stored state"):
        SecAggClient.load(
            b"{}",
            identities(5)[0],
            Pins(roster_of(identities(5)), CONFIG_HASH),
            policy=ClientPolicy.for_simulation(),
            keys=HashKeys("one"),
        )
    with pytest.raises(ProtocolError, match="no round was opened"):
        _ = client.plan


def test_memory_of_a_round_says_whether_it_was_answered() -> None:
    federation = Federation(4)
    assert federation.clients[0].last_round is None
    federation.until(Exchange.UNMASK)
    last = federation.clients[0].last_round
    assert last is not None
    assert (last.round, last.attempt, last.answered) == (1, 0, False)
    federation = Federation(4)
    federation.run()
    last = federation.clients[0].last_round
    assert last is not None
    assert last.answered


def test_answered_round_stays_answered_when_its_secrets_are_erased() -> None:
    federation = Federation(4)
    federation.run()
    client = federation.clients[0]
    before = client.last_round
    client.erase()
    assert client.last_round == before
    assert client.phase is Phase.DONE


def test_keys_of_the_operating_system_differ_each_time() -> None:
    source = OsKeySource()
    assert len({source.secret("mask", 32) for _ in range(5)}) == 5


# --- the plan ------------------------------------------------------------------------------------


def test_identity_that_the_roster_does_not_hold_is_refused() -> None:
    pins = Pins(roster_of(identities(5)), CONFIG_HASH)
    stranger = Identity(0, b"\x09" * 32)
    policy = ClientPolicy.for_simulation()
    with pytest.raises(ProtocolError, match="does not hold the identity key of member 0"):
        SecAggClient(stranger, pins, policy=policy, keys=HashKeys("one"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"config_hash": "ee" * 32}, "federation config eeee"),
        ({"roster_hash": "ee" * 32}, "roster eeee"),
    ],
)
def test_plan_of_another_federation_or_roster_is_refused(
    changes: dict[str, str], match: str
) -> None:
    client = client_of()
    plan = replace(make_plan(5, roster_of(identities(5))), **changes)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=match):
        client.receive(RoundOpened(plan))
    assert client.phase is Phase.NEW


def test_replayed_round_is_refused() -> None:
    people = identities(5)
    plan = make_plan(5, roster_of(people))
    pins = Pins(roster_of(people), CONFIG_HASH, LastRound.of(plan, answered=False))
    policy = ClientPolicy.for_simulation()
    client = SecAggClient(people[0], pins, policy=policy, keys=HashKeys("one"))
    with pytest.raises(RefusedByPolicy, match="round 1 attempt 0 is not after"):
        client.receive(RoundOpened(plan))
    assert client.last_round == pins.last


def test_no_two_attempts_share_a_key_even_from_one_seed() -> None:
    plan = make_plan(5, roster_of(identities(5)))
    keys: set[bytes] = set()
    for attempt in range(3):
        (advert,) = client_of().receive(RoundOpened(replace(plan, attempt=attempt)))
        assert isinstance(advert, Advert)
        keys |= {advert.channel_key, advert.mask_key, advert.seed_commitment}
    assert len(keys) == 9


# --- the cohort ----------------------------------------------------------------------------------


def cohort(federation: Federation) -> tuple[Advert, ...]:
    event = event_for(federation.until(Exchange.SHARES), 0)
    assert isinstance(event, CohortFixed)
    return event.adverts


def dealt_to(client: SecAggClient, adverts: tuple[Advert, ...]) -> set[int]:
    (bundle,) = client.receive(CohortFixed(adverts))
    assert isinstance(bundle, ShareBundle)
    return set(bundle.packages)


@pytest.mark.parametrize("name", ["channel_key", "mask_key", "seed_commitment"])
def test_substituted_key_of_a_peer_is_that_peers_drop(name: str) -> None:
    federation = Federation(5)
    adverts = cohort(federation)
    swapped = replace(adverts[3], **{name: public_key(b"\x01" * 32)})  # type: ignore[arg-type]
    client = federation.clients[0]
    with pytest.raises(RefusedByPolicy, match="cohort has 3 members, the plan's min_cohort is 4"):
        client.receive(CohortFixed((*adverts[:3], swapped)))
    assert dealt_to(client, (*adverts[:3], swapped, adverts[4])) == {1, 2, 4}


def test_own_substituted_or_missing_advert_is_refused() -> None:
    federation = Federation(5)
    adverts = cohort(federation)
    swapped = replace(adverts[0], mask_key=public_key(b"\x01" * 32))
    for cohort_ in ((swapped, *adverts[1:]), adverts[1:]):
        with pytest.raises(ProtocolError, match="does not hold the advert that member 0 sent"):
            federation.clients[0].receive(CohortFixed(cohort_))


def resigned(federation: Federation, advert: Advert, plan: RoundPlan) -> Advert:
    """The member itself (corrupt) signs its changed advert."""
    message = advert_bytes(plan.context, advert)
    return replace(advert, signature=federation.people[advert.member].sign(message))


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 1}, {"model_hash": "ee" * 32}])
def test_advert_for_another_round_or_model_is_that_peers_drop(change: dict[str, object]) -> None:
    federation = Federation(5)
    adverts = cohort(federation)
    other = replace(federation.plan, **change)  # type: ignore[arg-type]
    replayed = resigned(federation, adverts[3], other)
    changed = (*adverts[:3], replayed, adverts[4])
    assert dealt_to(federation.clients[0], changed) == {1, 2, 4}


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_low_order_or_short_key_is_that_peers_drop(key: bytes) -> None:
    federation = Federation(5)
    adverts = cohort(federation)
    weak = resigned(federation, replace(adverts[3], mask_key=key), federation.plan)
    assert dealt_to(federation.clients[0], (*adverts[:3], weak, adverts[4])) == {1, 2, 4}


def test_key_of_another_member_or_one_key_twice_is_that_peers_drop() -> None:
    federation = Federation(5)
    adverts = cohort(federation)
    for key in (adverts[1].mask_key, adverts[3].channel_key):
        federation = Federation(5)
        adverts = cohort(federation)
        copied = resigned(federation, replace(adverts[3], mask_key=key), federation.plan)
        assert dealt_to(federation.clients[0], (*adverts[:3], copied, adverts[4])) == {1, 2, 4}


def test_member_named_twice_is_refused() -> None:
    federation = Federation(5)
    adverts = cohort(federation)
    with pytest.raises(ProtocolError, match="adverts must be sorted and name each member once"):
        federation.clients[0].receive(CohortFixed((*adverts, adverts[4])))


def test_cohort_below_the_floor_is_refused() -> None:
    policy = ClientPolicy(floor=5, corrupt=1)
    federation = Federation(5, policy=policy)
    with pytest.raises(RefusedByPolicy, match="cohort of 5 has 4 honest members"):
        federation.run()


def test_threshold_that_the_server_set_too_low_is_refused() -> None:
    federation = Federation(5, policy=ClientPolicy(floor=2, corrupt=2))  # the server assumes none
    with pytest.raises(RefusedByPolicy, match=r"threshold is 3; with 5 holders .* between 4 and 5"):
        federation.run()


def test_too_few_neighbours_are_refused() -> None:
    settings_ = ThresholdSettings(floor=2, corrupt=6, max_drop=0.1)
    federation = Federation(66, settings=settings_)
    plan = replace(federation.plan, neighbours=8, threshold=8)
    people, roster = federation.people, federation.roster
    clients = [
        SecAggClient(
            person,
            Pins(roster, CONFIG_HASH),
            policy=ClientPolicy(floor=2, corrupt=6),
            keys=HashKeys(str(person.member)),
        )
        for person in people
    ]
    adverts = [client.receive(RoundOpened(plan))[0] for client in clients]
    with pytest.raises(RefusedByPolicy, match="with 8 holders and 6 corrupt members"):
        clients[0].receive(CohortFixed(tuple(adverts)))  # type: ignore[arg-type]


def test_words_that_the_cohort_would_overflow_are_refused() -> None:
    federation = Federation(5)
    plan = replace(federation.plan, word_bits=16, level_bits=14)
    clients = [client_of(member=member) for member in range(5)]
    adverts = [client.receive(RoundOpened(plan))[0] for client in clients]
    with pytest.raises(RefusedByPolicy, match="5 members with 14-bit levels overflow"):
        clients[0].receive(CohortFixed(tuple(adverts)))  # type: ignore[arg-type]
