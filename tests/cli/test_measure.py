"""`lamina measure`: the file holds what a plan would ask for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lamina import Dense
from lamina.cli.options import RuntimeName
from lamina.measure import layer_times
from lamina.measure.table import TimingTable, default_path, kept

from ..told import Told, instead_of_the_clock

MEASURE = ("measure", "small_nets:net", "--input", "2,4,6,6", "-o", "times.json")


def test_a_plan_by_the_file_times_nothing_more(run, here: Path, monkeypatch) -> None:
    said = run(*MEASURE, "--ratio", "2", "--ratio", "3", "--json").json
    content = json.loads((here / "times.json").read_text())
    number = len(content["dense"]) + len(content["timings"])
    assert said == {"file": "times.json", "times": number, "setting": content["setting"]}
    assert said["times"] > 4

    def forbidden(*_: object) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr(layer_times, "measure_forms", forbidden)
    for ratio in ("2", "3"):
        words = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", ratio, "--timings", "times.json")
        assert run(*words, "--no-never-slower").code == 0


def test_a_training_under_a_freezing_is_planned_by_what_was_measured_under_it(run, here: Path, monkeypatch) -> None:
    words = ("--include", "5", "--mode", "training", "--freezing", "sequential")
    said = run(*MEASURE, *words, "--json").json
    assert said["setting"]["mode"] == "training" and said["setting"]["freezing"].startswith("sequential")

    def forbidden(*_: object) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr(layer_times, "measure_forms", forbidden)
    plan = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--timings", "times.json", "--no-never-slower")
    assert run(*plan, *words).code == 0
    assert "timed again" in run(*plan, *words[:4]).err  # a step in which nothing rests is another one
    assert "--freezing is for --mode training" in run(*MEASURE, "--freezing", "sequential").err


def test_the_times_are_kept_in_the_table_too(run, here: Path) -> None:
    said = run(*MEASURE, "--include", "5", "--json").json
    with TimingTable(default_path()) as table:
        assert len(table) == said["times"]


def test_the_file_holds_the_times_of_this_run_alone(run, here: Path) -> None:
    alone = run(*MEASURE, "--include", "5", "--json").json["times"]
    assert run(*MEASURE, "--json").json["times"] > alone
    assert run(*MEASURE, "--include", "5", "--json").json["times"] == alone


@pytest.mark.parametrize("words", [["--skip", "*"], ["--ratio", "1e9"]], ids=" ".join)
def test_where_no_layer_is_to_be_timed_nothing_is_written(run, here: Path, words: list[str]) -> None:
    assert "nothing was timed" in run(*MEASURE, *words).complaint(1)
    assert not (here / "times.json").exists()


def test_the_result_is_not_written_to_a_file_named_like_stdout(run, here: Path) -> None:
    assert "name a file" in run(*MEASURE, "-o", "-").complaint(1)
    assert not (here / "-").exists()


def test_an_interrupted_measurement_says_that_its_times_are_kept_and_goes_on_from_them(run, here: Path, monkeypatch) -> None:
    measure, batches = layer_times.measure_forms, []

    def interrupted(*words: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(words)
        return measure(*words)

    monkeypatch.setattr(layer_times, "measure_forms", interrupted)
    assert run(*MEASURE).complaint(130).startswith("interrupted; the times of layers taken so far are kept")
    assert kept(default_path())[0] > 0 and not (here / "times.json").exists()
    monkeypatch.setattr(layer_times, "measure_forms", lambda *words: batches.append(words) or measure(*words))
    assert run(*MEASURE).code == 0
    asked = [(str(layer.geometry), form) for layer, forms, *_ in batches for form in forms if form != Dense()]
    assert len(asked) == len(set(asked))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT here")
def test_a_measurement_that_the_keyboard_interrupts_keeps_its_times(here: Path) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *MEASURE], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1), done.stderr
    assert done.stderr.startswith("interrupted; the times of layers taken so far are kept")
    assert kept(default_path())[0] > 0 and not (here / "times.json").exists()


# The signal comes from within, at a moment that is always the same: from outside, it may meet a finaliser, in which Python can
# do no more than print it.
INTERRUPTED = """
import os, signal, sys
from lamina.cli import main
from lamina.measure import layer_times

measure, batches = layer_times.measure_forms, []
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests in the background has it ignored

def interrupted(*words):
    batches.append(measure(*words))
    if len(batches) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return batches[-1]

layer_times.measure_forms = interrupted
sys.exit(main())
"""


def test_an_output_that_cannot_be_written_is_said_before_anything_is_timed(run) -> None:
    assert "there is no folder gone" in run(*MEASURE, "-o", "gone/times.json").complaint(1)
    assert not default_path().exists()


def test_what_a_rule_of_the_spectrum_asks_for_is_measured(run, here: Path) -> None:
    assert run(*MEASURE, "--ratio", "1", "--rule", "energy:0.5").code == 0
    words = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "1", "--rule", "energy:0.5", "--timings", "times.json")
    assert run(*words, "--no-never-slower").code == 0


def test_a_rule_that_times_nothing_has_nothing_to_measure(run) -> None:
    assert "AtRatio() times nothing" in run(*MEASURE, "--rule", "at-ratio").complaint(2)


def test_what_is_measured_for_a_runtime_is_timed_in_it(run, here: Path, monkeypatch) -> None:
    instead_of_the_clock(monkeypatch)
    monkeypatch.setattr(RuntimeName.openvino, "make", Told)
    said = run(*MEASURE, "--runtime", "openvino", "--json").json
    assert said["setting"]["runtime"] == "told" and said["times"] > 4
    for command in (("sensitivities",), ("plan", "--speedup", "1.2"), ("pareto", "--speedup", "1.2")):
        words = (command[0], "small_nets:net", "--input", "2,4,6,6", *command[1:], "--runtime", "openvino")
        found = run(*words, "--json")
        assert found.code == 0 and "told" in found.out, found
