"""The rank of a matrix under noise, by empirical variational Bayes (EVBMF): its global solution is known in closed form.

    L, M   rows and columns, L ≤ M       α = L / M       γ_h   singular values       σ²   variance of the noise
    x = γ² / (M σ²)

Nakajima, Sugiyama, Babacan and Tomioka, 2013 (JMLR 14): a matrix is a product of two factors with Gaussian priors, whose widths
are learned too, plus noise. At a given σ² each singular value stands for itself: with it the free energy changes by
``M gain(x)``, so it counts where that is negative, above a threshold. What is left is a function of σ² alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

_GRID = 128
_LEAST = 1e-14
"""Squares below this share of the largest are rounding: to take them for exact zeros would make the noise vanish altogether."""


def evbmf_rank(squares: Sequence[float], rows: int, columns: int) -> int:
    """How many singular values of a matrix stand out of its noise, whose variance is estimated too.

    Args:
        squares: Squared singular values, largest first; as many as the shorter side.
        rows: Of the matrix.
        columns: Of the matrix.

    Returns:
        The rank, from 0 (nothing but noise) on.
    """
    if not squares or squares[0] <= 0:
        return 0
    L, M = sorted((rows, columns))
    alpha = L / M
    x = np.maximum(np.asarray(squares, dtype=np.float64) / squares[0], _LEAST) / M  # times 1 / σ²
    edge = threshold(alpha)
    return int((x / _noise(x, alpha, edge) > edge).sum())


def threshold(alpha: float) -> float:
    """``x`` above which a singular value counts: ``(1 + τ)(1 + α / τ)``, where τ solves ``Φ(τ) + Φ(τ / α) = 0``."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    tau = brentq(lambda t: phi(t) + phi(t / alpha), 1e-3 * alpha, 10.0, xtol=1e-12)
    return float((1 + tau) * (1 + alpha / tau))


def gain(x: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """By how much the free energy changes, over M, where a singular value counts; for ``x`` at or above the threshold."""
    half = (x - (1 + alpha)) / 2
    tau = half + np.sqrt(np.maximum(half * half - alpha, 0.0))
    change: NDArray[np.float64] = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return change


def _noise(x: NDArray[np.float64], alpha: float, edge: float) -> float:
    """The variance with the least free energy, for ``x`` at a variance of 1."""
    # No more than this many values count where the noise is at its best; so all the others bound it from below.
    most = math.ceil(len(x) / (1 + alpha)) - 1
    low, high = max(float(x[most] / edge), float(x[most:].mean())), float(x.mean())

    def energy(log_variance: float) -> float:
        scaled = x / math.exp(log_variance)
        above = scaled > edge
        return float((scaled - np.log(scaled)).sum() + gain(scaled[above], alpha).sum())

    # The free energy has a kink wherever a value begins to count, and may have a valley between any two.
    grid = np.linspace(math.log(low), math.log(max(high, low)), _GRID)
    best = int(np.argmin([energy(point) for point in grid]))
    around = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    if not around[0] < around[1]:
        return math.exp(around[0])
    found = minimize_scalar(energy, bounds=around, method="bounded", options={"xatol": 1e-9})
    return math.exp(float(found.x) if found.fun < energy(float(grid[best])) else float(grid[best]))
