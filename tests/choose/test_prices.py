"""Prices: losses of forms by what a calibration knows, in nats that add up over layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lamina
from lamina.calibration.sums import Shape
from lamina.choose import prices as room
from lamina.choose.prices import Prices
from lamina.choose.survey import Survey
from lamina.factorize.metric import Metric
from lamina.forms import Form, candidates
from lamina.layers.build import losses, needs_fit
from lamina.measure.table import TimingTable
from lamina.network.walk import Layer, walk

from ..machine import Machine, X, decaying

DATA = torch.randn(64, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 8)
    return nn.Sequential(*layers).eval()


def prices(net: nn.Module, found: lamina.Calibration | None, table: TimingTable | None = None) -> Prices:
    survey = Survey.of(net, DATA[:8], lamina.Inference(), [], [])
    return Prices(survey, table or TimingTable(None), found)


def test_a_loss_is_a_share_that_falls_with_rank_and_its_price_is_in_nats() -> None:
    net = model()
    found = lamina.calibrate(net, DATA, outputs=lamina.Categorical())
    own = prices(net, found)
    for name, layer in own.survey.layers.items():
        metric = found.layers[name].metric().of_channels()
        W = layer.weight.detach()
        assert own.price(name, 1.0) == pytest.approx(found.layers[name].curve.at(metric.error(W) / 2))
        for form in candidates(layer.geometry):
            loss = own.of(name, [form])[form]
            assert 0 <= loss <= 1
            small = lamina.decompose(net, one_layer(net, name, form), found).get_submodule(name)
            fitted = metric.error(W - torch.as_tensor(small.weight).detach().reshape(W.shape)) / metric.error(W)
            # Of ranks the price is an upper bound of the fit in this metric; the fit itself is in that of patches.
            assert fitted <= 1.5 * loss + 1e-6


def one_layer(net: nn.Module, name: str, form: lamina.forms.Form) -> lamina.Plan:
    plan = lamina.make_plan(net, DATA[:8], lamina.Ratio(1.0), rule=lamina.AtRatio())
    for other in plan.layers:
        plan = plan.with_form(other, form if other == name else lamina.Dense())
    return plan


def test_what_one_calibration_prices_does_not_answer_for_another_nor_for_none() -> None:
    net, table = model(), TimingTable(None)
    first, second = (lamina.calibrate(net, DATA, outputs=outputs) for outputs in (lamina.Categorical(), lamina.Gaussian()))
    name = "0"
    form = next(iter(f for f in candidates(prices(net, None).survey.layers[name].geometry) if f != lamina.Dense()))
    told = [prices(net, found, table).fitted(name, form) for found in (first, second, None)]
    again = [prices(net, found, table).fitted(name, form) for found in (first, second, None)]
    assert told == again and len(set(told)) == 3


def test_a_budget_with_a_calibration_says_its_nats_and_spares_the_layer_that_the_answers_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two equal layers side by side; the answers hardly depend on one of them."""
    Machine.instead(monkeypatch)  # on some processors no form of so small a layer is faster

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.needed, self.spare, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.needed(x) + 1e-3 * self.spare(x))

    torch.manual_seed(0)
    net, x = Spare().eval(), torch.randn(256, 64)
    found = lamina.calibrate(net, x, outputs=lamina.Categorical())
    parameters = sum(p.numel() for p in net.parameters())
    plan = lamina.make_plan(net, x, lamina.Parameters(0.8 * parameters), data=found, never_slower=False)
    assert list(plan.decomposed) == ["spare"]
    nats, lost = plan.layers["spare"].nats, plan.nats
    assert nats is not None and nats > 0 and lost == pytest.approx(nats)  # one layer loses nothing together
    assert f"predicted loss: {lost:.2g} nats an item" in str(plan)
    assert plan.factors.calibration == found.identity
    assert lamina.make_plan(net, x, lamina.Parameters(0.8 * parameters), never_slower=False).factors.calibration is None


