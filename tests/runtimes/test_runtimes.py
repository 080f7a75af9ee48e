"""Runtimes: each answers what the network answers, and says in one line what it cannot do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import CalibrationError, LaminaError, MissingExtra
from lamina.measure.table import TimingTable
from lamina.runtimes import compiled, int8, onnxruntime, openvino
from lamina.runtimes import runtime as room
from lamina.runtimes.runtime import Once, Prepared, Runtime
from lamina.values import Inference, Workload

SERVING = {
    "folded": lamina.Eager(folded=True),
    "ONNX Runtime": lamina.OnnxRuntime(),
    "OpenVINO": lamina.OpenVINO(),
    "ExecuTorch": lamina.ExecuTorch(),
}


class Net(nn.Module):
    """Two inputs, one by name, and a dictionary of outputs; an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Linear(32, 5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.first(x)).relu_()
        x = self.second(x)
        return {"map": x * scale, "classes": self.head(x.mean((2, 3)))}


@pytest.fixture
def net() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.weight.normal_()
        model.norm.bias.normal_()
    return model.eval()


@pytest.fixture
def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 8, 8), "scale": torch.randn(2, 1, 1, 1)}


@pytest.fixture(params=SERVING.values(), ids=SERVING)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return request.param  # type: ignore[no-any-return]


def test_it_answers_what_the_network_answers_in_the_same_order(net: nn.Module, example: Any, runtime: Runtime) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    after = runtime.prepare(net, Workload(example)).answers()
    with torch.no_grad():
        expected = list(net(**example).values())
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_so_does_what_is_compiled_however_many_networks_of_a_class_there_are(example: Any) -> None:
    torch._dynamo.reset()
    runtime = lamina.Compiled()
    nets = [nn.Sequential(nn.Linear(4, 4 + n)).eval() for n in range(10)]  # more than are kept for one piece of code
    x = torch.randn(2, 4)
    runs = [runtime.prepare(net, Workload(x)) for net in nets]
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for net, prepared in zip(nets, runs, strict=True):
            torch.testing.assert_close(prepared.answers()[0], net(x))


def test_comparing_names_it_and_compares_answers_there(net: nn.Module, example: Any, runtime: Runtime) -> None:
    result = lamina.compare(net, net, example, runtime=runtime, seconds=0.05)
    assert result.setting.runtime == runtime.label
    assert result.change is not None and result.change < 1e-5
    assert runtime.label in str(result)


def test_networks_are_as_they_were_afterwards(net: nn.Module, example: Any, runtime: Runtime) -> None:
    net.train()
    lamina.compare(net, net, example, runtime=runtime, seconds=0.05)
    assert net.training and net.norm.training


def test_times_of_one_runtime_never_answer_for_another(net: nn.Module, example: Any) -> None:
    with TimingTable(None) as table:
        sizes = []
        for runtime in (None, lamina.OnnxRuntime(), lamina.OpenVINO(), lamina.OpenVINO("bfloat16"), lamina.OpenVINO(threads=2)):
            lamina.make_plan(net, example, lamina.Ratio(2.0), never_slower=False, timings=table, runtime=runtime)
            sizes.append(len(table))
        assert len(set(sizes)) == 5 and sizes == sorted(sizes)
        again = lamina.OpenVINO()
        lamina.make_plan(net, example, lamina.Ratio(2.0), never_slower=False, timings=table, runtime=again)
        assert len(table) == sizes[-1]


