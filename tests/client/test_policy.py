from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import RefusedByPolicy, UsageError
from fedoppu.common.graph import Graph
from tests.integration.secagg_harness import identities, make_plan, roster_of

SIMULATION = ClientPolicy.for_simulation()
PLAN = make_plan(10, roster_of(identities(10)))


def test_default_on_a_device_assumes_a_tenth_of_the_roster_corrupt() -> None:
    assert ClientPolicy.for_roster(200) == ClientPolicy(floor=20, corrupt=20)
    assert ClientPolicy.for_roster(5).corrupt == 1


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"floor": 1}, "policy.floor must be at least 2, got 1"),
        ({"corrupt": -1}, "policy.corrupt must be at least 0"),
        ({"max_drop": 0.6}, "policy.max_drop must be between 0 and 0.5"),
        ({"least_threshold": 0.4}, "policy.least_threshold must be between 0.5 and 1"),
        ({"range_change": 0.5}, "policy.range_change must be at least 1"),
        ({"difference_floor": -1}, "policy.difference_floor must be at least 0"),
        ({"roster_growth": 1.5}, "policy.roster_growth must be between 0 and 1"),
        ({"epoch_hours": -1}, "policy.epoch_hours must be at least 0"),
        ({"young_epochs": -1}, "policy.young_epochs must be at least 0"),
        ({"floor": 2, "corrupt": 1}, "must be at least 4 outside a simulation, got 3"),
    ],
)
def test_policy_out_of_range_is_refused(values: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ClientPolicy(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["round", "num_params", "max_weight", "threshold", "min_cohort"])
def test_plan_with_a_zero_is_refused(name: str) -> None:
    with pytest.raises(RefusedByPolicy, match=f"the plan's {name} must be at least 1"):
        SIMULATION.check_plan(replace(PLAN, **{name: 0}), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"word_bits": 24}, "words must have 16 or 32 bits"),
        ({"word_bits": 16, "level_bits": 15}, "levels 2 to two fewer"),
        ({"clip": float("inf")}, "clip and value_range must be positive and finite"),
        ({"value_range": 0.0}, "clip and value_range must be positive and finite"),
        ({"value_range": 2.0**-25}, "must be between 5.96046e-08 and 1.67772e"),
        ({"value_range": 2.0**25}, "2 .. 24 around the clip bound"),
    ],
)
def test_plan_with_nonsense_numbers_is_refused(changes: dict[str, float], match: str) -> None:
    with pytest.raises(RefusedByPolicy, match=match):
        SIMULATION.check_plan(replace(PLAN, **changes), None)  # type: ignore[arg-type]


LAST = LastRound.of(replace(PLAN, round=3, attempt=1), answered=False)


@pytest.mark.parametrize("where", [(3, 1), (3, 0), (2, 9), (1, 0)])
def test_attempt_that_is_not_above_the_last_is_refused(where: tuple[int, int]) -> None:
    with pytest.raises(RefusedByPolicy, match="is not after round 3 attempt 1"):
        SIMULATION.check_plan(replace(PLAN, round=where[0], attempt=where[1]), LAST)


def test_next_attempts_and_other_runs_are_taken() -> None:
    for changes in ({"round": 3, "attempt": 2}, {"round": 4}, {"run_id": "bb" * 16}):
        SIMULATION.check_plan(replace(PLAN, **changes), LAST)


def test_answered_round_is_answered_once() -> None:
    answered = replace(LAST, answered=True)
    with pytest.raises(RefusedByPolicy, match="round 3 was answered at attempt 1"):
        SIMULATION.check_plan(replace(PLAN, round=3, attempt=2), answered)
    SIMULATION.check_plan(replace(PLAN, round=4), answered)


@pytest.mark.parametrize("factor", [16.1, 1 / 16.1])
def test_range_that_jumps_is_refused(factor: float) -> None:
    changed = replace(PLAN, round=4, value_range=PLAN.value_range * factor)
    with pytest.raises(RefusedByPolicy, match=r"value_range is .* by a factor of at most 16"):
        SIMULATION.check_plan(changed, LAST)


