"""Options that several commands share: the network, what it is fed, the conditions it runs under, and how ranks are chosen."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
import typer
from torch import Tensor, nn

from ..choose.rules import AtRatio, Energy, Evbmf, LargestStep, Plateau, Rule
from ..errors import GoalError, LaminaError, ModelError
from ..examples import example_from
from ..goals import Budget, Macs, Milliseconds, Parameters, Speedup
from ..models import load_model
from ..network.running import first_line
from ..plan import ExampleShape, Plan, TensorShape
from ..runtimes.compiled import Compiled
from ..runtimes.eager import Eager
from ..runtimes.executorch import ExecuTorch
from ..runtimes.onnxruntime import OnnxRuntime
from ..runtimes.openvino import OpenVINO
from ..runtimes.runtime import Runtime
from ..runtimes.tensorrt import TensorRT
from ..schedules import Schedule, SequentialFreezing, VanillaFreezing
from ..values import Inference, Mode, Training, Workload
from .command import Told

_THREADS_A_CORE = 8
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@final
@dataclass(frozen=True, slots=True)
class Input:
    """One ``--input``: the tensors of one call, each with its shape and perhaps its dtype, and the weight of this workload."""

    tensors: tuple[tuple[tuple[int, ...], str | None], ...]
    weight: float = 1.0


def parse_input(text: str) -> Input:
    """Read ``8,3,224,224``, ``2,9:int64;2,9:bool`` or ``8,3,224,224@0.5``.

    Raises:
        BadParameter: It says something else.
    """
    tensors, at, weight = text.partition("@")
    try:
        share = float(weight) if at else 1.0
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share > 0):
        raise typer.BadParameter(f"{text!r}: the weight after @ must be a positive number.")
    return Input(tuple(_tensor(text, part) for part in tensors.split(";")), share)


def _tensor(text: str, part: str) -> tuple[tuple[int, ...], str | None]:
    sides, colon, dtype = part.partition(":")
    try:
        shape = tuple(int(side) for side in sides.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"{text!r}: write a shape of whole numbers above 0, batch first, such as 8,3,224,224.")
    if colon and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise typer.BadParameter(f"{text!r}: there is no dtype {dtype!r}; write int64, float32 or the like.")
    return shape, dtype if colon else None


class DtypeName(StrEnum):
    """Data types that a network can be converted to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


_RULES: dict[str, Callable[..., Rule]] = {
    "plateau": Plateau,
    "largest-step": LargestStep,
    "at-ratio": AtRatio,
    "energy": Energy,
    "evbmf": Evbmf,
}


def parse_rule(text: str) -> Rule:
    """Read ``plateau``, or ``energy:0.9``: a rule at its defaults, or with its first setting.

    Raises:
        BadParameter: It says something else.
    """
    name, colon, number = text.partition(":")
    if name not in _RULES:
        raise typer.BadParameter(f"{text!r}: the rules are {', '.join(_RULES)}.")
    try:
        return _RULES[name](float(number)) if colon else _RULES[name]()
    except TypeError as error:
        raise typer.BadParameter(f"{text!r}: {name} takes no number.") from error
    except (ValueError, GoalError) as error:
        raise typer.BadParameter(f"{text!r}: {error}.") from error


class FreezingName(StrEnum):
    """Which factors rest while others train."""

    sequential = "sequential"
    vanilla = "vanilla"
    none = "none"

    def schedule(self, period: int, unfrozen_last: int) -> Schedule | None:
        """The schedule of this name."""
        if self is FreezingName.sequential:
            return SequentialFreezing(period=period, unfrozen_last=unfrozen_last)
        return VanillaFreezing() if self is FreezingName.vanilla else None


class RuntimeName(StrEnum):
    """What runs the network: the name, and what it stands for."""

    eager = "eager", Eager
    folded = "folded", partial(Eager, folded=True)
    compile = "compile", Compiled
    onnxruntime = "onnxruntime", OnnxRuntime
    openvino = "openvino", OpenVINO
    openvino_bfloat16 = "openvino-bfloat16", partial(OpenVINO, precision="bfloat16")
    executorch = "executorch", ExecuTorch
    tensorrt = "tensorrt", TensorRT

    make: Callable[[], Runtime]

    def __new__(cls, name: str, make: Callable[[], Runtime]) -> RuntimeName:
        """A member that is its name."""
        member = str.__new__(cls, name)
        member._value_, member.make = name, make
        return member

    @property
    def value_of(self) -> Runtime:
        """As `make_plan` and `compare` take it."""
        return self.make()