def test_a_budget_prices_a_convolution_in_groups_by_the_moments_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine.instead(monkeypatch)

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.needed, self.spare = (nn.Conv2d(64, 64, 3, padding=1, groups=2) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.needed(x) + 1e-3 * self.spare(x)
            return y

    torch.manual_seed(0)
    net, x = Spare().eval(), torch.randn(64, 64, 5, 4)
    found = lamina.calibrate(net, x, outputs=lamina.Gaussian())
    parameters = sum(p.numel() for p in net.parameters())
    plan = lamina.make_plan(net, x, lamina.Parameters(0.8 * parameters), data=found, never_slower=False)
    assert list(plan.decomposed) == ["spare"]
    planned, layer = plan.layers["spare"], walk(net).layers["spare"]
    groups = found.layers["spare"].metric().of_groups(2)
    size = sum(own.error(W) for own, W in zip(groups, layer.weight.detach().chunk(2), strict=True))
    assert planned.loss is not None and planned.nats == pytest.approx(planned.loss * size / 2)  # it has no curve
    assert not any("left dense" in note or "patches" in note for note in plan.notes)
    small = lamina.decompose(net, plan, found)
    with torch.no_grad():
        assert float((small(x) - net(x)).norm() / net(x).norm()) < 1e-2


def test_layers_that_the_calibration_does_not_know_are_left_dense_and_that_is_said() -> None:
    net = model()
    found = lamina.calibrate(net, DATA, skip=["0"])
    plan = lamina.make_plan(net, DATA[:8], lamina.Parameters(0.7 * lamina.count(net, DATA[:8]).parameters), data=found)
    assert not plan.layers["0"].decomposed
    assert "left dense, as the calibration knows nothing of them: 0" in plan.notes


class Branches(nn.Module):
    """Two equal layers side by side, the one on inputs a thousand times as large; the answers know the other's gradient alone.

    With ``deaf`` no gradient can be had of it.
    """

    def __init__(self, deaf: bool = False) -> None:
        super().__init__()
        self.seen, self.blind, self.head, self.deaf = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10), deaf
        self.blind.load_state_dict(self.seen.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.deaf):
            y: torch.Tensor = self.head(self.seen(x) + 1e-3 * self.blind(1e3 * x).detach())
        return y


ROWS = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
WITHOUT = {
    "none asked for": (False, None, None),
    "none to be had": (True, lamina.Categorical(), "no gradients can be computed"),
}


@pytest.mark.parametrize(("deaf", "outputs", "warned"), WITHOUT.values(), ids=WITHOUT)
def test_without_gradients_losses_are_shares_of_the_layers_outputs_and_nothing_is_called_nats(
    monkeypatch: pytest.MonkeyPatch, deaf: bool, outputs: lamina.Categorical | None, warned: str | None
) -> None:
    Machine.instead(monkeypatch)
    torch.manual_seed(0)
    net = Branches(deaf).eval()
    with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
        found = lamina.calibrate(net, ROWS, outputs=outputs)
    survey = Survey.of(net, ROWS, lamina.Inference(), [], [])
    own = Prices(survey, TimingTable(None), found)
    assert own.price("seen", 0.1) == own.price("blind", 0.1) == Prices(survey, TimingTable(None)).price("seen", 0.1)
    parameters = sum(p.numel() for p in net.parameters())
    only = {"include": ["seen", "blind"], "never_slower": False}
    plan = lamina.make_plan(net, ROWS, lamina.Parameters(0.6 * parameters), data=found, **only)  # type: ignore[arg-type]
    assert set(plan.decomposed) == {"seen", "blind"} and plan.nats is None
    small = lamina.decompose(net, plan, found)
    for name, layer in plan.decomposed.items():
        assert layer.nats is None and layer.loss_of == "output" and layer.loss is not None
        inputs = found.layers[name].inputs()
        W, after = (torch.as_tensor(each.get_submodule(name).weight).detach().double() for each in (net, small))
        share = ((W - after) @ inputs @ (W - after).T).trace() / (W @ inputs @ W.T).trace()
        assert layer.loss == pytest.approx(float(share), rel=0.05)
    assert "outputs of layers: the layers decomposed lose" in " ".join(str(plan).split()) and "nats" not in str(plan)
    assert "the calibration knows the inputs alone of seen, blind, and no gradients" in " ".join(str(plan).split())


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> tuple[Branches, lamina.Calibration]:
    Machine.instead(monkeypatch)
    torch.manual_seed(0)
    net = Branches().eval()
    with pytest.warns(UserWarning, match="blind is reached by no gradient"):
        return net, lamina.calibrate(net, ROWS, outputs=lamina.Categorical())


def test_a_layer_that_no_gradient_reaches_stays_dense_in_a_budget_beside_others_that_are_reached(
    half: tuple[Branches, lamina.Calibration],
) -> None:
    net, found = half
    parameters = sum(p.numel() for p in net.parameters())
    plan = lamina.make_plan(net, ROWS, lamina.Parameters(0.7 * parameters), data=found, never_slower=False)
    assert "seen" in plan.decomposed and "blind" not in plan.decomposed and plan.nats is not None
    assert "left dense, as no gradient reaches them: blind" in plan.notes


