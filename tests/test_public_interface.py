"""What a user can import is there, says what it does, and the schema of the plan file is the one committed."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina
from lamina.cli.options import RuntimeName
from lamina.plan import json_schema
from lamina.runtimes.runtime import Runtime, checked_runtime

SCHEMA = Path(__file__).parents[1] / "docs" / "plan.schema.json"
VERBS = [
    "load_model",
    "make_plan",
    "calibrate",
    "sensitivities",
    "decompose",
    "faster",
    "pareto",
    "refine",
    "compare",
    "verify",
    "count",
    "merge",
    "export",
    "plain",
    "save",
    "load",
]
RUNTIMES = ["Eager", "Compiled", "OnnxRuntime", "OpenVINO", "ExecuTorch", "TensorRT"]
CHOICES = [
    "Ratio",
    "Speedup",
    "Drop",
    "Milliseconds",
    "Macs",
    "Parameters",
    "Categorical",
    "Gaussian",
    "Inference",
    "Training",
    "Workload",
    "Plateau",
    "LargestStep",
    "AtRatio",
    "Energy",
    "Evbmf",
    "Dense",
    "LowRank",
    "BlockTerm",
    "Separable",
]
RESULTS = [
    "Plan",
    "PlannedLayer",
    "Calibration",
    "Front",
    "FasterResult",
    "Comparison",
    "Verification",
    "Exported",
    "Cost",
    "Timing",
    "Setting",
    "Geometry",
    "LaminaError",
]


@pytest.mark.parametrize("name", [*VERBS, *CHOICES, *RUNTIMES, *RESULTS])
def test_every_promised_name_is_public(name: str) -> None:
    assert name in lamina.__all__
    assert hasattr(lamina, name)


@pytest.mark.parametrize("name", lamina.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert len((inspect.getdoc(getattr(lamina, name)) or "").split()) >= 2


@pytest.mark.parametrize("name", [name for name in lamina.__all__ if inspect.isclass(getattr(lamina, name))])
def test_every_public_method_says_what_it_does(name: str) -> None:
    for method, thing in vars(getattr(lamina, name)).items():
        if not method.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, property | classmethod)):
            assert inspect.getdoc(thing), f"{name}.{method}"


@pytest.mark.parametrize("name", [name for name in lamina.__all__ if inspect.isfunction(getattr(lamina, name))])
def test_every_parameter_of_a_verb_is_described_and_no_more_than_three_go_by_position(name: str) -> None:
    verb = getattr(lamina, name)
    parameters = inspect.signature(verb).parameters
    by_position = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(by_position) <= 3
    text = inspect.getdoc(verb) or ""
    if len(parameters) > 1:
        for parameter in parameters:
            assert f"{parameter}:" in text or f"``{parameter}``" in text or f"{parameter}," in text, parameter


def test_every_public_runtime_is_in_the_shells_table_and_in_the_message() -> None:
    public = {
        thing for name in lamina.__all__ if inspect.isclass(thing := getattr(lamina, name)) and issubclass(thing, Runtime)
    }
    assert {thing.__name__ for thing in public} == set(RUNTIMES)
    assert {type(name.value_of) for name in RuntimeName} == public
    with pytest.raises(lamina.LaminaError) as caught:
        checked_runtime("another")
    assert all(f"{thing.__name__}()" in str(caught.value) for thing in public)


def test_a_network_is_planned_compared_verified_and_exported_where_it_is_served(tmp_path: Path) -> None:
    """The names and the calls, from one end to the other."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    small = lamina.decompose(net, lamina.make_plan(net, x, lamina.Ratio(2.0), runtime=lamina.OnnxRuntime()))
    assert lamina.compare(net, small, x, runtime=lamina.OpenVINO(), seconds=0.05).speedup > 0
    report = lamina.verify(net, small, x, exports=("torch.export", "onnx", "onnxruntime", "openvino"))
    assert report.passed and str(report)
    lamina.export(small, x, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


def test_errors_are_caught_as_one() -> None:
    errors = [getattr(lamina, name) for name in lamina.__all__ if name.endswith("Error") or name == "MissingExtra"]
    assert len(errors) >= 9
    assert all(issubclass(error, lamina.LaminaError) for error in errors)


def test_a_missing_extra_says_what_to_install() -> None:
    assert "pip install 'lamina[zoo]'" in str(lamina.MissingExtra("timm", "zoo", "timm:resnet18"))


def test_the_committed_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), "run: python tools/write_schema.py"


def test_the_package_is_typed() -> None:
    assert (Path(lamina.__file__).parent / "py.typed").exists()


def test_every_warning_is_of_a_kind_of_its_own() -> None:
    """So that a user can turn one kind into an error, or hide it, and no other."""
    source = Path(lamina.__file__).parent
    for path in source.rglob("*.py"):
        for call in re.findall(r"warnings\.warn\((.*?stacklevel=\d+)", path.read_text(), re.S):
            assert re.search(r"\b(Calibration|Timing|Training|Untried)Warning\b", call), f"{path}: {call}"
    kinds = [kind for kind in vars(lamina).values() if isinstance(kind, type) and issubclass(kind, Warning)]
    assert len(kinds) == 5 and all(issubclass(kind, lamina.LaminaWarning) for kind in kinds)
