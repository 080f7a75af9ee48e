"""Fits in sequence: each layer on what it now gets, kept where less is lost on inputs held out; found again, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lamina
from lamina import BlockTerm, ExampleError, LaminaError, LayerError, LowRank, PlanError, sequential
from lamina.calibration import ranks
from lamina.decomposition import plan_of
from lamina.sequential import shift


def chain() -> nn.Sequential:
    """Five layers of which the inner three lose much at a rank of five."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(24, 24), nn.GELU())]
    for layer in layers[::2]:
        layer.weight.data *= 2.5
    return nn.Sequential(*layers[:-1]).eval()


def inputs(seed: int = 1, batches: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(9)) / 5
    return [torch.randn(32, 24, generator=generator) @ mixing for _ in range(batches)]


LAYERS = {"2": LowRank(5), "4": LowRank(5), "6": LowRank(5)}


def wrong(model: nn.Module, small: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((small(x) - model(x)).square().sum() for x in data))


def test_of_a_chain_of_layers_far_less_is_lost_on_inputs_that_no_fit_has_seen(planned: Any) -> None:
    model, data, fresh = chain(), inputs(), inputs(2)
    plan, found = planned(model, data[0], LAYERS), lamina.calibrate(model, data, tolerance=None)
    one_by_one, in_sequence = lamina.decompose(model, plan, found), lamina.decompose(model, plan, found, sequential=data)
    assert wrong(model, in_sequence, fresh) < 0.8 * wrong(model, one_by_one, fresh)
    changed = [
        not torch.equal(one_by_one.get_submodule(name).composed(), in_sequence.get_submodule(name).composed())
        for name in LAYERS
    ]
    assert changed[1:] == [True, True]  # the first one gets what it always got


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.ConvTranspose2d(8, 8, 3, stride=2),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(200, 6),
    )


def images(seed: int = 0, items: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(items, 3, 6, 6, generator=generator) for _ in range(12)]


FORMS = {"0": BlockTerm(2, 4), "4": BlockTerm(4, 4), "5": BlockTerm(4, 4), "6": LowRank(4), "8": LowRank(3)}


@pytest.fixture
def ready(planned: Any) -> tuple[nn.Module, lamina.Plan, lamina.Calibration, list[Tensor]]:
    model, data = network().eval(), images()
    return model, planned(model, data[0], FORMS), lamina.calibrate(model, data, tolerance=None), data


@given(st.integers(0, 2**31), st.sampled_from([(3, ()), (2, (2,)), (2, (1, 3))]), st.floats(1e-6, 1.0))
def test_what_is_fitted_to_is_the_regression_of_the_answers_on_what_comes_in(
    seed: int, sizes: tuple[int, tuple[int, ...]], damping: float
) -> None:
    # oracle: ridge regression of W x on x̂, drawn towards W, by NumPy's least squares on stacked rows
    I, kernel = sizes
    rng = np.random.default_rng(seed)
    n = I * int(np.prod(kernel, dtype=int))
    x = rng.standard_normal((40, n))
    now = x @ (np.eye(n) + 0.3 * rng.standard_normal((n, n))) + 0.1 * rng.standard_normal((40, n))
    W = rng.standard_normal((4, n))
    H, C = now.T @ now, x.T @ now
    ridge = damping * np.trace(H) / n
    rows = np.vstack([now, np.sqrt(ridge) * np.eye(n)])
    answers = np.vstack([x @ W.T, np.sqrt(ridge) * W.T])
    expected = np.linalg.lstsq(rows, answers, rcond=None)[0].T
    found = torch.from_numpy(W).view(4, I, *kernel)
    found = found + shift(found, torch.from_numpy(C), torch.from_numpy(H), damping)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-7 * np.abs(expected).max() / damping**0.5)


def test_moments_of_channels_shift_every_tap_alike() -> None:
    torch.manual_seed(0)
    W, x = torch.randn(4, 3, 2, 2).double(), torch.randn(50, 3).double()
    now = x + 0.2 * torch.randn(50, 3).double()
    found = shift(W, x.T @ now, now.T @ now, 1e-3)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(found[..., i, j], shift(W[..., i, j], x.T @ now, now.T @ now, 1e-3))


def test_inputs_that_have_not_changed_shift_nothing() -> None:
    H = torch.randn(5, 9).double()
    H = H.T @ H  # of fewer inputs than channels
    assert torch.equal(shift(torch.randn(4, 9), H, H, 1e-3), torch.zeros(4, 9).double())


def test_at_full_rank_it_is_exact(ready: Any, planned: Any) -> None:
    model, _, found, data = ready
    forms = {"0": BlockTerm(3, 8), "4": BlockTerm(8, 8), "5": BlockTerm(8, 8), "6": LowRank(8), "8": LowRank(6)}
    small = lamina.decompose(model, planned(model, data[0], forms), found, sequential=data)
    torch.testing.assert_close(small(data[0]), model(data[0]), atol=1e-4, rtol=1e-4)


