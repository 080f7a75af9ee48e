"""Factors in a metric against the plain ones, against closed forms by NumPy, and against their prices; see `test_laws` too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina import RankError
from lamina.errors import LaminaError
from lamina.factorize import patch_regression
from lamina.factorize.block_term import BlockTerms, block_term
from lamina.factorize.low_rank import low_rank
from lamina.factorize.metric import Along, Metric
from lamina.factorize.patch_regression import Fit, Problem
from lamina.factorize.separable import filtered, separable
from lamina.factorize.tucker import Tucker2, hooi
from lamina.factorize.weighted import (
    leading_directions,
    price_of_ranks,
    price_of_separable,
    price_of_sides,
    weighted_block_term,
    weighted_low_rank,
    weighted_separable,
    weighted_tucker,
)

O, I, KERNEL, K = 10, 8, (3, 2), 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, samples: int = 400, seed: int = 0, decay: float = 1.0) -> Tensor:
    """A second moment whose directions are mixed and differ in size; singular where there are fewer samples than n."""
    x = draw(samples, n, seed=seed) * torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    x = x @ torch.linalg.qr(draw(n, n, seed=seed + 100)).Q
    return x.T @ x / samples


def dead(moment: Tensor, *channels: int) -> Tensor:
    alive = torch.ones(len(moment), dtype=torch.float64)
    alive[list(channels)] = 0
    return moment * alive * alive[:, None]


def patches(I: int = I, seed: int = 0) -> Tensor:
    """The moment of patches cut out of smooth maps: neighbouring taps hold nearly the same, channels are mixed."""
    maps = draw(60, I, 12, 12, seed=seed) * torch.arange(1, I + 1, dtype=torch.float64).view(-1, 1, 1) ** -0.7
    maps = torch.nn.functional.avg_pool2d(maps, 3, 1)
    maps = torch.einsum("ij,njhw->nihw", draw(I, I, seed=seed + 1), maps).clamp_min(0)
    x = torch.nn.functional.unfold(maps, KERNEL).movedim(1, -1).flatten(0, 1)
    return x.T @ x / len(x)


def metric_of_patches(gradients: bool = True, seed: int = 0) -> Metric:
    return Metric.of(patches(seed=seed), moment(O, seed=2 + seed) if gradients else None, taps=K)


def composed(fit: tuple[Tensor, Tensor] | Tucker2 | BlockTerms) -> Tensor:
    if isinstance(fit, tuple):
        return fit[1].double() @ fit[0].double()
    if isinstance(fit, Tucker2):
        fit = BlockTerms(fit.reduce, fit.core, fit.expand, 1)
    sides = (None if side is None else side.double() for side in (fit.reduce, fit.core, fit.expand))
    return BlockTerms(*sides, fit.groups).composed()  # type: ignore[arg-type]


def parts(fit: tuple[Tensor, Tensor] | Tucker2 | BlockTerms) -> list[Tensor]:
    sides = fit if isinstance(fit, tuple) else (fit.reduce, fit.core, fit.expand)
    return [side for side in sides if side is not None]


def cost(W: Tensor, fit: tuple[Tensor, Tensor] | Tucker2 | BlockTerms, metric: Metric) -> float:
    return metric.error(W.double() - composed(fit))


def root(moment: Tensor) -> np.ndarray:
    """The symmetric root of a moment damped as the metric's are, by NumPy."""
    values, vectors = np.linalg.eigh(moment.numpy() + 1e-3 * float(moment.diagonal().mean()) * np.eye(len(moment)))
    return (vectors * np.sqrt(values)) @ vectors.T


def tail(M: np.ndarray, rank: int) -> float:
    """The sum of the squared singular values beyond a rank."""
    return float(np.square(np.linalg.svd(M, compute_uv=False)[rank:]).sum())


