"""Export: the file is there whole or not at all, answers what the network answers, and says what it gains."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import ArtifactError, ExampleError, LaminaError
from lamina.forms import BlockTerm, LowRank
from lamina.runtimes.runtime import Prepared

X = torch.randn(4, 3, 12, 12)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


@pytest.fixture
def small(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = network()
    return lamina.decompose(model, planned(model, X, {"3": BlockTerm(8, 8), "7": LowRank(4)}))


def run_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(answer)


def run_openvino(path: Path, x: Tensor) -> Tensor:
    import openvino

    made = openvino.Core().compile_model(str(path / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(made([x.numpy()])[0].copy())


def run_program(path: Path, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(x)  # type: ignore[no-any-return]


def run_executorch(path: Path, x: Tensor) -> Tensor:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path))
    (answer,) = program.load_method("forward").execute([x])
    return answer.clone()  # type: ignore[no-any-return]


FORMATS: dict[str, tuple[str, dict[str, Any], Callable[[Path, Tensor], Tensor]]] = {
    "ONNX": ("model.onnx", {}, run_onnx),
    "ONNX for OpenVINO": ("model.onnx", {"runtime": lamina.OpenVINO()}, run_onnx),
    "OpenVINO": ("served", {"runtime": lamina.OpenVINO()}, run_openvino),
    "torch.export": ("model.pt2", {}, run_program),
    "ExecuTorch": ("model.pte", {}, run_executorch),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["one batch", "any batch"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_was_written_answers_what_the_network_answers(small: nn.Module, name: str, dynamic: bool, tmp_path: Path) -> None:
    path, options, run = FORMATS[name]
    report = lamina.export(small, X, tmp_path / path, dynamic_batch=dynamic, seconds=0, **options)
    x = torch.randn(7 if dynamic else 4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / path, x), small(x), rtol=1e-4, atol=1e-5)
    assert report.difference < 1e-5 and report.comparison is None
    assert str(tmp_path / path) in str(report) and report.runtime in str(report)


@pytest.mark.parametrize("name", FORMATS)
def test_a_batch_of_one_is_an_example_for_any_batch(small: nn.Module, name: str, tmp_path: Path) -> None:
    path, options, run = FORMATS[name]
    lamina.export(small, X[:1], tmp_path / path, dynamic_batch=True, seconds=0, **options)
    for number in (1, 7):
        x = torch.randn(number, 3, 12, 12)
        with torch.no_grad():
            torch.testing.assert_close(run(tmp_path / path, x), small(x), rtol=1e-4, atol=1e-5)


def test_it_is_timed_in_turn_with_the_original(small: nn.Module, tmp_path: Path) -> None:
    for original in (None, network()):
        report = lamina.export(small, X, tmp_path / "model.onnx", original=original, seconds=0.1)
        assert report.comparison is not None
        assert report.comparison.setting.runtime.startswith("ONNX Runtime")
        assert "against the original, exported alike: ×" in str(report)
    assert lamina.export(network(), X, tmp_path / "dense.onnx").comparison is None  # it is the original


def test_the_opset_is_the_one_asked_for(small: nn.Module, tmp_path: Path) -> None:
    import onnx

    report = lamina.export(small, X, tmp_path / "model.onnx", opset=18, seconds=0)
    assert report.opset == 18
    assert {each.version for each in onnx.load(tmp_path / "model.onnx").opset_import if not each.domain} == {18}
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("runtime", [lamina.OnnxRuntime, lamina.OpenVINO], ids=["ONNX Runtime", "OpenVINO"])
def test_int8_is_of_the_data_and_said_to_be_near_only(small: nn.Module, runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / ("model.onnx" if runtime is lamina.OnnxRuntime else "served")
    report = lamina.export(small, X, path, runtime=runtime(int8=[(X[:3], None)] * 3), seconds=0)
    assert "int8" in report.runtime
    assert 1e-5 < report.difference < 0.3
    run = run_onnx if runtime is lamina.OnnxRuntime else run_openvino
    with torch.no_grad():
        expected = small(X)
    assert float((run(path, X) - expected).norm() / expected.norm()) < 0.3


def test_half_precision_several_inputs_and_a_dictionary_of_outputs(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            y = self.layer(x)
            return {"all": y, "masked": y if mask is None else y * mask}

    x, mask = torch.randn(2, 6), torch.ones(2, 6)
    net, half = Net().eval(), Net().eval().half()
    for model, example in ((net, (x, mask)), (net, {"x": x, "mask": mask}), (half, (x.half(), mask.half()))):
        assert lamina.export(model, example, tmp_path / "model.onnx", dynamic_batch=True).difference < 1e-2


def test_a_file_that_is_there_stays_as_it_was_where_the_new_one_is_not_right(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    lamina.export(small, X, path, seconds=0)
    before = path.read_bytes()

    def wrong(self: Any, file: Path, workload: Any) -> Prepared:
        return Prepared(lambda: None, lambda: [small(X).detach() + 1])

    monkeypatch.setattr(lamina.OnnxRuntime, "of_file", wrong)
    with pytest.raises(LaminaError, match=r"its output differs from PyTorch's by [\d.]+ of its size in ONNX Runtime"):
        lamina.export(small, X, path, seconds=0)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_a_network_that_cannot_be_exported_is_told_apart_from_its_decomposition(
    planned: Callable[..., lamina.Plan], tmp_path: Path
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(self.layer(x))

    model, x = Odd().eval(), torch.randn(2, 16, 16)
    small = lamina.decompose(model, planned(model, x, {"layer": LowRank(4)}))
    with pytest.raises(LaminaError, match=r"cannot be exported to ONNX: .*\(nor can the network before it was decomposed\)"):
        lamina.export(small, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


Call = Callable[[nn.Module, Path], Any]
export, SERVER = lamina.export, lamina.OpenVINO()
TWO = [lamina.Workload(X), lamina.Workload(X)]
WRONG: dict[str, tuple[Call, type[LaminaError], str]] = {
    "no format": (lambda net, at: export(net, X, at / "m.bin"), ArtifactError, r"no format: give ….onnx, ….pt2, ….pte, or"),
    "a folder for nobody": (lambda net, at: export(net, X, at / "out"), ArtifactError, "names no format"),
    "another runtime": (
        lambda net, at: export(net, X, at / "m.onnx", runtime=lamina.Compiled()), ArtifactError, "runs no ONNX file"
    ),
    "a program for a server": (
        lambda net, at: export(net, X, at / "m.pt2", runtime=SERVER), ArtifactError, "runs no program of torch.export"
    ),
    "a program of ExecuTorch for a server": (
        lambda net, at: export(net, X, at / "m.pte", runtime=SERVER), ArtifactError, "runs no program of ExecuTorch"
    ),
    "no folder": (lambda net, at: export(net, X, at / "no" / "m.onnx"), ArtifactError, "there is no folder"),
    "a folder is there": (lambda net, at: export(net, X, at.parent / "d.onnx"), ArtifactError, "it is a folder"),
    "others' files": (
        lambda net, at: export(net, X, at / "full", runtime=SERVER), ArtifactError, r"holds other files \(mine.txt\)"
    ),
    "a file is there": (
        lambda net, at: export(net, X, at.parent / "file", runtime=SERVER), ArtifactError, "it is a file, and"
    ),
    "several examples": (lambda net, at: export(net, TWO, at / "m.onnx"), ExampleError, "for one example, not for 2"),
    "an opset of a program": (lambda net, at: export(net, X, at / "m.pt2", opset=18), LaminaError, "of an ONNX file"),
    "OpenVINO's int8 as ONNX": (
        lambda net, at: export(net, X, at / "m.onnx", runtime=lamina.OpenVINO(int8=[X])), LaminaError, "its own format"
    ),
    "another example": (lambda net, at: export(net, torch.randn(1, 5), at / "m.onnx"), ExampleError, "does not run"),
    "no number of threads": (lambda net, at: lamina.OpenVINO(threads=1.5), LaminaError, "threads is 1.5"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_written_is_refused_before_it_is_exported(call: Any, error: Any, says: str, tmp_path: Path) -> None:
    at = tmp_path / "at"
    (at / "full").mkdir(parents=True)
    (at / "full" / "mine.txt").write_text("mine")
    (tmp_path / "d.onnx").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match=says) as caught:
        call(network(), at)
    assert "\n" not in str(caught.value)
    assert (at / "full" / "mine.txt").read_text() == "mine" and {p.name for p in at.iterdir()} == {"full"}


def test_a_runtime_that_is_not_installed_is_said_before_anything_is_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LaminaError, match=r"pip install 'lamina\[export\]'"):
        lamina.export(small, X, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
