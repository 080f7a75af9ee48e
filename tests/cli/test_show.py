"""`lamina show`: a plan as it was written, what differs between two, and files that are no plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lamina


def test_a_plan_is_printed_as_it_prints_in_python(run, plan_file: Path) -> None:
    assert run("show", plan_file).out == f"{lamina.Plan.load(plan_file)}\n"


def test_as_json_it_is_the_plan(run, plan_file: Path) -> None:
    assert run("show", plan_file, "--json").json == json.loads(plan_file.read_text())


def test_of_two_plans_the_layers_that_differ_are_shown(run, plan_file: Path, here: Path) -> None:
    plan = lamina.Plan.load(plan_file)
    edited = plan.with_form("7", lamina.LowRank(1))
    edited.save(here / "edited.json")
    assert run("show", plan_file, "edited.json").out == f"7: {plan.layers['7'].form} | rank 1\n"
    assert run("show", plan_file, "edited.json", "--json").json == {"layers": {"7": [str(plan.layers["7"].form), "rank 1"]}}
    assert run("show", plan_file, plan_file).out == "no layer differs\n"


DAMAGES = {
    "truncated": (lambda text: text[: len(text) // 2], "not a readable plan"),
    "no plan": (lambda text: "[]", "not a plan: it has no format number"),
    "newer": (lambda text: text.replace('"format": 1', '"format": 9', 1), "made by a newer lamina (format 9"),
    "tampered form": (lambda text: text.replace('"low_rank"', '"lower_rank"', 1), "lower_rank"),
    "tampered rank": (lambda text: text.replace('"rank": ', '"rank": 99', 1), "is not between 1 and"),
    "unknown field": (lambda text: text.replace('"format": 1', '"format": 1, "more": 2', 1), "more"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_plan_is_one_line_that_names_the_file(run, plan_file: Path, damage, message: str) -> None:
    damaged = damage(plan_file.read_text())
    assert damaged != plan_file.read_text()
    plan_file.write_text(damaged)
    complaint = run("show", plan_file).complaint(1)
    assert str(plan_file) in complaint and message in complaint
    assert plan_file.read_text() == damaged


def test_a_missing_plan_is_one_line(run) -> None:
    assert "gone.json: not a readable plan" in run("show", "gone.json").complaint(1)
