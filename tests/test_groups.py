"""Convolutions that have groups already: each group is decomposed as a layer of its own would be.

The oracle is the same network with the groups apart: plain convolutions side by side.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import BlockTerm, Dense, LowRank
from lamina.forms import Form
from lamina.layers.build import factored, losses, size_of
from lamina.layers.decomposed import DecomposedLayer
from lamina.layers.series import SeriesLayer
from lamina.network.walk import walk

GROUPS = 3


class Together(nn.Module):
    """A convolution in groups between two plain layers."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.grouped = nn.Conv2d(48, 60, kernel, stride=2, padding=kernel // 2, groups=GROUPS)
        self.head = nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.grouped(self.stem(x).relu()).relu().mean((2, 3)))
        return y


class Apart(nn.Module):
    """The same with a convolution for each group."""

    def __init__(self, like: Together) -> None:
        super().__init__()
        self.stem, self.head, conv = like.stem, like.head, like.grouped
        i, o = conv.in_channels // GROUPS, conv.out_channels // GROUPS
        self.parts = nn.ModuleList()
        for weight, bias in zip(conv.weight.detach().chunk(GROUPS), conv.bias.detach().chunk(GROUPS), strict=True):
            part = nn.Conv2d(i, o, conv.kernel_size, conv.stride, conv.padding)
            part.load_state_dict({"weight": weight, "bias": bias})
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.parts, self.stem(x).relu().chunk(GROUPS, 1), strict=True)
        y: Tensor = self.head(torch.cat([conv(part) for conv, part in parts], 1).relu().mean((2, 3)))
        return y


def pair(kernel: int) -> tuple[Together, Apart, Tensor]:
    torch.manual_seed(0)
    together = Together(kernel).eval()
    return together, Apart(together).eval(), torch.randn(64, 3, 9, 8)


FORMS: dict[int, list[Form]] = {
    1: [LowRank(7), LowRank(16)],
    3: [BlockTerm(9, 11), BlockTerm(None, 7), BlockTerm(5, None), BlockTerm(8, 12, 4)],
}
cases = pytest.mark.parametrize(
    ("kernel", "form"), [(kernel, form) for kernel, forms in FORMS.items() for form in forms], ids=str
)


def weight_of(layer: DecomposedLayer) -> Tensor:
    return layer.weight.detach().clone()


@cases
def test_each_group_becomes_what_a_layer_of_its_own_would(kernel: int, form: Form) -> None:
    together, apart, _ = pair(kernel)
    whole = factored(walk(together).layers["grouped"], form)
    own = [factored(walk(apart).layers[f"parts.{g}"], form) for g in range(GROUPS)]
    torch.testing.assert_close(weight_of(whole), torch.cat([weight_of(each) for each in own]))
    assert all(factor.groups % GROUPS == 0 for factor in whole.factors())
    wanted = sum(p.numel() for each in own for p in each.parameters())
    assert sum(p.numel() for p in whole.parameters()) == wanted == form.parameters(whole.geometry)


