"""The layers that a form becomes: plain `nn.Linear` and `nn.ConvNd` factors, called one after the other.

Nothing is recomputed in a forward. To code that looks at the layer (``in_features``, ``weight.dtype``, …) it answers for the
layer that it replaced. Each factor is called through `run_factor`, which looks whether its weight rests; a scripted network
calls the factors themselves.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import LayerError
from ..factorize.block_term import assembled
from ..forms import BlockTerm, Form, LowRank, Separable
from ..network.readers import convolution, linear, plain, reader_of
from ..values import Geometry
from .composed import weight_of
from .frozen import run_factor


class StandIn(nn.Module):
    """A module in the place of a layer: to code that looks at it, it answers for the layer's geometry."""

    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self._told = reader_of(geometry).attributes(geometry)
        vars(self).update(self._told)
        self.geometry = geometry
        self._stored_shape = tuple(plain(geometry).weight.shape)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change what the layer tells of its geometry, and a weight or bias, which all live in its factors.

        Raises:
            LayerError: It would be changed.
        """
        if isinstance(getattr(type(self), name, None), property):
            raise LayerError(
                f"{name} of a {type(self).__name__} ({self.geometry}) cannot be set: it lives in the factors; change the "
                "network before it is decomposed, or bring dense layers back with lamina.merge"
            )
        if name in vars(self).get("_told", ()) and value != self._told[name]:
            raise LayerError(
                f"{name} of a {type(self).__name__} ({self.geometry}) cannot be set to {value!r}: its factors are built for "
                f"{self._told[name]!r}; change the network before it is decomposed"
            )
        super().__setattr__(name, value)

    @abstractmethod
    def composed(self) -> Tensor:
        """The dense weight, ``(O, I, *kernel)``, I being one group's."""

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """The parameters of which the dense weight is composed."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, shaped as the replaced layer stored it; composed when its values are needed. Read-only.

        Raises:
            LayerError: A factor has no weight that could be read, such as a quantised one.
        """
        weights = self.weights()

        def compose() -> Tensor:
            with torch.autocast(weights[0].device.type, enabled=False):
                return reader_of(self.geometry).stored(self.composed()).contiguous()

        return weight_of(compose, self._stored_shape, weights)


class DecomposedLayer(StandIn):
    """A layer in a form, as a stack of factors."""

    def __init__(self, geometry: Geometry, form: Form) -> None:
        super().__init__(geometry)
        self.form = form

    def __setattr__(self, name: str, value: Any) -> None:
        """Take what fusing a batch norm sets: the own weight with its outputs scaled, and a bias. The last factor takes both.

        Raises:
            LayerError: As `StandIn` has it, for any other weight.
        """
        if isinstance(value, nn.Parameter):
            if name == "bias" and tuple(value.shape) == (self.geometry.out_channels,):
                self.factors()[-1].bias = value
                return
            if name == "weight" and (scale := self._scale(value)) is not None:
                last = self.factors()[-1]
                held = _held(last)
                scaled = stored_in(last, _weight(last).detach() * scale.to(held).reshape(-1, *[1] * (held.ndim - 1)))
                last.weight = nn.Parameter(torch.empty_like(held).copy_(scaled), requires_grad=value.requires_grad)
                return
        super().__setattr__(name, value)

    @torch.no_grad()
    def _scale(self, weight: Tensor) -> Tensor | None:
        """By what each output of this layer is scaled to give a weight; None where it is no such weight.

        The own weight is none either: who sets it wants two layers to have one, which cannot be.
        """
        if weight.is_meta or tuple(weight.shape) != self._stored_shape or weight.dtype != self.weights()[0].dtype:
            return None
        with torch.autocast(weight.device.type, enabled=False):
            own, new = self.composed(), reader_of(self.geometry).weight(weight)
        W, V = (each.detach().to("cpu", torch.float64).flatten(1) for each in (own, new))
        size = W.square().sum(1)
        scale = torch.where(size > 0, (W * V).sum(1) / size, 1.0)
        eps = torch.finfo(weight.dtype).eps
        near = (V - scale[:, None] * W).norm(dim=1) <= 8 * eps * V.norm(dim=1)  # two roundings of each entry, and some room
        return scale if bool(near.all()) and not bool(((scale - 1).abs() <= eps).all()) else None

    @abstractmethod
    def factors(self) -> list[nn.Module]:
        """The factors in the order in which they run; the last one holds the bias."""

    @abstractmethod
    def factor_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The outer and the inner factors, whose weights rest in turn where training freezes them; a group may be empty.

        Outer is what meets the input first and, in a triple, the output last (arXiv 2309.03824, section 3).
        """

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """The factors in turn, nothing else."""

    @abstractmethod
    def exactly(self, W: Tensor, identity: Callable[[int], Tensor]) -> list[Tensor]:
        """Weights with which the factors, at full rank, compute what a dense weight does: it in one, identities in the others.

        Each is to be brought into its factor by `stored_in`.

        Args:
            W: The dense weight, ``(O, I, *kernel)``, I being one group's; a view of it is among the answer where its order
                allows one.
            identity: Gives the identity matrix of a size.

        Returns:
            The weights in the order of the factors, each of its factor's shape or of one that reads the same when reshaped.
        """

    def weights(self) -> list[Tensor]:
        """The factors' weights, as they hold them."""
        return [_held(factor) for factor in self.factors()]

    @property
    def bias(self) -> Tensor | None:
        """The bias: the last factor's own."""
        bias: Tensor | None = self.factors()[-1].bias  # type: ignore[assignment]
        return bias

    def extra_repr(self) -> str:
        """The geometry and form."""
        return f"{self.geometry}, {self.form}"

    def merged(self) -> nn.Module:
        """A dense layer of the replaced type with the composed weight."""
        weights = self.weights()
        with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
            layouts = {memory_format(weight) for weight in weights}
            layout = next(iter(layouts - {torch.contiguous_format}), torch.contiguous_format)
            reader = reader_of(self.geometry)
            weight = reader.weight(laid_out(reader.stored(self.composed()), layout))
            weight.requires_grad_(any(each.requires_grad for each in weights))
            bias = None if self.bias is None else self.bias.detach().clone().requires_grad_(self.bias.requires_grad)
        return reader.dense(self.geometry, weight, bias)


