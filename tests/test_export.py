"""Export: the file is there whole or not at all, answers what the network answers, and says what it gains."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import ArtifactError, ExampleError, LaminaError
from lamina.export import held_against
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


def kinds_in(path: Path) -> set[str]:
    """Types of operators in an ONNX file, of constants in OpenVINO's."""
    if path.is_dir():
        import openvino

        operators = openvino.Core().read_model(path / "model.xml").get_ops()
        return {each.get_element_type().get_type_name() for each in operators if each.get_type_name() == "Constant"}
    import onnx

    return {node.op_type for node in onnx.load(path).graph.node}


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


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_timed_are_files_and_both_are_written_in_one_way(
    small: nn.Module, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options, _ = FORMATS[name]

    def never(self: Any, *_: Any) -> Any:
        raise AssertionError("a network was made ready, and not its file")

    for runtime in (lamina.Eager, lamina.OnnxRuntime, lamina.OpenVINO, lamina.ExecuTorch):
        monkeypatch.setattr(runtime, "prepare", never)
    report = lamina.export(small, X, tmp_path / path, dynamic_batch=True, seconds=0.02, **options)
    assert report.comparison is not None and report.untimed == ""
    assert report.comparison.setting.runtime.endswith("any batch")
    assert report.format in report.comparison.setting.runtime
    assert report.comparison.change is not None and report.comparison.change > 0  # of the file, against the original


def test_the_original_is_written_with_the_same_opset_and_batch(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    of_file, seen = lamina.OnnxRuntime.of_file, []

    def looked_at(self: Any, file: Path, workload: Any) -> Prepared:
        graph = onnx.load(file)
        batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
        opset = next(each.version for each in graph.opset_import if not each.domain)
        seen.append((file.name, opset, bool(batch.dim_param)))
        return of_file(self, file, workload)

    monkeypatch.setattr(lamina.OnnxRuntime, "of_file", looked_at)
    report = lamina.export(small, X, tmp_path / "model.onnx", dynamic_batch=True, opset=19, seconds=0.02)
    assert set(seen) == {("out", 19, True), ("original", 19, True)}
    assert report.comparison is not None and "opset 19, any batch" in report.comparison.setting.runtime


def test_it_is_timed_in_turn_with_the_original(small: nn.Module, tmp_path: Path) -> None:
    for original in (None, network()):
        report = lamina.export(small, X, tmp_path / "model.onnx", original=original, seconds=0.1)
        assert report.comparison is not None
        assert report.comparison.setting.runtime.startswith("ONNX Runtime")
        assert "against the original, exported alike: ×" in str(report)
    assert lamina.export(network(), X, tmp_path / "dense.onnx").comparison is None  # it is the original


class Odd(nn.Module):
    """With an operator that ONNX does not have."""

    def __init__(self, sides: int = 12) -> None:
        super().__init__()
        self.layer = nn.Linear(sides, sides)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(self.layer(x))


def test_an_original_that_cannot_be_exported_stops_no_good_file(small: nn.Module, tmp_path: Path) -> None:
    report = lamina.export(small, X, tmp_path / "model.onnx", original=Odd().eval(), seconds=0.02)
    assert report.comparison is None
    assert report.untimed.startswith("exported alike, it fails: it cannot be exported to ONNX: ")
    assert f"not timed against the original: {report.untimed}" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", X), small(X), rtol=1e-4, atol=1e-5)


def test_nor_does_one_that_does_not_run_on_the_example(small: nn.Module, tmp_path: Path) -> None:
    report = lamina.export(small, X, tmp_path / "model.onnx", original=nn.Linear(5, 5), seconds=0.02)
    assert report.comparison is None and report.untimed.startswith("exported alike, it fails: ")


def test_the_opset_is_the_one_asked_for(small: nn.Module, tmp_path: Path) -> None:
    import onnx

    report = lamina.export(small, X, tmp_path / "model.onnx", opset=18, seconds=0)
    assert report.opset == 18
    assert {each.version for each in onnx.load(tmp_path / "model.onnx").opset_import if not each.domain} == {18}
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["one batch", "any batch"])
@pytest.mark.parametrize("runtime", [lamina.OnnxRuntime, lamina.OpenVINO], ids=["ONNX Runtime", "OpenVINO"])
def test_int8_is_of_the_data_and_said_to_be_near_only(small: nn.Module, runtime: Any, dynamic: bool, tmp_path: Path) -> None:
    path = tmp_path / ("model.onnx" if runtime is lamina.OnnxRuntime else "served")
    made = runtime(int8=[(X[:3], None)] * 3)
    report = lamina.export(small, X, path, runtime=made, dynamic_batch=dynamic, seconds=0)
    assert "int8" in report.runtime
    assert 1e-5 < report.difference < 0.3
    run = run_onnx if runtime is lamina.OnnxRuntime else run_openvino
    for x in (X, X[:1], torch.cat([X, X[:3]])) if dynamic else (X,):
        with torch.no_grad():
            expected = small(x)
        assert float((run(path, x) - expected).norm() / expected.norm()) < 0.3
    kinds = {"i8", "u8"} if path.is_dir() else {"QuantizeLinear"}
    assert kinds & kinds_in(path)


@pytest.mark.parametrize("runtime", [lamina.OnnxRuntime, lamina.OpenVINO], ids=["ONNX Runtime", "OpenVINO"])
def test_int8_that_answers_nothing_is_not_written(
    small: nn.Module, runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "of_file", lambda *_: Prepared(lambda: None, lambda: [small(X).detach() / 0]))
    path = tmp_path / ("model.onnx" if runtime is lamina.OnnxRuntime else "served")
    with pytest.raises(LaminaError, match=r"its output holds NaN or infinities in .* int8.*, 40 of 40; give int8= more inputs"):
        lamina.export(small, X, path, runtime=runtime(int8=[X]), seconds=0)
    assert not list(tmp_path.iterdir())


def test_int8_that_is_far_off_is_written_with_a_warning(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamina.OnnxRuntime, "of_file", lambda *_: Prepared(lambda: None, lambda: [1.5 * small(X).detach()]))
    report = lamina.export(small, X, tmp_path / "model.onnx", runtime=lamina.OnnxRuntime(int8=[X]), seconds=0)
    assert report.difference == pytest.approx(0.5) and "WARNING: outputs within 0.5 of the network's" in str(report)


@pytest.mark.parametrize(("precision", "from_"), [("bfloat16", 5e-2), ("float16", 2e-2)])
def test_halves_are_warned_of_from_their_rounding_on(
    small: nn.Module, precision: Any, from_: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamina.OpenVINO, "save", lambda self, model, workload, folder, **_: (folder / "model.xml").touch())
    for much in (0.99, 1.01):
        far = small(X).detach() * (1 + much * from_)
        monkeypatch.setattr(lamina.OpenVINO, "of_file", lambda *_, far=far: Prepared(lambda: None, lambda: [far]))
        for named in (precision, "default"):
            monkeypatch.setattr("lamina.runtimes.openvino._chosen", lambda: precision)
            told = str(lamina.export(small, X, tmp_path / "served", runtime=lamina.OpenVINO(named), seconds=0))
            assert ("WARNING: outputs within" in told) == (much > 1)
        # In int8 as in any other network whose answers change.
        told = str(lamina.export(small, X, tmp_path / "served", runtime=lamina.OpenVINO(precision, int8=[X]), seconds=0))
        assert "WARNING" not in told


def test_of_several_outputs_the_first_that_differs_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.conv(x)
            classes = self.head(x.mean((2, 3)))
            return x, classes, classes.argmax(1)

    net = Several().eval()
    assert lamina.export(net, X, tmp_path / "model.onnx").difference < 1e-5
    with torch.no_grad():
        a, b, c = net(X)
    monkeypatch.setattr(lamina.OnnxRuntime, "of_file", lambda *_: Prepared(lambda: None, lambda: [a, 1.01 * b, c + 1]))
    with pytest.raises(LaminaError, match=r"output 1 differs from PyTorch's by 0\.01 of its size in ONNX Runtime"):
        lamina.export(net, X, tmp_path / "other.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


A, B, C = torch.randn(4, 5), torch.randn(4, 3), torch.tensor([1, 2, 3, 4])
INT8 = lamina.OnnxRuntime(int8=[A])
APART: dict[str, tuple[lamina.OnnxRuntime | lamina.OpenVINO, list[Tensor], str]] = {
    "the second": (lamina.OnnxRuntime(), [A, 1.01 * B, C + 1], r"output 1 differs from PyTorch's by 0\.01 of its size"),
    "indices": (lamina.OnnxRuntime(), [A, B, C + 1], r"output 2 differs from PyTorch's by 0\.37 of its size"),
    "a shape": (lamina.OnnxRuntime(), [A[:1], B, C], r"output 0 is \(1, 5\) in ONNX .*, and \(4, 5\) in PyTorch"),
    "one is missing": (lamina.OnnxRuntime(), [A, B], "what was exported has 2 outputs on this, and the network 3"),
    "not finite": (lamina.OnnxRuntime(), [A, B / 0, C], "output 1 holds NaN or infinities in ONNX .*, 12 of 12$"),
    "not finite, int8": (INT8, [A / 0, B, C], "output 0 holds NaN or infinities .* int8 on this, 20 of 20; give int8= more"),
    "zeros": (
        INT8,
        [A, 0 * B, C],
        "output 1 has nothing to do with PyTorch's in .* int8 on this: it differs by 1 of its size;",
    ),
    "thrice": (INT8, [A, 3 * B, C], "output 1 has nothing to do with .*: it differs by 2 of its size; give int8= more inputs"),
    "halves": (lamina.OpenVINO("bfloat16"), [A, 3 * B, C], "output 1 has nothing to do .* of its size; export it in float32"),
}


@pytest.mark.parametrize(("runtime", "after", "says"), APART.values(), ids=APART)
def test_what_differs_is_named_in_one_line(runtime: Any, after: list[Tensor], says: str) -> None:
    with pytest.raises(LaminaError, match=says) as caught:
        held_against([A, B, C], after, runtime, " on this")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "most"), [
    (torch.float64, 1e-8), (torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 5e-2), (torch.int64, 0.0),
], ids=str)  # fmt: skip
def test_as_far_as_this_is_rounding_and_no_farther(dtype: torch.dtype, most: float) -> None:
    before = torch.tensor([[1.0, -2.0], [2.0, 4.0]]).to(dtype)
    inside, outside = before.double() * (1 + 0.99 * most), before.double() * (1 + 1.01 * most + (0 if most else 1e-6))
    for runtime in (lamina.OnnxRuntime(), "torch.export"):
        assert held_against([before], [inside], runtime) == pytest.approx(0.99 * most)
        with pytest.raises(LaminaError, match=r"its output differs from PyTorch's by [\d.e-]+ of its size in \S+"):
            held_against([before], [outside], runtime)