# Whatever is the same for all of them: a whole moment, a dead channel, too few samples, and none.
MOMENTS = {
    "full": lambda n, seed: moment(n, seed=seed),
    "dead channels": lambda n, seed: dead(moment(n, seed=seed), 0, 3),
    "few samples": lambda n, seed: moment(n, 3, seed=seed),
    "one sample": lambda n, seed: moment(n, 1, seed=seed),
    "zeros": lambda n, seed: torch.zeros(n, n, dtype=torch.float64),
}
SIDES = {"both": (4, 5), "output whole": (4, None), "input whole": (None, 5)}
METRICS = {
    "nothing": lambda: Metric.of(),
    "inputs": lambda: Metric.of(moment(I, seed=1)),
    "gradients": lambda: Metric.of(None, moment(O, seed=2)),
    "both": lambda: Metric.of(moment(I, seed=1), moment(O, seed=2)),
    "few samples": lambda: Metric.of(moment(I, 3, seed=1), moment(O, 3, seed=2)),
    "patches": lambda: metric_of_patches(gradients=False),
    "patches and gradients": metric_of_patches,
    "few patches": lambda: Metric.of(moment(I * K, 5, seed=1), moment(O, 3, seed=2), taps=K),
}
OF_CHANNELS = {name: make for name, make in METRICS.items() if "patches" not in name}
OF_PATCHES = {name: make for name, make in METRICS.items() if "patches" in name}


# ---- low rank ----


@pytest.mark.parametrize("shape", [(10, 8), (8, 10)], ids=str)
@pytest.mark.parametrize("make", MOMENTS.values(), ids=MOMENTS)
def test_one_spectrum_prices_every_rank(make: object, shape: tuple[int, int]) -> None:
    W = draw(*shape)
    metric = Metric.of(make(shape[1], 1), make(shape[0], 2))  # type: ignore[operator]
    prices = price_of_ranks(W, metric)
    assert prices.shape == (min(shape) + 1,)
    assert float(prices[0]) == pytest.approx(metric.error(W), rel=1e-12)
    for rank in range(1, min(shape) + 1):
        expected = cost(W, weighted_low_rank(W, rank, metric), metric)
        assert float(prices[rank]) == pytest.approx(expected, rel=1e-6, abs=1e-13 * metric.error(W))


