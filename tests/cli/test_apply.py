"""`lamina apply`: what is saved is what the library would save; a plan or folder that does not fit leaves all as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lamina


def test_the_saved_network_is_what_decompose_gives(run, plan_file: Path, here: Path) -> None:
    ran = run("apply", "small_nets:net", plan_file, "-o", "out/deep")
    assert ran.code == 0 and ran.out.startswith("out/deep: ")
    small = lamina.decompose(lamina.load_model("small_nets:net"), lamina.Plan.load(plan_file))
    again = lamina.load(lamina.load_model("small_nets:net"), here / "out" / "deep").eval()
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(again(x), small.eval()(x))


def test_it_says_what_was_saved(run, plan_file: Path, here: Path) -> None:
    said = run("apply", "small_nets:net", plan_file, "-o", "out", "--json").json
    plan = lamina.Plan.load(plan_file)
    files = sum(path.stat().st_size for path in (here / "out").iterdir())
    assert (said["folder"], said["bytes"], said["decomposed"]) == ("out", files, len(plan.decomposed))


def test_with_an_example_it_counts_before_and_after(run, plan_file: Path) -> None:
    said = run("apply", "small_nets:net", plan_file, "-o", "out", "--input", "2,4,6,6", "--json").json
    whole = lamina.Plan.load(plan_file).whole
    assert whole is not None
    for side, expected in (("before", whole.before), ("after", whole.after)):
        assert (said[side]["parameters"], said[side]["macs"]) == (expected.parameters, expected.macs)


def test_weights_from_a_file_and_a_dtype_are_those_that_are_factorised(run, plan_file: Path, here: Path) -> None:
    model = lamina.load_model("small_nets:net")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.save(model.state_dict(), here / "trained.pt")
    assert run("apply", "small_nets:net", plan_file, "-o", "out", "--weights", "trained.pt", "--dtype", "float64").code == 0
    small = lamina.decompose(model.double(), lamina.Plan.load(plan_file))
    stored = load_file(next((here / "out").glob("model-*")))
    assert stored.keys() == small.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in small.state_dict().items())


REFUSED = {
    "a plan of another network": ("small_nets:wider", "plan.json", "out", "7: a Linear 16→9"),
    "a NaN weight": ("small_nets:nan", "plan.json", "out", "2: 9 of its 5184 weights are NaN"),
    "no plan": ("small_nets:net", "gone.json", "out", "gone.json: not a readable plan"),
    "a folder with other files": ("small_nets:net", "plan.json", ".", "holds other files"),
    "a file in the folder's place": ("small_nets:net", "plan.json", "plan.json", "plan.json"),
    "a folder below a file": ("small_nets:net", "plan.json", "plan.json/out", "cannot be written"),
}


@pytest.mark.parametrize(("model", "plan", "output", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line_and_changes_no_file(
    run, plan_file: Path, here: Path, model: str, plan: str, output: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in here.glob("*.*")}
    assert message in run("apply", model, plan, "-o", output).complaint(1)
    assert {path: path.read_bytes() for path in here.glob("*.*")} == before
    assert not (here / "out").exists()


def test_a_refused_network_leaves_an_earlier_folder_as_it_was(run, saved: Path, plan_file: Path) -> None:
    before = {path: path.read_bytes() for path in saved.iterdir()}
    run("apply", "small_nets:wider", plan_file, "-o", saved).complaint(1)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