def test_int8_may_move_outputs_and_choose_other_indices() -> None:
    assert 0.2 < held_against([A, B, C], [1.5 * A, 0.7 * B, 5 - C], INT8) < 1
    assert held_against([A, B, C], [A, B, C], INT8) == 0.0


def test_nan_and_infinities_of_the_network_itself_are_no_difference(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.masked_fill(x > 0, -torch.inf), torch.where(x > 0, torch.nan, x)

    assert lamina.export(Masked(), X, tmp_path / "model.onnx").difference == 0.0


def test_a_file_that_the_formats_checker_refuses_is_not_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    write = lamina.OnnxRuntime.onnx

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        graph = write(self, *args, **kwargs)
        graph.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT8
        return graph

    monkeypatch.setattr(lamina.OnnxRuntime, "onnx", wrong)
    with pytest.raises(LaminaError, match="onnx's checker refuses the file: "):
        lamina.export(small, X, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Masked(nn.Module):
    """Two inputs, one of which may be left out, and a dictionary of outputs; an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = self.layer(x).relu_()
        return {"all": y, "masked": y if mask is None else y * mask}


@pytest.mark.parametrize("dynamic", [False, True], ids=["one batch", "any batch"])
@pytest.mark.parametrize("name", FORMATS)
def test_half_precision_several_inputs_and_a_dictionary_of_outputs(
    name: str, dynamic: bool, planned: Callable[..., lamina.Plan], tmp_path: Path
) -> None:
    path, options, _ = FORMATS[name]
    x, mask = torch.randn(2, 16), torch.randint(0, 2, (2, 16)).float()
    model = Masked().eval()
    small = lamina.decompose(model, planned(model, (x, mask), {"layer": LowRank(4)}))
    cases = [(small, (x, mask), 1e-5), (small, {"x": x, "mask": mask}, 1e-5), (small, (x,), 1e-5)]
    if name in ("ONNX", "torch.export"):  # the others compute in float32
        cases.append((copy.deepcopy(small).half(), (x.half(), mask.half()), 1e-2))
    for network, example, most in cases:
        report = lamina.export(network, example, tmp_path / path, dynamic_batch=dynamic, seconds=0, **options)
        assert report.difference < most
        clear(tmp_path / path)


@pytest.mark.parametrize("name", ["ONNX for OpenVINO", "OpenVINO"])
def test_a_network_in_float16_is_refused_for_openvino_which_crashes_on_it(
    name: str, planned: Callable[..., lamina.Plan], tmp_path: Path
) -> None:
    path, options, _ = FORMATS[name]
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(2, 16)
    small = lamina.decompose(model, planned(model, x, {"0": LowRank(4)})).half()
    with pytest.raises(LaminaError, match=r"weights in float16: convert the network and the example to float32") as caught:
        lamina.export(small, x.half(), tmp_path / path, seconds=0, **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    model, x = Odd(16).eval(), torch.randn(2, 16, 16)
    small = lamina.decompose(model, planned(model, x, {"layer": LowRank(4)}))
    with pytest.raises(LaminaError, match=r"cannot be exported to ONNX: .*\(nor can the network before it was decomposed\)"):
        lamina.export(small, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    """Its code goes by the number of items, so that it is read for one number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x if len(x) == 8 else x.relu()


class Eight(Fixed):
    """It runs on no other number than eight."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y[:, :5].reshape(8, -1)


@pytest.mark.parametrize("name", FORMATS)
def test_where_a_dynamic_batch_alone_is_refused_it_is_named_and_the_decomposition_is_not_blamed(
    name: str, planned: Callable[..., lamina.Plan], tmp_path: Path
) -> None:
    path, options, _ = FORMATS[name]
    for model, why in ((Fixed().eval(), ""), (Eight().eval(), r"with one item more \(9×16\) it does not run: .*")):
        x = torch.randn(8, 16)
        small = lamina.decompose(model, planned(model, x, {"layer": LowRank(4)}))
        said = rf"^dynamic_batch is refused, and without it the network can be exported: {why}"
        with pytest.raises(LaminaError, match=rf"{said}.*\(nor can the network before it was decomposed\)$") as caught:
            lamina.export(small, x, tmp_path / path, dynamic_batch=True, **options)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
        assert lamina.export(small, x, tmp_path / path, seconds=0, **options).difference < 1e-5
        clear(tmp_path / path)


def test_where_the_original_takes_a_dynamic_batch_that_is_said(planned: Callable[..., lamina.Plan], tmp_path: Path) -> None:
    model, x = Fixed().eval(), torch.randn(8, 16)
    small = lamina.decompose(model, planned(model, x, {"layer": LowRank(4)}))
    with pytest.raises(
        LaminaError, match=r"dynamic_batch is refused.*\(the network before it was decomposed can be exported\)$"
    ):
        lamina.export(small, x, tmp_path / "model.pt2", original=nn.Linear(16, 16), dynamic_batch=True)


def test_a_view_that_leaves_the_batch_open_takes_any(tmp_path: Path) -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y.view(8, -1)

    lamina.export(View().eval(), torch.randn(8, 16), tmp_path / "model.onnx", dynamic_batch=True)
    assert run_onnx(tmp_path / "model.onnx", torch.randn(3, 16)).shape == (8, 6)


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
    "an opset that is not there": (
        lambda net, at: export(net, X, at / "m.onnx", opset=7), LaminaError, "opset 7 cannot be had"
    ),
    "seconds below 0": (lambda net, at: export(net, X, at / "m.onnx", seconds=-1), LaminaError, "seconds is -1; it must"),
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


def no_room(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


ENDS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, dict[str, Any], type[LaminaError], str]] = {
    "a folder that cannot be written": (
        lambda patch: patch.setattr(os, "access", lambda *_: False), "m.onnx", {}, ArtifactError, "folder .* is not writable$"
    ),
    "a folder that cannot be written, for a folder": (
        lambda patch: patch.setattr(os, "access", lambda *_: False),
        "new/served", {"runtime": lamina.OpenVINO()}, ArtifactError, "folder .* is not writable$",
    ),
    "a full disk": (
        lambda patch: patch.setattr(shutil, "copyfile", no_room),
        "m.onnx", {}, ArtifactError, "m.onnx cannot be written: No space left on device$",
    ),
    "a full disk, of a folder": (
        lambda patch: patch.setattr(shutil, "copyfile", no_room),
        "served", {"runtime": lamina.OpenVINO()}, ArtifactError, "served cannot be written: No space left on device$",
    ),
    "a name that is too long": (
        lambda patch: None, "m" * 300 + ".onnx", {}, ArtifactError, "cannot be written: File name too long$"
    ),
    "more than one file holds": (
        lambda patch: patch.setattr(lamina.OnnxRuntime, "onnx", lambda *_, **__: SimpleNamespace(ByteSize=lambda: 2**31)),
        "m.onnx", {}, LaminaError, "^it is larger than the 2 GB of one ONNX file: export it in float16, or for OpenVINO into a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_export_is_one_line_and_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, path, options, error, says = ENDS[name]
    patch(monkeypatch)
    with pytest.raises(error, match=says) as caught:
        lamina.export(network(), X, tmp_path / path, seconds=0, **options)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_export_takes_the_place_of_the_first(small: nn.Module, name: str, tmp_path: Path) -> None:
    path, options, run = FORMATS[name]
    for network_ in (network(), small):
        lamina.export(network_, X, tmp_path / path, seconds=0, **options)
        with torch.no_grad():
            torch.testing.assert_close(run(tmp_path / path, X), network_(X), rtol=1e-4, atol=1e-5)
        assert [each.name for each in tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("stop", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_folder_that_is_there_stays_whole_where_the_new_one_cannot_take_its_place(
    small: nn.Module, stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "served"
    lamina.export(network(), X, path, runtime=lamina.OpenVINO(), seconds=0)
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    rename, calls = os.rename, list[str]()

    def failing(source: Any, target: Any) -> None:
        calls.append(str(target))
        if len(calls) == 2:  # the earlier one was moved aside
            raise stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ArtifactError if isinstance(stop, OSError) else KeyboardInterrupt):
        lamina.export(small, X, path, runtime=lamina.OpenVINO(), seconds=0)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before and list(tmp_path.iterdir()) == [path]


def test_a_runtime_that_is_not_installed_is_said_before_anything_is_written(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LaminaError, match=r"pip install 'lamina\[export\]'"):
        lamina.export(small, X, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
