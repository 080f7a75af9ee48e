"""Spectra: how much of a layer's weight lies in each direction, and the form that has a rank on each of its sides.

Here alone it is said of what the spectrum is taken: of the weight, or of the weight as a calibration weighs it, ``G½ W H½``,
whose squared singular values are what the answers lose by each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..factorize.metric import Metric
from ..factorize.pure import pure
from ..factorize.spectral import at_least_float32, normalised, squares, unfold
from ..forms import BlockTerm, Dense, Form, LowRank
from ..network.surgery import forbid_nonfinite
from ..network.walk import Layer
from ..values import Geometry


@final
@dataclass(frozen=True, slots=True)
class Spectrum:
    """One side of a weight, as a matrix of that side's channels and everything else.

    Attributes:
        squares: Squared singular values up to a common factor, largest first; as many as the shorter side has entries.
        rows: The channels.
        columns: Everything else.
    """

    squares: tuple[float, ...]
    rows: int
    columns: int


def spectra(layer: Layer, metric: Metric | None = None) -> tuple[Spectrum, ...]:
    """The spectrum of a layer's weight: of a plain matrix one; of a convolution with a kernel its inputs' and its outputs'.

    Of a convolution in groups it is the sum of the groups' own: what all of them lose together where each has the same rank.

    Args:
        layer: The layer.
        metric: What its changes cost; of patches it is taken by its channels. None: all the same.

    Raises:
        LayerError: The weight is not finite.
    """
    forbid_nonfinite(layer)
    sides = (0,) if layer.geometry.pointwise else (1, 0)
    return tuple(_spectrum(layer.weight.detach(), side, layer.geometry.groups, metric) for side in sides)


@pure
def _spectrum(W: Tensor, side: int, groups: int, metric: Metric | None) -> Spectrum:
    W = normalised(at_least_float32(W))[0]
    parts: Sequence[Tensor] = W.chunk(groups)
    if metric is not None:
        parts = [
            own.fitting(part).whiten(part) for part, own in zip(parts, metric.of_channels().of_groups(groups), strict=True)
        ]
    matrices = [unfold(part, side) for part in parts]
    together = squares(matrices[0]) if groups == 1 else torch.stack([squares(matrix) for matrix in matrices]).sum(0)
    return Spectrum(tuple(together.tolist()), *matrices[0].shape)


def form_of(layer: Geometry, ranks: Sequence[int]) -> Form:
    """The form with a rank on each side, as `spectra` has the sides.

    A side stays whole where its rank is full, and where it has fewer weights so: it then loses nothing on that side.
    """
    if layer.pointwise:
        return LowRank(ranks[0])
    (s, t), (I, O) = ranks, layer.widths
    sides = [(a, b) for a in (s, None) for b in (t, None) if (a or 0) < I and (b or 0) < O]
    forms = [BlockTerm(a, b) if a or b else Dense() for a, b in sides]
    return min(forms, key=lambda form: form.parameters(layer))
