"""The metric of two second moments against its definition, entry by entry."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.factorize.block_term import BlockTerms
from lamina.factorize.metric import Metric
from lamina.factorize.weighted import weighted_tucker

KERNELS = {"none": (), "Conv1d": (3,), "Conv2d": (2, 3)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, samples: int, seed: int = 0) -> Tensor:
    """The second moment of so many samples of unequal size in each direction: singular where they are fewer than n."""
    x = draw(samples, n, seed=seed) * torch.logspace(0, -1, n, dtype=torch.float64)
    return x.T @ x / samples


def damped(moment: Tensor, damping: float = 1e-3) -> Tensor:
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def error_by_definition(change: Tensor, inputs: Tensor | None, gradients: Tensor | None, patches: bool) -> float:
    """``tr(G ΔW H ΔWᵀ)`` with the damped moments; that of channels is the same at every tap and does not join two taps."""
    O, I, K = (change := change.flatten(2) if change.ndim > 2 else change[..., None]).shape
    G = torch.eye(O, dtype=torch.float64) if gradients is None else damped(gradients)
    if inputs is None:
        H = torch.eye(I * K, dtype=torch.float64)
    else:
        H = damped(inputs) if patches else torch.kron(damped(inputs), torch.eye(K, dtype=torch.float64))
    rows = change.flatten(1)
    return float((G @ rows @ H @ rows.T).trace())


CASES = {
    "weights alone": (False, False, False),
    "inputs": (True, False, False),
    "gradients": (False, True, False),
    "both": (True, True, False),
    "patches": (True, False, True),
    "patches and gradients": (True, True, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("samples", [3, 200], ids=["few samples", "many samples"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_error_is_the_trace_of_its_definition(kernel: tuple[int, ...], samples: int, case: tuple[bool, bool, bool]) -> None:
    W = draw(5, 4, *kernel)
    taps = math.prod(kernel)
    inputs = moment(4 * (taps if case[2] else 1), samples, 1) * 7 if case[0] else None
    gradients = moment(5, samples, 2) * 1e-9 if case[1] else None
    metric = Metric.of(inputs, gradients, taps=taps if case[2] else None)
    assert metric.error(W) == pytest.approx(error_by_definition(W, inputs, gradients, case[2]), rel=1e-12)


@pytest.mark.parametrize("samples", [3, 200], ids=["few samples", "many samples"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_in_a_metric_of_channels_the_error_is_the_squared_norm_of_the_whitened_change(
    kernel: tuple[int, ...], samples: int
) -> None:
    W, H, G = draw(5, 4, *kernel), moment(4, samples, 1), moment(5, samples, 2)
    metric = Metric.of(H, G)
    white = float(metric.whiten(W).square().sum())
    assert metric.scale * white == pytest.approx(error_by_definition(W, H, G, False), rel=1e-12)


@pytest.mark.parametrize("samples", [0, 3, 200], ids=["no samples", "few samples", "many samples"])
def test_unwhitening_gives_the_weight_back(samples: int) -> None:
    W = draw(5, 4, 3, 3)
    metric = Metric.of(moment(4, samples, 1) if samples else torch.zeros(4, 4), moment(5, max(samples, 1), 2))
    torch.testing.assert_close(metric.unwhiten(metric.whiten(W)), W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3, 200], ids=str)
def test_the_roots_are_roots_of_the_damped_moment_however_few_samples_it_has(samples: int) -> None:
    H = moment(9, samples)
    side = Metric.of(H).inputs
    assert side is not None
    expected = damped(H) / H.diagonal().mean()
    torch.testing.assert_close(side.moment, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(side.root @ side.root, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(side.root @ side.inverse, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_metric_of_patches_holds_the_mean_over_their_taps_as_that_of_channels() -> None:
    H = moment(4 * 6, 50)
    metric = Metric.of(H, taps=6).of_channels()
    taps = [H[k::6, k::6] for k in range(6)]
    W = draw(5, 4, 2, 3)
    assert metric.error(W) == pytest.approx(error_by_definition(W, torch.stack(taps).mean(0), None, False), rel=1e-12)


def test_patches_of_one_tap_are_channels() -> None:
    metric = Metric.of(moment(4, 50), taps=1)
    assert metric.patches is None
    assert metric.error(draw(5, 4)) == Metric.of(moment(4, 50)).error(draw(5, 4))


def test_in_blocks_channels_of_different_blocks_do_not_know_each_other() -> None:
    H, G, W = moment(6, 50, 1), moment(4, 50, 2), draw(4, 6, 3)
    H_blocks = H * torch.block_diag(*[torch.ones(2, 2)] * 3)
    G_blocks = G * torch.block_diag(*[torch.ones(2, 2)] * 2)
    blocks = Metric.of(H, G).in_blocks(3, 2)
    assert blocks.error(W) == pytest.approx(error_by_definition(W, H_blocks, G_blocks, False), rel=1e-12)
    assert blocks.inputs is not None
    for part in (blocks.inputs.root, blocks.inputs.inverse):
        torch.testing.assert_close(part * (H_blocks == 0), torch.zeros(6, 6, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e6, 1e200], ids=str)
def test_the_size_of_a_moment_scales_the_error_and_leaves_the_factors(size: float) -> None:
    W, H, G = draw(5, 4, 3, 3), moment(4, 50, 1), moment(5, 50, 2)
    plain, scaled = Metric.of(H, G), Metric.of(H, G * size)
    assert scaled.error(W) == pytest.approx(plain.error(W) * size, rel=1e-9)
    made, expected = (BlockTerms(*factors(W, metric), 1).composed() for metric in (scaled, plain))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("taps", [None, 9], ids=["channels", "patches"])
def test_by_a_moment_of_zeros_nothing_costs_anything_and_the_factors_are_the_weights_own(taps: int | None) -> None:
    W = draw(5, 4, 3, 3)
    nothing = Metric.of(torch.zeros(4 * (taps or 1), 4 * (taps or 1)), taps=taps)
    assert nothing.error(W) == 0
    errors = [float((W - BlockTerms(*factors(W, metric), 1).composed()).norm()) for metric in (nothing, Metric.of())]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def factors(W: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    fit = weighted_tucker(W, 3, 3, metric)
    assert fit.reduce is not None
    assert fit.expand is not None
    return fit.reduce, fit.core, fit.expand


def test_a_metric_neither_changes_nor_shares_nor_tracks_the_moments() -> None:
    H = moment(4, 50).requires_grad_()
    before = H.detach().clone()
    with torch.inference_mode():
        metric = Metric.of(H)
    assert torch.equal(H, before)
    assert metric.inputs is not None
    for part in (metric.inputs.moment, metric.inputs.root, metric.inputs.inverse):
        assert not part.requires_grad
        assert not part.is_inference()
        assert part.untyped_storage().data_ptr() != H.untyped_storage().data_ptr()


def test_a_metric_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Metric.of().scale = 2.0  # type: ignore[misc]


def test_a_singular_moment_may_be_as_negative_as_products_in_float32_make_it() -> None:
    # One direction far above the mean: what rounding leaves of it is more than the damping.
    n, seen = 200, draw(200, 1) + 10
    exact = seen @ seen.T
    noise = draw(n, n) * 1e-6 * float(torch.linalg.eigvalsh(exact)[-1])
    metric = Metric.of(exact + noise + noise.T, damping=1e-4)
    assert float(torch.linalg.eigvalsh(exact + noise + noise.T)[0]) < -1e-4 * float(exact.diagonal().mean()) / 2
    assert metric.inputs is not None
    least = torch.linalg.eigvalsh(metric.inputs.moment)
    assert float(least[0]) >= 0.99e-4
    assert all(part.isfinite().all() for part in (metric.inputs.root, metric.inputs.inverse))
    W = draw(5, n)
    assert metric.error(W) == pytest.approx(Metric.of(exact, damping=1e-4).error(W), rel=0.05)


def with_entry(value: float) -> Tensor:
    return moment(4, 50).index_put_((torch.tensor([1, 2]), torch.tensor([2, 1])), torch.tensor(value, dtype=torch.float64))


REFUSED = {
    "NaN": (lambda: Metric.of(with_entry(math.nan)), "inputs holds NaN or infinite"),
    "infinite": (lambda: Metric.of(None, with_entry(math.inf)), "gradients holds NaN or infinite"),
    "negative eigenvalue": (lambda: Metric.of(with_entry(50.0)), "negative eigenvalues"),
    "negative": (lambda: Metric.of(-moment(4, 50)), "negative eigenvalues"),
    "no trace": (lambda: Metric.of(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), "negative eigenvalues"),
    "not symmetric": (lambda: Metric.of(draw(4, 4)), "not symmetric"),
    "not square": (lambda: Metric.of(draw(4, 5)), r"square, not \(4, 5\)"),
    "no matrix": (lambda: Metric.of(draw(4)), r"square, not \(4,\)"),
    "odd taps": (lambda: Metric.of(moment(4, 50), taps=3), "4 rows is not that of 3-tap patches"),
    "no taps": (lambda: Metric.of(moment(4, 50), taps=0), "not that of 0-tap patches"),
    "no damping": (lambda: Metric.of(moment(4, 50), damping=0.0), "damping of 0 is not between 1e-08"),
    "damping NaN": (lambda: Metric.of(moment(4, 50), damping=math.nan), "damping of nan"),
    "other inputs": (lambda: Metric.of(moment(4, 50)).error(draw(5, 3, 3, 3)), "4 input channels is not one of a"),
    "other outputs": (lambda: Metric.of(None, moment(4, 50)).error(draw(5, 4, 3, 3)), "4 output channels is not one of a"),
    "other taps": (lambda: Metric.of(moment(8, 50), taps=2).error(draw(5, 4, 3)), "patches of 8 values is not one of a"),
}


@pytest.mark.parametrize(("call", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_moment_or_fits_no_weight_is_refused_in_one_line(call: object, says: str) -> None:
    with pytest.raises(LaminaError, match=says) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True)], ids=["both", "inputs", "gradients"])
def test_groups_have_the_metric_in_which_no_group_knows_another(known: tuple[bool, bool]) -> None:
    P, i, o = 3, 4, 5
    H, G = moment(P * i, 200, 1), moment(P * o, 200, 2)
    metric = Metric.of(H if known[0] else None, G if known[1] else None)
    parts = [draw(o, i, 3, seed=seed) for seed in range(P)]
    whole = torch.zeros(P * o, P * i, 3, dtype=torch.float64)  # as a convolution of one group computes the same
    for g, part in enumerate(parts):
        whole[g * o : (g + 1) * o, g * i : (g + 1) * i] = part
    lost = sum(own.error(part) for own, part in zip(metric.of_groups(P), parts, strict=True))
    assert lost == pytest.approx(metric.in_blocks(P, P).error(whole), rel=1e-9)
    assert metric.of_groups(1) == [metric]
