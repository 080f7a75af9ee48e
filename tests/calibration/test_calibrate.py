"""`lamina.calibrate`: moments are those of their definition, whatever the network and the data; the network is only read."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.checkpoint import checkpoint

import lamina
from lamina.calibration import passes, recorder, sums
from lamina.calibration.calibrate import calibrate as calibrate_function
from lamina.calibration.calibration import DAMPING
from lamina.calibration.damping import GRID, Pair, held_out_losses
from lamina.factorize.metric import Metric

DOUBLE = {"dtype": torch.float64}


def network() -> nn.Module:
    """Convolutions of both ways, norms, in-place activations, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6),
        nn.ReLU(inplace=True), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7),
    ).eval()  # fmt: skip


def weighted(y: Tensor) -> Tensor:
    """A loss with a gradient that differs from item to item, and no chance in it."""
    return (y.sin() * torch.linspace(1, 2, y[0].numel(), dtype=y.dtype, device=y.device).view(y.shape[1:])).sum()


def by_definition(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = weighted) -> dict[str, tuple[Tensor, ...]]:
    """H of patches or features, G and the mean input for each layer, from tensors that are kept whole."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def keep(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> Tensor:
                output = output.clone()
                output.retain_grad()
                kept.setdefault(name, []).append((args[0].detach().clone(), output))
                return output.clone()

            handles.append(module.register_forward_hook(keep))
    loss(model(x)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = {}
    for name, calls in kept.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            how = module.kernel_size, module.dilation, module.padding, module.stride
            rows = [F.unfold(a, *how).mT.flatten(0, 1) for a, _ in calls]
            grads = [g.grad.movedim(1, -1).flatten(0, -2) for _, g in calls]
        else:
            rows, grads = [a.flatten(0, -2) for a, _ in calls], [g.grad.flatten(0, -2) for _, g in calls]
        X, g = torch.cat(rows).double(), torch.cat(grads).double()
        found[name] = X.T @ X / len(x), g.T @ g / len(g), X.mean(0)
    return found


def assert_by_definition(found: lamina.Calibration, wanted: dict[str, tuple[Tensor, ...]], **tolerance: float) -> None:
    assert found.layers.keys() == wanted.keys()
    for name, (H, G, mean) in wanted.items():
        moments = found.layers[name]
        for got, want in ((moments.inputs(), H), (moments.gradients(), G), (moments.mean(), mean)):
            assert got is not None
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_every_layer_has_the_moments_of_their_definition() -> None:
    model, x = network().double(), torch.randn(10, 3, 9, 8, **DOUBLE)
    assert_by_definition(lamina.calibrate(model, x, outputs=weighted), by_definition(model, x))


def test_float32_networks_have_them_to_their_rounding() -> None:
    model, x = network(), torch.randn(10, 3, 9, 8)
    found, exact = lamina.calibrate(model, x, outputs=weighted), by_definition(model.double(), x.double())
    for name, (H, G, _) in exact.items():
        for got, want in ((found.layers[name].inputs(), H), (found.layers[name].gradients(), G)):
            assert (got - want).norm() < 1e-5 * want.norm(), name


def test_how_the_data_are_divided_into_batches_changes_nothing() -> None:
    model, x = network().double(), torch.randn(24, 3, 9, 8, **DOUBLE)
    whole = lamina.calibrate(model, [x], outputs=weighted)
    pairs = [(part, torch.zeros(len(part))) for part in x.split([7, 1, 9, 4, 3])]
    for data in (x, pairs, iter(pairs), [{"input": x}], lamina.Workload(x), [lamina.Workload((x,))]):
        found = lamina.calibrate(model, data, outputs=weighted)
        assert found.samples == 24
        for name, moments in found.layers.items():
            torch.testing.assert_close(moments.inputs(), whole.layers[name].inputs())
            torch.testing.assert_close(moments.gradients(), whole.layers[name].gradients())
            torch.testing.assert_close(moments.mean(), whole.layers[name].mean())


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pair, Pair]]:
    """What dampings were judged by: the moments fitted to and those held out, of each layer."""
    seen: list[tuple[Pair, Pair]] = []

    def look(W: Tensor, fitted: Pair, held_out: Pair) -> Tensor:
        seen.append((fitted, held_out))
        return held_out_losses(W, fitted, held_out)

    monkeypatch.setattr(passes, "held_out_losses", look)
    return seen


def test_every_fourth_batch_is_held_out_and_of_fewer_batches_every_fourth_item(judged: list[tuple[Pair, Pair]]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(20, 3, **DOUBLE)
    number = torch.arange(20)
    for data, out in ((x.split(2), number // 2 % 4 == 3), ([x], number % 4 == 3), (x.split(9), number % 4 == 3)):
        found = lamina.calibrate(model, data, outputs=lambda y: y.square().sum() / 2)
        assert found.held_out == int(out.sum())
        for pair, rows in zip(judged.pop(), (x[~out], x[out]), strict=True):
            torch.testing.assert_close(pair.inputs, rows.T @ rows)
            g = model[0](rows).detach()
            torch.testing.assert_close(pair.gradients, g.T @ g)
        torch.testing.assert_close(found.layers["0"].inputs(), x.T @ x / 20)


def test_what_is_held_out_of_a_convolution_is_its_moment_of_channels(judged: list[tuple[Pair, Pair]]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double(), torch.randn(16, 3, 6, 6, **DOUBLE)
    for memory in (2e9, 3e3):  # patches, and channels alone
        found = lamina.calibrate(model, x, outputs=weighted, memory=memory)
        assert found.layers["0"].taps == (9 if memory > 1e4 else None)
        for pair, rows in zip(judged.pop(), (x[torch.arange(16) // 4 != 3], x[torch.arange(16) // 4 == 3]), strict=True):
            H, G, _ = by_definition(model, rows)["0"]
            torch.testing.assert_close(pair.inputs, len(rows) * H.view(3, 9, 3, 9).diagonal(dim1=1, dim2=3).mean(-1))
            torch.testing.assert_close(pair.gradients, len(rows) * 36 * G)


def test_without_a_held_out_item_it_is_said_and_the_damping_is_the_usual_one() -> None:
    found = lamina.calibrate(nn.Sequential(nn.Linear(3, 2)), torch.randn(3, 3), outputs=None)
    assert found.held_out == 0 and "nothing is held out" in str(found)
    assert found.layers["0"].damping == DAMPING


def test_the_damping_is_the_one_that_loses_least_of_what_is_held_out(judged: list[tuple[Pair, Pair]]) -> None:
    chosen = set()
    for items in (20, 20, 200, 200, 2000, 2000):
        model, x = nn.Sequential(nn.Linear(24, 16)), torch.randn(items, 24) * torch.logspace(0, -2.5, 24)
        damping = lamina.calibrate(model, x, tolerance=None).layers["0"].damping
        losses = dict(zip(GRID, held_out_losses(model[0].weight, *judged.pop()).tolist(), strict=True))
        assert losses[damping] == min(losses.values()) < max(losses.values())
        chosen.add(damping)
    assert len(chosen) > 1


def test_a_metric_is_damped_by_what_the_held_out_items_chose_and_by_another_number_where_it_is_asked_for() -> None:
    model, x = nn.Sequential(nn.Linear(24, 16)), torch.randn(20, 24)
    moments = lamina.calibrate(model, x, outputs=lamina.Gaussian()).layers["0"]
    assert moments.damping in GRID and moments.damping != DAMPING
    W = torch.randn(16, 24)
    assert moments.metric().error(W) == moments.metric(moments.damping).error(W) != moments.metric(DAMPING).error(W)


def test_a_layer_whose_change_costs_nothing_has_the_usual_damping() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[2].weight.zero_()
    moments = lamina.calibrate(model, torch.randn(16, 4, **DOUBLE)).layers
    assert moments["0"].damping == DAMPING


# ---- what the moments are for ----


@pytest.mark.parametrize("outputs", [lamina.Categorical(), lamina.Gaussian()])
def test_of_one_kind_of_item_they_price_a_change_as_the_divergence_that_it_causes(outputs: Any) -> None:
    """With items all alike the Kronecker product is no approximation; what is left is the noise of the drawn answers."""
    model, items = nn.Sequential(nn.Linear(4, 5)).double(), 4096
    x = torch.randn(1, 4, **DOUBLE).expand(items, -1)
    moments = lamina.calibrate(model, x.split(512), outputs=outputs, tolerance=None).layers["0"]
    H, G = moments.inputs(), moments.gradients()
    torch.testing.assert_close(H, x[0, :, None] * x[0])
    for _ in range(5):
        change = 1e-3 * torch.randn(5, 4, **DOUBLE)
        priced = (G @ change @ H @ change.T).trace() / 2
        y = model(x)
        measured = outputs.divergence(y, y + x @ change.T).mean()
        assert priced.item() == pytest.approx(measured.item(), rel=0.12)  # √(2 / 4096) is 0.02


def test_of_one_linear_layer_they_are_the_exact_fisher_information() -> None:
    """F = E[x xᵀ ⊗ (diag p − p pᵀ)] for the classes of a linear layer, here with the same p for all x."""
    model, p = nn.Sequential(nn.Linear(3, 4)).double(), torch.tensor([0.5, 0.25, 0.15, 0.1], **DOUBLE)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(p.log())
    x = torch.randn(8192, 3, **DOUBLE)
    moments = lamina.calibrate(model, x.split(512), outputs=lamina.Categorical(), tolerance=None).layers["0"]
    exact = torch.kron(p.diag() - p[:, None] * p, x.T @ x / len(x))
    assert (torch.kron(moments.gradients(), moments.inputs()) - exact).norm() < 0.03 * exact.norm()


def test_positions_of_an_item_are_summed_in_the_inputs_and_averaged_in_the_gradients() -> None:
    """So that T independent positions price a change T times as dear as one does."""
    model, T = nn.Sequential(nn.Linear(3, 4)).double(), 6
    x = torch.randn(3, **DOUBLE).expand(1024, T, -1)
    outputs = lamina.Categorical(dim=-1)
    moments = lamina.calibrate(model, x.split(128), outputs=outputs, tolerance=None).layers["0"]
    change = 1e-3 * torch.randn(4, 3, **DOUBLE)
    priced = (moments.gradients() @ change @ moments.inputs() @ change.T).trace() / 2
    measured = outputs.divergence(model(x), model(x) + x @ change.T).mean()
    assert priced.item() == pytest.approx(measured.item(), rel=0.12)
    assert moments.rows == 1024 * T


# ---- networks ----


class Twice(nn.Module):
    """One layer called twice, on unlike shapes, one never, and one whose output no answer depends on by a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.cut, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x).tanh()
        x = x + self.shared(input=torch.stack([x, -x], 1)).sum(1)
        with torch.no_grad():
            more = self.cut(x)
        return self.last(x + more)


