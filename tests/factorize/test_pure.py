"""Laws of every factorisation: nothing around the call shows in the factors, and the scale of the weight does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from lamina.factorize.block_term import BlockTerms, block_term, for_merging, refit
from lamina.factorize.block_term_sweep import block_term_sweep
from lamina.factorize.low_rank import low_rank
from lamina.factorize.metric import Metric
from lamina.factorize.separable import separable
from lamina.factorize.series import Series, faithful_series, nested_series
from lamina.factorize.tucker import Tucker2, hooi, hosvd
from lamina.factorize.weighted import weighted_block_term, weighted_low_rank, weighted_tucker


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """A random weight whose largest entry is 1.9 and lies just below a power of two."""
    W = torch.rand(8, 6, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    return (W / W.abs().max() * 1.9).to(dtype)


def moment(n: int) -> Tensor:
    """A second moment of too few samples, made of nothing that surrounds it."""
    x = torch.rand(3, n, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu")
    return x.T @ x


Factors = tuple[Tensor, Tensor] | Tucker2 | BlockTerms | Series

FACTORISATIONS: dict[str, Callable[[Tensor], Factors]] = {
    "low rank, wide": lambda W: low_rank(W.flatten(1), 5),
    "low rank, high": lambda W: low_rank(W.flatten(1).T, 5),
    "separable": lambda W: separable(W, 5),
    "hosvd": lambda W: hosvd(W, 4, 6),
    "hooi": lambda W: hooi(W, 4, 6),
    "hooi, output whole": lambda W: hooi(W, 4, None),
    "hooi, both whole": lambda W: hooi(W, None, None),
    "block term": lambda W: block_term(W, 4, 4, 2),
    "block term, input whole": lambda W: block_term(W, None, 4, 2),
    "block term, output whole": lambda W: block_term(W, 4, None, 2),
    "block term, both whole": lambda W: block_term(W, None, None, 2),
    "block term, full ranks": lambda W: block_term(W, 6, 8, 2),
    "sweep of the paper": lambda W: block_term_sweep(W, 4, 4, 2, sweeps=3),
    "refit": lambda W: refit(W, block_term(W, 4, 4, 2, sweeps=1), sweeps=3),
    "anchored refit": lambda W: refit(W, block_term(W, 4, 4, 2, sweeps=1), anchor=0.1, sweeps=3),
    "in order for merging": lambda W: for_merging(W, block_term(W, 6, 6, 6, sweeps=3), (3,)),
    "faithful series": lambda W: faithful_series(W, 4, 4, (4, 2, 1)),
    "nested series": lambda W: nested_series(W, 4, 4, (4, 2, 1)),
    "low rank in a metric": lambda W: weighted_low_rank(W.flatten(1)[:, :6], 5, Metric.of(moment(6), moment(8))),
    "tucker in a metric": lambda W: weighted_tucker(W, 4, 6, Metric.of(moment(6), moment(8))),
    "block term in a metric": lambda W: weighted_block_term(W, 4, 4, 2, Metric.of(moment(6), moment(8))),
    "block term in a metric, input whole": lambda W: weighted_block_term(W, None, 4, 2, Metric.of(moment(6), moment(8))),
    "nested series, both whole": lambda W: nested_series(W[:6], None, None, (6, 2)),
}


def times(x: Tensor, exponent: int) -> Tensor:
    """``x · 2 ** exponent``, rounded once at most; in two steps, since the power alone may be out of range."""
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def tensors(factors: Factors) -> list[Tensor]:
    """All factors that are there."""
    if isinstance(factors, Series):
        return [*factors.reduce, *factors.core, *factors.expand]
    if isinstance(factors, tuple):
        return list(factors)
    return [factor for factor in (factors.reduce, factors.core, factors.expand) if factor is not None]


def as_terms(factors: Factors) -> BlockTerms:
    """Any factors as block terms, so that all can be composed alike."""
    if isinstance(factors, tuple):
        return BlockTerms(*factors, None, 1)
    if isinstance(factors, Tucker2):
        return BlockTerms(factors.reduce, factors.core, factors.expand, 1)
    return factors.truncated(len(factors.groups)) if isinstance(factors, Series) else factors


def composed(fit: BlockTerms, exponent: int = 0) -> Tensor:
    """The weight that factors make, over ``2 ** exponent``, in float64; each factor is brought to size before."""
    share, rest = divmod(exponent, len(tensors(fit)))
    core = times(fit.core.double(), -share - rest)
    reduce, expand = (None if side is None else times(side.double(), -share) for side in (fit.reduce, fit.expand))
    return BlockTerms(reduce, core, expand, fit.groups).composed()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def another_seed() -> Iterator[None]:
    torch.manual_seed(123)
    yield


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another default device": lambda: torch.device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "another seed": another_seed,
}


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("factorise", FACTORISATIONS.values(), ids=FACTORISATIONS)
def test_nothing_around_the_call_shows_in_the_factors(
    factorise: Callable[[Tensor], Factors], around: Callable[[], AbstractContextManager[object]]
) -> None:
    W = weight()
    alone = tensors(factorise(W))
    with around():
        surrounded = tensors(factorise(W))
    for ours, theirs in zip(surrounded, alone, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("factorise", FACTORISATIONS.values(), ids=FACTORISATIONS)
def test_the_global_generator_is_neither_drawn_from_nor_seeded(factorise: Callable[[Tensor], Factors]) -> None:
    before = torch.get_rng_state()
    factorise(weight())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("factorise", FACTORISATIONS.values(), ids=FACTORISATIONS)
def test_factors_are_handed_out_in_tuples_that_cannot_be_changed(factorise: Callable[[Tensor], Factors]) -> None:
    factors = factorise(weight())
    with pytest.raises((FrozenInstanceError, AttributeError)):
        factors.core = None  # type: ignore[union-attr,misc,assignment]
    assert not hasattr(factors, "__dict__")


@pytest.mark.parametrize("factorise", FACTORISATIONS.values(), ids=FACTORISATIONS)
def test_factors_made_in_inference_mode_can_be_trained(factorise: Callable[[Tensor], Factors]) -> None:
    with torch.inference_mode():
        factors = tensors(factorise(weight().clone()))
    assert not any(factor.is_inference() for factor in factors)


@pytest.mark.parametrize("factorise", FACTORISATIONS.values(), ids=FACTORISATIONS)
@pytest.mark.parametrize("zero", [False, True], ids=["random", "zero"])
@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)], ids=["taps", "one tap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_weight_is_neither_changed_nor_shared_nor_tracked(
    dtype: torch.dtype, kernel: tuple[int, int], zero: bool, factorise: Callable[[Tensor], Factors]
) -> None:
    W = (weight(dtype) * (not zero))[:, :, : kernel[0], : kernel[1]].contiguous().requires_grad_()
    before = W.detach().clone()
    factors = tensors(factorise(W))
    assert torch.equal(W, before)
    assert not any(factor.requires_grad for factor in factors)
    assert W.untyped_storage().data_ptr() not in {factor.untyped_storage().data_ptr() for factor in factors}


# From denormal numbers to the largest ones: 1.9 · 2^e.
EXPONENTS = [
    *((e, torch.float64) for e in (-1063, -1000, -660, 660, 1000, 1023)),
    *((e, torch.float32) for e in (-140, -120, -70, 70, 120, 127)),
]


@pytest.mark.parametrize(("exponent", "dtype"), EXPONENTS, ids=lambda value: str(value))
@pytest.mark.parametrize("factorise", FACTORISATIONS.values(), ids=FACTORISATIONS)
def test_a_weight_scaled_to_any_size_has_the_scaled_factors(
    factorise: Callable[[Tensor], Factors], exponent: int, dtype: torch.dtype
) -> None:
    # A denormal weight has few digits: the ones that are left are compared.
    scaled = times(weight(torch.float64), exponent).to(dtype)
    back = times(scaled.double(), -exponent).to(dtype)
    fit = as_terms(factorise(scaled))
    assert all(bool(torch.isfinite(factor).all()) for factor in tensors(fit))
    expected, limits = composed(as_terms(factorise(back))), torch.finfo(dtype)
    # Of one factor alone the entries are as small as the weight's, and rounded as those are.
    smallest = times(torch.tensor(limits.tiny, dtype=torch.float64), -exponent) * limits.eps
    rounding = float(smallest) if len(tensors(fit)) == 1 else 0.0
    torch.testing.assert_close(
        composed(fit, exponent), expected, rtol=0, atol=64 * limits.eps * float(expected.abs().max()) + rounding
    )
