"""Colour is for a terminal: what is piped, and what is asked to be plain, holds no escape."""

from __future__ import annotations

import pytest

from lamina.cli.colours import say

TEXT = """note: plan again
WARNING: outputs change by 0.4
whole network: ×1.66 (95 % between 1.60 and 1.71), before ×0.93
conv1 [3, 64] :smile:"""


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_piped_is_as_it_is_written(capsys: pytest.CaptureFixture[str], beside: bool) -> None:
    say(TEXT, beside=beside)
    found = capsys.readouterr()
    assert (found.err if beside else found.out) == TEXT + "\n"
    assert (found.out if beside else found.err) == ""


def test_a_terminal_sees_gains_losses_and_warnings_in_colours_and_every_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    say(TEXT)
    out = capsys.readouterr().out
    green, red, yellow = "\x1b[1;32m", "\x1b[1;31m", "\x1b[1;33m"
    assert f"{green}×1.66" in out and f"{red}×0.93" in out and f"{yellow}WARNING:" in out and f"{yellow}note:" in out
    plain = out
    for code in (green, red, yellow, "\x1b[2m", "\x1b[0m"):
        plain = plain.replace(code, "")
    assert plain == TEXT + "\n"  # no line is broken anew, no bracket is markup


def test_who_wants_no_colour_gets_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    say(TEXT)
    assert capsys.readouterr().out == TEXT + "\n"
