"""Model and plan → model: exact where it says so, nothing half-done, and back to dense."""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import BlockTerm, Dense, LaminaError, LayerError, LowRank, PlanError, Ratio, decomposition
from lamina.decomposition import forbid_changed, forbid_reading, plan_of
from lamina.layers.build import skeleton
from lamina.layers.decomposed import DecomposedLayer
from lamina.network import inplace
from lamina.network.readers import on_meta
from lamina.values import Workload

MODES = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "eval + no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(72, 6),
    )


EXAMPLE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
FORMS = {"0": BlockTerm(2, 4), "4": BlockTerm(4, 4), "6": LowRank(3)}


def content(model: nn.Module) -> dict[str, Any]:
    """All that an error must leave as it was: which objects stand where, and every value in them."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "flags": [module.training for module in model.modules()],
        "tensors": {name: (id(t), t.detach().clone(), t.stride(), t.requires_grad) for name, t in tensors},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = content(model)
    assert after["modules"] == before["modules"] and after["flags"] == before["flags"] and after["hooks"] == before["hooks"]
    assert torch.equal(after["random"], before["random"])
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (key, values, stride, trains) in before["tensors"].items():
        found = after["tensors"][name]
        assert found[0] == key and found[2:] == (stride, trains), name
        assert torch.equal(torch.nan_to_num(found[1]), torch.nan_to_num(values)), name


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- what comes out ----


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_a_network_at_full_rank_is_the_same_function(planned: Any, inplace: bool, dtype: torch.dtype, share: float) -> None:
    model, x = network().to(dtype).eval(), EXAMPLE.to(dtype)
    wanted = model(x)
    small = lamina.decompose(model, planned(model, x), inplace=inplace)
    with torch.no_grad():
        assert float((small(x) - wanted).norm() / wanted.norm()) <= share
    assert (small is model) is inplace


def test_in_place_and_copied_are_the_same_to_the_last_bit(planned: Any) -> None:
    model = network().eval()
    plan = planned(model, EXAMPLE, FORMS)
    small = lamina.decompose(model, plan)
    assert torch.equal(lamina.decompose(model, plan, inplace=True)(EXAMPLE), small(EXAMPLE))


def test_the_parameters_are_those_that_the_plan_promises(planned: Any) -> None:
    model = network()
    plan = planned(model, EXAMPLE, FORMS)
    small = lamina.decompose(model, plan)
    for name, layer in plan.layers.items():
        assert parameters(small.get_submodule(name)) == layer.after.parameters
    assert lamina.count(small, EXAMPLE) == plan.whole.after if plan.whole else True


def test_a_copy_leaves_the_original_alone(planned: Any) -> None:
    # traps: distillation needs the untouched original
    model = network()
    plan, before = planned(model, EXAMPLE, FORMS), content(model)
    small = lamina.decompose(model, plan)
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()
    assert_untouched(before, model)


def test_making_a_plan_changes_nothing() -> None:
    model = network()
    model[3].eval()
    before = content(model)
    lamina.make_plan(model, EXAMPLE, Ratio(2.0), rule=lamina.AtRatio())
    assert_untouched(before, model)


@pytest.mark.slow
def test_making_a_timed_plan_changes_nothing() -> None:
    model = network()
    before = content(model)
    lamina.make_plan(model, EXAMPLE, Ratio(2.0))
    assert_untouched(before, model)


def test_modes_and_hooks_and_buffers_of_the_network_are_kept(planned: Any) -> None:
    # traps: hooks, training flag, requires_grad: lost, or the whole model left in eval
    model = network().train()
    model[4].eval()
    model[0].requires_grad_(False)
    calls: list[str] = []
    model[6].register_forward_hook(lambda *_: calls.append("hook"))
    model(EXAMPLE)
    calls.clear()
    small = lamina.decompose(model, planned(model, EXAMPLE, FORMS))
    assert [m.training for m in small.children()] == [m.training for m in model.children()]
    assert not any(p.requires_grad for p in small[0].parameters()) and all(p.requires_grad for p in small[6].parameters())
    assert torch.equal(small[1].running_mean, model[1].running_mean)
    calls.clear()
    small(EXAMPLE)
    assert calls == ["hook"]


def test_a_hooks_handle_still_removes_it_after_working_in_place(planned: Any) -> None:
    model, calls = network(), []
    handle = model[6].register_forward_hook(lambda *_: calls.append("hook"))
    lamina.decompose(model, planned(model, EXAMPLE, FORMS), inplace=True)
    calls.clear()
    model(EXAMPLE)
    handle.remove()
    model(EXAMPLE)
    assert calls == ["hook"]


def test_in_place_frees_every_dense_weight(planned: Any) -> None:
    model = network()
    plan = planned(model, EXAMPLE, FORMS)
    dense = [weakref.ref(model[i].weight) for i in (0, 4, 6)]
    lamina.decompose(model, plan, inplace=True)
    gc.collect()
    assert [ref() for ref in dense] == [None] * 3


def test_whoever_holds_a_layer_holds_the_decomposed_one_after_work_in_place(planned: Any) -> None:
    model = network().eval()
    mine = model[6]
    lamina.decompose(model, planned(model, EXAMPLE, FORMS), inplace=True)
    assert mine is model[6] and isinstance(mine, DecomposedLayer)


@pytest.mark.parametrize("inplace", [False, True])
def test_one_module_under_two_names_is_replaced_once(planned: Any, inplace: bool) -> None:
    # traps: one module under two names: 272 parameters became 544
    shared = nn.Linear(8, 8)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = shared
            self.b = nn.Sequential(shared, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    both, x = Both(), torch.randn(2, 8)
    small = lamina.decompose(both, planned(both, x, {"a": LowRank(3)}), inplace=inplace)
    assert isinstance(small.a, DecomposedLayer) and small.a is small.b[0]
    assert parameters(small) == 3 * 16 + 8
    merged = lamina.merge(small)
    assert merged.a is merged.b[0] and type(merged.a) is nn.Linear


def test_one_module_called_twice_is_decomposed_once_and_counted_twice(planned: Any) -> None:
    # traps: one module called twice
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.fc(x))
            return y

    model, x = Twice(), torch.randn(2, 8)
    plan = planned(model, x)
    assert plan.layers["fc"].before.macs == 2 * 2 * (64 + 8) and plan.layers["fc"].before.parameters == 72
    torch.testing.assert_close(lamina.decompose(model, plan)(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_the_root_itself_can_be_the_layer(planned: Any, inplace: bool) -> None:
    # traps: the root itself is the layer
    model, x = nn.Linear(8, 6), torch.randn(2, 8)
    wanted = model(x)
    small = lamina.decompose(model, planned(model, x), inplace=inplace)
    assert isinstance(small, DecomposedLayer) and (small is model) is inplace
    torch.testing.assert_close(small(x), wanted)
    assert type(lamina.merge(small)) is nn.Linear


def test_a_plan_that_decomposes_nothing_gives_the_same_network(planned: Any) -> None:
    model = network().eval()
    small = lamina.decompose(model, planned(model, EXAMPLE, {}))
    assert torch.equal(small(EXAMPLE), model(EXAMPLE)) and small is not model


def test_a_plan_fits_any_weights_of_the_network(planned: Any) -> None:
    plan, other = planned(network(), EXAMPLE), network().eval()
    torch.testing.assert_close(lamina.decompose(other, plan)(EXAMPLE), other(EXAMPLE))


def test_every_parameter_trains(planned: Any) -> None:
    small = lamina.decompose(network(), planned(network(), EXAMPLE, FORMS))
    small(EXAMPLE).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_tied_weights_stay_tied_and_are_left_alone(planned: Any) -> None:
    # traps: tied parameters (embedding/head): 800 → 1,378 parameters
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.body(self.embedding(x)))
            return y

    model, x = Language(), torch.randint(20, (2, 5))
    plan = planned(model, x, {"body": LowRank(2)})
    assert "tied" in plan.refused["head"]
    small = lamina.decompose(model, plan)
    assert small.head.weight is small.embedding.weight and small.head.weight is not model.head.weight
    assert parameters(small) == 160 + 2 * 16 + 8


# ---- code that looks at the layers ----


class Nosy(nn.Module):
    """Reads what timm and transformers read of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv.weight.dtype).to(self.conv.weight.device)
        assert x.shape[1] == self.conv.in_channels and self.conv.kernel_size == (3, 3) and self.conv.stride[0] == 1
        y = self.conv(x).mean((2, 3))
        assert y.shape[1] == self.conv.out_channels == self.fc.in_features == self.fc.weight.shape[1]
        if self.fc.bias is not None:
            y = y.to(self.fc.bias.dtype)
        z: Tensor = self.fc(y)
        return z.view(-1, self.fc.out_features)


