"""`lamina.sensitivities`: which layers cost what, by the times and the prices that a budget goes by."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import Dense, GoalError, LowRank
from lamina.layers.build import needs_fit
from lamina.measure.table import TimingTable

from ..machine import Machine, Net, X, decaying


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine.instead(monkeypatch)


@pytest.fixture
def model(machine: Machine) -> Net:
    return decaying()


def found_in(model: nn.Module, **options: Any) -> lamina.Sensitivities:
    return lamina.sensitivities(model, options.pop("example", X), timings=options.pop("timings", TimingTable(None)), **options)


def calibrated(model: nn.Module) -> lamina.Calibration:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return lamina.calibrate(model, images, outputs=lamina.Categorical())


def test_every_cut_is_as_fast_as_asked_and_saves_its_share_of_the_networks_time(model: Net) -> None:
    found = found_in(model, speedups=(1.5, 3.0))
    assert sum(layer.share for layer in found.layers.values()) == pytest.approx(1)
    assert {cut.asked for layer in found.layers.values() for cut in layer.cuts} == {1.5, 3.0}
    for layer in found.layers.values():
        for cut in layer.cuts:
            assert cut.seconds * cut.asked <= layer.seconds
            assert cut.saved == pytest.approx(layer.share * (1 - cut.seconds / layer.seconds))
            assert cut.form != Dense() and not needs_fit(cut.form)


def test_more_speed_of_a_layer_costs_no_less(model: Net) -> None:
    for data in (None, calibrated(model)):
        for layer in found_in(model, data=data, speedups=(1.2, 2.0, 4.0)).layers.values():
            losses = [cut.loss for cut in layer.cuts]
            assert losses == sorted(losses) and len(losses) >= 1


def test_without_data_a_loss_is_the_share_of_the_weight_that_decomposing_this_layer_leaves_out(model: Net) -> None:
    found = found_in(model)
    plan = lamina.make_plan(model, X, lamina.Ratio(1.0), rule=lamina.AtRatio())
    looked = 0
    for name, layer in found.layers.items():
        for cut in layer.cuts:
            assert cut.nats is None
            if isinstance(cut.form, LowRank):
                alone = plan
                for other in plan.layers:
                    alone = alone.with_form(other, cut.form if other == name else Dense())
                W, small = model.get_submodule(name).weight.detach(), lamina.decompose(model, alone).get_submodule(name)
                left_out = (W - torch.as_tensor(small.weight).detach().reshape(W.shape)).square().sum() / W.square().sum()
                assert cut.loss == pytest.approx(float(left_out), rel=1e-3, abs=1e-9)
                assert str(cut) == f"{cut.loss**0.5:.0%}"
                looked += 1
    assert looked


def test_with_data_the_layer_that_the_answers_hardly_need_costs_least(machine: Machine) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.needed, self.spare, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.needed(x) + 1e-3 * self.spare(x))
            return y

    torch.manual_seed(0)
    net, x = Branches().eval(), torch.randn(256, 64)
    data = lamina.calibrate(net, x, outputs=lamina.Categorical())
    found = found_in(net, example=x, data=data)
    cuts = found.at(2.0)
    assert cuts["spare"].form == cuts["needed"].form
    assert 0 < (cuts["spare"].nats or 0) < 1e-3 * (cuts["needed"].nats or 0)
    assert found.calibration == data.identity and data.identity[:8] in str(found)


def test_a_plan_that_follows_times_no_form_again(model: Net, machine: Machine) -> None:
    timings, options = TimingTable(None), {"include": ["body.*"]}
    found_in(model, timings=timings, **options)
    timed = {form for form in machine.measured if form != Dense()}
    machine.measured.clear()
    lamina.make_plan(model, X, lamina.Speedup(1.3), timings=timings, **options)
    assert timed and not timed & set(machine.measured)


def test_the_network_is_only_read(model: Net) -> None:
    before = copy.deepcopy(model.state_dict())
    model.train()
    found_in(model, data=calibrated(model))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_left_out_is_said(model: Net) -> None:
    data = lamina.calibrate(model, torch.randn(32, 3, 8, 8), skip=["stem"])
    found = found_in(model, data=data, skip=["head"])
    assert found.unknown == ("stem",) and "head" not in found.layers
    assert "knows nothing of them: stem" in str(found)
    grouped = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=32))
    found = found_in(grouped)
    assert list(found.refused) == ["1"] and "refused, see lamina.make_plan: 1" in str(found)


def test_without_gradients_losses_are_shares_of_outputs_and_layers_that_none_reaches_are_not_told(model: Net) -> None:
    images = torch.randn(64, 3, 8, 8)
    found = found_in(model, data=lamina.calibrate(model, images, outputs=None))
    cuts = [cut for layer in found.layers.values() for cut in layer.cuts]
    assert cuts and all(cut.nats is None and str(cut) == f"{cut.loss**0.5:.0%}" for cut in cuts)
    assert "a share of its output" in str(found) and "nats" not in str(found)

    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.pointwise(self.body(self.stem(x).detach())).mean((2, 3)))
            return y

    cut = Cut().eval()
    with pytest.warns(UserWarning, match="stem is reached by no gradient"):
        found = found_in(cut, data=lamina.calibrate(cut, images))
    assert found.blind == ("stem",) and not found.unknown and "stem" not in found.layers
    assert "not told, as no gradient reaches them: stem" in str(found)
    assert all(cut.nats is not None for layer in found.layers.values() for cut in layer.cuts)


def test_a_speed_that_no_form_reaches_is_a_dash_and_no_cut(model: Net) -> None:
    found = found_in(model, speedups=(1.5, 500.0))
    assert not found.at(500.0) and found.at(1.5)
    assert all(line.split()[-2:] == ["–", "–"] for line in str(found).splitlines()[2 : 2 + len(found.layers)])


@pytest.mark.parametrize("prefix", ["", "a_long_name_of_a_module_that_somebody_wrote." * 2])
def test_it_prints_in_80_columns_with_a_row_for_every_layer(model: Net, prefix: str) -> None:
    net: nn.Module = model
    for name in reversed(prefix.split(".")[:-1]):
        net = nn.Sequential(OrderedDict([(name, net)]))
    text = str(found_in(net, data=calibrated(net), speedups=(1.25, 1.5, 2.0, 3.0)))
    names = [name for name, _ in net.named_modules() if f"{prefix}body." in name]
    assert len(names) == 3 and all(name in text for name in names)
    assert max(len(line) for line in text.splitlines() if not line.startswith(prefix or "-")) <= 80


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a speed of 1": ({"speedups": [1.0]}, "a speed-up of 1.0 is not possible"),
    "no speed": ({"speedups": []}, "give one to 4"),
    "too many": ({"speedups": [2, 3, 4, 5, 6]}, "speedups holds 5 numbers; give one to 4"),
}


@pytest.mark.parametrize(("options", "says"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused(model: Net, options: dict[str, Any], says: str) -> None:
    with pytest.raises(GoalError, match=says):
        found_in(model, **options)


def test_a_speed_that_was_not_asked_for_is_refused(model: Net) -> None:
    with pytest.raises(GoalError, match=r"a speed-up of 7\.0 was not looked at, only ×1\.5, ×2, ×3"):
        found_in(model).at(7.0)
