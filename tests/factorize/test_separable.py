"""Separable kernels against the definition, written out, and NumPy's SVD of the weight read as a matrix."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lamina import RankError
from lamina.factorize.separable import left_out_separable, separable


def composed(V: Tensor, H: Tensor) -> Tensor:
    """``W[o, i, a, b] = Σ_r H[o, r, b] V[r, i, a]``, entry by entry."""
    (rank, I, kh, _), (O, _, _, kw) = V.shape, H.shape
    W = torch.zeros(O, I, kh, kw, dtype=torch.float64)
    for o, i, a, b in np.ndindex(O, I, kh, kw):
        W[o, i, a, b] = sum(float(H[o, r, 0, b]) * float(V[r, i, a, 0]) for r in range(rank))
    return W


def spectrum(W: Tensor) -> np.ndarray:
    """Squared singular values of the matrix in which pairs (o, b) meet pairs (i, a)."""
    O, I, kh, kw = W.shape
    M = np.empty((O * kw, I * kh))
    for o, i, a, b in np.ndindex(O, I, kh, kw):
        M[o * kw + b, i * kh + a] = float(W[o, i, a, b])
    return np.linalg.svd(M, compute_uv=False) ** 2


@given(
    st.tuples(*[st.integers(1, 4)] * 4),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1.0, 1e-25]),
)
@settings(max_examples=60, deadline=None)
def test_the_filters_are_the_best_at_their_rank_and_what_they_leave_out_is_foretold(
    shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype, size: float
) -> None:
    O, I, kh, kw = shape
    rank = data.draw(st.integers(1, min(I * kh, O * kw)))
    W = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size).to(dtype)
    V, H = separable(W, rank)
    assert (V.shape, H.shape, V.dtype) == ((rank, I, kh, 1), (O, rank, 1, kw), dtype)
    squares, rounding = spectrum(W), 64 * torch.finfo(dtype).eps
    left = float((W.double() - composed(V, H)).square().sum()) / squares.sum()
    assert left == pytest.approx(squares[rank:].sum() / squares.sum(), abs=rounding)
    assert float(left_out_separable(W)[rank]) == pytest.approx(left, abs=rounding)


def test_an_edge_filter_takes_one_pair_of_filters() -> None:
    sobel = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([1.0, 0.0, -1.0])
    V, H = separable(sobel[None, None], 1)
    torch.testing.assert_close(composed(V, H).float()[0, 0], sobel)


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_outside_its_range_is_refused(rank: int) -> None:
    with pytest.raises(RankError, match="between 1 and 6"):
        separable(torch.randn(4, 2, 3, 2), rank)
