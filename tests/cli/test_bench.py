"""`lamina bench`: a comparison with its conditions, and saved networks that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

QUICK = ("--seconds", "0.001", "--input", "2,4,6,6")


def test_the_result_stands_beside_its_conditions(run, saved: Path) -> None:
    ran = run("bench", "small_nets:net", saved, *QUICK)
    assert ran.code == 0 and "×" in ran.out.splitlines()[0]
    assert "on 2×4×6×6; cpu" in ran.out and "1 threads, float32, contiguous, inference" in ran.out


def test_as_json_it_holds_times_interval_and_setting(run, saved: Path) -> None:
    words = ("--mode", "training", "--channels-last", "--threads", "2")
    found = run("bench", "small_nets:net", saved, *QUICK, *words, "--json").json
    assert found["interval"][0] <= found["speedup"] <= found["interval"][1]
    setting = found["setting"]
    assert (setting["mode"], setting["memory_format"], setting["threads"]) == ("training", "channels_last", 2)


def test_several_workloads_are_compared_by_their_weighted_sum(run, saved: Path) -> None:
    found = run("bench", "small_nets:net", saved, *QUICK, "--input", "1,4,6,6@3", "--json").json
    assert found["example"] == "2×4×6×6 and 1×4×6×6"


def flipped(folder: Path) -> None:
    weights = next(folder.glob("model-*"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)


DAMAGES = {
    "cut short": (lambda f: next(f.glob("model-*")).write_bytes(next(f.glob("model-*")).read_bytes()[:-9]), "is damaged"),
    "one bit flipped": (flipped, "is damaged: its content is not what was saved"),
    "no weights": (lambda f: next(f.glob("model-*")).unlink(), "it has no model-"),
    "no plan": (lambda f: (f / "plan.json").unlink(), "it has no plan.json"),
    "a truncated plan": (lambda f: (f / "plan.json").write_text((f / "plan.json").read_text()[:99]), "not a readable plan"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_one_line(run, saved: Path, damage, message: str) -> None:
    damage(saved)
    before = {path: path.read_bytes() for path in saved.iterdir()}
    assert message in run("bench", "small_nets:net", saved, *QUICK).complaint(1)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


def test_a_hubs_folder_that_is_no_saved_network_is_one_line(run, here: Path) -> None:
    (here / "hub").mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (here / "hub" / name).write_text("{}")
    said = run("bench", "small_nets:net", "hub", *QUICK).complaint(1)
    assert "hub is not a saved network: it has no plan.json" in said


def test_a_missing_folder_another_network_and_another_dtype_are_one_line_each(run, saved: Path) -> None:
    assert "gone is not a saved network" in run("bench", "small_nets:net", "gone", *QUICK).complaint(1)
    assert "made for another network" in run("bench", "small_nets:wider", saved, *QUICK).complaint(1)
    assert "convert the base model" in run("bench", "small_nets:net", saved, *QUICK, "--dtype", "float64").complaint(1)
    assert "does not run on the example" in run("bench", "small_nets:net", saved, "--input", "2,5,6,6").complaint(1)


def test_a_training_step_under_the_freezing_of_the_training_is_compared(run, saved: Path) -> None:
    words = ("bench", "small_nets:net", saved, *QUICK, "--mode", "training")
    assert run(*words, "--freezing", "sequential", "--json").json["setting"]["freezing"].startswith("sequential")
    assert run(*words, "--json").json["setting"]["freezing"] == "off"
