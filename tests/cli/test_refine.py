"""`lamina refine`: a saved network and a function that gives unlabelled batches go in, a refined one comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lamina

DATA = """
import torch

def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 6, 6, generator=generator) for _ in range(8)]
"""


@pytest.fixture
def data(here: Path):
    (here / "my_images.py").write_text(DATA)
    yield "my_images:batches"
    sys.modules.pop("my_images", None)


def test_the_refined_network_is_saved_and_the_same_seed_gives_it_again(run, saved: Path, data: str) -> None:
    words = ("--data", data, "--outputs", "categorical", "--steps", "20", "--rate", "0.003", "--seed", "4")
    told = run("refine", "small_nets:net", saved, "-o", "one", *words, "--json").json
    assert told["folder"] == "one" and told["refinement"]["steps"] == 20 and told["refinement"]["kept"]
    ran = run("refine", "small_nets:net", saved, "-o", "two", *words)
    assert ran.code == 0 and "20 steps on 24 items" in ran.out and "two: " in ran.out
    one, two = (load_file(next((saved.parent / folder).glob("model-*"))) for folder in ("one", "two"))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    (refined,) = lamina.Plan.load(saved.parent / "one" / "plan.json").factors.refined
    assert (refined.steps, refined.seed) == (20, 4)


def test_a_refined_plan_is_not_applied_anew(run, saved: Path, data: str) -> None:
    assert run("refine", "small_nets:net", saved, "-o", "one", "--data", data, "--steps", "20", "--rate", "0.003").code == 0
    assert "were refined" in run("apply", "small_nets:net", saved.parent / "one" / "plan.json", "-o", "new").complaint(1)


WRONG = {
    "another network": (("small_nets:wider",), 1, "another network"),
    "no such function": (("small_nets:net", "--data", "my_images:batchez"), 1, "has no batchez"),
    "no minutes": (("small_nets:net", "--minutes", "0"), 1, "minutes is 0.0; it must be a positive number"),
    "answers of no kind": (("small_nets:net", "--outputs", "none"), 1, "tell how far two answers lie apart"),
    "no steps": (("small_nets:net", "--steps", "0"), 2, "--steps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line(run, saved: Path, data: str, case: str) -> None:
    (model, *words), code, message = WRONG[case]
    given = () if "--data" in words else ("--data", data)
    assert message in run("refine", model, saved, "-o", "out", *given, *words).complaint(code)
