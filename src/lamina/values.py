"""What the rooms hand each other: the geometry of a layer, its use on an example, costs, timings and their settings.

Plain frozen values with JSON-friendly fields, so that they can be compared, hashed, printed and written into a plan.

    O, I   output, input channels (features)     k    kernel side lengths, one a spatial dimension
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self, TypeAlias, final

import torch
from pydantic import AfterValidator, Field, GetPydanticSchema, model_validator
from torch import nn

from .errors import ExampleError, FreezingError
from .schedules import Phase, Schedule

# What numbers of a file may be. Only reading a file holds them against it: a value that is made in Python checks nothing.
Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Side: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]

# Kernel sides of every type of layer.
DIMENSIONS = {"Linear": 0, "Conv1D": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}
DIMENSIONS |= {"ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3}

# What the inputs of layers are of.
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def _one_of(*words: str) -> GetPydanticSchema:
    return GetPydanticSchema(lambda _, handler: handler(Literal[words]))


def _countable(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) >= 2**63:
        raise ValueError("no tensor has so many elements")
    return shape


Shape: TypeAlias = Annotated[tuple[Count, ...], Field(max_length=64), AfterValidator(_countable)]


@final
@dataclass(frozen=True, slots=True)
class Geometry:
    """What one must know of a layer to decompose it: the shape of its weight and how it meets its input.

    ``kernel`` is empty for a linear layer. ``padding`` is a string where the layer says ``"same"`` or ``"valid"``.
    ``output_padding`` is empty but for a transposed convolution. Channels are those of all groups together.
    """

    type: Annotated[str, _one_of(*DIMENSIONS)]
    out_channels: Side
    in_channels: Side
    bias: bool
    kernel: tuple[Side, ...] = ()
    stride: tuple[Side, ...] = ()
    padding: tuple[Count, ...] | Literal["same", "valid"] = ()
    dilation: tuple[Side, ...] = ()
    padding_mode: Annotated[str, _one_of("zeros", "reflect", "replicate", "circular")] = "zeros"
    output_padding: tuple[Count, ...] = ()
    groups: Side = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Every tuple has as many numbers as the type has kernel sides, and the weight can exist."""
        if self.type not in DIMENSIONS:
            raise ValueError(f"{self.type!r} is no type of layer that is known: {', '.join(DIMENSIONS)}")
        sides = DIMENSIONS[self.type]
        for name in ("kernel", "stride", "padding", "dilation", "output_padding"):
            value: tuple[int, ...] | str = getattr(self, name)
            wanted = sides if self.transposed or name != "output_padding" else 0
            if sides == 0 or self.transposed if isinstance(value, str) else len(value) != wanted:
                raise ValueError(f"{name} {value!r} of a {self.type}, whose kernel has {sides} sides")
        _countable((self.out_channels, self.in_channels, *self.kernel))
        whole = self.out_channels % self.groups == self.in_channels % self.groups == 0
        if self.groups > 1 and (not self.kernel or self.transposed or not whole):
            raise ValueError(f"{self.groups} groups of a {self.type} {self.in_channels}→{self.out_channels}")
        return self

    @property
    def widths(self) -> tuple[int, int]:
        """Input and output channels of one group."""
        return self.in_channels // self.groups, self.out_channels // self.groups

    @property
    def taps(self) -> int:
        """``k²``: the number of weights per pair of channels."""
        return math.prod(self.kernel)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution, which lays its kernel on each place of its input."""
        return self.type.startswith("ConvTranspose")

    @property
    def pointwise(self) -> bool:
        """Whether the weight is a plain ``(O, I)`` matrix, or one for each group: linear layers and 1×1 convolutions."""
        return self.taps == 1

    @property
    def patchable(self) -> bool:
        """Whether patches of its input tell more than its channels: it has a kernel, and reads all channels at once.

        A moment of patches of a layer in groups would be of all groups together, of which most is used by none.
        """
        return self.taps > 1 and self.groups == 1

    @property
    def parameters(self) -> int:
        """Weights and biases of the dense layer."""
        return self.out_channels * self.widths[0] * self.taps + self.bias_parameters

    @property
    def bias_parameters(self) -> int:
        """Biases of the dense layer, and of every form of it."""
        return self.out_channels if self.bias else 0

    def __str__(self) -> str:
        """``Conv2d 256→512 3×3 stride 2``."""
        words = [self.type, f"{self.in_channels}→{self.out_channels}"]
        if self.kernel:
            words.append("×".join(map(str, self.kernel)))
        if any(s != 1 for s in self.stride):
            words.append("stride " + "×".join(map(str, dict.fromkeys(self.stride))))
        if self.groups > 1:
            words.append(f"in {self.groups} groups")
        return " ".join(words)


@final
@dataclass(frozen=True, slots=True)
class Use:
    """How the example uses a layer: shapes of one call's input and output, the number of calls, and their weight.

    The weight is that of the workload the calls belong to; it is 1 where there is one workload. ``input_dtype`` is None where
    the input is of the weight's dtype, as it always is but under autocast; ``autocast`` is what was on at the call.
    """

    input_shape: Shape
    output_shape: Shape
    calls: Side = 1
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    input_dtype: Annotated[str, _one_of(*_FLOATS)] | None = None
    autocast: Annotated[str, _one_of("off", *_FLOATS)] = "off"

    def positions(self, layer: Geometry) -> tuple[int, int]:
        """Places at which the layer's channels are read, and at which they are written, in one call.

        For a linear layer both are the product of all leading dimensions; for a convolution, batch × map.
        """
        if not layer.kernel:
            return math.prod(self.input_shape[:-1]), math.prod(self.output_shape[:-1])
        return tuple(  # type: ignore[return-value]
            math.prod(shape) // channels
            for shape, channels in ((self.input_shape, layer.in_channels), (self.output_shape, layer.out_channels))
        )

    def laid_on(self, layer: Geometry) -> int:
        """Places on which the kernel is laid in one call: those of the output, or of a transposed convolution's input."""
        return self.positions(layer)[0 if layer.transposed else 1]


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """The conditions of a timing. Two timings compare only where their settings are equal."""

    device: str
    device_name: str
    dtype: str
    memory_format: str
    threads: Side
    mode: str
    freezing: str = "off"
    autocast: str = "off"
    runtime: str = "eager"
    flush_denormals: bool = False
    versions: str = ""
    kernels: str = ""  # the switches that are not as in a fresh torch

    def __str__(self) -> str:
        """One line, as printed beside a number."""
        parts = [
            f"{self.device} ({self.device_name})",
            *([f"{self.threads} threads"] if self.device == "cpu" else []),
            self.dtype,
            self.memory_format,
            self.mode,
            self.runtime,
            self.versions,
        ]
        if self.kernels:
            parts.append(self.kernels)
        if self.freezing != "off":
            parts.insert(parts.index(self.mode) + 1, self.freezing)
        if self.autocast != "off":
            parts.insert(parts.index(self.dtype) + 1, f"autocast {self.autocast}")
        return ", ".join(parts)


