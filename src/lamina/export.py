"""Export: a network as a file that a runtime serves, run there, held against the network, and timed against the original's."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from .answers import answers
from .comparison import Comparison, compare
from .decomposition import merge
from .errors import ArtifactError, ExampleError, LaminaError, MissingExtra
from .files import replaced, replaced_folder
from .layers.decomposed import DecomposedLayer
from .network.copying import shadow
from .network.program import exporting, one_more, program_of
from .network.running import outside_inference_mode, said, set_mode
from .network.wrappers import unwrapped
from .plan import MUCH
from .runtimes.eager import Eager
from .runtimes.executorch import ExecuTorch
from .runtimes.graphs import check_file
from .runtimes.onnxruntime import OnnxRuntime
from .runtimes.openvino import OpenVINO
from .runtimes.runtime import Prepared, Runtime, checked_runtime, tensors_in
from .shown import Shown
from .values import Inference, Mode, Workload, workloads

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By how much outputs may differ elsewhere, relative to their size: sums are made in another order. `verify` goes by it too."""
_UNRELATED = 1.0
"""By how much outputs in int8 or in halves may differ: zeros are as near."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class Exported(Shown):
    """What was written, and what was seen of it.

    Attributes:
        path: The file, or the folder.
        format: ``"ONNX"``, ``"OpenVINO"``, ``"ExecuTorch"`` or ``"torch.export"``.
        runtime: What ran it.
        bytes: Its size.
        opset: The version of ONNX's operators; None for other formats.
        difference: ‖exported − network‖ / ‖network‖ over all outputs on the example, the network in eager PyTorch.
        comparison: The original's file, written alike, and this one, timed in turn in the runtime; None where nothing is
            decomposed, or they were not timed.
        untimed: Why they were not, where that is the original's fault: the file is as good as it is.
        much: From which difference on it is warned of: in halves from their rounding on.
    """

    path: str
    format: str
    runtime: str
    bytes: int
    opset: int | None
    difference: float
    comparison: Comparison | None
    untimed: str = ""
    much: float = MUCH

    def __str__(self) -> str:
        """What it is, how near its outputs are, and what it gains."""
        opset = f", opset {self.opset}" if self.opset else ""
        near = f"outputs within {self.difference:.2g} of the network's, relative to their size"
        if self.difference > self.much:
            near = f"WARNING: {near}: measure how accurate it still is"
        told = [f"{self.path}: {self.format}{opset}, {self.bytes / 1e6:.3g} MB", f"run in {self.runtime}: {near}"]
        if self.comparison is not None:
            told.append(f"against the original, exported alike: {self.comparison.timed}")
        if self.untimed:
            told.append(f"not timed against the original: {self.untimed}")
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
            Where it cannot be exported, what is returned says so.
        dynamic_batch: The first side of every tensor may be another one later; it is tried with one item more.
        opset: The version of ONNX's operators, for an ONNX file; by default the exporter's choice.
        seconds: The most to spend on timing. 0: nothing is timed.

    Raises:
        ArtifactError: The path cannot be written, or names no format.
        ExampleError: The network does not run on the example, or there are several examples.
        LaminaError: It cannot be exported: whether ``dynamic_batch`` is to blame, and whether the original can be. Or it does
            not run in the runtime; or its outputs differ by more than rounding, or in int8 have nothing to do with the
            network's: the first one that does, and by how much.
        MissingExtra: The runtime is not installed.
    """
    target, runtime = Path(path), checked_runtime(runtime)
    kind = _format_of(target, runtime)
    runtime = runtime or kind.runtime()
    if opset is not None and kind is not _ONNX:
        raise LaminaError(f"opset is of an ONNX file; {kind.name}'s format has none")
    if not isinstance(seconds, Real) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise LaminaError(f"seconds is {seconds!r}; it must be a number, 0 or more")
    try:
        _forbid_unwritable(target, kind.folder)
    except OSError as error:  # such as a name that is too long
        raise ArtifactError(f"{target} cannot be written: {error.strerror or error}") from error
    examples = workloads(example)
    if len(examples) != 1:
        raise ExampleError(f"a file is exported for one example, not for {len(examples)} workloads: export each by itself")
    (workload,) = examples
    model = unwrapped(model)
    runtime.check([model], Inference())
    before = answers(model, examples)
    dense, untimed = _dense(model, original)
    way = _Way(kind, runtime, dynamic_batch, opset)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "out"
        try:
            made = way.write(model, workload, file)
        except MissingExtra:
            raise
        except LaminaError as error:
            raise LaminaError(_blamed(error, way, model, dense, workload)) from error
        difference = held_against(before, made.ready(workload).answers(), runtime)
        if dynamic_batch:
            more = one_more(workload)
            held_against(answers(model, [more]), made.ready(more).answers(), runtime, f" with a batch of {more}")
        try:
            size = _put(file, target, kind.folder)
        except OSError as error:
            raise ArtifactError(f"{target} cannot be written: {error.strerror or error}") from error
        comparison = None
        if dense is not None and seconds:
            try:
                written = {model: made, dense: way.write(dense, workload, Path(scratch) / "original")}
                comparison = compare(dense, model, workload, seconds=seconds, runtime=_Files(way, written))
            except LaminaError as error:
                untimed = f"exported alike, it fails: {error}"
    much = _much(runtime)
    return Exported(str(target), kind.name, str(runtime), size, made.opset, difference, comparison, untimed, much)


