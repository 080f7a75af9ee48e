"""Scales: what a layer's moments tell is held against the network itself, once for each layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.calibration.calibration import Moments

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 12, generator=GENERATOR)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10)).eval()


def unscaled(moments: Moments) -> Moments:
    return dataclasses.replace(moments, record=moments.record.model_copy(update={"scale": None}))


def test_of_one_linear_layer_the_moments_tell_the_truth() -> None:
    """Positions and higher orders are what moments misjudge, and here are none."""
    batches = [X] * 64  # so that drawn answers average out
    found = lamina.calibrate(linear(), batches, outputs=lamina.Gaussian(), tolerance=None)
    assert found.layers["0"].scale == pytest.approx(1, rel=0.2)


def test_a_price_is_scaled_and_the_factors_stay_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()
    data = torch.randn(32, 4, 6, 6, generator=GENERATOR)
    found = lamina.calibrate(model, data, outputs=lamina.Categorical())
    for name, moments in found.layers.items():
        W, scale = model.get_submodule(name).weight.detach(), moments.scale
        assert scale is not None and scale > 0
        assert moments.metric().error(W) == pytest.approx(scale * unscaled(moments).metric().error(W))
    bare = dataclasses.replace(found, layers={name: unscaled(each) for name, each in found.layers.items()})
    plan = lamina.make_plan(model, data, lamina.Ratio(1.5), rule=lamina.AtRatio())
    ours, theirs = (lamina.decompose(model, plan, each).state_dict() for each in (found, bare))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_where_no_divergence_can_be_told_there_is_no_scale() -> None:
    def loss(output: Tensor) -> Tensor:
        return output.square().sum()

    for outputs in (None, loss):
        assert all(each.scale is None for each in lamina.calibrate(linear(), [X], outputs=outputs).layers.values())


def test_a_layer_that_nothing_depends_on_has_no_scale() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    with torch.no_grad():
        model[2].weight.zero_()
    found = lamina.calibrate(model, [X], outputs=lamina.Gaussian())
    assert found.layers["0"].scale is None
    assert found.layers["0"].metric().error(model[0].weight.detach()) == 0


def test_a_saved_scale_is_loaded(tmp_path) -> None:
    found = lamina.calibrate(linear(), [X] * 4)
    found.save(tmp_path / "calibration")
    assert lamina.Calibration.load(tmp_path / "calibration").layers["0"].scale == found.layers["0"].scale


def test_the_metric_of_channels_is_the_same_whether_patches_are_made_first_or_not() -> None:
    model = nn.Sequential(nn.Conv2d(5, 6, (3, 2))).eval()
    moments = lamina.calibrate(model, torch.randn(32, 5, 6, 6, generator=GENERATOR)).layers["0"]
    assert moments.taps == 6
    whole, lean = moments.metric().of_channels(), moments.metric(patches=False)
    W = torch.randn(6, 5, 3, 2, generator=GENERATOR)
    assert lean.error(W) == pytest.approx(whole.error(W), rel=1e-9)
    torch.testing.assert_close(moments.channels(), moments.channels().T, rtol=0, atol=0)
