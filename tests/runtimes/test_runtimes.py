"""Runtimes: each answers what the network answers, and says in one line what it cannot do."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import CalibrationError, LaminaError, MissingExtra
from lamina.measure.table import TimingTable
from lamina.runtimes import compiled, executorch, int8, onnxruntime, openvino
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


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [True, False])
def test_weights_are_constants_where_they_are_frozen_and_norms_are_folded(freezing: bool, example: Any) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()).eval()
    prepared = lamina.Compiled(freezing=freezing).prepare(model, Workload(example["x"]))
    (before,) = prepared.answers()
    with torch.no_grad():
        torch.testing.assert_close(before, model(example["x"]), rtol=1e-4, atol=1e-5)
        model[0].weight.mul_(3)
    (after,) = prepared.answers()
    assert torch.equal(before, after) is freezing


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
        for runtime in (None, lamina.OnnxRuntime(), lamina.OpenVINO(), lamina.OpenVINO("default"), lamina.OpenVINO(threads=2)):
            lamina.make_plan(net, example, lamina.Ratio(2.0), never_slower=False, timings=table, runtime=runtime)
            sizes.append(len(table))
        assert len(set(sizes)) == 5 and sizes == sorted(sizes)
        again = lamina.OpenVINO()
        lamina.make_plan(net, example, lamina.Ratio(2.0), never_slower=False, timings=table, runtime=again)
        assert len(table) == sizes[-1]


@pytest.mark.parametrize("make", [lamina.OnnxRuntime, lamina.OpenVINO], ids=["ONNX Runtime", "OpenVINO"])
def test_every_time_in_a_plan_for_it_is_of_it(net: nn.Module, example: Any, make: Any) -> None:
    runtime = make()
    plan = lamina.make_plan(net, example, lamina.Ratio(2.0), runtime=runtime)
    assert plan.setting is not None and plan.setting.runtime == runtime.label
    costs = [cost for each in [*plan.layers.values(), plan.whole] if each for cost in (each.before, each.after)]
    timings = [cost.timing for cost in costs if cost.timing is not None]
    assert len(timings) >= len(plan.layers) and {each.setting.runtime for each in timings} == {runtime.label}
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


def test_what_was_set_and_set_back_is_no_other_key() -> None:
    from torch._inductor import config

    with config.patch({"freezing": True, "cpp.simdlen": 8, "max_autotune_gemm": True}):
        changed = lamina.Compiled().label
    label = lamina.Compiled().label
    assert not any(name in label for name in ("freezing =", "simdlen", "max_autotune_gemm")) and changed != label


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


def quantiser_fails(patch: pytest.MonkeyPatch, place: str) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no scale\nfor it")

    patch.setattr(place, fails)


def without(patch: pytest.MonkeyPatch, package: str, *caches: Any) -> None:
    """Whatever asks for a package does not find it."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        patch.delitem(sys.modules, name)
    patch.setitem(sys.modules, package, None)
    for each in caches:
        each.cache_clear()


X4, HALF = torch.randn(2, 4), torch.randn(2, 4).bfloat16()
LINEAR = nn.Sequential(nn.Linear(4, 4)).eval()


def compared(runtime: Runtime, model: nn.Module = LINEAR, x: Tensor = X4) -> Any:
    return lamina.compare(model, model, x, runtime=runtime, seconds=0.02)


def of_two(runtime: Any, path: Path) -> Any:
    """The file of a network of one input, fed with two."""
    lamina.export(LINEAR, X4, path / "one.onnx", seconds=0)
    return runtime.of_file(path / "one.onnx", Workload((X4, X4)))


def of_no_graph(runtime: Any, path: Path) -> Any:
    (path / "no.onnx").write_bytes(b"no graph")
    return runtime.of_file(path / "no.onnx", Workload(X4))


def of_another(runtime: Any, path: Path) -> Any:
    lamina.export(LINEAR, X4, path / "other.onnx", seconds=0)
    return runtime.of_file(path / "other.onnx", Workload(torch.randn(2, 5)))


REFUSED: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], Callable[[Path], Any], str]] = {
    "no ExecuTorch": (
        lambda patch: without(patch, "executorch", executorch._version),
        lambda path: compared(lamina.ExecuTorch()), r"needs executorch: pip install 'lamina\[executorch\]'",
    ),
    "no NNCF": (
        lambda patch: without(patch, "nncf"),
        lambda path: compared(lamina.OpenVINO(int8=[X4])), r"int8 in OpenVINO needs nncf: pip install 'lamina\[openvino\]'",
    ),
    "ONNX Runtime's quantiser": (
        lambda patch: quantiser_fails(patch, "onnxruntime.quantization.quantize_static"),
        lambda path: compared(lamina.OnnxRuntime(int8=[X4])), "^ONNX Runtime cannot quantise it: no scale$",
    ),
    "NNCF": (
        lambda patch: quantiser_fails(patch, "nncf.quantize"),
        lambda path: compared(lamina.OpenVINO(int8=[X4])), "^NNCF cannot quantise it: no scale$",
    ),
    "ONNX Runtime, no graph": (
        lambda patch: None, lambda path: of_no_graph(lamina.OnnxRuntime(), path), "^ONNX Runtime does not run it: "
    ),
    "OpenVINO, no graph": (
        lambda patch: None, lambda path: of_no_graph(lamina.OpenVINO(), path), "^OpenVINO does not read it: "
    ),
    "ONNX Runtime, another shape": (
        lambda patch: None, lambda path: of_another(lamina.OnnxRuntime(), path), "^ONNX Runtime does not run it: "
    ),
    "OpenVINO, another shape": (
        lambda patch: None, lambda path: of_another(lamina.OpenVINO(), path), "^OpenVINO does not run it: "
    ),
    "ONNX Runtime, two for one": (
        lambda patch: None, lambda path: of_two(lamina.OnnxRuntime(), path), "graph has 1 inputs, and the example 2 tensors$"
    ),
    "OpenVINO, two for one": (
        lambda patch: None, lambda path: of_two(lamina.OpenVINO(), path), "graph has 1 inputs, and the example 2 tensors$"
    ),
    "bfloat16 for ONNX Runtime": (
        lambda patch: None, lambda path: compared(lamina.OnnxRuntime(), copy.deepcopy(LINEAR).bfloat16(), HALF),
        "^ONNX Runtime is fed with float32 or float16, not bfloat16: convert the network and the example$",
    ),
    "bfloat16 for OpenVINO": (
        lambda patch: None, lambda path: compared(lamina.OpenVINO(), copy.deepcopy(LINEAR).bfloat16(), HALF),
        "^OpenVINO is fed with float32 or float16, not bfloat16: convert the network and the example$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_stops_a_runtime_is_told_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, call, says = REFUSED[name]
    patch(monkeypatch)
    try:
        with pytest.raises(LaminaError, match=says) as caught:
            call(tmp_path)
        assert "\n" not in str(caught.value)
    finally:
        executorch._version.cache_clear()


@pytest.mark.slow
def test_without_a_compiler_nothing_is_compiled() -> None:
    from torch._inductor import config

    compiled._compiler()  # which is looked for once
    torch._dynamo.reset()
    with (
        config.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False}),
        pytest.raises(LaminaError, match=r"^torch\.compile does not run it: .*[Cc](\+\+|ompiler|pp)") as caught,
    ):
        compared(lamina.Compiled(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).eval())
    assert "\n" not in str(caught.value)


