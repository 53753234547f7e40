"""Which test closes which line: every line of A4 of the specification, and every rule.

A name alone is a test of this folder, which tries the attack with its rule on and with it off; a
path names a test elsewhere (values, properties, whole runs).
"""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.attacks.switches import RULES

TESTS = Path(__file__).resolve().parent.parent

A4: Mapping[str, tuple[str, ...]] = {
    "key substitution": ("test_key_substitution",),
    "advert replay from another config or round": (
        "test_advert_replay_from_another_round",
        "test_advert_of_another_config_is_no_advert_of_this_one",
    ),
    "round replay": ("test_round_replay",),
    "cohort below the client's floor": ("test_cohort_below_the_clients_floor",),
    "server-set t too low": ("test_threshold_that_the_server_sets_too_low",),
    "duplicate ids and keys": (
        "test_duplicate_keys",
        "test_duplicate_identities",
        "test_member_that_is_listed_twice",
        "test_key_that_was_copied_from_another_member",
    ),
    "share swap between recipients": ("test_share_swap",),
    "too few neighbours": ("test_too_few_neighbours",),
    "split survivor views": ("test_split_survivor_views",),
    "survivors below the floor": ("test_survivors_below_the_floor",),
    "at most one secret of an owner, once": (
        "test_both_secrets_of_one_owner",
        "integration/test_protocol_machine.py::test_schedules_would_show_that_a_rule_is_missing",
    ),
    "second unmask": (
        "test_second_unmask",
        "test_opening_of_another_run_does_not_overtake_an_unmask_reply",
    ),
    "own key in the roster": (
        "test_own_advert_must_be_in_the_cohort",
        "test_identity_of_another_under_ones_own_number",
    ),
    "reconstruction from fewer than t, duplicate or corrupt shares": (
        "test_reconstruction_from_too_few_or_duplicate_or_malformed_shares",
        "test_liar_about_a_share",
        "test_dealer_of_wrong_shares",
    ),
    "late client stays hidden": ("test_late_client_stays_hidden",),
    "different global models": ("test_different_models_for_different_members",),
    "overflow bound": (
        "test_overflow_bound",
        "test_client_holds_the_overflow_bound_against_the_server",
    ),
    "masked vector is uniform, and a Mersenne Twister fails": (
        "test_masked_vector_is_uniform",
        "common/test_mask_streams.py::test_control_is_flagged_by_parity",
        "common/test_mask_streams.py::test_control_is_flagged_by_linear_complexity",
    ),
    "known answers of PRG, HKDF, Shamir and graph": (
        "common/test_masking.py::test_mask_stream_is_the_published_aes_counter_stream",
        "common/test_masking.py::test_hkdf_is_that_of_rfc_5869",
        "common/test_secret_sharing.py::test_shares_are_those_of_the_published_example",
        "common/test_graph.py::test_ring_is_the_order_of_the_hashes",
    ),
    "no key outlives the round": ("test_no_key_outlives_its_use",),
    "crash or restart never uses a mask key again": (
        "test_restart_never_uses_a_mask_key_again",
        "test_new_attempt_overwrites_the_keys_of_the_old_one",
    ),
    "weights masked": ("test_weight_and_metrics_travel_inside_the_masked_vector_alone",),
    "no metrics in clear": ("test_weight_and_metrics_travel_inside_the_masked_vector_alone",),
    "Sybil limit": ("test_sybils_fail_against_a_pinned_roster_and_win_where_the_server_enrols",),
}

