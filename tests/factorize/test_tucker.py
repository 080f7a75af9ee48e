"""HOSVD and HOOI against their definitions, NumPy's SVD and TensorLy."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from tensorly.decomposition import partial_tucker
from torch import Tensor

from lamina import RankError
from lamina.factorize.spectral import unfold
from lamina.factorize.tucker import Tucker2, hooi, hosvd, left_out_of_sides

KERNELS = {"Conv1d": (5,), "Conv2d": (3, 3), "uneven": (1, 4), "Conv3d": (2, 3, 2)}


def weight(O: int, I: int, kernel: tuple[int, ...] = (3, 3), seed: int = 0, decay: float = 0.0) -> Tensor:
    """A random weight; with a decay its channels' spectra fall off, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(O, I, *kernel, generator=generator, dtype=torch.float64)
    for mode, size in ((0, O), (1, I)):
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.arange(1, size + 1) ** -decay
        W = torch.tensordot(mixing, W, dims=([1], [mode])).movedim(0, mode)
    return W.float()


def composed(factors: Tucker2) -> Tensor:
    """The weight that factors make, entry by entry from the definition ``Σ_ts expand[o,t] core[t,s,…] reduce[s,i]``."""
    core = factors.core.double()
    t, s = core.shape[:2]
    expand = torch.eye(t, dtype=torch.float64) if factors.expand is None else factors.expand.double()
    reduce = torch.eye(s, dtype=torch.float64) if factors.reduce is None else factors.reduce.double()
    return torch.einsum("ot,tsk,si->oik", expand, core.flatten(2), reduce).unflatten(2, core.shape[2:])


def hosvd_naively(W: Tensor, s: int, t: int) -> Tensor:
    """The projection on the leading left singular vectors of both unfoldings, by NumPy's full SVDs."""
    M = W.double().numpy()
    U = np.linalg.svd(M.reshape(M.shape[0], -1), full_matrices=False)[0][:, :t]
    V = np.linalg.svd(np.moveaxis(M, 1, 0).reshape(M.shape[1], -1), full_matrices=False)[0][:, :s]
    return torch.from_numpy(np.einsum("ot,pt,pj...,is,js->oi...", U, U, M, V, V))


def lost(W: Tensor, factors: Tucker2) -> float:
    """Relative error, after the scale is taken off."""
    scale = max(float(W.double().abs().max()), 1e-300)
    root = scale ** (1 / sum(f is not None for f in (factors.reduce, factors.core, factors.expand)))
    parts = (None if f is None else f.double() / root for f in (factors.reduce, factors.core, factors.expand))
    return float((W.double() / scale - composed(Tucker2(*parts))).norm() / max(float((W.double() / scale).norm()), 1e-300))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_hosvd_projects_on_the_leading_singular_vectors_of_both_unfoldings(kernel: tuple[int, ...]) -> None:
    W = weight(14, 10, kernel, decay=0.5)
    torch.testing.assert_close(composed(hosvd(W, 4, 6)), hosvd_naively(W, 4, 6), atol=1e-5 * float(W.abs().max()), rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("s", "t"), [(3, 5), (8, 2), (10, 13), (1, 1)])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_hooi_is_no_worse_than_hosvd(kernel: tuple[int, ...], s: int, t: int, decay: float) -> None:
    W = weight(14, 10, kernel, decay=decay)
    assert lost(W, hooi(W, s, t)) <= lost(W, hosvd(W, s, t)) * (1 + 1e-6)


def test_hooi_is_better_than_hosvd_where_little_is_kept() -> None:
    W = weight(32, 32)
    assert lost(W, hooi(W, 6, 6)) < 0.995 * lost(W, hosvd(W, 6, 6))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("s", "t"), [(5, 5), (4, 12), (12, 4)])
def test_hooi_fits_at_least_as_well_as_tensorly(s: int, t: int, seed: int) -> None:
    W = weight(24, 20, seed=seed, decay=0.3)
    with tensorly.backend_context("numpy"):
        (core, (U, V)), _ = partial_tucker(W.double().numpy(), rank=[t, s], modes=[0, 1], n_iter_max=100, tol=1e-4)
        theirs = float(np.linalg.norm(np.einsum("ot,ts...,is->oi...", U, core, V) - W.double().numpy()) / W.double().norm())
    # Both stop at a tolerance: 1e-3 of the error is what the last sweeps could still move.
    assert lost(W, hooi(W, s, t)) <= theirs * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_never_grows_from_sweep_to_sweep(seed: int) -> None:
    W = weight(18, 16, seed=seed)
    errors = [lost(W, hooi(W, 4, 5, sweeps=sweeps, tolerance=0.0)) for sweeps in range(8)]
    assert all(later <= earlier * (1 + 1e-7) for earlier, later in pairwise(errors))


