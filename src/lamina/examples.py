"""Examples without their values: what a plan remembers of the arguments that a network was run on, and how they are made again.

Arguments may be nested, as those of detectors are: a list of images, and a list of dicts of targets. A tensor is remembered by
its shape, its dtype and the range of its values, so that token ids made anew lie in the vocabulary, and lengths in the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias, cast, final

import torch
from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, Tag, model_validator
from torch import nn

from .errors import PlanError
from .files import FileValue
from .values import Workload, quantity

_MOST_BYTES = 2**33  # no example is larger, and what a plan says is believed no further
_DEEPEST = 32  # nor nested deeper, or else it holds itself
_CONSTANTS = (type(None), bool, int, float, str)


@final
class TensorShape(FileValue):
    """A tensor of an example, and the range of its values: None where it is not known, or not finite."""

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    low: int | float | None = None
    high: int | float | None = None

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        known = [end for end in (self.low, self.high) if end is not None]
        if len(known) == 1 or known != sorted(known):
            raise ValueError(f"no values lie between {self.low} and {self.high}")
        return self


@final
class SequenceShape(FileValue):
    """A list or tuple of an example."""

    kind: Literal["list", "tuple"]
    items: tuple[Entry, ...]


@final
class MappingShape(FileValue):
    """A dict of an example."""

    kind: Literal["dict"] = "dict"
    items: dict[str, Entry]


def _kind(entry: Any) -> str:
    """Which of the four an entry is, as it stands in a file or as a value; so that an error names the one that was meant."""
    if not isinstance(entry, dict | FileValue):
        return "constant"
    kind = entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)
    return "tensor" if kind is None else "dict" if kind == "dict" else "list"


Entry: TypeAlias = Annotated[
    Annotated[TensorShape, Tag("tensor")]
    | Annotated[SequenceShape, Tag("list")]
    | Annotated[MappingShape, Tag("dict")]
    | Annotated[bool | int | float | str | None, Tag("constant")],
    Discriminator(_kind),
]


@final
class ExampleShape(FileValue):
    """The arguments of an example without their values: enough to try a network again. Plain constants stand as they were."""

    args: tuple[Entry, ...] = ()
    kwargs: dict[str, Entry] = Field(default={})
    weight: PositiveFloat = 1.0


def example_shape(workload: Workload) -> ExampleShape | None:
    """A workload without its values; None where it holds what cannot be made again from a file.

    That is anything but dense tensors and plain constants, in lists, tuples and dicts with names as keys.
    """
    try:
        shape = ExampleShape(
            args=tuple(_entry(value) for value in workload.args),
            kwargs={name: _entry(value) for name, value in workload.kwargs.items()},
            weight=workload.weight,
        )
        # A file cannot hold every constant: infinity, for one, or half of a surrogate pair.
        held = ExampleShape.model_validate_json(shape.model_dump_json(), strict=True) == shape
    except (TypeError, ValueError):
        return None
    return shape if held and _bytes(shape) <= _MOST_BYTES else None


def example_from(shape: ExampleShape, model: nn.Module) -> Workload:
    """Random arguments of a recorded shape on a network's device, the same at each call.

    Values are drawn uniformly from the recorded range. Where there is none they are normal numbers, and zeros where integers
    or booleans are wanted.

    Raises:
        PlanError: There is no such tensor, or none can be made here.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # not the global one, whose state is the user's
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if _bytes(shape) > _MOST_BYTES:
        raise PlanError(f"the plan's example makes no sense: its tensors take more than {quantity(_MOST_BYTES)} bytes")

    def value(entry: Entry) -> Any:
        if isinstance(entry, TensorShape):
            return _drawn(entry, generator, device)
        if isinstance(entry, MappingShape):
            return {name: value(item) for name, item in entry.items.items()}
        if isinstance(entry, SequenceShape):
            items = [value(item) for item in entry.items]
            return items if entry.kind == "list" else tuple(items)
        return entry

    workload = Workload(tuple(value(entry) for entry in shape.args), shape.weight)
    workload.kwargs.update({name: value(entry) for name, entry in shape.kwargs.items()})
    return workload


def _entry(value: Any, depth: int = 0) -> Entry:
    """What is remembered of an argument. Types must be exact: a subclass would come back as something else."""
    if depth > _DEEPEST:
        raise TypeError("nested too deep")
    if isinstance(value, torch.Tensor):
        return _tensor_shape(value)
    if type(value) in _CONSTANTS:
        return cast(Entry, value)
    if type(value) is dict:
        return MappingShape(items={name: _entry(item, depth + 1) for name, item in value.items()})
    if type(value) in (list, tuple):
        return SequenceShape(
            kind="list" if type(value) is list else "tuple", items=tuple(_entry(item, depth + 1) for item in value)
        )
    raise TypeError(f"a {type(value).__name__} cannot be made again from a file")


