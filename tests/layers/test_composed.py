"""The weight of a layer that has none: a look costs nothing, a use gets the right values, and nobody can write into it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from lamina import BlockTerm, Dense, LayerError, LowRank, Separable
from lamina.forms import Form
from lamina.layers import decomposed
from lamina.layers.build import factored
from lamina.layers.composed import ComposedWeight
from lamina.layers.decomposed import BlockTermLayer, DecomposedLayer, LowRankLayer, SeparableLayer, StandIn
from lamina.layers.series import SeriesLayer, series
from lamina.network.walk import walk


def built(dense: nn.Module, form: Form) -> DecomposedLayer:
    return factored(walk(dense).layers[""], form)


def gpt2_layer() -> nn.Module:
    layer: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    return layer


MAKERS: dict[str, Callable[[], StandIn]] = {
    "linear": lambda: built(nn.Linear(6, 4), LowRank(3)),
    "1×1": lambda: built(nn.Conv2d(6, 4, 1), LowRank(3)),
    "3×3": lambda: built(nn.Conv2d(6, 4, 3), BlockTerm(3, 2)),
    "channels last": lambda: built(nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last), BlockTerm(None, 2)),
    "whole": lambda: built(nn.Conv2d(6, 4, 3), BlockTerm(None, None)),
    "separable": lambda: built(nn.Conv2d(6, 4, 3), Separable(5)),
    "3d": lambda: built(nn.Conv3d(6, 4, (3, 1, 2)), BlockTerm(3, None)),
    "Conv1D of GPT-2": lambda: built(gpt2_layer(), LowRank(3)),
    "bfloat16": lambda: built(nn.Linear(6, 4, dtype=torch.bfloat16), LowRank(3)),
    "series": lambda: series(walk(nn.Conv2d(6, 4, 3)).layers[""], [BlockTerm(3, 2), BlockTerm(2, 2, 2)]),
    "dense of a series": lambda: series(walk(nn.Linear(6, 4)).layers[""], [LowRank(2), Dense()]),
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def layer(request: pytest.FixtureRequest) -> StandIn:
    made: StandIn = request.param()
    return made


@pytest.fixture
def linear() -> DecomposedLayer:
    return built(nn.Linear(6, 4), LowRank(3))


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Any]]:
    made: Callable[[], AbstractContextManager[Any]] = request.param
    return made


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Every layer whose weight was composed, once each time."""
    seen: list[StandIn] = []

    def counted(real: Callable[[StandIn], Tensor]) -> Callable[[StandIn], Tensor]:
        def composed(self: StandIn) -> Tensor:
            seen.append(self)
            return real(self)

        return composed

    for kind in (LowRankLayer, BlockTermLayer, SeparableLayer, SeriesLayer):
        monkeypatch.setattr(kind, "composed", counted(kind.composed))
    return seen


def values(layer: StandIn) -> Tensor:
    """The slow way: the weight straight from the factors, as the layer stores it."""
    weight = layer.composed()
    return (weight.T if layer.geometry.type == "Conv1D" else weight).contiguous()


def state(layer: nn.Module) -> list[tuple[Tensor, int, bool]]:
    return [(p.detach().clone(), p._version, p.requires_grad) for p in layer.parameters()]


def unchanged(layer: nn.Module, before: list[tuple[Tensor, int, bool]]) -> bool:
    return all(torch.equal(a, b) and rest == other for (a, *rest), (b, *other) in zip(state(layer), before, strict=True))


# ---- what costs nothing ----

LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda w: w.shape,
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "layout": lambda w: w.layout,
    "ndim": lambda w: w.ndim,
    "requires_grad": lambda w: w.requires_grad,
    "grad": lambda w: w.grad,
    "is_cuda": lambda w: w.is_cuda,
    "is_cpu": lambda w: w.is_cpu,
    "is_meta": lambda w: w.is_meta,
    "is_sparse": lambda w: w.is_sparse,
    "is_quantized": lambda w: w.is_quantized,
    "is_nested": lambda w: w.is_nested,
    "itemsize": lambda w: w.itemsize,
    "nbytes": lambda w: w.nbytes,
    "size": lambda w: (w.size(), w.size(0), w.size(-1)),
    "dim": lambda w: w.dim(),
    "numel": lambda w: (w.numel(), w.nelement(), torch.numel(w)),
    "stride": lambda w: (w.stride(), w.stride(0)),
    "storage_offset": lambda w: w.storage_offset(),
    "element_size": lambda w: w.element_size(),
    "is_floating_point": lambda w: (w.is_floating_point(), torch.is_floating_point(w)),
    "is_complex": lambda w: (w.is_complex(), torch.is_complex(w)),
    "is_contiguous": lambda w: w.is_contiguous(),
    "get_device": lambda w: w.get_device(),
    "len": len,
    "is_tensor": torch.is_tensor,
    "isinstance": lambda w: isinstance(w, Tensor),
}


# Of a tensor that is no leaf PyTorch says that its gradient is not kept, which is so.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_look_is_answered_as_a_plain_weight_answers_without_composing(
    layer: StandIn, mode: Callable[[], AbstractContextManager[Any]], compositions: list[StandIn]
) -> None:
    with mode():
        # A composed weight says of gradients what PyTorch would carry to the factors: none where none are recorded.
        plain = nn.Parameter(values(layer).detach(), requires_grad=torch.is_grad_enabled())
        compositions.clear()
        for name, look in LOOKS.items():
            assert look(layer.weight) == look(plain), name
    assert not compositions


def test_a_weight_whose_factors_all_rest_requires_no_gradient(layer: StandIn, compositions: list[StandIn]) -> None:
    layer.requires_grad_(False)
    weight = layer.weight
    assert (weight.requires_grad, weight.is_leaf, weight.grad_fn) == (False, True, None)
    layer.weights()[-1].requires_grad_(True)
    assert (layer.weight.requires_grad, layer.weight.is_leaf) == (True, False)
    assert not compositions


def test_it_has_the_dtype_and_the_device_that_its_factors_have_now(layer: StandIn, compositions: list[StandIn]) -> None:
    assert layer.double().weight.dtype == torch.float64
    assert layer.to("meta").weight.device.type == "meta"
    assert not compositions


# ---- what needs values ----