@pytest.mark.parametrize("make", [lambda n: None, lambda n: 3 * torch.eye(n)], ids=["none", "identities"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_moments_of_identities_give_the_plain_low_rank_factors(rank: int, make: object) -> None:
    W = draw(10, 8).float()
    metric = Metric.of(make(8), make(10))  # type: ignore[operator]
    torch.testing.assert_close(composed(weighted_low_rank(W, rank, metric)), composed(low_rank(W, rank)), rtol=0, atol=1e-5)


def test_the_first_pairs_are_the_best_factors_of_a_smaller_rank() -> None:
    W, metric = draw(10, 8), Metric.of(moment(8, seed=1), moment(10, seed=2))
    A, B = weighted_low_rank(W, 7, metric)
    for rank in range(1, 7):
        smaller = composed(weighted_low_rank(W, rank, metric))
        torch.testing.assert_close(composed((A[:rank], B[:, :rank])), smaller, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(10, 8), (8, 10)], ids=str)
def test_each_pair_of_weighted_factors_shares_its_scale_evenly(shape: tuple[int, int]) -> None:
    A, B = weighted_low_rank(draw(*shape), 6, Metric.of(moment(shape[1], seed=1), moment(shape[0], seed=2)))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


# ---- Tucker-2 ----


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("make", [lambda n: None, lambda n: 3 * torch.eye(n)], ids=["none", "identities"])
def test_moments_of_identities_give_the_plain_tucker_factors(make: object, sides: tuple[int | None, int | None]) -> None:
    W = draw(O, I, *KERNEL).float()
    fit = weighted_tucker(W, *sides, Metric.of(make(I), make(O)))  # type: ignore[operator]
    torch.testing.assert_close(composed(fit), composed(hooi(W, *sides)), rtol=0, atol=1e-5)


def on_plain_bases(W: Tensor, sides: tuple[int | None, int | None], metric: Metric) -> Tensor:
    """The fit on the bases of `hooi` whose core is the best in the metric, by the normal equations of all its entries."""
    plain = hooi(W, *sides)
    U = torch.eye(O, dtype=torch.float64) if plain.expand is None else plain.expand.double()
    V = torch.eye(I, dtype=torch.float64) if plain.reduce is None else plain.reduce.double()
    # Every column is what one entry of the core makes, whitened; the core solves for the weight, whitened.
    columns = torch.einsum("ot,si,kl->tsloik", U, V, torch.eye(K, dtype=torch.float64)).flatten(3).flatten(0, 2)
    H = metric.patches
    if H is None:
        H = torch.eye(I * K, dtype=torch.float64)
        if metric.inputs is not None:
            H = torch.kron(metric.inputs.moment, torch.eye(K, dtype=torch.float64))
    G = torch.eye(O, dtype=torch.float64) if metric.gradients is None else metric.gradients.moment
    seen = torch.einsum("op,npj,ji->noi", G, columns.view(-1, O, I * K), H).flatten(1)
    core = torch.linalg.solve(seen @ columns.T, seen @ W.flatten())
    return (core @ columns).view(W.shape)


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_tucker_is_never_worse_in_the_metric_than_the_best_core_on_the_plain_bases(
    make: object, sides: tuple[int | None, int | None]
) -> None:
    W, metric = draw(O, I, *KERNEL), make()  # type: ignore[operator]
    plain = metric.error(W - on_plain_bases(W, sides, metric))
    assert plain <= cost(W, hooi(W, *sides), metric) * (1 + 1e-9)
    assert cost(W, weighted_tucker(W, *sides, metric), metric) <= plain * (1 + 1e-6)


def test_where_the_plain_bases_are_better_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    W, metric = draw(O, I, *KERNEL), Metric.of(moment(I, seed=1), moment(O, seed=2))
    white = metric.whiten(W / float(W.norm())).float()

    def poor(M: Tensor, s: int, t: int) -> Tucker2:
        """HOOI, but for the whitened weight bases of something else."""
        return hooi(draw(*M.shape, seed=9) if torch.equal(M, white) else M, s, t)

    monkeypatch.setattr("lamina.factorize.weighted.hooi", poor)
    expected = metric.error(W - on_plain_bases(W, (4, 5), metric))
    assert cost(W, weighted_tucker(W, 4, 5, metric), metric) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("make", list(MOMENTS.values())[:4], ids=list(MOMENTS)[:4])
def test_with_a_side_whole_tucker_loses_what_is_left_out_of_the_whitened_unfolding(make: object, side: str, rank: int) -> None:
    W = draw(O, I, *KERNEL)
    H, G = make(I, 1), make(O, 2)  # type: ignore[operator]
    metric = Metric.of(H, G)
    white = np.einsum("po,oik,ij->pjk", root(G), W.flatten(2).numpy(), root(H))
    unfolded = white.reshape(O, -1) if side == "out" else np.moveaxis(white, 1, 0).reshape(I, -1)
    fit = weighted_tucker(W, None, rank, metric) if side == "out" else weighted_tucker(W, rank, None, metric)
    assert cost(W, fit, metric) == pytest.approx(tail(unfolded, rank), rel=1e-6)


@pytest.mark.parametrize("make", OF_CHANNELS.values(), ids=OF_CHANNELS)
def test_one_core_prices_every_pair_of_ranks(make: object) -> None:
    W, metric = draw(O, I, *KERNEL), make()  # type: ignore[operator]
    prices = price_of_sides(W, metric)
    assert prices.shape == (O + 1, I + 1)
    whole = metric.error(W)
    assert float(prices[0, 0]) == pytest.approx(whole, rel=1e-12)
    for s, t in ((1, 1), (4, 5), (7, 2), (2, 9)):
        assert cost(W, weighted_tucker(W, s, t, metric), metric) <= float(prices[t, s]) * (1 + 1e-6)
    for rank in (1, 3, 7):
        for fit, price in (
            (weighted_tucker(W, rank, None, metric), prices[-1, rank]),
            (weighted_tucker(W, None, rank, metric), prices[rank, -1]),
        ):
            assert cost(W, fit, metric) == pytest.approx(float(price), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("gradients", [False, True], ids=["patches", "patches and gradients"])
def test_on_patches_with_the_input_whole_tucker_loses_what_is_left_out_of_the_whitened_matrix(
    gradients: bool, rank: int
) -> None:
    W, metric = draw(O, I, *KERNEL), metric_of_patches(gradients)
    white = W.flatten(1).numpy() @ root(patches())
    if gradients:
        white = root(moment(O, seed=2)) @ white
    assert cost(W, weighted_tucker(W, None, rank, metric), metric) == pytest.approx(tail(white, rank), rel=1e-6)


@pytest.mark.parametrize("rank_out", [3, None], ids=["both", "output whole"])
@pytest.mark.parametrize("make", OF_PATCHES.values(), ids=OF_PATCHES)
def test_on_patches_no_core_and_output_basis_are_better_for_the_input_basis(make: object, rank_out: int | None) -> None:
    W, metric = draw(O, I, *KERNEL), make()  # type: ignore[operator]
    fit = weighted_tucker(W, 4, rank_out, metric)
    assert fit.reduce is not None
    assert metric.patches is not None
    # All that a core can make of the input basis lies in the rows of this; projected on by NumPy in the whitened space.
    values, vectors = np.linalg.eigh(metric.patches.numpy())
    half = (vectors * np.sqrt(values)) @ vectors.T
    rows = np.kron(fit.reduce.numpy(), np.eye(K)) @ half
    white = W.flatten(1).numpy() @ half
    if metric.gradients is not None:
        white = metric.gradients.root.numpy() @ white
    Q = np.linalg.qr(rows.T)[0]
    beyond = np.square(white - white @ Q @ Q.T).sum()
    least = metric.scale * (float(beyond) + (0.0 if rank_out is None else tail(white @ Q, rank_out)))
    assert cost(W, fit, metric) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("sides", [(4, 5), (4, None), (2, 7)], ids=str)
def test_on_patches_the_fit_is_better_than_that_by_their_channels(sides: tuple[int, int | None]) -> None:
    W, metric = draw(O, I, *KERNEL), metric_of_patches()
    by_channels = cost(W, weighted_tucker(W, *sides, metric.of_channels()), metric)
    assert cost(W, weighted_tucker(W, *sides, metric), metric) < 0.98 * by_channels


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_where_taps_do_not_know_each_other_patches_say_what_channels_say(sides: tuple[int | None, int | None]) -> None:
    W, H, G = draw(O, I, *KERNEL), moment(I, seed=1), moment(O, seed=2)
    channels = Metric.of(H, G)
    fit = weighted_tucker(W, *sides, Metric.of(torch.kron(H, torch.eye(K, dtype=torch.float64)), G, taps=K))
    assert cost(W, fit, channels) == pytest.approx(cost(W, weighted_tucker(W, *sides, channels), channels), rel=2e-3)


@pytest.mark.parametrize("rank_out", [3, None], ids=["both", "output whole"])
def test_the_input_basis_solves_its_normal_equations_written_out(rank_out: int | None) -> None:
    W, metric = draw(O, I, K), metric_of_patches()
    problem = Problem.of(W, metric)
    start = patch_regression.regressed(problem, torch.linalg.qr(draw(I, 4)).Q, rank_out)
    Q = patch_regression.input_basis(problem, start, steps=200)
    # Column (s, i) is what a 1 at that place of the input basis makes of the core, whitened.
    made = start.C if start.U is None else torch.einsum("ot,tks->oks", start.U, start.C)
    columns = torch.einsum("oks,ij->sjoki", made, torch.eye(I, dtype=torch.float64)).reshape(4 * I, O, K * I)
    seen = columns @ problem.H
    matrix = torch.einsum("noj,moj->nm", seen, columns)
    right = torch.einsum("noj,oj->n", seen, problem.R.flatten(1))
    X = torch.linalg.solve(matrix, right).view(4, I)
    exact = torch.linalg.qr(X.T).Q
    torch.testing.assert_close(Q @ Q.T, exact @ exact.T, rtol=0, atol=1e-6)


def test_the_regressions_error_is_that_of_the_metric() -> None:
    W, metric = draw(O, I, K), metric_of_patches()
    problem = Problem.of(W, metric)
    assert metric.gradients is not None
    U, C, V = torch.linalg.qr(draw(O, 5, seed=3)).Q, draw(5, K, 4, seed=4), torch.linalg.qr(draw(I, 4, seed=5)).Q
    made = torch.einsum("po,ot,tks,is->pik", metric.gradients.inverse, U, C, V)
    assert metric.scale * problem.lost(Fit(U, C, V)) == pytest.approx(metric.error(W - made), rel=1e-9)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_weighted_tucker_factors_have_their_shapes_and_equal_norms(sides: tuple[int | None, int | None], make: object) -> None:
    W = draw(O, I, *KERNEL).half()
    fit = weighted_tucker(W, *sides, make())  # type: ignore[operator]
    s, t = sides
    assert fit.core.shape == (t or O, s or I, *KERNEL)
    assert (None if fit.reduce is None else fit.reduce.shape) == (s and (s, I))
    assert (None if fit.expand is None else fit.expand.shape) == (t and (O, t))
    for part in parts(fit):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.norm(), fit.core.norm())


def metric_along(W: Tensor, p: int, gradients: bool, seed: int = 0) -> Metric:
    """What is known of patches along p directions: the moments of a layer that is fed by `patches` and answers by W."""
    H, G = patches(seed=seed), moment(O, seed=2 + seed) if gradients else None
    whole = Metric.of(H, G, taps=K)
    E = leading_directions(W, p, whole)
    at_all_taps = torch.kron(E, torch.eye(K, dtype=torch.float64))
    S = at_all_taps @ H @ at_all_taps.T
    cross = W.flatten(1) @ H @ at_all_taps.T / S.diagonal().mean()
    return dataclasses.replace(whole, patches=None, along=Along(E, cross, Metric.of(S, G, taps=K)))


def told_along(rows: Tensor, metric: Metric) -> Tensor:
    """What directions tell of products with the input, by least squares of NumPy."""
    assert metric.along is not None and metric.inputs is not None
    half = metric.inputs.root.numpy()
    return torch.from_numpy(np.linalg.lstsq((metric.along.directions.numpy() @ half).T, (rows.numpy() @ half).T)[0].T)


def cost_along(fit: Tucker2, metric: Metric) -> float:
    """The error of what directions tell of factors, against the weight that answers best by them."""
    along = metric.along
    assert along is not None and fit.reduce is not None
    answered = composed(Tucker2(told_along(fit.reduce, metric), fit.core, fit.expand))
    return along.metric.error(along.weight().view(answered.shape) - answered)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sides", [(5, 4), (3, 4), (2, None)], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["inputs", "inputs and gradients"])
def test_along_directions_tucker_is_never_worse_than_that_of_the_weight_alone(
    gradients: bool, sides: tuple[int, int | None], seed: int
) -> None:
    W = draw(O, I, *KERNEL, seed=seed)
    metric = metric_along(W, 5, gradients, seed)
    ours, plain = (cost_along(fit, metric) for fit in (weighted_tucker(W, *sides, metric), hooi(W, *sides)))
    assert ours <= plain * (1 + 1e-9)


def test_along_directions_it_starts_from_the_weights_own_basis_where_that_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    W = draw(O, I, *KERNEL)
    metric, own = metric_along(W, 5, gradients=True), (W / W.norm()).float()
    along, plain = metric.along, hooi(W, 3, 4).reduce
    assert along is not None and plain is not None
    problem = Problem.of(along.weight().view(O, -1, K), along.metric)
    best = patch_regression.regressed(problem, torch.linalg.qr(told_along(plain, metric).T).Q, 4)
    expected = along.metric.scale * problem.lost(best)

    def poor(M: Tensor, s: int, t: int) -> Tucker2:
        """HOOI, but bases of something else wherever it is not of the weight itself."""
        return hooi(M if M.shape == own.shape and torch.allclose(M, own) else draw(*M.shape, seed=9), s, t)

    monkeypatch.setattr("lamina.factorize.weighted.hooi", poor)
    assert cost_along(weighted_tucker(W, 3, 4, metric, sweeps=0), metric) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("lamina.factorize.weighted.hooi", lambda M, s, t: hooi(draw(*M.shape, seed=9), s, t))
    assert cost_along(weighted_tucker(W, 3, 4, metric, sweeps=0), metric) > 1.1 * expected


# ---- block terms ----


def test_block_terms_lose_in_the_metric_what_those_of_the_whitened_weight_lose() -> None:
    W, metric = draw(12, 8, *KERNEL), Metric.of(moment(8, seed=1), moment(12, seed=2))
    fit = weighted_block_term(W, 4, 6, 2, metric)
    white = metric.whiten(W)
    expected = metric.scale * float((white - block_term(white, 4, 6, 2).composed()).square().sum())
    assert cost(W, fit, metric) == pytest.approx(expected, rel=1e-9)
    assert (fit.reduce.shape, fit.core.shape, fit.expand.shape) == ((4, 8), (6, 2, *KERNEL), (12, 6))  # type: ignore[union-attr]
    for part in parts(fit):
        torch.testing.assert_close(part.norm(), fit.core.norm())


@pytest.mark.parametrize("sides", [(4, 6), (None, 6), (4, None), (None, None)], ids=str)
def test_moments_of_identities_give_the_plain_block_terms(sides: tuple[int | None, int | None]) -> None:
    W = draw(12, 8, *KERNEL)
    fit = weighted_block_term(W, *sides, 2, Metric.of(3 * torch.eye(8), torch.eye(12) / 5))
    torch.testing.assert_close(composed(fit), composed(block_term(W, *sides, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_whole_side_whose_groups_do_not_know_each_other_has_the_best_block_terms(side: str) -> None:
    W = draw(12, 8, *KERNEL)
    width = 8 if side == "in" else 12
    blocks = moment(width, seed=1) * torch.block_diag(*[torch.ones(width // 2, width // 2)] * 2)
    other = moment(20 - width, seed=2)
    H, G = (blocks, other) if side == "in" else (other, blocks)
    metric = Metric.of(H, G)
    white = np.einsum("po,oik,ij->pjk", root(G), W.flatten(2).numpy(), root(H))
    if side == "in":
        fit = weighted_block_term(W, None, 6, 2, metric)
        least = sum(tail(white[:, at : at + 4].reshape(12, -1), 3) for at in (0, 4))
    else:
        fit = weighted_block_term(W, 4, None, 2, metric)
        least = sum(tail(np.moveaxis(white[at : at + 6], 1, 0).reshape(8, -1), 2) for at in (0, 6))
    assert cost(W, fit, metric) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("sides", [(4, 6), (8, 12), (None, 6), (4, None)], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["patches", "patches and gradients"])
def test_on_patches_block_terms_are_better_than_those_by_their_channels_and_more_steps_are_no_worse(
    gradients: bool, sides: tuple[int | None, int | None]
) -> None:
    W = draw(12, 8, *KERNEL)
    metric = Metric.of(patches(), moment(12, seed=2) if gradients else None, taps=K)
    by_channels = cost(W, weighted_block_term(W, *sides, 2, metric.of_channels()), metric)
    errors = [cost(W, weighted_block_term(W, *sides, 2, metric, steps=steps), metric) for steps in (0, 5, 40)]
    assert errors[0] <= by_channels * (1 + 1e-9)
    assert errors[2] <= errors[1] * (1 + 1e-6) and errors[1] < errors[0] and errors[2] < 0.98 * by_channels


def test_where_the_groups_can_be_exact_the_patches_find_no_other_weight() -> None:
    W, metric = block_term(draw(12, 8, *KERNEL), 8, 12, 2).composed().double(), Metric.of(patches(), moment(12, seed=2), taps=K)
    assert cost(W, weighted_block_term(W, 8, 12, 2, metric), metric) <= 1e-4 * metric.error(W)


@pytest.mark.parametrize("make", [METRICS["both"], metric_of_patches], ids=["channels", "patches"])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_in_one_group_weighted_block_terms_are_the_weighted_tucker(sides: tuple[int | None, int | None], make: object) -> None:
    W, metric = draw(O, I, *KERNEL), make()  # type: ignore[operator]
    for ours, theirs in zip(
        parts(weighted_block_term(W, *sides, 1, metric)), parts(weighted_tucker(W, *sides, metric)), strict=True
    ):
        assert torch.equal(ours, theirs)


# ---- all of them ----

FITS = {
    "low rank": lambda W, H, G: weighted_low_rank(W[..., 0, 0], 5, Metric.of(H(8, 1), G(12, 2))),
    "tucker": lambda W, H, G: weighted_tucker(W, 5, 7, Metric.of(H(8, 1), G(12, 2))),
    "tucker on patches": lambda W, H, G: weighted_tucker(W, 5, 7, Metric.of(H(8 * K, 1), G(12, 2), taps=K)),
    "output whole on patches": lambda W, H, G: weighted_tucker(W, 5, None, Metric.of(H(8 * K, 1), G(12, 2), taps=K)),
    "input whole on patches": lambda W, H, G: weighted_tucker(W, None, 7, Metric.of(H(8 * K, 1), G(12, 2), taps=K)),
    "block terms": lambda W, H, G: weighted_block_term(W, 4, 6, 2, Metric.of(H(8, 1), G(12, 2))),
    "input whole in groups": lambda W, H, G: weighted_block_term(W, None, 6, 2, Metric.of(H(8, 1), G(12, 2))),
    "block terms on patches": lambda W, H, G: weighted_block_term(W, 4, 6, 2, Metric.of(H(8 * K, 1), G(12, 2), taps=K)),
    "in groups on patches": lambda W, H, G: weighted_block_term(W, None, 6, 2, Metric.of(H(8 * K, 1), G(12, 2), taps=K)),
}
WEIGHTS = {
    "random": lambda: draw(12, 8, *KERNEL),
    "dead channels": lambda: (
        draw(12, 8, *KERNEL).index_fill(1, torch.tensor([0, 3]), 0.0).index_fill(0, torch.tensor([1]), 0.0)
    ),
    "rank one": lambda: torch.einsum("o,i,hw->oihw", draw(12), draw(8), draw(*KERNEL)),
    "zero": lambda: torch.zeros(12, 8, *KERNEL, dtype=torch.float64),
}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_degenerate_weights_and_moments_have_finite_factors_of_the_weights_size_without_denormals(
    fit: object, make: object, moments: object
) -> None:
    W = make().float()  # type: ignore[operator]
    factors = parts(fit(W, moments, moments))  # type: ignore[operator]
    tiny = torch.finfo(torch.float32).tiny
    for factor in factors:
        assert bool(torch.isfinite(factor).all())
        assert not bool(((factor != 0) & (factor.abs() < tiny)).any())
        # A root of the damping is what the inverse roots can lengthen by.
        assert float(factor.norm()) ** len(factors) <= 100 * float(W.norm()) + 1e-6


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_factors_in_float32_cost_what_those_in_float64_cost(fit: object) -> None:
    W = draw(12, 8, *KERNEL).float()
    few = MOMENTS["few samples"]
    ours, exact = (composed(fit(weight, few, few)) for weight in (W, W.double()))  # type: ignore[operator]
    assert float((ours - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_metric_of_another_weight_is_refused(fit: object) -> None:
    full = MOMENTS["full"]
    with pytest.raises(LaminaError, match="is not one of a"):
        fit(draw(12, 7, *KERNEL)[:, :6], full, full)  # type: ignore[operator]


REFUSED = {
    "low rank": lambda W: weighted_low_rank(W[..., 0, 0], 9, Metric.of()),
    "tucker, rank in": lambda W: weighted_tucker(W, 9, 4, Metric.of()),
    "tucker, rank out": lambda W: weighted_tucker(W, None, 0, Metric.of()),
    "block terms": lambda W: weighted_block_term(W, 3, 4, 2, Metric.of()),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_rank_that_does_not_fit_is_refused_in_a_metric_too(call: object) -> None:
    with pytest.raises(RankError):
        call(draw(12, 8, *KERNEL))  # type: ignore[operator]


@pytest.mark.parametrize("near", [True, False], ids=["inputs", "no inputs"])
def test_separable_filters_cost_their_price_no_more_than_those_of_the_weight_alone_and_nothing_at_full_rank(
    near: bool,
) -> None:
    W = draw(O, I, *KERNEL)
    metric = Metric.of(moment(I) if near else None, moment(O, seed=2))
    prices = price_of_separable(W, metric)
    for rank in (1, 5, 12, len(prices) - 1):
        error = metric.error(W - filtered(*weighted_separable(W, rank, metric)))
        assert error == pytest.approx(float(prices[rank]), rel=1e-6, abs=1e-9 * float(prices[0]))
        assert error <= metric.error(W - filtered(*separable(W, rank))) * (1 + 1e-9) + 1e-9 * float(prices[0])
    assert float(prices[0]) == pytest.approx(metric.error(W))
    assert float(prices[-1]) == pytest.approx(0, abs=1e-9 * float(prices[0]))