def test_a_layer_called_twice_adds_up_and_what_is_not_called_or_reached_is_said() -> None:
    model, x = Twice().double(), torch.randn(12, 4, **DOUBLE)
    with pytest.warns(UserWarning) as warned:
        found = lamina.calibrate(model, x, outputs=weighted)
    assert [str(w.message) for w in warned] == list(found.notes)
    assert found.notes == (
        "idle is never called on these data: no moments",
        "cut is reached by no gradient: moments of inputs alone",
    )
    h = model.shared(x).tanh()
    calls = torch.cat([x, h, -h])
    torch.testing.assert_close(found.layers["shared"].inputs(), calls.T @ calls / 12)
    assert found.layers["shared"].rows == 36 and found.layers["cut"].gradients() is None
    y = model.shared(x)
    first = y.detach().clone().requires_grad_()
    second = model.shared(torch.stack([first.tanh(), -first.tanh()], 1)).detach().requires_grad_()
    out = first.tanh() + second.sum(1)
    out = out + model.cut(out).detach()
    g_first, g_second = torch.autograd.grad(weighted(model.last(out)), [first, second])
    # Through the second call the first one's output matters too.
    (through,) = torch.autograd.grad(
        model.shared(torch.stack([first.tanh(), -first.tanh()], 1)), first, g_second, retain_graph=True
    )
    g = torch.cat([g_first + through, g_second.flatten(0, 1)])
    torch.testing.assert_close(found.layers["shared"].gradients(), g.T @ g / 36)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda t: self.first(t).tanh(), x, use_reentrant=False))