def test_hooi_stops_where_a_sweep_gains_less_than_the_tolerance() -> None:
    W = weight(18, 16)
    assert lost(W, hooi(W, 4, 5)) <= lost(W, hooi(W, 4, 5, sweeps=500, tolerance=1e-12)) * (1 + 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=40, deadline=None)
@given(
    O=st.integers(1, 12),
    I=st.integers(1, 12),
    kernel=st.sampled_from(list(KERNELS.values())),
    sides=st.tuples(st.booleans(), st.booleans()),
)
def test_full_rank_gives_the_weight_back(
    dtype: torch.dtype, O: int, I: int, kernel: tuple[int, ...], sides: tuple[bool, bool]
) -> None:
    W = torch.randn(O, I, *kernel, generator=torch.Generator().manual_seed(O * 100 + I), dtype=torch.float64).to(dtype)
    factors = hooi(W, I if sides[0] else None, O if sides[1] else None)
    assert lost(W, factors) <= (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("condition", [1.0, 1e-6, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_rank_gives_an_ill_conditioned_weight_back(dtype: torch.dtype, condition: float) -> None:
    W = (weight(8, 8).double() * torch.logspace(0, float(np.log10(condition)), 8, dtype=torch.float64).view(-1, 1, 1, 1)).to(
        dtype
    )
    assert lost(W, hooi(W, 8, 8)) <= (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("condition", [1.0, 1e-7, 1e-12])
def test_with_one_side_whole_the_error_is_that_of_the_unfoldings_svd(
    condition: float, rank: int, side: str, dtype: torch.dtype
) -> None:
    W = weight(10, 12).double()
    mode = 0 if side == "out" else 1
    fall = torch.logspace(0, float(np.log10(condition)), W.shape[mode], dtype=torch.float64)
    # Turned, so that the small singular values do not lie on channels of their own.
    turn = torch.linalg.qr(weight(W.shape[mode], W.shape[mode], (1,)).squeeze(-1).double())[0] * fall
    W = torch.tensordot(turn, torch.linalg.qr(W.movedim(mode, 0).flatten(1).T)[0].T, dims=1)
    W = W.unflatten(1, (-1, 3, 3)).movedim(0, mode).to(dtype)
    factors = hooi(W, rank, None) if side == "in" else hooi(W, None, rank)
    unfolded = np.moveaxis(W.double().numpy(), mode, 0).reshape(W.shape[mode], -1)
    values = np.linalg.svd(unfolded, compute_uv=False)
    least = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
    assert abs(lost(W, factors) - least) <= 1e-6 * least + 16 * torch.finfo(dtype).eps


def test_a_whole_side_has_no_factor() -> None:
    W = weight(10, 12)
    assert hooi(W, 4, None).expand is None
    assert hooi(W, None, 4).reduce is None
    whole = hooi(W, None, None)
    assert whole.reduce is None
    assert whole.expand is None
    torch.testing.assert_close(whole.core, W)


def test_the_factors_have_the_shapes_of_their_convolutions() -> None:
    factors = hooi(weight(10, 12, (3, 2)), 4, 5)
    assert factors.reduce is not None
    assert factors.expand is not None
    assert (factors.reduce.shape, factors.core.shape, factors.expand.shape) == ((4, 12), (5, 4, 3, 2), (10, 5))


@pytest.mark.parametrize(("s", "t"), [(4, 5), (None, 5), (4, None)])
def test_the_factors_norms_are_equal(s: int | None, t: int | None) -> None:
    factors = hooi(weight(10, 12, decay=1.0), s, t)
    norms = [f.norm() for f in (factors.reduce, factors.core, factors.expand) if f is not None]
    for norm in norms:
        torch.testing.assert_close(norm, norms[0])


def test_with_one_side_whole_each_channel_weighs_the_same_in_both_factors() -> None:
    W = weight(10, 12, decay=1.0)
    out, into = hooi(W, None, 5), hooi(W, 5, None)
    assert out.expand is not None and into.reduce is not None
    torch.testing.assert_close(unfold(out.core, 0).norm(dim=1), out.expand.norm(dim=0))
    torch.testing.assert_close(unfold(into.core, 1).norm(dim=1), into.reduce.norm(dim=1))


def with_channels_apart(O: int, I: int, kernel: tuple[int, ...], smallest: float) -> Tensor:
    """A weight whose output channels are orthogonal, so that each is a basis vector, and fall in size."""
    rows = torch.linalg.qr(torch.randn(I * torch.Size(kernel).numel(), O, dtype=torch.float64)).Q.T
    return (rows * torch.logspace(0, float(np.log10(smallest)), O, dtype=torch.float64)[:, None]).reshape(O, I, *kernel).float()


@pytest.mark.parametrize(("s", "t", "side"), [(8, 8, 0), (8, 8, 1), (None, 8, 0), (8, None, 1)])
def test_half_precision_holds_small_channels_as_well_as_large_ones(s: int | None, t: int | None, side: int) -> None:
    # A millionth of the largest: rounded at its own size it would have lost most of its digits.
    W = with_channels_apart(8, 8, (3, 3), 1e-6).transpose(0, side)
    factors = hooi(W, s, t)
    halves = (None if f is None else f.half() for f in (factors.reduce, factors.core, factors.expand))
    rest = composed(Tucker2(*halves)) - W.double()
    worst = (unfold(rest, side).norm(dim=1) / unfold(W.double(), side).norm(dim=1)).max()
    assert float(worst) <= 4 * torch.finfo(torch.half).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_factorised_in_float32(dtype: torch.dtype) -> None:
    W = weight(8, 6).to(dtype)
    factors = hooi(W, 6, 8)
    assert factors.core.dtype == torch.float32
    assert lost(W, factors) <= 1e-6


DEGENERATE = {
    "zero": lambda: torch.zeros(8, 6, 3, 3),
    "rank one": lambda: torch.einsum("o,i,hw->oihw", torch.randn(8), torch.randn(6), torch.randn(3, 3)),
    "dead input channels": lambda: weight(8, 6).index_fill(1, torch.tensor([0, 3]), 0.0),
    "dead output channels": lambda: weight(8, 6).index_fill(0, torch.tensor([0, 3]), 0.0),
    "one tap": lambda: weight(8, 6, (1, 1)),
}


@pytest.mark.parametrize("make", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_weights_have_finite_factors_that_are_exact_at_full_rank(make: object) -> None:
    torch.manual_seed(0)
    W = make()  # type: ignore[operator]
    for s, t in ((6, 8), (3, 3), (None, 2), (2, None)):
        factors = hooi(W, s, t)
        assert all(bool(torch.isfinite(f).all()) for f in (factors.reduce, factors.core, factors.expand) if f is not None)
    assert float((composed(hooi(W, 6, 8)) - W.double()).norm()) <= 1e-6 * float(W.norm())


def test_the_layout_of_a_weight_does_not_matter() -> None:
    W = weight(8, 6)
    torch.testing.assert_close(
        composed(hooi(W.contiguous(memory_format=torch.channels_last), 4, 5)), composed(hooi(W, 4, 5)), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("s", "t", "says"), [(0, 4, "rank in 0"), (7, 4, "between 1 and 6"), (4, 9, "between 1 and 8"), (4, 0, "rank out 0")]
)
def test_a_rank_out_of_range_is_refused(s: int, t: int, says: str) -> None:
    with pytest.raises(RankError, match=says):
        hooi(weight(8, 6), s, t)


# ---- the prices of all ranks at once ----


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 9, 2), (1, 3, 3, 3), (5, 1, 3), (3, 2, 1, 2, 2)], ids=str)
def test_one_core_tells_what_hosvd_leaves_out_at_every_pair_of_ranks(shape: tuple[int, ...]) -> None:
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = left_out_of_sides(W)
    O, I = shape[:2]
    assert left.shape == (O + 1, I + 1)
    for t in range(1, O + 1):
        for s in range(1, I + 1):
            for rank_in, rank_out in ((s, t), *(((None, t),) if s == I else ()), *(((s, None),) if t == O else ())):
                error = (W - composed(hosvd(W, rank_in, rank_out))).square().sum() / W.square().sum()
                torch.testing.assert_close(left[rank_out or -1, rank_in or -1], error, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("s", "t"), [(2, 3), (3, 1), (4, 4)])
def test_hooi_leaves_out_no_more_than_its_price(s: int, t: int) -> None:
    W = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    error = (W - composed(hooi(W, s, t))).square().sum() / W.square().sum()
    assert error <= left_out_of_sides(W)[t, s] + 1e-6


def test_a_weight_of_zeros_loses_nothing() -> None:
    assert not left_out_of_sides(torch.zeros(3, 4, 3, 3)).any()
