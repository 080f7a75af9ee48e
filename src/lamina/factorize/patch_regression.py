"""Tucker-2 in a metric of patches: its factors solved for in turn, each the best for the others.

    R   rows G^½ W of a weight (O, K, I)     V   input basis (I, s)      Z   V at every tap, (K I, K s)
    H   moment of patches (K I, K I)         U   output basis (O, t)     C   core (t, K, s)

    ‖(R − U C Zᵀ) H^½‖²

Given V, core and output basis together are a reduced-rank regression (Izenman, 1975), which has a closed form; given these two,
the input basis solves linear equations whose matrix, of I s rows, is never made. No step makes the error larger. No root of H
is taken. All is float64, and taps come before channels, so that the products with Z are products of plain matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .least_squares import conjugate_gradients
from .metric import Metric, on_sides
from .spectral import leading

_STEPS = 4
"""Of conjugate gradients for an input basis: the next regression moves it anyway."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Bases and core, laid out as above; ``U`` None where the output side is whole, ``V`` where the input side is."""

    U: Tensor | None
    C: Tensor
    V: Tensor | None

    def reduced(self) -> Tensor:
        """``C Zᵀ``: ``(t, K, I)``."""
        return self.C if self.V is None else self.C @ self.V.T


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight in a metric of patches."""

    R: Tensor
    seen: Tensor
    """``R H``, ``(O, K, I)``."""
    H: Tensor
    near_inverse: Tensor
    """The inverse of the channels' moment, ``(I, I)``."""
    taps: Tensor
    """The moment of the taps, ``(K, K)``, its mean diagonal entry 1. With that of the channels it is nearly H, as a product."""

    @classmethod
    def of(cls, W: Tensor, metric: Metric) -> Problem:
        """That of a weight ``(O, I, K)``, float64."""
        assert metric.patches is not None
        assert metric.inputs is not None
        O, I, K = W.shape
        R = on_sides(W, None, None if metric.gradients is None else metric.gradients.root).transpose(1, 2).contiguous()
        H = metric.patches.view(I, K, I, K).permute(1, 0, 3, 2).reshape(K * I, K * I)
        taps = H.view(K, I, K, I).diagonal(dim1=1, dim2=3).mean(-1)
        inverse = metric.inputs.inverse @ metric.inputs.inverse
        return cls(R, (R.flatten(1) @ H).view(O, K, I), H, inverse, taps / taps.diagonal().mean())

    def lost(self, fit: Fit) -> float:
        """The squared error."""
        made = fit.reduced().flatten(1)
        rest = self.R.flatten(1) - (made if fit.U is None else fit.U @ made)
        return float((rest @ self.H * rest).sum())


def input_whole(problem: Problem, rank_out: int) -> Fit:
    """The best fit with the input side whole: the output basis holds what is seen of the weight, and the core is its share."""
    U = leading(problem.seen.flatten(1) @ problem.R.flatten(1).T, rank_out)[1]
    return Fit(U, torch.tensordot(U, problem.R, dims=([0], [0])), None)


def alternate(problem: Problem, starts: Sequence[Tensor], rank_out: int | None, sweeps: int, tolerance: float) -> Fit:
    """From the best of some input bases on: input basis and regression in turn.

    Args:
        problem: The weight and its metric.
        starts: Input bases, ``(I, s)``, with orthonormal columns.
        rank_out: t; None leaves the output side whole.
        sweeps: Most sweeps done.
        tolerance: Stop when a sweep lowers the error by less than this share of it.
    """
    fits = [regressed(problem, V, rank_out) for V in starts]
    errors = [problem.lost(fit) for fit in fits]
    error = min(errors)
    fit = fits[errors.index(error)]
    if fit.V is None or fit.V.shape[1] == fit.V.shape[0]:
        return fit
    for _ in range(sweeps):
        new = regressed(problem, input_basis(problem, fit), rank_out)
        last, now = error, problem.lost(new)
        if now < last:
            fit, error = new, now
        if not last - now > tolerance * last:
            break
    return fit


def regressed(problem: Problem, V: Tensor, rank_out: int | None) -> Fit:
    """The best core, and output basis, for an input basis."""
    (O, K, I), s = problem.R.shape, V.shape[1]
    HZ = (problem.H.view(K * I * K, I) @ V).view(K, I, K * s)
    L = torch.linalg.cholesky((V.T @ HZ).view(K * s, K * s))
    # All that the regression sees of the weight, in coordinates in which the patches' moment is the identity.
    seen = torch.linalg.solve_triangular(L, (problem.seen @ V).view(O, K * s).T, upper=False)
    U = None
    if rank_out is not None:
        U = leading(seen.T @ seen, rank_out)[1]
        seen = seen @ U
    return Fit(U, torch.linalg.solve_triangular(L.T, seen, upper=True).T.reshape(-1, K, s), V)


def input_basis(problem: Problem, fit: Fit, steps: int = _STEPS) -> Tensor:
    """The input basis that is best for core and output basis, nearly: some steps of conjugate gradients from the one that is.

    Returns:
        ``(I, s)``, with orthonormal columns: the core is to be solved for anew.
    """
    assert fit.V is not None
    t, K, s = fit.C.shape
    C = fit.C.reshape(t * K, s)
    seen = problem.seen if fit.U is None else torch.tensordot(fit.U, problem.seen, dims=([0], [0]))

    def normal(X: Tensor) -> Tensor:
        return C.T @ ((C @ X).view(t, -1) @ problem.H).view(t * K, -1)

    # What the equations would be, were H the product of the taps' moment and the channels'.
    curved, turn = torch.linalg.eigh(C.T @ (problem.taps @ fit.C).view(t * K, s))
    near = (turn / curved.clamp_min(float(curved.max()) * 1e-9 + 1e-280)) @ turn.T
    X = conjugate_gradients(
        normal, lambda X: near @ X @ problem.near_inverse, C.T @ seen.reshape(t * K, -1), fit.V.T, steps=steps
    )
    Q: Tensor = torch.linalg.qr(X.T).Q
    return Q