def test_range_may_move_a_step_for_each_round_that_was_missed() -> None:
    farther = replace(PLAN, round=5, value_range=PLAN.value_range / 250)
    SIMULATION.check_plan(farther, LAST)
    with pytest.raises(RefusedByPolicy, match="by a factor of at most 16"):
        SIMULATION.check_plan(replace(farther, round=4), LAST)


@given(
    missed=st.integers(1, 10**18),
    exponent=st.floats(-30, 30, allow_nan=False),
    before=st.floats(-24, 24, allow_nan=False),
    clip=st.floats(1e-9, 1e9),
)
@settings(max_examples=150)
def test_range_is_taken_within_both_bounds_and_nowhere_else(
    missed: int, exponent: float, before: float, clip: float
) -> None:
    """However many rounds a server jumps: 2^24 around the clip bound, 16 for each round within."""
    last = replace(LAST, value_range=clip * 2.0**before)
    plan = replace(PLAN, round=3 + missed, clip=clip, value_range=clip * 2.0**exponent)
    steps = abs(exponent - before) / 4
    if min(abs(abs(exponent) - 24), abs(steps - missed)) < 1e-6:
        return  # on a bound, where floats decide
    if abs(exponent) < 24 and steps < missed:
        SIMULATION.check_plan(plan, last)
    else:
        with pytest.raises(RefusedByPolicy, match="value_range"):
            SIMULATION.check_plan(plan, last)


def test_client_that_was_away_for_fifty_rounds_is_not_locked_out() -> None:
    for factor in (16.0**5, 16.0**-5):
        SIMULATION.check_plan(replace(PLAN, round=53, value_range=PLAN.clip * factor), LAST)


def test_only_the_config_that_the_owner_consented_to_is_taken() -> None:
    SIMULATION.check_config("ab" * 32)
    policy = replace(SIMULATION, config_hash="ab" * 32)
    policy.check_config("ab" * 32)
    with pytest.raises(RefusedByPolicy, match="config is cdcdcdcdcdcd, the owner consented to aba"):
        policy.check_config("cd" * 32)


def test_young_members_of_a_cohort_count_as_corrupt_and_others_do_not() -> None:
    policy = ClientPolicy(floor=4, corrupt=1, young=frozenset({7, 8, 99}))
    assert [policy.corrupt_in(members) for members in (range(7), range(9), {99}, ())] == [
        1,
        3,
        1,
        0,
    ]
    assert (policy.quorum(range(7)), policy.quorum(range(9))) == (5, 7)
    plan = make_plan(9, roster_of(identities(9)), settings=ThresholdSettings(2, 3, 0.3))
    policy.check_cohort(plan, range(9))
    graph, few = Graph(b"\x01" * 32, range(9), 8), replace(plan, max_drops=4, min_cohort=6)
    with pytest.raises(RefusedByPolicy, match="survivor set of 6 has 3 honest members if 3 are"):
        replace(policy, max_drop=0.5).check_live(few, graph, frozenset(range(3, 9)))


def test_two_server_plan_must_promise_the_floor() -> None:
    policy = ClientPolicy(floor=4, corrupt=1, young=frozenset({7}), config_hash="ab")
    policy.check_sealed(replace(PLAN, min_cohort=6))
    with pytest.raises(RefusedByPolicy, match="helper's set of 5 has 3 honest members if 2 are"):
        policy.check_sealed(replace(PLAN, min_cohort=5))


def test_two_server_rounds_show_no_difference_of_survivors() -> None:
    policy = replace(SIMULATION, difference_floor=2)
    with pytest.raises(
        RefusedByPolicy, match="two-server rounds show their survivors to no client"
    ):
        policy.check_sealed(PLAN)


@given(
    sets=st.lists(st.frozensets(st.integers(0, 12), max_size=12), min_size=1, max_size=5),
    floor=st.integers(0, 6),
    corrupt=st.integers(0, 3),
)
@settings(max_examples=150)
def test_survivor_sets_are_equal_or_differ_by_the_floor(
    sets: list[frozenset[int]], floor: int, corrupt: int
) -> None:
    policy = replace(SIMULATION, difference_floor=floor, corrupt=corrupt)
    now, *earlier = sets
    honest = [len(now ^ before) - min(corrupt, len(now ^ before)) for before in earlier]
    near = any(now != before and h < floor for before, h in zip(earlier, honest, strict=True))
    if near:
        with pytest.raises(RefusedByPolicy, match=f"this client's difference_floor is {floor}"):
            policy.check_difference(now, earlier)
    else:
        policy.check_difference(now, earlier)


