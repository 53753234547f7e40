"""Where keys come from, what they are bound to, and whose shares are whose."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedoppu.client.dealing import hash_package
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import KeySource, OsKeySource
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError, UsageError
from fedoppu.common.pairwise import key_exchange
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import SharesDelivered, Words
from fedoppu.simulations.capture import CaptureGrid
from fedoppu.simulations.key_source import GridMarker, SeededKeySource, simulation_grid
from tests.attacks.attacker import Rogue, World, forged_advert, same, secret_of, strip
from tests.attacks.switches import without
from tests.fake_federation import federation, files

# --- whose share it is ---------------------------------------------------------------------------


def relabel_packages() -> tuple[Words | None, Words]:
    """The victim's packages are delivered as those of the server's member, which then "drops".

    So holders reveal "the key share of the dropped one", which is the victim's, while the victim
    itself survives and reveals its seed. The server's member has copied the victim's channel key,
    so that the packages can be opened as its own.
    """
    policy = ClientPolicy(floor=3, corrupt=1)
    settings = ThresholdSettings(floor=3, corrupt=1, max_drop=0.3)
    world, victim, spy = World(7, settings=settings, policy=policy), 0, 1
    rogue = Rogue.over(world, [0, 2, 3, 4, 5, 6])
    rogue.open()
    key = rogue.adverts[victim].channel_key
    rogue.adverts[spy] = forged_advert(rogue.plan, spy, signer=world.people[spy], channel_key=key)
    rogue.share()
    rogue.bundles[spy] = replace(rogue.bundles[victim], member=spy)
    for member in rogue.clients:
        _deliver_relabelled(rogue, member, spy)
        rogue.train(member)
    survivors = [0, 2, 3, 4, 5, 6]
    rogue.finish(survivors)
    stolen = rogue.mask_key(spy)  # restored of what holders think are the spy's shares
    if stolen is None:
        return None, secret_of(victim, rogue.plan)
    seed = rogue.replies[victim].own_seed
    view = rogue.view(victim)
    found = strip(view, rogue.masked[victim], range(7), seed=seed, own_key=stolen)
    return found, secret_of(victim, rogue.plan)


def _deliver_relabelled(rogue: Rogue, member: int, spy: int) -> None:
    """A member's packages; the spy's has the victim's content, if there is one for this member."""
    dealers = tuple(sorted(rogue.bundles))
    cut = {
        dealer: rogue.part(dealer, member)
        for dealer in dealers
        if member in rogue.bundles[dealer].packages
    }
    rogue.tell(member, SharesDelivered(dealers, cut))


def test_share_swap() -> None:
    with pytest.raises(ProtocolError, match="members of the cohort alone"):
        relabel_packages()  # a member with a copied key is in no cohort
    with without("unique keys"):
        assert relabel_packages()[0] is None  # and the package says whose and for whom it is
    with without("unique keys", "who a package is for"):
        assert same(*relabel_packages())


# --- the hybrid exchange -------------------------------------------------------------------------


def plant_pair_secrets() -> tuple[Words | None, Words]:
    """The server seals pair secrets of its own to the victim, in the names of those below it.

    Anyone can seal to a public key; the victim is the highest member, so it opens all its secrets.
    """
    world, victim, planted = World(4), 3, {}
    rogue = Rogue.over(world, plan=world.plan(hybrid=True))
    rogue.open()
    rogue.share()
    view = rogue.view(victim)
    exchange = key_exchange(rogue.plan)
    delivered = {}
    for dealer in range(3):
        key = hashlib.sha256(b"planted %d" % dealer).digest()
        offer = exchange.load(key).offer(view.mask_link(dealer, victim))
        planted[dealer] = key
        cut = rogue.part(dealer, victim)
        delivered[dealer] = replace(cut, offers={victim: offer})
    for member in range(3):
        rogue.deliver(member)
        rogue.train(member)
    rogue.tell(victim, SharesDelivered((0, 1, 2, 3), delivered))
    rogue.train(victim)
    rogue.finish(range(4))
    return rogue.bare(victim, peer_keys=planted), secret_of(victim, rogue.plan)


def test_planted_pair_secret() -> None:
    with pytest.raises(ProtocolError, match="offered member 3 no pair secret that is signed by it"):
        plant_pair_secrets()
    with without("signed offers"):
        assert same(*plant_pair_secrets())


def sealed_by_a_stranger() -> bytes:
    """A share of the server's making, sealed to the victim in another member's name."""
    world, victim, dealer = World(4), 3, 1
    rogue = Rogue.over(world, plan=world.plan(hybrid=True))
    rogue.open()
    rogue.share()
    view = rogue.view(victim)
    content = bytes(33) + b"\x00" + b"\x07" * 32
    mine = key_exchange(rogue.plan).load(b"\x01" * 32)
    sealed = mine.seal(content, view.channel_link(dealer, victim))
    cuts = {d: rogue.part(d, victim) for d in range(3)}
    cuts[dealer] = replace(
        cuts[dealer],
        packages={victim: sealed},
        share_hashes={victim: hash_package(view, dealer, victim, content)},
    )
    rogue.tell(victim, SharesDelivered((0, 1, 2, 3), cuts))
    return bytes(rogue.clients[victim]._state.held[dealer])


