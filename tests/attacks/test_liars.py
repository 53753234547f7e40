"""Members that lie: to a server that keeps the rules, about their seed, shares, keys and vectors.

The sum is right and the liar is named, or there is no sum. With a check off, the sum is wrong and
nobody says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoppu.client import secagg
from fedoppu.client.dealing import Secrets, deal
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError, RoundAborted
from fedoppu.common.masking import add_masks, self_mask
from fedoppu.common.quantization import VectorLayout, decode_levels, mean_of_levels
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    Exchange,
    MaskedUpdate,
    ShareBundle,
    SharesDelivered,
    SumReady,
    SurvivorSignature,
    UnmaskReply,
    UpdateReady,
    Words,
)
from fedoppu.common.secret_sharing import SHARE_BYTES, Share, restore, split
from fedoppu.common.signing import (
    Identity,
    advert_bytes,
    masked_bytes,
    reply_bytes,
)
from tests.attacks.attacker import Rogue, World, less, same, secret_of
from tests.attacks.switches import without
from tests.integration.secagg_harness import Federation

LIAR, DROPPED = 3, 4


@dataclass(frozen=True)
class Result:
    """What came of a round with a liar in it."""

    ready: SumReady
    true: Words

    @property
    def right(self) -> bool:
        return same(self.ready.words, self.true)


def play(
    lie: Callable[[Federation, ClientEvent], ClientEvent],
    *,
    n: int = 7,
    drops: dict[Exchange, frozenset[int]] | None = None,
    liar: int = LIAR,
) -> Result:
    """A round in which one member's messages are changed before they are sent."""
    settings = ThresholdSettings(floor=2, corrupt=1, max_drop=0.3)
    made = Federation(n, settings=settings, drops=drops or {})
    made.tamper = {liar: lambda event: lie(made, event)}
    ready = made.run()
    return Result(ready, made.plain_sum(ready.survivors))


def signed(made: Federation, reply: UnmaskReply) -> UnmaskReply:
    """A reply with the liar's own, good signature."""
    scope = made.clients[reply.member]._formed().scope
    message = reply_bytes(scope, made.server.survivors, reply)
    return replace(reply, signature=made.people[reply.member].sign(message))


# --- seeds and shares ----------------------------------------------------------------------------


def lie_about_the_seed(made: Federation, event: ClientEvent) -> ClientEvent:
    if not isinstance(event, UnmaskReply):
        return event
    return signed(made, replace(event, own_seed=b"\x07" * 32))


def test_liar_about_its_seed() -> None:
    result = play(lie_about_the_seed)
    assert result.right
    lie = "revealed a self seed that is not the one it committed to"
    assert result.ready.liars == {LIAR: lie}
    with without("seed commitment"):
        result = play(lie_about_the_seed)
    assert not result.right
    assert result.ready.liars == {}


def lie_about_a_share(made: Federation, event: ClientEvent) -> ClientEvent:
    if not isinstance(event, UnmaskReply):
        return event
    wrong = dict.fromkeys(event.key_shares, b"\x00" + b"\x05" * (SHARE_BYTES - 1))
    return signed(made, replace(event, key_shares=wrong))


def test_liar_about_a_share() -> None:
    drops = {Exchange.MASKED: frozenset({DROPPED})}
    result = play(lie_about_a_share, drops=drops)
    assert result.right
    assert result.ready.liars == {LIAR: f"revealed a wrong share of member {DROPPED}"}
    with without("share hashes"):  # the advert still tells a wrong key, and decoding finds it
        assert play(lie_about_a_share, drops=drops, n=9).right
    with without("share hashes", "checked secrets"):
        result = play(lie_about_a_share, drops=drops)
    assert not result.right
    assert result.ready.liars == {}


def test_dealer_of_wrong_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 4 deals shares of another key than its advert's, and drops."""

    def lying(cohort: object, identity: Identity, secrets: Secrets, *, entropy: object) -> object:
        mask = bytearray(b"\x05" * 32) if identity.member == DROPPED else secrets.mask
        return deal(cohort, identity, replace(secrets, mask=mask), entropy=entropy)  # type: ignore[arg-type]

    monkeypatch.setattr(secagg, "deal", lying)
    drops = {Exchange.MASKED: frozenset({DROPPED})}
    with pytest.raises(RoundAborted, match=r"the secrets of members \[4\] are lost"):
        play(lambda made, event: event, drops=drops)
    with without("checked secrets"):
        result = play(lambda made, event: event, drops=drops)
    assert not result.right