def _tensor_shape(tensor: torch.Tensor) -> TensorShape:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"a {tensor.layout} tensor has more to it than its shape")
    try:
        _drawn(TensorShape(shape=(1,), dtype=dtype), torch.Generator("cpu"), torch.device("cpu"))
    except PlanError as error:
        raise TypeError(str(error)) from error
    low, high = _range(tensor)
    return TensorShape(shape=tuple(tensor.shape), dtype=dtype, low=low, high=high)


def _range(tensor: torch.Tensor) -> tuple[float, float] | tuple[None, None]:
    """The least and the largest value; nothing where PyTorch cannot say: no elements, complex ones, or none in memory."""
    try:
        try:
            ends = torch.aminmax(tensor)
        except NotImplementedError:  # of a type that PyTorch stores, but does not compare
            ends = torch.aminmax(tensor.to(_drawing_type(tensor.dtype)))
        low, high = ends.min.item(), ends.max.item()
    except RuntimeError:
        return None, None
    if tensor.dtype.is_floating_point:
        return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
    wrapped = low < 0 and not tensor.dtype.is_signed  # unsigned, and too large for the type in which it was compared
    return (None, None) if wrapped else (int(low), int(high))


def _drawing_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which values are drawn before they are rounded to their own."""
    if dtype.is_complex:
        return torch.complex128 if dtype.itemsize > 8 else torch.complex64
    if dtype.is_floating_point:
        return torch.float64 if dtype.itemsize > 4 else torch.float32
    return torch.int64


def _drawn(entry: TensorShape, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    dtype = _dtype(entry)
    try:
        # The device is named at each call, for the default one may be any.
        values = torch.empty(entry.shape, dtype=_drawing_type(dtype), device="cpu")
        if entry.low is not None and entry.high is not None:
            _fill_between(values, _within(entry, dtype), generator)
        elif dtype.is_floating_point or dtype.is_complex:
            values.normal_(generator=generator)
        else:
            values.zero_()
        return values.to(device, dtype)
    except (RuntimeError, TypeError, ValueError) as error:  # what PyTorch says of sides and types that it cannot make
        raise _nonsense(entry, str(error).partition("\n")[0]) from error


def _fill_between(values: torch.Tensor, ends: tuple[float, float], generator: torch.Generator) -> None:
    """Fill with uniform values, both ends included."""
    low, high = ends
    if values.dtype == torch.int64:
        top = torch.iinfo(torch.int64).max
        values.random_(int(low), int(high) + 1 if high < top else None, generator=generator)
    else:
        part = values.uniform_(generator=generator)
        # Not low + part · (high − low): the difference of two finite numbers may be infinite.
        values.copy_((part * high + (1 - part) * low).clamp_(low, high))


def _within(entry: TensorShape, dtype: torch.dtype) -> tuple[float, float]:
    """The recorded range, if the dtype has it."""
    low, high = cast(float, entry.low), cast(float, entry.high)
    try:
        least, most = _limits(dtype)
    except (RuntimeError, TypeError):  # complex numbers and bits have no order
        least, most = 0, -1
    whole = dtype.is_floating_point or (isinstance(low, int) and isinstance(high, int))
    if not (whole and least <= low <= high <= most):
        raise _nonsense(entry, f"it has no values between {low} and {high}")
    return low, high


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.bool:
        return 0, 1
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min, limits.max


def _dtype(entry: TensorShape) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise _nonsense(entry, "there is no such dtype")
    return dtype


def _tensors(entries: Iterable[Entry]) -> Iterator[TensorShape]:
    """Every tensor among some arguments."""
    for entry in entries:
        if isinstance(entry, TensorShape):
            yield entry
        elif isinstance(entry, SequenceShape):
            yield from _tensors(entry.items)
        elif isinstance(entry, MappingShape):
            yield from _tensors(entry.items.values())


def _bytes(shape: ExampleShape) -> int:
    """What the tensors of an example take in memory."""
    found = _tensors((*shape.args, *shape.kwargs.values()))
    return sum(math.prod(tensor.shape) * _dtype(tensor).itemsize for tensor in found)


def _nonsense(entry: TensorShape, why: str) -> PlanError:
    return PlanError(f"the plan's example makes no sense: a tensor of {entry.dtype}, {entry.shape}: {why}")
