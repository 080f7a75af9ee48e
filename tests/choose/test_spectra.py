"""Spectra of a weight, and of the weight as a calibration weighs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.choose.spectra import spectra
from lamina.factorize.metric import Metric
from lamina.factorize.weighted import price_of_ranks, price_of_sides
from lamina.network.walk import walk

from ..machine import Machine

LAYERS = (nn.Linear(12, 7), nn.Conv1d(6, 9, 5), nn.Conv2d(8, 6, 3), nn.Conv2d(10, 4, 1))


def second_moment(n: int, seed: int) -> Tensor:
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.logspace(0, -2, n, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("module", LAYERS, ids=str)
def test_by_a_metric_what_a_side_leaves_out_is_what_it_costs_to_leave_it_out(module: nn.Module) -> None:
    (layer,) = walk(nn.Sequential(module)).layers.values()
    W = layer.weight.detach().double()
    metric = Metric.of(second_moment(W.shape[1], 0), second_moment(W.shape[0], 1))
    found = spectra(layer, metric)
    whole = metric.error(W)
    if layer.geometry.pointwise:
        left = [price_of_ranks(W.flatten(1), metric)]
    else:  # of a side alone, the other one whole
        prices = price_of_sides(W, metric)
        left = [prices[-1], prices[:, -1]]
    for spectrum, expected in zip(found, left, strict=True):
        squares = torch.tensor(spectrum.squares, dtype=torch.float64)
        rest = 1 - torch.cat([squares.new_zeros(1), squares.cumsum(0)]) / squares.sum()
        torch.testing.assert_close(rest[: len(expected)], (expected / whole)[: len(rest)], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("module", LAYERS, ids=str)
def test_where_all_changes_cost_alike_it_is_that_of_the_weight(module: nn.Module) -> None:
    (layer,) = walk(nn.Sequential(module)).layers.values()
    O, I = layer.geometry.out_channels, layer.geometry.in_channels
    alike = Metric.of(3 * torch.eye(I), torch.eye(O) / 5)
    for plain, weighed in zip(spectra(layer), spectra(layer, alike), strict=True):
        assert (plain.rows, plain.columns) == (weighed.rows, weighed.columns)
        shares = [torch.tensor(each.squares, dtype=torch.float64) for each in (plain, weighed)]
        torch.testing.assert_close(*(each / each.sum() for each in shares), atol=1e-6, rtol=1e-4)


def test_rules_of_the_spectrum_take_the_ranks_that_the_data_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is noise, of full rank, and inputs that lie in five directions: the answers need five ranks at most."""
    Machine.instead(monkeypatch)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    data = torch.randn(512, 5) @ torch.randn(5, 96) + 1e-3 * torch.randn(512, 96)
    found = lamina.calibrate(net, data, outputs=lamina.Categorical())

    def form(rule: lamina.Energy | lamina.Evbmf, calibration: lamina.Calibration | None) -> lamina.Form:
        options = {"rule": rule, "data": calibration, "include": ["0"], "never_slower": False}
        return lamina.make_plan(net, data[:8], lamina.Ratio(1), **options).layers["0"].form  # type: ignore[arg-type]

    assert form(lamina.Energy(0.99), None) == lamina.Dense()  # the weight itself holds too much
    held = form(lamina.Energy(0.99), found)
    assert isinstance(held, lamina.LowRank) and held.rank <= 5
    assert form(lamina.Evbmf(0.0), None) == lamina.LowRank(1)  # nothing stands out of it
    standing_out = form(lamina.Evbmf(0.0), found)
    assert isinstance(standing_out, lamina.LowRank) and standing_out.rank > 1