@pytest.mark.parametrize("mode", MODES)
def test_code_that_reads_its_layers_goes_on_running(planned: Any, mode: str) -> None:
    # traps: code that reads .weight, .in_features, .out_channels, .weight.dtype, .weight.device
    training, context = MODES[mode]
    model = Nosy().train(training)
    small = lamina.decompose(model, planned(model, EXAMPLE))
    with context():
        torch.testing.assert_close(small(EXAMPLE), model(EXAMPLE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "padding mask"])
def test_a_transformer_layer_runs_in_every_mode(planned: Any, mode: str, stacked: bool, masked: bool) -> None:
    # traps: nn.TransformerEncoderLayer: the fast path of eval + no_grad reads linear1.weight
    training, context = MODES[mode]
    model: nn.Module = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    if stacked:
        model = nn.TransformerEncoder(model, 2)
    model.train(training)
    example: dict[str, Tensor] = {"src": torch.randn(2, 5, 16)}
    plan = planned(model, example)  # without the mask: FlopCounterMode of PyTorch knows no nested tensors
    if masked:
        example["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert {name.rpartition(".")[2] for name in plan.decomposed} == {
        "linear1",
        "linear2",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }
    assert not plan.refused
    small = lamina.decompose(model, plan)
    with warnings.catch_warnings(), context():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype, PyTorch says
        wanted, found = model(**example), small(**example)
    kept = slice(None) if not masked else ~example["src_key_padding_mask"]
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-5)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


