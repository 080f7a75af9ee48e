"""What a change of a weight costs: a quadratic form made of two second moments, and the space in which it is a plain norm.

    W   weight (O, I, *kernel), K taps     H   moment of the inputs: of channels (I, I), or of patches (I K, I K)
    ΔW  a change of it                     G   moment of the gradients at the outputs, (O, O)

    error(ΔW) = tr(G ΔW H ΔWᵀ),   for a moment of channels summed over the taps

To second order half of it is by how much the answers of a network move (Kronecker factors, Martens and Grosse, arXiv
1503.05671; for convolutions Grosse and Martens, arXiv 1602.01407). A moment that is not known counts as the identity.

A moment of few examples, or of dead channels, is singular, and what it calls free could not be taken back out of a root.
So each is damped by a share of its mean diagonal entry, and the damped moments *are* the metric: errors, roots and prices are
all of them, and laws between these hold to rounding. Moments are kept at a mean diagonal of 1, and their sizes apart in one
number: no size of gradients is too small, and a moment of zeros, by which nothing costs anything, leaves factors of the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..errors import LaminaError
from .pure import pure
from .spectral import normalised

_LEAST_DAMPING = 1e-8
"""Below it the smallest eigenvalue of a moment of some thousand channels would be rounding."""

_ROUNDED = 1e-3
"""What products in float32 make of an eigenvalue of zero is less than this share of the largest one."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """The damped moment of the channels on one side of a weight and its two roots, each ``(n, n)``, float64, symmetric."""

    moment: Tensor
    root: Tensor
    """``root @ root`` is the moment."""
    inverse: Tensor
    """``root @ inverse`` is the identity."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Along:
    """What is known of patches along p directions of the channels, where those of all channels are not. All tensors float64.

    Along them the input is ``z = E x`` at every tap, and the weight that best makes the layer's outputs of z is a regression's.
    """

    directions: Tensor
    """E, ``(p, I)``."""
    cross: Tensor
    """``(O, p K)``, in the order of ``W.flatten(1)``: outputs times patches of z, by the mean diagonal of these."""
    metric: Metric
    """Of weights ``(O, p, *kernel)`` that read z, by patches."""

    def weight(self) -> Tensor:
        """The weight ``(O, p K)`` that reads z and answers what the layer does, as nearly as any."""
        assert self.metric.patches is not None
        L = torch.linalg.cholesky(self.metric.patches)
        return torch.cholesky_solve(self.cross.T, L).T

    def predicted(self, rows: Tensor, inputs: Side | None) -> Tensor:
        """What z tells of products with the input, as a linear prediction at the same place.

        Args:
            rows: ``(n, I)``, float64: their products with x are asked for.
            inputs: The moment of the channels.

        Returns:
            ``(n, p)``: the products with z that come nearest to them. Of rows that E spans they are the same.
        """
        E = self.directions
        HE = E.T if inputs is None else inputs.moment @ E.T
        found: Tensor = torch.linalg.solve(E @ HE, (rows @ HE).T).T
        return found