RuntimeOption = Annotated[
    RuntimeName,
    typer.Option(
        "--runtime",
        help="What runs the network: PyTorch (folded: with batch norms folded into convolutions; compile: torch.compile), "
        "or what serves it.",
    ),
]


class ModeName(StrEnum):
    """What is timed."""

    inference = "inference"
    training = "training"


@final
@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed: a forward pass, or a training step, under a freezing perhaps."""

    mode: Annotated[ModeName, typer.Option(help="What is timed: a forward pass, or forward and backward.")] = ModeName.inference
    freezing: Annotated[
        FreezingName, typer.Option(help="With --mode training: the freezing under which the network is trained.")
    ] = FreezingName.none

    @property
    def value(self) -> Mode:
        """As `make_plan` and `compare` take it."""
        schedule = self.freezing.schedule(1, 0)
        if self.mode is ModeName.training:
            return Training(freezing=schedule)
        if schedule:
            raise typer.BadParameter("--freezing is for --mode training: nothing rests in a forward pass")
        return Inference()


_Inputs = typer.Option(
    "--input",
    parser=parse_input,
    metavar="SHAPE",
    show_default=False,
    help="Shape of the example, batch first: 8,3,224,224. With a dtype: 2,9:int64 (zeros). Several tensors of one call: "
    "'1,8;1,8'. Several workloads: repeat it, each with its weight: 1,3,64,64@0.5.",
)

RuleIfAny = Annotated[
    Rule | None,
    typer.Option(
        "--rule",
        parser=parse_rule,
        metavar="RULE",
        show_default=False,
        help=f"How ranks follow from a ratio: {', '.join(_RULES)}; plateau by default. at-ratio times nothing. With a number: "
        "energy:0.9 (the share of the weight to hold), evbmf:0.1 (the least share of the full rank).",
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", show_default=False, help="torchvision:NAME, timm:NAME, hf:ID or package.module:factory."),
]
Inputs = Annotated[list[Input], _Inputs]
InputsIfAny = Annotated[list[Input] | None, _Inputs]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", show_default=False, help="A plan.json.")]
SavedFolder = Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False, help="What lamina apply wrote.")]


def destination(help: str, metavar: Literal["FILE", "FOLDER", "PATH"] = "FILE", *names: str) -> Any:
    """An option for what a command writes. What cannot be written is refused before the work rather than after it.

    Args:
        help: What is written there.
        metavar: A file, whose folder is there; a folder, which is made; or one of both.
        names: By default ``--output`` and ``-o``.
    """

    def checked(path: Path | None) -> Path | None:
        if path is None or os.environ.get("RANK", "0") != "0":  # of many processes the first one writes
            return path
        if str(path) == "-":
            raise LaminaError(f"- cannot be written: name a {metavar.lower()}; on stdout --json prints the result")
        if why := _no_file(path) if metavar == "FILE" else _no_folder(path) if metavar == "FOLDER" else "":
            raise LaminaError(f"{path} cannot be written: {why}")
        return path

    return typer.Option(*(names or ("--output", "-o")), metavar=metavar, show_default=False, help=help, callback=checked)


def _no_file(path: Path) -> str:
    """Why a file cannot be written, as far as that can be told before; empty where nothing speaks against it."""
    if path.is_dir():
        return "it is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return "" if os.access(path.parent, os.W_OK) else f"the folder {path.parent} is not writable"


def _no_folder(path: Path) -> str:
    """The same of a folder that may have to be made."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir():
        return "it is a file" if path.exists() else f"{there} is a file"
    return "" if os.access(there, os.W_OK) else f"the folder {there} is not writable"


Output = Annotated[Path | None, destination("Where it is written.")]
Autocast = Annotated[bool, typer.Option("--autocast", help="Run under torch.autocast, in its default type of the device.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0, help="About how long to measure each workload.")]


@final
@dataclass(frozen=True, slots=True)
class Layers:
    """Which layers are considered, by patterns as in the shell."""

    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only layers that match, as in the shell; may be repeated.")
    ] = None
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave layers that match dense; may be repeated.")
    ] = None

    @property
    def patterns(self) -> dict[str, Any]:
        """As `make_plan` takes them."""
        return {"include": self.include or [], "skip": self.skip or []}