def test_a_plan_is_chosen_and_judged_by_its_times(net: nn.Module, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in (lamina.OnnxRuntime(), lamina.OpenVINO()):
        plan = lamina.make_plan(net, example, lamina.Speedup(1.05), runtime=runtime)
        assert plan.setting is not None and plan.setting.runtime == runtime.label
        if plan.decomposed:
            assert plan.whole is not None and plan.whole.after.timing is not None
            assert plan.whole.after.timing.setting.runtime == runtime.label
            assert plan.whole.interval is not None and plan.whole.interval[0] > 1
        assert abs(sum(plan.shares.values()) - 1) < 0.5


def test_times_taken_elsewhere_in_one_runtime_are_not_taken_for_those_of_another(
    net: nn.Module, example: Any, tmp_path: Path
) -> None:
    with TimingTable(None) as table:
        plan = lamina.make_plan(net, example, lamina.Ratio(2.0), never_slower=False, timings=table)
        assert plan.setting is not None
        elsewhere = dataclasses.replace(plan.setting, device_name="another")
        assert table.export(tmp_path / "times.json", plan.setting)
    text = (tmp_path / "times.json").read_text().replace(plan.setting.device_name, elsewhere.device_name)
    (tmp_path / "times.json").write_text(text)
    lamina.make_plan(net, example, lamina.Ratio(2.0), timings=tmp_path / "times.json")
    with pytest.raises(LaminaError, match=r"has no time of .*OpenVINO"):
        lamina.make_plan(net, example, lamina.Ratio(2.0), timings=tmp_path / "times.json", runtime=lamina.OpenVINO())


DATA = [torch.ones(2, 4)]
ALIKE: dict[str, tuple[Any, bool]] = {
    "ONNX Runtime": (lambda: (lamina.OnnxRuntime(), lamina.OnnxRuntime()), True),
    "threads": (lambda: (lamina.OnnxRuntime(threads=2), lamina.OnnxRuntime()), False),
    "int8": (lambda: (lamina.OnnxRuntime(int8=DATA), lamina.OnnxRuntime(int8=DATA)), True),
    "int8 and not": (lambda: (lamina.OnnxRuntime(), lamina.OnnxRuntime(int8=DATA)), False),
    "other data, though the same numbers": (
        lambda: (lamina.OnnxRuntime(int8=DATA), lamina.OnnxRuntime(int8=[torch.ones(2, 4)])), False
    ),
    "OpenVINO": (lambda: (lamina.OpenVINO(), lamina.OpenVINO()), True),
    "OpenVINO's int8 and not": (lambda: (lamina.OpenVINO(), lamina.OpenVINO(int8=DATA)), False),
    "OpenVINO's int8": (lambda: (lamina.OpenVINO(int8=DATA), lamina.OpenVINO(int8=DATA)), True),
    "precision": (lambda: (lamina.OpenVINO(), lamina.OpenVINO("bfloat16")), False),
    "two kinds": (lambda: (lamina.OpenVINO(), lamina.OnnxRuntime()), False),
    "eager": (lambda: (lamina.Eager(), lamina.Eager(folded=True)), False),
    "compiled": (lambda: (lamina.Compiled(), lamina.Compiled("max-autotune")), False),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_values_are_equal_where_they_run_a_network_alike(name: str) -> None:
    make, alike = ALIKE[name]
    one, other = make()
    assert (one == other) is alike
    assert len({one, other}) == 2 - alike


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions of packages that are others than those that are installed."""
    told: dict[str, str] = {}
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: told.get(package) or version(package))
    room._version.cache_clear()
    yield told
    room._version.cache_clear()


@pytest.mark.parametrize(("make", "packages"), [
    (lamina.OnnxRuntime, ["onnx", "onnxscript", "onnx-ir"]),
    (lamina.OpenVINO, ["onnx", "onnxscript", "onnx-ir"]),
    (lambda: lamina.OpenVINO(int8=DATA), ["nncf"]),
    (lamina.Compiled, ["triton"]),
], ids=["ONNX Runtime", "OpenVINO", "OpenVINO int8", "compiled"])  # fmt: skip
def test_another_version_of_what_makes_the_graph_is_another_key(
    make: Any, packages: list[str], versions: dict[str, str]
) -> None:
    seen = {make().label}
    for package in packages:
        room._version.cache_clear()
        versions[package] = "0.0.7"
        assert f"{package} 0.0.7" in make().label
        seen.add(make().label)
    assert len(seen) == 1 + len(packages)
    assert "0.0.7" not in str(make())  # a message names the runtime alone


def test_what_inductor_is_set_to_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen = {lamina.Compiled().label, lamina.Compiled("max-autotune").label, lamina.Compiled(freezing=False).label}
    with config.patch(max_autotune_gemm=True):
        assert "max_autotune_gemm = True" in lamina.Compiled().label
        seen.add(lamina.Compiled().label)
    with config.patch({"cpp.simdlen": 8}):
        assert "cpp.simdlen = 8" in lamina.Compiled().label
        seen.add(lamina.Compiled().label)
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    assert lamina.Compiled().label.endswith("TORCHINDUCTOR_FREEZING=1")
    seen.add(lamina.Compiled().label)
    monkeypatch.setattr(compiled, "_compiler", lambda: "g++ 0.0.7")
    assert "g++ 0.0.7" in lamina.Compiled().label
    seen.add(lamina.Compiled().label)
    assert len(seen) == 7


def test_where_compiled_code_is_kept_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config

    before = lamina.Compiled().label
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch(compile_threads=7, fx_graph_cache=False):
        assert lamina.Compiled().label == before


def test_the_cpp_compiler_tells_its_version_and_nothing_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    told = compiled._compiler.__wrapped__
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: f"{sys.executable} -I")
    assert told() == f"Python {sys.version.partition(' ')[0]}"
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "/no/such/compiler")
    assert told() == ""


@pytest.mark.parametrize("make", [lamina.OnnxRuntime, lamina.OpenVINO], ids=["ONNX Runtime", "OpenVINO"])
def test_threads_that_a_runtime_is_told_are_those_of_its_times(make: Any) -> None:
    net, x = nn.Linear(3, 3), torch.randn(2, 3)
    assert lamina.compare(net, net, x, runtime=make(threads=2), seconds=0.02).setting.threads == 2
    assert lamina.compare(net, net, x, runtime=make(), seconds=0.02).setting.threads == torch.get_num_threads()


def test_executorchs_threads_are_those_of_its_pool() -> None:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    net, x = nn.Linear(3, 3), torch.randn(2, 3)
    threads = lamina.compare(net, net, x, runtime=lamina.ExecuTorch(), seconds=0.02).setting.threads
    assert threads == lamina.ExecuTorch().own_threads == _threadpool_get_thread_count()


class Virtual(Runtime):
    """A runtime of somebody else's."""

    label = "virtual"

    def __init__(self) -> None:
        self.prepared: list[nn.Module] = []

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        self.prepared.append(model)
        return Prepared(lambda: workload.run(model), lambda: [workload.run(model)])


def test_a_runtime_prepares_each_network_once() -> None:
    virtual, net, workload = Virtual(), nn.Linear(2, 2), Workload(torch.randn(1, 2))
    once = Once(virtual)
    first = once.prepare(net, workload)
    assert once.prepare(net, workload) is first and len(virtual.prepared) == 1
    once.forget(net)
    assert once.prepare(net, workload) is not first


def test_another_runtime_than_ours_can_be_given(net: nn.Module, example: Any) -> None:
    virtual = Virtual()
    result = lamina.compare(nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(2, 3), runtime=virtual, seconds=0.02)
    assert result.setting.runtime == "virtual" and len(virtual.prepared) == 2


def test_a_training_step_is_refused(net: nn.Module, example: Any, runtime: Runtime) -> None:
    with pytest.raises(LaminaError, match="runs no training step"):
        lamina.compare(net, net, example, runtime=runtime, mode=lamina.Training())
    with pytest.raises(LaminaError, match="runs no training step"):
        lamina.make_plan(net, example, lamina.Ratio(2.0), runtime=runtime, mode=lamina.Training())


def test_a_network_elsewhere_is_refused() -> None:
    net = nn.Linear(2, 2, device="meta")
    with pytest.raises(LaminaError, match=r"the network is on meta, and OpenVINO .* runs on cpu"):
        lamina.OpenVINO().check([net], Inference())


def test_an_operator_that_is_missing_is_named(example: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(self.layer(x))

    for runtime in (lamina.OnnxRuntime(), lamina.OpenVINO()):
        with pytest.raises(LaminaError, match=r"cannot be exported to ONNX: .*eig") as caught:
            lamina.compare(Odd().eval(), Odd().eval(), torch.randn(2, 4, 4), runtime=runtime)
        assert "\n" not in str(caught.value)


WRONG = {
    "a class": (lambda net, x: lamina.compare(net, net, x, runtime=lamina.OpenVINO), "runtime is <class .*; give lamina.Eager"),
    "a name": (lambda net, x: lamina.make_plan(net, x, lamina.Ratio(2.0), runtime="openvino"), "runtime is 'openvino'; give"),
    "threads": (lambda net, x: lamina.OnnxRuntime(threads=0), "threads is 0; give a whole number above 0"),
    "threads that are no number": (lambda net, x: lamina.OpenVINO(threads=True), "threads is True; give"),
    "a precision": (lambda net, x: lamina.OpenVINO("int4"), "precision is 'int4'; give one of 'float32', "),
    "a mode": (lambda net, x: lamina.Compiled("fastest"), "mode is 'fastest'; give one of 'default'"),
    "int8 of a switch": (lambda net, x: lamina.OpenVINO(int8=True), "int8 is a bool; give batches of unlabelled inputs"),
    "int8 of one tensor": (lambda net, x: lamina.OnnxRuntime(int8=torch.ones(3)), "int8 is a Tensor; give batches"),
    "other data": (
        lambda net, x: lamina.compare(net, net, x, runtime=lamina.OpenVINO(int8=[torch.ones(2, 3)])),
        r"an item of the data is 2×3, the example 2×4: only their batch may differ",
    ),
    "too few data": (
        lambda net, x: lamina.compare(net, net, x, runtime=lamina.OnnxRuntime(int8=[torch.ones(1, 4)])),
        r"the data hold 1 items, fewer than one batch of the example \(2×4\)",
    ),
    "no data": (lambda net, x: lamina.compare(net, net, x, runtime=lamina.OpenVINO(int8=[])), "the data hold 0 items"),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_what_is_no_runtime_is_refused_in_one_line(call: Any, says: str) -> None:
    with pytest.raises(LaminaError, match=says) as caught:
        call(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    assert "\n" not in str(caught.value)


def test_a_calibration_is_no_data_for_int8(net: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    calibration = lamina.calibrate(model, [torch.randn(8, 4) for _ in range(4)])
    with pytest.raises(CalibrationError, match="keeps second moments and no inputs"):
        lamina.OpenVINO(int8=calibration)


@pytest.mark.parametrize(("room", "package", "make", "extra"), [
    (onnxruntime, "onnxruntime", lamina.OnnxRuntime, "export"),
    (openvino, "openvino", lamina.OpenVINO, "openvino"),
], ids=["ONNX Runtime", "OpenVINO"])  # fmt: skip
def test_one_that_is_not_installed_names_the_extra(
    room: Any, package: str, make: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room._package.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    try:
        with pytest.raises(MissingExtra, match=rf"needs {package}: pip install 'lamina\[{extra}\]'"):
            lamina.compare(nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(1, 2), runtime=make())
    finally:
        room._package.cache_clear()


@pytest.mark.parametrize("make", [lamina.OnnxRuntime, lamina.OpenVINO], ids=["ONNX Runtime", "OpenVINO"])
def test_in_int8_it_answers_about_the_same_from_scales_of_the_data(make: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    ).eval()
    data = [torch.randn(5, 3, 8, 8) for _ in range(4)]  # another batch than the example's
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    (answer,) = make(int8=data).prepare(model, Workload(x)).answers()
    assert 1e-6 < float((answer - expected).norm() / expected.norm()) < 0.2
    (blind,) = make(int8=[each * 1e-3 for each in data]).prepare(model, Workload(x)).answers()
    assert float((blind - expected).norm() / expected.norm()) > 0.3  # scales come from the data


def largest_weights(file: Path) -> list[int]:
    """Of each quantised weight that a file holds, ``.onnx`` or ``.xml``: its largest number."""
    if file.suffix == ".onnx":
        import onnx

        arrays = [onnx.numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer]
    else:
        import openvino

        read = openvino.Core().read_model(file)
        arrays = [op.data for op in read.get_ops() if op.get_type_name() == "Constant"]
    return [int(abs(array.astype(int)).max()) for array in arrays if array.dtype == "int8" and array.ndim > 1]


@pytest.mark.parametrize(("flags", "least", "most"), [("fma avx2", 60, 64), ("avx2 avx512_vnni", 120, 128)])
@pytest.mark.parametrize(
    ("make", "name"), [(lamina.OnnxRuntime, "net.onnx"), (lamina.OpenVINO, "net")], ids=["ONNX Runtime", "OpenVINO"]
)
def test_int8_spares_a_bit_of_each_weight_where_the_processor_adds_up_in_16(
    make: Any, name: str, flags: str, least: int, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(int8, "_cpuinfo", lambda: f"processor\t: 0\nflags\t\t: {flags}\n")
    int8.runs_over.cache_clear()
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()) for _ in range(3))).eval()
    try:
        lamina.export(
            model, torch.randn(2, 8, 8, 8), tmp_path / name, runtime=make(int8=[torch.randn(2, 8, 8, 8)]), seconds=0.01
        )
    finally:
        int8.runs_over.cache_clear()
    found = largest_weights(tmp_path / name if name.endswith(".onnx") else tmp_path / name / "model.xml")
    # Without it NNCF spares the bit in the first layer, in case the file is served elsewhere.
    assert len(found) == 3 and all(least <= each <= most for each in sorted(found)[1:]), found
