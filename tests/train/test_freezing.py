"""Frozen means frozen: bits, optimizer state, gradients, activations; and a phase changes when and only when it should."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import lamina
from lamina import BlockTerm, FreezingError, LowRank, Separable, SequentialFreezing, VanillaFreezing, freeze
from lamina.layers.decomposed import DecomposedLayer
from lamina.schedules import Schedule
from lamina.train.freezing import Freezing

OUTER = ("body.reduce.weight", "body.expand.weight", "narrow.first.weight", "head.first.weight")
INNER = ("body.core.weight", "narrow.second.weight", "head.second.weight")
X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(8) % 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.body, self.narrow, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.narrow(F.relu(self.body(F.relu(self.norm(self.stem(x)))))).mean((2, 3)))
        return y


FORMS = {"body": BlockTerm(4, 5), "narrow": LowRank(3), "head": LowRank(2)}


@pytest.fixture
def net(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = Net()
    return lamina.decompose(model, planned(model, X, FORMS)).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), TARGET).backward()
        optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


# --- which weights rest


def test_the_groups_rest_in_turn_and_biases_norms_and_dense_layers_never(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing())
    for epoch in range(4):
        freezing.start_epoch(epoch)
        assert freezing.resting == ((OUTER, INNER)[epoch % 2])
        assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(freezing.resting)


def test_vanilla_freezing_lets_the_outer_factors_rest_throughout(net: nn.Module) -> None:
    freezing = freeze(net, VanillaFreezing())
    assert [(freezing.start_epoch(epoch), freezing.resting) for epoch in range(3)] == [(False, OUTER)] * 3


def test_excluded_layers_always_train(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing(exclude=("head", "narr*")))
    assert freezing.resting == OUTER[:2]
    assert freezing.start_epoch(1)
    assert freezing.resting == INNER[:1]


def test_a_block_term_whose_sides_are_whole_has_an_outer_group_without_factors(planned: Callable[..., lamina.Plan]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    small = lamina.decompose(model, planned(model, X, {"0": BlockTerm(None, 4), "1": BlockTerm(None, None)}))
    freezing = freeze(small, SequentialFreezing())
    assert freezing.resting == ("0.expand.weight",)
    assert freezing.start_epoch(1)
    assert freezing.resting == ("0.core.weight", "1.core.weight")


def test_of_a_separable_layer_the_two_directions_rest_in_turn(planned: Callable[..., lamina.Plan]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    freezing = freeze(lamina.decompose(model, planned(model, X, {"0": Separable(4)})), SequentialFreezing())
    assert freezing.resting == ("0.vertical.weight",)
    assert freezing.start_epoch(1) and freezing.resting == ("0.horizontal.weight",)


def test_what_did_not_train_before_never_does(net: nn.Module) -> None:
    net.body.core.weight.requires_grad_(False)
    net.norm.requires_grad_(False)
    freezing = freeze(net, SequentialFreezing())
    freezing.start_epoch(1)
    assert freezing.resting == INNER[1:]
    freezing.start_epoch(2)
    assert not net.body.core.weight.requires_grad and not net.norm.weight.requires_grad
    freezing.release()
    still = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert still == {"body.core.weight", "norm.weight", "norm.bias"}


def test_periods_in_steps_are_counted_over_epochs(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing(period=3, unit="steps"))
    changes = []
    for epoch in range(3):
        changes += [freezing.start_epoch(epoch)]
        changes += [freezing.step() for _ in range(2)]
    assert changes == [False, False, False, False, True, False, False, False, True]
    assert freezing.resting == OUTER and freezing.steps == 6


def test_the_last_epochs_train_everything(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing(unfrozen_last=1), epochs=3)
    assert [freezing.start_epoch(n) for n in range(3)] == [False, True, True]
    assert freezing.resting == () and all(p.requires_grad for p in net.parameters())
    assert freezing.phase == "all factors train"


def test_release_wakes_all_and_ends_it(net: nn.Module) -> None:
    freezing = freeze(net, VanillaFreezing())
    freezing.release()
    freezing.release()
    assert freezing.resting == () and all(p.requires_grad for p in net.parameters())
    for use in (freezing.step, lambda: freezing.start_epoch(1), lambda: freezing.load_state_dict(freezing.state_dict())):
        with pytest.raises(FreezingError, match="was released, or another"):
            use()


def test_a_second_freezing_takes_the_place_of_the_first(net: nn.Module) -> None:
    first = freeze(net, VanillaFreezing())
    second = freeze(net, SequentialFreezing(first="inner"))
    assert second.resting == INNER
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(INNER)
    with pytest.raises(FreezingError, match="took its place"):
        first.start_epoch(1)
    first.release()
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(INNER)


def test_a_copy_of_a_network_at_rest_can_be_frozen_anew(net: nn.Module) -> None:
    freezing = freeze(net, VanillaFreezing())
    other = freeze(copy.deepcopy(net), SequentialFreezing())
    assert other.resting == OUTER and other.start_epoch(1) and other.resting == INNER
    assert freezing.resting == OUTER and not freezing.step()


def test_freezing_a_network_does_not_show_in_its_state_dict(net: nn.Module) -> None:
    before = list(net.state_dict())
    freeze(net, SequentialFreezing())
    assert list(net.state_dict()) == before


# --- frozen means frozen

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "SGD nesterov foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "AdamW amsgrad foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, tuple[int, Any]]:
    """What an optimizer keeps for a parameter: each object's identity and a copy of its value."""
    kept = optimizer.state[parameter].items()
    return {key: (id(value), value.clone() if isinstance(value, Tensor) else value) for key, value in kept}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_over_a_phase_a_frozen_factors_bits_and_its_optimizer_state_stay(
    net: nn.Module, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    freezing = freeze(net, SequentialFreezing(first="inner"))
    parameters = dict(net.named_parameters())
    optimizer = make(freezing.parameter_groups())
    for epoch in range(4):  # in epochs 2 and 3, what goes to rest has state
        freezing.start_epoch(epoch)
        resting = set(freezing.resting)
        kept = {name: state_of(optimizer, parameters[name]) for name in resting}
        before = bits(net)
        train(net, optimizer)
        assert moved(net, before) == set(parameters) - resting
        for name in resting:
            assert parameters[name].grad is None
            after = state_of(optimizer, parameters[name])
            assert bool(after) == (epoch > 0)
            assert {key: i for key, (i, _) in after.items()} == {key: i for key, (i, _) in kept[name].items()}
            for key, (_, value) in after.items():
                torch.testing.assert_close(value, kept[name][key][1], rtol=0, atol=0)
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in net.named_parameters())


