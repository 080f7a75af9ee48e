"""A checkpoint is there whole or not at all, says what it is of, and is a saved network too."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lamina
from lamina.folder import digest
from lamina.train.checkpoint import FORMAT, STATE, TENSORS, Checkpoints, Content, newest, packed, read, settle, unpacked, write


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))


def decomposed(**forms: lamina.LowRank) -> nn.Module:
    model = network().eval()
    plan = lamina.make_plan(model, torch.zeros(2, 6), lamina.Ratio(1.5), rule=lamina.AtRatio())
    for name, form in ({"l3": lamina.LowRank(2)} | forms).items():
        plan = plan.with_form(name.removeprefix("l"), form)
    return lamina.decompose(model, plan, check=False)


def loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(5)]


def train(folder: Path, small: nn.Module | None = None, **options: Any) -> tuple[nn.Module, lamina.TrainingRecord]:
    small = decomposed() if small is None else small
    arguments = {
        "loss": F.cross_entropy,
        "epochs": 4,
        "freezing": lamina.SequentialFreezing(),
        "checkpoints": Checkpoints(folder, every=2),
    } | options
    return small, lamina.finetune(small, loader(), **arguments)


# Values on disk

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
tensors = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
keys = st.text(max_size=4) | st.integers() | st.tuples(st.integers(), st.booleans())
nested = st.recursive(
    plain | tensors | st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter),
    lambda inside: (
        st.lists(inside, max_size=3) | st.lists(inside, max_size=3).map(tuple) | st.dictionaries(keys, inside, max_size=3)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@settings(deadline=None)
@given(nested)
def test_what_is_taken_apart_comes_together_again(value: Any) -> None:
    taken: dict[str, Tensor] = {}
    text = json.dumps(packed(value, taken, "state"))
    assert same(unpacked(json.loads(text), taken), value)


def test_what_only_pickle_could_hold_is_refused_by_its_place() -> None:
    with pytest.raises(lamina.TrainingError, match=r"state.optimizer.1.hook is a function"):
        packed({"optimizer": [1, {"hook": lambda: None}]}, {}, "state")


@pytest.mark.parametrize("schedule", ["MultiStepLR", "OneCycleLR", "SequentialLR"])
def test_the_state_of_every_kind_of_schedule_comes_back(tmp_path: Path, schedule: str) -> None:
    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        of = torch.optim.lr_scheduler
        if schedule == "MultiStepLR":
            return of.MultiStepLR(optimizer, [3, 7])
        if schedule == "OneCycleLR":
            return of.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return of.SequentialLR(optimizer, [of.ConstantLR(optimizer, 0.1), of.CosineAnnealingLR(optimizer, steps)], [4])

    undisturbed, wanted = train(tmp_path / "undisturbed", schedule=make)
    stopped(tmp_path / "stopped", 11, schedule=make)
    small, record = train(tmp_path / "stopped", schedule=make)
    assert record.resumed_at == 10 and "went on from step 10" in str(record) and "went on" not in str(wanted)
    assert digest(dict(small.state_dict())) == digest(dict(undisturbed.state_dict()))
    assert [epoch.rate for epoch in record.epochs] == [epoch.rate for epoch in wanted.epochs]


def stopped(folder: Path, after: int, **options: Any) -> None:
    """A training that fails in its step of that number, from 0."""
    calls = iter(range(100))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * (math.nan if next(calls) == after else 1.0)

    with pytest.raises(lamina.TrainingError, match="nan"):
        train(folder, options.pop("small", None), **options | {"loss": loss})


# What is in the folder


def test_a_checkpoint_is_a_saved_network_and_best_is_that_of_the_best_epoch(tmp_path: Path) -> None:
    scores, seen = iter([1.0, 3.0, 2.0, 0.0]), []

    def score(model: nn.Module) -> float:
        seen.append(digest(dict(model.state_dict())))
        return next(scores)

    small, record = train(tmp_path, score=score)
    assert record.best.number == 1 and record.checkpoints == tmp_path
    for name, wanted in (("best", seen[1]), ("last", digest(dict(small.state_dict())))):
        assert digest(dict(lamina.load(network(7), tmp_path / name).state_dict())) == wanted


def test_so_many_are_kept_as_asked_for_and_the_best(tmp_path: Path) -> None:
    scores = iter([9.0, 1.0, 2.0, 3.0])
    train(tmp_path, score=lambda _: next(scores), checkpoints=Checkpoints(tmp_path, every=1, keep=3))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best", "last", *(f"step-{step:08d}" for step in (5, 18, 19, 20))]


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    train(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        else:
            assert path.is_dir()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tuned = []
    for _ in range(2):
        small = decomposed()
        small.register_parameter("twin", small[1].weight)  # type: ignore[index, arg-type]
        train(tmp_path, small, epochs=1)
        assert small[1].weight is small.twin  # type: ignore[index, union-attr]
        tuned.append(digest(dict(small.state_dict())))
    assert tuned[0] == tuned[1]


def test_a_finished_training_is_not_made_again(tmp_path: Path) -> None:
    small, first = train(tmp_path)
    again, second = train(tmp_path)
    assert second.epochs == first.epochs and second.resumed_at == first.steps == 20
    assert "already finished: nothing was left to do" in str(second) and "went on" not in str(second)
    assert digest(dict(again.state_dict())) == digest(dict(small.state_dict()))


def test_patience_ends_a_resumed_training_as_well(tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 1.0])
    _, record = train(tmp_path, score=lambda _: next(scores), patience=2)
    _, again = train(tmp_path, score=lambda _: next(scores), patience=2)
    assert (again.stopped, len(again.epochs)) == (record.stopped, len(record.epochs)) == ("patience", 3)


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut short", "one bit", "gone"])
@pytest.mark.parametrize("file", [STATE, TENSORS, "plan.json", "model-*"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    wanted, _ = train(tmp_path / "whole")
    stopped(tmp_path / "damaged", 13)
    damage(next((tmp_path / "damaged" / "step-00000012").glob(file)))
    with pytest.warns(UserWarning, match=r"step-00000012 is damaged.*going on from step-00000010"):
        small, record = train(tmp_path / "damaged")
    assert record.resumed_at == 10
    assert digest(dict(small.state_dict())) == digest(dict(wanted.state_dict()))


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_passed_over_counts_no_more_so_that_new_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    options = Checkpoints(tmp_path, every=1, keep=keep)
    stopped(tmp_path, 8, checkpoints=Checkpoints(tmp_path, every=1, keep=4))
    for step in (8, 7):
        flip(tmp_path / f"step-{step:08d}" / TENSORS)
    with pytest.warns(UserWarning, match="damaged-step-00000008 now, going on from step-00000006"):
        stopped(tmp_path, 1, checkpoints=options)  # makes step 7 and dies in the next
    names = {path.name for path in tmp_path.iterdir()}
    assert {"step-00000007", "damaged-step-00000007", "damaged-step-00000008"} <= names and "step-00000008" not in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, record = train(tmp_path, checkpoints=options)
    assert record.resumed_at == 7


def test_every_file_of_a_checkpoint_stands_in_its_manifest_with_its_hash(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    folder = tmp_path / "last"
    named = json.loads(json.loads((folder / STATE).read_text())["state"])["hashes"]
    assert set(named) == {path.name for path in folder.iterdir()} - {STATE}
    for name, sha256 in named.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256


def test_a_file_that_does_not_reach_the_disk_makes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fails(handle: int) -> None:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(lamina.TrainingError, match=r"step-00000002 cannot be written: .*Input/output error"):
        train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_synced_and_one_that_cannot_be_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, asked = os.fsync, set[int]()

    def fails(handle: int) -> None:
        if stat.S_ISDIR((about := os.fstat(handle)).st_mode):
            asked.add(about.st_ino)
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    train(tmp_path, epochs=1)
    assert (tmp_path / "last").exists() and tmp_path.stat().st_ino in asked


def test_checkpoints_of_a_compiled_network_are_saved_networks_and_go_on_uncompiled(tmp_path: Path) -> None:
    wanted, _ = train(tmp_path / "plain", epochs=2)
    compiled = torch.compile(decomposed(), backend="eager")
    stopped(tmp_path / "compiled", 8, small=compiled, epochs=2)
    assert (tmp_path / "compiled" / "last" / "plan.json").exists()
    loaded = dict(lamina.load(network(7), tmp_path / "compiled" / "last").state_dict())
    assert set(loaded) == set(wanted.state_dict())
    small, record = train(tmp_path / "compiled", epochs=2)
    assert record.resumed_at == 8
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name


def test_state_that_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Remembers(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"seen": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    asked = []
    with pytest.raises(lamina.LaminaError, match="_extra_state"):
        train(tmp_path, nn.Sequential(Remembers(6, 3)), freezing=None, loss=lambda o, y: asked.append(1))
    assert not asked


def test_with_nothing_but_damage_it_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    train(tmp_path, epochs=1, checkpoints=Checkpoints(tmp_path, keep=1))
    cut(tmp_path / "step-00000005" / STATE)
    with pytest.raises(lamina.TrainingError, match=r"no checkpoint in .* is whole.*remove the folder"):
        train(tmp_path, epochs=1)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    for path in tmp_path.glob(f"step-*/{STATE}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(lamina.TrainingError, match="newer lamina"):
        train(tmp_path, epochs=1)


def test_half_written_ones_are_never_picked_up_and_are_cleared_away(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".unfinished-abc")
    (tmp_path / ".unfinished-abc" / STATE).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, record = train(tmp_path, epochs=1)
    assert record.resumed_at == 5 and not (tmp_path / ".unfinished-abc").exists()


def test_where_nothing_can_be_written_the_error_names_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(lamina.TrainingError, match="step-00000002 cannot be written"):
        train(tmp_path / "file")


# Another training's

OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "another plan": (lambda: {"small": decomposed(l3=lamina.LowRank(3))}, r"another plan: 3 is .*2.* there and .*3.* here"),
    "another network": (
        lambda: {"small": nn.Sequential(nn.Linear(6, 3)), "freezing": None},
        "another network: its structure is",
    ),
    "another optimizer": (lambda: {"optimizer": lambda p: torch.optim.AdamW(p)}, "optimizer is SGD there and AdamW here"),
    "another schedule": (
        lambda: {"schedule": lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer)},
        "schedule is CosineAnnealingLR there and ConstantLR here",
    ),
    "another freezing": (lambda: {"freezing": lamina.VanillaFreezing()}, "freezing is sequential .* there and vanilla"),
    "another length": (lambda: {"epochs": 5}, "epochs is 4 there and 5 here"),
    "another accumulation": (lambda: {"accumulate": 2}, "accumulate is 1 there and 2 here"),
    "another rate": (lambda: {"optimizer": lambda p: torch.optim.SGD(p, 1e-6)}, "optimizer.lr is 0.01 there and 1e-06 here"),
    "another decay": (
        lambda: {"optimizer": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)},
        "optimizer.weight_decay is 0.0001 there and 0 here",
    ),
    "another end of the schedule": (
        lambda: {"schedule": lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-3)},
        "schedule.eta_min is 0.0 there and 0.001 here",
    ),
    "another clip": (lambda: {"clip": 1.0}, "clip is None there and 1.0 here"),
    "another precision": (lambda: {"precision": "bfloat16"}, "precision is float32 there and bfloat16 here"),
    "another patience": (lambda: {"patience": 3}, "patience is None there and 3 here"),
    "a score": (lambda: {"score": lambda _: 1.0}, "score is False there and True here"),
    "a teacher": (lambda: {"teacher": network(3)}, "teacher is None there and Distillation.* here"),
    "a setting of the caller's": (lambda: {"settings": {"seed": 3}}, "seed is absent there and 3 here"),
    "begun anew": (lambda: {"checkpoints": {"resume": False}}, "earlier training: choose another folder, or resume=True"),
}


@pytest.mark.parametrize("case", OTHERS, ids=OTHERS)
def test_a_checkpoint_of_another_training_is_refused_and_the_network_left_alone(tmp_path: Path, case: str) -> None:
    make, message = OTHERS[case]
    train(tmp_path)
    options = make()
    if "checkpoints" in options:
        options["checkpoints"] = Checkpoints(tmp_path, **options["checkpoints"])
    small = options.pop("small", None) or decomposed()
    before = digest(dict(small.state_dict()))
    with pytest.raises(lamina.TrainingError, match=message) as caught:
        train(tmp_path, small, **options)
    assert "\n" not in str(caught.value) and digest(dict(small.state_dict())) == before


def test_another_teacher_is_another_training(tmp_path: Path) -> None:
    for seed, said in ((3, None), (3, None), (4, "hash of the teacher is .* there and .* here")):
        with nullcontext() if said is None else pytest.raises(lamina.TrainingError, match=said):
            train(tmp_path, teacher=network(seed))


@pytest.mark.parametrize("count", [21, 18, 24])
def test_a_data_set_of_another_size_with_as_many_batches_is_refused(tmp_path: Path, count: int) -> None:
    def run(samples: int) -> None:
        loader = DataLoader(TensorDataset(torch.randn(samples, 6), torch.zeros(samples).long()), 4)
        options = Checkpoints(tmp_path)
        lamina.finetune(network(), loader, loss=F.cross_entropy, epochs=1, checkpoints=options)

    run(23)
    what = "samples is 23" if count in (21, 24) else "batches is 6"
    with pytest.raises(lamina.TrainingError, match=f"{what} there and"):
        run(count)


def test_networks_without_a_plan_are_told_apart_by_their_structure(tmp_path: Path) -> None:
    train(tmp_path, network(), freezing=None)
    with pytest.raises(lamina.TrainingError, match="another network"):
        train(tmp_path, nn.Sequential(nn.Linear(6, 3)), freezing=None)
    with pytest.raises(lamina.TrainingError, match=r"another network: 0.weight is \(8, 6\) torch.float32 there"):
        train(tmp_path, network().double(), freezing=None, loss=lambda o, y: F.cross_entropy(o, y).double())


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"every": 1.5}, {"keep": True}])
def test_numbers_of_the_option_must_make_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(lamina.TrainingError, match="whole number of 1 or more"):
        Checkpoints("folder", **wrong)


def test_a_checkpoint_that_stands_already_is_written_over(tmp_path: Path) -> None:
    options = Checkpoints(tmp_path)
    for value in (1.0, 2.0):
        write(options, 3, Content({"w": torch.tensor(value)}, None, {"n": value}))
    settle(options, None)
    found = newest(options)
    assert found is not None and found.path == tmp_path / "step-00000003"
    assert found.state == read(found.path).state == {"n": 2.0}
    assert found.weights is not None and float(found.weights["w"]) == 2.0
