"""`lamina apply`: what is saved is what the library would save; a plan or folder that does not fit leaves all as it was."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamina
from lamina.answers import change
from lamina.examples import example_from


def test_the_saved_network_is_what_decompose_gives(run, plan_file: Path, here: Path) -> None:
    ran = run("apply", "small_nets:net", plan_file, "-o", "out/deep")
    assert ran.code == 0 and "out/deep: " in ran.out
    small = lamina.decompose(lamina.load_model("small_nets:net"), lamina.Plan.load(plan_file))
    again = lamina.load(lamina.load_model("small_nets:net"), here / "out" / "deep").eval()
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(again(x), small.eval()(x))


def change_on(plan_file: Path, fed: list[lamina.Workload]) -> float | None:
    model, plan = lamina.load_model("small_nets:net"), lamina.Plan.load(plan_file)
    return change(model, lamina.decompose(model, plan), fed)


def test_without_an_example_it_says_by_how_much_the_outputs_change_on_inputs_made_like_the_plans(run, plan_file: Path) -> None:
    (shape,) = lamina.Plan.load(plan_file).examples or ()
    expected = change_on(plan_file, [example_from(shape, lamina.load_model("small_nets:net"))])
    ran = run("apply", "small_nets:net", plan_file, "-o", "out", "--json").json
    assert ran["change"] == pytest.approx(expected) and ran["on"] == "inputs made like the plan's example"
    said = run("apply", "small_nets:net", plan_file, "-o", "out").out
    assert f"outputs change by {ran['change']:.2g} of their size on inputs made like the plan's example" in said


def test_a_large_change_is_the_first_that_it_says(run, more_nets: None) -> None:
    words = ("--input", "2,16", "--ratio", "6", "--rule", "at-ratio")
    assert run("plan", "more_nets:bare", *words, "-o", "plan.json").out.startswith("WARNING: ")
    ran = run("apply", "more_nets:bare", "plan.json", "-o", "out", *words[:2])
    assert ran.out.startswith("WARNING: outputs change by ") and ran.out.splitlines()[1].startswith("out: ")


MORE = """
import torch
from torch import nn
from small_nets import net

def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))

class Many(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x):
        return 1000 * x, self.inner(x)
"""


@pytest.fixture
def more_nets(here: Path) -> Iterator[None]:
    (here / "more_nets.py").write_text(MORE)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("more_nets", None)


def test_the_change_is_that_of_all_outputs_together(run, more_nets: None) -> None:
    words = ("more_nets:Many", "--input", "2,4,6,6")
    assert run("plan", *words, "--ratio", "6", "--rule", "at-ratio", "-o", "plan.json").code == 0
    ran = run("apply", words[0], "plan.json", *words[1:], "-o", "out", "--json").json
    assert 0 < ran["change"] < 0.01 and ran["on"] == "the example"


def test_what_the_plan_warns_of_stands_first_where_random_inputs_or_none_say_nothing_else(run, here: Path) -> None:
    words = ("--input", "2,4,6,6", "--ratio", "6", "--rule", "at-ratio")
    assert run("plan", "small_nets:net", *words, "-o", "plan.json").code == 0
    told = run("apply", "small_nets:net", "plan.json", "-o", "out").out.splitlines()
    assert told[0] == lamina.Plan.load(here / "plan.json").warning and told[2].startswith("outputs change by ")
    plan = lamina.Plan.load(here / "plan.json").model_copy(update={"examples": None})
    plan.save(here / "plan.json")
    ran = run("apply", "small_nets:net", "plan.json", "-o", "out")
    assert ran.out.splitlines()[0] == plan.warning != "" and "outputs change" not in ran.out


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


# ---- weights in many files ----


@pytest.fixture
def big(here: Path) -> Path:
    """Other weights of ``small_nets:net`` in two files with an index."""
    state = lamina.load_model("small_nets:net").state_dict()
    names, files = sorted(state), ("a.safetensors", "b.safetensors")
    for number, file in enumerate(files):
        (here / "big").mkdir(exist_ok=True)
        save_file({name: state[name] + 0.125 for name in names[number::2]}, here / "big" / file)
    named = {name: files[number % 2] for number, name in enumerate(names)}
    (here / "big" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return here / "big"


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("weights", ["big", "big/model.safetensors.index.json"])
def test_weights_in_many_files_are_read_layer_by_layer_to_the_same_network(
    run, plan_file: Path, big: Path, weights: str
) -> None:
    streamed = run("apply", "small_nets:net", plan_file, "-o", "streamed", "--weights", weights)
    assert streamed.code == 0 and "streamed: " in streamed.out and "outputs change" not in streamed.out
    whole = run("apply", "small_nets:net", plan_file, "-o", "whole", "--weights", weights, "--no-stream")
    assert "outputs change" in whole.out
    here, there = held(big.parent / "streamed"), held(big.parent / "whole")
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    words = ("small_nets:net", "streamed", "--input", "2,4,6,6")
    assert run("show", "streamed/plan.json").out == run("show", plan_file).out
    assert run("verify", *words, "--weights", weights).code == 0


def test_a_single_file_is_read_so_where_it_is_asked_for(run, plan_file: Path, big: Path) -> None:
    save_file(held(big), "single.safetensors")
    assert run("apply", "small_nets:net", plan_file, "-o", "out", "--weights", "single.safetensors", "--stream").code == 0
    assert run("apply", "small_nets:net", plan_file, "-o", "other", "--weights", big).code == 0
    assert held(big.parent / "out").keys() == held(big.parent / "other").keys()
    ran = run("apply", "small_nets:net", plan_file, "-o", "half", "--weights", big, "--dtype", "bfloat16", "--json").json
    assert ran["change"] is None and {tensor.dtype for tensor in held(big.parent / "half").values()} == {torch.bfloat16}


STREAMED = {
    "no weights": (("--stream",), 2, "name their files with --weights"),
    "an example": (("--weights", "big", "--input", "2,4,6,6"), 2, "--input is for a network in memory"),
    "channels last": (("--weights", "big", "--channels-last"), 2, "--channels-last is for a network in memory"),
    "in sequence": (("--weights", "big", "--sequential", "nets:images"), 2, "--sequential is for a network in memory"),
    "no such file": (("--weights", "none.safetensors", "--stream"), 1, "none.safetensors: there is no such file"),
    "a shard is missing": (("--weights", "broken"), 1, "broken/b.safetensors is missing"),
    "a shard is missing, in memory": (("--weights", "broken", "--no-stream"), 1, "broken/b.safetensors is missing"),
}


@pytest.mark.parametrize(("words", "code", "message"), STREAMED.values(), ids=STREAMED)
def test_what_cannot_be_read_layer_by_layer_is_said_in_a_line(
    run, plan_file: Path, big: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    shutil.copytree(big, big.parent / "broken")
    (big.parent / "broken" / "b.safetensors").unlink()
    assert message in run("apply", "small_nets:net", plan_file, "-o", "out", *words).complaint(code)
    assert not (big.parent / "out").exists()


def test_a_network_that_cannot_be_made_without_values_is_said_in_a_line(run, plan_file: Path, big: Path, here: Path) -> None:
    text = "import torch\nfrom small_nets import net\n\ndef valued():\n    torch.ones(1).item()\n    return net()\n"
    (here / "more_nets.py").write_text(text)
    importlib.invalidate_caches()
    said = run("apply", "more_nets:valued", plan_file, "-o", "out", "--weights", big).complaint(1)
    assert "more_nets:valued: " in said and "made under torch.device('meta'), without values" in said
    sys.modules.pop("more_nets", None)