def test_attention_is_decomposed_where_it_is_saved_loaded_and_merged(planned: Any, tmp_path: Path) -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    plan = planned(model, x, {"layers.0.self_attn.q_proj": LowRank(5), "layers.1.self_attn.out_proj": LowRank(4)})
    wanted, held = lamina.decompose(model, plan), model.layers[0].self_attn
    lamina.decompose(model, plan, inplace=True)
    assert model.layers[0].self_attn is held and torch.equal(model(x), wanted(x))
    lamina.save(model, tmp_path / "saved")
    assert torch.equal(lamina.load(encoder(), tmp_path / "saved")(x), wanted(x))
    merged = lamina.merge(model)
    assert type(merged.layers[0].self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(merged(x), wanted(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(LayerError, match="PyTorch's own attention takes no factors"):
        lamina.plain(model)


def test_attention_is_as_it_was_where_decomposing_in_place_fails(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    plan, before, packed = planned(model, x), model(x), model.layers[1].self_attn.in_proj_weight
    turned = []

    def fails(module: nn.Module, new: nn.Module) -> None:
        turned.append(module)
        if len(turned) == 6:
            raise RuntimeError("no more")
        become(module, new)

    become = inplace.become
    monkeypatch.setattr(inplace, "become", fails)
    with pytest.raises(RuntimeError, match="no more"):
        lamina.decompose(model, plan, inplace=True)
    assert torch.equal(model(x), before) and model.layers[1].self_attn.in_proj_weight is packed


class Particular(nn.Module):
    """Insists on a plain layer, in one mode only."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.first, self.second, self.mode = nn.Linear(8, 8), nn.Linear(8, 8), mode

    def now(self) -> str:
        if self.training:
            return "train"
        if torch.is_inference_mode_enabled():
            return "inference_mode"
        return "eval" if torch.is_grad_enabled() else "eval + no_grad"

    def forward(self, x: Tensor) -> Tensor:
        if self.now() == self.mode and type(self.second) is not nn.Linear:
            raise TypeError("second must be an nn.Linear")
        y: Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_network_that_fails_in_one_mode_is_left_alone_and_the_layer_named(planned: Any, mode: str, inplace: bool) -> None:
    # traps: a forward in every mode right after surgery, undone with a clear report if it fails
    model, x = Particular("none yet"), torch.randn(2, 8)
    plan = planned(model, x)  # which would refuse the layer that the network insists on
    model.mode = mode
    before = content(model)
    message = (
        f"^second: with this layer decomposed the network does not run in {re.escape(mode)}: "
        r"TypeError: second must be an nn\.Linear; skip it$"
    )
    with pytest.raises(LayerError, match=message):
        lamina.decompose(model, plan, inplace=inplace)
    assert_untouched(before, model)
    lamina.decompose(model, plan.with_form("second", Dense()))


def test_a_mode_in_which_the_network_never_ran_is_nobodys_fault(planned: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(1, 8)  # no statistics of one sample in train mode
    assert isinstance(lamina.decompose(model, planned(model, x))[0], DecomposedLayer)


# ---- names, tracing, state ----


def test_all_names_are_identifiers(planned: Any) -> None:
    # traps: names that break FX/state_dict ('conv1-0')
    small = lamina.decompose(network(), planned(network(), EXAMPLE, FORMS))
    for name, _ in small.named_modules():
        assert all(part.isidentifier() or part.isdigit() for part in name.split(".") if part)
    assert {k for k in small.state_dict() if k.startswith("0.")} == {
        "0.reduce.weight",
        "0.core.weight",
        "0.expand.weight",
        "0.expand.bias",
    }


def test_fx_traces_it(planned: Any) -> None:
    small = lamina.decompose(network(), planned(network(), EXAMPLE, FORMS)).eval()
    assert torch.equal(torch.fx.symbolic_trace(small)(EXAMPLE), small(EXAMPLE))


@pytest.mark.slow
def test_export_takes_it(planned: Any) -> None:
    small = lamina.decompose(network(), planned(network(), EXAMPLE, FORMS)).eval()
    torch.testing.assert_close(torch.export.export(small, (EXAMPLE,)).module()(EXAMPLE), small(EXAMPLE))


def test_its_state_dict_loads_strictly_into_another_of_the_same_plan(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, FORMS)
    one, other = (lamina.decompose(network(), plan).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(EXAMPLE), other(EXAMPLE))


def test_it_moves_to_another_dtype_as_any_network(planned: Any) -> None:
    small = lamina.decompose(network(), planned(network(), EXAMPLE, FORMS)).eval().double()
    assert small(EXAMPLE.double()).dtype == torch.float64 and small[6].weight.dtype == torch.float64


def test_it_can_be_copied_and_keeps_its_plan(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, FORMS)
    small = lamina.decompose(network(), plan).eval()
    again = copy.deepcopy(small)
    assert plan_of(again) == plan and torch.equal(again(EXAMPLE), small(EXAMPLE))


# ---- nothing half-done ----


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed(planned: Any, value: float, inplace: bool) -> None:
    # traps: SVD failure or NaN/Inf weight returns a freshly initialised layer
    model = network()
    plan = planned(model, EXAMPLE, FORMS)
    with torch.no_grad():
        model[4].weight[0, 0] = value
    before = content(model)
    with pytest.raises(LayerError, match=r"^4: 9 of its 576 weights are NaN or infinite"):
        lamina.decompose(model, plan, inplace=inplace)
    assert_untouched(before, model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("held", [False, True], ids=["nobody looks", "an optimizer holds the parameters"])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_failure_midway_leaves_the_network_as_it_was(
    planned: Any, monkeypatch: pytest.MonkeyPatch, inplace: bool, held: bool, failing: int
) -> None:
    # traps: nothing half-done; SVD failure
    model = network().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[4].eval()
    model[4].note = "mine"
    calls: list[str] = []
    handle = model[6].register_forward_hook(lambda *_: calls.append("hook"))
    model(EXAMPLE).sum().backward()
    plan = planned(model, EXAMPLE, FORMS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) if held else None
    before = content(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fail_at(monkeypatch, failing)
    with pytest.raises(LayerError, match=r"^(0|4|6): cannot be factorised: linalg.eigh: The algorithm failed to converge"):
        lamina.decompose(model, plan, inplace=inplace)

    after = content(model)
    for name, (key, values, stride, trains) in before["tensors"].items():
        found = after["tensors"][name]
        assert torch.equal(found[1], values) and found[2:] == (stride, trains), name
        # Only who holds a parameter can tell it from another of equal value.
        assert not held or found[0] == key, name
    assert after["flags"] == before["flags"] and after["hooks"] == before["hooks"] and model[4].note == "mine"
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in network().named_modules()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if name in gradients)
    if optimizer:
        model(EXAMPLE).square().sum().backward()
        weight = model[6].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model[6].weight, weight)
    calls.clear()
    handle.remove()
    model(EXAMPLE)
    assert calls == []


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the ``number``-th layer's factorisation fail as LAPACK does."""
    from lamina.layers import build

    count = 0
    for kind, join in build._JOINS.items():

        def failing(*given: Any, factorise: Callable[..., list[Tensor]] = join.factorise) -> list[Tensor]:
            nonlocal count
            count += 1
            if count == number:
                raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
            return factorise(*given)

        monkeypatch.setitem(build._JOINS, kind, dataclasses.replace(join, factorise=failing))


def test_an_interruption_midway_is_undone_too(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina import decomposition

    model = network()
    plan, before = planned(model, EXAMPLE, FORMS), content(model)
    made: list[object] = []
    factored = decomposition.factored

    def interrupted(*args: Any) -> DecomposedLayer:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(None)
        return factored(*args)

    monkeypatch.setattr(decomposition, "factored", interrupted)
    keep = list(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        lamina.decompose(model, plan, inplace=True)
    assert_untouched(before, model)
    assert keep


def test_without_room_for_the_way_back_nothing_is_begun(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.network import inplace

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model = network()
    plan, before = planned(model, EXAMPLE, FORMS), content(model)
    monkeypatch.setattr(inplace, "save_file", full)
    with pytest.raises(lamina.LaminaError, match="No space left on device"):
        lamina.decompose(model, plan, inplace=True)
    assert_untouched(before, model)


def test_a_network_that_cannot_be_copied_can_be_changed_in_place(planned: Any) -> None:
    # traps: no reliance on copy.deepcopy(model)
    model = network().eval()
    plan = planned(model, EXAMPLE)
    model.lock = threading.Lock()
    message = r"^the network cannot be copied \(TypeError: .*\); pass inplace=True to change it where it is$"
    with pytest.raises(lamina.LaminaError, match=message):
        lamina.decompose(model, plan)
    wanted = model(EXAMPLE)
    torch.testing.assert_close(lamina.decompose(model, plan, inplace=True)(EXAMPLE), wanted, rtol=1e-4, atol=1e-5)


def test_a_network_with_results_of_autograd_in_it_is_copied(planned: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    torch.testing.assert_close(lamina.decompose(model, planned(model, x))(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_random_state_and_buffers_are_unchanged_by_decomposing(planned: Any, inplace: bool) -> None:
    model = network().train()
    plan = planned(model, EXAMPLE, FORMS)
    state, mean, steps = torch.get_rng_state(), model[1].running_mean.clone(), int(model[1].num_batches_tracked)
    small = lamina.decompose(model, plan, inplace=inplace)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(small[1].running_mean, mean) and int(small[1].num_batches_tracked) == steps


# ---- plans that do not fit ----


def test_every_example_of_a_plan_is_tried(planned: Any) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.most = 9  # while it is planned

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most and type(self.fc) is not nn.Linear:
                raise RuntimeError("no more than two")
            y: Tensor = self.fc(x)
            return y

    model, examples = Wide(), [lamina.Workload(torch.randn(n, 8)) for n in (2, 3)]
    plan = planned(model, examples)
    model.most = 2
    with pytest.raises(LayerError, match=r"^fc: .*no more than two"):
        lamina.decompose(model, plan)


class Peculiar(nn.Module):
    """Answers by what its modules are, or how many; runs whatever they are."""

    def __init__(self, look: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.out, self.look = nn.Linear(8, 8), nn.Linear(8, 8), look

    def forward(self, x: Tensor) -> Any:
        return self.look(self, self.out(self.fc(x).relu()))


LOOKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "the type of a layer": lambda self, y: y * (2.0 if type(self.out) is nn.Linear else 1.0),
    "an isinstance": lambda self, y: y * (2.0 if isinstance(self.out, nn.Linear) else 1.0),
    "the number of modules": lambda self, y: y / len(list(self.modules())),
    "the number of parameters": lambda self, y: y + len(list(self.parameters())),
    "how many it answers": lambda self, y: [y for m in self.modules() if type(m) is nn.Linear],
    "another dtype": lambda self, y: y.double() if type(self.fc) is nn.Linear else y,
    "the names of its state": lambda self, y: y * ("out.weight" in self.state_dict()),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_network_whose_code_goes_by_what_its_modules_are_is_refused(
    planned: Any, look: Callable[[Any, Tensor], Any], inplace: bool
) -> None:
    model, x = Peculiar(look), torch.randn(4, 8)
    plan = planned(model, x)
    before = content(model)
    message = (
        r"^(fc|out): decomposed, even with factors that compute the same, the network answers something else: "
        r"its code goes by the types or the number of its modules; skip it$"
    )
    with pytest.raises(LayerError, match=message):
        lamina.decompose(model, plan, inplace=inplace)
    assert_untouched(before, model)


def test_a_network_that_looks_at_its_modules_and_answers_the_same_is_decomposed(planned: Any) -> None:
    model, x = Peculiar(lambda self, y: y if type(self.out) is nn.Linear else y * 1.0), torch.randn(4, 8)
    small = lamina.decompose(model, planned(model, x))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


OTHERS: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "another shape": (
        lambda m: m.__setitem__(6, nn.Linear(72, 5)),
        r"^6: a Linear 72→5 \(out_channels 5 and not 6\) here, a Linear 72→6 in the plan",
    ),
    "another stride": (
        lambda m: m.__setitem__(0, nn.Conv2d(3, 8, 3, padding=1, stride=2)),
        r"^0: a Conv2d 3→8 3×3 stride 2 .*here",
    ),
    "two differences": (
        lambda m: m.__setitem__(0, nn.Conv2d(3, 8, 3, padding=2, bias=False)),
        r"\(bias False and not True, padding \(2, 2\) and not \(1, 1\)\) here, "
        "a .* in the plan, which was made for another network$",
    ),
    "a layer gone": (
        lambda m: m.__setitem__(0, nn.Identity()),
        "^0: not in this network; the plan was made for another network$",
    ),
    "a layer that is refused here": (
        lambda m: m.__setitem__(4, nn.Bilinear(8, 8, 3)),
        r"^4: cannot be decomposed here: Bilinear \(weight weight\) is neither a linear layer nor a convolution; skip it$",
    ),
    "another module beside them": (
        lambda m: m.__setitem__(1, nn.GroupNorm(2, 8)),
        "^the plan was made for another network: the planned layers are alike, modules, shapes or ties beside them differ$",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_a_plan_of_another_network_is_refused_and_the_first_mismatch_named(
    planned: Any, change: Callable[[nn.Sequential], Any], message: str, inplace: bool
) -> None:
    # traps: a fingerprint of the base and a message that names the first mismatch
    plan, other = planned(network(), EXAMPLE, FORMS), network()
    change(other)
    before = content(other)
    with pytest.raises((PlanError, LayerError), match=message):
        lamina.decompose(other, plan, inplace=inplace)
    assert_untouched(before, other)


@pytest.mark.parametrize(
    "attributes", [{"padding_mode": "reflect"}, {"padding": "same"}, {"dilation": 2}, {"bias": False}], ids=str
)
def test_a_mismatch_that_the_short_name_does_not_show_is_still_told(planned: Any, attributes: dict[str, Any]) -> None:
    model, other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, **({"padding": 1} | attributes))
    with pytest.raises(PlanError, match=next(iter(attributes))):
        lamina.decompose(other, planned(model, EXAMPLE))


@pytest.mark.parametrize("tensor", [{"dtype": "float99"}, {"dtype": "load"}, {"shape": (2, -3)}], ids=str)
def test_a_plan_whose_example_makes_no_sense_is_refused(planned: Any, tensor: dict[str, Any]) -> None:
    model = network()
    plan = planned(model, EXAMPLE, FORMS)
    changed = plan.examples[0].model_copy(update={"args": (plan.examples[0].args[0].model_copy(update=tensor),)})
    before = content(model)
    with pytest.raises(PlanError, match="example makes no sense"):
        lamina.decompose(model, plan.model_copy(update={"examples": (changed,)}))
    assert_untouched(before, model)


def test_a_plan_whose_factors_were_trained_in_a_supernet_is_not_fitted_anew(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, FORMS)
    plan = plan.model_copy(update={"factors": plan.factors.model_copy(update={"series": "nested"})})
    message = (
        r"^this plan's factors were trained in a supernet, and new ones would be others: take them out with "
        r"Supernet\.extract, or load the saved network with lamina\.load$"
    )
    with pytest.raises(PlanError, match=message):
        lamina.decompose(network(), plan)


def calibrated(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> lamina.Calibration:
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(EXAMPLE.shape, generator=generator).to(dtype) for _ in range(4)]
    return lamina.calibrate(model, data, outputs=lamina.Gaussian(), tolerance=None)


def test_a_plan_with_a_calibration_wants_that_one(planned: Any) -> None:
    model = network()
    plan, found, other = planned(model, EXAMPLE, FORMS), calibrated(model), calibrated(model, 1)
    with_data = plan_of(lamina.decompose(model, plan, found))
    assert with_data.factors.calibration == found.identity
    with pytest.raises(
        PlanError, match=r"^this plan's factors are fitted to a calibration: pass it as data=, or the data that"
    ):
        lamina.decompose(model, with_data)
    with pytest.raises(PlanError, match=r"^this plan was made with another calibration: pass that one as data=, or make the"):
        lamina.decompose(model, with_data, other)
    assert plan_of(lamina.decompose(model, with_data, found)) == with_data


def test_factors_that_are_fitted_to_a_calibration_change_the_answers_less(planned: Any) -> None:
    model = network()
    plan, found = planned(model, EXAMPLE, FORMS), calibrated(model)
    small, plain = lamina.decompose(model, plan, found), lamina.decompose(model, plan)
    for name, moments in found.layers.items():
        if name in plan.decomposed:
            metric, W = moments.metric(), model.get_submodule(name).weight.detach()
            ours, theirs = (metric.error(W - net.get_submodule(name).weight.detach()) for net in (small, plain))
            assert ours <= theirs * (1 + 1e-6)
            assert ours < 0.999 * theirs or theirs < 1e-9 * metric.error(W)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_they_are_fitted_as_well_as_in_float32_but_for_rounding(planned: Any, dtype: torch.dtype) -> None:
    half = network().to(dtype)
    full = copy.deepcopy(half).float()
    found = calibrated(full)
    small = lamina.decompose(half, planned(half, EXAMPLE.to(dtype), FORMS), calibrated(half, dtype=dtype))
    wanted = lamina.decompose(full, planned(full, EXAMPLE, FORMS), found)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    for name in FORMS:
        metric, W = found.layers[name].metric(), full.get_submodule(name).weight.detach()
        ours, theirs = (metric.error(W - net.get_submodule(name).weight.detach().float()) for net in (small, wanted))
        assert float(ours) == pytest.approx(float(theirs), rel=0.01)


def test_a_layer_that_the_calibration_does_not_know_is_fitted_to_its_weight_and_that_is_said(planned: Any) -> None:
    model = network()
    found = lamina.calibrate(model, [EXAMPLE] * 4, skip=["4"])
    plan = planned(model, EXAMPLE, FORMS)
    with pytest.warns(UserWarning, match="the calibration knows nothing of 4: fitted to the weights alone"):
        small = lamina.decompose(model, plan, found)
    torch.testing.assert_close(small[4].state_dict(), lamina.decompose(model, plan)[4].state_dict())


def test_a_calibration_of_other_weights_is_refused(planned: Any) -> None:
    model = network()
    plan, found = planned(model, EXAMPLE, FORMS), calibrated(model)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(LaminaError, match="this calibration is of other weights"):
        lamina.decompose(model, plan, found)


def test_decomposing_twice_is_refused(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, FORMS)
    small = lamina.decompose(network(), plan)
    with pytest.raises(PlanError, match="decomposed already"):
        lamina.make_plan(small, EXAMPLE, Ratio(2.0), rule=lamina.AtRatio())
    with pytest.raises(PlanError, match=r"^0 is decomposed already; lamina\.merge brings the dense layers back$"):
        lamina.decompose(small, plan)


def test_a_root_without_a_name_is_called_the_network(planned: Any) -> None:
    model, x = nn.Linear(8, 6), torch.randn(2, 8)
    plan = planned(model, x)
    small = lamina.decompose(model, plan)
    with pytest.raises(PlanError, match=r"^the network is decomposed already"):
        lamina.decompose(small, plan)
    with pytest.raises(PlanError, match=r"^the network: not in this network; the plan was made for another network$"):
        lamina.decompose(nn.ReLU(), plan)
    with pytest.raises(LayerError, match=r"^the network: cannot be decomposed here: "):
        lamina.decompose(nn.Bilinear(3, 8, 3), plan)
    with pytest.raises(PlanError, match=f"^the network is {LowRank(6)}, its plan says {LowRank(2)}: it was changed after"):
        forbid_changed(small, plan.with_form("", LowRank(2)))


def test_a_form_that_does_not_fit_its_layer_is_refused_by_the_layers_name(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, FORMS)
    layer = plan.layers["6"].model_copy(update={"form": LowRank(99)})
    with pytest.raises(PlanError, match=r"^6: rank 99"):
        lamina.decompose(network(), plan.model_copy(update={"layers": plan.layers | {"6": layer}}))


def test_a_dense_layer_that_is_refused_here_keeps_no_other_from_being_decomposed(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, {"6": LowRank(3)})
    other = network()
    other[0].register_state_dict_pre_hook(lambda *_: None)
    small = lamina.decompose(other, plan)
    assert type(small[0]) is nn.Conv2d and isinstance(small[6], DecomposedLayer)


@pytest.mark.parametrize("inplace", [False, True])
def test_unchecked_no_example_is_made_and_nothing_is_tried(
    planned: Any, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Peculiar(LOOKS["the type of a layer"]), torch.randn(4, 8)
    held, plan = model.fc.weight, planned(model, x)
    monkeypatch.setattr(decomposition, "example_from", forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = lamina.decompose(model, plan, inplace=inplace, check=False)
    assert isinstance(small.fc, DecomposedLayer) and held.shape == (8, 8)


def test_where_nothing_is_decomposed_no_example_is_made(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    plan = planned(model, EXAMPLE, {})
    monkeypatch.setattr(decomposition, "example_from", forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(lamina.decompose(model, plan)(EXAMPLE), model(EXAMPLE))


def forbidden(*_: Any) -> None:
    raise AssertionError("an example was made")


class Aside(nn.Module):
    """Reads the weight of its layer from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.aside = [self.fc.weight]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) + self.aside[0].sum()
        return y


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a wrapper"])
def test_a_dense_weight_that_is_held_must_not_be_read(wrapped: bool) -> None:
    model, x = Aside(), Workload(torch.randn(2, 8))
    given, held = nn.DataParallel(model) if wrapped else model, {"fc": model.fc.weight}
    model.fc = nn.Linear(8, 8)
    with pytest.raises(LayerError, match=r"^fc: the network reads this layer's dense weight"):
        forbid_reading(given, held, [x])
    forbid_reading(given, {}, [x])
    model.aside = [torch.ones(())]
    forbid_reading(given, held, [x])


def test_of_a_dense_weight_that_is_held_by_somebody_and_was_not_tried_a_warning_tells(planned: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(2, 8)
    plan, held = planned(model, x).model_copy(update={"examples": None}), model[0].weight
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lamina.decompose(model, plan, inplace=True)
    assert str(caught[-1].message) == (
        "the dense weight of 0 is still held by somebody; so the network was not tried with its layers exchanged: "
        "compare outputs yourself"
    )
    assert held.shape == (6, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_network_in_a_wrapper_is_decomposed_in_it_and_carries_the_plan_itself(planned: Any, inplace: bool) -> None:
    inner, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(2, 8)
    plan = planned(inner, x)
    small = lamina.decompose(nn.DataParallel(inner), plan, inplace=inplace)
    assert isinstance(small.module[0], DecomposedLayer) and plan_of(small) == plan_of(small.module) == plan
    merged = lamina.merge(small)
    assert type(merged.module[0]) is nn.Linear
    with pytest.raises(PlanError):
        plan_of(merged)


def test_in_place_a_bias_stays_the_very_one_and_a_copy_has_one_of_its_own(planned: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(2, 8)
    plan, bias = planned(model, x), model[0].bias
    copied = lamina.decompose(model, plan)[0].bias
    assert copied is not bias and copied.data_ptr() != bias.data_ptr() and torch.equal(copied, bias)
    assert lamina.decompose(model, plan, inplace=True)[0].bias is bias


def test_a_network_that_was_pickled_is_known_by_the_plan_in_it(planned: Any) -> None:
    """The name under which it stands is part of what lies in files."""
    model, plan = network(), planned(network(), EXAMPLE, FORMS)
    vars(model)["_lamina_plan"] = plan
    assert plan_of(model) is plan


# ---- what was changed afterwards is no longer what the plan says ----


CHANGES: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "a decomposed layer is dense again": (
        lambda m: m.__setitem__(6, nn.Linear(72, 6)),
        f"6 is dense, its plan says {LowRank(3)}: it was changed after it was decomposed",
    ),
    "a decomposed layer is in another form": (
        lambda m: m.__setitem__(6, skeleton(m[6].geometry, LowRank(2))),
        f"6 is {LowRank(2)}, its plan says {LowRank(3)}: it was changed after it was decomposed",
    ),
    "a decomposed layer is of another shape": (
        lambda m: m.__setitem__(6, skeleton(dataclasses.replace(m[6].geometry, in_channels=71), LowRank(3))),
        f"6 is {LowRank(3)}, its plan says {LowRank(3)}: it was changed after it was decomposed",
    ),
    "a dense layer is decomposed": (
        lambda m: m.__setitem__(4, skeleton(CONV, BlockTerm(4, 4))),
        f"4 is {BlockTerm(4, 4)}, its plan says dense: it was changed after it was decomposed",
    ),
    "a layer that was not there is decomposed": (
        lambda m: m.append(skeleton(CONV, BlockTerm(4, 4))),
        f"7 is {BlockTerm(4, 4)}, its plan says dense: it was changed after it was decomposed",
    ),
    "a module beside them is another": (
        lambda m: m.__setitem__(1, nn.GroupNorm(2, 8)),
        "modules or shapes of this network were changed after it was decomposed: its plan describes it no more",
    ),
}
CONV = lamina.Geometry("Conv2d", 8, 8, True, (3, 3), (1, 1), (0, 0), (1, 1))


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_network_that_was_changed_afterwards_is_told_by_the_first_layer(
    planned: Any, change: Callable[[nn.Sequential], Any], message: str
) -> None:
    plan = planned(network(), EXAMPLE, {"0": BlockTerm(2, 4), "6": LowRank(3)})
    small = lamina.decompose(network(), plan)
    change(small)
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        forbid_changed(small, plan)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a wrapper"])
def test_a_network_as_it_was_decomposed_is_what_its_plan_says(planned: Any, bias: bool, wrapped: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.Flatten(), nn.Linear(72, 6, bias=bias), nn.Linear(6, 4))
    plan = planned(model, EXAMPLE, {"0": BlockTerm(2, 4), "2": LowRank(3)})
    small: nn.Module = lamina.decompose(model, plan)
    forbid_changed(nn.DataParallel(small) if wrapped else small, plan)


def test_a_layer_in_groups_is_fitted(planned: Any) -> None:
    model = network().eval()
    plan = planned(model, EXAMPLE, {"4": BlockTerm(4, 4, groups=2)})
    small = lamina.decompose(model, plan)
    dense, fitted = model[4].weight.detach(), small[4].weight.detach()
    assert small[4].core.groups == 2 and small[4].form == plan.layers["4"].form
    assert 0 < float((dense - fitted).norm()) < float(dense.norm())
    torch.testing.assert_close(lamina.merge(small)(EXAMPLE), small(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_a_network_on_the_meta_device_has_nothing_to_decompose(planned: Any) -> None:
    plan = planned(network(), EXAMPLE, FORMS)
    with pytest.raises(LayerError, match=r"^0: .*meta"):
        lamina.decompose(network().to("meta"), plan)


def test_the_dense_layers_by_which_a_network_is_judged_take_no_memory() -> None:
    huge = lamina.Geometry("Linear", 2**20, 2**20, True)
    assert all(parameter.is_meta for parameter in on_meta(huge).parameters())


# ---- and back ----


def test_merge_brings_dense_layers_of_the_same_function_back(planned: Any) -> None:
    model = network().eval()
    small = lamina.decompose(model, planned(model, EXAMPLE, FORMS))
    merged = lamina.merge(small)
    assert repr(merged) == repr(model) and not any(isinstance(m, DecomposedLayer) for m in merged.modules())
    torch.testing.assert_close(merged(EXAMPLE), small(EXAMPLE), rtol=1e-4, atol=1e-5)
    assert isinstance(small[0], DecomposedLayer), "what was merged is not changed"


def test_merge_keeps_modes_hooks_layout_and_what_trains(planned: Any) -> None:
    model = network().to(memory_format=torch.channels_last)
    model[4].eval()
    model[6].requires_grad_(False)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    merged = lamina.merge(lamina.decompose(model, planned(model, EXAMPLE, FORMS)))
    assert [m.training for m in merged.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [p.stride() for p in merged.parameters()] == [p.stride() for p in model.parameters()]
    calls.clear()
    merged(EXAMPLE)
    assert calls == ["hook"]


def test_what_was_merged_can_be_decomposed_by_the_same_plan_again(planned: Any) -> None:
    model = network().eval()
    plan = planned(model, EXAMPLE, FORMS)
    small = lamina.decompose(model, plan)
    again = lamina.decompose(lamina.merge(small), plan)
    torch.testing.assert_close(again(EXAMPLE), small(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_there_is_nothing_to_merge_in_a_dense_network() -> None:
    message = "^nothing in this network is decomposed, so there is nothing to merge$"
    with pytest.raises(PlanError, match=message):
        lamina.merge(network())


def test_merge_keeps_attributes_of_the_users_and_drops_the_plan(planned: Any) -> None:
    model = network()
    model[6].note = "mine"
    merged = lamina.merge(lamina.decompose(model, planned(model, EXAMPLE, FORMS)))
    assert merged[6].note == "mine" and vars(merged[6]).keys() == vars(model[6]).keys()
    with pytest.raises(PlanError):
        plan_of(merged)


def test_a_network_of_which_only_a_part_was_decomposed_is_merged(planned: Any) -> None:
    model = network().eval()
    small = lamina.decompose(model, planned(model, EXAMPLE, FORMS))
    merged = lamina.merge(nn.Sequential(small, nn.ReLU()))
    assert repr(merged[0]) == repr(model)
    torch.testing.assert_close(merged(EXAMPLE), small(EXAMPLE).relu(), rtol=1e-4, atol=1e-5)


def test_a_network_of_which_only_a_part_was_decomposed_says_which(planned: Any) -> None:
    small = lamina.decompose(network(), planned(network(), EXAMPLE, FORMS))
    message = "^what lamina decomposed is not this network but 1, which is a part of it: give that one$"
    with pytest.raises(PlanError, match=message):
        plan_of(nn.Sequential(nn.ReLU(), small))


def test_a_network_that_was_never_decomposed_carries_no_plan() -> None:
    with pytest.raises(PlanError, match=r"^this network was not decomposed by lamina: it carries no plan$"):
        plan_of(network())
