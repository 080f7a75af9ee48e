"""The damping of a layer: its losses are those of cuts by definition, and it grows as data get few."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lamina.calibration.damping import GRID, Pair, held_out_losses
from lamina.factorize.metric import Metric
from lamina.factorize.weighted import weighted_low_rank

DOUBLE = {"dtype": torch.float64}


def moment(x: Tensor) -> Tensor:
    return x.T @ x


def mixed(n: int, rows: int, mixing: Tensor) -> Tensor:
    return torch.randn(rows, n, **DOUBLE) @ mixing


def pairs(O: int, I: int, rows: int) -> tuple[Pair, Pair]:
    near, far = torch.randn(I, I, **DOUBLE), torch.randn(O, O, **DOUBLE)
    fit, held = (Pair(moment(mixed(I, rows, near)), moment(mixed(O, rows, far))) for _ in range(2))
    return fit, held


def cost(change: Tensor, held: Pair) -> Tensor:
    """tr(G ΔW H ΔWᵀ), summed over the taps."""
    assert held.gradients is not None
    return torch.einsum("op,oik,pjk,ij->", held.gradients, change, change, held.inputs)


@pytest.mark.parametrize(("O", "I"), [(12, 8), (8, 12), (9, 9)])
def test_of_a_matrix_they_are_what_the_best_low_rank_factors_lose(O: int, I: int) -> None:
    W, (fit, held) = torch.randn(O, I, **DOUBLE), pairs(O, I, 40)
    found = held_out_losses(W, fit, held)
    rank = max(int(0.25 * O * I / (O + I)), 1)
    for damping, loss in zip(GRID, found, strict=True):
        A, B = weighted_low_rank(W, rank, Metric.of(fit.inputs, fit.gradients, damping=damping))
        wanted = cost((W - B @ A)[..., None], held) / cost(W[..., None], held)
        assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


def test_of_a_convolution_they_are_those_of_a_cut_of_each_side() -> None:
    O, I, K = 8, 6, 9
    W, (fit, held) = torch.randn(O, I, 3, 3, **DOUBLE), pairs(O, I, 40)
    flat = W.flatten(2)
    f = next(f for f in torch.linspace(0, 1, 100_001, **DOUBLE) if K * O * I * f * f + (O * O + I * I) * f > 0.25 * K * O * I)
    wanted = torch.zeros(len(GRID), **DOUBLE)
    for number, damping in enumerate(GRID):
        metric = Metric.of(fit.inputs, fit.gradients, damping=damping)
        white = metric.whiten(flat)
        for mode, size in ((0, O), (1, I)):
            unfolded = white.movedim(mode, 0).flatten(1)
            U = torch.linalg.svd(unfolded)[0][:, : max(int(f * size), 1)]
            left = (unfolded - U @ U.T @ unfolded).view(white.movedim(mode, 0).shape).movedim(0, mode)
            wanted[number] += cost(metric.unwhiten(left), held) / cost(flat, held)
    torch.testing.assert_close(held_out_losses(W, fit, held), wanted, rtol=1e-6, atol=0)


def test_the_units_of_the_moments_change_nothing() -> None:
    W, (fit, held) = torch.randn(6, 5, 2, **DOUBLE), pairs(6, 5, 30)
    found = held_out_losses(W, fit, held)
    others = (Pair(pair.inputs * 1e-9, pair.gradients * 1e7) for pair in (fit, held))
    torch.testing.assert_close(held_out_losses(W, *others), found)


def test_without_gradients_all_outputs_count_alike() -> None:
    W, (fit, held) = torch.randn(6, 5, **DOUBLE), pairs(6, 5, 30)
    eye = torch.eye(6, **DOUBLE)
    wanted = held_out_losses(W, fit._replace(gradients=eye), held._replace(gradients=eye))
    torch.testing.assert_close(held_out_losses(W, fit._replace(gradients=None), held._replace(gradients=None)), wanted)


def test_the_fewer_the_rows_the_more_damping_loses_least() -> None:
    O = I = 40
    near, far = (torch.randn(n, n, **DOUBLE) * torch.linspace(0.05, 1, n, **DOUBLE) for n in (I, O))
    held = Pair(moment(mixed(I, 4000, near)), moment(mixed(O, 4000, far)))
    best = []
    for rows in (20, 20_000):
        total = torch.zeros(len(GRID), **DOUBLE)
        for _ in range(10):
            total += held_out_losses(
                torch.randn(O, I, **DOUBLE), Pair(moment(mixed(I, rows, near)), moment(mixed(O, rows, far))), held
            )
        best.append(GRID[int(total.argmin())])
    assert best[0] > best[1]


def test_dead_channels_and_fewer_rows_than_channels_give_finite_losses() -> None:
    W, (fit, held) = torch.randn(12, 10, 3, **DOUBLE), pairs(12, 10, 4)
    fit.inputs[3], fit.inputs[:, 3], fit.gradients[5], fit.gradients[:, 5] = 0, 0, 0, 0
    assert held_out_losses(W, fit, held).isfinite().all()


def test_where_nothing_costs_anything_nothing_is_told() -> None:
    W, (fit, held) = torch.randn(6, 5, **DOUBLE), pairs(6, 5, 30)
    nothing = torch.zeros(6, 6, **DOUBLE)
    assert all(math.isnan(x) for x in held_out_losses(W, fit._replace(gradients=nothing), held._replace(gradients=nothing)))
