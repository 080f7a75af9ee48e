"""Forms: what a layer can become, and what each form costs in weights and MACs.

A form is a value: ranks and groups; no tensors, no clock. It can be compared, hashed, printed and written into a plan.
Finding the weights of a form is the business of `factorize`; how long a form takes, of `measure`.

    O, I   output, input channels of the layer      s, t   inner widths of a block term layer
    r      rank of a low-rank layer                 G      groups of its core, group size g = s / G
    k²     taps of the kernel                       P      groups of the layer itself, mostly 1

Of a layer in P groups each group takes the form by itself: ranks, widths and G are those of one group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, Self, final, get_args

from .errors import RankError
from .values import Geometry, Use


class Form(ABC):
    """What a layer may be. Every form can say what it costs and whether it fits a layer."""

    __slots__ = ()

    @abstractmethod
    def check(self, layer: Geometry) -> None:
        """Raise `RankError` where this form does not fit the layer."""

    @abstractmethod
    def parameters(self, layer: Geometry) -> int:
        """Weights and biases of the layer in this form."""

    @abstractmethod
    def macs(self, layer: Geometry, use: Use) -> int:
        """Multiply-accumulates over all calls of one use, biases counted as one each."""

    @abstractmethod
    def is_exact(self, layer: Geometry) -> bool:
        """Whether this form computes the same function as any dense layer of this geometry."""

    @abstractmethod
    def at_full_rank(self, layer: Geometry) -> Form:
        """The form of this kind that is exact for the layer; a whole side stays whole."""

    @abstractmethod
    def descent(self) -> Iterator[Form]:
        """This form and those of its kind below it, each a rank smaller than the last."""

    @abstractmethod
    def cut_to(self, multiple: int) -> Form | None:
        """The form with its ranks cut down to multiples of a number; None where one would be 0."""

    @classmethod
    @abstractmethod
    def candidates(cls, layer: Geometry) -> tuple[Self, ...]:
        """Forms of this kind that a budget may choose among: smaller than the dense layer, at ranks that suit kernels."""

    @property
    @abstractmethod
    def structure(self) -> Hashable:
        """What two forms share that run the same kernels and differ in width alone."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """That in words."""


def _positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise RankError(f"{name.replace('_', ' ')} {number!r} is not a positive whole number")


def _at_most(name: str, rank: int | None, full: int, layer: Geometry) -> None:
    if rank is not None and rank > full:
        raise RankError(f"{name} {rank} is not between 1 and {full}, the full rank of that side of a {layer}")


_MOST_RANKS = 32


def _ranks(full: int) -> range:
    """Ranks below a full one, on multiples of a power of two: kernels work in blocks of such sizes."""
    step = 8 if full >= 64 else max(1, full // 8)
    while full > step * _MOST_RANKS:
        step *= 2
    return range(step, full, step)


@final
@dataclass(frozen=True, slots=True)
class Dense(Form):
    """The layer as it was."""

    form: Literal["dense"] = "dense"

    def check(self, layer: Geometry) -> None:
        """Every layer can stay as it is."""

    def parameters(self, layer: Geometry) -> int:
        """``O I k²`` and biases."""
        return layer.parameters

    def macs(self, layer: Geometry, use: Use) -> int:
        """``O I k²`` wherever the kernel is laid on, and the biases at every output position."""
        weights = layer.parameters - layer.bias_parameters
        return use.calls * (use.laid_on(layer) * weights + use.positions(layer)[1] * layer.bias_parameters)

    def is_exact(self, layer: Geometry) -> bool:
        """Always."""
        return True

    def at_full_rank(self, layer: Geometry) -> Dense:
        """Itself."""
        return self

    def descent(self) -> Iterator[Dense]:
        """Itself alone."""
        yield self

    def cut_to(self, multiple: int) -> Dense:
        """Itself, as it has no ranks."""
        return self

    @classmethod
    def candidates(cls, layer: Geometry) -> tuple[Dense, ...]:
        """The layer as it is."""
        return (cls(),)

    @property
    def structure(self) -> Hashable:
        """One."""
        return Dense

    @property
    def kind(self) -> str:
        """``dense``."""
        return "dense"

    def __str__(self) -> str:
        """``dense``."""
        return "dense"


@final
@dataclass(frozen=True, slots=True)
class LowRank(Form):
    """``W ≈ B A``, ``A`` of shape ``(r, I)`` applied first, ``B`` of shape ``(O, r)``: linear layers and 1×1 convolutions.

    Exact at ``r = min(O, I)``; smaller than the dense layer only while ``r (O + I) < O I``.

    Raises:
        RankError: The rank is no positive whole number.
    """

    rank: int
    form: Literal["low_rank"] = "low_rank"

    def __post_init__(self) -> None:
        _positive(rank=self.rank)

    def check(self, layer: Geometry) -> None:
        """Raise `RankError` where the layer has a spatial kernel or the rank is above ``min(O, I)``."""
        if not layer.pointwise:
            raise RankError(f"LowRank is for linear layers and 1×1 convolutions, this is a {layer}: use BlockTerm")
        full = min(layer.widths)
        if self.rank > full:
            even = math.prod(layer.widths) // sum(layer.widths)
            raise RankError(
                f"rank {self.rank} is not between 1 and {full}, the full rank of a {layer}; "
                f"ranks up to {even} make it smaller, {full} is exact"
            )

    def parameters(self, layer: Geometry) -> int:
        """``r (I + O)`` and biases."""
        return self.rank * (layer.out_channels + layer.in_channels) + layer.bias_parameters

    def macs(self, layer: Geometry, use: Use) -> int:
        """Both factors wherever the kernel is laid on: the first carries stride and padding, or if transposed the second."""
        weights = self.parameters(layer) - layer.bias_parameters
        return use.calls * (use.laid_on(layer) * weights + use.positions(layer)[1] * layer.bias_parameters)

    def is_exact(self, layer: Geometry) -> bool:
        """At ``r ≥ min(O, I)``."""
        return self.rank >= min(layer.widths)

    def at_full_rank(self, layer: Geometry) -> LowRank:
        """``r = min(O, I)``."""
        return LowRank(min(layer.widths))

    def descent(self) -> Iterator[LowRank]:
        """Every rank from this one down to 1."""
        return (LowRank(rank) for rank in range(self.rank, 0, -1))

    def cut_to(self, multiple: int) -> LowRank | None:
        """``r`` cut to a multiple."""
        rank = self.rank // multiple * multiple
        return LowRank(rank) if rank else None

    @classmethod
    def candidates(cls, layer: Geometry) -> tuple[LowRank, ...]:
        """Ranks of a linear layer or a 1×1 convolution."""
        ranks = _ranks(min(layer.widths)) if layer.pointwise else ()
        return tuple(form for form in map(cls, ranks) if form.parameters(layer) < layer.parameters)

    @property
    def structure(self) -> Hashable:
        """One."""
        return LowRank

    @property
    def kind(self) -> str:
        """``low rank``."""
        return "low rank"

    def __str__(self) -> str:
        """``rank 204``."""
        return f"rank {self.rank}"


_GROUP_SIZES = (1, 8, 32)


@final
@dataclass(frozen=True, slots=True)
class BlockTerm(Form):
    """1×1 ``I→s``, k×k ``s→t`` in ``G`` groups, 1×1 ``t→O``: convolutions.

    With one group this is Tucker-2, with ``G = s = t`` a depthwise core. A rank of ``None`` leaves that side whole: no first
    1×1, the core reads all ``I`` channels; or no last 1×1, the core writes all ``O``.

    Raises:
        RankError: A rank or the group count is no positive whole number, or the groups do not divide the ranks.
    """

    rank_in: int | None
    rank_out: int | None
    groups: int = 1
    form: Literal["block_term"] = "block_term"

    def __post_init__(self) -> None:
        _positive(rank_in=self.rank_in, rank_out=self.rank_out, groups=self.groups)
        for name, rank in (("rank in", self.rank_in), ("rank out", self.rank_out)):
            if rank is not None and rank % self.groups:
                raise RankError(f"{self.groups} groups do not divide {name} {rank}")

    def widths(self, layer: Geometry) -> tuple[int, int]:
        """``s`` and ``t``: the channels that the core reads and writes."""
        i, o = layer.widths
        return self.rank_in or i, self.rank_out or o

    def check(self, layer: Geometry) -> None:
        """Raise `RankError` where the layer is pointwise, a rank exceeds its side, or groups do not divide a whole side."""
        if layer.pointwise:
            raise RankError(f"BlockTerm is for convolutions with a spatial kernel, this is a {layer}: use LowRank")
        i, o = layer.widths
        _at_most("rank in", self.rank_in, i, layer)
        _at_most("rank out", self.rank_out, o, layer)
        if any(width % self.groups for width in self.widths(layer)):
            raise RankError(f"{self.groups} groups do not divide the core's channels {self.widths(layer)} of a {layer}")

    def _parts(self, layer: Geometry) -> tuple[int, int, int]:
        s, t = self.widths(layer)
        reduce = layer.in_channels * s if self.rank_in else 0
        expand = t * layer.out_channels if self.rank_out else 0
        return reduce, layer.groups * s * t * layer.taps // self.groups, expand

    def parameters(self, layer: Geometry) -> int:
        """``I s + P s t k² / G + t O`` and biases; no first or last term for a whole side."""
        return sum(self._parts(layer)) + layer.bias_parameters

    def macs(self, layer: Geometry, use: Use) -> int:
        """The first 1×1 at every input position, the last at every output position, the core wherever the kernel is laid on."""
        reduce, core, expand = self._parts(layer)
        positions_in, positions_out = use.positions(layer)
        outer = positions_in * reduce + positions_out * (expand + layer.bias_parameters)
        return use.calls * (outer + use.laid_on(layer) * core)

    def is_exact(self, layer: Geometry) -> bool:
        """In one group, at ranks that no weight of this shape can exceed: ``s ≥ min(I, O k²)`` and ``t ≥ min(O, I k²)``."""
        s, t = self.widths(layer)
        (I, O), taps = layer.widths, layer.taps
        return self.groups == 1 and s >= min(I, O * taps) and t >= min(O, I * taps)

    def at_full_rank(self, layer: Geometry) -> BlockTerm:
        """``s = I``, ``t = O``, one group."""
        i, o = layer.widths
        return BlockTerm(self.rank_in and i, self.rank_out and o)

    def descent(self) -> Iterator[BlockTerm]:
        """``s`` goes down by one channel a group, or ``t`` where ``s`` is whole, and the other in proportion."""
        first = self.rank_in or self.rank_out or self.groups
        for lead in range(first, 0, -self.groups):
            yield self._with_ranks(lambda rank, lead: max(1, rank * lead // first // self.groups) * self.groups, lead)

    def cut_to(self, multiple: int) -> BlockTerm | None:
        """``s`` and ``t`` cut to multiples that the groups divide; whole sides stay whole."""
        step = math.lcm(multiple, self.groups)
        small = any(rank is not None and rank < step for rank in (self.rank_in, self.rank_out))
        return None if small else self._with_ranks(lambda rank, step: rank // step * step, step)

    def _with_ranks(self, change: Callable[[int, int], int], number: int) -> BlockTerm:
        rank_in, rank_out = (None if rank is None else change(rank, number) for rank in (self.rank_in, self.rank_out))
        return BlockTerm(rank_in, rank_out, self.groups)

    @classmethod
    def candidates(cls, layer: Geometry) -> tuple[BlockTerm, ...]:
        """Ranks in and out independent, either side whole; and cores of all channels in groups of a few sizes."""
        if layer.pointwise:
            return ()
        I, O = layer.widths
        sides = ((s, t) for s in (*_ranks(I), None) for t in (*_ranks(O), None) if s or t)
        widths = ((size, min(I, O) // size * size) for size in _GROUP_SIZES)
        grouped = (cls(width, width, width // size) for size, width in widths if width > size)
        found = [*(cls(s, t) for s, t in sides), *grouped]
        return tuple(form for form in found if form.parameters(layer) < layer.parameters)

    @property
    def structure(self) -> Hashable:
        """Which sides are whole, and whether the core is in groups, and of which size."""
        size = self.rank_in // self.groups if self.rank_in and self.groups > 1 else None
        return BlockTerm, self.rank_in is None, self.rank_out is None, size

    @property
    def kind(self) -> str:
        """``both ranks``, ``one side whole`` or ``groups of 8``."""
        if self.rank_in and self.groups > 1:
            return f"groups of {self.rank_in // self.groups}"
        return "both ranks" if self.rank_in and self.rank_out else "one side whole"

    def __str__(self) -> str:
        """``309→309`` or ``whole→27 in 4 groups``."""
        sides = "→".join("whole" if rank is None else str(rank) for rank in (self.rank_in, self.rank_out))
        return sides if self.groups == 1 else f"{sides} in {self.groups} groups"


@final
@dataclass(frozen=True, slots=True)
class Separable(Form):
    """k×1 ``I→r``, then 1×k ``r→O``: 2-d convolutions (Jaderberg et al., 2014).

    Exact at ``r = min(I kh, O kw)``; smaller than the dense layer only while ``r (I kh + O kw) < O I kh kw``. A budget
    does not offer it: at equal loss it is a few per cent faster than block terms at best, and slower at larger batches.

    Raises:
        RankError: The rank is no positive whole number.
    """

    rank: int
    form: Literal["separable"] = "separable"

    def __post_init__(self) -> None:
        _positive(rank=self.rank)

    def check(self, layer: Geometry) -> None:
        """Raise `RankError` where the layer has no 2-d kernel with both sides above 1, or the rank is above full."""
        if layer.groups > 1:
            raise RankError(f"Separable is for convolutions of one group, this is a {layer}: use BlockTerm")
        if len(layer.kernel) != 2 or min(layer.kernel) == 1 or layer.transposed:
            other = "LowRank" if layer.pointwise else "BlockTerm"
            raise RankError(f"Separable is for 2-d convolutions with both sides above 1, this is a {layer}: use {other}")
        full = self._full(layer)
        if self.rank > full:
            even = (layer.parameters - layer.bias_parameters) // self._weights_a_rank(layer)
            raise RankError(
                f"rank {self.rank} is not between 1 and {full}, the full rank of a separable {layer}; "
                f"ranks up to {even} make it smaller, {full} is exact"
            )

    @staticmethod
    def _full(layer: Geometry) -> int:
        return min(layer.in_channels * layer.kernel[0], layer.out_channels * layer.kernel[1])

    @staticmethod
    def _weights_a_rank(layer: Geometry) -> int:
        return layer.in_channels * layer.kernel[0] + layer.out_channels * layer.kernel[1]

    def parameters(self, layer: Geometry) -> int:
        """``r (I kh + O kw)`` and biases."""
        return self.rank * self._weights_a_rank(layer) + layer.bias_parameters

    def macs(self, layer: Geometry, use: Use) -> int:
        """The first at the rows of the output and the columns of the input, the second at every output position."""
        positions = use.positions(layer)[1]
        between = positions // use.output_shape[-1] * use.input_shape[-1]
        vertical, horizontal = layer.in_channels * layer.kernel[0], layer.out_channels * layer.kernel[1]
        return use.calls * (self.rank * (between * vertical + positions * horizontal) + positions * layer.bias_parameters)

    def is_exact(self, layer: Geometry) -> bool:
        """At ``r ≥ min(I kh, O kw)``."""
        return self.rank >= self._full(layer)

    def at_full_rank(self, layer: Geometry) -> Separable:
        """``r = min(I kh, O kw)``."""
        return Separable(self._full(layer))

    def descent(self) -> Iterator[Separable]:
        """Every rank from this one down to 1."""
        return (Separable(rank) for rank in range(self.rank, 0, -1))

    def cut_to(self, multiple: int) -> Separable | None:
        """``r`` cut to a multiple."""
        rank = self.rank // multiple * multiple
        return Separable(rank) if rank else None

    @classmethod
    def candidates(cls, layer: Geometry) -> tuple[Separable, ...]:
        """None: who wants it names it."""
        return ()

    @property
    def structure(self) -> Hashable:
        """One."""
        return Separable

    @property
    def kind(self) -> str:
        """``separable``."""
        return "separable"

    def __str__(self) -> str:
        """``separable 48``."""
        return f"separable {self.rank}"


AnyForm = Dense | LowRank | BlockTerm | Separable


def candidates(layer: Geometry) -> tuple[Form, ...]:
    """Every form that a budget may choose among for a layer, `Dense` among them."""
    return tuple(form for kind in get_args(AnyForm) for form in kind.candidates(layer))