def _possible_threads(threads: int | None) -> int | None:
    """Some more threads than cores may be asked for; with very many PyTorch crashes."""
    cores = os.cpu_count() or 1
    if threads and threads > _THREADS_A_CORE * cores:
        raise typer.BadParameter(f"{threads} threads are too many: this machine has {cores} cores.")
    return threads


@final
@dataclass(frozen=True, slots=True)
class Conditions:
    """How a network is made ready: its weights, and the device, data type, memory format and threads it runs with."""

    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The network's state dict: a safetensors file, the index of many (model.safetensors.index.json) or their "
            "folder, or a checkpoint.",
        ),
    ] = None
    dtype: Annotated[DtypeName | None, typer.Option(help="Convert the network; by default it stays as it is made.")] = None
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Lay out convolution weights and inputs channels last.")
    ] = False
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", callback=_possible_threads, help="Threads on the CPU; by default what PyTorch takes."),
    ] = None
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where the network runs: cpu, cuda, cuda:1, …")] = "cpu"

    def load(self, name: str) -> nn.Module:
        """The network of a name, made ready.

        Raises:
            ModelError: The name leads nowhere, or the weights do not fit.
            LaminaError: The device cannot be used.
        """
        device = _usable(self.device)
        model = load_model(name, self.weights).to(device, getattr(torch, self.dtype) if self.dtype else None)
        if self.channels_last:
            for parameter in model.parameters():
                parameter.data = _laid_out(parameter.data)
        return model

    def without_values(self, name: str) -> nn.Module:
        """The network of a name on the meta device, where it takes no memory.

        Raises:
            ModelError: The name leads nowhere, or the network cannot be made without values.
        """
        try:
            with torch.device("meta"):
                return load_model(name)
        except ModelError as error:
            raise ModelError(
                f"{error}; layer by layer the network is made under torch.device('meta'), without values"
            ) from error

    @property
    def usable_device(self) -> torch.device:
        """The device.

        Raises:
            LaminaError: It cannot be used.
        """
        return _usable(self.device)

    def without_weights(self) -> Conditions:
        """The same for a network whose weights come from elsewhere."""
        return dataclasses.replace(self, weights=None)

    def examples(self, inputs: Sequence[Input], model: nn.Module) -> list[Workload]:
        """What a network is fed, in its own dtype where none is named, on its device."""
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        return [self._example(each, str(own).removeprefix("torch."), model) for each in inputs]

    def _example(self, each: Input, own: str, model: nn.Module) -> Workload:
        shapes = tuple(TensorShape(shape=shape, dtype=dtype or own) for shape, dtype in each.tensors)
        workload = example_from(ExampleShape(args=shapes, weight=each.weight), model)
        if not self.channels_last:
            return workload
        return Workload(tuple(_laid_out(tensor) for tensor in workload.args), each.weight)

    @contextlib.contextmanager
    def applied(self, autocast: bool = False) -> Iterator[None]:
        """Set the number of threads, and autocast where asked for; both are put back."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            # Casts are not kept from one forward to the next: in use, every forward enters autocast anew.
            with torch.autocast(_usable(self.device).type, cache_enabled=False) if autocast else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)


Reasons = Annotated[bool, typer.Option("--reasons", help="Print every layer by itself, with the reason for its form.")]


def told(plan: Plan, reasons: bool) -> Told:
    """A plan as commands print it."""
    return Told(plan, lambda width: plan.text(width, reasons=reasons))


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise LaminaError("device 'meta' cannot be used here: nothing is computed on it")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        raise LaminaError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    return device


def _laid_out(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.ndim not in _CHANNELS_LAST:
        return tensor
    return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.ndim])


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a whole network may cost; several limits hold together."""

    speedup: Annotated[float | None, typer.Option(help="Make the network this many times faster, and change it least.")] = None
    milliseconds: Annotated[float | None, typer.Option(help="At most so long for one call.")] = None
    macs: Annotated[float | None, typer.Option(help="At most so many multiply-accumulates.")] = None
    parameters: Annotated[float | None, typer.Option(help="At most so many parameters.")] = None

    @property
    def limits(self) -> list[Budget]:
        """As they are taken in Python; none where none was given."""
        given = ((Speedup, self.speedup), (Milliseconds, self.milliseconds), (Macs, self.macs), (Parameters, self.parameters))
        return [kind(value) for kind, value in given if value is not None]