@final
class LowRankLayer(DecomposedLayer):
    """``first`` I→r, then ``second`` r→O with the bias; stride and padding are the first's, or if transposed the second's.

    Of a convolution in groups both are in its groups, r channels each.
    """

    def __init__(self, geometry: Geometry, form: LowRank) -> None:
        super().__init__(geometry, form)
        r = form.rank * geometry.groups
        if geometry.transposed:
            self.first: nn.Module = convolution(_one_by_one(geometry, geometry.in_channels, r, False))
            self.second: nn.Module = convolution(dataclasses.replace(geometry, in_channels=r))
        elif geometry.kernel:
            self.first = convolution(dataclasses.replace(geometry, out_channels=r, bias=False))
            self.second = convolution(_one_by_one(geometry, r, geometry.out_channels, geometry.bias))
        else:
            self.first = linear(geometry.in_channels, r, False)
            self.second = linear(r, geometry.out_channels, geometry.bias)

    def forward(self, input: Tensor) -> Tensor:
        """``second(first(input))``."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            output: Tensor = self.second(self.first(input))
            return output
        return run_factor(self.second, run_factor(self.first, input))

    def factors(self) -> list[nn.Module]:
        """First, second."""
        return [self.first, self.second]

    def factor_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """First; second."""
        return [self.first], [self.second]

    def exactly(self, W: Tensor, identity: Callable[[int], Tensor]) -> list[Tensor]:
        """The weight stands in the factor that has as many entries."""
        (I, O), P = self.geometry.widths, self.geometry.groups
        return [W, _each(identity(O), P)] if O <= I else [_each(identity(I), P), W]

    def composed(self) -> Tensor:
        """``B A``, of each group."""
        P = self.geometry.groups
        pairs = zip(_matrix(self.first).chunk(P), _matrix(self.second).chunk(P), strict=True)
        return _joined([B @ A for A, B in pairs]).reshape(_shape_of(self.geometry))


@final
class BlockTermLayer(DecomposedLayer):
    """``reduce`` 1×1 I→s, ``core`` k×k s→t in G groups with stride and padding, ``expand`` 1×1 t→O; a whole side has no 1×1.

    Of a convolution in groups all are in its groups, s and t channels each, and G are those within a group.
    """

    def __init__(self, geometry: Geometry, form: BlockTerm) -> None:
        super().__init__(geometry, form)
        s, t = (width * geometry.groups for width in form.widths(geometry))
        narrow, wide = form.rank_in is not None, form.rank_out is not None
        inner = dataclasses.replace(geometry, in_channels=s, out_channels=t, bias=geometry.bias and not wide)
        reduce, expand = (
            _one_by_one(geometry, geometry.in_channels, s, False),
            _one_by_one(geometry, t, geometry.out_channels, geometry.bias),
        )
        self.reduce: nn.Module | None = convolution(reduce) if narrow else None
        self.core: nn.Module = convolution(inner, form.groups)
        self.expand: nn.Module | None = convolution(expand) if wide else None

    def forward(self, input: Tensor) -> Tensor:
        """``expand(core(reduce(input)))``."""
        x = input
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.reduce is not None:
                x = self.reduce(x)
            x = self.core(x)
            if self.expand is not None:
                x = self.expand(x)
            return x  # type: ignore[no-any-return]
        if self.reduce is not None:
            x = run_factor(self.reduce, x)
        x = run_factor(self.core, x)
        if self.expand is not None:
            x = run_factor(self.expand, x)
        return x

    def factors(self) -> list[nn.Module]:
        """Reduce, core, expand, as far as they are there."""
        return [factor for factor in (self.reduce, self.core, self.expand) if factor is not None]

    def factor_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Reduce and expand, as far as they are there; core."""
        return [factor for factor in (self.reduce, self.expand) if factor is not None], [self.core]

    def exactly(self, W: Tensor, identity: Callable[[int], Tensor]) -> list[Tensor]:
        """The weight stands in the core."""
        (I, O), P = self.geometry.widths, self.geometry.groups
        reduce = [] if self.reduce is None else [_each(identity(I), P)]
        return [*reduce, W, *([] if self.expand is None else [_each(identity(O), P)])]

    def composed(self) -> Tensor:
        """``Σ_groups expand · core · reduce``, of each group of the layer."""
        assert isinstance(self.form, BlockTerm)
        P, G = self.geometry.groups, self.form.groups
        reduces, expands = (_of_each(factor, P) for factor in (self.reduce, self.expand))
        parts = zip(reduces, _weight(self.core).chunk(P), expands, strict=True)
        return _joined([assembled(core, reduce, expand, G) for reduce, core, expand in parts]).reshape(_shape_of(self.geometry))


