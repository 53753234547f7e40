"""A server that follows no rule, over real clients, and what it can compute from what it heard.

An attack is a function that scripts `Rogue` and returns what the attacker learned: the victim's
words, or a sum. "It succeeds" is therefore measured: `secret_of` says what the victim's true words
are, and no other code of a test knows them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.secagg import InputEvent, KeySource, Pins, SecAggClient
from fedoppu.common.cohort import Cohort
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.masking import Mask, add_masks, public_key, self_mask
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
    MaskedUpdate,
    RoundOpened,
    RoundPlan,
    ShareBundle,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
    UpdateReady,
    Words,
)
from fedoppu.common.secret_sharing import Share, restore
from fedoppu.common.signing import Identity, advert_bytes
from fedoppu.server.answers import cut_down, proofs_of
from tests.integration.secagg_harness import CONFIG_HASH, HashKeys, identities, make_plan, roster_of

SIMULATION = ClientPolicy.for_simulation()


def secret_of(member: int, plan: RoundPlan, *, update: int = 0) -> Words:
    """The integers that a member would never show; another `update` is of another training."""
    layout = VectorLayout.of(plan)
    stream = np.random.default_rng([member, update, 7])
    most = min(2 * layout.middle, 255)
    return stream.integers(0, most + 1, layout.length).astype(layout.dtype)


def total(members: Iterable[int], plan: RoundPlan) -> Words:
    """The sum of some members' secrets, modulo 2 ** word_bits."""
    layout = VectorLayout.of(plan)
    words = np.zeros(layout.length, layout.dtype)
    for member in members:
        words += secret_of(member, plan)
    return words


@dataclass(frozen=True)
class World:
    """A federation of n members, some of whom may belong to the server.

    Attributes:
        n: Members of the roster, all of them enrolled.
        settings: What the plan's thresholds are made of.
        policy: Of each honest owner.
        num_params: Of the vector.
        enrolled: Their identities, if they are not the usual ones.
    """

    n: int
    settings: ThresholdSettings = field(
        default_factory=lambda: ThresholdSettings(floor=2, corrupt=0, max_drop=0.3)
    )
    policy: ClientPolicy = SIMULATION
    num_params: int = 3
    enrolled: tuple[Identity, ...] = ()

    @property
    def people(self) -> Sequence[Identity]:
        return self.enrolled or identities(self.n)

    @property
    def roster(self) -> Roster:
        return roster_of(self.people)

    def plan(self, asked: int | None = None, **changes: Any) -> RoundPlan:
        """A plan for `asked` members, all of them by default; `changes` are the server's lies."""
        plan = make_plan(
            asked or self.n, self.roster, settings=self.settings, num_params=self.num_params
        )
        return replace(plan, **changes)

    def client(
        self, member: int, last: LastRound | None = None, *, keys: KeySource | None = None
    ) -> SecAggClient:
        """An honest client, or one that starts again with what it remembers."""
        pins = Pins(self.roster, CONFIG_HASH, last)
        source = keys or HashKeys(f"client {member}")
        return SecAggClient(self.people[member], pins, policy=self.policy, keys=source)

    def colluder(self, member: int) -> SecAggClient:
        """A client of the server's own: it signs and takes whatever it is given."""
        pins = Pins(self.roster, CONFIG_HASH)
        lenient = replace(SIMULATION, floor=2, corrupt=0, max_drop=0.5)
        return SecAggClient(
            self.people[member], pins, policy=lenient, keys=HashKeys(f"client {member}")
        )


