"""Both state machines under any schedule: orders, drops, repeats, replays, corruption, restarts.

Clients and server of one round; whatever is on the way may be lost, come twice, late, changed, at
the wrong member, or from the round before, and everyone may be restarted between any two messages.
The network is the adversary; the server's machine is honest, so that there is a sum to check.

After every step: a sum is the plain sum over its survivors; no owner's self seed and mask key were
both revealed; a client has unmasked at most once; and whatever was refused is a named error.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fedoppu.client.secagg import Phase, Pins, SecAggClient
from fedoppu.common.errors import FedoppuError, ProtocolError, RefusedByPolicy, RoundAborted
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
    Exchange,
    MaskedUpdate,
    Outgoing,
    ServerEvent,
    ShareBundle,
    SharesDelivered,
    StageEnded,
    SumReady,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
    UpdateReady,
)
from fedoppu.server.secagg import End, SecAggServer
from tests.attacks.switches import without
from tests.integration.secagg_harness import CONFIG_HASH, Federation, HashKeys

T = TypeVar("T")
Order = Callable[[list[Any]], None]
PICK = st.integers(0, 10_000)  # of whatever there is to pick from


def corrupted(event: ClientEvent, salt: int) -> ClientEvent:
    """A message with one field changed, its signature as it was; or with the signature changed."""
    if salt % 3 == 0:
        return replace(event, signature=_flip(event.signature, salt))
    match event:
        case Advert():
            if salt % 2:
                return replace(event, mask_key=_flip(event.mask_key, salt))
            return replace(event, seed_commitment=_flip(event.seed_commitment, salt))
        case ShareBundle():
            parts = event.packages if salt % 2 else event.share_hashes
            holder = sorted(parts)[salt % len(parts)]
            changed = {**parts, holder: _flip(parts[holder], salt)}
            if salt % 2:
                return replace(event, packages=changed)
            return replace(event, share_hashes=changed)
        case MaskedUpdate():
            words = event.words.copy()
            words[salt % words.size] += 1
            return replace(event, words=words)
        case SurvivorSignature():
            return replace(event, signature=_flip(event.signature, salt))
        case UnmaskReply():
            return replace(event, own_seed=_flip(event.own_seed, salt))


def _flip(data: bytes, salt: int) -> bytes:
    place = salt % len(data)
    return data[:place] + bytes([data[place] ^ 1 << salt % 8]) + data[place + 1 :]


def lied(event: ServerEvent, salt: int) -> ServerEvent:
    """What a server could send in place of an event: lists without a member, fewer signatures."""
    match event:
        case CohortFixed(adverts):
            return CohortFixed(_without(adverts, salt))
        case SharesDelivered(dealers, bundles):
            if salt % 2:
                return SharesDelivered(_without(dealers, salt), bundles)
            return SharesDelivered(dealers, dict(list(bundles.items())[1:]))
        case SurvivorsProposed(dealers, survivors):
            return SurvivorsProposed(dealers, _without(survivors, salt))
        case UnmaskRequested(signatures):
            return UnmaskRequested(dict(list(signatures.items())[salt % 3 :]))
        case _:
            return event


def _without(items: tuple[T, ...], salt: int) -> tuple[T, ...]:
    place = salt % len(items)
    return items[:place] + items[place + 1 :]


class Round(RuleBasedStateMachine):
    """A round after one that was played as it should be, and whose messages are still around.

    Attributes:
        down: On the way to members.
        up: On the way to the server.
        disturbed: Whether anything was done that an honest round does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begun = False
        self.disturbed = False
        self.down: list[Outgoing] = []
        self.up: list[ClientEvent] = []
        self.replies: list[UnmaskReply] = []
        self.signatures: dict[int, bytes] = {}
        self.ready: SumReady | None = None

    @initialize(
        n=st.integers(4, 7),
        kind=st.sampled_from(("wide", "wide", "narrow", "hybrid")),
        wild=st.sampled_from((False, False, False, True)),
        first=PICK,
    )
    def begin(self, n: int, kind: str, wild: bool, first: int) -> None:
        before, self.made = (
            Federation(n, narrow=kind == "narrow", hybrid=kind == "hybrid") for _ in range(2)
        )
        before.run()
        self.old_down, self.old_up = list(before.delivered), list(before.sent)
        self.made.plan = replace(before.plan, round=2)
        self.lasts = {member: client.last_round for member, client in before.clients.items()}
        self.clients = {member: self.client(member) for member in range(n)}
        self.server = SecAggServer(self.made.plan, self.made.roster, invited=range(n))
        # what is bad happens to as many as the plan can lose, or to anyone
        many = n if wild else self.made.plan.max_drops
        self.unlucky = {(first + i) % n for i in range(many)}
        self.down = self.server.pending()
        self.begun = True

    # --- what an honest network does -------------------------------------------------------------

    @rule(place=PICK, up=st.booleans())
    def deliver(self, place: int, up: bool) -> None:
        """One message arrives: at its member, which answers, or at the server."""
        if up and self.up:
            self.take(self.up.pop(place % len(self.up)))
        elif self.down and not up:
            self.give(self.down.pop(place % len(self.down)))

    @rule(order=st.randoms(use_true_random=False))
    def stage(self, order: Random) -> None:
        """All that is on the way arrives, in any order; who has not answered is asked again; the end."""
        self.play(order.shuffle)

    @rule(member=PICK, server=st.booleans())
    def restart(self, member: int, server: bool) -> None:
        """A process ends, and goes on from what it stored."""
        if server:
            self.server = SecAggServer.load(self.server.dump(), self.made.roster)
        chosen = member % self.made.n
        self.clients[chosen] = self.client(chosen, dumped=self.clients[chosen].dump())

    # --- what a bad one does ---------------------------------------------------------------------

    @rule(place=PICK, old=st.booleans())
    def repeat(self, place: int, old: bool) -> None:
        """A message comes once more, of this round or of the one before."""
        both: list[Outgoing | ClientEvent] = [*self.down, *self.up]
        if old:
            both = [m for m in (*self.old_down, *self.old_up) if m.member in self.unlucky]
        if not both:
            return
        message = both[place % len(both)]
        if isinstance(message, Outgoing):
            self.give(message)
        else:
            self.disturbed |= old
            self.take(message)

    @rule(place=PICK, salt=PICK)
    def corrupt(self, place: int, salt: int) -> None:
        """An answer is changed on its way, or lost."""
        mine = [event for event in self.up if event.member in self.unlucky]
        if mine:
            self.disturbed = True
            event = mine[place % len(mine)]
            self.up = [other for other in self.up if other is not event]
            if salt % 4:
                self.take(corrupted(event, salt))

    @rule(place=PICK, salt=PICK)
    def lie(self, place: int, salt: int) -> None:
        """A member is told something else than the others, or what is for another, or nothing."""
        mine = [message for message in self.down if message.member in self.unlucky]
        if mine:
            self.disturbed = True
            message = mine[place % len(mine)]
            self.down = [other for other in self.down if other is not message]
            if salt % 4 == 1:
                self.give(
                    replace(
                        self.down[salt % len(self.down)] if self.down else message,
                        member=message.member,
                    )
                )
            elif salt % 4:
                self.give(replace(message, event=lied(message.event, salt)))

    @rule(place=PICK)
    def ask(self, place: int) -> None:
        """An unlucky member is asked to unmask, with every signature that there is."""
        member = sorted(self.unlucky)[place % len(self.unlucky)]
        if self.signatures:
            self.disturbed = True
            self.give(Outgoing(member, UnmaskRequested(dict(self.signatures))))

    @rule()
    def end_early(self) -> None:
        """The stage's time is up, if few enough are missing."""
        if self.server.waiting_for <= self.unlucky:
            self.disturbed = True
            self.stage_ends()

    # --- what is always so -----------------------------------------------------------------------

    @invariant()
    def the_sum_is_right(self) -> None:
        if self.ready is not None:
            true = self.made.plain_sum(self.ready.survivors)
            assert np.array_equal(self.ready.words, true)

    @invariant()
    def no_owner_has_both_secrets_revealed(self) -> None:
        seeds = {reply.member for reply in self.replies}
        seeds |= {owner for reply in self.replies for owner in reply.seed_shares}
        keys = {owner for reply in self.replies for owner in reply.key_shares}
        assert not seeds & keys

    @invariant()
    def each_member_unmasks_at_most_once(self) -> None:
        members = [reply.member for reply in self.replies]
        assert len(members) == len(set(members))

    def teardown(self) -> None:
        """Plays the rest as it should be: there is a right sum, or the round is given up."""
        if not self.begun:
            return
        while isinstance(self.server.stage, Exchange):
            self.play(as_it_is)
        self.the_sum_is_right()
        self.no_owner_has_both_secrets_revealed()
        self.each_member_unmasks_at_most_once()
        assert (self.ready is None) == (self.server.stage is End.ABORTED)
        if not self.disturbed:
            assert self.ready is not None
            assert self.ready.survivors == tuple(range(self.made.n))
            assert self.ready.liars == {}

    # --- the parts -------------------------------------------------------------------------------

    def client(self, member: int, *, dumped: bytes = b"") -> SecAggClient:
        person = self.made.people[member]
        pins = Pins(self.made.roster, CONFIG_HASH, self.lasts[member])
        policy, keys = self.made.policy, HashKeys(f"client {member}")
        if dumped:
            return SecAggClient.load(dumped, person, pins, policy=policy, keys=keys)
        return SecAggClient(person, pins, policy=policy, keys=keys)

    def give(self, message: Outgoing) -> None:
        """A member's machine takes a message; its answers are on the way."""
        client = self.clients[message.member]
        before = client.dump()
        try:
            answers = client.receive(message.event)
        except FedoppuError as error:
            require_named(error)
            assert client.dump() == before
            return
        if client.phase is Phase.READY:
            answers = client.receive(UpdateReady(self.made.words(message.member)))
        self.replies += [answer for answer in answers if isinstance(answer, UnmaskReply)]
        signed = [answer for answer in answers if isinstance(answer, SurvivorSignature)]
        self.signatures |= {answer.member: answer.signature for answer in signed}
        self.up += answers

    def take(self, event: ClientEvent) -> None:
        try:
            assert self.server.receive(event) == []
        except FedoppuError as error:
            require_named(error)

    def stage_ends(self) -> None:
        """What follows replaces nothing: late messages stay on their way."""
        try:
            following = self.server.receive(StageEnded())
        except FedoppuError as error:
            require_named(error)
            return
        for item in following:
            if isinstance(item, SumReady):
                assert self.ready is None
                self.ready = item
            else:
                self.down.append(item)

    def play(self, order: Order) -> None:
        """One stage."""
        self.exchange(order)
        self.down += self.server.pending()
        self.exchange(order)
        self.stage_ends()

    def exchange(self, order: Order) -> None:
        """Everything arrives."""
        while self.down or self.up:
            down, up = self.down, self.up
            self.down, self.up = [], []
            order(down)
            order(up)
            for message in down:
                self.give(message)
            for event in up:
                self.take(event)