@final
class SeparableLayer(DecomposedLayer):
    """``vertical`` k×1 I→r, then ``horizontal`` 1×k r→O, which carries the bias; each has stride and padding of its side."""

    def __init__(self, geometry: Geometry, form: Separable) -> None:
        super().__init__(geometry, form)
        r = form.rank
        self.vertical: nn.Module = convolution(_along(geometry, 0, geometry.in_channels, r, False))
        self.horizontal: nn.Module = convolution(_along(geometry, 1, r, geometry.out_channels, geometry.bias))

    def forward(self, input: Tensor) -> Tensor:
        """``horizontal(vertical(input))``."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            output: Tensor = self.horizontal(self.vertical(input))
            return output
        return run_factor(self.horizontal, run_factor(self.vertical, input))

    def factors(self) -> list[nn.Module]:
        """Vertical, horizontal."""
        return [self.vertical, self.horizontal]

    def factor_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Vertical; horizontal."""
        return [self.vertical], [self.horizontal]

    def exactly(self, W: Tensor, identity: Callable[[int], Tensor]) -> list[Tensor]:
        """The weight stands in the filters along the side of which there are more."""
        O, I, kh, kw = W.shape
        if I * kh <= O * kw:
            return [identity(I * kh), W]
        return [W.permute(0, 3, 1, 2), identity(O * kw).reshape(O, kw, O * kw).mT]

    def composed(self) -> Tensor:
        """``Σ_r horizontal · vertical``."""
        return torch.einsum("orb,ria->oiab", _weight(self.horizontal).squeeze(2), _weight(self.vertical).squeeze(3))


def _each(identity: Tensor, groups: int) -> Tensor:
    """The weight of a 1×1 in groups that leaves every group as it is."""
    return identity if groups == 1 else identity.repeat(groups, 1)


