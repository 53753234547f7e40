"""What a client remembers, and what a client that is rolled back can be made to do."""

from dataclasses import replace

import pytest

from fedoppu.client.policy import LastRound
from fedoppu.client.seat import MOST_SETS, Seat
from fedoppu.common.errors import RefusedByPolicy
from tests.integration.secagg_harness import identities, make_plan, roster_of
from tests.rosters import Store

PLAN = make_plan(5, roster_of(identities(5)))


def test_first_config_is_pinned_and_any_other_is_refused() -> None:
    seat = Seat(Store())
    seat.require_pinned(b"one")
    assert seat.config is None
    seat.pin(b"one")
    seat.pin(b"one")
    with pytest.raises(RefusedByPolicy, match="which this client took part with"):
        seat.pin(b"other")
    assert seat.config == b"one"


def test_each_run_has_a_memory_of_its_own() -> None:
    seat = Seat(Store())
    one, other = (LastRound.of(replace(PLAN, run_id=run), answered=True) for run in ("aa", "bb"))
    assert (seat.last, seat.last_in("aa"), seat.machine) == (None, None, None)
    seat.save(b"machine", one)
    seat.save(b"", other)
    assert (seat.last, seat.last_in("aa"), seat.last_in("bb")) == (other, one, other)
    assert seat.machine is None


def test_answered_model_is_answered_in_no_other_round() -> None:
    seat = Seat(Store())
    seat.require_unanswered("LaMP_3", PLAN)
    seat.finish("LaMP_3", PLAN)
    seat.require_unanswered("LaMP_3", PLAN)  # the same round: its attempts are the policy's matter
    seat.require_unanswered("LaMP_2", replace(PLAN, round=2))
    seat.require_unanswered("LaMP_3", replace(PLAN, round=2, model_hash="ee" * 32))
    with pytest.raises(RefusedByPolicy, match=r"d0d0d0d0d0d0 in round 1 of this run; two sums"):
        seat.require_unanswered("LaMP_3", replace(PLAN, round=2))
    with pytest.raises(RefusedByPolicy, match=r"d0d0d0d0d0d0 in another run; two sums"):
        seat.require_unanswered("LaMP_3", replace(PLAN, run_id="bb"))


def test_survivor_sets_are_kept_once_each_and_not_for_ever() -> None:
    seat = Seat(Store())
    for first in (0, 1, 0):
        seat.keep_survivors(range(first, 5))
    assert seat.survivor_sets == [[1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for number in range(MOST_SETS + 3):
        seat.keep_survivors([number])
    assert seat.survivor_sets == [[number] for number in range(3, MOST_SETS + 3)]