def test_by_a_ratio_it_is_decomposed_and_what_the_answers_lose_is_not_known(
    half: tuple[Branches, lamina.Calibration],
) -> None:
    net, found = half
    plan = lamina.make_plan(net, ROWS, lamina.Ratio(2), data=found, rule=lamina.AtRatio())
    seen, blind = plan.layers["seen"], plan.layers["blind"]
    assert seen.loss_of == "answers" and seen.nats is not None and blind.loss_of == "output" and blind.nats is None
    assert plan.nats is None and f"predicted loss: not known, by calibration {found.identity[:8]}" in plan.summary()
    assert any("the inputs alone of blind, and no gradients" in note for note in plan.notes)


def test_what_a_calibration_knows_less_of_layers_that_are_decomposed_is_said_and_of_others_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Machine.instead(monkeypatch)
    net, images = decaying(), torch.randn(3, 3, 8, 8)
    geometry = Survey.of(net, X, lamina.Inference(), [], []).layers["body.0"].geometry
    found = lamina.calibrate(net, iter([images]), memory=Shape(geometry, True, True).bytes, skip=["head"])  # to be read once
    forms = {"rule": lamina.AtRatio(), "data": found}
    body = lamina.make_plan(net, X, lamina.Ratio(2), include=["body.0", "head"], **forms).notes  # type: ignore[arg-type]
    assert [note.partition(":")[0] for note in body] == [
        "the calibration knows nothing of head",
        "the calibration knows channels and not patches of body.0",
        "nothing is held out in the calibration, to choose a damping by",
    ]
    whole = lamina.calibrate(net, torch.randn(64, 3, 8, 8))
    assert not lamina.make_plan(net, X, lamina.Ratio(2), rule=lamina.AtRatio(), data=whole).notes
    assert not lamina.make_plan(net, X, lamina.Ratio(2), data=found, skip=["*"]).notes


def test_a_layer_that_is_known_along_directions_is_named_where_it_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine.instead(monkeypatch)
    net = decaying()
    geometry = Survey.of(net, X, lamina.Inference(), [], []).layers["body.0"].geometry
    found = lamina.calibrate(net, torch.randn(64, 3, 8, 8), memory=Shape(geometry, True, True).bytes)  # three quarters of it
    assert found.layers["body.0"].record.directions
    plan = lamina.make_plan(net, X, lamina.Ratio(2), rule=lamina.AtRatio(), data=found, include=["body.0", "head"])
    (note,) = plan.notes
    assert note.startswith("the calibration knows patches of body.0 along some directions of the channels alone")
    assert not lamina.make_plan(net, X, lamina.Ratio(2), rule=lamina.AtRatio(), data=found, include=["head"]).notes


def fits_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Form]]:
    """Layers and forms as they are fitted to tell a loss."""
    fits: list[tuple[str, Form]] = []

    def noted(layer: Layer, forms: Sequence[Form], metric: Metric | None = None) -> dict[Form, float]:
        fits.extend((layer.name, form) for form in forms if needs_fit(form))
        return losses(layer, forms, metric)

    monkeypatch.setattr(room, "losses", noted)
    return fits


def alike() -> nn.Sequential:
    """A narrow layer, and two wider ones with the same weights."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(16, width, 3, padding=1) for width in (16, 24)), *(nn.Conv2d(24, 24, 3) for _ in range(2)))
    net[3].load_state_dict(net[2].state_dict())
    return net.eval()


def test_before_a_form_is_chosen_only_one_of_its_structure_is_fitted_in_the_narrowest_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits, own = fits_of(monkeypatch), prices(alike(), None)
    for name in reversed(own.survey.layers):
        assert all(0 <= loss <= 1 for loss in own.of(name, candidates(own.survey.layers[name].geometry)).values())
    assert fits and {name for name, _ in fits} == {"0"}
    assert len({form.structure for _, form in fits}) == len(fits)


def test_a_guess_is_the_fit_of_a_layer_of_the_same_weights_and_geometry() -> None:
    own = prices(alike(), None)
    form = next(form for form in candidates(own.survey.layers["2"].geometry) if needs_fit(form))
    before = own.of("3", [form])[form]
    fitted = own.fitted("2", form)
    assert own.of("3", [form])[form] == pytest.approx(fitted) and before != pytest.approx(fitted)
    assert own.fitted("3", form) == pytest.approx(fitted)


def test_a_plan_fits_no_form_twice_and_every_form_in_groups_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine.instead(monkeypatch)
    fits = fits_of(monkeypatch)
    plan = lamina.make_plan(decaying(), X, lamina.Speedup(4), timings=TimingTable(None))
    taken = {(name, layer.form) for name, layer in plan.decomposed.items() if needs_fit(layer.form)}
    assert taken and len(fits) == len(set(fits)) and taken <= set(fits)
