"""Laws of factors in a metric, for weights, moments, ranks and damping of every kind.

Where a tolerance holds the damping's root, factors are made by inverse roots that are longer by as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lamina.factorize.block_term import block_term
from lamina.factorize.low_rank import low_rank
from lamina.factorize.metric import Metric
from lamina.factorize.patch_regression import Problem, input_basis, regressed
from lamina.factorize.separable import filtered, separable
from lamina.factorize.tucker import hooi
from lamina.factorize.weighted import weighted_block_term, weighted_low_rank, weighted_separable, weighted_tucker

from .test_weighted import composed, draw, tail

few = settings(max_examples=40, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight and a metric of it."""

    W: Tensor
    H: Tensor | None
    G: Tensor | None
    damping: float
    of_patches: bool
    rank_in: int
    rank_out: int
    seed: int

    @property
    def metric(self) -> Metric:
        taps = self.W[0, 0].numel() if self.of_patches else None
        return Metric.of(self.H, self.G, taps=taps, damping=self.damping)

    @property
    def long(self) -> float:
        """By how much the inverse of both roots may lengthen what is rounded."""
        return 1 / self.damping

    def __repr__(self) -> str:
        known = [None if each is None else int(torch.linalg.matrix_rank(each)) for each in (self.H, self.G)]
        ranks = f"ranks {self.rank_in}, {self.rank_out}"
        return f"{tuple(self.W.shape)}, seed {self.seed}, moments of rank {known}, {self.damping:g}, {self.of_patches}, {ranks}"


def moment(n: int, rank: int, seed: int) -> Tensor:
    """A second moment of so many directions, whose sizes differ; whole ones are well conditioned."""
    x = draw(rank if rank < n else 4 * n, n, seed=seed) / torch.arange(1, n + 1, dtype=torch.float64)
    return x.T @ x / max(len(x), 1)


@st.composite
def cases(
    draw_from: st.DrawFn,
    *,
    kernels: tuple[tuple[int, ...], ...] = ((3,), (2, 2), (3, 2)),
    patches: bool | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    least: int = 1,
) -> Case:
    O, I = draw_from(st.integers(least, 7)), draw_from(st.integers(least, 7))
    kernel, seed = draw_from(st.sampled_from(kernels)), draw_from(st.integers(0, 999))
    W = draw(O, I, *kernel, seed=seed).to(draw_from(st.sampled_from(dtypes)))
    of_patches = draw_from(st.booleans()) if patches is None else patches
    width = W[0].numel() if of_patches else I
    # None: not known; 0: zeros; the width itself: whole.
    near, far = (
        draw_from(st.one_of(st.just(n), st.integers(0, n), *([] if must else [st.none()])))
        for n, must in ((width, of_patches), (O, False))
    )
    return Case(
        W,
        None if near is None else moment(width, near, seed + 1),
        None if far is None else moment(O, far, seed + 2),
        draw_from(st.sampled_from([1e-8, 1e-5, 1e-3, 0.1])),
        of_patches,
        draw_from(st.integers(1, I)),
        draw_from(st.integers(1, O)),
        seed,
    )


def root(moment: Tensor | None, n: int, damping: float) -> np.ndarray:
    """The symmetric root of a damped moment, by NumPy."""
    if moment is None:
        return np.eye(n)
    values, vectors = np.linalg.eigh(moment.numpy() + damping * float(moment.diagonal().mean()) * np.eye(n))
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


@few
@given(cases(kernels=((),), patches=False, dtypes=(torch.float32, torch.float64)))
def test_low_rank_loses_the_squared_singular_values_left_out_of_the_whitened_weight(case: Case) -> None:
    W, metric = case.W, case.metric
    white = root(case.G, len(W), case.damping) @ W.double().numpy() @ root(case.H, W.shape[1], case.damping)
    # Rounded, factors of float32 err by 6e-8 of themselves, and are longer than the weight by the inverse roots.
    rounded = (1e-13 if W.dtype == torch.float32 else 1e-30) * case.long**2
    for rank in range(1, min(W.shape) + 1):
        lost, least = metric.error(W.double() - composed(weighted_low_rank(W, rank, metric))), tail(white, rank)
        assert lost**0.5 == pytest.approx(least**0.5, rel=1e-5, abs=(rounded * metric.error(W)) ** 0.5 + 1e-12)


@few
@given(cases(kernels=((),), patches=False))
def test_undamped_as_good_as_that_is_the_moments_own_error(case: Case) -> None:
    """With whole moments the damping that is least changes nothing: tr(G ΔW H ΔWᵀ) is what the singular values say."""
    O, I = case.W.shape
    H, G = moment(I, I, case.seed), moment(O, O, case.seed + 1)
    white = root(G, O, 0.0) @ case.W.numpy() @ root(H, I, 0.0)
    rank = min(case.rank_in, case.rank_out)
    change = case.W - composed(weighted_low_rank(case.W, rank, Metric.of(H, G, damping=1e-8)))
    lost = float((G @ change @ H * change).sum())
    assert lost == pytest.approx(tail(white, rank), rel=1e-4, abs=1e-12 * float(np.square(white).sum()))