def test_what_a_backward_runs_again_is_counted_once() -> None:
    model, x = Checkpointed().double(), torch.randn(12, 4, **DOUBLE)
    found = lamina.calibrate(model, x, outputs=weighted)
    h = model.first(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(weighted(model.second(h.tanh())), h)
    torch.testing.assert_close(found.layers["first"].inputs(), x.T @ x / 12)
    torch.testing.assert_close(found.layers["first"].gradients(), g.T @ g / 12)


def test_modules_whose_fast_path_reads_weights_are_called_all_the_same() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(8, 5, 8)
    found = lamina.calibrate(model, x)
    assert {"layers.0.linear1", "layers.1.linear2"} <= found.layers.keys()
    assert all(moments.gradients() is not None and moments.rows == 40 for moments in found.layers.values())
    padding = torch.zeros(8, 5, dtype=torch.bool)
    padding[:, 3:] = True
    data = [{"src": x, "src_key_padding_mask": padding}]
    found = lamina.calibrate(model, data)
    assert all(moments.gradients() is not None and moments.rows == 40 for moments in found.layers.values())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_mask_leaves_out_positions_and_without_one_padding_counts() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head((self.inner(x) * mask[..., None]).sum(1))

    model, x = Masked().double(), torch.randn(8, 5, 3, **DOUBLE)
    mask = (torch.arange(5) < torch.arange(8)[:, None] % 4 + 1).long()
    data = [{"x": x, "mask": mask}]
    for name, keep in (("mask", mask.bool()), (None, torch.ones(8, 5, dtype=torch.bool))):
        moments = lamina.calibrate(model, data, outputs=weighted, mask=name).layers["inner"]
        torch.testing.assert_close(moments.inputs(), x[keep].T @ x[keep] / 8)
        assert moments.rows == int(keep.sum())
    with pytest.raises(lamina.ExampleError, match="no keyword argument attention_mask"):
        lamina.calibrate(model, data, mask="attention_mask")


def no_grad(model: nn.Module) -> nn.Module:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return Closed()


class Numpy(nn.Module):
    """Leaves PyTorch, and comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.inner(x).numpy() * 2)


class Spoilt(nn.Module):
    """Overwrites what a backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        y = h.exp()
        result = y * 2
        y.zero_()
        return result


NO_BACKWARD = {"no_grad": lambda: no_grad(nn.Linear(4, 3)), "numpy": Numpy, "overwritten": Spoilt}


@pytest.mark.parametrize("make", NO_BACKWARD.values(), ids=NO_BACKWARD)
def test_without_a_backward_there_are_moments_of_inputs_alone_and_it_is_said(make: Callable[[], nn.Module]) -> None:
    model, x = make().double(), torch.randn(12, 4, **DOUBLE)
    with pytest.warns(UserWarning, match="no gradients can be computed"):
        found = lamina.calibrate(model, x)
    moments = found.layers["inner"]
    torch.testing.assert_close(moments.inputs(), x.T @ x / 12)
    assert moments.gradients() is None and moments.rows == 12 and found.outputs is None
    assert found.converged is not None and "moments of inputs alone" in str(found)


def test_asked_for_inputs_alone_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lamina.calibrate(network(), torch.randn(8, 3, 9, 8), outputs=None)
    assert all(moments.gradients() is None for moments in found.layers.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_the_moments_of_their_own_values(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), torch.randn(16, 3, 9, 8, dtype=dtype)
    found = lamina.calibrate(model, x, outputs=weighted)
    rows = F.unfold(x.double(), 3, padding=1).mT.flatten(0, 1)
    torch.testing.assert_close(found.layers["0"].inputs(), rows.T @ rows / 16, rtol=1e-5, atol=1e-4)
    for name, (H, G, _) in by_definition(model.double(), x.double()).items():
        for got, want in ((found.layers[name].inputs(), H), (found.layers[name].gradients(), G)):
            assert got.dtype == torch.float64 and (got - want).norm() < 0.1 * want.norm(), name


def test_gradients_below_what_float16_holds_are_not_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(8, 4)
    wanted = lamina.calibrate(model, x, outputs=lambda y: 1e-8 * weighted(y)).layers["0"].gradients()
    found = lamina.calibrate(model.half(), x.half(), outputs=lambda y: 1e-8 * weighted(y.float())).layers["0"].gradients()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_under_autocast_the_network_runs_in_its_type_and_the_sums_do_not() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)), torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = lamina.calibrate(model, x, outputs=weighted)
    torch.testing.assert_close(found.layers["0"].inputs(), x.double().T @ x.double() / 64, rtol=1e-5, atol=1e-5)
    h = model[0](x).to(torch.bfloat16).double()
    assert (found.layers["1"].inputs() - h.T @ h / 64).norm() < 1e-2 * h.norm() ** 2 / 64