def _dense(model: nn.Module, original: nn.Module | None) -> tuple[nn.Module | None, str]:
    """The network before it was decomposed, None where it is no other; or why there is none."""
    if original is not None:
        return unwrapped(original), ""
    if not any(isinstance(module, DecomposedLayer) for module in model.modules()):
        return None, ""
    try:
        return merge(model), ""
    except LaminaError as error:
        return None, f"the dense layers cannot be brought back: {error}"


@final
@dataclass(frozen=True, slots=True)
class _Made:
    """A file that was written, and how it is made ready for an example."""

    ready: Callable[[Workload], Prepared]
    opset: int | None = None


@final
@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    folder: bool
    runtime: Callable[[], Runtime]
    write: Callable[[nn.Module, Workload, Path, _Way], _Made]


@final
@dataclass(frozen=True, slots=True)
class _Way:
    """Everything that decides which file is made of a network: two that are compared are written in one way."""

    kind: _Format
    runtime: Any
    dynamic_batch: bool
    opset: int | None

    @property
    def label(self) -> str:
        """Of the times of a file."""
        parts = [self.runtime.label, f"file of {self.kind.name}"]
        parts += [f"opset {self.opset}"] if self.opset else []
        parts += ["any batch"] if self.dynamic_batch else []
        return ", ".join(parts)

    def write(self, model: nn.Module, workload: Workload, file: Path) -> _Made:
        """Write a network, in eval mode; it is only read.

        Raises:
            LaminaError: It cannot be exported.
        """
        if self.dynamic_batch:
            more = one_more(workload)
            try:
                answers(model, [more])
            except ExampleError as error:
                raise LaminaError(f"with one item more ({more}) {error}") from error
        twin = shadow(model)
        set_mode(twin, training=False)
        return self.kind.write(twin, workload, file, self)

    def writes(self, model: nn.Module, workload: Workload) -> bool:
        """Whether a network can be written."""
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self.write(model, workload, Path(scratch) / "out")
            except LaminaError:
                return False
        return True


def _blamed(error: LaminaError, way: _Way, model: nn.Module, dense: nn.Module | None, workload: Workload) -> str:
    """Why a network cannot be exported: whether for its batch alone it can, and whether the original can."""
    told = str(error)
    if way.dynamic_batch and dataclasses.replace(way, dynamic_batch=False).writes(model, workload):
        told = f"dynamic_batch is refused, and without it the network can be exported: {told}"
    if dense is None:
        return told
    if way.writes(dense, workload):
        return f"{told} (the network before it was decomposed can be exported)"
    return f"{told} (nor can the network before it was decomposed)"


@final
class _Files(Runtime):
    """Files that were written of networks, run where they are served: what is timed is what was written."""

    def __init__(self, way: _Way, written: Mapping[nn.Module, _Made]) -> None:
        self.way, self.written = way, written

    @property
    def label(self) -> str:
        """The runtime's, with what was written for it."""
        return self.way.label

    @property
    def own_threads(self) -> int | None:
        """The runtime's."""
        threads: int | None = self.way.runtime.own_threads
        return threads

    def check(self, models: Sequence[nn.Module], mode: Mode) -> None:
        """As the runtime does."""
        self.way.runtime.check(models, mode)

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """The network's file."""
        return self.written[model].ready(workload)


def _write_onnx(model: nn.Module, workload: Workload, file: Path, way: _Way) -> _Made:
    graph = way.runtime.onnx(model, workload, dynamic_batch=way.dynamic_batch, opset=way.opset)
    if graph.ByteSize() >= 2**31:
        raise LaminaError("it is larger than the 2 GB of one ONNX file: export it in float16, or for OpenVINO into a folder")
    version = int(next(each.version for each in graph.opset_import if not each.domain))
    if way.opset not in (None, version):
        raise LaminaError(f"opset {way.opset} cannot be had: the exporter writes {version}; give that, or leave opset out")
    file.write_bytes(graph.SerializeToString())
    check_file(file)
    return _Made(lambda workload: way.runtime.of_file(file, workload), version)


def _write_openvino(model: nn.Module, workload: Workload, file: Path, way: _Way) -> _Made:
    file.mkdir()
    way.runtime.save(model, workload, file, dynamic_batch=way.dynamic_batch)
    return _Made(lambda workload: way.runtime.of_file(file / "model.xml", workload))