@dataclass
class Rogue:
    """A server that says to each client what it likes, and forgets nothing.

    Attributes:
        world: Whom it plays with.
        plan: What it opens the attempt with.
        clients: Those it talks to.
    """

    world: World
    plan: RoundPlan
    clients: dict[int, SecAggClient]
    adverts: dict[int, Advert] = field(default_factory=dict)
    bundles: dict[int, ShareBundle] = field(default_factory=dict)
    masked: dict[int, MaskedUpdate] = field(default_factory=dict)
    signatures: dict[int, bytes] = field(default_factory=dict)
    replies: dict[int, UnmaskReply] = field(default_factory=dict)

    @classmethod
    def over(
        cls,
        world: World,
        members: Iterable[int] | None = None,
        *,
        plan: RoundPlan | None = None,
        last: Mapping[int, LastRound | None] | None = None,
    ) -> "Rogue":
        """With fresh clients, which remember `last`."""
        chosen = range(world.n) if members is None else members
        clients = {member: world.client(member, (last or {}).get(member)) for member in chosen}
        return cls(world, plan or world.plan(), clients)

    # --- one step of one client ------------------------------------------------------------------

    def tell(self, member: int, event: InputEvent) -> list[ClientEvent]:
        """Gives one client one event and remembers the answers."""
        answers = self.clients[member].receive(event)
        for answer in answers:
            match answer:
                case Advert():
                    self.adverts[member] = answer
                case ShareBundle():
                    self.bundles[member] = answer
                case MaskedUpdate():
                    self.masked[member] = answer
                case SurvivorSignature():
                    self.signatures[member] = answer.signature
                case UnmaskReply():
                    self.replies[member] = answer
        return answers

    def deliver(self, member: int, dealers: Sequence[int] | None = None) -> None:
        """The share set and the packages that are for this member."""
        chosen = sorted(self.bundles) if dealers is None else list(dealers)
        cut = {
            dealer: self.part(dealer, member)
            for dealer in chosen
            if dealer in self.bundles and member in self.bundles[dealer].packages
        }
        self.tell(member, SharesDelivered(tuple(chosen), cut))

    def part(self, dealer: int, member: int) -> ShareBundle:
        """What a member is given of a dealer's bundle."""
        bundle = self.bundles[dealer]
        path = proofs_of(bundle)[member] if self.plan.hybrid else ()
        return cut_down(bundle, member, path=path)

    def train(self, member: int, words: Words | None = None) -> None:
        """The member's own runtime hands its integers to its machine."""
        own = secret_of(member, self.plan) if words is None else words
        self.tell(member, UpdateReady(own))

    # --- whole stages, as an honest server would -------------------------------------------------

    def open(self) -> None:
        for member in self.clients:
            self.tell(member, RoundOpened(self.plan))

    def share(self, adverts: Sequence[Advert] | None = None) -> None:
        chosen = tuple(self.adverts[m] for m in sorted(self.adverts)) if adverts is None else None
        for member in self.clients:
            self.tell(member, CohortFixed(chosen or tuple(adverts or ())))

    def mask(self, dealers: Sequence[int] | None = None) -> None:
        for member in self.clients:
            self.deliver(member, dealers)
            self.train(member)

    def agree(self, survivors: Sequence[int], members: Iterable[int] | None = None) -> None:
        """Has some members (the survivors by default) sign a survivor set."""
        for member in survivors if members is None else members:
            self.tell(member, self.proposal(member, survivors))

    def proposal(self, member: int, survivors: Sequence[int]) -> SurvivorsProposed:
        return SurvivorsProposed(self.clients[member]._state.dealers, tuple(survivors))

    def unmask(self, members: Iterable[int], signatures: Mapping[int, bytes] | None = None) -> None:
        for member in members:
            self.tell(member, UnmaskRequested(dict(signatures or self.signatures)))

    def until_masked(self) -> "Rogue":
        """Everything is as it should be until the masked vectors are there."""
        self.open()
        self.share()
        self.mask()
        return self

    def finish(self, survivors: Sequence[int]) -> "Rogue":
        """Signs and unmasks one survivor set, as it should be."""
        self.agree(survivors)
        self.unmask(survivors)
        return self

    # --- what the attacker can compute -----------------------------------------------------------

    def view(self, member: int) -> Cohort:
        """The cohort as one client sees it."""
        return self.clients[member]._formed()

    def seed(self, owner: int) -> bytes | None:
        """A self seed that was revealed, by its owner or in enough shares."""
        if owner in self.replies:
            return self.replies[owner].own_seed
        return self._restored({m: r.seed_shares for m, r in self.replies.items()}, owner)

    def mask_key(self, owner: int) -> bytes | None:
        """A mask key that enough revealed shares restore."""
        return self._restored({m: r.key_shares for m, r in self.replies.items()}, owner)

    def _restored(self, shares: Mapping[int, Mapping[int, bytes]], owner: int) -> bytes | None:
        mine = [Share(holder, given[owner]) for holder, given in shares.items() if owner in given]
        if len(mine) < self.plan.threshold:
            return None
        return restore(mine, self.plan.threshold)

    def bare(self, victim: int, *, peer_keys: Mapping[int, bytes] | None = None) -> Words | None:
        """The victim's words, if its self seed and its pairwise masks are known; else None."""
        seed = self.seed(victim)
        if seed is None:
            return None
        return strip(
            self.view(victim),
            self.masked[victim],
            self.clients[victim]._state.dealers,
            seed=seed,
            own_key=self.mask_key(victim),
            peer_keys=peer_keys,
        )

    def sum_over(self, members: Sequence[int]) -> Words | None:
        """The sum of some masked vectors, without the masks that are known to the attacker."""
        words = np.zeros_like(self.masked[members[0]].words)
        masks: list[Mask] = []
        for member in members:
            words += self.masked[member].words
            seed = self.seed(member)
            if seed is None:
                return None
            masks.append(less(self_mask(seed, self.view(member).scope, member)))
            masks += self._toward_the_dropped(member, frozenset(members))
        add_masks(words, masks)
        return words

    def _toward_the_dropped(self, member: int, inside: frozenset[int]) -> list[Mask]:
        """Masks of a member with peers outside the sum whose mask keys were restored."""
        view = self.view(member)
        found = {
            peer: self.mask_key(peer)
            for peer in view.graph.neighbours(member)
            if peer in self.clients[member]._state.dealers and peer not in inside
        }
        return [pairwise(view, key, peer, member) for peer, key in found.items() if key]


