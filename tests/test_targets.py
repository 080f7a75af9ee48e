"""The targets of `verify`: each passes a sound network, and names the output that differs and by how much."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.forms import BlockTerm, LowRank
from lamina.verification import TARGETS

X = torch.randn(2, 3, 8, 8)


def elsewhere() -> bool:
    """Whether somebody reads the network's code, in place of running it."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


class Net(nn.Module):
    """Two outputs; where it is odd, the second one is another one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.odd = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        z = self.head(y.mean((2, 3)))
        if self.odd:
            if torch.jit.is_scripting():
                z = 2 * z
            elif elsewhere():  # which is not scripted
                z = z + z
        return y, z


class Complex(Net):
    """With an operator that no exporter has."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, torch.linalg.eigvalsh(y)


PATIENT = [pytest.param(name, marks=[pytest.mark.slow] if name == "compile" else []) for name in TARGETS]


@pytest.fixture
def pair(planned: Callable[..., lamina.Plan]) -> tuple[Net, Any]:
    model = Net().eval()
    return model, lamina.decompose(model, planned(model, X, {"conv": BlockTerm(2, 4), "head": LowRank(3)}))


def check(model: nn.Module, small: nn.Module, target: str, example: Any = X) -> lamina.verification.Check:
    return lamina.verify(model, small, example, exports=(target,)).checks[-1]


@pytest.mark.parametrize("target", PATIENT)
def test_a_sound_network_passes(pair: tuple[Net, Any], target: str) -> None:
    found = check(*pair, target)
    assert found.promise == f"{target}: it answers the same"
    assert found.passed, found.detail
    assert found.detail.startswith("its checker accepts it" if target == "onnx" else "outputs differ by ")


@pytest.mark.parametrize("target", PATIENT)
def test_one_that_answers_otherwise_there_fails_by_the_name_of_the_output(pair: tuple[Net, Any], target: str) -> None:
    model, small = pair
    if target == "onnx":
        pytest.skip("the file is looked at, and not run")
    small.odd = True
    found = check(model, small, target)
    assert not found.passed
    assert re.fullmatch(r"output 1 differs from PyTorch's by 1 of its size in \S[^\n]*", found.detail)


def test_where_the_original_fares_alike_that_is_said(pair: tuple[Net, Any]) -> None:
    model, small = pair
    model.odd = small.odd = True
    said = "output 1 differs from PyTorch's by 1 of its size in torch.export (nor does the network before it was decomposed)"
    assert check(model, small, "torch.export").detail == said


@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "openvino", "executorch"])
def test_one_that_cannot_be_taken_there_fails_by_the_operator(target: str, planned: Callable[..., lamina.Plan]) -> None:
    model = Complex().eval()
    small = lamina.decompose(model, planned(model, X, {"conv": BlockTerm(2, 4)}))
    found = check(model, small, target)
    assert not found.passed
    assert "eig" in found.detail and found.detail.endswith("(nor does the network before it was decomposed)")
    assert "\n" not in found.detail


def test_of_several_workloads_the_one_is_named(pair: tuple[Net, Any]) -> None:
    model, small = pair
    small.odd = True
    examples = [lamina.Workload(X), lamina.Workload(X[:1])]
    assert check(model, small, "torch.export", examples).detail.endswith("by 1 of its size in torch.export on 2×3×8×8")


def test_another_shape_is_named(pair: tuple[Net, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.runtimes.runtime import Prepared

    model, small = pair
    for answer, says in (
        (lambda y, z: [y, z[:1]], r"output 1 is \(1, 5\) in ONNX Runtime \S+, and \(2, 5\) in PyTorch"),
        (lambda y, z: [y], "what was exported has 1 outputs, and the network 2"),
    ):
        with torch.no_grad():
            tensors = answer(*small(X))
        monkeypatch.setattr(lamina.OnnxRuntime, "prepare", lambda *_, tensors=tensors: Prepared(lambda: None, lambda: tensors))
        assert re.match(says, check(model, small, "onnxruntime").detail)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs_may_differ_as_far_as_those_of_an_exported_file(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.export import _TOLERANCES
    from lamina.runtimes.runtime import Prepared

    model, x = nn.Linear(4, 4).eval().to(dtype), torch.randn(2, 4).to(dtype)
    with torch.no_grad():
        expected = model(x).double()
    for share, passes in ((0.99, True), (1.01, False)):
        answer = expected * (1 + share * _TOLERANCES[dtype])
        monkeypatch.setattr(lamina.OnnxRuntime, "prepare", lambda *_, answer=answer: Prepared(lambda: None, lambda: [answer]))
        assert check(model, model, "onnxruntime", x).passed is passes


def test_a_target_that_is_not_installed_names_the_extra(pair: tuple[Net, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    found = check(*pair, "onnx")
    assert not found.passed and found.detail.endswith("pip install 'lamina[export]'")