@final
@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """The price of changes of one weight. Made by `Metric.of`; all tensors float64, and read only."""

    inputs: Side | None
    """Of channels; in a metric of patches the mean over their taps. None: the identity."""
    gradients: Side | None
    """None: the identity."""
    patches: Tensor | None
    """The damped moment ``(I K, I K)``, in the order of ``W.flatten(1)``; None in a metric of channels."""
    scale: float
    """The product of the moments' mean diagonal entries before they were damped, which the tensors here are divided by."""
    along: Along | None = None
    """Where patches are known along some directions alone. Prices and errors do not go by it; factors are fitted by it."""

    @classmethod
    def of(
        cls, inputs: Tensor | None = None, gradients: Tensor | None = None, *, taps: int | None = None, damping: float = 1e-3
    ) -> Metric:
        """The metric of two second moments.

        Args:
            inputs: H, any floating dtype; None where it is not known.
            gradients: G, ``(O, O)``; None where it is not known.
            taps: K, where H is the moment of patches in the order of ``W.flatten(1)``; None where it is that of channels.
            damping: What each moment is damped by, as a share of its mean diagonal entry; at least 1e-8.

        Raises:
            LaminaError: A moment is not finite, not symmetric, not positive semi-definite or not of a shape that fits, or the
                damping is too small.
        """
        if not _LEAST_DAMPING <= damping < math.inf:
            raise LaminaError(f"a damping of {damping:g} is not between {_LEAST_DAMPING:g} and infinity: 0.001 is usual")
        scale = 1.0
        near: Side | None = None
        far: Side | None = None
        patches: Tensor | None = None
        if inputs is not None:
            moment, size = _damped(inputs, "inputs", damping)
            scale *= size
            if taps is not None and taps != 1:
                if taps < 1 or len(moment) % taps:
                    raise LaminaError(f"a second moment of the inputs of {len(moment)} rows is not that of {taps}-tap patches")
                patches = moment
                moment = _mean_over_taps(moment, taps)
            near = _side(moment)
        if gradients is not None:
            moment, size = _damped(gradients, "gradients", damping)
            scale *= size
            far = _side(moment)
        return cls(near, far, patches, scale)

    def error(self, change: Tensor) -> float:
        """What a change of the weight costs, ``tr(G ΔW H ΔWᵀ)``.

        Args:
            change: ΔW, ``(O, I, *kernel)``, any floating dtype.

        Raises:
            LaminaError: The shape is not that of the metric's weight.
        """
        return self.scale * _unscaled_error(change, self.fitting(change))

    def whiten(self, W: Tensor) -> Tensor:
        """``G^½ W H^½`` in float64, H that of the channels: there ``scale · ‖·‖²`` is the error in the metric of channels."""
        return on_sides(
            W, None if self.inputs is None else self.inputs.root, None if self.gradients is None else self.gradients.root
        )

    def unwhiten(self, W: Tensor) -> Tensor:
        """The weight that `whiten` made this of, in float64."""
        return on_sides(
            W, None if self.inputs is None else self.inputs.inverse, None if self.gradients is None else self.gradients.inverse
        )

    def of_channels(self) -> Metric:
        """The metric with the moment of channels in the place of that of patches."""
        return replace(self, patches=None, along=None)

    def in_blocks(self, inputs: int, gradients: int) -> Metric:
        """The metric of channels in which runs of channels do not know each other: moments of so many diagonal blocks."""
        return Metric(_in_blocks(self.inputs, inputs), _in_blocks(self.gradients, gradients), None, self.scale)

    def of_groups(self, count: int) -> list[Metric]:
        """Of a convolution in so many groups, the metric of each group's weight: of its own channels alone.

        What all groups lose is then the sum of their errors, as that of layers is: that those of two groups may add up or
        cancel is left out.

        Raises:
            LaminaError: It is a metric of patches.
        """
        if count == 1:
            return [self]
        if self.patches is not None or self.along is not None:
            raise LaminaError("a second moment of patches is not one of a convolution in groups")
        sides = zip(_of_groups(self.inputs, count), _of_groups(self.gradients, count), strict=True)
        return [Metric(inputs, gradients, None, self.scale) for inputs, gradients in sides]

    def fitting(self, W: Tensor) -> Metric:
        """This metric on the device of a weight.

        Raises:
            LaminaError: It is not a metric of weights of this shape.
        """
        for what, side, width in (("input", self.inputs, W.shape[1]), ("output", self.gradients, W.shape[0])):
            if side is not None and len(side.moment) != width:
                raise LaminaError(
                    f"a second moment of {len(side.moment)} {what} channels is not one of a {tuple(W.shape)} weight"
                )
        if self.patches is not None and len(self.patches) != W[0].numel():
            raise LaminaError(
                f"a second moment of patches of {len(self.patches)} values is not one of a {tuple(W.shape)} weight"
            )
        inputs, gradients = (
            None if side is None else Side(*(part.to(W.device) for part in (side.moment, side.root, side.inverse)))
            for side in (self.inputs, self.gradients)
        )
        along = self.along
        if along is not None:
            channels = along.directions.shape[1]
            if channels != W.shape[1] or len(along.cross) != len(W):
                raise LaminaError(f"directions of {channels} channels are not those of a {tuple(W.shape)} weight")
            directions, cross = along.directions.to(W.device), along.cross.to(W.device)
            inner = along.metric.fitting(torch.empty(len(cross), len(directions), *W.shape[2:], device=W.device))
            along = Along(directions, cross, inner)
        return Metric(inputs, gradients, None if self.patches is None else self.patches.to(W.device), self.scale, along)