def strip(
    view: Cohort,
    masked: MaskedUpdate,
    dealers: Iterable[int],
    *,
    seed: bytes,
    own_key: bytes | None = None,
    peer_keys: Mapping[int, bytes] | None = None,
) -> Words | None:
    """A masked vector without its masks, or None if some pairwise mask is not known."""
    owner, keys = masked.member, peer_keys or {}
    masks = [less(self_mask(seed, view.scope, owner))]
    for peer in frozenset(dealers).intersection(view.graph.neighbours(owner)):
        if own_key is not None:
            masks.append(less(pairwise(view, own_key, owner, peer)))
        elif peer in keys:
            masks.append(pairwise(view, keys[peer], peer, owner))
        else:
            return None
    words = masked.words.copy()
    add_masks(words, masks)
    return words


def pairwise(view: Cohort, key: bytes, own: int, peer: int, offered: bytes = b"") -> Mask:
    """The mask of `own` with a peer, from a mask key of `own`."""
    mask = view.exchange.load(key).mask(view.mask_link(own, peer), offered)
    assert mask is not None
    return mask


def less(mask: Mask) -> Mask:
    """The mask that takes a mask away."""
    return replace(mask, negative=not mask.negative)


def forged_advert(plan: RoundPlan, member: int, *, signer: Identity, **changes: Any) -> Advert:
    """An advert in a member's name whose private keys the attacker holds, signed by `signer`."""
    unsigned = Advert(
        member=member,
        channel_key=public_key(b"channel" + bytes([member]) * 25),
        mask_key=public_key(attackers_key(member)),
        seed_commitment=bytes(32),
        signature=b"",
    )
    unsigned = replace(unsigned, **changes)
    return replace(unsigned, signature=signer.sign(advert_bytes(plan.context, unsigned)))


def attackers_key(member: int) -> bytes:
    """The private mask key of a forged advert."""
    return b"mask" + bytes([member]) * 28


def same(learned: Words | None, true: Words) -> bool:
    """Whether the attacker has exactly these words."""
    return learned is not None and bool(np.array_equal(learned, true))
