"""Sums of outer products in blocks: what comes out is Σ x xᵀ, and its error is told by the scatter of its batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.calibration import gram
from lamina.calibration.gram import Gram, Scatter, add_to, exact_products, packed


@given(I=st.integers(1, 12), taps=st.integers(1, 5), height=st.integers(1, 16), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_blocks_hold_the_sum_whatever_their_height(I: int, taps: int, height: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "_HEIGHT", height)
        n = I * taps
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(n, m, dtype=torch.float64, generator=generator) for m in (1, 7, 4)]
        found, other = Gram(n), Gram(n)
        for part in parts[:2]:
            found.add(part)
        add_to([found, other], parts[2])
        wanted = sum((part @ part.T for part in parts), torch.zeros(n, n, dtype=torch.float64))
        torch.testing.assert_close(found.dense(), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.dense(), parts[2] @ parts[2].T, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.dense(), found.dense().T)
        Z = torch.randn(n, 3, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(found.times(Z), wanted @ Z, rtol=1e-10, atol=1e-10)
        by_tap = wanted.view(taps, I, taps, I).diagonal(dim1=0, dim2=2).mean(-1)
        torch.testing.assert_close(found.over_taps(taps), by_tap, rtol=1e-12, atol=1e-12)
        assert found.flat.numel() == packed(n)


@given(I=st.integers(1, 12), taps=st.integers(1, 5), height=st.integers(1, 16), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_sum_that_is_added_a_row_of_taps_at_a_time_is_the_same(I: int, taps: int, height: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "_HEIGHT", height)
        x = torch.randn(I * taps, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        whole, found = x @ x.T, Gram(I * taps)
        for tap in range(taps):
            found.add_at(tap * I, tap * I, whole[tap * I : tap * I + I, tap * I :])
        torch.testing.assert_close(found.dense(), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.times(x), whole @ x, rtol=1e-10, atol=1e-10)
        apart = Gram(I * taps)
        apart.add_at(0, (taps - 1) * I, whole[:I, -I:])  # in the last tap's columns, alone
        wanted = torch.zeros_like(whole)
        wanted[:I, -I:], wanted[-I:, :I] = whole[:I, -I:], whole[-I:, :I]
        torch.testing.assert_close(apart.dense(), wanted, rtol=1e-12, atol=1e-12)


def test_little_more_than_half_of_a_matrix_is_kept() -> None:
    assert packed(4608) < 0.56 * 4608**2


def test_float32_columns_are_added_up_to_float32_rounding_over_many_batches() -> None:
    x = torch.randn(24, 200_000) + 3  # of one sign, as inputs behind a ReLU are
    found = Gram(24)
    for part in x.split(20_000, dim=1):
        found.add(part)
    wanted = x.double() @ x.double().T
    size = wanted.diagonal().sqrt()
    assert ((found.dense() - wanted) / (size[:, None] * size)).abs().max() < 8 * torch.finfo(torch.float32).eps


def test_more_columns_than_a_product_may_sum_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "MOST_COLUMNS", 5)
    x = torch.randn(4, 23, dtype=torch.float64)
    found = Gram(4)
    found.add(x)
    torch.testing.assert_close(found.dense(), x @ x.T)


def test_products_that_keep_ten_bits_are_noticed() -> None:
    assert exact_products(torch.device("cpu"))


def test_the_error_told_is_the_error_made() -> None:
    """Over many draws, the estimate's mean square is that of the true relative error, within its own noise."""
    n, batches, told, made = 6, 16, [], []
    for _ in range(300):
        x = torch.randn(batches, n, 10, dtype=torch.float64)
        scatter = Scatter(n, torch.device("cpu"))
        for part in x:
            for columns in part.split(4, dim=1):
                scatter.take(columns)
            assert scatter.end(10)
        M = torch.einsum("bim,bjm->ij", x, x) / (10 * batches)
        told.append(scatter.error() ** 2)
        made.append(float((M - torch.eye(n)).norm() / math.sqrt(n)) ** 2)
    told_mean, made_mean = sum(told) / 300, sum(made) / 300
    assert told_mean == pytest.approx(made_mean, rel=0.35)  # four columns of Z, the same in all draws


def test_scatter_of_unequal_batches_is_weighted_and_nothing_is_told_by_one() -> None:
    scatter = Scatter(3, torch.device("cpu"))
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    scatter.take(x)
    assert scatter.end(1) and scatter.error() is None
    scatter.take(5**0.5 * x)  # the same mean
    assert scatter.end(5) and scatter.error() == pytest.approx(0, abs=1e-7)
    scatter.take(math.nan * x)
    assert not scatter.end(1)
