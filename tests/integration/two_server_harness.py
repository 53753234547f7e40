"""n members, a server and a helper of the two-server mode in memory: what its tests drive."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedoppu.client.two_server import seal_update
from fedoppu.common.config import FederationConfig, SecAggSettings, ThresholdSettings
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.rounds import RoundPlan, SumReady, Words
from fedoppu.common.signing import Identity
from fedoppu.common.thresholds import plan_thresholds
from fedoppu.common.two_server import (
    HelperKeys,
    MaskSum,
    SealedUpdate,
    claim_bytes,
    mask_sum_bytes,
)
from fedoppu.server.helper import Helper, HelperPolicy, HelperSecrets
from fedoppu.server.two_server import SealedServer
from tests.fake_federation import CONFIG
from tests.integration.secagg_harness import HashKeys, identities, make_plan, roster_of


@dataclass
class TwoServers:
    """One federation: members, a helper, and the plans of its rounds."""

    n: int = 5
    hybrid: bool = False
    narrow: bool = False
    num_params: int = 3
    settings: ThresholdSettings = field(default_factory=lambda: ThresholdSettings(max_drop=0.5))
    policy: HelperPolicy = field(default_factory=lambda: HelperPolicy(floor=2, corrupt=0))

    def __post_init__(self) -> None:
        self.people = identities(self.n)
        self.roster = roster_of(self.people)
        self.secrets = HelperSecrets.make(HashKeys("helper").secret, hybrid=self.hybrid)
        self.keys = self.secrets.public()
        self.config = config_with(self.keys)
        self.helper = self.new_helper()
        self.plan = self.plan_of()

    def new_helper(self) -> Helper:
        """A helper that has answered nothing."""
        return Helper(self.secrets, self.roster, self.config, policy=self.policy)

    def plan_of(self, number: int = 1, attempt: int = 0, run_id: str = "aa" * 16) -> RoundPlan:
        """The plan of an attempt; each round has a model of its own."""
        limits = plan_thresholds(self.n, self.settings, graph=False)
        plan = make_plan(self.n, self.roster, settings=self.settings, num_params=self.num_params)
        word_bits, level_bits = (16, 8) if self.narrow else (32, 16)
        return replace(
            plan,
            threshold=limits.threshold,
            neighbours=limits.neighbours,
            min_cohort=limits.min_cohort,
            max_drops=limits.max_drops,
            word_bits=word_bits,
            level_bits=level_bits,
            config_hash=self.config.hash().hex(),
            hybrid=self.hybrid,
            run_id=run_id,
            round=number,
            attempt=attempt,
            model_hash=f"{number:064x}",
        )

    def server(self, plan: RoundPlan | None = None) -> SealedServer:
        """A server at the start of an attempt."""
        chosen = plan or self.plan
        return SealedServer(chosen, self.roster, invited=range(self.n), helper=self.keys)

    def words(self, member: int) -> Words:
        """The released integers of a member: any levels at all."""
        layout = VectorLayout.of(self.plan)
        most = min(2 * layout.middle, 255)
        stream = np.random.default_rng([member, self.n])
        return stream.integers(0, most + 1, layout.length).astype(layout.dtype)

    def plain_sum(self, members: Iterable[int]) -> Words:
        """The control: the integer sum that the server must arrive at."""
        total = sum((self.words(m).astype(np.uint64) for m in members), np.zeros((), np.uint64))
        layout = VectorLayout.of(self.plan)
        return np.asarray(total % (1 << layout.word_bits)).astype(layout.dtype)

    def update(
        self, member: int, plan: RoundPlan | None = None, *, keys: HelperKeys | None = None
    ) -> SealedUpdate:
        """What an honest member sends."""
        return seal_update(
            self.words(member),
            plan or self.plan,
            self.people[member],
            helper=keys or self.keys,
            keys=HashKeys(f"client {member}"),
        )

    def asking(self, members: Sequence[int], plan: RoundPlan | None = None) -> SealedServer:
        """A server whose set is fixed: the updates of these members."""
        server = self.server(plan)
        for member in members:
            server.receive(self.update(member, plan))
        server.close()
        return server

    def run(self, members: Sequence[int], plan: RoundPlan | None = None) -> SumReady:
        """A whole round."""
        server = self.asking(members, plan)
        return server.unmask(self.helper.answer(server.request()))

    def resigned(self, answer: MaskSum) -> MaskSum:
        """A changed answer with the helper's own signature: a helper that lies."""
        signer = Identity(0, self.secrets.identity)
        return replace(answer, signature=signer.sign(mask_sum_bytes(answer)))


def config_with(keys: HelperKeys) -> FederationConfig:
    """The fake federation's config, with a pinned helper."""
    exchange = "hybrid" if keys.hybrid else "x25519"
    settings = SecAggSettings("two_server", exchange, keys.text())  # type: ignore[arg-type]
    return replace(CONFIG, secagg=settings)


def resign(update: SealedUpdate, person: Identity, plan: RoundPlan) -> SealedUpdate:
    """A changed update with its sender's own signature: a member that lies."""
    return replace(update, signature=person.sign(claim_bytes(plan.context, update.claim())))