class Computing:
    """A compiled model that computes in something of its own."""

    def __init__(self, made: Any, hint: str) -> None:
        self.made, self.hint = made, hint

    def get_property(self, name: str) -> Any:
        assert name == "INFERENCE_PRECISION_HINT"
        return SimpleNamespace(get_type_name=lambda: self.hint)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What OpenVINO says that it computes in, whatever it was asked for."""
    core, told = openvino._core(), list[str]()

    def compiled_model(model: Any, device: str, options: Any = None) -> Any:
        asked = {k: v for k, v in (options or {}).items() if k != "INFERENCE_PRECISION_HINT"}
        return Computing(core.compile_model(model, device, asked), told[0])

    fake = SimpleNamespace(read_model=core.read_model, compile_model=compiled_model)
    monkeypatch.setattr(openvino, "_core", lambda: fake)
    openvino._chosen.cache_clear()
    yield told
    openvino._chosen.cache_clear()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_precision_that_the_processor_lacks_is_refused_and_not_replaced(precision: Any, computes: list[str]) -> None:
    runtime = lamina.OpenVINO(precision)
    computes[:] = ["f32"]
    said = (
        rf'this processor has no {precision}: OpenVINO computes in float32 in its place; give lamina.OpenVINO\("float32"\), or'
    )
    with pytest.raises(LaminaError, match=said) as caught:
        compared(runtime)
    assert "\n" not in str(caught.value)
    with pytest.raises(LaminaError, match=said):
        lamina.make_plan(nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16), lamina.Ratio(2.0), runtime=runtime)
    computes[:] = [{"bfloat16": "bf16", "float16": "f16"}[precision]]
    assert compared(runtime).setting.runtime == runtime.label and not runtime.exact


def test_by_default_what_it_chose_is_part_of_the_key(computes: list[str]) -> None:
    runtime, labels = lamina.OpenVINO("default"), set[str]()
    for hint, name in (("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16")):
        computes[:] = [hint]
        openvino._chosen.cache_clear()
        assert f" default ({name}), " in runtime.label and runtime.exact is (hint == "f32")
        labels.add(compared(runtime).setting.runtime)
    assert len(labels) == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "default"])
def test_on_this_machine_it_computes_in_what_it_says_or_refuses(precision: Any) -> None:
    """By the outputs themselves: a product in float32 is known to 24 bits, one in halves is not."""
    model, x = nn.Sequential(nn.Linear(256, 256, bias=False)).eval(), torch.randn(8, 256)
    runtime = lamina.OpenVINO(precision)
    with torch.no_grad():
        exact = model.double()(x.double())
    try:
        (answer,) = runtime.prepare(model.float(), Workload(x)).answers()
    except LaminaError as error:
        assert precision in ("bfloat16", "float16") and f"this processor has no {precision}" in str(error)
        return
    apart = float((answer.double() - exact).norm() / exact.norm())
    assert (apart < 1e-5) is (runtime.computes == "float32")


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


@pytest.mark.parametrize("rows", [1, 4, 8, 32])
@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_two_factors_answer_in_int8_whatever_the_batch_and_in_a_file_that_others_read(
    rank: int, rows: int, tmp_path: Path
) -> None:
    # OpenVINO 2026.4 with VNNI: fused products of few rows, the first without a bias, answered numbers without meaning
    import openvino

    torch.manual_seed(rank)
    model = nn.Sequential(nn.ReLU(), nn.Linear(24, rank, bias=False), nn.Linear(rank, 10)).eval()
    x = torch.randn(rows, 24)
    runtime = lamina.OpenVINO(int8=[x] * 3)
    with torch.no_grad():
        expected = model(x)
    (answer,) = runtime.prepare(model, Workload(x)).answers()
    assert float((answer - expected).norm() / expected.norm()) < 0.1
    runtime.save(model, Workload(x), tmp_path)
    theirs = openvino.Core().compile_model(str(tmp_path / "model.xml"), "CPU")
    answer = torch.from_numpy(theirs([x.numpy()])[0].copy())
    assert float((answer - expected).norm() / expected.norm()) < 0.1


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