def test_no_layer_loses_more_on_what_is_held_out_and_they_are_what_changes(ready: Any) -> None:
    model, plan, found, data = ready
    before, after = lamina.decompose(model, plan, found), lamina.decompose(model, plan, found, sequential=data)
    held_out = data[3::4]
    for name in FORMS:
        # The network as it was when this layer was fitted: layers behind it do not matter to what it gets and answers.
        put_back = copy.deepcopy(after)
        put_back.set_submodule(name, copy.deepcopy(before.get_submodule(name)))
        assert loss_of(model, after, name, held_out, found) <= loss_of(model, put_back, name, held_out, found) * (1 + 1e-5)
    unfitted = {n: t for n, t in after.state_dict().items() if n.partition(".")[0] not in FORMS or n.endswith("bias")}
    torch.testing.assert_close(unfitted, {n: before.state_dict()[n] for n in unfitted}, atol=0, rtol=0)


@torch.no_grad()
def loss_of(model: nn.Module, small: nn.Module, name: str, data: list[Tensor], found: lamina.Calibration) -> float:
    """E ‖G^½ (y − ŷ)‖² of a layer, by hooks of our own."""
    metric = found.layers[name].metric()
    total = 0.0
    for x in data:
        answers: list[Tensor] = []
        for net in (model, small):
            handle = net.get_submodule(name).register_forward_hook(lambda _, __, y, into=answers: into.append(y))
            net(x)
            handle.remove()
        apart = (answers[0] - answers[1]).double()
        total += float((metric.gradients.root @ apart.movedim(1, 0).flatten(1)).square().sum())
    return total


