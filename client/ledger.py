"""What a vault has spent of its owner's privacy budget, over all federations, and what it refuses.

Every masked vector is charged before it is made, whatever became of its round, without amplification:
a client cannot know that the server drew its cohort by chance or kept it secret.

Guaranteed, for the owner's budget (epsilon, delta): what all plans that this vault agreed to say of
their noise composes to no more. Charges of different noise multipliers z are one Gaussian mechanism
with 1 / z^2 = the sum of theirs, exactly, whatever was chosen in between (Dong, Roth, Su 2019,
https://arxiv.org/abs/1905.02383, corollary 3.3); the adjacency is zero-out: this user's vectors, or
zeros.

Against whom:
- mechanism distributed: against server and peers, if at most `corrupt` members, by this client's own
  policy, and the young ones of the cohort, add no noise. Only the noise of the plan's min_cohort
  less those is counted, whatever the config says of corrupt members.
- central and dp_ftrl: against whoever gets the models, and only if the server adds the noise that it
  promised: this client cannot see it. The server itself has the sum without noise.
- none: nothing bounds what is learned. A vault with a budget refuses such federations.

A refusal tells a server that the budget is spent, and not how much was spent elsewhere.

Not covered: a store that is rolled back; it must not be part of a backup. And two charges at once:
whoever charges holds one lock for all federations of the vault (`MemberRuntime.lock`).
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedoppu.client.vault import StateStore
from fedoppu.common.accounting import distributed_epsilon, gaussian_epsilon
from fedoppu.common.config import FederationConfig, require
from fedoppu.common.errors import DataError, RefusedByPolicy, UsageError
from fedoppu.common.privacy import require_scales, sensitivity
from fedoppu.common.rounds import RoundPlan

STATE = "privacy"


@dataclass(frozen=True)
class PrivacyBudget:
    """What an owner allows, over all federations together.

    Attributes:
        epsilon: Above 0.
        delta: Between 0 and 1.
    """

    epsilon: float
    delta: float = 1e-5

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("the vault's privacy epsilon", self.epsilon, 1e-6, 1e6)
        require("the vault's privacy delta", self.delta, 1e-30, 0.1)


class PrivacyLedger(Protocol):
    """Remembers what was spent."""

    def charge(self, plan: RoundPlan, config: FederationConfig, *, young: int = 0) -> None:
        """Makes the charge of one masked vector durable; the vector is made after that.

        Args:
            plan: Of the attempt.
            config: Of the federation.
            young: Members that may be among the survivors and count as corrupt because they
                joined a short while ago.

        Raises:
            RefusedByPolicy: The budget does not allow it; nothing was charged.
        """


@dataclass(frozen=True)
class _Spent:
    """What is stored.

    Attributes:
        cost: Sum of 1 / z^2.
        runs: A run of a federation: (round, attempt, context) of its last charge.
    """

    cost: float = 0.0
    runs: dict[str, tuple[int, int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class VaultLedger:
    """The ledger of one vault.

    Attributes:
        store: The vault's own state, not that of one federation's seat.
        budget: The owner's, or None: then nothing is refused for its cost, and what has noise is charged.
        corrupt: Members assumed corrupt, by this client's policy.
    """

    store: StateStore = field(repr=False)
    budget: PrivacyBudget | None = None
    corrupt: int = 0

    def charge(self, plan: RoundPlan, config: FederationConfig, *, young: int = 0) -> None:
        """Makes the charge of one masked vector durable; a repeat of it changes nothing.

        Raises:
            RefusedByPolicy: There is a budget and no noise, or too little of it is left; or a member
                would take part again before its turn.
        """
        if config.privacy.mechanism == "none" and self.budget is None:
            return
        spent, run = self._spent(), f"{plan.run_id} {plan.config_hash}"
        last, entry = spent.runs.get(run), (plan.round, plan.attempt, plan.context.hex())
        if last == entry:
            return
        _require_turn(plan, config, last)
        cost = spent.cost + self._cost(plan, config, young)
        self._require_within(spent.cost, cost)
        self._put(_Spent(cost, {**spent.runs, run: entry}))

    def epsilon(self, delta: float) -> float:
        """What all charges together are, at a delta."""
        return _epsilon(self._spent().cost, delta)

    def burden(self, epsilon: float, delta: float) -> None:
        """Adds a charge for what this store cannot know of: a vault that was restored takes this on.

        Args:
            epsilon: Above 0; the charge is the least that costs so much by itself.
            delta: Between 0 and 1.
        """
        spent = self._spent()
        self._put(_Spent(spent.cost + _cost_of(epsilon, delta), spent.runs))

    # --- the cost of a vector --------------------------------------------------------------------

    def _cost(self, plan: RoundPlan, config: FederationConfig, young: int) -> float:
        """1 / z^2 of this vector's noise; infinite without any."""
        privacy = config.privacy
        if privacy.mechanism == "none" or privacy.noise_multiplier is None:
            return math.inf
        if privacy.mechanism == "distributed":
            return self._distributed_cost(plan, plan.min_cohort - self.corrupt - young)
        return privacy.noise_multiplier**-2

    @staticmethod
    def _distributed_cost(plan: RoundPlan, honest: int) -> float:
        """Of the noise of honest survivors alone; the sum of discrete Gaussians is no exact one."""
        if honest < 1:
            return math.inf
        try:
            require_scales(math.sqrt(honest) * plan.noise_scale, plan.noise_scale)
        except UsageError:  # of a plan that came from a server
            return math.inf
        epsilon = distributed_epsilon(
            sensitivity(plan), plan.noise_scale, clients=honest, length=plan.num_params
        )
        return epsilon**2

    def _require_within(self, before: float, after: float) -> None:
        budget = self.budget
        if budget is None:
            return
        asked = _epsilon(after, budget.delta)
        if asked <= budget.epsilon:
            return
        spent = _epsilon(before, budget.delta)
        wanted = "no bound" if asked == math.inf else f"epsilon {asked:.4g} in all"
        # the message goes to the server, the hint stays with the owner
        raise RefusedByPolicy(
            "this vault's privacy budget, over all federations, does not allow this round",
            hint=f"epsilon {spent:.4g} of {budget.epsilon:g} is spent (delta {budget.delta:g}); with "
            f"this round it would be {wanted}; only the owner can raise the budget, and a "
            "federation can ask for more noise",
        )

    # --- the store -------------------------------------------------------------------------------

    def _spent(self) -> _Spent:
        data = self.store.get(STATE)
        if data is None:
            return _Spent()
        try:
            values: dict[str, Any] = json.loads(data)
            runs = {run: (row[0], row[1], row[2]) for run, row in values["runs"].items()}
            return _Spent(float(values["cost"]), runs)
        except (ValueError, TypeError, KeyError, IndexError):
            raise DataError(
                "the vault's privacy ledger is malformed: what was spent is not known",
                hint="enrol anew with a restored vault, which takes a charge on",
            ) from None

    def _put(self, spent: _Spent) -> None:
        self.store.put(STATE, json.dumps({"cost": spent.cost, "runs": spent.runs}).encode())


def _require_turn(
    plan: RoundPlan, config: FederationConfig, last: tuple[int, int, str] | None
) -> None:
    """Correlated noise covers a member that takes part at most once in `separation` rounds."""
    if config.privacy.mechanism != "dp_ftrl" or last is None:
        return
    gap = abs(plan.round - last[0])
    if 0 < gap < config.privacy.separation:
        raise RefusedByPolicy(
            f"this client took part in round {last[0]} and may again in round "
            f"{last[0] + config.privacy.separation}, not in round {plan.round}: the federation's "
            f"noise is made for one part in {config.privacy.separation} rounds",
            hint="the server must keep to the config's privacy.separation",
        )


def _epsilon(cost: float, delta: float) -> float:
    if cost == 0 or cost == math.inf:
        return cost
    return gaussian_epsilon(1 / math.sqrt(cost), 1, delta)


def _cost_of(epsilon: float, delta: float) -> float:
    """The least cost whose epsilon is at least this, by bisection."""
    low, high = 0.0, 1.0
    while _epsilon(high, delta) < epsilon:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _epsilon(middle, delta) < epsilon else (low, middle)
    return high