def _write_program(model: nn.Module, workload: Workload, file: Path, way: _Way) -> _Made:
    program = exported_program(model, workload, way.dynamic_batch)
    with file.open("wb") as out:
        torch.export.save(program, out)
    return _Made(lambda workload: _program_of_file(file, workload))


def _program_of_file(file: Path, workload: Workload) -> Prepared:
    with file.open("rb") as saved, exporting():
        module = torch.export.load(saved).module()

    def run() -> Any:
        with exporting():
            return module(*workload.args, **workload.kwargs)

    try:
        run()
    except Exception as error:  # a program's guards, and the operators in it, may raise anything
        raise LaminaError(f"the program of torch.export does not run: {said(error)}") from error
    return Prepared(run, lambda: tensors_in(run()))


def exported_program(model: nn.Module, workload: Workload, dynamic_batch: bool = False) -> Any:
    """What `torch.export` makes of a network.

    Raises:
        LaminaError: It refuses it.
    """
    try:
        return program_of(model, workload, dynamic_batch=dynamic_batch)
    except Exception as error:  # an exporter, and a user's network in it, may raise anything
        raise LaminaError(f"torch.export refuses it: {said(error)}") from error


def _write_pte(model: nn.Module, workload: Workload, file: Path, way: _Way) -> _Made:
    file.write_bytes(way.runtime.program(model, workload, dynamic_batch=way.dynamic_batch))
    return _Made(lambda workload: way.runtime.of_file(file, workload))


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
    """Put what was made in its place, and give its size; a folder as a whole."""
    if not folder:
        with replaced(target) as temporary:
            shutil.copyfile(made, temporary)
        return target.stat().st_size
    _forbid_unwritable(target, folder)  # somebody may have put something there meanwhile
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(target) as fresh:
        for each in made.iterdir():
            shutil.copyfile(each, fresh / each.name)
    return sum(each.stat().st_size for each in target.iterdir())


def held_against(before: Sequence[Tensor], after: Sequence[Tensor], runtime: Runtime | str, on: str = "") -> float:
    """How far all outputs lie from the network's, relative to their size.

    Args:
        before: What the network answers in eager PyTorch.
        after: What it answers there.
        runtime: What answered; or its name, where it computes in the network's own precision.
        on: What was fed, for the message.

    Raises:
        LaminaError: There are others; or the first one that holds NaN or infinities where the network's does not, or differs by
            more than rounding; where the runtime computes more coarsely, one that has nothing to do with the network's.
    """
    if len(before) != len(after):
        raise LaminaError(f"what was exported has {len(after)} outputs{on}, and the network {len(before)}")
    moved = size = 0.0
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        title = f"output {number}" if len(before) > 1 else "its output"
        if tuple(old.shape) != tuple(new.shape):
            raise LaminaError(f"{title} is {tuple(new.shape)} in {runtime}{on}, and {tuple(old.shape)} in PyTorch")
        a, b = old.double().cpu(), new.double().cpu()
        if lost := int((a.isfinite() & ~b.isfinite()).sum()):
            raise LaminaError(f"{title} holds NaN or infinities in {runtime}{on}, {lost} of {a.numel()}{_cure(runtime)}")
        same = (a == b) | (a.isnan() & b.isnan())
        own = float(torch.where(same, 0.0, b - a).nan_to_num(math.inf).square().sum())
        of = float(a[a.isfinite()].square().sum())
        apart = math.sqrt(own / of) if of else math.inf if own else 0.0
        if _exact(runtime):
            if apart > _TOLERANCES.get(old.dtype, 0.0):
                raise LaminaError(f"{title} differs from PyTorch's by {apart:.2g} of its size in {runtime}{on}")
        elif old.is_floating_point() and apart >= _UNRELATED:
            told = f"{title} has nothing to do with PyTorch's in {runtime}{on}: it differs by {apart:.2g} of its size"
            raise LaminaError(f"{told}{_cure(runtime)}")
        moved, size = moved + own, size + of
    return math.sqrt(moved / size) if size else 0.0


def _exact(runtime: Runtime | str) -> bool:
    return isinstance(runtime, str) or runtime.exact


def _much(runtime: Runtime) -> float:
    """From which difference on outputs are warned of: in a precision, from its rounding on; in int8 that tells nothing."""
    if getattr(runtime, "int8", None) is not None:
        return MUCH
    return {str(dtype): most for dtype, most in _TOLERANCES.items()}.get(f"torch.{getattr(runtime, 'computes', '')}", MUCH)


def _cure(runtime: Runtime | str) -> str:
    """What to do where outputs in int8 or in halves are of no use."""
    if _exact(runtime):
        return ""
    if getattr(runtime, "int8", None) is not None:
        return "; give int8= more inputs, like those that it is served with, or export it without"
    return "; export it in float32"