def lie_about_a_secret_share(made: Federation, event: ClientEvent) -> ClientEvent:
    """Shares of one kind for owners of the other: a dropped member's seed."""
    if not isinstance(event, UnmaskReply):
        return event
    return signed(made, replace(event, seed_shares={**event.seed_shares, **event.key_shares}))


def test_share_that_was_not_asked_for_is_not_taken() -> None:
    drops = {Exchange.MASKED: frozenset({DROPPED})}
    result = play(lie_about_a_secret_share, drops=drops)
    assert result.right
    assert result.ready.liars == {LIAR: "revealed shares that were not asked for"}


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ([0, 1], "a secret needs 3 shares, got 2"),
        ([0, 1, 1], "cannot be restored from two shares of one holder"),
        ([0, 1, -1], "is not 33 bytes of a field element"),
    ],
)
def test_reconstruction_from_too_few_or_duplicate_or_malformed_shares(
    shares: list[int], match: str
) -> None:
    """Plain interpolation gives some 32 bytes for any of these: silent garbage."""
    dealt = split(
        b"\x2a" * 32, range(5), threshold=3, entropy=lambda size: bytes(range(1, size)) + b"\x01"
    )
    chosen = [dealt[m] if m >= 0 else Share(2, b"\xff" * 33) for m in shares]
    with pytest.raises(ProtocolError, match=match):
        restore(chosen, 3)
    assert restore([dealt[0], dealt[1], dealt[2]], 3) == b"\x2a" * 32


# --- what a peer or the server breaks on the way to the victim ------------------------------------


def break_all_packages() -> tuple[Words, Words]:
    """No package for the victim opens. If it then masked with nobody, its own seed would do."""
    victim, everyone = 4, range(5)
    rogue = Rogue.over(World(5))
    rogue.open()
    rogue.share()
    for member in range(4):
        rogue.deliver(member)
        rogue.train(member)
    broken = {
        dealer: replace(
            bundle,
            packages={victim: bytes(66)},
            share_hashes={victim: bundle.share_hashes[victim]},
        )
        for dealer, bundle in rogue.bundles.items()
        if dealer != victim
    }
    rogue.tell(victim, SharesDelivered(tuple(everyone), broken))
    rogue.train(victim)
    rogue.finish(everyone)
    words = rogue.masked[victim].words.copy()
    seed = rogue.replies[victim].own_seed
    add_masks(words, [less(self_mask(seed, rogue.view(victim).scope, victim))])
    return words, secret_of(victim, rogue.plan)


def test_masks_follow_the_share_set_whether_or_not_a_package_opened() -> None:
    assert not same(*break_all_packages())
    with without("masks of the share set"):
        assert same(*break_all_packages())


def false_complaint(made: Federation, event: ClientEvent) -> ClientEvent:
    """A member says of everyone that they dealt it nothing."""
    if not isinstance(event, MaskedUpdate):
        return event
    scope, dealers = made.clients[event.member]._formed().scope, sorted(made.server._state.bundles)
    lie = replace(event, complaints=tuple(m for m in dealers if m != event.member))
    message = masked_bytes(scope, dealers, lie)
    return replace(lie, signature=made.people[event.member].sign(message))


def test_liar_that_complains_of_everyone_is_named_and_costs_nothing() -> None:
    result = play(false_complaint)
    assert result.right
    assert result.ready.liars == {LIAR: "complained of 6 dealers, at most 1 can have lied"}
    with without("judged complaints"):
        assert play(false_complaint).ready.liars == {}


# --- keys ----------------------------------------------------------------------------------------


def crafted(made: Federation, event: ClientEvent, **keys: bytes) -> ClientEvent:
    """An advert with other keys, well signed."""
    if not isinstance(event, Advert):
        return event
    changed = replace(event, **keys)  # type: ignore[arg-type]
    message = advert_bytes(made.plan.context, changed)
    changed = replace(changed, signature=made.people[event.member].sign(message))
    liar = made.clients[event.member]
    liar._state = replace(liar._state, own=changed)
    return changed