@few
@given(cases(patches=True, least=2))
def test_no_step_of_the_alternation_makes_the_error_larger(case: Case) -> None:
    problem = Problem.of(case.W.flatten(2), case.metric)
    V = torch.linalg.qr(draw(case.W.shape[1], case.rank_in, seed=case.seed)).Q
    whole = float((problem.seen * problem.R).sum())
    for rank_out in (case.rank_out, None):
        fit = regressed(problem, V, rank_out)
        for _ in range(3):
            last, fit = fit, regressed(problem, input_basis(problem, fit), rank_out)
            assert problem.lost(fit) <= problem.lost(last) * (1 + 1e-9) + 1e-16 * case.long * whole


Factors = Callable[[Case], tuple[Tensor, Tensor]]
SIDES: dict[str, Callable[[Case], tuple[int | None, int | None]]] = {
    "both": lambda case: (case.rank_in, case.rank_out),
    "output whole": lambda case: (case.rank_in, None),
    "input whole": lambda case: (None, case.rank_out),
}
WEIGHTED_AND_PLAIN: dict[str, Factors] = {
    "separable": lambda case: (
        filtered(*weighted_separable(case.W, filters(case), case.metric)),
        filtered(*separable(case.W, filters(case))),
    ),
    **{
        f"tucker, {name}": lambda case, sides=sides: (
            composed(weighted_tucker(case.W, *sides(case), case.metric)),
            composed(hooi(case.W, *sides(case))),
        )
        for name, sides in SIDES.items()
    },
    **{
        f"groups, {name}": lambda case, sides=sides: (
            composed(weighted_block_term(doubled(case).W, *twice(*sides(case)), 2, doubled(case).metric)),
            composed(block_term(doubled(case).W, *twice(*sides(case)), 2)),
        )
        for name, sides in SIDES.items()
    },
}


def filters(case: Case) -> int:
    """A rank of separable filters."""
    O, I, kh, kw = case.W.shape
    return min(case.rank_in + case.rank_out, I * kh, O * kw)


def twice(*ranks: int | None) -> tuple[int | None, ...]:
    return tuple(None if rank is None else 2 * rank for rank in ranks)


def doubled(case: Case) -> Case:
    """The same kind of case with sides that two groups divide."""
    O, I, *kernel = case.W.shape
    width = (2 * I * case.W[0, 0].numel()) if case.of_patches else 2 * I
    H, G = (
        None if each is None else moment(n, len(each) // 2, case.seed + n) for each, n in ((case.H, width), (case.G, 2 * O))
    )
    return dataclasses.replace(case, W=draw(2 * O, 2 * I, *kernel, seed=case.seed), H=H, G=G)


@pytest.mark.parametrize("fits", WEIGHTED_AND_PLAIN.values(), ids=WEIGHTED_AND_PLAIN)
def test_factors_are_never_worse_in_the_metric_than_those_of_the_weight_alone(fits: Factors) -> None:
    @settings(few, max_examples=20)
    @given(cases(kernels=((2, 2), (3, 2))))
    def law(case: Case) -> None:
        W, metric = (doubled(case).W, doubled(case).metric) if len(fits(case)[0]) != len(case.W) else (case.W, case.metric)
        weighted, plain = (metric.error(W - each) for each in fits(case))
        assert weighted <= plain * (1 + 1e-9) + 1e-22 * case.long * metric.error(W)

    law()


@few
@given(cases(kernels=((),), patches=False))
def test_low_rank_is_never_worse_in_the_metric_than_that_of_the_weight_alone(case: Case) -> None:
    metric, rank = case.metric, min(case.rank_in, case.rank_out)
    weighted, plain = (
        metric.error(case.W - composed(fit)) for fit in (weighted_low_rank(case.W, rank, metric), low_rank(case.W, rank))
    )
    assert weighted <= plain * (1 + 1e-9) + 1e-22 * case.long * metric.error(case.W)


@few
@given(cases(dtypes=(torch.float32, torch.float64)))
def test_at_full_rank_factors_are_exact(case: Case) -> None:
    W, metric = case.W, case.metric
    O, I = W.shape[:2]
    eps = 1e-6 if W.dtype == torch.float32 else 1e-14
    fits = [composed(weighted_tucker(W, *sides, metric)) for sides in ((I, O), (I, None), (None, O), (None, None))]
    for fit in fits:
        assert float((fit - W.double()).norm()) <= eps * 10 * case.long**0.5 * float(W.norm())
    if not case.of_patches:
        flat = W.flatten(2)[..., 0]
        fit = composed(weighted_low_rank(flat, min(O, I), metric))
        assert float((fit - flat.double()).norm()) <= eps * 10 * case.long * float(flat.norm())
