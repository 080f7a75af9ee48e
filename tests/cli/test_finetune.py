"""`lamina finetune`: a saved network goes in, a tuned one comes out; data, loss and score are functions of the user's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

DATA = """
import torch
import torch.nn.functional as F

def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 4, 6, 6, generator=generator), torch.randint(0, 8, (4,), generator=generator)) for _ in range(3)]

def squares(output, target):
    return F.mse_loss(output, F.one_hot(target, 8).float())

def score(model):
    return -sum(float(squares(model(x), y)) for x, y in loader())

asked = []

def worse(model):
    asked.append(model)
    return -len(asked)

def broken():
    raise OSError("no such disk")

number = 3
"""


@pytest.fixture
def data(here: Path):
    (here / "my_data.py").write_text(DATA)
    yield "my_data:loader"
    sys.modules.pop("my_data", None)


def test_the_tuned_network_is_saved_and_what_rested_is_as_it_was(run, saved: Path, data: str) -> None:
    words = ("--data", data, "--loss", "my_data:squares", "--score", "my_data:score", "--freezing", "vanilla", "--epochs", "2")
    found = run("finetune", "small_nets:net", saved, "-o", "tuned", *words, "--json").json
    assert (found["folder"], found["training"]["steps"], found["training"]["stopped"]) == ("tuned", 6, "finished")
    first, last = found["training"]["epochs"]
    assert last["score"] > first["score"]
    before, after = (load_file(next(folder.glob("model-*"))) for folder in (saved, saved.parent / "tuned"))
    resting = set(last["resting"])
    assert resting
    for name in before:
        assert before[name].equal(after[name]) == (name in resting), name


def test_the_same_seed_gives_the_same_network_and_a_line_an_epoch(run, saved: Path, data: str) -> None:
    words = ("--data", data, "--teacher", "--temperature", "3", "--feature", "2", "--optimizer", "adamw", "--clip", "1")
    for folder in ("one", "two"):
        ran = run("finetune", "small_nets:net", saved, "-o", folder, *words, "--seed", "5")
        assert ran.code == 0, ran.err
        assert ran.out.count("weights at rest") == 3 and f"{folder}: " in ran.out
    # Tensors, not files: safetensors writes its metadata in any order.
    one, two = (load_file(next((saved.parent / folder).glob("model-*"))) for folder in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_goes_on_from_its_checkpoints(run, saved: Path, data: str) -> None:
    words = ("finetune", "small_nets:net", saved, "--data", data, "--checkpoints", "kept", "--every", "1", "--json")
    first = run(*words, "-o", "one").json["training"]
    again = run(*words, "-o", "two").json["training"]
    assert first["resumed_at"] is None and again["resumed_at"] == first["steps"] == 9
    assert again["epochs"] == first["epochs"]
    assert "already finished: nothing was left to do" in run(*words[:-1], "-o", "three").out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("model-*")))


@pytest.mark.parametrize("keeping", [(), ("--checkpoints", "kept")], ids=["in memory", "with checkpoints"])
def test_with_a_score_the_best_network_is_saved_and_said(run, saved: Path, data: str, keeping) -> None:
    """The first of three is the best; it is what a training of three epochs was after the first."""
    plain = ("finetune", "small_nets:net", saved, "--data", data, "--rate", "0.1")
    words = (*plain, "--score", "my_data:worse", *keeping)
    found = run(*words, "-o", "best", "--json").json
    assert (found["epoch"], len(found["training"]["epochs"])) == (0, 3)
    last = run(*plain, "-o", "last", "--json").json
    assert last["epoch"] == 2
    best, last = weights(saved.parent / "best"), weights(saved.parent / "last")
    assert not all(torch.equal(best[name], last[name]) for name in best)
    if keeping:
        assert all(torch.equal(tensor, best[name]) for name, tensor in weights(Path("kept/best")).items())
        again = run(*words, "-o", "again")
        assert "again: " in again.out and "the network as after epoch 1" in again.out
        assert all(torch.equal(tensor, best[name]) for name, tensor in weights(saved.parent / "again").items())


def test_a_folder_that_cannot_be_written_is_found_before_anything_else(run, saved: Path) -> None:
    (saved.parent / "file").touch()
    (saved.parent / "full").mkdir()
    (saved.parent / "full" / "other").touch()
    for output, why in (("file", "is a file"), ("file/inside", "cannot be written"), ("full", "holds other files")):
        assert why in run("finetune", "small_nets:net", saved, "-o", output, "--data", "nowhere:loader").complaint(1)


IDLE = {
    "a period of nothing": (("--freezing", "vanilla", "--period", "2"), "--period"),
    "unfrozen what always trains": (("--freezing", "none", "--unfrozen-last", "0"), "--unfrozen-last"),
    "a share of no answers": (("--distill-weight", "0.5"), "--teacher"),
    "a temperature of no answers": (("--temperature", "2"), "--teacher"),
    "features of nobody": (("--feature", "0"), "--teacher"),
    "checkpoints nowhere": (("--every", "3"), "--checkpoints"),
}


@pytest.mark.parametrize(("words", "message"), IDLE.values(), ids=IDLE)
def test_an_option_without_effect_is_refused(run, saved: Path, words, message: str) -> None:
    assert message in run("finetune", "small_nets:net", saved, "-o", "tuned", "--data", "nowhere:loader", *words).complaint(2)


WRONG = {
    "no such module": (("--data", "nowhere:loader"), "nowhere cannot be imported"),
    "no such function": (("--data", "my_data:lader"), "has no lader; did you mean loader"),
    "no function": (("--data", "my_data:number"), "it must be a function"),
    "it fails": (("--data", "my_data:broken"), "OSError: no such disk"),
    "no such loss": (("--data", "my_data:loader", "--loss", "torch.nn.functional:cross"), "has no cross"),
    "a share above one": (("--data", "my_data:loader", "--teacher", "--distill-weight", "2"), "between 0 and 1"),
    "all epochs unfrozen": (("--data", "my_data:loader", "--unfrozen-last", "3"), "would freeze nothing"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_line_and_nothing_is_saved(run, saved: Path, data: str, words, message: str) -> None:
    assert message in run("finetune", "small_nets:net", saved, "-o", "tuned", *words).complaint(1)
    assert not (saved.parent / "tuned").exists()


def test_wrong_use_is_code_two(run, saved: Path, data: str) -> None:
    assert "--epochs" in run("finetune", "small_nets:net", saved, "-o", "tuned", "--data", data, "--epochs", "0").complaint(2)
    assert "--data" in run("finetune", "small_nets:net", saved, "-o", "tuned").complaint(2)