BY_RULE: Mapping[str, tuple[str, ...]] = {
    "1 another range for one victim": ("test_another_range_for_one_victim",),
    "1 range and clip bound from round to round": (
        "test_range_that_jumps_from_round_to_round",
        "test_clip_bound_that_the_noise_is_not_made_for",
    ),
    "2 a private cohort list": ("test_private_cohort_list_for_one_victim",),
    "2 a graph that is searched for": (
        "test_too_few_neighbours",
        "test_neighbours_that_the_calculator_gives_are_not_surrounded_by_a_search",
    ),
    "3 corruption is counted in the roster": ("test_corruption_is_counted_in_the_roster",),
    "3 table of the smallest cohorts": (
        "common/test_thresholds.py::test_small_cohorts_have_these_thresholds_and_drops",
    ),
    "4 a helper that is asked twice": (
        "test_helper_that_is_asked_twice",
        "test_helper_answers_once_for_a_round_and_for_a_model",
    ),
    "4 set, claims and floor of the helper": (
        "test_set_below_the_helpers_floor",
        "test_claims_of_members_that_did_not_answer",
    ),
    "4 pinned helper, bound and signed": (
        "test_helper_of_the_servers_own",
        "test_newcomer_whose_owner_consented_to_one_config_takes_no_helper_of_the_servers",
        "test_newcomer_takes_no_helper_that_its_owner_did_not_consent_to",
        "test_sealed_seed_that_is_handed_in_by_another_or_in_another_round",
        "test_mask_sum_that_was_changed_on_the_way",
    ),
    "4 sending counts as having unmasked": ("test_masked_vector_that_is_asked_for_again",),
    "4 a helper that lies or guesses": (
        "test_helper_that_has_the_server_publish_one_member",
        "test_helper_that_guesses",
        "test_server_and_helper_together_read_everyone",
    ),
    "5 a second attempt": ("test_second_attempt_at_a_round_that_was_answered",),
    "5 a second run or round with one model": ("test_second_run_or_round_with_the_same_model",),
    "5 stored before sent, repeated byte for byte": (
        "test_vector_is_sent_once_or_repeated_byte_for_byte",
        "test_other_request_for_a_vector_that_was_sent",
    ),
    "5 outside the survivor set": ("test_client_outside_the_survivor_set_never_unmasks",),
    "5 giving up is final, the asked sit out": (
        "test_giving_up_is_final",
        "test_members_that_were_asked_sit_out",
    ),
    "5 nearly equal rounds, where the owner asks": (
        "test_nearly_equal_survivor_sets_are_refused_by_owners_who_ask_for_distance",
    ),
    "6 drops that cut the graph in two": ("test_drops_that_cut_the_graph_in_two",),
    "6 more drops than the plan's": ("test_more_drops_than_the_plan_or_the_owner_allows",),
    "7 liars about seed, share and key": (
        "test_liar_about_its_seed",
        "test_liar_about_a_share",
        "test_dealer_of_wrong_shares",
        "test_share_that_was_not_asked_for_is_not_taken",
    ),
    "7 masks follow the share set": (
        "test_masks_follow_the_share_set_whether_or_not_a_package_opened",
    ),
    "7 liars about what they were dealt": (
        "test_liar_that_complains_of_everyone_is_named_and_costs_nothing",
    ),
    "7 crafted keys": (
        "test_low_order_key",
        "test_key_of_a_wrong_length_and_one_key_for_both_uses",
    ),
    "7 every message is signed": (
        "test_every_message_is_signed",
        "test_masked_vector_that_was_changed_on_the_way",
        "test_update_ready_is_the_runtimes_own_and_never_a_message",
    ),
    "7 totals out of reach": ("test_totals_that_no_clients_can_reach_refuse_the_round",),
    "8 keys from a seed": ("test_keys_from_a_seed_are_no_keys_and_refuse_to_work_outside_a_grid",),
    "8 keys of one round, channel and use": ("test_key_of_one_round_opens_no_other",),
    "8 the server's root": ("test_root_of_the_server_is_in_no_file_and_no_message",),
    "8 hybrid: who sealed it": ("test_planted_pair_secret", "test_package_that_another_sealed"),
    "9 the range fits the updates": (
        "test_range_fits_the_updates_after_five_rounds_wherever_it_began",
        "test_range_that_stays_where_it_began_does_not",
    ),
    "10 weights": ("test_weight_above_the_plans_counts_as_the_plans",),
    "10 overflow": ("test_overflow_bound",),
    "11 metrics of few": (
        "test_metrics_of_fewer_than_the_floor_are_not_published",
        "simulations/test_runtime.py::test_held_out_are_the_newest_and_only_if_four_are_on_either_side",
    ),
    "12 rotation does not grow": ("test_rotation_does_not_let_a_vector_grow",),
    "13 a roster that grows or forks": (
        "client/test_enrolment.py::test_growth_of_an_epoch_is_limited",
        "client/test_enrolment.py::test_young_members_that_fill_a_cohort_count_as_corrupt",
        "client/test_enrolment.py::test_corrupt_members_that_sign_both_branches_complete_one_at_most",
    ),
    "13 a rolled-back client": (
        "test_disk_that_is_silently_rolled_back_counts_as_a_corrupt_client",
        "client/test_rollback.py::test_where_it_counts_as_corrupt_no_second_set_finds_its_quorum",
    ),
    "14 noise that the server asks for and knows": (
        "test_server_that_asks_for_no_noise",
        "test_noise_comes_from_a_secret_of_the_member",
    ),
    "14 noise of honest survivors": (
        "test_corrupt_members_take_their_noise_off_again_and_enough_is_left",
    ),
    "14 a second noise on one sum": ("test_second_noise_on_one_sum_would_be_averaged_away",),
    "14 charges": (
        "test_every_vector_that_was_sent_is_charged_and_the_vault_stops",
        "test_charge_is_durable_before_the_vector_is_made",
    ),
    "14 nothing beside the vector": (
        "test_every_element_is_inside_the_one_noised_vector_or_absent",
        "integration/test_private_rounds.py::test_no_number_that_leaves_is_an_exact_one",
    ),
}
TABLE = {**{f"A4 {line}": tests for line, tests in A4.items()}, **BY_RULE}
HERE = [
    path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path.name != "test_table.py"
]


@cache
def functions_of(path: Path) -> frozenset[str]:
    """Names of the test functions of a file."""
    body = ast.parse(path.read_text()).body
    return frozenset(
        node.name for node in body if isinstance(node, ast.FunctionDef) and node.name[:4] == "test"
    )


@pytest.mark.parametrize("line", TABLE)
def test_line_has_its_tests(line: str) -> None:
    assert TABLE[line]
    for name in TABLE[line]:
        path, _, function = name.rpartition("::")
        places = [TESTS / path] if path else HERE
        assert any(function in functions_of(place) for place in places), f"{name} is no test"


def test_all_fourteen_rules_are_there() -> None:
    assert {line.split()[0] for line in BY_RULE} == {str(rule) for rule in range(1, 15)}


def test_every_attack_is_in_the_table() -> None:
    known = {name for tests in TABLE.values() for name in tests}
    attacks = {name for path in HERE for name in functions_of(path)}
    assert attacks <= known


def test_every_rule_that_can_be_switched_off_is_switched_off() -> None:
    text = "".join(path.read_text() for path in HERE)
    assert all(f'"{name}"' in text for name in RULES)
