"""What is printed, and where to."""

import pytest

from fedoppu.simulations.console import FILE_WIDTH, Console

RECORD = {
    "round": 2,
    "cohort": [0, 1, 4],
    "survivors": [0, 1],
    "dropped": 1,
    "bytes_up": 250_000,
    "bytes_down": 1_500,
    "held_out_loss": 1.2345,
}


def test_a_round_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Console(progress=True, table=True).round_done(RECORD, 12)
    out, err = capsys.readouterr()
    assert out == ""
    assert " ".join(err.split()) == (
        "round 2/12 cohort 3 survivors 2 dropped 1 up 0.2 MB down 1.5 kB held-out loss 1.234"
    )


def test_a_round_without_a_loss_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Console(progress=True, table=True).round_done(RECORD | {"held_out_loss": None}, 12)
    assert capsys.readouterr().err.endswith("held-out loss -\n")


SPENT = {
    "rounds": 2,
    "delta": 1.0029e-05,
    "released": 2.3449,
    "server": None,
    "adjacency": "add_remove",
    "peers": 12.0,
}


def test_a_private_round_says_what_is_spent_and_against_whom(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(progress=True, table=True)
    console.round_done(RECORD | {"held_out_loss": None, "privacy": SPENT}, 12)
    assert capsys.readouterr().err.endswith(
        "down 1.5 kB  epsilon 2.35 (members 12, server no bound; delta 1e-05, add or remove one user)\n"
    )


def test_a_cohort_that_is_not_published_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = dict.fromkeys(("cohort", "survivors", "dropped", "bytes_up", "bytes_down"))
    Console(progress=True, table=True).round_done(RECORD | hidden | {"privacy": SPENT}, 12)
    assert capsys.readouterr().err == (
        "  round   2/12  epsilon 2.35 (members 12, server no bound; delta 1e-05, add or remove one user)\n"
    )


def test_steps_pass_results_on_and_say_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Console(progress=True, table=True).steps("groups", "ab", 2)) == ["a", "b"]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "  groups 1/2  about 0 s left"
    assert last == "  groups 2/2"


def test_steps_that_were_done_before_tell_nothing_of_the_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    list(Console(progress=True, table=True).steps("groups", "ab", 9, before=6))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "  groups 7/9  about 20 s left"
    assert second == "  groups 8/9  about 10 s left"


def test_thousands_of_steps_are_told_in_some_hundred_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = list(Console(progress=True, table=True).steps("groups", range(2501), 2501))
    told = capsys.readouterr().err.splitlines()
    assert len(done) == 2501
    assert 200 <= len(told) <= 220
    assert told[0].startswith("  groups 1/2501")
    assert told[-1] == "  groups 2501/2501"


def test_a_round_says_what_is_left_of_the_shared_phase(capsys: pytest.CaptureFixture[str]) -> None:
    Console(progress=True, table=True).round_done(RECORD, 12, left=61.4)
    assert capsys.readouterr().err.endswith("held-out loss 1.234  about 61 s left\n")


def test_a_line_can_be_told_to_who_asked_for_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Console(progress=False, table=False).tell("to go on: [this]")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "to go on: [this]\n")


def test_quiet_still_warns_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(progress=False, table=True)
    console.say("nobody reads this")
    console.warn("a promise is weakened, " * 9)
    err = capsys.readouterr().err
    assert err.startswith("warning: a promise")
    assert err.count("\n") == 1


def test_text_of_users_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Console(progress=True, table=True).say("runs/[bold]x[/bold]")
    assert capsys.readouterr().err == "runs/[bold]x[/bold]\n"


def test_tables_for_a_pipe_are_a_hundred_columns_wide_and_may_be_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert Console(progress=True, table=True).tables.width == FILE_WIDTH
    Console(progress=True, table=False).tables.print("a table")
    assert capsys.readouterr().out == ""