@pytest.mark.parametrize("name", ["mask_key", "channel_key"])
@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"])
def test_low_order_key(name: str, key: bytes) -> None:
    """With such a key every peer's secret is zero, so that all the world knows the pair's mask."""

    def lie(made: Federation, event: ClientEvent) -> ClientEvent:
        return crafted(made, event, **{name: key})

    result = play(lie)
    assert result.right
    assert result.ready.liars == {LIAR: "sent a key of low order or wrong length"}
    assert LIAR not in result.ready.survivors
    with without("low order"), pytest.raises(ValueError, match="Error computing shared key"):
        play(lie)  # the library refuses too, in every honest client: one liar ends every round


def test_key_of_a_wrong_length_and_one_key_for_both_uses() -> None:
    result = play(lambda made, event: crafted(made, event, mask_key=b"\x09" * 31))
    assert result.right
    assert result.ready.liars == {LIAR: "sent a key of low order or wrong length"}
    twice = b"\x09" * 32
    result = play(lambda made, event: crafted(made, event, mask_key=twice, channel_key=twice))
    assert result.right
    assert result.ready.liars == {LIAR: "sent one key twice"}


def test_key_that_was_copied_from_another_member() -> None:
    def lie(made: Federation, event: ClientEvent) -> ClientEvent:
        first = made.server._state.adverts.get(0)
        return crafted(made, event, mask_key=first.mask_key if first else b"")

    result = play(lie)
    assert result.right
    assert result.ready.liars == {LIAR: "sent a key of another member"}


# --- in transit ----------------------------------------------------------------------------------


def changed_on_the_way(event: ClientEvent) -> ClientEvent:
    """What somebody between client and server does to each kind of message."""
    match event:
        case Advert():
            return replace(event, mask_key=b"\x11" * 32)
        case ShareBundle():
            swapped = dict(zip(event.packages, list(event.packages.values())[::-1], strict=True))
            return replace(event, packages=swapped)
        case MaskedUpdate():
            return replace(event, words=event.words + np.uint32(1))
        case SurvivorSignature():
            return replace(event, signature=bytes(64))
        case _:
            return replace(event, own_seed=bytes(32))


@pytest.mark.parametrize(
    "kind", [Advert, ShareBundle, MaskedUpdate, SurvivorSignature, UnmaskReply]
)
def test_every_message_is_signed(kind: type[ClientEvent]) -> None:
    def change(made: Federation, event: ClientEvent) -> ClientEvent:
        return changed_on_the_way(event) if isinstance(event, kind) else event

    result = play(change)
    assert result.right
    (fault,) = result.ready.liars.values()
    assert "signature is not its own for this" in fault


def test_masked_vector_that_was_changed_on_the_way() -> None:
    def change(made: Federation, event: ClientEvent) -> ClientEvent:
        return changed_on_the_way(event) if isinstance(event, MaskedUpdate) else event

    assert play(change).right
    with without("signed answers"):
        result = play(change)
    assert not result.right
    assert result.ready.liars == {}


# --- vectors -------------------------------------------------------------------------------------


def poisoned(value: int) -> NDArray[np.float32]:
    """The mean of a round in which one member sends words that no update has."""
    made = Federation(5)
    words = made.words

    def lying(member: int) -> Words:
        own = words(member)
        layout = VectorLayout.of(made.plan)
        own[: layout.num_params] = layout.middle
        own[layout.num_params :] = 0
        if member == LIAR:
            own[0] = value
        return own

    made.words = lying  # type: ignore[method-assign]
    ready = made.run()
    centred = decode_levels(ready.words, made.plan, ready.survivors)
    return mean_of_levels(centred, made.plan, divisor=5)


def test_totals_that_no_clients_can_reach_refuse_the_round() -> None:
    with pytest.raises(RoundAborted, match=r"above the \d+ that the survivors can reach"):
        poisoned(2**31)
    assert np.abs(poisoned(0)).max() <= 0.5  # in reach: no protocol can tell
    with without("reachable totals"):
        assert np.abs(poisoned(2**31)).max() > 1000 * 0.5


def test_update_ready_is_the_runtimes_own_and_never_a_message() -> None:
    made = Federation(5)
    made.until(Exchange.MASKED)
    with pytest.raises(ProtocolError, match="UpdateReady does not belong after shared"):
        made.clients[0].receive(UpdateReady(made.words(0)))
