"""Export: a network as a file that a runtime serves, run there, held against the network, and timed against the original's."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from .answers import answers
from .comparison import Comparison, compare
from .decomposition import merge
from .errors import ArtifactError, ExampleError, LaminaError, PlanError
from .files import replaced
from .layers.decomposed import DecomposedLayer
from .network.copying import shadow
from .network.program import exporting, one_more, program_of
from .network.running import outside_inference_mode, said, set_mode
from .network.wrappers import unwrapped
from .runtimes.eager import Eager
from .runtimes.executorch import ExecuTorch
from .runtimes.onnxruntime import OnnxRuntime
from .runtimes.openvino import OpenVINO
from .runtimes.runtime import Runtime, checked_runtime, tensors_in
from .values import Inference, Workload, workloads

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By how much exported outputs may differ, relative to their size: sums are made in another order."""


@final
@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what was seen of it.

    Attributes:
        path: The file, or the folder.
        format: ``"ONNX"``, ``"OpenVINO"``, ``"ExecuTorch"`` or ``"torch.export"``.
        runtime: What ran it.
        bytes: Its size.
        opset: The version of ONNX's operators; None for other formats.
        difference: ‖exported − network‖ / ‖network‖ over all outputs on the example, the network in eager PyTorch.
        comparison: The original's export and this one, timed in turn in the runtime; None where nothing is decomposed.
    """

    path: str
    format: str
    runtime: str
    bytes: int
    opset: int | None
    difference: float
    comparison: Comparison | None

    def __str__(self) -> str:
        """What it is, how near its outputs are, and what it gains."""
        opset = f", opset {self.opset}" if self.opset else ""
        near = f"outputs within {self.difference:.2g} of the network's, relative to their size"
        told = [f"{self.path}: {self.format}{opset}, {self.bytes / 1e6:.3g} MB", f"run in {self.runtime}: {near}"]
        if self.comparison is not None:
            told.append(f"against the original, exported alike: {str(self.comparison).splitlines()[0]}")
        return "\n".join(told)


@outside_inference_mode
def export(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    runtime: Runtime | None = None,
    original: nn.Module | None = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    seconds: float = 2.0,
) -> Exported:
    """Write a network as a file for a runtime; it is run there and held against the network before it is written.

        >>> lamina.export(small, example, "model.onnx", dynamic_batch=True)
        >>> lamina.export(small, example, "model-int8/", runtime=lamina.OpenVINO(int8=images))

    Args:
        model: A network, decomposed or not; it is exported in eval mode, and only read.
        example: What it is fed: a tensor, a tuple or a mapping.
        path: ``….onnx``, ``….pt2`` for `torch.export`, ``….pte`` for ExecuTorch, or a folder, in which OpenVINO's ``model.xml``
            and ``model.bin`` are written. What stands there is replaced, whole or not at all; a folder may hold nothing else.
        runtime: What will run it: by default `OnnxRuntime()` for an ONNX file, `OpenVINO()` for a folder.
        original: The network before it was decomposed, to time both; by default the decomposed layers are made dense again.
        dynamic_batch: The first side of every tensor may be another one later; it is tried with one item more.
        opset: The version of ONNX's operators, for an ONNX file; by default the exporter's choice.
        seconds: The most to spend on timing. 0: nothing is timed.

    Raises:
        ArtifactError: The path cannot be written, or names no format.
        ExampleError: The network does not run on the example, or there are several examples.
        LaminaError: It cannot be exported or does not run in the runtime, and whether the original does; or its outputs differ
            by more than rounding: the first one that does, and by how much.
        MissingExtra: The runtime is not installed.
    """
    target, runtime = Path(path), checked_runtime(runtime)
    kind = _format_of(target, runtime)
    runtime = runtime or kind.runtime()
    if opset is not None and kind is not _ONNX:
        raise LaminaError(f"opset is of an ONNX file; {kind.name}'s format has none")
    _forbid_unwritable(target, kind.folder)
    examples = workloads(example)
    if len(examples) != 1:
        raise ExampleError(f"a file is exported for one example, not for {len(examples)} workloads: export each by itself")
    (workload,) = examples
    model = unwrapped(model)
    runtime.check([model], Inference())
    before = answers(model, examples)
    dense = None if original is None else unwrapped(original)
    if dense is None and any(isinstance(module, DecomposedLayer) for module in model.modules()):
        with suppress(LaminaError):
            dense = merge(model)
    twin = shadow(model)
    set_mode(twin, training=False)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "out"
        try:
            made = kind.write(twin, workload, file, runtime, dynamic_batch, opset)
        except LaminaError as error:
            raise LaminaError(f"{error}{_of_the_original(kind, dense, workload, runtime)}") from error
        difference = _held_against(before, made.run(workload), runtime, "")
        if dynamic_batch:
            more = one_more(workload)
            _held_against(answers(model, [more]), made.run(more), runtime, f" with a batch of {more}")
        comparison = None
        if dense is not None and seconds:
            with suppress(PlanError):
                comparison = compare(dense, model, workload, seconds=seconds, runtime=runtime)
        try:
            size = _put(file, target, kind.folder)
        except OSError as error:
            raise ArtifactError(f"{target} cannot be written: {error.strerror or error}") from error
    return Exported(str(target), kind.name, str(runtime), size, made.opset, difference, comparison)


@final
@dataclass(frozen=True, slots=True)
class _Made:
    """A file that was written, and how it is run on an example."""

    run: Callable[[Workload], list[Tensor]]
    opset: int | None = None


_Write = Callable[[nn.Module, Workload, Path, Any, bool, int | None], _Made]


@final
@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    folder: bool
    runtime: Callable[[], Runtime]
    write: _Write


def _write_onnx(model: nn.Module, workload: Workload, file: Path, runtime: Any, dynamic: bool, opset: int | None) -> _Made:
    graph = runtime.onnx(model, workload, dynamic_batch=dynamic, opset=opset)
    if graph.ByteSize() >= 2**31:
        raise LaminaError("it is larger than the 2 GB of one ONNX file: export it in float16, or for OpenVINO into a folder")
    file.write_bytes(graph.SerializeToString())
    version = next(each.version for each in graph.opset_import if not each.domain)
    return _Made(lambda workload: runtime.of_file(file, workload).answers(), int(version))


def _write_openvino(model: nn.Module, workload: Workload, file: Path, runtime: Any, dynamic: bool, opset: int | None) -> _Made:
    file.mkdir()
    runtime.save(model, workload, file, dynamic_batch=dynamic)
    return _Made(lambda workload: runtime.of_file(file / "model.xml", workload).answers())


def _write_program(model: nn.Module, workload: Workload, file: Path, runtime: Any, dynamic: bool, opset: int | None) -> _Made:
    program = exported_program(model, workload, dynamic)
    with file.open("wb") as out:
        torch.export.save(program, out)

    def run(workload: Workload) -> list[Tensor]:
        with file.open("rb") as saved, exporting():
            module = torch.export.load(saved).module()
            return tensors_in(module(*workload.args, **workload.kwargs))

    return _Made(run)


def exported_program(model: nn.Module, workload: Workload, dynamic_batch: bool = False) -> Any:
    """What `torch.export` makes of a network.

    Raises:
        LaminaError: It refuses it.
    """
    try:
        return program_of(model, workload, dynamic_batch=dynamic_batch)
    except Exception as error:  # an exporter, and a user's network in it, may raise anything
        raise LaminaError(f"torch.export refuses it: {said(error)}") from error


def _write_pte(model: nn.Module, workload: Workload, file: Path, runtime: Any, dynamic: bool, opset: int | None) -> _Made:
    file.write_bytes(runtime.program(model, workload, dynamic_batch=dynamic))
    return _Made(lambda workload: runtime.of_file(file, workload).answers())


_ONNX = _Format("ONNX", False, OnnxRuntime, _write_onnx)
_OPENVINO = _Format("OpenVINO", True, OpenVINO, _write_openvino)
_PROGRAM = _Format("torch.export", False, Eager, _write_program)
_PTE = _Format("ExecuTorch", False, ExecuTorch, _write_pte)


def _format_of(path: Path, runtime: Runtime | None) -> _Format:
    choices = "….onnx, ….pt2, ….pte, or a folder with runtime=lamina.OpenVINO()"
    if path.suffix == ".onnx":
        if runtime is not None and not isinstance(runtime, OnnxRuntime | OpenVINO):
            raise ArtifactError(f"{path}: {runtime} runs no ONNX file; leave runtime out, or give OnnxRuntime() or OpenVINO()")
        return _ONNX
    if path.suffix == ".pte":
        if runtime is not None and not isinstance(runtime, ExecuTorch):
            raise ArtifactError(f"{path}: {runtime} runs no program of ExecuTorch; leave runtime out")
        return _PTE
    if path.suffix == ".pt2":
        if runtime is not None and not isinstance(runtime, Eager):
            raise ArtifactError(f"{path}: {runtime} runs no program of torch.export; leave runtime out")
        return _PROGRAM
    if isinstance(runtime, OpenVINO) and path.suffix not in (".xml", ".bin"):
        return _OPENVINO
    raise ArtifactError(f"{path} names no format: give {choices}")


def _forbid_unwritable(path: Path, folder: bool) -> None:
    parent = path.resolve().parent
    if folder:
        if path.is_dir() and (others := sorted({p.name for p in path.iterdir()} - _OURS)):
            raise ArtifactError(f"{path} holds other files ({', '.join(others[:3])}): name an empty folder or a new one")
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} cannot be written: it is a file, and OpenVINO's format takes a folder")
        parent = next(there for there in (path.resolve(), *path.resolve().parents) if there.exists())
    elif path.is_dir():
        raise ArtifactError(f"{path} cannot be written: it is a folder")
    elif not parent.is_dir():
        raise ArtifactError(f"{path} cannot be written: there is no folder {parent}")
    if not os.access(parent, os.W_OK):
        raise ArtifactError(f"{path} cannot be written: the folder {parent} is not writable")


_OURS = {"model.xml", "model.bin"}


def _put(made: Path, target: Path, folder: bool) -> int:
    """Put what was made in its place, and give its size; a folder as a whole, by a rename."""
    if not folder:
        with replaced(target) as temporary:
            shutil.copyfile(made, temporary)
        return target.stat().st_size
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:32]}.") as beside:
        fresh, old = Path(beside) / "new", Path(beside) / "old"
        shutil.copytree(made, fresh)
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    return sum(each.stat().st_size for each in target.iterdir())


def _held_against(before: Sequence[Tensor], after: Sequence[Tensor], runtime: Runtime, on: str) -> float:
    """How far all outputs lie from the network's, relative to their size.

    Raises:
        LaminaError: There are others, or the first one that differs by more than rounding.
    """
    if len(before) != len(after):
        raise LaminaError(f"what was exported has {len(after)} outputs{on}, and the network {len(before)}")
    moved = size = 0.0
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        title = f"output {number}" if len(before) > 1 else "its output"
        if tuple(old.shape) != tuple(new.shape):
            raise LaminaError(f"{title} is {tuple(new.shape)} in {runtime}{on}, and {tuple(old.shape)} in PyTorch")
        a, b = old.double().cpu(), new.double().cpu()
        own = float(torch.where(a == b, 0.0, b - a).nan_to_num(math.inf).square().sum())
        of = float(a[a.isfinite()].square().sum())
        most = _TOLERANCES.get(old.dtype, 0.0)
        if runtime.exact and own > (most**2) * of:
            apart = math.sqrt(own / of) if of else math.inf
            raise LaminaError(f"{title} differs from PyTorch's by {apart:.2g} of its size in {runtime}{on}")
        moved, size = moved + own, size + of
    return math.sqrt(moved / size) if size else 0.0


def _of_the_original(kind: _Format, dense: nn.Module | None, workload: Workload, runtime: Runtime) -> str:
    """Whether the network could not be exported before it was decomposed either."""
    if dense is None:
        return ""
    twin = shadow(dense)
    set_mode(twin, training=False)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            kind.write(twin, workload, Path(scratch) / "out", runtime, False, None)
        except LaminaError:
            return " (nor can the network before it was decomposed)"
    return " (the network before it was decomposed can be exported)"
