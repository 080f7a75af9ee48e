"""Truncated SVD against NumPy's, for weights of every condition, size and scale."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lamina import RankError
from lamina.factorize.low_rank import left_out, low_rank


def with_singular_values(values: Tensor, O: int, I: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random weight ``(O, I)`` with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(O, len(values), generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(I, len(values), generator=generator, dtype=torch.float64))[0]
    return (U * values @ V.T).to(dtype)


def error(W: Tensor, A: Tensor, B: Tensor) -> float:
    """``‖W − B A‖ / max |W|``: the scale is taken off first, so that squares of 1e200 do not overflow in the test itself."""
    scale = max(float(W.double().abs().max()), 1e-300)
    root = scale**0.5
    return float((W.double() / scale - (B.double() / root) @ (A.double() / root)).norm())


def discarded(W: Tensor, rank: int) -> tuple[float, float]:
    """By NumPy's SVD: the norm of the singular values left out at a rank, and of all, after division by max |W|."""
    M = W.double().numpy()
    values = np.linalg.svd(M / max(np.abs(M).max(), 1e-300), compute_uv=False)
    return float(np.linalg.norm(values[rank:])), float(np.linalg.norm(values))


def assert_best(W: Tensor, rank: int) -> None:
    """The error is that of the discarded singular values, up to the rounding of the factors themselves."""
    A, B = low_rank(W, rank)
    least, norm = discarded(W, rank)
    rounding = 16 * torch.finfo(A.dtype).eps * norm
    assert bool(torch.isfinite(A).all())
    assert bool(torch.isfinite(B).all())
    assert A.shape == (rank, W.shape[1])
    assert B.shape == (W.shape[0], rank)
    assert abs(error(W, A, B) - least) <= rounding + 1e-6 * least


GEOMETRIC = {torch.float32: 1e-7, torch.float64: 1e-12}
WEIGHTS = {
    "random": lambda O, I, dtype: torch.randn(O, I, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype),
    "ill-conditioned": lambda O, I, dtype: with_singular_values(
        torch.logspace(0, float(np.log10(GEOMETRIC[dtype])), min(O, I), dtype=torch.float64), O, I, dtype
    ),
    "rank 3": lambda O, I, dtype: with_singular_values(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), O, I, dtype),
    "equal singular values": lambda O, I, dtype: with_singular_values(torch.ones(min(O, I), dtype=torch.float64), O, I, dtype),
    "one outlier": lambda O, I, dtype: with_singular_values(
        torch.tensor([1e6] + [1.0] * (min(O, I) - 1), dtype=torch.float64), O, I, dtype
    ),
    "zero": lambda O, I, dtype: torch.zeros(O, I, dtype=dtype),
    "one entry": lambda O, I, dtype: torch.zeros(O, I, dtype=dtype).index_put_(
        (torch.tensor(1), torch.tensor(2)), torch.tensor(-5.0, dtype=dtype)
    ),
}


@pytest.mark.parametrize("rank", [1, 3, 7, 15, 23, 24])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_the_squared_error_is_the_sum_of_the_squared_singular_values_left_out(
    make: object, dtype: torch.dtype, shape: tuple[int, int], rank: int
) -> None:
    assert_best(make(*shape, dtype), rank)  # type: ignore[operator]


SCALES = {
    "1e-40 in float32, denormal": (1e-40, torch.float32),
    "1e-30 in float32": (1e-30, torch.float32),
    "1e30 in float32": (1e30, torch.float32),
    "1e37 in float32": (1e37, torch.float32),
    "1e-320 in float64, denormal": (1e-320, torch.float64),
    "1e-200 in float64": (1e-200, torch.float64),
    "1e200 in float64": (1e200, torch.float64),
    "1e300 in float64": (1e300, torch.float64),
    "1e307 in float64": (1e307, torch.float64),
}


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize(("scale", "dtype"), SCALES.values(), ids=SCALES)
def test_the_scale_of_a_weight_does_not_matter(scale: float, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    W = (torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * scale).to(dtype)
    for rank in (1, 6, 12):
        assert_best(W, rank)


def test_doubling_a_weight_twice_doubles_each_factor() -> None:
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    A, B = low_rank(W, 5)
    A4, B4 = low_rank(4 * W, 5)
    torch.testing.assert_close(B4 @ A4, 4 * (B @ A))
    torch.testing.assert_close(A4.norm(), 2 * A.norm())


@settings(max_examples=60, deadline=None)
@given(
    O=st.integers(1, 40), I=st.integers(1, 40), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_full_rank_gives_the_weight_back(O: int, I: int, seed: int, dtype: torch.dtype) -> None:
    W = torch.randn(O, I, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    A, B = low_rank(W, min(O, I))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert float((B @ A - W).norm()) <= tolerance * float(W.norm())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_rank_is_better_than_a_larger_one(data: st.DataObject) -> None:
    O, I = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    W = torch.randn(O, I, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    errors = [error(W, *low_rank(W, rank)) for rank in range(1, min(O, I) + 1)]
    assert all(larger <= smaller + 1e-6 for smaller, larger in pairwise(errors))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_each_pair_of_factors_shares_its_scale_evenly(shape: tuple[int, int]) -> None:
    A, B = low_rank(torch.randn(shape, generator=torch.Generator().manual_seed(3)), 10)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    # Small ones as well: to the 1e-8 that a Gram matrix of float32 tells apart.
    fading = with_singular_values(torch.logspace(0, -9, 24, dtype=torch.float64), *shape, torch.float64)
    A, B = low_rank(fading, 24)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_the_scales_of_the_pairs_are_the_roots_of_the_singular_values() -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    A, _ = low_rank(W, 10)
    torch.testing.assert_close(A.norm(dim=1) ** 2, torch.linalg.svdvals(W)[:10])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_factorised_in_float32(dtype: torch.dtype) -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    A, B = low_rank(W, 24)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(B @ A, W.float())


def test_the_same_weight_gives_the_same_factors() -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(5))
    for one, two in zip(low_rank(W, 9), low_rank(W, 9), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(RankError, match="between 1 and 4"):
        low_rank(torch.randn(6, 4), rank)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_spectrum_tells_what_every_rank_leaves_out(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    left = left_out(W)
    assert left.shape == (min(shape) + 1,) and left[0] == 1
    for rank in range(1, min(shape) + 1):
        A, B = low_rank(W, rank)
        error = (W.double() - B.double() @ A.double()).square().sum() / W.double().square().sum()
        torch.testing.assert_close(left[rank], error, rtol=1e-4, atol=1e-6)


def test_a_matrix_of_zeros_loses_nothing() -> None:
    assert not left_out(torch.zeros(3, 4)).any()