def test_three_members_are_a_cohort_in_a_simulation_alone() -> None:
    plan = make_plan(3, roster_of(identities(3)))
    SIMULATION.check_cohort(plan, range(3))
    with pytest.raises(RefusedByPolicy, match="a cohort of 3"):
        ClientPolicy(floor=4, corrupt=0).check_cohort(plan, range(3))


def test_owner_may_ask_for_more_shares_than_the_rules() -> None:
    assert PLAN.threshold == 6
    SIMULATION.check_cohort(PLAN, range(10))
    with pytest.raises(RefusedByPolicy, match="it must be between 8 and 10"):
        replace(SIMULATION, least_threshold=0.7).check_cohort(PLAN, range(10))


def test_threshold_that_nobody_could_reach_is_refused() -> None:
    with pytest.raises(RefusedByPolicy, match="between 6 and 10"):
        SIMULATION.check_cohort(replace(PLAN, threshold=11), range(10))


def test_odd_ring_is_refused() -> None:
    with pytest.raises(RefusedByPolicy, match="neighbours must be even, got 41"):
        SIMULATION.check_cohort(replace(PLAN, neighbours=41, threshold=30), range(100))


@pytest.mark.parametrize("drop", [0.1, 0.2, 0.3])
def test_planned_thresholds_pass_the_check_of_a_client_with_the_same_assumptions(
    drop: float,
) -> None:
    settings_ = ThresholdSettings(floor=20, corrupt=8, max_drop=drop)
    plan = make_plan(80, roster_of(identities(80)), settings=settings_)
    policy = ClientPolicy(floor=20, corrupt=8, max_drop=0.3)
    for size in (80, 80 - plan.max_drops):
        policy.check_cohort(plan, range(size))


def test_server_that_drops_a_survivors_neighbours_is_refused() -> None:
    settings_ = ThresholdSettings(floor=2, corrupt=0, max_drop=0.3)
    plan = make_plan(100, roster_of(identities(100)), settings=settings_)
    graph = Graph(b"\x01" * 32, range(100), plan.neighbours)
    isolated = frozenset(range(100)) - set(graph.neighbours(7)[: plan.max_drops])
    assert plan.neighbours - plan.max_drops < plan.threshold
    with pytest.raises(RefusedByPolicy, match=r"member 7 keeps 30 live holders .* threshold is 31"):
        SIMULATION.check_live(plan, graph, isolated)


def test_survivor_set_below_the_plans_own_floor_is_refused() -> None:
    # Of 10 asked 8 came, and of these 2 more drop: few enough for max_drops, and too few for the noise.
    graph, plan = Graph(b"\x01" * 32, range(8), 9), replace(PLAN, min_cohort=7)
    SIMULATION.check_live(plan, graph, frozenset(range(7)))
    with pytest.raises(RefusedByPolicy, match="6 members are left, the plan's min_cohort is 7"):
        SIMULATION.check_live(plan, graph, frozenset(range(6)))


def test_server_that_cuts_the_ring_is_refused() -> None:
    # Two gaps of k/2 members would split the sum in two: the members beside them notice.
    settings_ = ThresholdSettings(floor=2, corrupt=0, max_drop=0.3)
    plan = make_plan(600, roster_of(identities(600)), settings=settings_)
    graph, half = Graph(b"\x01" * 32, range(600), plan.neighbours), plan.neighbours // 2
    assert plan.neighbours <= plan.max_drops
    ring = graph._ring
    live = frozenset(range(600)) - set(ring[:half]) - set(ring[300 : 300 + half])
    with pytest.raises(RefusedByPolicy, match="live holders of its shares"):
        SIMULATION.check_live(plan, graph, live)


def test_own_drop_bound_holds_below_the_plans() -> None:
    graph = Graph(b"\x01" * 32, range(10), 9)
    assert PLAN.max_drops == 3
    SIMULATION.check_live(PLAN, graph, frozenset(range(7)))
    with pytest.raises(RefusedByPolicy, match="3 of 10 members are missing, at most 1 may be"):
        replace(SIMULATION, max_drop=0.1).check_live(PLAN, graph, frozenset(range(7)))