class Product(torch.autograd.Function):
    """``x Wᵀ`` by somebody who writes his own gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.flatten(1).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w.flatten(1), (gradient.T @ x).reshape(w.shape)


USES: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach().clone(),
    "detached": lambda w: w.detach(),
    "a detached view": lambda w: w[0].detach(),
    "deepcopy": lambda w: copy.deepcopy(w.detach()),
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.detach().float().numpy().tolist(),
    "asarray": lambda w: np.asarray(w.detach().float()).tolist(),
    "item": lambda w: w.sum().item(),
    "iteration": lambda w: [row.tolist() for row in w],
    "repr": lambda w: repr(w.detach()),
    "transpose": lambda w: w.mT.clone(),
    "view": lambda w: w.view(-1),
    "indexing": lambda w: w[0],
    "a slice": lambda w: w[1:, ::2],
    "a mask": lambda w: w[w > 0],
    "+": lambda w: w + 1,
    "r-": lambda w: 1 - w,
    "**": lambda w: w**2,
    "abs": abs,
    "==": lambda w: w == w,
    "matmul": lambda w: w.flatten(1) @ w.flatten(1).T,
    "rmatmul": lambda w: torch.ones(2, len(w), dtype=w.dtype) @ w.flatten(1),
    "linear": lambda w: F.linear(torch.ones(2, w.flatten(1).shape[1], dtype=w.dtype), w.flatten(1)),
    "einsum": lambda w: torch.einsum("i...,j...->ij", w, w),
    "stack": lambda w: torch.stack([w, w]),
    "cat": lambda w: torch.cat([w, torch.ones_like(w), w]),
    "where": lambda w: torch.where(w > 0, w, 0.0),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "to": lambda w: w.to(torch.float64),
    "to its own": lambda w: w.to(w.dtype),
    "new_zeros": lambda w: w.new_zeros(3),
    "foreach": lambda w: torch._foreach_add([w, w], 1),
    "a function of somebody's own": lambda w: Product.apply(torch.ones(2, w.flatten(1).shape[1], dtype=w.dtype), w),
}


def test_a_use_gives_what_the_plain_weight_gives(layer: StandIn, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    for name, use in USES.items():
        with mode():
            pair = tree_leaves(use(layer.weight)), tree_leaves(use(values(layer).clone()))
        for found, wanted in zip(*pair, strict=True):
            if isinstance(wanted, Tensor):
                assert torch.equal(found, wanted), name
                assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride()), name
                assert found.requires_grad == wanted.requires_grad, name
            else:
                assert found == wanted, name


@pytest.mark.parametrize("use", ["clone", "+", "stack", "linear", "mask", "a function of somebody's own"])
def test_what_is_computed_with_it_is_an_ordinary_tensor(linear: DecomposedLayer, use: str) -> None:
    assert type(USES.get(use, USES["a mask"])(linear.weight)) is Tensor


def test_weights_of_two_layers_meet_in_one_operation() -> None:
    one, other = MAKERS["linear"](), MAKERS["linear"]()
    torch.stack([one.weight, other.weight]).square().sum().backward()
    torch.testing.assert_close(torch.stack([one.weight, other.weight]), torch.stack([values(one), values(other)]))
    assert all(weight.grad is not None for each in (one, other) for weight in each.weights())


def test_an_operation_composes_once_however_often_it_is_handed_the_weight(
    linear: DecomposedLayer, compositions: list[StandIn]
) -> None:
    weight = linear.weight
    torch.stack([weight, weight, weight])
    assert compositions == [linear]


def test_it_is_composed_of_the_factors_as_they_are_when_it_is_used(linear: DecomposedLayer) -> None:
    weight = linear.weight.detach()
    with torch.no_grad():
        linear.first.weight.mul_(2)
    assert torch.equal(weight.clone(), values(linear))


def test_it_can_be_copied_from(layer: StandIn, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    target = torch.zeros_like(values(layer)).detach()
    with mode(), torch.no_grad():
        assert torch.equal(target.copy_(layer.weight), values(layer))
        target.zero_()[:] = layer.weight
        target.add_(layer.weight)
    assert torch.equal(target, 2 * values(layer))


def test_it_can_be_saved(linear: DecomposedLayer) -> None:
    file = io.BytesIO()
    torch.save({"w": linear.weight.detach()}, file)
    file.seek(0)
    loaded = torch.load(file)["w"]
    assert type(loaded) is Tensor and torch.equal(loaded, values(linear))


# ---- gradients ----

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a function of PyTorch": lambda x, w: (x @ w.flatten(1).T).square().sum(),
    "a function of somebody's own": lambda x, w: Product.apply(x, w).square().sum(),
    "both, and itself": lambda x, w: (Product.apply(x, w) * (x @ w.flatten(1).T)).sum() + w.square().sum(),
    "its views": lambda x, w: w[0].square().sum() + w.flatten(1).T[1].exp().sum() + sum(row.sum() for row in w.view(4, -1)),
    "its views handed to that": lambda x, w: Product.apply(x, w.flatten(1)[:3]).square().sum(),
    "its pieces": lambda x, w: torch.stack([p.square().sum() for p in w.chunk(2)]).prod(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("make", ["linear", "3×3", "channels last", "whole", "series", "dense of a series"])
def test_gradients_reach_the_factors(make: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    layer = MAKERS[make]().double()
    x = torch.randn(3, values(layer).flatten(1).shape[1], dtype=torch.float64, requires_grad=True)
    (y, *ours), (y_, *theirs) = (
        [y := loss(x, weight), *torch.autograd.grad(y, [*layer.weights(), x], materialize_grads=True)]
        for weight in (layer.weight, values(layer))
    )
    torch.testing.assert_close([y, *ours], [y_, *theirs])
    assert all(gradient.any() for gradient in ours[:-1])


def test_two_accesses_in_one_graph_sum_their_gradients(linear: DecomposedLayer) -> None:
    (linear.weight.square().sum() + Product.apply(torch.ones(2, 6), linear.weight).sum()).backward()
    found = [weight.grad for weight in linear.weights()]
    weight = values(linear)
    wanted = torch.autograd.grad(weight.square().sum() + Product.apply(torch.ones(2, 6), weight).sum(), linear.weights())
    torch.testing.assert_close(found, list(wanted))


def test_a_factor_that_rests_gets_no_gradient(linear: DecomposedLayer) -> None:
    linear.first.weight.requires_grad_(False)
    (linear.weight.sum() + Product.apply(torch.ones(2, 6), linear.weight).sum()).backward()
    assert linear.first.weight.grad is None and linear.second.weight.grad.abs().sum() > 0


def test_a_factor_changed_before_the_backward_is_an_error(linear: DecomposedLayer) -> None:
    y = Product.apply(torch.ones(2, 6), linear.weight).sum()
    with torch.no_grad():
        linear.first.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_under_inference_mode_its_values_serve_where_gradients_flow(linear: DecomposedLayer) -> None:
    with torch.inference_mode():
        weight = linear.weight
    linear.requires_grad_(False)
    x = torch.ones(2, 6, requires_grad=True)
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, values(linear).sum(0).expand(2, 6))


# ---- writing ----


def each_row(w: Tensor) -> None:
    for row in w:
        row.zero_()


def data_plus(w: Tensor) -> None:
    w.data += 1


def augmented(w: Tensor) -> None:
    w += 1


def item(w: Tensor) -> None:
    w[0] = 1


def item_of_a_view(w: Tensor) -> None:
    w.view(-1)[0] = 1


def attribute(name: str, value: Any) -> Callable[[Tensor], None]:
    return lambda w: setattr(w, name, value(w) if callable(value) else value)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "init.zeros_": nn.init.zeros_,
    "init.normal_": nn.init.normal_,
    "init.uniform_": nn.init.uniform_,
    "init.constant_": lambda w: nn.init.constant_(w, 1.0),
    "init.trunc_normal_": nn.init.trunc_normal_,
    "init.kaiming_uniform_": nn.init.kaiming_uniform_,
    "init.xavier_normal_": nn.init.xavier_normal_,
    "init.orthogonal_": nn.init.orthogonal_,
    "zero_": lambda w: w.zero_(),
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "clamp_": lambda w: w.clamp_(-1, 1),
    "torch.relu_": torch.relu_,
    "data": lambda w: w.data,
    "data +=": data_plus,
    "data.mul_": lambda w: w.data.mul_(2),
    "data =": attribute("data", torch.ones_like),
    "+=": augmented,
    "[0] =": item,
    "[mask] =": lambda w: w.__setitem__(w > 0, 0.0),
    "inplace=True": lambda w: F.relu(w, inplace=True),
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
    "dropout(inplace)": lambda w: F.dropout(w, 0.5, True, True),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w], 2),
    "_foreach_mul_, second": lambda w: torch._foreach_mul_([torch.ones_like(w), w], 2),
    "_foreach_add_": lambda w: torch._foreach_add_([w], [torch.ones_like(w)]),
    "ops.aten": torch.ops.aten.zero_,
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad_(False)": lambda w: w.requires_grad_(False),
    "requires_grad =": attribute("requires_grad", False),
    "grad =": attribute("grad", torch.ones_like),
    "detach_": lambda w: w.detach_(),
    "resize_": lambda w: w.resize_(1),
    "set_": lambda w: w.set_(torch.ones(3)),
    "share_memory_": lambda w: w.share_memory_(),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w]),
    "normalize_(out=)": lambda w: F.normalize(w.detach(), out=w.detach()),
    # through a view of it
    "T": lambda w: w.mT.zero_(),
    "[0]": lambda w: w[0].zero_(),
    "[0][1]": lambda w: w[0][1].fill_(2),
    "[:, 1:]": lambda w: w[:, 1:].mul_(2),
    "view[0] =": item_of_a_view,
    "detach": lambda w: w.detach().zero_(),
    "detach of a view of detach": lambda w: w.detach().view(-1).detach().zero_(),
    "rows": each_row,
    "unbind": lambda w: w.unbind()[1].zero_(),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "split": lambda w: w.split(1)[2].zero_(),
    "tensor_split": lambda w: w.tensor_split(2)[0].zero_(),
    "flatten": lambda w: w.flatten().zero_(),
    "squeeze": lambda w: w.unsqueeze(0).squeeze(0).zero_(),
    "expand_as": lambda w: w.expand_as(w).zero_(),
    "narrow": lambda w: w.narrow(0, 1, 2).zero_(),
    "as_strided": lambda w: w.as_strided((2,), (1,)).zero_(),
    "to its own dtype": lambda w: w.to(w.dtype).zero_(),
    "cpu": lambda w: w.cpu().zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "broadcast_tensors": lambda w: torch.broadcast_tensors(w, w)[0].zero_(),
    "aten view": lambda w: torch.ops.aten.view(w, [-1]).zero_(),
    "no_grad view": lambda w: w.detach()[0].copy_(torch.ones(())),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_an_error_and_changes_nothing(
    write: Callable[[Tensor], Any], mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    # The last two have a factor that is the dense weight.
    for make in ("linear", "3×3", "whole", "dense of a series"):
        layer = MAKERS[make]()
        before = state(layer)
        with mode(), pytest.raises(LayerError, match="decomposed layer's weight would be lost") as caught:
            write(layer.weight)
        assert "\n" not in str(caught.value) and "lamina.merge" in str(caught.value)
        assert unchanged(layer, before), make


@pytest.mark.parametrize("make", ["linear", "dense of a series"])
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_an_output_written_into_it_is_an_error(make: str, quiet: Callable[[], AbstractContextManager[Any]]) -> None:
    # With gradients PyTorch refuses ``out=`` itself.
    layer = MAKERS[make]()
    before = state(layer)
    with quiet():
        for target in (layer.weight, layer.weight.view(4, 6), layer.weight[:]):
            with pytest.raises(LayerError, match="add on a decomposed layer's weight"):
                torch.add(torch.ones(4, 6), 1, out=target)
    assert unchanged(layer, before)


@pytest.mark.parametrize("write", [lambda w: w.register_hook(print), lambda w: w.retain_grad()], ids=["hook", "retain_grad"])
def test_a_wish_for_its_gradient_is_an_error(linear: DecomposedLayer, write: Callable[[Tensor], Any]) -> None:
    for weight in (linear.weight, linear.weight[0]):
        with pytest.raises(LayerError, match="would be lost"):
            write(weight)


def test_the_message_names_what_was_done(linear: DecomposedLayer) -> None:
    for name, act in {"zero_": WRITES["zero_"], "data": WRITES["data"], "requires_grad": WRITES["requires_grad ="]}.items():
        with pytest.raises(LayerError, match=rf"^{name} on a decomposed layer's weight would be lost"):
            act(linear.weight)


def test_its_array_cannot_be_written(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    with mode():
        weight = MAKERS["linear"]().weight.detach()
        for array in (weight.numpy(), np.asarray(weight), weight[0].numpy()):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_what_is_computed_with_it_can_be_written(
    linear: DecomposedLayer, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    before = state(linear)
    with mode():
        for result in (linear.weight.clone(), linear.weight + 1, linear.weight.double(), torch.cat([linear.weight])):
            result.zero_()
            assert not result.any()
    assert unchanged(linear, before)


def test_assigning_it_is_an_error(layer: StandIn) -> None:
    with pytest.raises(LayerError, match=r"^weight of a .* cannot be set"):
        layer.weight = nn.Parameter(values(layer).detach())
    with pytest.raises(LayerError, match=r"^weight of a .* cannot be set"):
        layer.weight = values(layer).detach()
    with pytest.raises(AttributeError):
        del layer.weight
    assert "weight" not in layer.state_dict()


def test_adapters_that_are_merged_into_it_are_an_error_and_not_lost(linear: DecomposedLayer) -> None:
    # As peft's `merge` does it; with ``safe_merge`` it assigns.
    before, delta = state(linear), torch.ones(4, 6)
    with pytest.raises(LayerError, match="data on a decomposed layer's weight would be lost"):
        linear.weight.data += delta
    with pytest.raises(LayerError, match="data on a decomposed layer's weight would be lost"):
        linear.weight.data = linear.weight.detach().clone() + delta
    assert unchanged(linear, before)


# ---- autocast, recorders, transforms ----


@pytest.mark.parametrize("make", ["linear", "3×3", "series", "dense of a series"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_is_of_full_precision(
    make: str, dtype: torch.dtype, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    layer = MAKERS[make]()
    with mode(), torch.autocast("cpu", dtype):
        weight = layer.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight.clone(), values_without_autocast(layer))


def values_without_autocast(layer: StandIn) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return values(layer)


class Reads(nn.Module):
    """Code that looks at the weight, then computes with it."""

    def __init__(self, layer: StandIn) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        return F.linear(x.to(weight.dtype), weight) + self.layer(x)


def test_compiled_code_that_uses_it_computes_the_same(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    net, x = Reads(MAKERS["linear"]()), torch.randn(3, 6)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with mode():
        assert torch.equal(compiled(x), net(x))
    torch._dynamo.reset()


def test_compiled_code_reaches_the_factors() -> None:
    net, x = Reads(MAKERS["linear"]()), torch.randn(3, 6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found, wanted = (torch.autograd.grad(run(x).square().sum(), net.layer.weights()) for run in (compiled, net))
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


def test_a_trace_of_it_has_its_values_for_any_input() -> None:
    net, x = Reads(MAKERS["linear"]()), torch.randn(3, 6)
    with pytest.warns((DeprecationWarning, FutureWarning)):  # one or the other, by the version of torch
        traced = torch.jit.trace(net, torch.randn(2, 6), check_trace=False)
    assert "PythonOp" not in str(traced.inlined_graph)
    graph = make_fx(net)(torch.randn(3, 6))
    torch.testing.assert_close(traced(x), net(x))
    torch.testing.assert_close(graph(x), net(x))


def test_a_trace_follows_the_factors() -> None:
    net, x = Reads(MAKERS["linear"]()), torch.randn(3, 6)

    def with_first(first: Tensor, x: Tensor) -> Tensor:
        return functional_call(net, {"layer.first.weight": first}, (x,))

    graph = make_fx(with_first)(torch.randn(3, 6), x)
    other = torch.randn(3, 6)
    torch.testing.assert_close(graph(other, x), with_first(other, x))
    assert not torch.allclose(graph(other, x), net(x))


@pytest.mark.parametrize("make", ["linear", "dense of a series"])
def test_function_transforms_go_through_it(make: str) -> None:
    net, x = Reads(MAKERS[make]().double()), torch.randn(5, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(net, parameters, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for number, one in enumerate(x):
        net.zero_grad()
        net(one[None]).square().sum().backward()
        wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
        torch.testing.assert_close({name: value[number] for name, value in each.items()}, wanted)


@pytest.mark.parametrize("make", ["linear", "dense of a series"])
def test_it_maps_over_many_weights(make: str) -> None:
    nets = [Reads(MAKERS[make]()).eval() for _ in range(3)]
    stacked, buffers = torch.func.stack_module_state(nets)
    x = torch.randn(2, 6)
    with torch.no_grad():
        found = torch.func.vmap(lambda p: functional_call(nets[0], (p, buffers), (x,)))(stacked)
        torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))


def test_forward_mode_goes_through_it() -> None:
    net = Reads(MAKERS["linear"]().double())
    tangents = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    x, primals = torch.randn(2, 6, dtype=torch.float64), {name: p.detach() for name, p in net.named_parameters()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(net, parameters, (x,))

    _, along = torch.func.jvp(run, (primals,), (tangents,))
    step = 1e-6
    ahead, behind = (run({n: p + s * tangents[n] for n, p in primals.items()}) for s in (step, -step))
    torch.testing.assert_close(along, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


# ---- networks that look ----


@pytest.fixture
def run_factors(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The factors that were called. Not by hooks: for those alone PyTorch leaves its fast path."""
    seen: list[nn.Module] = []

    def noted(factor: nn.Module, x: Tensor, real: Callable[..., Tensor] = decomposed.run_factor) -> Tensor:
        seen.append(factor)
        return real(factor, x)

    monkeypatch.setattr(decomposed, "run_factor", noted)
    return seen