@final
@dataclass(frozen=True, slots=True)
class Timing:
    """Median and median absolute deviation of repeated runs, in seconds, with the conditions they were taken under."""

    median_s: float
    mad_s: Annotated[float, Field(ge=0)]
    repeats: Count
    setting: Setting

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return self.median_s * 1e3

    def __str__(self) -> str:
        """``4.21 ms ± 0.03 (25 runs)``."""
        return f"{self.median_ms:.3g} ms ± {self.mad_s * 1e3:.2g} ({self.repeats} runs)"


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters, multiply-accumulates and, where measured, seconds with their spread.

    MACs count every call that the example makes, biases as one each.
    """

    parameters: Count
    macs: Count
    timing: Timing | None = None

    def __str__(self) -> str:
        """``2.36 M parameters, 462 M MACs, 4.2 ms ± 0.03``."""
        words = f"{quantity(self.parameters)} parameters, {quantity(self.macs)} MACs"
        return f"{words}, {self.timing}" if self.timing else words


@final
@dataclass(frozen=True, slots=True)
class Inference:
    """Times are those of a forward pass in eval mode, without gradients."""

    name: Literal["inference"] = "inference"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One: nothing trains, so nothing rests."""
        return (Phase(None, 1.0),)

    @property
    def freezing(self) -> None:
        """Nothing is trained."""
        return None

    @property
    def unfrozen(self) -> Inference:
        """The same."""
        return self

    def of_layer(self, name: str) -> Inference:
        """The same for every layer."""
        return self


