"""The rank under noise: found in made matrices whose rank is known, and its free energy minimised from the definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from lamina.factorize.evbmf import evbmf_rank, gain, threshold


def made(seed: int, rows: int, columns: int, rank: int, noise: float) -> NDArray[np.float64]:
    """A matrix of a rank, whose singular values lie between one and two times those of the strongest noise at 1, plus noise."""
    draw = np.random.default_rng(seed)
    U, V = (np.linalg.qr(draw.standard_normal((side, rank)))[0] for side in (rows, columns))
    strong = np.linspace(4.0, 2.0, rank) * (np.sqrt(rows) + np.sqrt(columns)) / 2
    signal: NDArray[np.float64] = (U * strong) @ V.T
    return signal + noise * draw.standard_normal((rows, columns))


def rank_of(W: NDArray[np.float64]) -> int:
    return evbmf_rank((np.linalg.svd(W, compute_uv=False) ** 2).tolist(), *W.shape)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", [(60, 60), (40, 200), (200, 40), (64, 27)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_rank_under_noise_is_found(shape: tuple[int, int], rank: int, seed: int) -> None:
    assert rank_of(made(seed, *shape, rank, 0.5)) == rank


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", [(60, 60), (40, 200), (200, 40)], ids=str)
def test_nothing_stands_out_of_noise_alone(shape: tuple[int, int], seed: int) -> None:
    assert rank_of(np.random.default_rng(seed).standard_normal(shape)) == 0


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_without_noise_the_rank_is_the_matrixs_own(rank: int) -> None:
    assert rank_of(made(0, 60, 80, rank, 0.0)) == rank


def test_a_matrix_of_zeros_has_rank_0() -> None:
    assert evbmf_rank([0.0] * 5, 5, 9) == 0 and evbmf_rank([], 0, 9) == 0


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e150])
def test_the_scale_of_a_matrix_does_not_matter(scale: float) -> None:
    assert rank_of(made(3, 40, 60, 6, 0.5) * scale) == 6


def test_a_single_row_or_value_has_an_answer() -> None:
    assert rank_of(np.ones((1, 1))) in (0, 1) and rank_of(np.random.default_rng(0).standard_normal((1, 50))) in (0, 1)


# ---- the closed form against its definition ----


def least_free_energy(gamma: float, variance: float, L: int, M: int) -> float:
    """Twice the free energy of one pair of factors beyond that of none, least over means, variances and prior widths.

    Nakajima et al., 2013, equation 12, by a general minimiser from several starts; the prior widths at their best for the rest.
    """

    def energy(p: NDArray[np.float64]) -> float:
        a, b = p[:2]
        va, vb = np.exp(p[2:])
        # The best width of a prior is what the factor's own moments say.
        ca, cb = (a * a + M * va) / M, (b * b + L * vb) / L
        fit = (-2 * a * b * gamma + (a * a + M * va) * (b * b + L * vb)) / variance
        return float(M * np.log(ca / va) + L * np.log(cb / vb) + fit)

    starts = [np.array([s, s, np.log(v), np.log(v)]) for s in (gamma**0.5, 0.3 * gamma**0.5, 2.0) for v in (0.01, 0.3)]
    return min(
        float(minimize(energy, start, method="Nelder-Mead", options={"maxiter": 20000, "fatol": 1e-10}).fun) for start in starts
    )


@pytest.mark.parametrize(("L", "M"), [(10, 10), (10, 40), (30, 35)])
@pytest.mark.parametrize("strength", [1.1, 1.5, 3.0])
def test_what_a_singular_value_changes_of_the_free_energy_is_the_least_over_all_factors(
    L: int, M: int, strength: float
) -> None:
    alpha, variance = L / M, 0.7
    x = threshold(alpha) * strength
    found = M * float(gain(np.array([x]), alpha)[0])
    assert found < 0
    assert least_free_energy((x * M * variance) ** 0.5, variance, L, M) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.001, 0.1, 0.5, 1.0])
def test_at_the_threshold_a_singular_value_changes_nothing_and_the_threshold_is_near_its_known_approximation(
    alpha: float,
) -> None:
    x = threshold(alpha)
    assert gain(np.array([x]), alpha)[0] == pytest.approx(0, abs=1e-9)
    tau = 2.5129 * alpha**0.5
    assert x == pytest.approx((1 + tau) * (1 + alpha / tau), rel=0.02)