def _of_each(factor: nn.Module | None, groups: int) -> Sequence[Tensor | None]:
    """The matrix of each group of a 1×1, or None for each."""
    return [None] * groups if factor is None else _matrix(factor).chunk(groups)


def _shape_of(geometry: Geometry) -> tuple[int, ...]:
    """That of the dense weight, ``(O, I, *kernel)``, I being one group's."""
    return geometry.out_channels, geometry.widths[0], *geometry.kernel


def _joined(parts: list[Tensor]) -> Tensor:
    """One weight of those of a layer's groups."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _along(geometry: Geometry, side: int, in_channels: int, out_channels: int, bias: bool) -> Geometry:
    """The geometry of a layer's factor that moves over one side of the map alone."""

    def alone(sides: tuple[int, ...], still: int) -> tuple[int, ...]:
        return tuple(own if at == side else still for at, own in enumerate(sides))

    return dataclasses.replace(
        geometry,
        in_channels=in_channels,
        out_channels=out_channels,
        bias=bias,
        kernel=alone(geometry.kernel, 1),
        stride=alone(geometry.stride, 1),
        padding=geometry.padding if isinstance(geometry.padding, str) else alone(geometry.padding, 0),
        dilation=alone(geometry.dilation, 1),
    )


def _one_by_one(geometry: Geometry, in_channels: int, out_channels: int, bias: bool) -> Geometry:
    """That of a plain 1×1 beside a layer's core, whether that is transposed or not."""
    ones = (1,) * len(geometry.kernel)
    zeros = (0,) * len(geometry.kernel)
    kind, groups = f"Conv{len(ones)}d", geometry.groups
    return Geometry(kind, out_channels, in_channels, bias, ones, ones, zeros, ones, groups=groups)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def stored_in(factor: nn.Module, weight: Tensor) -> Tensor:
    """A weight ``(out, in / groups, *kernel)``, or what reads the same, in the shape in which a factor holds it.

    A transposed convolution holds ``(in, out / groups, *kernel)``.
    """
    shape = _held(factor).shape
    if not isinstance(factor, _TRANSPOSED):
        return weight.reshape(shape)
    G, (s, t, *kernel) = factor.groups, shape
    return weight.reshape(G, t, s // G, *kernel).transpose(1, 2).reshape(shape)


def _weight(factor: nn.Module) -> Tensor:
    """What `stored_in` was given: ``(out, in / groups, *kernel)``."""
    weight = _held(factor)
    if isinstance(getattr(type(factor), "weight", None), property) and not is_parametrized(factor, "weight"):
        whose = f"a {type(factor).__name__} of {type(factor).__module__.partition('.')[0]}"
        raise LayerError(
            f"{whose} stands where a factor stood, and computes with more than its weight: merge adapters first, with "
            "merge_and_unload of PEFT"
        )
    if not isinstance(factor, _TRANSPOSED):
        return weight
    G, (s, t, *kernel) = factor.groups, weight.shape
    return weight.reshape(G, s // G, t, *kernel).transpose(1, 2).reshape(G * t, s // G, *kernel)


def _held(factor: nn.Module) -> Tensor:
    weight = getattr(factor, "weight", None)
    if not isinstance(weight, Tensor):  # put there by another tool
        raise LayerError(f"a {type(factor).__name__} stands where a factor stood, and has no weight that can be read: call it")
    return weight


def _matrix(factor: nn.Module) -> Tensor:
    return _weight(factor).flatten(1)


def memory_format(weight: Tensor) -> torch.memory_format:
    """The memory format that a layer's weight was laid out for, read from its strides.

    A 1×1 weight counts as contiguous and as channels last at once; its strides still tell what it was made as.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if weight.ndim in formats and weight.stride(1) == 1 and weight.stride(-1) == weight.shape[1] and weight[0].numel() > 1:
        return formats[weight.ndim]
    return torch.contiguous_format


def laid_out(weight: Tensor, layout: torch.memory_format) -> Tensor:
    """A weight in a memory format, with the strides that a new tensor in it has.

    Where a side is 1, PyTorch takes a tensor for contiguous and channels last at once and leaves it as it is; but its kernels
    read the format of their output from the strides.
    """
    weight = weight.contiguous(memory_format=layout)
    if 1 in weight.shape:
        strides = torch.empty(weight.shape, device="meta", memory_format=layout).stride()
        return weight.as_strided(weight.shape, strides)
    return weight
