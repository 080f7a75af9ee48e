"""A convolution whose weight rests is the built-in one, bit for bit, but keeps no input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx

from lamina import BlockTerm, LowRank
from lamina.layers import frozen
from lamina.layers.build import factored
from lamina.layers.frozen import frozen_convolution, run_factor
from lamina.network.walk import walk

CONVOLUTIONS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# Sums of some hundred terms in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The factors that went through the function; size is no matter here."""
    seen: list[nn.Module] = []

    def noted(layer: nn.Module, x: Tensor, real: Callable[..., Tensor] = frozen_convolution) -> Tensor:
        seen.append(layer)
        return real(layer, x)

    monkeypatch.setattr(frozen, "frozen_convolution", noted)
    monkeypatch.setattr(frozen, "_WORTH_A_CALL", 0)
    return seen


def resting(layer: Any) -> Any:
    layer.weight.requires_grad_(False)
    return layer


def gradients(run: Callable[[Tensor], Tensor], layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    y = run(x)
    wanted = [x] if layer.bias is None else [x, layer.bias]
    generator = torch.Generator().manual_seed(1)
    return y, *torch.autograd.grad(y, wanted, torch.randn(y.shape, generator=generator).to(y))


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that a forward keeps for the backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # kept until the count is done, so that no address is used twice
    del result
    return sum(kept.values())


@settings(max_examples=80, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_outputs_and_gradients_are_those_of_the_built_in(
    dims: int,
    groups: int,
    kernel: int,
    stride: int,
    padding: int | str,
    dilation: int,
    bias: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    stride = 1 if padding == "same" else stride
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    layer = resting(CONVOLUTIONS[dims](4, 6, kernel, dtype=dtype, **options))
    x = torch.randn(2, 4, *(7, 6, 5)[:dims]).to(dtype)
    if channels_last and dims > 1:
        x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    unequal = padding == "same" and dilation * (kernel - 1) % 2
    assert frozen._same_function(layer, x) == (not unequal)
    run = run_factor if unequal else frozen_convolution  # the latter whatever its size
    (y, dx, *db), (y_, dx_, *db_) = gradients(layer, layer, x), gradients(lambda x: run(layer, x), layer, x)
    assert torch.equal(y, y_) and y.stride() == y_.stride()
    assert torch.equal(dx, dx_)
    for own, ours in zip(db, db_, strict=True):
        torch.testing.assert_close(ours, own, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


PLAIN = {"3×3": {}, "strided": {"stride": 2}, "no bias": {"bias": False}, "1×1": {"kernel_size": 1}}


@pytest.mark.parametrize("attributes", PLAIN.values(), ids=PLAIN)
def test_its_input_is_not_kept(attributes: dict[str, Any], taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | attributes)))
    x = torch.randn(2, 4, 30, 30, requires_grad=True)
    weight = layer.weight.numel() * 4
    assert saved_bytes(lambda: layer(x)) >= x.numel() * 4
    assert saved_bytes(lambda: run_factor(layer, x)) == weight
    assert taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_is_the_built_in_too(dtype: torch.dtype, taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 7, 6)
    with torch.autocast("cpu", dtype):
        own, ours = gradients(layer, layer, x), gradients(lambda x: run_factor(layer, x), layer, x)
    assert [t.dtype for t in ours] == [dtype, torch.float32, torch.float32]
    assert torch.equal(own[0], ours[0]) and torch.equal(own[1], ours[1])
    torch.testing.assert_close(ours[2], own[2], rtol=2e-2, atol=2e-2)
    assert taken


def test_under_autocast_float64_is_left_alone(taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(4, 6, 3, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, _ = gradients(lambda x: run_factor(layer, x), layer, torch.randn(2, 4, 7, 6, dtype=torch.float64))
    assert y.dtype == dx.dtype == torch.float64
    assert taken


def test_under_autocast_a_bias_in_float64_stays_what_it_is(taken: list[nn.Module]) -> None:
    # Autocast leaves every float64 alone, and the convolution then refuses the mixture, or takes it, by the kernels that the
    # processor has. So the plain layer is asked.
    layer = resting(nn.Conv2d(4, 6, 3))
    layer.bias = nn.Parameter(layer.bias.detach().double())
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    found: list[Any] = []
    for run in (layer, lambda x: run_factor(layer, x)):
        with torch.autocast("cpu", torch.bfloat16):
            try:
                found.append(run(x))
            except RuntimeError as error:
                found.append(str(error))
    plain, frozen = found
    assert torch.equal(plain, frozen) if isinstance(plain, Tensor) else plain == frozen
    assert not taken


def test_gradients_of_gradients_are_right(taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(2, 3, 3, padding=1, stride=2, dtype=torch.float64))
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    # Through a square: a convolution alone is linear, and all its second derivatives are zero.
    assert torch.autograd.gradgradcheck(lambda x, b: run_factor(layer, x).square(), (x, layer.bias))
    assert taken


def test_a_weight_changed_between_forward_and_backward_is_an_error(taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(2, 3, 3))
    y = run_factor(layer, torch.randn(1, 2, 5, 4, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert taken


def test_where_the_bias_alone_trains_it_gets_its_gradient(taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(2, 3, 3))
    x = torch.randn(1, 2, 5, 4)
    run_factor(layer, x).square().sum().backward()
    ours, layer.bias.grad = layer.bias.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(ours, layer.bias.grad)
    assert taken


def with_hook(layer: Any, register: str) -> Any:
    getattr(layer, register)(lambda *_: None)
    return layer


class Fake(nn.Conv2d):
    """As of fake quantisation, or an adapter: a convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Sharded(nn.Parameter):
    """A weight of another type, which knows operations of its own."""


class OwnWeight(nn.Module):
    """As of a quantised layer: its ``weight`` is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = None

    def weight(self) -> Tensor:
        raise AssertionError("nobody asks for it")

    def forward(self, input: Tensor) -> Tensor:
        return 3 * input


class NoWeight(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return 4 * input


def patched(layer: Any, name: str) -> Any:
    """A layer of which a method was replaced on the object."""
    real = getattr(layer, name)
    setattr(layer, name, lambda *args: 5 * real(*args))
    return layer


def with_sharded_weight(layer: Any) -> Any:
    layer.weight = Sharded(layer.weight.detach(), requires_grad=False)
    return layer


ASIDE = {
    "its weight trains": lambda: nn.Conv2d(4, 6, 3),
    "reflect": lambda: resting(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    "unequal sides": lambda: resting(nn.Conv2d(4, 6, 2, padding="same")),
    "linear": lambda: resting(nn.Linear(9, 3)),
    "a subclass": lambda: resting(Fake(4, 6, 3)),
    "another forward": lambda: patched(resting(nn.Conv2d(4, 6, 3)), "forward"),
    "another _conv_forward": lambda: patched(resting(nn.Conv2d(4, 6, 3)), "_conv_forward"),
    "a weight of another type": lambda: with_sharded_weight(nn.Conv2d(4, 6, 3)),
    "its weight is a method": OwnWeight,
    "no weight": NoWeight,
    "identity": nn.Identity,
    "transposed": lambda: resting(nn.ConvTranspose2d(4, 6, 3)),
    "forward hook": lambda: with_hook(resting(nn.Conv2d(4, 6, 3)), "register_forward_hook"),
    "forward pre-hook": lambda: with_hook(resting(nn.Conv2d(4, 6, 3)), "register_forward_pre_hook"),
    "backward hook": lambda: with_hook(resting(nn.Conv2d(4, 6, 3)), "register_full_backward_hook"),
    "backward pre-hook": lambda: with_hook(resting(nn.Conv2d(4, 6, 3)), "register_full_backward_pre_hook"),
}


@pytest.mark.parametrize("make", ASIDE.values(), ids=ASIDE)
def test_it_steps_aside(make: Callable[[], nn.Module], taken: list[nn.Module]) -> None:
    layer = make()
    x = torch.randn(2, 4, 7, 9, requires_grad=True)
    assert torch.equal(run_factor(layer, x), layer(x))
    assert not taken


def test_it_steps_aside_without_gradients_without_a_batch_and_under_global_hooks(taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 7, 9, requires_grad=True)
    with torch.no_grad():
        run_factor(layer, x)
    with torch.inference_mode():
        run_factor(layer, torch.randn(2, 4, 7, 9))
    assert torch.equal(run_factor(layer, x[0]), layer(x[0]))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        run_factor(layer, x)
    finally:
        handle.remove()
    layer.bias.requires_grad_(False)
    run_factor(layer, x.detach())
    assert not taken
    run_factor(layer, x)
    assert taken == [layer]


SIZES = {
    "small": (nn.Conv2d(4, 6, 3, bias=False), torch.float32, False),
    "small, its bias trains": (nn.Conv2d(4, 6, 3), torch.float32, True),
    "small 1×1, its bias trains": (nn.Conv2d(4, 6, 1), torch.float32, False),
    "small 1×1 in bfloat16, its bias trains": (nn.Conv2d(4, 6, 1), torch.bfloat16, True),
    "large": (nn.Conv2d(4, 2**16, 5, bias=False), torch.float32, True),
    "as large, in bfloat16": (nn.Conv2d(4, 2**16, 5, bias=False), torch.bfloat16, False),
}


@pytest.mark.parametrize(("layer", "dtype", "expected"), SIZES.values(), ids=SIZES)
def test_where_it_would_be_slower_it_is_not_used(layer: nn.Conv2d, dtype: torch.dtype, expected: bool) -> None:
    layer = resting(layer.to(dtype))
    x = torch.randn(1, 4, 6, 5, dtype=dtype, requires_grad=True)
    assert (type(run_factor(layer, x).grad_fn) is not type(layer(x).grad_fn)) == expected


def stack() -> nn.Module:
    """Three layers, the middle ones decomposed, all outer factors at rest."""
    torch.manual_seed(3)
    middle = [factored(walk(nn.Conv2d(4, 6, 3, padding=1)).layers[""], BlockTerm(3, 4))]
    middle += [factored(walk(nn.Conv2d(6, 8, 1)).layers[""], LowRank(3))]
    for layer in middle:
        for factor in layer.factor_groups()[0]:
            factor.weight.requires_grad_(False)
    return nn.Sequential(nn.Conv2d(3, 4, 1), *middle)


def wanted(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_functorch_and_forward_mode_go_through(taken: list[nn.Module]) -> None:
    model = stack()
    x = torch.randn(5, 3, 6, 6)

    def loss(one: Tensor) -> Tensor:
        return model(one[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    assert not taken
    looped = torch.stack([torch.autograd.grad(loss(one), one)[0] for one in x.clone().requires_grad_()])
    torch.testing.assert_close(each, looped, rtol=1e-4, atol=1e-5)
    assert taken
    taken.clear()
    _, along = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along)
    assert not taken


def test_exports_and_traces_see_plain_convolutions(taken: list[nn.Module]) -> None:
    model = stack()
    x = torch.randn(2, 3, 6, 6)
    exported = torch.export.export(model, (x,))
    assert {str(n.target) for n in exported.graph.nodes if n.op == "call_function"} <= {"aten.conv2d.default"}
    with pytest.warns((DeprecationWarning, FutureWarning)):  # one or the other, by the version of torch
        traced = torch.jit.trace(model, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    symbolic = torch.fx.symbolic_trace(model)
    called = [symbolic.get_submodule(str(node.target)) for node in symbolic.graph.nodes if node.op == "call_module"]
    assert [type(module) for module in called] == [nn.Conv2d] * 6
    assert not taken
    for other in (exported.module(), traced, symbolic):
        torch.testing.assert_close(other(x), model(x))
    assert taken


def test_state_dicts_do_not_know_of_it() -> None:
    model = stack()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert {name.rpartition(".")[2] for name in model.state_dict()} == {"weight", "bias"}
    assert torch.equal(copy.deepcopy(model)(x := torch.randn(2, 3, 6, 6)), model(x))


def test_compiled_it_gives_the_same_gradients_and_keeps_less() -> None:
    model = stack()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for own, ours in zip(*(torch.autograd.grad(m(x).square().sum(), wanted(model)) for m in (model, compiled)), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    frozen_bytes = saved_bytes(lambda: compiled(x))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert frozen_bytes < saved_bytes(lambda: compiled(x))


# ---- what other tools make of the factors ----


def quantisable() -> nn.Module:
    model = nn.Sequential(
        factored(walk(nn.Conv2d(4, 8, 3, padding=1)).layers[""], BlockTerm(3, 4)),
        nn.Flatten(),
        factored(walk(nn.Linear(8 * 16, 5)).layers[""], LowRank(4)),
    )
    return model.requires_grad_(False).eval()


def converted(model: nn.Module, tool: str, x: Tensor) -> nn.Module:
    ao = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about the tools' own future
        if tool == "dynamic":
            made: nn.Module = ao.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
            return made
        if tool == "FX":
            prepared = quantize_fx.prepare_fx(model, ao.get_default_qconfig_mapping("qnnpack"), (x,))
            prepared(x)
            made = quantize_fx.convert_fx(prepared)
            return made
        wrapped = ao.QuantWrapper(copy.deepcopy(model)).eval()
        wrapped.qconfig = ao.get_default_qconfig("qnnpack")
        ao.prepare(wrapped, inplace=True)
        wrapped(x)
        made = ao.convert(wrapped)
        return made


@pytest.fixture
def engine() -> Any:
    before = torch.backends.quantized.engine
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of PyTorch has no qnnpack")
    torch.backends.quantized.engine = "qnnpack"
    yield
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("tool", ["dynamic", "eager static", "FX"])
@pytest.mark.usefixtures("engine")
def test_quantised_factors_run_in_every_mode(tool: str) -> None:
    model, x = quantisable(), torch.randn(2, 4, 4, 4)
    small = converted(model, tool, x)
    kinds = {type(module).__module__ for module in small.modules()}
    assert any("quantized" in kind for kind in kinds), kinds
    wanted = model(x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = small(x)
        # Eight bits for each value between the factors.
        assert float((found - wanted).norm() / wanted.norm()) < 0.1, mode


@pytest.mark.usefixtures("engine")
def test_while_it_is_observed_for_quantisation_every_factor_is_called() -> None:
    ao, model, x = torch.ao.quantization, quantisable(), torch.randn(2, 4, 4, 4, requires_grad=True)
    model.qconfig = ao.get_default_qconfig("qnnpack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.prepare(model, inplace=True)
    model(x)
    observers = [module for module in model.modules() if isinstance(module, ao.ObserverBase)]
    assert len(observers) >= 5 and all(observer.min_val.numel() for observer in observers)


def test_a_weight_that_is_parametrised_is_read_through_it(taken: list[nn.Module]) -> None:
    layer = resting(nn.Conv2d(4, 6, 3))
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(2, 4, 7, 9, requires_grad=True)
    assert torch.equal(run_factor(layer, x), layer(x))
    assert not taken
