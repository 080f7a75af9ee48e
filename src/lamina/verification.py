"""Every promise checked on one model: shapes, dtypes, modes, autograd, state dict, files; each passed, or why not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from .answers import answers, apart, change, in_words
from .artifact import load, save
from .decomposition import decompose, merged_layers, plain, plan_of
from .errors import ExampleError, LaminaError, MissingExtra, PlanError
from .export import exported_program, held_against
from .layers.decomposed import DecomposedLayer
from .network.copying import shadow
from .network.preserve import repeatable
from .network.program import exporting
from .network.running import ANSWERING, MODES, first_line, set_mode
from .network.trial import modes_that_run, tried
from .network.wrappers import unwrapped
from .plan import FactorMethod
from .runtimes.compiled import Compiled
from .runtimes.executorch import ExecuTorch
from .runtimes.graphs import check_file, onnx_program, save_file
from .runtimes.onnxruntime import OnnxRuntime
from .runtimes.openvino import OpenVINO
from .runtimes.runtime import Runtime, tensors_in
from .shown import Shown
from .values import Inference, Workload, closest, workloads


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One promise: whether it holds, and what was seen."""

    promise: str
    passed: bool
    detail: str = ""

    def __str__(self) -> str:
        """``passed  eval: the network runs``."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.promise}{': ' + self.detail if self.detail else ''}"


@final
@dataclass(frozen=True, slots=True, repr=False)
class Verification(Shown):
    """All checks made of one network, and by how much its outputs change on the example, relative to their size.

    No promise is broken by outputs that change, however much: a decomposition loses something. So it stands apart from them.
    """

    checks: tuple[Check, ...]
    change: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every promise holds."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        """By how much the outputs change, then a line a check."""
        return "\n".join([*([] if self.change is None else [in_words(self.change)]), *map(str, self.checks)])


class _Broken(Exception):
    """A promise does not hold."""


def verify(model: nn.Module, small: nn.Module, example: Any, *, exports: tuple[str, ...] = ()) -> Verification:
    """Check every promise about a decomposed network. Nothing is changed, nothing raised for a broken promise.

    Args:
        model: The network before; it is only read, as is ``small``.
        small: The network after.
        example: What both are fed.
        exports: Targets to export to, and whose outputs are compared with eager PyTorch's, the first one that differs being
            named: ``"torch.export"``, ``"onnxruntime"``, ``"openvino"``, ``"executorch"``, ``"compile"``, ``"script"`` (of
            `plain`); and ``"onnx"``, where the format's checker is asked and nothing is run.

    Raises:
        ExampleError: ``example`` is malformed, or the network before does not run on it in any mode.
        LaminaError: An export target is unknown.
    """
    if unknown := next((name for name in exports if name not in TARGETS), None):
        raise LaminaError(f"no export target {unknown!r} is known{closest(unknown, list(TARGETS))}: {', '.join(TARGETS)}")
    model, small, examples = unwrapped(model), unwrapped(small), workloads(example)
    checks = (*_checks(model, small, examples), *(_exported(name, small, examples, model) for name in exports))
    return Verification(checks, change(model, small, examples))


def _exported(target: str, small: nn.Module, examples: list[Workload], model: nn.Module) -> Check:
    """Whether a network can be taken to a target, and answers there what it does here; where not, whether the original can."""
    promise = f"{target}: it answers the same"
    try:
        with repeatable(small):
            return Check(promise, True, TARGETS[target](small, examples))
    except MissingExtra as error:
        return Check(promise, False, str(error))
    except (LaminaError, _Broken) as error:
        try:
            with repeatable(model):
                TARGETS[target](model, examples)
        except (LaminaError, _Broken):
            return Check(promise, False, f"{error} (nor does the network before it was decomposed)")
        return Check(promise, False, str(error))


def _through(runtime: Callable[[], Runtime]) -> Callable[[nn.Module, list[Workload]], str]:
    def check(small: nn.Module, examples: list[Workload]) -> str:
        made = runtime()
        made.check([small], Inference())
        return _near(small, examples, made, lambda twin, workload: made.prepare(twin, workload).answers())

    return check


def _near(
    small: nn.Module, examples: list[Workload], where: Runtime | str, run: Callable[[nn.Module, Workload], list[Tensor]]
) -> str:
    twin = shadow(small)
    set_mode(twin, training=False)
    largest = 0.0
    for workload in examples:
        on = f" on {workload}" if len(examples) > 1 else ""
        largest = max(largest, held_against(answers(small, [workload]), run(twin, workload), where, on))
    return f"outputs differ by {largest:.2g}"


def _program(small: nn.Module, examples: list[Workload]) -> str:
    def run(twin: nn.Module, workload: Workload) -> list[Tensor]:
        with exporting():
            return tensors_in(exported_program(twin, workload).module()(*workload.args, **workload.kwargs))

    return _near(small, examples, "torch.export", run)


def _onnx_file(small: nn.Module, examples: list[Workload]) -> str:
    twin = shadow(small)
    set_mode(twin, training=False)
    opset = 0
    for workload in examples:
        graph = onnx_program(twin, workload).model_proto
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.onnx"
            save_file(graph, file)
            check_file(file)
        opset = next(each.version for each in graph.opset_import if not each.domain)
    return f"its checker accepts it, opset {opset}"


def _scripted(small: nn.Module, examples: list[Workload]) -> str:
    if any(isinstance(module, DecomposedLayer) for module in small.modules()):
        small = plain(small)

    def run(twin: nn.Module, workload: Workload) -> list[Tensor]:
        try:
            with exporting():
                return tensors_in(torch.jit.script(twin)(*workload.args, **workload.kwargs))
        except Exception as error:  # the compiler, and a user's network in it, may raise anything
            raise LaminaError(f"torch.jit.script refuses it: {first_line(error)}") from error

    return _near(small, examples, "torch.jit.script", run)


TARGETS: dict[str, Callable[[nn.Module, list[Workload]], str]] = {
    "torch.export": _program,
    "onnx": _onnx_file,
    "onnxruntime": _through(OnnxRuntime),
    "openvino": _through(OpenVINO),
    "executorch": _through(ExecuTorch),
    "compile": _through(Compiled),
    "script": _scripted,
}


def _checks(model: nn.Module, small: nn.Module, examples: list[Workload]) -> Iterator[Check]:
    before = [modes_that_run(model, workload) for workload in examples]
    for workload, ran in zip(examples, before, strict=True):
        if all(ran.values()):
            raise ExampleError(f"the network does not run on the example ({workload}): {ran[ANSWERING]}")
    outcomes = [(ran, modes_that_run(small, workload)) for workload, ran in zip(examples, before, strict=True)]
    for mode in MODES:
        complaints = [runs[mode] for ran, runs in outcomes if ran[mode] is None]
        if complaints:
            first = next((complaint for complaint in complaints if complaint), "")
            yield Check(f"runs in {mode}", not first, first)
    for promise, test in {
        "outputs have the shapes, dtypes and devices of the original's": _same_outputs,
        "outputs are finite where the original's are": _finite,
        "every trainable parameter gets a gradient": _autograd,
        "the state dict loads into a copy": _state_dict,
        "merged layers compute the same": _merge,
        "saved and loaded it gives the same bits": _files,
        "full rank in place of its ranks is exact": _full_rank,
    }.items():
        yield _check(promise, test, model, small, examples)


def _check(promise: str, test: Callable[..., str], model: nn.Module, small: nn.Module, examples: list[Workload]) -> Check:
    try:
        with repeatable(model, small):
            return Check(promise, True, test(shadow(model), shadow(small), examples))
    except (_Broken, ExampleError) as broken:
        return Check(promise, False, str(broken))
    except Exception as error:  # the user's network may raise anything; that is the finding
        return Check(promise, False, f"{type(error).__name__}: {first_line(error)}")


def _same_outputs(model: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    before, after = answers(model, examples), answers(small, examples)
    for a, b in zip(before, after, strict=True):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            raise _Broken(f"{tuple(a.shape)} {a.dtype} on {a.device} became {tuple(b.shape)} {b.dtype} on {b.device}")
    return ""


def _finite(model: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    for a, b in zip(answers(model, examples), answers(small, examples), strict=True):
        if bool((torch.isfinite(a) & ~torch.isfinite(b)).any()):
            raise _Broken("some are NaN or infinite")
    return ""


def _autograd(model: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    if not any(p.requires_grad for p in small.parameters()):
        return "none is trainable"
    reached, unreached = _reached(small, examples)
    layers = [name for name, m in small.named_modules() if isinstance(m, DecomposedLayer)]
    missing = {name: layer for layer in layers for name in unreached if name.startswith(f"{layer}." if layer else "")}
    before = _reached(model, examples)[0] if missing else set()
    for name, layer in missing.items():
        if (f"{layer}.weight" if layer else "weight") in before:
            raise _Broken(f"{name} gets none")
    return "" if reached else "no output takes a gradient"


def _reached(model: nn.Module, examples: list[Workload]) -> tuple[set[str], set[str]]:
    """The trainable parameters that gradients of a network's outputs reach, and those that they do not reach."""
    model = shadow(model, apart=frozenset().union(*(tried(model, workload, modes=["eval"]).apart for workload in examples)))
    set_mode(model, False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        leaves = torch.utils._pytree.tree_leaves([workload.run(model) for workload in examples])
        outputs = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = torch.autograd.grad(outputs, list(named.values()), allow_unused=True) if outputs and named else ()
    reached = {name for name, gradient in zip(named, gradients, strict=False) if gradient is not None}
    return reached, named.keys() - reached


def _state_dict(_: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    copy = shadow(small)
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in small.state_dict().items()}
    with torch.no_grad():
        for tensor in copy.state_dict(keep_vars=True).values():
            # Storage of its own, and other values: what is not loaded is noticed.
            if isinstance(tensor, Tensor) and tensor.is_leaf and tensor.layout == torch.strided:
                tensor.data = torch.full_like(tensor, 1) if tensor.is_floating_point() else tensor.data.clone()
        copy.load_state_dict(state)
    _expect_equal(answers(small, examples), answers(copy, examples))
    return ""


def _merge(_: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    if not any(isinstance(m, DecomposedLayer) for m in small.modules()):
        return "nothing is decomposed"
    before, after = answers(small, examples), answers(small, examples, merged_layers(small))
    if (difference := apart(before, after)) > tolerance(before):
        raise _Broken(f"they differ by {difference:.2g}")
    return ""


def _files(model: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    try:
        plan_of(small)
    except PlanError as error:
        return str(error)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "saved"
        save(small, folder)
        again = load(model, folder)  # a shadow of the user's: on storage of its own afterwards
    _expect_equal(answers(small, examples), answers(again, examples))
    return ""


def _full_rank(model: nn.Module, small: nn.Module, examples: list[Workload]) -> str:
    try:
        plan = plan_of(small)
    except PlanError as error:
        return str(error)
    for name, layer in plan.decomposed.items():
        plan = plan.with_form(name, layer.form.at_full_rank(layer.geometry))
    # At full rank it does not matter who found the factors.
    before = answers(model, examples)
    exact = decompose(model, plan.model_copy(update={"factors": FactorMethod()}), inplace=True, check=False)
    after = answers(exact, examples)
    if (difference := apart(before, after)) > tolerance(before):
        raise _Broken(f"outputs differ by {difference:.2g}")
    return f"outputs differ by {difference:.2g}"


def tolerance(outputs: list[Tensor]) -> float:
    """How far apart, relative to their size, outputs may lie that are equal but for rounding through a deep network.

    Half of the digits: √ε is 3e-4 in float32, and still says something in bfloat16, where it is 9 %.
    """
    coarsest = max((torch.finfo(o.dtype).eps for o in outputs if o.is_floating_point()), default=0.0)
    return float(coarsest**0.5)


def _expect_equal(before: list[Tensor], after: list[Tensor]) -> None:
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            raise _Broken(f"they differ by {apart([a], [b]):.2g}")