@pure
def on_sides(W: Tensor, near: Tensor | None, far: Tensor | None) -> Tensor:
    """``far W near`` at every tap, in float64: ``near`` ``(I, n)``, ``far`` ``(m, O)``; None leaves a side."""
    W = W.double()
    if near is not None:
        W = torch.tensordot(W, near, dims=([1], [0])).movedim(-1, 1)
    if far is not None:
        W = torch.tensordot(far, W, dims=([1], [0]))
    return W


@pure
def _unscaled_error(change: Tensor, metric: Metric) -> float:
    if metric.patches is None:
        return float(metric.whiten(change).square().sum())
    rows = on_sides(change, None, None if metric.gradients is None else metric.gradients.root).flatten(1)
    return max(float((rows @ metric.patches * rows).sum()), 0.0)


@pure
def _damped(moment: Tensor, what: str, damping: float) -> tuple[Tensor, float]:
    """A moment at a mean diagonal of 1, damped, and the mean that it had; the identity and 0 for a moment of zeros."""
    shape = tuple(moment.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise LaminaError(f"a second moment of the {what} is square, not {shape}")
    if not bool(torch.isfinite(moment).all()):
        raise LaminaError(f"the second moment of the {what} holds NaN or infinite numbers: some example made them")
    moment, size = normalised(moment.double())
    largest = float(moment.abs().max())
    # Sums in another order differ by rounding, in half precision by more; anything else is a mistake.
    if float((moment - moment.T).abs().max()) > 1e-2 * largest:
        raise LaminaError(f"the second moment of the {what} is not symmetric")
    moment = (moment + moment.T) / 2
    mean = float(moment.diagonal().mean())
    if largest == 0:
        moment.diagonal().fill_(1.0)
        return moment, 0.0
    if mean > 0:
        moment /= mean
        moment.diagonal().add_(damping / 2)
    if mean <= 0 or int(torch.linalg.cholesky_ex(moment).info):
        moment = _without_negative(moment, damping / 2, what)
    moment.diagonal().add_(damping / 2)
    return moment, mean * size


def _without_negative(moment: Tensor, added: float, what: str) -> Tensor:
    """The nearest moment without negative eigenvalues, where these are no more than what rounding makes of zeros.

    Rounding is a share of the largest eigenvalue, and that may be a thousand times the mean to which the damping is held.
    """
    values, vectors = torch.linalg.eigh(moment)
    if not float(values[0]) - added >= -_ROUNDED * float(values[-1]):
        raise LaminaError(f"the second moment of the {what} has negative eigenvalues, as no sum of squares has")
    nearest: Tensor = (vectors * values.clamp_min(added)) @ vectors.T
    return nearest


@pure
def _mean_over_taps(patches: Tensor, taps: int) -> Tensor:
    channels = len(patches) // taps
    return patches.view(channels, taps, channels, taps).diagonal(dim1=1, dim2=3).mean(-1)


@pure
def _side(moment: Tensor) -> Side:
    values, vectors = torch.linalg.eigh(moment)
    roots = values.sqrt()
    return Side(moment, (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)


def _of_groups(side: Side | None, count: int) -> list[Side | None]:
    if side is None:
        return [None] * count
    n = len(side.moment) // count
    return [_side(side.moment[at : at + n, at : at + n].clone()) for at in range(0, len(side.moment), n)]


def _in_blocks(side: Side | None, count: int) -> Side | None:
    if side is None or count == 1:
        return side
    block = torch.arange(len(side.moment), device=side.moment.device) // (len(side.moment) // count)
    return _side(side.moment * (block[:, None] == block))
