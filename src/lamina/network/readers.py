"""Which layer is this? The one table from a layer's type to what can be known of it.

The rest of the library sees a `Geometry`, a weight of shape ``(O, I, *kernel)`` and a bias; of a convolution in groups I is one
group's. A new kind of layer is one reader here.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..values import DIMENSIONS, Geometry
from .running import outside_inference_mode


class Reader(ABC):
    """How one type of layer is read, and how a dense layer of that type is made again.

    ``kind`` is the type's name in a `Geometry`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @abstractmethod
    def geometry(self, layer: nn.Module) -> Geometry | str:
        """The layer's geometry, or the reason why it cannot be decomposed.

        Channels and kernel are those of the weight, which PyTorch computes with, whatever the layer's attributes say.
        """

    def weight(self, stored: Tensor) -> Tensor:
        """The weight as ``(O, I, *kernel)``, from the way in which the layer stores it; a view."""
        return stored

    def stored(self, weight: Tensor) -> Tensor:
        """A weight ``(O, I, *kernel)`` in the way in which the layer stores it; a view."""
        return weight

    @abstractmethod
    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A dense layer of this type with weight ``(O, I, *kernel)`` and bias ``(O,)`` as given (not copied)."""

    @abstractmethod
    def attributes(self, geometry: Geometry) -> dict[str, Any]:
        """What a layer of this type tells of its geometry, by the names that it has for it."""


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer._parameters["weight"] = _parameter(weight)
    if bias is not None:
        layer._parameters["bias"] = _parameter(bias)
    return layer


def _parameter(values: Tensor) -> nn.Parameter:
    return values if isinstance(values, nn.Parameter) else nn.Parameter(values, requires_grad=values.requires_grad)


@final
class LinearReader(Reader):
    """`torch.nn.Linear`."""

    def geometry(self, layer: nn.Module) -> Geometry | str:
        """From its weight."""
        weight = cast(Tensor, layer.weight)
        if weight.ndim != 2:
            return f"its weight has {weight.ndim} dimensions, not 2"
        return Geometry(self.kind, weight.shape[0], weight.shape[1], layer.bias is not None)

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors."""
        return _fill(linear(geometry.in_channels, geometry.out_channels, geometry.bias), weight, bias)

    def attributes(self, geometry: Geometry) -> dict[str, Any]:
        """``in_features``, ``out_features``."""
        return {"in_features": geometry.in_channels, "out_features": geometry.out_channels}


_CONVOLUTIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}


_NARROW = 16
"""Channels of a group below which its factors gain next to nothing: ``benchmarks/grouped.py`` has measured it."""


