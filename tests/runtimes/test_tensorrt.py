"""TensorRT as far as it goes without a GPU: a module of our own stands for Torch-TensorRT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import LaminaError, MissingExtra
from lamina.runtimes import tensorrt as room
from lamina.values import Inference, Workload


class Net(nn.Module):
    """Two inputs by name and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"plain": y, "scaled": y * scale}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    room._package.cache_clear()
    yield
    room._package.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a compiler was given that answers as the program that it is given; and a GPU that is not there."""
    given: list[dict[str, Any]] = []

    def compile(program: Any, **options: Any) -> Any:
        given.append({"program": program, **options})
        return program.module()

    package: Any = ModuleType("torch_tensorrt")
    package.__version__, package.dynamo = "0.0.7", SimpleNamespace(compile=compile)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return given


def test_a_networks_program_is_compiled_and_run(compiled: list[dict[str, Any]]) -> None:
    net, example = Net().eval(), {"x": torch.randn(2, 4), "scale": torch.randn(2, 1)}
    prepared = lamina.TensorRT().prepare(net, Workload(example))
    (given,) = compiled
    assert isinstance(given["program"], torch.export.ExportedProgram)
    assert given["arg_inputs"] == () and given["kwarg_inputs"].keys() == example.keys()
    assert given["disable_tf32"] and given["min_block_size"] == 1 and given["device"] == torch.device("cpu")
    with torch.no_grad():
        expected = list(net(**example).values())
    for one, other in zip(prepared.answers(), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(each.requires_grad for each in prepared.run().values())


def test_so_is_a_single_layer(compiled: list[dict[str, Any]]) -> None:
    layer, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    (answer,) = lamina.TensorRT().prepare_layer(layer, x).answers()
    with torch.no_grad():
        torch.testing.assert_close(answer, layer(x))
    assert compiled[0]["arg_inputs"] == (x,) and compiled[0]["kwarg_inputs"] == {}


def test_its_label_names_versions_and_it_wants_a_network_on_cuda(compiled: list[dict[str, Any]]) -> None:
    assert str(lamina.TensorRT()) == "TensorRT, torch_tensorrt 0.0.7"
    with pytest.raises(LaminaError, match=r"the network is on cpu, and TensorRT.* runs on cuda: move it there first"):
        lamina.compare(nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(1, 2), runtime=lamina.TensorRT())
    with pytest.raises(LaminaError, match="runs no training step"):
        lamina.TensorRT().check([], lamina.Training())


def test_what_it_refuses_is_one_line(compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no converter\nfor this operator")

    monkeypatch.setattr(sys.modules["torch_tensorrt"].dynamo, "compile", refuse)
    with pytest.raises(LaminaError, match=r"^TensorRT refuses it: RuntimeError: no converter$"):
        lamina.TensorRT().prepare(nn.Linear(2, 2), Workload(torch.randn(1, 2)))


def test_without_a_gpu_that_is_said(compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaminaError, match=r"^TensorRT needs an NVIDIA GPU, and PyTorch sees none here"):
        lamina.TensorRT().check([nn.Linear(2, 2)], Inference())
    with pytest.raises(LaminaError, match=r"^TensorRT needs an NVIDIA GPU, and PyTorch sees none here"):
        lamina.TensorRT().prepare(nn.Linear(2, 2), Workload(torch.randn(1, 2)))
    assert not compiled


def test_where_it_is_not_installed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    net, x = nn.Linear(2, 2), torch.randn(1, 2)
    for call in (
        lambda: lamina.TensorRT().label,
        lambda: lamina.TensorRT().prepare(net, Workload(x)),
        lambda: lamina.compare(net, net, x, runtime=lamina.TensorRT()),
    ):
        with pytest.raises(MissingExtra, match=r"TensorRT needs torch_tensorrt: pip install 'lamina\[tensorrt\]'"):
            call()
