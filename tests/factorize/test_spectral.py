"""Leading singular vectors and the scale that is taken off before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.factorize import spectral
from lamina.factorize.spectral import at_least_float32, gram, left_singular, normalised, unfold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (7, 7), (1, 5), (5, 1)], ids=str)
def test_the_vectors_are_orthonormal_and_the_values_numpys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for rank in range(1, shape[0] + 1):
        squares, U = left_singular(M, rank)
        torch.testing.assert_close(U.T @ U, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0)
        expected = np.zeros(shape[0])
        expected[: min(shape)] = np.linalg.svd(M.double().numpy(), compute_uv=False) ** 2
        np.testing.assert_allclose(squares.numpy(), expected[:rank], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(U.mul(squares) @ U.T, U @ U.T @ (M.double() @ M.double().T) @ U @ U.T, atol=1e-9, rtol=0)


@pytest.mark.parametrize("part", [1, 20, 21, 1000])
def test_a_gram_matrix_is_the_same_in_parts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    M = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(spectral, "_PART", part)
    torch.testing.assert_close(gram(M), M.double() @ M.double().T, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("mode", [0, 1])
def test_an_unfolding_has_one_row_a_channel(mode: int) -> None:
    W = torch.arange(24.0).reshape(2, 3, 2, 2)
    for channel in range(W.shape[mode]):
        assert torch.equal(unfold(W, mode)[channel], W.select(mode, channel).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_weight_is_its_normalised_self_times_its_scale_to_the_last_bit(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    for size in (limits.tiny, 1e-30, 1e-3, 1.0, 1e6, 1e30, limits.max / 8):
        W = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=dtype) * size
        V, scale = normalised(W)
        assert torch.equal(V * scale, W)
        assert 2.0**-61 < float(V.abs().max()) < 2.0**60


def test_a_weight_of_ordinary_size_is_not_copied() -> None:
    W = torch.randn(5, 4)
    assert normalised(W)[0] is W


def test_zeros_have_no_scale() -> None:
    assert normalised(torch.zeros(3, 2))[1] == 1


def test_no_weight_is_worked_on_below_float32() -> None:
    dtypes = [
        at_least_float32(torch.zeros(2, dtype=d)).dtype for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ]
    assert dtypes == [torch.float32, torch.float32, torch.float32, torch.float64]
