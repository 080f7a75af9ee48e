"""Trials on a shadow: what was exchanged is never read again, what is the network's own is never written."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from holders import READERS, VIEWERS, Calls, linear, snapshot
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lamina import LayerError
from lamina.network.memory import whole_place
from lamina.network.running import MODES
from lamina.network.trial import Outcome, forbid_use, modes_that_run, observed, prove, tried
from lamina.network.walk import Layer, walk
from lamina.values import Use, Workload

X = Workload(torch.randn(2, 4))


def other(layer: Layer) -> nn.Module:
    """A layer that takes this one's place."""
    return nn.Linear(layer.geometry.in_channels, layer.geometry.out_channels, bias=layer.geometry.bias)


def without(model: nn.Module, workload: Workload = X, **more: Any) -> Outcome:
    layers = walk(model).layers.values()
    gone = {layer.title: layer.parameter for layer in layers}
    return tried(model, workload, {layer.module: other(layer) for layer in layers}, gone, **more)


def proved(model: nn.Module, examples: list[Workload] | None = None, make: Callable[[Layer], nn.Module] = other) -> None:
    prove(model, list(walk(model).layers.values()), make, [X] if examples is None else examples, "decomposed")


class Failing(nn.Linear):
    """A layer that does not run in some modes."""

    def __init__(self, *fails: str) -> None:
        super().__init__(4, 4)
        self.fails = fails

    def forward(self, input: Tensor) -> Tensor:
        if mode(self.training) in self.fails:
            raise RuntimeError("not in this mode\nsecond line")
        return super().forward(input)


def mode(training: bool) -> str:
    if training:
        return "train"
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    return "eval" if torch.is_grad_enabled() else "eval + no_grad"


# What reads an exchanged weight.

readers = pytest.mark.parametrize("make", (READERS | VIEWERS).values(), ids=READERS | VIEWERS)