def as_it_is(way: list[Any]) -> None:
    """The order in which messages were sent."""


def require_named(error: FedoppuError) -> None:
    """One of the protocol's errors, that says which member, round or thing it is about."""
    assert isinstance(error, ProtocolError | RefusedByPolicy | RoundAborted)
    things = ("member", "round", "cohort", "survivor set", "share set", "after", "stage")
    assert any(thing in str(error) for thing in things)


QUICK = settings(max_examples=40, stateful_step_count=30)
LONG = settings(max_examples=200, stateful_step_count=40)


def test_any_schedule_ends_in_a_right_sum_or_a_named_error() -> None:
    run_state_machine_as_test(Round, settings=QUICK)


@pytest.mark.slow
def test_any_longer_schedule_does_too() -> None:
    run_state_machine_as_test(Round, settings=LONG)


def at(stage: Exchange) -> Round:
    """A round of five, of whom member 3 is unlucky, played up to a stage."""
    played = Round()
    played.begin(n=5, kind="wide", wild=False, first=3)
    while played.server.stage is not stage:
        played.play(as_it_is)
    return played


def a_vector_is_corrupted() -> None:
    played = at(Exchange.MASKED)
    while played.down:
        played.deliver(0, up=False)
    played.corrupt(0, salt=1)
    played.teardown()


def a_member_is_lied_to() -> None:
    """It hears that member 2 dropped, and is asked to unmask."""
    played = at(Exchange.CONSISTENCY)
    played.lie(0, salt=2)
    played.ask(0)
    played.teardown()


@pytest.mark.parametrize(
    ("rule", "schedule"),
    [("signed answers", a_vector_is_corrupted), ("quorum", a_member_is_lied_to)],
)
def test_schedules_would_show_that_a_rule_is_missing(
    rule: str, schedule: Callable[[], None]
) -> None:
    """The control: without signatures a sum is wrong, without a quorum both secrets come out."""
    schedule()
    with without(rule), pytest.raises(AssertionError):
        schedule()
