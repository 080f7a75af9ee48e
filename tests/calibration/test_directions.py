"""Patches along a few directions: where whole ones are too many, factors are fitted nearly as well as by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.calibration import directions
from lamina.factorize.block_term import BlockTerms
from lamina.factorize.metric import Along, Metric
from lamina.factorize.weighted import leading_directions, weighted_tucker

K, I, O = 16, 24, 12
MEMORY = 5e5
"""Enough for moments of channels, and for a few directions; not for patches."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, I, 9), nn.ReLU(), nn.Conv1d(I, O, K), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    ).eval()


def smooth(seed: int, batches: int = 12) -> list[Tensor]:
    """Slow waves: neighbouring taps see nearly the same."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.arange(80.0) / 80
    found = []
    for _ in range(batches):
        rate, phase = 6 * torch.rand(8, 3, 1, generator=draw), 6.3 * torch.rand(8, 3, 1, generator=draw)
        found.append(torch.sin(6.3 * rate * at + phase) + 0.05 * torch.randn(8, 3, 80, generator=draw))
    return found


def outputs_apart(small: nn.Module, model: nn.Module) -> float:
    x = model[1](model[0](torch.cat(smooth(9))))
    with torch.no_grad():
        wanted, found = model[2](x), small[2](x)
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def known() -> lamina.Calibration:
    return lamina.calibrate(network(), smooth(0), memory=MEMORY, tolerance=None)


def test_a_layer_whose_patches_do_not_fit_is_known_by_them_along_directions(known: lamina.Calibration) -> None:
    record = known.layers["2"].record
    assert record.inputs == "channels" and 4 <= record.directions < I
    assert any("along" in note and "directions of the channels" in note for note in known.notes)
    assert not any("by channels" in note for note in known.notes)
    assert known.layers["0"].record.inputs == "patches" and not known.layers["0"].record.directions


def test_factors_are_fitted_far_better_than_by_channels_and_to_the_weight_alone(
    known: lamina.Calibration, monkeypatch: pytest.MonkeyPatch, planned
) -> None:  # type: ignore[no-untyped-def]
    model = network()
    plan = planned(model, smooth(1)[0], {"2": lamina.BlockTerm(4, 8)})
    whole = lamina.calibrate(model, smooth(0), tolerance=None)
    monkeypatch.setattr(directions, "_MOST", 0)
    coarse = lamina.calibrate(model, smooth(0), memory=MEMORY, tolerance=None)
    assert whole.layers["2"].record.inputs == "patches" and not coarse.layers["2"].record.directions
    alone, by_channels, along, by_patches = (
        outputs_apart(lamina.decompose(model, plan, data), model) for data in (None, coarse, known, whole)
    )
    assert along < 0.6 * by_channels and along < 0.6 * alone
    assert along < 1.3 * by_patches


def test_they_are_saved_and_loaded(known: lamina.Calibration, tmp_path: Path) -> None:
    known.save(tmp_path / "saved")
    again = lamina.Calibration.load(tmp_path / "saved")
    assert again.identity == known.identity
    a, b = (each.layers["2"].metric().along for each in (known, again))
    assert a is not None and b is not None
    assert torch.equal(a.weight(), b.weight()) and torch.equal(a.directions, b.directions)


def test_prices_do_not_go_by_them(known: lamina.Calibration) -> None:
    assert known.layers["2"].metric(patches=False).along is None
    assert known.layers["2"].metric().of_channels().along is None


def test_data_that_can_be_read_once_have_none() -> None:
    found = lamina.calibrate(network(), iter(smooth(0)), memory=MEMORY, tolerance=None)
    assert found.layers["2"].record.inputs == "channels" and not found.layers["2"].record.directions


def test_along_all_directions_a_fit_is_that_by_patches() -> None:
    torch.manual_seed(0)
    W = torch.randn(O, I, K, dtype=torch.float64)
    x = torch.randn(I * K, 900, dtype=torch.float64).cumsum(0)
    H, B = x @ x.T, torch.randn(O, 40, dtype=torch.float64)
    G = B @ B.T
    whole = Metric.of(H, G, taps=K, damping=1e-8)
    E = leading_directions(W, I, whole)
    at_all_taps = torch.kron(E, torch.eye(K, dtype=torch.float64))
    z = at_all_taps @ x
    inner = Metric.of(z @ z.T, G, taps=K, damping=1e-8)
    cross = W.flatten(1) @ x @ z.T / float((z @ z.T).diagonal().mean())
    along = Metric(whole.inputs, whole.gradients, None, whole.scale, Along(E, cross, inner))
    for s, t in ((6, 5), (10, None), (3, 12)):
        fits = [weighted_tucker(W, s, t, metric) for metric in (whole, along, whole.of_channels())]
        errors = [whole.error(W - BlockTerms(fit.reduce, fit.core, fit.expand, 1).composed().double()) for fit in fits]
        assert errors[1] <= 1.1 * errors[0] and errors[1] < 0.9 * errors[2]  # where they start differs, and so where they end
    # What is beyond them, or leaves the input side whole, goes by channels.
    z = z[: 4 * K]
    inner = Metric.of(z @ z.T, G, taps=K, damping=1e-8)
    few = Metric(whole.inputs, whole.gradients, None, whole.scale, Along(E[:4], cross[:, : 4 * K], inner))
    assert weighted_tucker(W, None, 5, few).reduce is None
    assert torch.equal(weighted_tucker(W, 6, 5, few).core, weighted_tucker(W, 6, 5, whole.of_channels()).core)


def test_directions_see_uncorrelated_inputs() -> None:
    torch.manual_seed(0)
    W, x = torch.randn(O, I, K), torch.randn(I, 500, dtype=torch.float64) * torch.arange(1.0, I + 1)[:, None]
    E = leading_directions(W, 5, Metric.of(x @ x.T, damping=1e-8))
    z = E @ x
    S = z @ z.T
    torch.testing.assert_close(S / S[0, 0], torch.eye(5, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_directions_of_other_channels_are_refused() -> None:
    metric = Metric.of(torch.eye(I))
    wrong = Metric(
        metric.inputs,
        None,
        None,
        1.0,
        Along(torch.eye(I - 1), torch.zeros(O, (I - 1) * K), Metric.of(torch.eye((I - 1) * K), taps=K)),
    )
    with pytest.raises(lamina.LaminaError, match=f"directions of {I - 1} channels are not those"):
        weighted_tucker(torch.randn(O, I, K), 3, 3, wrong)
