"""The command line as a whole: exit codes, one line for an error, no traceback unless asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lamina

COMMANDS = ["calibrate", "sensitivities", "plan", "pareto", "show", "apply", "bench", "verify", "measure", "cache", "demo"]


def lamina_process(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The installed script, as a shell would start it."""
    script = Path(sys.executable).with_name("lamina")
    return subprocess.run([script, *words], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_installed_script_lists_every_command_and_python_m_is_the_same(here: Path) -> None:
    ran = lamina_process("--help", folder=here)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(f" {name} " in ran.stdout for name in COMMANDS)
    again = subprocess.run([sys.executable, "-m", "lamina", "--version"], cwd=here, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"lamina {lamina.__version__}\n", "")


def test_the_installed_script_fails_with_1_and_one_line(here: Path) -> None:
    ran = lamina_process("show", "gone.json", folder=here)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.startswith("error: gone.json: not a readable plan")


STRAY = """
import ctypes, sys
from lamina import cli
app = cli.app
def stray(**words):
    ctypes.CDLL(None).puts(b"Solver::run")
    return app(**words)
cli.app = stray
print("before", flush=False)
sys.exit(cli.main(["cache", "show", "--json"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its C library has another name")
def test_what_compiled_code_prints_stands_beside_what_a_command_prints(here: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", STRAY], cwd=here, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "Solver::run\n")
    first, rest = ran.stdout.split("\n", 1)
    assert first == "before" and isinstance(json.loads(rest), dict | list)


@pytest.mark.parametrize("words", [[name] for name in COMMANDS if name != "demo"] + [["cache", "show"], ["cache", "clear"]])
def test_every_command_has_help(run, words: list[str]) -> None:
    ran = run(*words, "--help")
    assert ran.code == 0 and ran.err == "" and "Usage: lamina" in ran.out


WRONG = {
    "no command": ([], "lamina: Missing command;"),
    "unknown command": (["plna"], "lamina: No such command 'plna'"),
    "unknown option": (["show", "a.json", "--jsno"], "lamina show: No such option: --jsno"),
    "missing argument": (["plan"], "lamina plan: Missing argument 'MODEL'"),
    "missing option": (["plan", "small_nets:net", "--ratio", "2"], "lamina plan: Missing option '--input'"),
    "one argument too many": (["show", "a", "b", "c"], "lamina show: Got unexpected extra argument"),
    "unknown part of cache": (["cache", "burn"], "lamina cache: No such command 'burn'"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_2_and_one_line_that_points_to_the_help(run, words: list[str], message: str) -> None:
    complaint = run(*words).complaint(2)
    assert complaint.startswith(message) and complaint.endswith("--help")


UNTIMED = ("--input", "2,4", "--ratio", "2", "--rule", "at-ratio")


def test_a_bug_is_one_line_and_its_traceback_comes_only_with_debug(run, plan_file: Path, monkeypatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr(lamina.Plan, "load", bug)
    assert run("show", plan_file).complaint(1) == "unexpected: ZeroDivisionError: a bug of two lines; run again with --debug"
    for words in (["--debug", "show", plan_file], ["show", plan_file, "--debug"], ["show", "--debug", plan_file]):
        ran = run(*words)
        assert ran.code == 1 and "Traceback" in ran.err and "in bug" in ran.err
        assert ran.err.splitlines()[-1].startswith("unexpected: ZeroDivisionError")


def test_an_error_shows_its_traceback_with_debug(run) -> None:
    ran = run("show", "gone.json", "--debug")
    assert ran.code == 1 and "Traceback" in ran.err and ran.err.splitlines()[-1].startswith("error: gone.json")


def test_an_interrupt_is_130_and_says_so_in_a_line(run, plan_file: Path) -> None:
    ran = run("plan", "small_nets:interrupted", *UNTIMED)
    assert ran.complaint(130).startswith("interrupted; the times of layers taken so far are kept")
    shown = run("apply", "small_nets:interrupted", plan_file, "-o", "out")
    assert shown.complaint(130) == "interrupted"


def test_a_network_that_prints_does_not_spoil_the_json(run) -> None:
    ran = run("plan", "small_nets:loud", "--input", "1,4,6,6", "--ratio", "2", "--rule", "at-ratio", "--json")
    assert ran.json["goal"] == {"value": 2.0, "goal": "ratio"}
    assert ran.err == "a network that prints\n"


def test_a_reader_that_goes_away_is_no_traceback(plan_file: Path) -> None:
    script = Path(sys.executable).with_name("lamina")
    with subprocess.Popen([script, "show", plan_file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) == 1


def test_a_terminal_without_arrows_does_not_stop_the_work(plan_file: Path) -> None:
    ran = subprocess.run(
        [Path(sys.executable).with_name("lamina"), "show", plan_file],
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode == 0 and b"Conv2d 4?24" in ran.stdout