def decomposed_encoder_layer() -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    layer.linear1, layer.linear2 = built(layer.linear1, LowRank(4)), built(layer.linear2, LowRank(4))
    return layer


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "encoder"])
def test_pytorchs_transformer_layers_call_the_factors_and_compose_nothing(
    whole: bool,
    quiet: Callable[[], AbstractContextManager[Any]],
    run_factors: list[nn.Module],
    compositions: list[StandIn],
) -> None:
    net: nn.Module = decomposed_encoder_layer()
    if whole:
        net = nn.TransformerEncoder(net, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    wanted = net(x, src_key_padding_mask=padding)  # with gradients there is no fast path
    run_factors.clear()
    with quiet():
        found = net(x, src_key_padding_mask=padding)
    assert len(run_factors) == (8 if whole else 4)
    assert not compositions
    torch.testing.assert_close(found[~padding], wanted[~padding].detach())


def test_t5_that_looks_at_its_weights_dtype_composes_nothing(run_factors: list[nn.Module], compositions: list[StandIn]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    net = transformers.T5ForConditionalGeneration(config).eval()
    for name, module in list(net.named_modules()):
        if name.endswith((".wo", ".wi")):
            owner, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(owner), leaf, built(module, LowRank(8)))
    tokens = torch.randint(20, (1, 4))
    for quiet in MODES.values():
        with quiet():
            net(input_ids=tokens, labels=tokens)
    assert len(run_factors) == 3 * 4 * 2 and not compositions


def test_it_is_a_class_of_its_own_so_that_fast_paths_leave_it_alone(layer: StandIn) -> None:
    assert isinstance(layer.weight, ComposedWeight) and torch.overrides.has_torch_function((layer.weight,))


def test_code_in_c_that_is_handed_the_tensor_itself_gets_its_values(layer: StandIn) -> None:
    wanted = values(layer)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.add(layer.weight, other=layer.weight), wanted * 2)
        assert torch.equal(torch.cat(tensors=[layer.weight, wanted]), torch.cat([wanted, wanted]))
        with pytest.raises(LayerError, match="would be lost"):
            layer.weight.add_(1)
    assert torch.equal(values(layer), wanted)


def test_what_costs_nothing_may_be_asked_by_keyword(layer: StandIn, compositions: list[StandIn]) -> None:
    compositions.clear()
    weight, shape = layer.weight, values(layer).shape
    compositions.clear()
    assert [weight.size(dim=d) for d in range(weight.dim())] == list(shape) and weight.stride(dim=-1) == 1
    assert not compositions