def test_the_same_is_found_again_and_the_plan_remembers_what_on(ready: Any, tmp_path: Path) -> None:
    model, plan, found, data = ready
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    small = lamina.decompose(model, plan, found, sequential=data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    fit = plan_of(small).factors.sequential
    assert fit is not None and fit.after < fit.before
    assert f"fitted in sequence: {fit.before:.2g} → {fit.after:.2g} nats of divergence an item held out" in str(plan_of(small))
    lamina.save(small, tmp_path / "out")
    again = lamina.decompose(model, lamina.Plan.load(tmp_path / "out" / "plan.json"), found, sequential=data)
    assert plan_of(again) == plan_of(small)
    torch.testing.assert_close(again.state_dict(), small.state_dict(), atol=0, rtol=0)
    loaded = lamina.load(network(), tmp_path / "out")
    torch.testing.assert_close(loaded.state_dict(), small.state_dict(), atol=0, rtol=0)


def test_where_the_answers_come_no_nearer_all_factors_stay(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, found, data = ready
    monkeypatch.setattr(sequential, "shift", lambda W, C, H, damping: 5 * torch.randn_like(W.double()))
    monkeypatch.setattr(sequential, "_size", lambda wrong, channels, root: -float(wrong.square().sum()))  # the worst is kept
    before, after = lamina.decompose(model, plan, found), lamina.decompose(model, plan, found, sequential=data)
    torch.testing.assert_close(after.state_dict(), before.state_dict(), atol=0, rtol=0)
    fit = plan_of(after).factors.sequential
    assert fit is not None and fit.before == fit.after > 0


def test_a_form_set_by_hand_makes_a_plan_that_was_not_fitted_in_sequence(ready: Any) -> None:
    model, plan, found, data = ready
    changed = plan_of(lamina.decompose(model, plan, found, sequential=data)).with_form("8", LowRank(2))
    assert changed.factors.sequential is None
    lamina.decompose(model, changed, found)


def test_scores_of_other_factors_do_not_stand_in_its_plan(ready: Any) -> None:
    model, plan, found, data = ready
    scored = plan.model_copy(update={"scores": lamina.Scores(before=0.9, after=0.8)})
    small = lamina.decompose(model, scored, found, sequential=data)
    assert plan_of(small).scores is None
    kept = plan_of(small).model_copy(update={"scores": lamina.Scores(before=0.9, after=0.8)})
    assert plan_of(lamina.decompose(model, kept, found, sequential=data)).scores == kept.scores


WRONG: dict[str, tuple[Callable[[Any, Any], dict[str, Any]], type[Exception], str]] = {
    "no calibration": (
        lambda found, data: {"data": None, "sequential": data},
        PlanError,
        r"^layers are fitted in sequence with a calibration: pass one as data=$",
    ),
    "in place": (
        lambda found, data: {"data": found, "sequential": data, "inplace": True},
        LaminaError,
        r"^a fit in sequence compares with the original, which in place is gone: leave out inplace=True$",
    ),
    "yes": (lambda found, data: {"data": found, "sequential": True}, PlanError, r"^a bool holds no inputs: pass the batches"),
    "a calibration": (
        lambda found, data: {"data": found, "sequential": found},
        PlanError,
        r"^a Calibration holds no inputs: pass the batches that layers are fitted on as sequential=$",
    ),
    "an iterator": (
        lambda found, data: {"data": found, "sequential": iter(data)},
        ExampleError,
        "are gone through several times a layer: give a list or a loader, no iterator$",
    ),
    "three items": (
        lambda found, data: {"data": found, "sequential": [data[0][:3]]},
        ExampleError,
        r"^the data hold fewer than 4 items: every fourth is held out, and some must be left$",
    ),
    "nothing": (lambda found, data: {"data": found, "sequential": []}, ExampleError, "the data hold no batch"),
    "of another shape": (
        lambda found, data: {"data": found, "sequential": [torch.randn(4, 5, 6, 6)] * 4},
        ExampleError,
        "^the network does not run on the example",
    ),
    "not finite": (
        lambda found, data: {"data": found, "sequential": [x * torch.nan for x in data]},
        LayerError,
        r"^0: what it gets in a fit in sequence holds NaN or infinities: leave out sequential=$",
    ),
}


@pytest.mark.parametrize("given_", WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_said_in_a_line_and_nothing_has_changed(given_: Any, ready: Any) -> None:
    model, plan, found, data = ready
    arguments, kind, message = given_
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message) as caught:
        lamina.decompose(model, plan, **arguments(found, data))
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_a_plan_that_was_fitted_in_sequence_wants_the_same_inputs(ready: Any) -> None:
    model, plan, found, data = ready
    with_data = plan_of(lamina.decompose(model, plan, found, sequential=data))
    with pytest.raises(
        PlanError, match=r"^this plan's layers were fitted in sequence: pass what they were fitted on as sequen"
    ):
        lamina.decompose(model, with_data, found)
    with pytest.raises(
        PlanError, match=r"^this plan's layers were fitted in sequence on other inputs: pass those as sequential="
    ):
        lamina.decompose(model, with_data, found, sequential=data[::-1])


def test_factors_that_scored_better_by_the_weights_alone_are_where_it_begins(ready: Any) -> None:
    model, plan, found, data = ready
    alone = plan.model_copy(update={"factors": plan.factors.model_copy(update={"weights_alone": True})})
    before, after = lamina.decompose(model, alone), lamina.decompose(model, alone, found, sequential=data)
    fit = plan_of(after).factors.sequential
    assert fit is not None and fit.after < fit.before and plan_of(after).factors.weights_alone
    assert wrong(model, after, data[3::4]) < wrong(model, before, data[3::4])
    again = lamina.decompose(model, plan_of(after), found, sequential=data)
    torch.testing.assert_close(again.state_dict(), after.state_dict(), atol=0, rtol=0)


class Tied(nn.Module):
    """Calls one layer twice, and attends under a mask; a second branch is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.never = nn.Linear(12, 12)
        self.grouped = nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(self.embed(x).relu())
        x = x + self.attention(x, x, x, key_padding_mask=~mask)[0]
        return self.down(self.grouped(self.up(x).relu().mT).mT) * mask[..., None]


def test_layers_called_twice_projections_masks_groups_and_layers_that_are_never_called(planned: Any) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    data = [{"x": torch.randn(32, 5, 12), "mask": torch.arange(5) < torch.randint(2, 6, (32, 1))} for _ in range(12)]
    with pytest.warns(UserWarning):
        found = lamina.calibrate(model, data, tolerance=None, mask="mask")
    forms = {"embed": LowRank(4), "up": LowRank(6), "down": LowRank(6), "grouped": BlockTerm(8, 8)}
    forms |= {name: LowRank(5) for name in ("attention.in_proj.q", "attention.out_proj") if name in found.layers}
    plan = planned(model, data[0], forms)
    before, after = lamina.decompose(model, plan, found), lamina.decompose(model, plan, found, sequential=data)

    def lost(small: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((small(**x) - model(**x)).square().sum() for x in data[3::4]))

    assert lost(after) < lost(before)
    torch.testing.assert_close(after.grouped.state_dict(), before.grouped.state_dict(), atol=0, rtol=0)
    assert not torch.equal(after.down.composed(), before.down.composed())


def test_where_patches_take_too_much_memory_channels_do(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, found, data = ready
    monkeypatch.setattr(sequential, "_MEMORY", 5e3)
    before, after = lamina.decompose(model, plan, found), lamina.decompose(model, plan, found, sequential=data)
    assert wrong(model, after, data[3::4]) <= wrong(model, before, data[3::4]) * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_networks_of_other_precisions(planned: Any, dtype: torch.dtype) -> None:
    model, data = chain().to(dtype), [x.to(dtype) for x in inputs()]
    plan, found = planned(model, data[0], LAYERS), lamina.calibrate(model, data, tolerance=None)
    before, after = lamina.decompose(model, plan, found), lamina.decompose(model, plan, found, sequential=data)
    assert {p.dtype for p in after.parameters()} == {dtype}
    assert wrong(model, after, data[3::4]) < wrong(model, before, data[3::4])


def test_of_several_processes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "processes", lambda: 2)
    with pytest.raises(LaminaError, match="by one process: decompose there, save, and load in the others"):
        sequential.Inputs(nn.Linear(2, 2), [torch.randn(4, 2)])
