"""The damping of a layer's moments: that under which factors fitted to some of the inputs lose least on others.

    H, G   moments of channels and of gradients that are fitted to      H', G'   those held out      d   a damping
    R      what a cut leaves out of one side of the weight: W − (the cut) = R W, with P = 1 − R a projection

The best cut of the outputs in the metric goes by the leading eigenvectors U of Lᵀ (Σ W H Wᵀ) L, summed over the taps, where
L Lᵀ = G: P = L⁻ᵀ U Uᵀ Lᵀ. On what was held out it costs tr(Rᵀ G' R Σ W H' Wᵀ). So once three matrices of one side of the weight
are made, all dampings are judged on that side alone. The other side is the same with the weight turned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GRID = (1e-4, 1e-3, 1e-2, 1e-1)
"""Dampings that are judged, as shares of a moment's mean diagonal entry."""
_SHARE = 0.25
"""Of the weight's numbers, what a cut leaves: where a budget cuts most."""


class Pair(NamedTuple):
    """Moments of one share of the data, in any unit."""

    inputs: Tensor
    """``(I, I)``, of channels."""
    gradients: Tensor | None
    """``(O, O)``; None where they are not known."""


def held_out_losses(W: Tensor, fitted: Pair, held_out: Pair) -> Tensor:
    """What cuts of a weight to about a quarter cost on held-out data, fitted to others under each damping of `GRID`.

    Args:
        W: ``(O, I, *kernel)``.
        fitted: Moments to fit to.
        held_out: Those to judge by, on the same device.

    Returns:
        ``(len(GRID),)``, float64, as a share of what it costs to lose all of the weight; NaN where it costs nothing.
    """
    W = W.detach().to(fitted.inputs).reshape(*W.shape[:2], -1)
    O, I, K = W.shape
    eye = torch.eye(O, dtype=W.dtype, device=W.device)
    G, there = (eye if pair.gradients is None else pair.gradients for pair in (fitted, held_out))
    sides = [(W, fitted.inputs, G, held_out.inputs, there), (W.transpose(0, 1), G, fitted.inputs, there, held_out.inputs)]
    if K == 1:  # a low rank is a cut of either side
        rank = max(int(_SHARE * O * I / (O + I)), 1)
        return _of_side(*sides[O > I], rank)
    # The share f of both sides at which s I + s t K + t O is that share of the weight.
    a, b = K * O * I, O**2 + I**2
    share = (math.sqrt(b**2 + 4 * a * a * _SHARE) - b) / (2 * a)
    return sum((_of_side(*side, max(int(share * len(side[0])), 1)) for side in sides), W.new_zeros(len(GRID)))


def _of_side(W: Tensor, near: Tensor, far: Tensor, near_held: Tensor, far_held: Tensor, rank: int) -> Tensor:
    """Losses of cuts of the first side of a weight ``(n, m, K)``, by moments ``(m, m)`` and ``(n, n)``."""
    size, far = near.diagonal().mean().clamp_min(1e-300), far / far.diagonal().mean().clamp_min(1e-300)
    rows = W.movedim(1, -1)
    fit, damped, held = (part.flatten(1) @ rows.flatten(1).T for part in (rows @ near / size, rows, rows @ near_held))
    eye, losses = torch.eye(len(W), dtype=W.dtype, device=W.device), []
    for damping in GRID:
        L, failed = torch.linalg.cholesky_ex(far + damping * eye)
        if int(failed):  # rounding was more than the damping
            losses.append(W.new_tensor(math.inf))
            continue
        U = torch.linalg.eigh(L.T @ (fit + damping * damped) @ L)[1][:, -rank:]
        R = eye - torch.linalg.solve_triangular(L.T, U, upper=True) @ (U.T @ L.T)
        losses.append(((far_held @ R) * (R @ held)).sum())
    return torch.stack(losses) / (far_held * held).sum()