@final
@dataclass(frozen=True, slots=True)
class Training:
    """Times are those of a training step: forward and backward in train mode.

    With a freezing schedule they are the mean over its phases, weighted by their shares; a dense layer never rests.
    """

    freezing: Schedule | None = None
    name: Literal["training"] = "training"

    def __post_init__(self) -> None:
        if not (self.freezing is None or isinstance(self.freezing, Schedule)):
            raise FreezingError(f"freezing is {self.freezing!r}; give a schedule, such as lamina.SequentialFreezing(), or None")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the schedule; without one, a single phase in which all train."""
        return self.freezing.phases() if self.freezing else (Phase(None, 1.0),)

    @property
    def unfrozen(self) -> Training:
        """Without freezing: the mode of a dense network, in which nothing rests."""
        return Training()

    def of_layer(self, name: str) -> Training:
        """The mode as one layer sees it: without freezing where the schedule excludes it."""
        return self if self.freezing is None or self.freezing.concerns(name) else self.unfrozen


Mode = Inference | Training


@final
@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What a network is really fed: positional and keyword arguments, and the weight of its time among several.

    ``example`` is a tensor, a tuple of positional arguments or a mapping of keyword arguments, batch included.
    """

    example: Any
    weight: float = 1.0
    args: tuple[Any, ...] = field(init=False)
    kwargs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        args: tuple[Any, ...]
        if isinstance(self.example, Mapping):
            args, kwargs = (), dict(self.example)
        elif isinstance(self.example, tuple):
            args, kwargs = self.example, {}
        else:
            args, kwargs = (self.example,), {}
        if isinstance(self.weight, bool) or not (isinstance(self.weight, Real) and 0 < self.weight < math.inf):
            raise ExampleError(f"a workload's weight is {self.weight!r}; it must be a positive number")
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)

    def run(self, model: nn.Module) -> Any:
        """The model's output on this example."""
        return model(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, in order."""
        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def __str__(self) -> str:
        """The shapes, as in ``8×3×224×224``."""
        return ", ".join("×".join(map(str, t.shape)) or "scalar" for t in self.tensors) or "no tensor"


def workloads(example: Any) -> list[Workload]:
    """Read an ``example`` argument: one example, one workload, or a list of workloads whose weights are made to sum to 1.

    Raises:
        ExampleError: A list holds something else than workloads, or nothing.
    """
    if isinstance(example, Workload):
        example = [example]
    if not isinstance(example, list):
        return [Workload(example)]
    if not example or not all(isinstance(item, Workload) for item in example):
        raise ExampleError("a list of examples must hold lamina.Workload(example, weight) objects; one example needs no list")
    total = sum(item.weight for item in example)
    return [Workload(item.example, item.weight / total) for item in example]


def input_of(item: Any) -> Workload:
    """What a network is fed from one item of a ``data`` argument: an example, or an (input, target) pair.

    A list or tuple of two is a pair, as loaders give them, and its first entry the example; a network that takes two positional
    arguments is fed by ``Workload((a, b))``, or by pairs of such a tuple and a target.

    Raises:
        ExampleError: A list of another length is neither.
    """
    if isinstance(item, Workload):
        return item
    if isinstance(item, list | tuple) and len(item) == 2:
        return arguments(item[0])
    if isinstance(item, list):
        cure = "an item is an example or an (input, target) pair, as are those of ((item[0], None) for item in data)"
        raise ExampleError(f"data holds a list of {len(item)}; {cure}")
    return Workload(item)


def arguments(value: Any) -> Workload:
    """The arguments of a network in an input: a list or tuple is spread over them, a mapping names them."""
    return value if isinstance(value, Workload) else Workload(tuple(value) if isinstance(value, list) else value)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``: a dtype as settings, uses and files name it."""
    return str(dtype).removeprefix("torch.")


def quantity(number: float) -> str:
    """Three significant digits with a unit prefix: ``25.6 M``."""
    size, unit = _unit(number)
    return f"{number / size:.3g}{unit}"


def change(before: float, after: float) -> str:
    """Two quantities in the unit of the larger one: ``25.6 → 0.81 M``; one where they are equal."""
    if before == after:
        return quantity(before)
    size, unit = _unit(max(before, after, key=abs))
    return f"{before / size:.3g} → {after / size:.3g}{unit}"


def _unit(number: float) -> tuple[float, str]:
    return next(((size, unit) for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)) if abs(number) >= size), (1.0, ""))


def as_number(value: object) -> float:
    """A number of any kind, NumPy's too, as Python's own, so that it can be written; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return int(value) if isinstance(value, Integral) and math.isfinite(value) else float(value)
    except OverflowError:
        return math.inf


def quoted(value: object) -> str:
    """What was given, for an error message: as Python writes it where that is short and of one line, else its type."""
    text = repr(value)
    return text if len(text) <= _SHORT and "\n" not in text else f"a {type(value).__name__}"


_SHORT = 80


def closest(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: what was probably meant."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else ""