def _groups_refused(groups: int, out: int, into: int, transposed: bool) -> str | None:
    """Why a convolution that has groups is not decomposed; None where it can be, each group by itself.

    Args:
        groups: How many.
        out: Output channels of its weight ``(O, I / groups, *kernel)``, or of a transposed one ``(O / groups, I, *kernel)``.
        into: Its input channels.
        transposed: Whether it is transposed.
    """
    i, o = (into // groups, out) if transposed else (into, out // groups)
    if i == o == 1:
        return "it is depthwise, one filter for each channel: there are no channels to cut"
    if transposed:
        return f"it has {groups} groups of {i}→{o} channels: a transposed convolution is decomposed only in one group"
    if min(i, o) < _NARROW:
        return f"it has {groups} groups of {i}→{o} channels: groups of fewer than {_NARROW} are too narrow to gain by factors"
    return None


class ConvReader(Reader):
    """`torch.nn.Conv1d`, `Conv2d` and `Conv3d`."""

    def geometry(self, layer: nn.Module) -> Geometry | str:
        """From its weight; stride, padding and dilation from its attributes, as PyTorch reads them."""
        conv, stored = cast(nn.Conv2d, layer), cast(Tensor, layer.weight)
        if stored.ndim != 2 + DIMENSIONS[self.kind]:
            return f"its weight has {stored.ndim} dimensions, not {2 + DIMENSIONS[self.kind]}"
        weight = self.weight(stored)
        transposed = self.kind.startswith("ConvTranspose")
        if conv.groups != 1 and (reason := _groups_refused(conv.groups, weight.shape[0], weight.shape[1], transposed)):
            return reason
        kernel = tuple(weight.shape[2:])

        def sides(value: int | Iterable[int]) -> tuple[int, ...]:
            # PyTorch takes a number, or a list of one, for all dimensions.
            each = (value,) if isinstance(value, int) else tuple(value)
            return each * len(kernel) if len(each) == 1 else each

        return Geometry(
            self.kind,
            weight.shape[0],
            weight.shape[1] * conv.groups,
            conv.bias is not None,
            kernel,
            sides(conv.stride),
            cast(Any, conv.padding if isinstance(conv.padding, str) else sides(conv.padding)),
            sides(conv.dilation),
            conv.padding_mode,
            sides(conv.output_padding) if transposed else (),
            conv.groups,
        )

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors."""
        return _fill(convolution(geometry), weight, bias)

    def attributes(self, geometry: Geometry) -> dict[str, Any]:
        """Those of `nn.ConvNd`."""
        return {
            "in_channels": geometry.in_channels,
            "out_channels": geometry.out_channels,
            "kernel_size": geometry.kernel,
            "stride": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "padding_mode": geometry.padding_mode,
            "groups": geometry.groups,
            "transposed": geometry.transposed,
            "output_padding": geometry.output_padding or (0,) * len(geometry.kernel),
        }


@final
class TransposedConvReader(ConvReader):
    """`torch.nn.ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`, whose weight is stored as ``(I, O, *kernel)``."""

    def weight(self, stored: Tensor) -> Tensor:
        """Input and output channels exchanged."""
        return stored.transpose(0, 1)

    def stored(self, weight: Tensor) -> Tensor:
        """Input and output channels exchanged."""
        return weight.transpose(0, 1)

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors; a weight that lies in another order is copied."""
        stored = self.stored(weight)
        layouts = (torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(stored.ndim, []))
        if not any(stored.is_contiguous(memory_format=layout) for layout in layouts):
            stored = stored.contiguous()
        return super().dense(geometry, stored, bias)


@final
class TransposedLinearReader(Reader):
    """``Conv1D`` of Hugging Face's GPT-2: a linear layer whose weight is stored as ``(I, O)``."""

    def geometry(self, layer: nn.Module) -> Geometry | str:
        """From its weight."""
        in_features, out_features = cast(Tensor, layer.weight).shape
        return Geometry(self.kind, out_features, in_features, layer.bias is not None)

    def weight(self, stored: Tensor) -> Tensor:
        """Transposed."""
        return stored.T

    def stored(self, weight: Tensor) -> Tensor:
        """Transposed."""
        return weight.T

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors."""
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(geometry.out_channels, geometry.in_channels)
        return _fill(layer, weight.T.contiguous(), bias)

    def attributes(self, geometry: Geometry) -> dict[str, Any]:
        """``nx``, ``nf``."""
        return {"nx": geometry.in_channels, "nf": geometry.out_channels}


def linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    """An `nn.Linear` on the meta device."""
    return _made_like(_linear(in_features, out_features, bias))


def convolution(geometry: Geometry, groups: int = 1) -> nn.Module:
    """The `nn.ConvNd` of a geometry, each of its groups in so many, on the meta device."""
    return _made_like(_convolution(geometry, groups))


# PyTorch draws numbers for a layer that it makes, on the meta device too: to copy an empty one takes a tenth of the time.
@lru_cache(maxsize=4096)
@outside_inference_mode
def _linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias, device="meta")


@lru_cache(maxsize=4096)
@outside_inference_mode
def _convolution(geometry: Geometry, groups: int) -> nn.Module:
    attributes: dict[str, Any] = {
        "kernel_size": geometry.kernel,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "padding_mode": geometry.padding_mode,
        "bias": geometry.bias,
        "groups": geometry.groups * groups,
        "device": "meta",
    }
    if geometry.transposed:
        attributes["output_padding"] = geometry.output_padding
    return _CONVOLUTIONS[geometry.type](geometry.in_channels, geometry.out_channels, **attributes)


def _made_like(layer: nn.Module) -> nn.Module:
    """Another layer like one that nobody uses; its tables and parameters are its own."""
    new = type(layer).__new__(type(layer))
    vars(new).update({name: type(v)() if isinstance(v, dict | set) else copy.copy(v) for name, v in vars(layer).items()})
    for name, parameter in layer._parameters.items():
        new._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach())
    return new


# By name, so that a type of an optional package needs no import.
_READERS: dict[str, Reader] = {
    "torch.nn.modules.linear.Linear": LinearReader("Linear"),
    "torch.nn.modules.conv.Conv1d": ConvReader("Conv1d"),
    "torch.nn.modules.conv.Conv2d": ConvReader("Conv2d"),
    "torch.nn.modules.conv.Conv3d": ConvReader("Conv3d"),
    **{
        f"torch.nn.modules.conv.{kind}": TransposedConvReader(kind)
        for kind in ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
    },
    "transformers.pytorch_utils.Conv1D": TransposedLinearReader("Conv1D"),
}
_OF_KIND: dict[str, Reader] = {reader.kind: reader for reader in _READERS.values()}


def reader(layer: nn.Module) -> Reader | None:
    """The reader of a layer's type, or None.

    A subclass is read as its parent where it computes as that does: where it has nothing of its own that the parent has too
    (``forward`` above all), but for `_BESIDE`, which a call never comes to. ``isinstance`` alone says nothing: a subclass may
    read its weight in a way of its own.
    """
    return None if (parent := parent_of(layer)) is None or own_ways(layer, parent) else _READERS[_name(parent)]


def parent_of(layer: nn.Module) -> type[nn.Module] | None:
    """The nearest type with a reader that a layer is of."""
    return next((kind for kind in type(layer).__mro__ if _name(kind) in _READERS), None)


def own_ways(layer: nn.Module, parent: type[nn.Module]) -> list[str]:
    """What the class of a layer defines anew of its parent's class or of the layer's own attributes."""
    kinds = itertools.takewhile(lambda kind: kind is not parent, type(layer).__mro__)
    told = {*dir(parent), *vars(layer), *layer._parameters, *layer._buffers}
    return [name for kind in kinds for name in vars(kind) if name in told and name not in _BESIDE]


_BESIDE = {
    *("__module__", "__doc__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__dict__", "__weakref__"),
    *("__firstlineno__", "__static_attributes__", "__constants__", "__init__", "__repr__", "extra_repr", "reset_parameters"),
}
"""What makes a module and prints it. All else that a class defines anew may matter in a call."""


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def reader_of(geometry: Geometry) -> Reader:
    """The reader that made a geometry."""
    return _OF_KIND[geometry.type]


@lru_cache(maxsize=4096)
@outside_inference_mode
def plain(geometry: Geometry) -> nn.Module:
    """A plain layer of a geometry on the meta device, made once: to be looked at, not changed."""
    return on_meta(geometry)


def on_meta(geometry: Geometry) -> nn.Module:
    """Another plain layer of a geometry on the meta device."""
    weight = torch.empty(geometry.out_channels, geometry.widths[0], *geometry.kernel, device="meta")
    bias = torch.empty(geometry.out_channels, device="meta") if geometry.bias else None
    return reader_of(geometry).dense(geometry, weight, bias)
