"""What the words say: sums that wrap, vectors that show, metrics of one, ranges that do not fit."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.release import release
from fedoppu.common.errors import RefusedByPolicy, RoundAborted, UsageError
from fedoppu.common.quantization import (
    LOSS,
    LOSS_COUNT,
    LOSS_LEVELS,
    LOSS_MAX,
    WEIGHT,
    VectorLayout,
    decode_sum,
    read_scalars,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.rotation import rotate
from fedoppu.common.rounds import CohortFixed, RoundPlan, Words
from fedoppu.server.ranges import next_range
from fedoppu.server.secagg import SecAggServer
from tests.attacks.attacker import Rogue, World, same, secret_of
from tests.attacks.switches import without
from tests.integration.secagg_harness import Federation, unevenness

# --- overflow ------------------------------------------------------------------------------------

WIDE = {"word_bits": 16, "level_bits": 14}  # nine members with 14 bits need 18


def wrapped_sum() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sum of nine vectors of the largest levels, and what it should be."""
    made = Federation(9)
    made.plan = replace(made.plan, **WIDE)  # type: ignore[arg-type]
    layout = VectorLayout.of(made.plan)
    most = np.full(layout.length, 2 * layout.middle, layout.dtype)
    made.server = SecAggServer(made.plan, made.roster, invited=range(9))
    made.words = lambda member: most  # type: ignore[method-assign]
    return made.run().words.astype(np.int64), 9 * most.astype(np.int64)


def test_overflow_bound() -> None:
    with pytest.raises(UsageError, match="9 members with 14-bit levels overflow 16-bit words"):
        wrapped_sum()
    with without("overflow"):
        learned, true = wrapped_sum()
    assert (learned != true).all()
    assert (learned == true % 2**16).all()  # a sum that nobody can tell from a right one


def test_client_holds_the_overflow_bound_against_the_server() -> None:
    world = World(9)
    rogue = Rogue.over(world, plan=world.plan(**WIDE))
    rogue.open()
    everyone = CohortFixed(tuple(rogue.adverts[member] for member in range(9)))
    with pytest.raises(RefusedByPolicy, match="9 members with 14-bit levels overflow"):
        rogue.tell(0, everyone)
    with without("overflow"):
        assert rogue.tell(0, everyone)


def limbs_of(weight: int) -> int:
    """The weight that a sum of two members says, one of whom claims `weight`."""
    plan = World(4, num_params=8).plan(max_weight=64)
    words = [released(plan, member, weight=weight if member else 1) for member in range(2)]
    return decode_sum(words[0] + words[1], plan, (0, 1)).total_weight


def released(plan: RoundPlan, member: int, *, weight: int = 1, loss: float | None = None) -> Words:
    vector = np.random.default_rng(member).normal(0, 0.05, plan.num_params).astype(np.float32)
    update = LocalUpdate(plan.context, vector, weight, loss)
    return release(update, plan, Randomness.from_seed(member))


def test_weight_above_the_plans_counts_as_the_plans() -> None:
    """A member with a million examples is not the sum: w / w_max is at most one."""
    assert limbs_of(1_000_000) == 1 + 64


# --- what shows ----------------------------------------------------------------------------------


def one_vector(num_params: int = 20_000) -> tuple[Words, Words]:
    """One member's vector as the server gets it, and what it was."""
    rogue = Rogue.over(World(4, num_params=num_params)).until_masked()
    return rogue.masked[0].words, secret_of(0, rogue.plan)


def test_masked_vector_is_uniform() -> None:
    learned, true = one_vector()
    assert unevenness(learned) < 5
    assert unevenness(true) > 100
    with without("masks"):
        assert same(*one_vector())


def metrics_of_one() -> dict[str, int]:
    """What a server reads of weight and loss in one member's masked vector."""
    rogue = Rogue.over(World(4, num_params=8))
    rogue.open()
    rogue.share()
    for member in range(4):
        rogue.deliver(member)
        rogue.train(member, released(rogue.plan, member, weight=11, loss=3.0))
    return read_scalars(VectorLayout.of(rogue.plan), rogue.masked[0].words, survivors=1)


def test_weight_and_metrics_travel_inside_the_masked_vector_alone() -> None:
    with pytest.raises(RoundAborted, match="the total of weight is"):  # noise is no weight
        metrics_of_one()
    with without("masks"):
        seen = metrics_of_one()
    assert (seen[WEIGHT], seen[LOSS_COUNT]) == (11, 1)
    assert seen[LOSS] / LOSS_LEVELS * LOSS_MAX == pytest.approx(3.0, abs=1e-3)


def added(words: list[Words]) -> Words:
    total = np.zeros_like(words[0])
    for each in words:
        total += each
    return total


def loss_of_few(floor: int | None) -> float | None:
    """The loss that a round publishes in which one of five members has one."""
    plan = World(5, num_params=8).plan()
    words = [released(plan, member, loss=2.5 if member == 3 else None) for member in range(5)]
    total = added(words)
    return decode_sum(total, plan, range(5), floor=floor).held_out_loss


def test_metrics_of_fewer_than_the_floor_are_not_published() -> None:
    assert loss_of_few(floor=None) is None
    assert loss_of_few(floor=1) == pytest.approx(2.5, abs=1e-3)  # the one member's own


# --- ranges and rotation -------------------------------------------------------------------------


def error_after(rounds: int, start: float, *, adapts: bool) -> float:
    """Relative L2 error of the mean in the last round, by the rounding alone."""
    plan, n = World(10, num_params=2048).plan(value_range=start), 10
    vectors = [np.random.default_rng(m).normal(0, 0.01, 2048).astype(np.float32) for m in range(n)]
    exact, mean = np.mean(vectors, axis=0), np.zeros(0)
    for round_ in range(1, rounds + 1):
        plan = replace(plan, round=round_)
        updates = [LocalUpdate(plan.context, v, plan.max_weight, None) for v in vectors]
        words = [release(u, plan, Randomness.from_seed(m)) for m, u in enumerate(updates)]
        decoded = decode_sum(added(words), plan, range(n))
        mean = decoded.mean_update.astype(np.float64)
        if adapts and round_ < rounds:
            share = decoded.clipped / (n * 2048)
            wanted = next_range(
                plan.value_range, share, total=mean * n, clients=n, level_bits=plan.level_bits
            )
            plan = replace(plan, value_range=wanted)
    return float(np.linalg.norm(mean - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("start", [1e-4, 1e-2, 1.0, 100.0])
def test_range_fits_the_updates_after_five_rounds_wherever_it_began(start: float) -> None:
    assert error_after(6, start, adapts=True) <= 1e-3


@pytest.mark.parametrize("start", [1e-4, 100.0])
def test_range_that_stays_where_it_began_does_not(start: float) -> None:
    assert error_after(6, start, adapts=False) > 1e-2


def test_rotation_does_not_let_a_vector_grow() -> None:
    """One Hadamard transform over all would pad 1,000,000 to 2 ** 20: 4.9 % more bytes."""
    vector = np.ones(1_000_000, np.float32)
    assert rotate(vector, "07" * 32).size == 1_000_000
    assert 2**20 / 1_000_000 > 1.048