def test_where_float32_products_are_rounded_float64_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    add = sums.Sums.add_inputs
    monkeypatch.setattr(recorder, "exact_products", lambda device: False)
    monkeypatch.setattr(sums.Sums, "add_inputs", lambda self, x, *rest: (seen.append(x.dtype), add(self, x, *rest))[1])
    lamina.calibrate(network(), torch.randn(8, 3, 9, 8))
    assert set(seen) == {torch.float64}


def test_channels_last_changes_nothing() -> None:
    model, x = network().double(), torch.randn(8, 3, 9, 8, **DOUBLE)
    wanted = by_definition(model, x)
    last = model.to(memory_format=torch.channels_last)
    assert_by_definition(lamina.calibrate(last, x.contiguous(memory_format=torch.channels_last), outputs=weighted), wanted)


def test_one_item_without_a_batch_dimension_of_its_own_layer_is_read() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(item) for item in x]).mean((2, 3))

    model, x = Single().double(), torch.randn(8, 3, 5, 5, **DOUBLE)
    rows = F.unfold(x, 3).mT.flatten(0, 1)
    found = lamina.calibrate(model, x, outputs=weighted).layers["conv"]
    torch.testing.assert_close(found.inputs(), rows.T @ rows / 8)
    assert found.rows == len(rows) and found.gradients().isfinite().all()