@cases
def test_what_a_form_loses_is_what_it_loses_of_the_groups_by_their_size(kernel: int, form: Form) -> None:
    together, apart, _ = pair(kernel)
    own = [walk(apart).layers[f"parts.{g}"] for g in range(GROUPS)]
    squares = [float(layer.weight.detach().double().square().sum()) for layer in own]
    lost = sum(size * losses(layer, [form])[form] for size, layer in zip(squares, own, strict=True)) / sum(squares)
    assert losses(walk(together).layers["grouped"], [form])[form] == pytest.approx(lost, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kernel", FORMS)
def test_the_moments_of_a_group_are_those_of_a_layer_of_its_own(kernel: int) -> None:
    together, apart, data = pair(kernel)
    one, other = (lamina.calibrate(net, data, outputs=lamina.Categorical(), seed=3) for net in (together, apart))
    whole = one.layers["grouped"]
    assert whole.taps is None and whole.curve == type(whole.curve)()  # channels are known, patches of all groups nobody needs
    own = [other.layers[f"parts.{g}"] for g in range(GROUPS)]
    gradients = whole.gradients()
    assert gradients is not None
    for g, moments in enumerate(own):
        mine = moments.gradients()
        assert mine is not None
        for found, wanted in ((whole.channels(), moments.channels()), (gradients, mine)):
            n = len(wanted)
            block = found[g * n : (g + 1) * n, g * n : (g + 1) * n]
            torch.testing.assert_close(block, wanted, rtol=1e-4, atol=1e-5 * float(wanted.diagonal().mean()))


@pytest.mark.parametrize("form", FORMS[1], ids=str)
def test_a_loss_in_a_metric_is_the_error_of_the_weight_that_is_fitted_in_it(form: Form) -> None:
    together, _, data = pair(1)
    layer = walk(together).layers["grouped"]
    metric = lamina.calibrate(together, data, outputs=lamina.Categorical()).layers["grouped"].metric()
    change = layer.weight.detach() - weight_of(factored(layer, form, metric))
    parts = zip(change.chunk(GROUPS), metric.of_groups(GROUPS), strict=True)
    lost = sum(own.error(part) for part, own in parts)
    size = size_of(layer, metric)
    assert lost / size == pytest.approx(losses(layer, [form], metric)[form], rel=1e-4, abs=1e-6)
    plain = layer.weight.detach() - weight_of(factored(layer, form))
    parts = zip(plain.chunk(GROUPS), metric.of_groups(GROUPS), strict=True)
    assert lost <= sum(own.error(part) for part, own in parts) * (1 + 1e-6) + 1e-9 * size


def test_a_metric_of_patches_is_none_of_groups() -> None:
    metric = lamina.calibrate(nn.Conv2d(4, 4, 3), torch.randn(64, 4, 9, 9)).layers[""].metric()
    with pytest.raises(lamina.LaminaError, match="patches is not one of a convolution in groups"):
        metric.of_groups(2)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["by the weights", "by data"])
def test_a_network_with_groups_is_decomposed_saved_loaded_and_merged(kernel: int, calibrated: bool, tmp_path: Path) -> None:
    together, _, data = pair(kernel)
    more = {"data": data} if calibrated else {}
    plan = lamina.make_plan(together, data[:2], lamina.Ratio(2), rule=lamina.AtRatio(), **more)
    assert plan.layers["grouped"].decomposed and "in 3 groups" in str(plan.layers["grouped"].geometry)
    assert lamina.Plan.model_validate_json(plan.model_dump_json()) == plan
    small = lamina.decompose(together, plan, **more)
    assert plan.whole is not None
    assert lamina.count(small, data[:2]).macs == plan.whole.after.macs
    lamina.save(small, tmp_path / "small")
    loaded = lamina.load(copy.deepcopy(together), tmp_path / "small")
    assert torch.equal(loaded(data), small(data))
    merged = lamina.merge(small)
    assert repr(merged) == repr(together)
    torch.testing.assert_close(merged(data), small(data), rtol=1e-4, atol=1e-5)
    small.train()(data).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in small.grouped.parameters())


@pytest.mark.parametrize("rule", [lamina.Energy(0.8), lamina.Evbmf()], ids=str)
@pytest.mark.parametrize("kernel", FORMS)
def test_rules_that_ask_for_a_spectrum_choose_a_rank_for_all_groups(rule: lamina.Energy | lamina.Evbmf, kernel: int) -> None:
    together, _, data = pair(kernel)
    with torch.no_grad():  # of rank 4 and a little noise, in every group
        W = together.grouped.weight
        for part in W.chunk(GROUPS):
            A, B = torch.randn(len(part), 4), torch.randn(4, part.shape[1])
            part.copy_((A @ B)[..., None, None].expand_as(part) + 1e-3 * torch.randn_like(part))
    plan = lamina.make_plan(together, data[:2], lamina.Ratio(1.0), rule=rule, include=["grouped"], never_slower=False)
    form = plan.layers["grouped"].form
    if form != Dense():  # where the clock lets it
        ranks = [form.rank] if isinstance(form, LowRank) else [form.rank_in, form.rank_out]
        assert all(rank is None or rank <= 4 for rank in ranks)


def test_a_series_of_a_layer_with_groups_is_refused() -> None:
    layer = walk(pair(3)[0]).layers["grouped"]
    with pytest.raises(lamina.RankError, match="in 3 groups is in no series"):
        SeriesLayer(layer.geometry, [BlockTerm(4, 4)])