def test_package_that_another_sealed() -> None:
    with pytest.raises(ProtocolError, match="offered member 3 no pair secret that is signed by it"):
        sealed_by_a_stranger()
    with without("signed offers"):
        assert sealed_by_a_stranger().endswith(b"\x07" * 32)


# --- where keys come from ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Who has read the seed of a run in its report, and all that was sent."""

    seed: int

    def vector(self, rogue: Rogue, victim: int) -> Words | None:
        """The victim's words, if its keys were drawn from the seed."""
        plan, keys = rogue.plan, self.keys(victim)
        context = plan.context.hex()
        seed = keys.secret(f"seed {context} {victim}", 32)
        mask = keys.secret(f"mask {context} {victim}", 32)
        dealers = rogue.clients[victim]._state.dealers
        return strip(rogue.view(victim), rogue.masked[victim], dealers, seed=seed, own_key=mask)

    def keys(self, member: int) -> SeededKeySource:
        return SeededKeySource(Randomness.from_seed(self.seed), member, GridMarker())


def keys_from(source: Callable[[int], KeySource]) -> tuple[Words | None, Words]:
    """A round whose clients take their keys from a source, as a reader of the report sees it."""
    world = World(5)
    rogue = Rogue.over(world)
    rogue.clients = {member: world.client(member, keys=source(member)) for member in range(5)}
    rogue.until_masked().finish(range(5))
    return Reader(seed=7).vector(rogue, 0), secret_of(0, rogue.plan)


def test_keys_from_a_seed_are_no_keys_and_refuse_to_work_outside_a_grid() -> None:
    """The seed of a simulation is in its report: a key that is drawn from it hides nothing."""
    root = Randomness.from_seed(7)
    with simulation_grid() as marker:
        inside = marker
        assert same(*keys_from(lambda member: SeededKeySource(root, member, inside)))
    with pytest.raises(UsageError, match="seeded keys work only inside a simulation's Grid"):
        keys_from(lambda member: SeededKeySource(root, member, inside))
    assert not same(*keys_from(lambda member: OsKeySource()))
    with without("keys need a grid"):
        assert same(*keys_from(lambda member: SeededKeySource(root, member, inside)))


def dropped_keys_of(rounds: int, keys: Callable[[int], KeySource]) -> tuple[Words | None, Words]:
    """A mask key is restored in a round that its owner dropped out of, and tried in the next."""
    world, victim = World(5), 4
    plans = [world.plan(round=number) for number in range(1, rounds + 1)]
    rogue = Rogue.over(world, plan=plans[0])
    rogue.clients[victim] = world.client(victim, keys=keys(victim))
    rogue.until_masked().finish((0, 1, 2, 3))
    stolen = rogue.mask_key(victim)
    last = {member: client.last_round for member, client in rogue.clients.items()}
    later = Rogue.over(world, plan=plans[-1], last=last)
    later.clients[victim] = world.client(victim, last[victim], keys=keys(victim))
    later.until_masked().finish(range(5))
    seed = later.replies[victim].own_seed
    view, dealers = later.view(victim), range(5)
    found = strip(view, later.masked[victim], dealers, seed=seed, own_key=stolen)
    return found, secret_of(victim, later.plan)


class OneKeyForEver:
    """A source that does not look at the purpose: what a client with long-lived keys would be."""

    def secret(self, purpose: str, length: int) -> bytes:
        use = purpose.split()[0]
        return hashlib.shake_256(use.encode()).digest(length)


def test_key_of_one_round_opens_no_other() -> None:
    assert not same(*dropped_keys_of(2, lambda member: OsKeySource()))
    assert same(*dropped_keys_of(2, lambda member: OneKeyForEver()))


# --- the server's own root -----------------------------------------------------------------------


def forms(secret: bytes) -> list[bytes]:
    """How a secret may be written down."""
    return [secret, secret.hex().encode(), base64.b64encode(secret)]


def test_root_of_the_server_is_in_no_file_and_no_message(tmp_path: Path) -> None:
    """Cohorts and noise follow from it. The search would find it: the run's id is found."""
    made = federation(tmp_path, wrap_grid=CaptureGrid)
    made.run()
    captured = made.grid.messages  # type: ignore[attr-defined]
    written = [*files(tmp_path).values(), *(message.data() for message in captured)]
    everything = b"\n".join(written)
    assert not any(form in everything for form in forms(made.runtime.randomness.root))
    assert made.runtime.run_id.encode() in everything
    assert repr(made.runtime.randomness) == "Randomness()"
