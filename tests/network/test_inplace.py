"""Layers become others where they are, all or none; weights that somebody still holds are known."""

from __future__ import annotations

import gc
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from holders import snapshot
from torch import Tensor, nn

import lamina.network.inplace as inplace
from lamina import LaminaError
from lamina.network.inplace import exchange
from lamina.network.memory import place
from lamina.network.walk import Layer, walk

places = pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "in memory"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights wait: empty before, and to be empty afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def network() -> nn.Sequential:
    """Three layers, the largest in the middle; odd layouts, gradients, attributes, a frozen one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 8, 3), nn.Linear(8, 4))
    model[1].to(memory_format=torch.channels_last)
    model[2].requires_grad_(False)
    model[1].weight.no_decay = True
    for layer in (model[0], model[1]):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
    return model


def layers(model: nn.Module) -> list[Layer]:
    return list(walk(model).layers.values())


def other(layer: Layer) -> nn.Module:
    return nn.Conv1d(layer.geometry.in_channels, layer.geometry.out_channels, 1)


def nothing(held: Mapping[str, Tensor]) -> None:
    pass


class Stop(BaseException):
    """An interruption."""


def facts(model: nn.Module) -> list[Any]:
    """All of a network but the identity of a weight, which may come back as another object of the same content."""
    return [
        (
            id(module),
            type(module),
            module.training,
            [(k, v) for k, v in vars(module).items() if k != "_parameters"],
            {
                name: (p.dtype, p.stride(), p.requires_grad, p.tolist(), vars(p), None if p.grad is None else p.grad.tolist())
                for name, p in module._parameters.items()
            },
        )
        for module in model.modules()
    ]


@places
def test_layers_become_others_and_stay_the_same_objects(on_disk: bool, folder: Path) -> None:
    model = network()
    modules = list(model)
    exchange(layers(model), other, nothing, on_disk=on_disk)
    assert list(model) == modules and all(type(module) is nn.Conv1d for module in model)
    assert not list(folder.iterdir())


@places
def test_the_largest_layer_is_made_first(on_disk: bool) -> None:
    made: list[str] = []
    model = network()
    exchange(layers(model), lambda layer: made.append(layer.name) or other(layer), nothing, on_disk=on_disk)  # type: ignore[func-returns-value]
    assert made == ["1", "2", "0"]


def test_a_dense_weight_is_gone_from_memory_before_the_next_layer_is_made() -> None:
    model = network()
    weights = {name: weakref.ref(module.weight) for name, module in model.named_children()}
    alive: list[list[str]] = []

    def make(layer: Layer) -> nn.Module:
        alive.append([name for name, ref in weights.items() if ref() is not None])
        return other(layer)

    exchange(layers(model), make, lambda held: alive.append([n for n, r in weights.items() if r() is not None]))
    assert alive == [["0", "1", "2"], ["0", "2"], ["0"], []]


@places
def test_where_nobody_holds_a_weight_none_is_held(on_disk: bool) -> None:
    seen: list[Mapping[str, Tensor]] = []
    exchange(layers(network()), other, seen.append, on_disk=on_disk)
    assert seen == [{}]


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "a list": lambda model: [model[1].weight],
    "a view": lambda model: model[1].weight.detach()[1:2],
    "memory of numpy": lambda model: model[1].weight.detach().numpy(),
    "an optimizer": lambda model: torch.optim.SGD(model.parameters()),
    "a closure": lambda model: (lambda weight: lambda: weight)(model[1].weight),
}


@places
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_weight_that_somebody_holds_is_known_by_name(on_disk: bool, hold: Callable[[nn.Module], Any]) -> None:
    model = network()
    at = place(model[1].weight)
    holder = hold(model)
    seen: list[Mapping[str, Tensor]] = []
    exchange(layers(model), other, seen.append, on_disk=on_disk)
    assert place(seen[0]["1"]) == at
    assert set(seen[0]) == ({"0", "1", "2"} if hold is HOLDERS["an optimizer"] else {"1"})
    del holder


def test_a_weight_whose_storage_somebody_holds_is_known() -> None:
    model = network()
    storage = model[1].weight.untyped_storage()
    seen: list[Mapping[str, Tensor]] = []
    exchange(layers(model), other, seen.append)
    assert set(seen[0]) == {"1"} and storage.nbytes()


def test_what_only_a_cycle_holds_is_held_by_nobody() -> None:
    model = network()
    cycle: list[Any] = [model[1].weight]
    cycle.append(cycle)
    del cycle
    gc.disable()
    try:
        seen: list[Mapping[str, Tensor]] = []
        exchange(layers(model), other, seen.append)
    finally:
        gc.enable()
    assert seen == [{}]


@places
@pytest.mark.parametrize("error", [RuntimeError, Stop, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["0", "1", "2", "at the end"])
def test_an_error_or_an_interruption_brings_everything_back(
    on_disk: bool, error: type[BaseException], when: str, folder: Path
) -> None:
    model = network()
    before = facts(model)

    def make(layer: Layer) -> nn.Module:
        if layer.name == when:
            raise error("no")
        return other(layer)

    def finish(held: Mapping[str, Tensor]) -> None:
        raise error("no")

    with pytest.raises(error, match=r"^no$"):
        exchange(layers(model), make, finish, on_disk=on_disk)
    assert facts(model) == before and not list(folder.iterdir())


@places
def test_a_weight_that_somebody_held_comes_back_as_that_very_object(on_disk: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    before = snapshot(model)

    def finish(held: Mapping[str, Tensor]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        exchange(layers(model), other, finish, on_disk=on_disk)
    assert snapshot(model) == before
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_weight_made_in_inference_mode_comes_back() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    wanted = model[0].weight.clone()
    with pytest.raises(ZeroDivisionError):
        exchange(layers(model), other, lambda held: 1 // 0)  # type: ignore[arg-type,return-value]
    assert torch.equal(model[0].weight, wanted) and type(model[0]) is nn.Linear


def fail_for(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    load = inplace.load_file

    def loads(path: Path) -> dict[str, Tensor]:
        if Path(path).stem == str(number):
            raise OSError("the disk is broken")
        loaded: dict[str, Tensor] = load(path)
        return loaded

    monkeypatch.setattr(inplace, "load_file", loads)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_where_one_layer_cannot_be_brought_back_the_others_are_and_the_folder_is_kept(
    number: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    model = network()
    lost = ["1", "2", "0"][number]
    weight = model[int(lost)].weight.detach().clone()
    kept = {name: facts(module) for name, module in model.named_children() if name != lost}
    fail_for(monkeypatch, number)

    def finish(held: Mapping[str, Tensor]) -> None:
        raise RuntimeError("not like that")

    with pytest.raises(LaminaError) as caught:
        exchange(layers(model), other, finish)
    (place_of_weights,) = folder.iterdir()
    assert str(caught.value) == (
        f"{lost} (OSError: the disk is broken): could not be brought back after RuntimeError: not like that; "
        f"the dense weights lie in {place_of_weights}"
    )
    assert {name: facts(module) for name, module in model.named_children() if name != lost} == kept
    monkeypatch.undo()
    assert torch.equal(inplace.load_file(place_of_weights / f"{number}.safetensors")["weight"], weight)


def test_all_that_cannot_be_brought_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "load_file", lambda path: 1 // 0)
    with pytest.raises(LaminaError, match=r"^0 \(ZeroDivisionError.*\), 2 \(.*\), 1 \(.*\): could not be brought back"):
        exchange(layers(network()), other, lambda held: [].pop())


@pytest.mark.parametrize("error", [OSError("No space left on device"), inplace.SafetensorError("no room")])
def test_a_disk_that_fills_up_is_told_and_undone(error: Exception, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    model = network()
    before, save = facts(model), inplace.save_file

    def saves(tensors: dict[str, Tensor], path: Path) -> None:
        if path.stem == "1":
            raise error
        save(tensors, path)

    monkeypatch.setattr(inplace, "save_file", saves)
    with pytest.raises(LaminaError, match=f"^working in place keeps the dense weights in {folder} meanwhile: .*{error}"):
        exchange(layers(model), other, nothing)
    assert facts(model) == before and not list(folder.iterdir())


def test_without_a_place_for_the_weights_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "absent"))
    model = network()
    before = snapshot(model)
    with pytest.raises(LaminaError, match=r"^working in place keeps the dense weights in .*absent meanwhile: "):
        exchange(layers(model), other, nothing)
    assert snapshot(model) == before


def test_in_memory_the_disk_is_not_asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "absent"))
    with pytest.raises(OSError, match="mine"):
        exchange(layers(network()), other, lambda held: os.stat("mine"), on_disk=False)  # type: ignore[arg-type,return-value]
    exchange(layers(network()), other, nothing, on_disk=False)


def test_no_layers_are_no_work() -> None:
    seen: list[Mapping[str, Tensor]] = []
    exchange([], other, seen.append)
    assert seen == [{}]


@places
def test_a_part_of_a_weight_that_somebody_held_is_a_part_of_the_weight_that_comes_back(on_disk: bool) -> None:
    model = network()
    part, before = model[0].weight.detach()[1], facts(model)

    def finish(held: Mapping[str, Tensor]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        exchange(layers(model), other, finish, on_disk=on_disk)
    assert facts(model) == before
    part.fill_(7.0)
    assert (model[0].weight[1] == 7).all()
