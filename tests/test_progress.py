"""One display of how far the work is, on stderr."""

from __future__ import annotations

import pytest

from lamina import progress
from lamina.progress import display


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def test_without_a_bar_nothing_is_shown_and_all_is_gone_through(capsys: pytest.CaptureFixture[str]) -> None:
    with display(False) as shown:
        assert list(shown.through([3, 1, 2], "counting")) == [3, 1, 2]
        shown.say("scoring", 4, None, "best 0.5")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("screen")
def test_it_is_drawn_on_stderr_and_what_is_printed_meanwhile_stays_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with display(True) as shown:
        for item in shown.through([1, 2], "counting"):
            print("item", item)
            shown.bar.refresh()
    said, drawn = capsys.readouterr()
    assert said == "item 1\nitem 2\n"
    assert "counting" in drawn and "0/2" in drawn and "1/2" in drawn


@pytest.mark.usefixtures("screen")
def test_numbers_stand_beside_work_whose_end_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with display(True) as shown:
        shown.say("scoring", 4, None, "best 0.5")
        shown.bar.refresh()
    drawn = capsys.readouterr().err
    assert "scoring" in drawn and "4/?" in drawn and "best 0.5" in drawn


@pytest.mark.usefixtures("screen")
@pytest.mark.parametrize(("what", "done"), [("epoch 2/2", 0), ("epoch 2/2", 2), ("epoch 1/2", 0)], ids=str)
def test_a_piece_of_work_after_one_that_ended_begins_anew(what: str, done: int) -> None:
    with display(True) as shown:
        shown.say("epoch 1/2", 0, 3)
        shown.say("epoch 1/2", 3, 3)
        assert shown.bar.finished
        shown.say(what, done, 3)
        (task,) = shown.bar.tasks
    assert (task.description, task.completed, task.finished) == (what, done, False)


@pytest.mark.usefixtures("screen")
def test_a_piece_of_work_that_goes_on_is_one() -> None:
    with display(True) as shown:
        tasks = set()
        for done in (0, 0, 1, 3):
            shown.say("counting", done, 3, f"at {done}")
            (task,) = shown.bar.tasks
            tasks.add(task.id)
    assert len(tasks) == 1 and (task.completed, task.fields["numbers"]) == (3, "at 3")


def test_without_a_terminal_each_long_piece_of_work_is_a_line_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with display(True) as shown:
        assert shown.bar is None
        for done in range(4):  # within the first seconds: not a word
            shown.say("looking", done, 4)
            now += 1
        assert capsys.readouterr() == ("", "")
        for _ in shown.through(range(12), "timing"):
            now += 5
        shown.say("scoring", 3, None)
        now += 1
        shown.say("scoring", 4, None)
    assert capsys.readouterr().err.splitlines() == [
        "    9 s  timing: 1 of 12, about 55 s left",
        "   29 s  timing: 5 of 12, about 35 s left",
        "   49 s  timing: 9 of 12, about 15 s left",
        "   64 s  scoring",
    ]


def test_each_piece_of_work_goes_to_the_log_shown_or_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lamina"), display(False) as shown:
        for _ in shown.through(range(3), "timing layers"):
            pass
        shown.say("scoring", 0, None)
    assert [record.message for record in caplog.records] == ["timing layers", "scoring"]