def test_a_gradient_of_zeros_would_not_do() -> None:
    """Why ``grad`` must be None: momentum and weight decay move a weight whose gradient is zero."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))


def test_the_clipped_norm_is_that_of_what_trains(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing())
    for epoch in range(3):  # two boundaries
        freezing.start_epoch(epoch)
        net.zero_grad()
        F.cross_entropy(net(X), TARGET).backward()
        trained = [p for name, p in net.named_parameters() if name not in freezing.resting]
        expected = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
        found = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        torch.testing.assert_close(found, expected)
        assert torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt() <= 1.001e-3


def test_what_goes_to_rest_drops_its_pending_gradient_and_what_trains_on_keeps_it(net: nn.Module) -> None:
    """Accumulation across a boundary, which is not how it is meant to be used."""
    freezing = freeze(net, SequentialFreezing(first="inner"))
    F.cross_entropy(net(X), TARGET).backward()
    halfway = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert set(OUTER) < set(halfway)
    freezing.start_epoch(1)
    assert all(dict(net.named_parameters())[name].grad is None for name in OUTER)
    F.cross_entropy(net(X), TARGET).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in net.named_parameters()} - set(OUTER)
    torch.testing.assert_close(gradients["norm.bias"], 2 * halfway["norm.bias"], rtol=1e-3, atol=1e-5)


def test_accumulating_within_a_phase_is_a_step_on_the_whole_batch(planned: Callable[..., lamina.Plan]) -> None:
    def trained(parts: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Net().eval()  # batch norm would tell the parts apart
        small = lamina.decompose(model, planned(model, X, FORMS)).double()
        freezing = freeze(small, SequentialFreezing(period=2, unit="steps"))
        optimizer = torch.optim.SGD(freezing.parameter_groups(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            for x, target in zip(X.double().chunk(parts), TARGET.chunk(parts), strict=True):
                (F.cross_entropy(small(x), target) / parts).backward()
            optimizer.step()
            freezing.step()
        return bits(small)

    whole, parts = trained(1), trained(4)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-10)


# --- what is saved, and compiled


def saved_inputs(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the factors whose input is kept for the backward. Every factor's input has a storage of its own here."""
    inputs: dict[int, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    held: list[Any] = []
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        held.append(tensor)
        return tensor

    real = lamina.layers.decomposed.run_factor

    def noted(factor: nn.Module, x: Tensor) -> Tensor:
        inputs[x.untyped_storage().data_ptr()] = names[id(factor)]
        held.append(x)
        return real(factor, x)

    lamina.layers.decomposed.run_factor = noted
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
    finally:
        lamina.layers.decomposed.run_factor = real
    return {name for pointer, name in inputs.items() if pointer in kept}


class Chain(nn.Module):
    """Layers one after the other with nothing between them that keeps an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 1)
        self.body, self.narrow, self.head = nn.Conv2d(48, 48, 3, padding=1), nn.Conv2d(48, 48, 1), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.narrow(self.body(self.stem(x))).mean((2, 3)))
        return y


def test_activations_of_frozen_factors_are_not_kept(
    planned: Callable[..., lamina.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.layers.frozen._WORTH_A_CALL", 0)
    model = Chain()
    small = lamina.decompose(model, planned(model, X, {"body": BlockTerm(24, 24), "narrow": LowRank(12), "head": LowRank(2)}))
    everything = {"body.reduce", "body.core", "body.expand", "narrow.first", "narrow.second", "head.first", "head.second"}
    assert saved_inputs(small, X) == everything
    freezing = freeze(small, SequentialFreezing())
    for epoch in (0, 1):
        freezing.start_epoch(epoch)
        assert saved_inputs(small, X) == everything - {name.removesuffix(".weight") for name in freezing.resting}


def test_compiled_there_are_two_graphs_however_many_epochs(net: nn.Module) -> None:
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    freezing = freeze(compiled, SequentialFreezing())
    optimizer = torch.optim.SGD(freezing.parameter_groups(), lr=0.01, momentum=0.9)
    for epoch in range(6):
        freezing.start_epoch(epoch)
        before = bits(net)
        train(compiled, optimizer, 1)
        assert moved(net, before) == {name for name, _ in net.named_parameters()} - set(freezing.resting)
        assert len(graphs) == min(epoch + 1, 2)


# --- optimizers


def test_parameter_groups_hold_all_that_ever_trains_and_decay_weights_alone(net: nn.Module) -> None:
    net.norm.weight.requires_grad_(False)
    freezing = freeze(net, SequentialFreezing())
    names = {id(p): name for name, p in net.named_parameters()}
    for decay in (0.1, None):
        groups = freezing.parameter_groups(weight_decay=decay, lr=0.3)
        assert all(group["lr"] == 0.3 for group in groups)
        found = [({names[id(p)] for p in group["params"]}, group.get("weight_decay")) for group in groups]
        biases = {"norm.bias", "body.expand.bias", "narrow.second.bias", "head.second.bias"}
        rest = [({"stem.weight"}, 0.1), (biases, 0.0)] if decay else [({"stem.weight", *biases}, None)]
        assert found == [(set(OUTER), decay), (set(INNER), decay), *rest]


def test_an_optimizer_over_the_network_passes_the_check(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing())
    freezing.check(torch.optim.SGD(net.parameters(), lr=0.1))
    freezing.check(torch.optim.SGD(freezing.parameter_groups(weight_decay=0.1), lr=0.1))
    rest = [*net.narrow.parameters(), *net.head.parameters()]
    freezing.check(torch.optim.SGD(net.body.parameters(), lr=0.1), torch.optim.SGD(rest, lr=0.1))


def test_fused_sgd_with_momentum_is_refused_where_it_would_stumble_at_the_first_change(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    with pytest.raises(FreezingError, match=r"SGD fails where a part.*fused.*parameter_groups\(\)"):
        freezing.check(optimizer)
    train(net, optimizer)
    freezing.start_epoch(1)
    with pytest.raises(TypeError):  # what the check spares the user
        train(net, optimizer)
    freezing.check(torch.optim.SGD(freezing.parameter_groups(), lr=0.1, momentum=0.9, fused=True))
    freezing.check(torch.optim.SGD(net.parameters(), lr=0.1, fused=True))


def test_an_optimizer_with_stale_parameters_is_named(planned: Callable[..., lamina.Plan]) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    small = lamina.decompose(model, planned(model, X, FORMS), inplace=True)
    freezing = freeze(small, SequentialFreezing())
    with pytest.raises(FreezingError, match=r"not of this network \(number 3 of group 0, of shape \(8, 8, 3, 3\)\)"):
        freezing.check(optimizer)
    with pytest.raises(FreezingError, match=r"\(body.weight of group 0"):
        freezing.check(named)


def test_an_optimizer_without_the_resting_factors_is_named(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing())
    with pytest.raises(FreezingError, match=r"^body.reduce.weight is not in the optimizer.*parameter_groups"):
        freezing.check(torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1))


# --- whoever takes over


def test_a_second_freezing_wakes_all_that_the_first_put_to_rest_and_the_first_refuses_to_go_on(net: nn.Module) -> None:
    first = freeze(net, VanillaFreezing())
    second = freeze(net, SequentialFreezing(exclude=("head",)))
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(second.resting) == set(OUTER[:3])
    held = {id(p) for group in second.parameter_groups() for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    first.release()  # does nothing any more
    assert second.resting == OUTER[:3] and not net.body.reduce.weight.requires_grad
    with pytest.raises(FreezingError, match="took its place"):
        first.step()
    second.release()
    assert all(p.requires_grad for p in net.parameters())


def test_a_refused_second_freezing_leaves_the_first_in_force(net: nn.Module) -> None:
    first = freeze(net, VanillaFreezing())
    with pytest.raises(FreezingError):
        freeze(net, VanillaFreezing(exclude=("*",)))
    first.start_epoch(1)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(OUTER)


def test_what_somebody_else_turned_is_put_right_at_the_next_step(net: nn.Module) -> None:
    freezing = freeze(net, VanillaFreezing())
    net.requires_grad_(True)
    assert freezing.step() and not freezing.step()
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(OUTER)


def test_a_freezing_goes_where_a_trainer_stands_that_counts_by_itself(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing(period=2, unit="steps"), epochs=3)
    assert freezing.go_to(1, 6) and freezing.resting == INNER
    assert not freezing.go_to(2, 7) and (freezing.epoch, freezing.steps) == (2, 7)
    for epoch in (-1, 3):
        with pytest.raises(FreezingError, match=f"no epoch {epoch}"):
            freezing.go_to(epoch, 8)
    assert (freezing.epoch, freezing.steps) == (2, 7)


PARAMETRISED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrization": nn.utils.parametrizations.weight_norm,
    "weight norm": nn.utils.weight_norm,
    "pruned": lambda module: nn.utils.prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", PARAMETRISED.values(), ids=PARAMETRISED)
def test_a_factor_whose_weight_is_computed_is_refused_unless_its_layer_is_excluded(
    net: nn.Module, change: Callable[[nn.Module], Any]
) -> None:
    change(net.head.first)
    with pytest.raises(FreezingError, match=r"^head.first.weight is no parameter but computed"):
        freeze(net, VanillaFreezing())
    assert freeze(net, VanillaFreezing(exclude=("head",))).resting == OUTER[:3]


# --- resuming

STANDS = [SequentialFreezing(period=2, unit="steps", first="inner"), SequentialFreezing(unfrozen_last=2), VanillaFreezing()]


@pytest.mark.parametrize("schedule", STANDS, ids=str)
@pytest.mark.parametrize("stop", [0, 3, 5, 11])
def test_a_freezing_goes_on_where_another_stood(net: nn.Module, schedule: Schedule, stop: int) -> None:
    def phases(freezing: Freezing, begin: int) -> Iterator[tuple[str, ...]]:
        for number in range(begin, 12):
            if number % 3 == 0:
                freezing.start_epoch(number // 3)
            yield freezing.resting
            freezing.step()

    whole = list(phases(freeze(copy.deepcopy(net), schedule, epochs=4), 0))
    stopped = freeze(copy.deepcopy(net), schedule, epochs=4)
    assert [one for _, one in zip(range(stop), phases(stopped, 0), strict=False)] == whole[:stop]
    if stop:
        stopped.step()  # the generator was left before its step
    resumed = freeze(net, schedule, epochs=4)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.state_dict() == stopped.state_dict()
    assert list(phases(resumed, stop)) == whole[stop:]


def test_the_state_of_another_schedule_is_refused_and_nothing_changes(net: nn.Module) -> None:
    state = freeze(copy.deepcopy(net), VanillaFreezing()).state_dict()
    freezing = freeze(net, SequentialFreezing())
    freezing.start_epoch(1)
    for wrong, message in ((state, "followed another schedule"), ({"epoch": 1}, "not the state of a freezing")):
        with pytest.raises(FreezingError, match=message):
            freezing.load_state_dict(wrong)
    assert freezing.epoch == 1 and freezing.resting == INNER


# --- wrappers and refusals


def test_names_are_the_networks_own_inside_every_wrapper(net: nn.Module) -> None:
    compiled_inside = copy.deepcopy(net)
    compiled_inside.body = torch.compile(compiled_inside.body, backend="eager")
    for wrapped in (torch.compile(net, backend="eager"), nn.DataParallel(net), compiled_inside):
        freezing = freeze(wrapped, SequentialFreezing(exclude=("head",)))
        assert freezing.resting == OUTER[:3]


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "nothing decomposed": (lambda net: freeze(Net(), SequentialFreezing()), "nothing in this network is decomposed"),
    "no schedule": (lambda net: freeze(net, "sequential"), "a schedule is lamina.SequentialFreezing"),  # type: ignore[arg-type]
    "a pattern for nobody": (
        lambda net: freeze(net, VanillaFreezing(exclude=("haed",))),
        "'haed' matches no layer.*did you mean head",
    ),
    "all excluded": (lambda net: freeze(net, VanillaFreezing(exclude=("*",))), "all excluded"),
    "nothing trains": (lambda net: freeze(net.requires_grad_(False), VanillaFreezing()), "no factor of it requires a gradient"),
    "unfrozen, but when": (lambda net: freeze(net, SequentialFreezing(unfrozen_last=1)), "pass epochs="),
    "an epoch too many": (lambda net: freeze(net, VanillaFreezing(), epochs=3).start_epoch(3), "no epoch 3.*below 3"),
    "an epoch before all": (lambda net: freeze(net, VanillaFreezing()).start_epoch(-1), "no epoch -1"),
}


@pytest.mark.parametrize(("use", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(net: nn.Module, use: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(FreezingError, match=message) as caught:
        use(net)
    assert "\n" not in str(caught.value)


def test_a_refused_freezing_leaves_the_network_as_it_was(net: nn.Module) -> None:
    with pytest.raises(FreezingError):
        freeze(net, SequentialFreezing(exclude=("nobody",)))
    assert all(p.requires_grad for p in net.parameters())


def test_a_freezing_says_where_it_stands(net: nn.Module) -> None:
    freezing = freeze(net, SequentialFreezing())
    freezing.start_epoch(3)
    assert str(freezing) == "sequential freezing every epoch, outer first: inner factors rest in epoch 3, 3 weights"


def test_every_decomposed_layer_has_each_factor_in_one_group(net: nn.Module) -> None:
    for layer in net.modules():
        if isinstance(layer, DecomposedLayer):
            outer, inner = layer.factor_groups()
            assert sorted(map(id, [*outer, *inner])) == sorted(map(id, layer.factors()))