@readers
def test_whoever_reads_an_exchanged_weight_is_found(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        model(*X.args)
    assert without(model).still_used == ["fc"]


@readers
def test_whoever_reads_an_exchanged_weight_is_refused_by_name(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(LayerError, match=r"^fc: the network reads this layer's dense weight from another place"):
        proved(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", list(MODES))
def test_what_reads_an_exchanged_weight_in_one_mode_alone_is_found(name: str) -> None:
    weight = [nn.Linear(4, 4).weight]
    model = Calls(lambda s, x: s.fc(x) + weight[0].sum() if mode(s.training) == name else s.fc(x))
    weight[0] = model.fc.weight
    assert without(model).still_used == ["fc"]


@pytest.mark.parametrize(("first", "found"), [(4, []), (3, ["fc"])], ids=["beside it", "one row of it"])
def test_a_neighbour_in_the_same_storage_is_nobodys_business(first: int, found: list[str]) -> None:
    both = torch.randn(8, 4)
    rows = both[first : first + 4]
    model = Calls(lambda s, x: s.fc(x) + linear(x, rows))
    model.fc.weight = nn.Parameter(both[:4])
    assert without(model).still_used == found


def test_a_scripted_module_that_holds_an_exchanged_weight_is_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = nn.Linear(4, 4)
        scripted = torch.jit.script(inner)
    model = Calls(lambda s, x: s.fc(x) + scripted(x))
    model.fc.weight = inner.weight
    assert without(model).still_used == ["fc"]


def test_only_what_is_read_is_named_and_each_once() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    model = Calls(lambda s, x: s.fc(s.a(s.b(x))) + b.weight.sum())
    model.a, model.b = a, b
    assert without(model).still_used == ["b"]
    with pytest.raises(LayerError, match=r"^b: "):
        proved(model)


def test_an_exchanged_weight_that_is_given_by_keyword_is_found() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        torch.mul(torch.ones(4, 4), 2.0, out=self.held[0])
        y: Tensor = self.fc(x)
        return y

    model = Calls(run, lambda s: [s.fc.weight.detach()])
    before = snapshot(model)
    assert without(model).still_used == ["fc"] and snapshot(model) == before


def test_what_is_exchanged_but_not_gone_may_be_read() -> None:
    model = READERS["a list of weights"]()
    outcome = tried(model, X, {model.fc: nn.Linear(4, 4)})
    assert not outcome.still_used and not any(outcome.complaints.values())


def test_forbidding_names_the_first() -> None:
    forbid_use(Outcome())
    with pytest.raises(LayerError, match=r"^one: the network reads this layer's dense weight .*; skip it$"):
        forbid_use(Outcome(still_used=["one", "two"]))


# What is written.

WRITERS: dict[str, Callable[[Any], object]] = {
    "in place": lambda w: w.mul_(2.0),
    "out=": lambda w: torch.zeros(4, 4, out=w.detach()),
    "a foreach operation": lambda w: torch._foreach_mul_([torch.ones(1), w], 2.0),
    ".data": lambda w: w.data.fill_(3.0),
    "a view": lambda w: w[1].zero_(),
    "an item": lambda w: w.__setitem__(0, 1.0),
    "copy_": lambda w: w.copy_(torch.ones(4, 4)),
    "a random one": lambda w: nn.init.normal_(w),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_network_that_writes_into_its_own_parameters_writes_into_a_copy(write: Callable[[Any], object]) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(self.fc.weight)
        y: Tensor = self.fc(x)
        return y

    model = Calls(run)
    before = snapshot(model)
    outcome = tried(model, X)
    assert snapshot(model) == before
    assert outcome.complaints == dict.fromkeys(MODES)
    assert outcome.apart == {whole_place(model.fc.weight)}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_closure_that_writes_into_the_network_itself_is_not_let(write: Callable[[Any], object]) -> None:
    """A copy does not follow closures, so that this never ends well: the mode counts as one that does not run."""
    model = Calls(lambda s, x: s.fc(x))
    weight = model.fc.weight

    def run(_: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(weight)
        return x

    model.run = run
    before = snapshot(model)
    outcome = tried(model, X)
    assert snapshot(model) == before
    assert all("the network itself" in str(why) for why in outcome.complaints.values())


def test_a_network_that_swallows_the_refusal_to_write_does_not_run_either() -> None:
    model = Calls(lambda s, x: s.fc(x))
    weight = model.fc.weight

    def run(_: Any, x: Tensor) -> Tensor:
        try:
            weight.data.zero_()
        except Exception:
            return x
        return x

    model.run = run
    before = snapshot(model)
    assert all("the network itself" in str(why) for why in tried(model, X).complaints.values())
    assert snapshot(model) == before


def test_buffers_that_a_closure_holds_are_not_written_either() -> None:
    model = Calls(lambda s, x: s.fc(x))
    model.register_buffer("count", torch.zeros(1))
    count = model.count

    def run(_: Any, x: Tensor) -> Tensor:
        count.add_(1)
        return x

    model.run = run
    assert all(tried(model, X).complaints.values()) and count.item() == 0


def test_statistics_and_counts_of_the_shadow_are_free_to_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = snapshot(model)
    outcome = tried(model, X)
    assert not any(outcome.complaints.values()) and outcome.apart == frozenset()
    assert snapshot(model) == before


def test_a_network_that_renormalises_its_exchanged_layer_is_tried_too() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        self.norm.weight.data.clamp_(-1, 1)
        y: Tensor = self.norm(self.fc(x))
        return y

    model = Calls(run)
    model.norm = nn.LayerNorm(4)
    outcome = without(model)
    assert not any(outcome.complaints.values()) and outcome.apart == {whole_place(model.norm.weight)}


# How it is run.


def test_a_network_is_tried_in_each_mode_with_its_flag() -> None:
    seen: list[tuple[str, bool]] = []
    model = Calls(lambda s, x: seen.append((mode(s.training), s.fc.training)) or s.fc(x)).eval()  # type: ignore[func-returns-value]
    before = snapshot(model)
    assert tried(model, X).complaints == dict.fromkeys(MODES)
    assert seen == [(name, MODES[name][0]) for name in MODES] and snapshot(model) == before


def test_only_the_modes_that_are_asked_for_are_tried() -> None:
    outcome = tried(Calls(lambda s, x: s.fc(x)), X, modes=["eval", "train"])
    assert list(outcome.complaints) == ["eval", "train"]


def test_every_mode_and_every_trial_draws_the_same_random_numbers() -> None:
    drawn: list[float] = []
    model = Calls(lambda s, x: drawn.append(float(torch.rand(1))) or x)  # type: ignore[func-returns-value]
    state = torch.get_rng_state()
    tried(model, X)
    tried(model, X)
    assert len(drawn) == 2 * len(MODES) and len(set(drawn)) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_attempt_draws_the_same_random_numbers_too() -> None:
    """A network that takes gradients within its forward fails while nothing is kept for them, and is run once more."""
    drawn: list[float] = []

    def run(self: Any, x: Tensor) -> Tensor:
        drawn.append(float(torch.rand(1)))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.fc(x).square().sum(), x)
        return slope

    model = Calls(run)
    found = tried(model, X, modes=["train", "eval", "eval + no_grad"])
    assert found.complaints == {"train": None, "eval": None, "eval + no_grad": None}
    assert len(set(drawn)) == 1


def test_what_a_network_says_is_its_first_line() -> None:
    assert modes_that_run(nn.Sequential(Failing("eval")), X) == {
        "train": None,
        "eval": "RuntimeError: not in this mode",
        "eval + no_grad": None,
        "inference_mode": None,
    }


def test_one_sample_in_train_mode_is_no_surprise() -> None:
    found = modes_that_run(nn.BatchNorm1d(3), Workload(torch.randn(1, 3)))
    assert found["train"] is not None and found["eval"] is None


def test_the_context_of_a_run_is_open_in_each_mode_and_closed_after_errors() -> None:
    events: list[str] = []

    @contextmanager
    def within() -> Iterator[None]:
        events.append("in")
        try:
            yield
        finally:
            events.append("out")

    model = Calls(lambda s, x: events.append("run") or s.fc(x))  # type: ignore[func-returns-value]
    tried(model, X, within=within)
    assert events == ["in", "run", "out"] * 4
    events.clear()
    tried(nn.Sequential(Failing(*MODES)), X, modes=["inference_mode"], within=within)
    assert events == ["in", "out"] * 2, "once more, in case that the graph was missed"


def test_each_shadow_is_prepared_before_it_runs_and_never_the_network() -> None:
    prepared: list[nn.Module] = []
    model = Calls(lambda s, x: s.fc(x))
    tried(model, X, prepare=prepared.append)
    assert len(prepared) == 1 and prepared[0] is not model and type(prepared[0]) is Calls
    prepared.clear()

    def run(self: Any, x: Tensor) -> Tensor:
        self.fc.weight.data.mul_(2)
        y: Tensor = self.fc(x)
        return y

    tried(Calls(run), X, prepare=prepared.append)
    assert len(prepared) == 2, "once more with a copy of what is written"


def test_no_activation_outlives_the_operations_that_need_it() -> None:
    """The graph of a training step would keep each; here nothing follows that needs them."""
    kept: list[bool] = []

    def run(self: Any, x: Tensor) -> Tensor:
        activation = self.fc(x).exp()
        storage = StorageWeakRef(activation.untyped_storage())
        total: Tensor = (activation * activation).sum()
        del activation
        kept.append(not storage.expired())
        return total

    assert tried(Calls(run), X).complaints == dict.fromkeys(MODES)
    assert kept == [False] * len(MODES)


def test_outputs_are_not_kept() -> None:
    outputs: list[Any] = []

    def run(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        outputs.append(StorageWeakRef(y.untyped_storage()))
        return y

    model = Calls(run)
    outcome = tried(model, X)
    gc.collect()
    assert len(outputs) == 4 and all(ref.expired() for ref in outputs) and not any(outcome.complaints.values())


def test_a_lazy_network_is_refused_before_it_is_run() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(4))
    with pytest.raises(LayerError, match=r"^1: .*lazy.*run the network once"):
        tried(model, X)
    assert walk(model).refused.keys() == {"1"}


def test_a_network_that_cannot_be_copied_is_tried() -> None:
    model = Calls(lambda s, x: s.fc(x))
    model.lock = threading.Lock()
    assert not any(tried(model, X).complaints.values())
    with pytest.raises(LayerError, match=r"^fc: "):
        failing = READERS["a list of weights"]()
        failing.lock = threading.Lock()
        proved(failing)


# Proofs.


def test_a_network_that_gets_on_with_others_in_its_layers_places_is_let() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proved(model)
    assert snapshot(model) == before


def test_a_network_whose_code_asks_for_the_weight_of_the_new_layer_is_let() -> None:
    """By the layer, which is another one now: its weight is its own."""
    proved(Calls(lambda s, x: linear(x, s.fc.weight)))


@pytest.mark.parametrize("name", list(MODES))
def test_the_layer_without_which_a_mode_does_not_run_is_named_with_the_mode(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    made = {"0": nn.Linear(4, 4), "1": Failing(name), "2": nn.Linear(4, 4)}
    with pytest.raises(LayerError) as caught:
        proved(model, make=lambda layer: made[layer.name])
    wanted = f"1: with this layer decomposed the network does not run in {name}: RuntimeError: not in this mode; skip it"
    assert str(caught.value) == wanted


def test_the_first_culprit_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(LayerError, match=r"^1: .* in eval: "):
        proved(
            model, make=lambda layer: other(layer) if layer.name == "0" else Failing("train" if layer.name == "2" else "eval")
        )


def test_layers_that_break_a_network_only_together_are_refused_without_a_name() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if not isinstance(self.fc, nn.Identity) or not isinstance(self.also, nn.Identity):
            return x
        raise ValueError("both are gone")

    model = Calls(run)
    model.also = nn.Linear(4, 4)
    wanted = r"^with these layers decomposed the network does not run in train: ValueError: both are gone; the network is as it"
    with pytest.raises(LayerError, match=wanted):
        proved(model, make=lambda layer: nn.Identity())


def test_what_becomes_of_a_layer_stands_in_the_message() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LayerError, match="with this layer frozen the network does not run in train"):
        prove(model, list(walk(model).layers.values()), lambda _: Failing("train"), [X], "frozen")


def test_a_mode_in_which_the_network_never_ran_is_nobodys_fault() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Failing("train", "inference_mode"))
    layers = [layer for layer in walk(model).layers.values() if layer.name == "0"]
    prove(model, layers, lambda _: Failing("train", "inference_mode"), [X], "decomposed")
    with pytest.raises(LayerError, match=r"^0: .*in eval: "):
        prove(model, layers, lambda _: Failing("train", "eval"), [X], "decomposed")


def test_every_example_is_tried() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if len(x) == 3 and isinstance(self.fc, nn.Identity):
            raise RuntimeError("three")
        return y

    model = Calls(run)
    proved(model, [X, X], lambda layer: nn.Identity())
    with pytest.raises(LayerError, match=r"^fc: .*three"):
        proved(model, [X, Workload(torch.randn(3, 4))], lambda layer: nn.Identity())


def test_an_example_on_which_the_network_does_not_run_says_so_and_the_next_is_tried() -> None:
    model = READERS["a list of weights"]()
    bad = Workload(torch.randn(2, 7))
    with pytest.warns(UserWarning, match=r"does not run on inputs like the example's \(2×7\): RuntimeError.*compare outputs"):
        proved(Calls(lambda s, x: s.fc(x)), [bad])
    with pytest.warns(UserWarning, match="2×7"), pytest.raises(LayerError, match=r"^fc: "):
        proved(model, [bad, X])


def test_where_nothing_is_known_of_the_inputs_a_warning_says_that_nothing_was_proved() -> None:
    with pytest.warns(UserWarning, match=r"nothing is known of the network's inputs; so the network was not tried"):
        proved(READERS["a list of weights"](), [])


def test_a_layer_that_was_patched_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    proved(model)  # what goes into the layer is what it is compared on
    model[1].register_forward_pre_hook(lambda module, _: setattr(module, "bias", nn.Parameter(module.bias.detach() + 1)))
    before = snapshot(model)
    with pytest.raises(LayerError, match=r"^1: it does not compute what its weight, bias and attributes say.*; skip it$"):
        proved(model)
    assert snapshot(model) == before


# Looking on.


def test_only_the_layers_that_are_asked_for_are_observed_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    layers = walk(model).layers
    seen, outcome = observed(model, [layers["0"], layers["2"]], X)
    assert list(seen) == ["0", "2"] and outcome.complaints == {"eval + no_grad": None}
    assert seen["2"].uses == {Use((2, 4), (2, 4)): 1}


def test_the_calls_of_all_modes_are_counted_together() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen, _ = observed(model, walk(model).layers.values(), X, MODES)
    assert seen["0"].uses == {Use((2, 4), (2, 4)): 4}


def test_the_root_is_observed_under_its_empty_name() -> None:
    model = nn.Linear(4, 4)
    seen, _ = observed(model, walk(model).layers.values(), X)
    assert seen[""].uses == {Use((2, 4), (2, 4)): 1} and not model._forward_hooks


def test_a_network_tried_twice_for_its_writing_is_counted_once() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.fc.bias.data.mul_(1)
        return y

    model = Calls(run)
    seen, outcome = observed(model, walk(model).layers.values(), X)
    assert outcome.apart and seen["fc"].uses == {Use((2, 4), (2, 4)): 1}


def test_a_network_run_in_inference_mode_can_be_trained_afterwards() -> None:
    """A cache made in inference mode would stop autograd for good."""

    def run(self: Any, x: Tensor) -> Tensor:
        if self.held is None:
            self.held = torch.ones(4)
        y: Tensor = self.fc(x) * self.held
        return y

    model = Calls(run)
    modes_that_run(model, X)
    assert model.held is None
    model(*X.args).sum().backward()


def test_a_weight_computed_by_a_hook_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.utils.weight_norm(nn.Linear(4, 4))
    weight = model.weight
    modes_that_run(model, X)
    assert model.weight is weight and not weight.is_inference()


# Answers.


def answering(
    run: Callable[[Any, Tensor], Any], exact: Callable[[Layer], nn.Module], examples: Sequence[Workload] = (X,), layers: int = 2
) -> None:
    """Proves a network of some layers, of which the exact ones take the place for a moment."""
    model = Calls(run)
    for number in range(1, layers):
        setattr(model, f"more_{number}", nn.Linear(4, 4))
    with torch.no_grad():
        model.fc.weight.add_(torch.eye(4) * 8)  # so that answers are large
    before = snapshot(model)
    prove(model, list(walk(model).layers.values()), other, list(examples), "decomposed", exact)
    assert snapshot(model) == before


class Same(nn.Module):
    """Computes what a layer does, and is another type; or nearly what it does."""

    made = 0
    calls = 0

    def __init__(self, layer: Layer, off: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias, self.off = layer.parameter, layer.bias, 1 + off
        Same.made += 1

    def forward(self, x: Tensor) -> Tensor:
        Same.calls += 1
        return nn.functional.linear(x, self.weight, self.bias) * self.off


def is_dense(model: nn.Module) -> bool:
    return any(type(module) is nn.Linear for module in model.modules())


GOES_BY_TYPE: dict[str, Callable[[Any, Tensor], Any]] = {
    "a value": lambda s, x: s.fc(x) * (1.0 + (type(s.fc) is nn.Linear)),
    "the second value": lambda s, x: [s.fc(x), s.fc(x) * (1.0 + (type(s.fc) is nn.Linear))],
    "a small value beside a large one": lambda s, x: {"a": s.fc(x) * 1e6, "b": s.fc(x) * (1 + (type(s.fc) is nn.Linear))},
    "a value beside an infinite one": lambda s, x: torch.stack([s.fc(x), s.fc(x) / 0.0]) * (1 + (type(s.fc) is nn.Linear)),
    "how many": lambda s, x: [s.fc(x)] * (1 + (type(s.fc) is nn.Linear)),
    "a shape": lambda s, x: s.fc(x)[: 1 + (type(s.fc) is nn.Linear)],
    "a dtype": lambda s, x: s.fc(x).double() if type(s.fc) is nn.Linear else s.fc(x),
    "a number that is none": lambda s, x: s.fc(x) if type(s.fc) is nn.Linear else s.fc(x) * torch.nan,
    "an integer of another dtype": lambda s, x: torch.ones(1, dtype=torch.int if type(s.fc) is nn.Linear else torch.long),
}
EACH_HAS_ITS_OWN: dict[str, Callable[[Any, Tensor], Any]] = {
    "a value": lambda s, x: s.fc(x),
    "integers and booleans": lambda s, x: [s.fc(x), torch.tensor([type(s.fc) is nn.Linear]), torch.tensor(id(s.fc) % 7)],
    "infinities": lambda s, x: torch.stack([s.fc(x), torch.full_like(x, torch.inf)]),
    "no tensors": lambda s, x: [s.fc(x), type(s.fc).__name__],
    "sparse tensors": lambda s, x: (s.fc(x) * (1 + (type(s.fc) is nn.Linear))).to_sparse(),
    "tensors without values": lambda s, x: (s.fc(x) * (1 + (type(s.fc) is nn.Linear))).to("meta"),
    "other answers in train mode": lambda s, x: s.fc(x) * (1 + (s.training and type(s.fc) is nn.Linear)),
    "nothing": lambda s, x: None,
}


@pytest.mark.parametrize("run", GOES_BY_TYPE.values(), ids=GOES_BY_TYPE)
def test_a_network_that_answers_by_the_type_of_a_layer_is_refused_by_the_layers_name(run: Callable[..., Any]) -> None:
    wanted = (
        "fc: decomposed, even with factors that compute the same, the network answers something else: its code goes by the "
        "types or the number of its modules; skip it"
    )
    with pytest.raises(LayerError) as caught:
        answering(run, Same)
    assert str(caught.value) == wanted


@pytest.mark.parametrize("run", EACH_HAS_ITS_OWN.values(), ids=EACH_HAS_ITS_OWN)
def test_a_network_that_answers_the_same_is_let(run: Callable[..., Any]) -> None:
    answering(run, Same)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_half_of_the_digits_may_be_lost_on_the_way(scale: float) -> None:
    half = torch.finfo(torch.float32).eps ** 0.5
    answering(lambda s, x: s.fc(x) * scale, lambda layer: Same(layer, half * 0.9))
    with pytest.raises(LayerError, match=r"^fc: "):
        answering(lambda s, x: s.fc(x) * scale, lambda layer: Same(layer, half * 1.1))


def test_a_network_that_answers_by_the_number_of_its_modules_together_is_refused_without_a_name() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y * (1.0 + is_dense(self))

    with pytest.raises(LayerError, match=r"^with these layers: decomposed, even "):
        answering(run, Same)


def test_answers_are_compared_on_every_example() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y * (1.0 + (len(x) == 3 and type(self.fc) is nn.Linear))

    answering(run, Same, [X, X])
    with pytest.raises(LayerError, match=r"^fc: "):
        answering(run, Same, [X, Workload(torch.randn(3, 4))])


def test_answers_are_compared_in_one_run() -> None:
    Same.made = Same.calls = 0
    answering(lambda s, x: s.fc(x), Same, layers=1)
    assert (Same.made, Same.calls) == (1, 1)


def test_where_a_network_does_not_run_without_gradients_no_answers_are_compared() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are wanted")
        y: Tensor = self.fc(x)
        return y

    Same.made = 0
    answering(run, Same)
    assert not Same.made


def test_a_network_that_is_asked_for_its_answer_is_asked_first_in_eval_and_before_anything_is_prepared() -> None:
    def run(self: Any, x: Tensor) -> Any:
        self.runs += 1
        modes = torch.tensor([self.runs, self.training, torch.is_grad_enabled(), bool(self.fc._forward_hooks)])
        return {"a": [self.fc(x), "text"], "modes": modes}

    model = Calls(run)
    model.runs = 0
    assert tried(model, X).answer == []

    def prepare(twin: Any) -> None:
        twin.fc.register_forward_hook(lambda *_: None)

    for modes in ((), ["train", "eval"]):
        outcome = tried(model, X, modes=modes, prepare=prepare, answering=True)
        values, seen = outcome.answer
        assert torch.equal(values, model.fc(*X.args)) and not values.requires_grad and seen.tolist() == [1, 0, 0, 0]
        assert outcome.complaints == dict.fromkeys(["eval + no_grad", *modes])
