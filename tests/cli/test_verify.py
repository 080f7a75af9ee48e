"""`lamina verify`: every promise a line; 1 where one does not hold."""

from __future__ import annotations

from pathlib import Path

from lamina.cli import verify as room
from lamina.verification import Check, Verification


def test_a_sound_network_passes_every_check(run, saved: Path) -> None:
    ran = run("verify", "small_nets:net", saved, "--input", "2,4,6,6")
    assert ran.code == 0 and ran.err == ""
    change, *promises = ran.out.splitlines()
    assert "outputs change by" in change
    assert all(line.startswith("passed") for line in promises) and len(promises) > 8
    result = run("verify", "small_nets:net", saved, "--input", "2,4,6,6", "--json").json
    assert all(check["passed"] for check in result["checks"])
    assert f"{result['change']:.2g}" in change


def test_a_broken_promise_is_printed_named_and_fails(run, saved: Path, monkeypatch) -> None:
    found = Verification((Check("it runs", True), Check("it is exact", False, "off by 2")))
    monkeypatch.setattr(room, "check", lambda *_, **__: found)
    ran = run("verify", "small_nets:net", saved, "--input", "2,4,6,6")
    assert (ran.code, ran.out) == (1, f"{found}\n")
    assert ran.err == "error: 1 of 2 promises do not hold: it is exact\n"
