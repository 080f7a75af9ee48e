"""Which layer is this? The one table from a layer's type to what can be known of it.

The rest of the library sees a `Geometry`, a weight of shape ``(O, I, *kernel)`` and a bias. A new kind of layer is
one reader here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..values import Geometry


class Reader(ABC):
    """How one type of layer is read, and how a dense layer of that type is made again."""

    @abstractmethod
    def geometry(self, layer: nn.Module) -> Geometry | str:
        """The layer's geometry, or the reason why it cannot be decomposed."""

    def weight(self, layer: nn.Module) -> Tensor:
        """The weight as ``(O, I, *kernel)``; a view of the layer's own."""
        return cast(Tensor, layer.weight)

    @abstractmethod
    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A dense layer of this type with weight ``(O, I, *kernel)`` and bias ``(O,)`` as given (not copied)."""


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
    return layer


@final
class LinearReader(Reader):
    """`torch.nn.Linear`."""

    def geometry(self, layer: nn.Module) -> Geometry | str:
        """From its attributes."""
        assert isinstance(layer, nn.Linear)
        return Geometry("Linear", layer.out_features, layer.in_features, layer.bias is not None)

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors."""
        layer = nn.Linear(geometry.in_channels, geometry.out_channels, bias=geometry.bias, device="meta")
        return _fill(layer, weight, bias)


@final
class ConvReader(Reader):
    """`torch.nn.Conv1d`, `Conv2d` and `Conv3d`."""

    def geometry(self, layer: nn.Module) -> Geometry | str:
        """From its attributes."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if layer.groups != 1:
            return f"it has {layer.groups} groups; only convolutions of one group are decomposed"
        return Geometry(
            type(layer).__name__,
            layer.out_channels,
            layer.in_channels,
            layer.bias is not None,
            tuple(layer.kernel_size),
            tuple(layer.stride),
            cast(Any, layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)),
            tuple(layer.dilation),
            layer.padding_mode,
        )

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors."""
        return _fill(convolution(geometry, device="meta"), weight, bias)


@final
class TransposedLinearReader(Reader):
    """``Conv1D`` of Hugging Face's GPT-2: a linear layer whose weight is stored as ``(I, O)``."""

    def geometry(self, layer: nn.Module) -> Geometry | str:
        """From its attributes."""
        in_features, out_features = cast(Tensor, layer.weight).shape
        return Geometry("Conv1D", out_features, in_features, True)

    def weight(self, layer: nn.Module) -> Tensor:
        """Transposed; a view still."""
        return cast(Tensor, layer.weight).T

    def dense(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Made on the meta device, then given its tensors."""
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(geometry.out_channels, geometry.in_channels)
        return _fill(layer, weight.T.contiguous(), bias)


def convolution(geometry: Geometry, **options: Any) -> nn.Module:
    """The `nn.ConvNd` of a geometry; options such as ``device`` or ``bias`` go to its constructor."""
    kinds: dict[str, type[nn.Module]] = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
    attributes: dict[str, Any] = {
        "kernel_size": geometry.kernel,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "padding_mode": geometry.padding_mode,
        "bias": geometry.bias,
    }
    return kinds[geometry.type](geometry.in_channels, geometry.out_channels, **(attributes | options))


# By name, so that a type of an optional package needs no import.
_READERS: dict[str, Reader] = {
    "torch.nn.modules.linear.Linear": LinearReader(),
    "torch.nn.modules.conv.Conv1d": ConvReader(),
    "torch.nn.modules.conv.Conv2d": ConvReader(),
    "torch.nn.modules.conv.Conv3d": ConvReader(),
    "transformers.pytorch_utils.Conv1D": TransposedLinearReader(),
}


def reader(layer: nn.Module) -> Reader | None:
    """The reader of a layer's type, or None.

    The exact type counts, not ``isinstance``: a subclass may read its weight in a way of its own, as
    `nn.MultiheadAttention` does with its ``out_proj``.
    """
    kind = type(layer)
    return _READERS.get(f"{kind.__module__}.{kind.__qualname__}")


def reader_of(geometry: Geometry) -> Reader:
    """The reader that made a geometry."""
    return next(reader for name, reader in _READERS.items() if name.rsplit(".", 1)[1] == geometry.type)


def known_types() -> list[str]:
    """Names of the types that have a reader."""
    return [name.rsplit(".", 1)[1] for name in _READERS]