# ---- the network is only read ----


class Stateful(nn.Module):
    """Draws, drops out, moves its statistics and counts; trained half way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        x = self.body(x) + torch.rand(()) + random.random() + np.random.rand()
        return self.head(x.float().mean((2, 3)))


def state(model: nn.Module) -> Any:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        model.seen, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.is_grad_enabled(),
    )  # fmt: skip


def assert_as_before(before: Any, model: nn.Module) -> None:
    torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def stateful() -> nn.Module:
    model = Stateful().train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.bias.requires_grad_(False)
    return model


def test_the_network_is_as_before_and_was_run_in_eval_mode(stateful: nn.Module) -> None:
    before = state(stateful)
    one = lamina.calibrate(stateful, torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert_as_before(before, stateful)
    other = lamina.calibrate(stateful, torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert one.identity == other.identity  # nothing was dropped out, and the same answers drawn


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("where", ["data", "outputs"])
def test_the_network_is_as_before_after_an_exception_too(stateful: nn.Module, where: str, error: type[BaseException]) -> None:
    def data() -> Iterator[Tensor]:
        for _ in range(5):
            yield torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        raise error

    def outputs(y: Tensor) -> Tensor:
        raise error

    before = state(stateful)
    with pytest.raises(error):
        if where == "data":
            lamina.calibrate(stateful, data())
        else:
            lamina.calibrate(stateful, torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), outputs=outputs)
    assert_as_before(before, stateful)


def test_inside_inference_mode_on_its_tensors_and_under_no_grad() -> None:
    model, x = network().double(), torch.randn(8, 3, 9, 8, **DOUBLE)
    wanted = by_definition(model, x)
    with torch.inference_mode():
        assert_by_definition(lamina.calibrate(model, x.clone(), outputs=weighted), wanted)
    with torch.no_grad():
        assert_by_definition(lamina.calibrate(model, x, outputs=weighted), wanted)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_by_definition(lamina.calibrate(model, x.requires_grad_(), outputs=weighted), wanted)
    assert x.grad is None


def test_weights_that_a_shadow_cannot_stand_for_get_no_gradients() -> None:
    away = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: away(output))
    lamina.calibrate(model, torch.randn(8, 4))
    assert away.weight.grad is None and model[0].weight.grad is None


def test_hooks_of_the_users_own_that_change_inputs_and_outputs_are_respected() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(8, 4, **DOUBLE)
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, output: output.mul_(3))
    found = lamina.calibrate(model, x, outputs=lambda y: y.sum()).layers["0"]
    torch.testing.assert_close(found.inputs(), 4 * x.T @ x / 8)
    torch.testing.assert_close(found.gradients(), torch.full((3, 3), 9.0, **DOUBLE))


# ---- memory ----


def test_moments_that_do_not_fit_at_once_are_made_in_passes_and_are_the_same() -> None:
    model, x = network().double(), torch.randn(16, 3, 9, 8, **DOUBLE)
    whole = lamina.calibrate(model, x.split(4), outputs=weighted)
    parted = lamina.calibrate(model, x.split(4), outputs=weighted, memory=30_000)
    assert whole.record.passes == 1 and parted.record.passes > 1
    assert list(parted.layers) == list(whole.layers)
    for name, moments in parted.layers.items():
        assert moments.taps == whole.layers[name].taps
        assert moments.damping == whole.layers[name].damping
        torch.testing.assert_close(moments.inputs(), whole.layers[name].inputs())
        torch.testing.assert_close(moments.gradients(), whole.layers[name].gradients())


def test_shuffled_loaders_give_every_pass_the_same_order() -> None:
    model, x = network().double(), torch.randn(32, 3, 9, 8, **DOUBLE)
    loader = torch.utils.data.DataLoader(list(x), batch_size=2, shuffle=True)
    whole, parted = (lamina.calibrate(model, loader, outputs=weighted, memory=m, tolerance=9.0) for m in (2e9, 30_000))
    assert parted.record.passes > 1 and whole.samples == parted.samples == 16
    for name, moments in parted.layers.items():
        torch.testing.assert_close(moments.inputs(), whole.layers[name].inputs())
        assert moments.damping == whole.layers[name].damping


def test_a_layer_whose_patches_exceed_the_memory_has_the_mean_over_the_taps_of_their_moment() -> None:
    model, x = network().double(), torch.randn(16, 3, 9, 8, **DOUBLE)
    whole, thin = (lamina.calibrate(model, x, outputs=weighted, memory=memory) for memory in (2e9, 16_000))
    patches, channels = whole.layers["2"], thin.layers["2"]
    assert (patches.taps, channels.taps) == (9, None) and "known by patches along 2 directions" in str(thin)
    H = patches.inputs().view(4, 9, 4, 9).diagonal(dim1=1, dim2=3).mean(-1)
    torch.testing.assert_close(channels.inputs(), H)
    torch.testing.assert_close(channels.mean(), patches.mean().view(4, 9).mean(1))
    metrics = [Metric.of(m.inputs(), m.gradients(), taps=m.taps) for m in (patches, channels)]
    assert [metric.patches is None for metric in metrics] == [False, True]


def test_of_data_that_come_only_once_the_patches_that_fit_are_kept_and_it_is_said() -> None:
    model, x = network(), torch.randn(16, 3, 9, 8)
    found = lamina.calibrate(model, iter(x.split(4)), memory=30_000)
    assert found.record.passes == 1
    assert {name: m.taps for name, m in found.layers.items()} == {"0": 9, "2": None, "5": None, "8": None}
    assert "or data that can be iterated more than once" in " ".join(found.notes)


def test_no_more_than_the_memory_is_planned_for_the_sums_of_a_pass() -> None:
    from lamina.calibration.sums import plan_passes
    from lamina.network.walk import walk

    geometries = {name: layer.geometry for name, layer in walk(network()).layers.items()}
    for memory in (8_000, 12_000, 20_000, 50_000, 1e6):
        planned = plan_passes(geometries, True, memory, again=True)
        assert all(sum(shape.bytes for shape in each.values()) <= 0.75 * memory for each in planned)
        assert sorted(name for each in planned for name in each) == sorted(geometries)


def test_what_a_layer_is_said_to_take_is_what_it_takes() -> None:
    from lamina.calibration.sums import Shape, Sums
    from lamina.network.walk import walk

    for layer in walk(network()).layers.values():
        for patches in (False, True):
            shape = Shape(layer.geometry, patches and layer.geometry.taps > 1, True)
            sums = Sums(shape, torch.device("cpu"), 2**20)
            held = [*sums.tensors(), sums.scatter.Z, sums.gradient_scatter.Z]
            assert 0.95 * sum(t.nbytes for t in held) <= shape.bytes <= 1.5 * sum(t.nbytes for t in held)


def held_by_tensors() -> int:
    """Bytes of all tensors that there are in this process; those of a trace that is still there have none."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.layout == torch.strided]
    without = (nn.parameter.UninitializedTensorMixin, FakeTensor, FunctionalTensor)
    tensors = [each for each in tensors if not isinstance(each, without)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


@pytest.mark.parametrize("memory", [2e9, 3e4])
def test_of_what_layers_are_fed_and_of_gradients_nothing_is_kept_from_one_batch_to_the_next(
    memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    end = passes._end

    def noted(recorder: Any, batch: Any) -> None:
        end(recorder, batch)
        if batch.number >= 9:  # of the data themselves the first 128 items are kept, and whole networks run on them
            held.append(held_by_tensors())

    monkeypatch.setattr(passes, "_end", noted)
    batches = (torch.randn(16, 3, 9, 8) for _ in range(14))
    found = lamina.calibrate(network(), batches, memory=memory, tolerance=None)
    assert found.samples == 14 * 16 and (found.layers["2"].taps is None) == (memory < 1e9)
    assert len(held) == 5 and set(held) == {held[0]}


# ---- when it is enough ----


def test_it_stops_once_every_moment_has_converged_and_not_before() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4).expand(100, -1)
    found = lamina.calibrate(model, x.split(1), outputs=lambda y: y.sum())  # all batches alike
    assert found.samples == 8 and found.converged and found.layers["0"].input_error == pytest.approx(0, abs=1e-6)
    found = lamina.calibrate(model, x.split(1), outputs=lambda y: y.sum(), tolerance=None)
    assert found.samples == 100 and found.converged is None
    noisy = torch.randn(100, 4)
    found = lamina.calibrate(model, noisy.split(1), outputs=lamina.Gaussian())
    assert found.samples == 100 and found.converged is False and found.largest_error[2] > 0.02
    assert "not converged" in str(found)


def test_the_error_told_falls_with_the_root_of_the_batches() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(4096, 4)
    few, many = (lamina.calibrate(model, x[:n].split(4), tolerance=None).layers["0"] for n in (256, 4096))
    for what in ("input_error", "gradient_error"):
        assert getattr(few, what) / getattr(many, what) == pytest.approx(4, rel=0.5)


# ---- wrong use ----


class Poisoned(nn.Module):
    """Its second layer is fed infinities for one item, or its first one gets NaN gradients."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second, self.where = nn.Linear(4, 4), nn.Linear(4, 3), where

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h / (x[:, :1] != 7) if self.where == "inputs" else h + 0 * (h * (x[:, :1] == 7)).abs().sqrt()
        return self.second(h)


@pytest.mark.parametrize(("where", "name"), [("inputs", "second"), ("gradients", "first")])
def test_what_is_not_finite_names_the_layer_and_the_batch(where: str, name: str) -> None:
    data = [torch.ones(2, 4) for _ in range(6)]
    data[4][1, 0] = 7
    if where == "gradients":  # that of √|0| is infinite, and there is a 0 in every batch but those of sevens
        data = [torch.full((2, 4), 7.0)] * 4 + [torch.ones(2, 4)]
    with pytest.raises(
        lamina.CalibrationError,
        match=rf"^{name}: its {where} hold NaN or infinities in batch 4 of the data; leave that batch out",
    ):
        lamina.calibrate(Poisoned(where), data)


def test_nan_in_the_data_names_the_first_layer() -> None:
    x = torch.randn(8, 3, 9, 8)
    x[5, 0, 0, 0] = torch.nan
    with pytest.raises(lamina.CalibrationError, match=r"^0: its inputs hold NaN"):
        lamina.calibrate(network(), x.split(2))


def test_dead_channels_and_fewer_items_than_channels_give_finite_factors_without_denormals() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 40), nn.ReLU(),
        nn.Linear(40, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[5:9], model[0].bias[5:9] = 0, -1
    x = torch.randn(6, 3, 6, 6)
    found = lamina.calibrate(model, x, outputs=lamina.Categorical())
    assert not found.layers["2"].inputs().view(32, 9, 32, 9)[5:9].any()
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio(), data=found)
    small = lamina.decompose(model, plan, found)
    assert plan.layers["2"].decomposed and plan.layers["5"].decomposed
    for name, factor in small.state_dict().items():
        assert factor.isfinite().all() and factor.abs().max() < 1e3, name
        assert not ((factor != 0) & (factor.abs() < torch.finfo(factor.dtype).tiny)).any(), name


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an empty list": (lambda: lamina.calibrate(network(), []), lamina.ExampleError, "hold no batch"),
    "an empty generator": (lambda: lamina.calibrate(network(), iter([])), lamina.ExampleError, "hold no batch"),
    "an empty loader": (
        lambda: lamina.calibrate(network(), torch.utils.data.DataLoader([])), lamina.ExampleError, "hold no batch"
    ),
    "an empty tensor": (lambda: lamina.calibrate(network(), torch.zeros(0, 3, 9, 8)), lamina.ExampleError, "without items"),
    "a path": (lambda: lamina.calibrate(network(), "images"), lamina.ExampleError, "the data are a str"),
    "a number": (lambda: lamina.calibrate(network(), 3), lamina.ExampleError, "the data are a int"),
    "of other shapes": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 9)), lamina.ExampleError, "does not run on the data"
    ),
    "no layers": (lambda: lamina.calibrate(nn.ReLU(), [torch.ones(2)]), lamina.CalibrationError, "no layer of the network"),
    "only others": (
        lambda: lamina.calibrate(nn.Conv2d(4, 4, 3, groups=4), [torch.ones(2)]), lamina.CalibrationError, "it is depthwise"
    ),
    "no such layer": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), include=["conv*"]), lamina.PlanError, "matches no layer"
    ),
    "a number for a network": (lambda: lamina.calibrate(3, torch.zeros(4, 9)), lamina.LaminaError, "3 is no network"),
    "patterns of numbers": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), include=[1]), lamina.PlanError, "include is "
    ),
    "no patterns": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), skip=None), lamina.PlanError, "skip is None"
    ),
    "all skipped": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), skip=["*"]), lamina.CalibrationError, "nothing to do"
    ),
    "no memory": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), memory=0), lamina.CalibrationError, "memory is 0"
    ),
    "memory in words": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), memory="2GB"), lamina.CalibrationError, "memory is '2GB'"
    ),
    "too little": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), memory=1000), lamina.CalibrationError, "raise memory"
    ),
    "too little for once": (
        lambda: lamina.calibrate(network(), iter([torch.zeros(4, 3, 9, 8)]), memory=6000),
        lamina.CalibrationError, "more than once",
    ),
    "a tolerance of nothing": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), tolerance=0), lamina.CalibrationError, "tolerance is 0"
    ),
    "a mask that is none": (
        lambda: lamina.calibrate(network(), torch.zeros(4, 3, 9, 8), mask=torch.ones(2)), lamina.CalibrationError, "mask is"
    ),
    "no values": (
        lambda: lamina.calibrate(network().to("meta"), torch.zeros(4, 3, 9, 8)), lamina.CalibrationError, "on the meta device"
    ),
    "maps as classes": (
        lambda: lamina.calibrate(nn.Conv2d(3, 4, 1), torch.zeros(4, 3, 9, 8), outputs=lamina.Categorical()),
        lamina.CalibrationError, "say which dimension",
    ),
    "a lazy layer": (
        lambda: lamina.calibrate(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)), torch.zeros(4, 3)), lamina.LayerError, "lazy"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_calibrated_is_one_line(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_data_that_reach_no_layer_are_an_error() -> None:
    model = Twice()
    with pytest.raises(lamina.ExampleError, match="no layer of the network is called on the data"):
        lamina.calibrate(model, torch.randn(8, 4), include=["idle"])


def test_a_later_batch_that_the_network_does_not_run_on_is_an_error() -> None:
    data = [torch.randn(2, 3, 9, 8) for _ in range(5)] + [torch.randn(2, 9)]
    with pytest.raises(lamina.ExampleError, match="2×9"):
        lamina.calibrate(network(), data)


def test_the_function_is_the_public_one() -> None:
    assert lamina.calibrate is calibrate_function
