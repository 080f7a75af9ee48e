"""What is a layer, under which names, and what is refused, with which reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lamina.network.walk import walk


class Subclass(nn.Linear):
    """Reads its weight in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class SubSubclass(Subclass):
    """Of a class that computes in a way of its own."""


class Same(nn.Conv2d):
    """Computes as its parent does, as torchvision's `Conv3DSimple` does."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, channels, 3, padding=1, **options)
        self.note = "mine"

    @staticmethod
    def get_downsample_stride(stride: int) -> int:
        return stride

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)

    def extra_repr(self) -> str:
        return "mine"


class StillSame(Same):
    pass


class LoraLinear(nn.Linear):
    def __init__(self, I: int, O: int) -> None:
        super().__init__(I, O)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, I)), nn.Parameter(torch.zeros(O, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X + X.T


class Attention(nn.MultiheadAttention):
    """A subclass, as fairseq and others make them."""


def parametrized() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def old(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in half of all vocoders
        return norm(nn.Conv1d(6, 6, 3))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)


def quantised_dynamically() -> nn.Module:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this machine has no quantised kernels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 6)), {nn.Linear})[0]


def of_dtype(dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=dtype), requires_grad=False)
    return layer


def with_a_bias_that_is_no_parameter() -> nn.Module:
    layer = nn.Linear(6, 6, bias=False)
    del layer._parameters["bias"]
    layer.bias = torch.zeros(6)
    return layer


def with_a_parameter_more() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.gain = nn.Parameter(torch.ones(6))
    return layer


def empty() -> nn.Module:
    layer = nn.Conv2d(6, 6, 3)
    layer.weight = nn.Parameter(torch.empty(6, 0, 3, 3))
    return layer


def with_its_own(method: str) -> nn.Module:
    layer = nn.Conv2d(6, 6, 3)
    setattr(layer, method, lambda *args: args[0])
    return layer


def with_its_own_conv_forward() -> nn.Module:
    """The seamless tiling of diffusion models."""
    layer = nn.Conv2d(6, 6, 3)

    def tiled(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias)

    layer._conv_forward = tiled.__get__(layer, nn.Conv2d)
    return layer


def sparse() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


def with_a_tensor_subclass() -> nn.Module:
    class Odd(torch.Tensor):
        pass

    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.randn(6, 6).as_subclass(Odd))
    return layer


def with_its_own_forward() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x  # as accelerate's hooks do
    return layer


def with_a_child() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.adapter = nn.Linear(6, 6)
    return layer


def with_a_buffer() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_buffer("scale", torch.ones(6))
    return layer


def with_a_state_dict_hook() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def with_a_state_dict_pre_hook() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_state_dict_pre_hook(lambda *_: None)
    return layer


def with_a_load_state_dict_pre_hook() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_load_state_dict_pre_hook(lambda *_: None)
    return layer


def with_a_load_state_dict_post_hook() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_load_state_dict_post_hook(lambda *_: None)
    return layer


def with_two_children() -> nn.Module:
    layer = with_a_child()
    layer.other = nn.ReLU()
    return layer


def with_two_matrices() -> nn.Module:
    module = nn.Module()
    module.first, module.bias, module.second = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2, 2)))
    return module


def with_two_parametrizations() -> nn.Module:
    layer = parametrized()
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


def with_two_methods_exchanged() -> nn.Module:
    layer = with_its_own_forward()
    layer.extra_repr = lambda: ""
    return layer


def with_two_tensors_more() -> nn.Module:
    layer = with_a_buffer()
    layer.gain = nn.Parameter(torch.ones(6))
    return layer


NARROW = "groups of fewer than 16 are too narrow to gain by factors"
TURNED = "a transposed convolution is decomposed only in one group"
DEPTHWISE = "it is depthwise, one filter for each channel: there are no channels to cut"
RECURRENT = "a recurrent layer, whose matrices PyTorch multiplies by itself, step after step, and takes no factors of"


class Gated(nn.GRU):
    """One that computes as its parent does: it is refused like that."""


class OwnStep(nn.RNNCellBase):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight_ih, self.bias_ih) + nn.functional.linear(h, self.weight_hh, self.bias_hh)
        i, f = y.chunk(2, -1)
        return torch.lerp(h, i.tanh(), f.sigmoid())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (
        lambda: Subclass(6, 6),
        "Subclass is a subclass of Linear with forward of its own, and may compute something else",
    ),
    "a LoRA-like subclass": (
        lambda: LoraLinear(6, 6),
        "LoraLinear is a subclass of Linear with forward of its own, and may compute something else",
    ),
    "a subclass of one": (
        lambda: SubSubclass(6, 6),
        "SubSubclass is a subclass of Linear with forward of its own, and may compute something else",
    ),
    **{
        f"a subclass with its own {name}": (
            lambda name=name, own=own: type("Own", (nn.Conv2d,), {name: own})(4, 4, 3),
            f"Own is a subclass of Conv2d with {name} of its own, and may compute something else",
        )
        for name, own in {
            "_conv_forward": nn.Conv2d._conv_forward,
            "__call__": lambda self, x: x,
            "__getattr__": nn.Module.__getattr__,
            "padding_mode": "zeros",
            "stride": (2, 2),
            "_load_from_state_dict": nn.Module._load_from_state_dict,
        }.items()
    },
    "a parametrization": (parametrized, "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(6, 6, 3)),
        "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
        "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "weight_norm, old": (
        lambda: old(weight_norm),
        "its weight is computed by a hook (bias, weight_g, weight_v); remove weight_norm or the like first",
    ),
    "spectral_norm, old": (
        lambda: old(spectral_norm),
        "its weight is computed by a hook (bias, weight_orig); remove weight_norm or the like first",
    ),
    "pruning": (pruned, "its weight is computed by a hook (bias, weight_orig); remove weight_norm or the like first"),
    "a lazy linear layer": (lambda: nn.LazyLinear(6), "LazyLinear is lazy: run the network once before"),
    "a lazy convolution": (lambda: nn.LazyConv2d(6, 3), "LazyConv2d is lazy: run the network once before"),
    "quantisation": (quantised_dynamically, "torch.ao.nn.quantized.dynamic.modules.linear.Linear is quantised"),
    "int8": (lambda: of_dtype(torch.int8), "its weight is of torch.int8; only floating point weights are decomposed"),
    "int16": (lambda: of_dtype(torch.int16), "its weight is of torch.int16; only floating point weights are decomposed"),
    "complex": (
        lambda: of_dtype(torch.complex64),
        "its weight is of torch.complex64; only floating point weights are decomposed",
    ),
    "booleans": (lambda: of_dtype(torch.bool), "its weight is of torch.bool; only floating point weights are decomposed"),
    "a bias that is no parameter": (with_a_bias_that_is_no_parameter, "its bias is no parameter"),
    "a parameter more": (with_a_parameter_more, "it holds more than weight and bias: gain"),
    "an empty weight": (empty, "its weight is empty"),
    "an exchanged _conv_forward": (with_its_own_conv_forward, "its _conv_forward was replaced on the object"),
    "an exchanged __call__ in all but name": (lambda: with_its_own("_call_impl"), "its _call_impl was replaced on the object"),
    "exchanged saving": (lambda: with_its_own("_save_to_state_dict"), "its _save_to_state_dict was replaced on the object"),
    "a sparse weight": (sparse, "its weight is stored as torch.sparse_coo, not as a dense tensor"),
    "a tensor subclass (DTensor, torchao)": (with_a_tensor_subclass, "its weight is a Odd, not a plain parameter"),
    "narrow groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), f"it has 2 groups of 3→2 channels: {NARROW}"),
    "groups of one channel": (lambda: nn.Conv2d(6, 96, 3, groups=6), f"it has 6 groups of 1→16 channels: {NARROW}"),
    "a 1×1 in narrow groups": (lambda: nn.Conv1d(48, 9, 1, groups=3), f"it has 3 groups of 16→3 channels: {NARROW}"),
    "a transposed convolution in groups": (
        lambda: nn.ConvTranspose1d(64, 48, 3, groups=2),
        f"it has 2 groups of 32→24 channels: {TURNED}",
    ),
    "a depthwise convolution": (lambda: nn.Conv3d(6, 6, 3, groups=6), DEPTHWISE),
    "a transposed depthwise convolution": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), DEPTHWISE),
    "groups with a weight that is computed": (
        lambda: parametrizations.weight_norm(nn.Conv2d(6, 4, 3, groups=2)),
        "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "a bilinear layer": (
        lambda: nn.Bilinear(6, 6, 6),
        "Bilinear (weight weight) is neither a linear layer nor a convolution",
    ),
    "an LSTM": (lambda: nn.LSTM(6, 8), f"LSTM 6→8: {RECURRENT}"),
    "a GRU": (lambda: nn.GRU(6, 8, batch_first=True), f"GRU 6→8: {RECURRENT}"),
    "an RNN": (lambda: nn.RNN(6, 8, nonlinearity="relu"), f"RNN 6→8: {RECURRENT}"),
    "an LSTM of many layers": (
        lambda: nn.LSTM(6, 8, 3, dropout=0.1, bidirectional=True, proj_size=4),
        f"LSTM 6→8, 3 layers, both ways, projected to 4: {RECURRENT}",
    ),
    "a step of an LSTM": (lambda: nn.LSTMCell(6, 8), f"LSTMCell 6→8: {RECURRENT}"),
    "a step of a GRU": (lambda: nn.GRUCell(6, 8), f"GRUCell 6→8: {RECURRENT}"),
    "a step of an RNN": (lambda: nn.RNNCell(6, 8), f"RNNCell 6→8: {RECURRENT}"),
    "a recurrent layer of one's own": (lambda: Gated(6, 8), f"Gated 6→8, a subclass of GRU: {RECURRENT}"),
    "a step of one's own": (lambda: OwnStep(6, 8, True, 2), f"OwnStep 6→8, a subclass of RNNCellBase: {RECURRENT}"),
    "a recurrent layer whose weight is computed": (
        lambda: parametrizations.spectral_norm(nn.LSTM(6, 8), "weight_hh_l0"),
        f"ParametrizedLSTM 6→8, a subclass of LSTM: {RECURRENT}",
    ),
    "an exchanged forward": (with_its_own_forward, "its forward was replaced on the object"),
    "children": (with_a_child, "it holds modules of its own (adapter)"),
    "a buffer": (with_a_buffer, "it holds more than weight and bias: scale"),
    "a state-dict hook": (with_a_state_dict_hook, "it has state-dict hooks, whose meaning for its factors is unknown"),
    "a state-dict pre-hook": (with_a_state_dict_pre_hook, "it has state-dict hooks, whose meaning for its factors is unknown"),
    "a load-state-dict pre-hook": (
        with_a_load_state_dict_pre_hook,
        "it has state-dict hooks, whose meaning for its factors is unknown",
    ),
    "a load-state-dict post-hook": (
        with_a_load_state_dict_post_hook,
        "it has state-dict hooks, whose meaning for its factors is unknown",
    ),
    "two children": (with_two_children, "it holds modules of its own (adapter, other)"),
    "two matrices": (
        with_two_matrices,
        "Module (weight first, second) is neither a linear layer nor a convolution",
    ),
    "two parametrizations": (
        with_two_parametrizations,
        "its weight, bias is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "two methods exchanged": (with_two_methods_exchanged, "its forward, extra_repr was replaced on the object"),
    "two tensors more": (with_two_tensors_more, "it holds more than weight and bias: gain, scale"),
}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.layer = nn.Linear(8, 8)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(4, 8, 8))


NO_LAYERS = (
    nn.Embedding(6, 6),
    nn.EmbeddingBag(6, 6),
    nn.LayerNorm((3, 4)),
    nn.RMSNorm((3, 4)),
    nn.BatchNorm2d(4),
    nn.GroupNorm(2, 4),
    Tokens(),
)


@pytest.mark.parametrize("module", NO_LAYERS, ids=lambda module: type(module).__name__)
def test_what_multiplies_by_no_weight_is_no_layer_and_not_refused(module: nn.Module) -> None:
    assert walk(nn.Sequential(module)).refused == {}


def test_weights_that_a_module_multiplies_by_itself_are_refused_though_tokens_are_not() -> None:
    assert list(walk(nn.Sequential(Experts(), Tokens())).refused) == ["0"]


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_decomposed_is_refused_by_name_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    # traps: subclasses, parametrizations, weight_norm, lazy, quantised, LoRA, DTensor; groups > 1; ConvTranspose
    census = walk(nn.Sequential(nn.Conv2d(3, 4, 3), make()))
    assert "1" not in census.layers and census.refused["1"] == reason
    assert "0" in census.layers, "its neighbour is not concerned"


@pytest.mark.parametrize("kind", [Same, StillSame])
def test_a_subclass_that_computes_as_its_parent_does_is_a_layer(kind: type[Same]) -> None:
    census = walk(nn.Sequential(kind(4, bias=False), nn.Linear(2, 2)))
    assert list(census.layers) == ["0", "1"] and not census.refused
    assert census.layers["0"].geometry == walk(nn.Conv2d(4, 4, 3, padding=1, bias=False)).layers[""].geometry


PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Attention])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "of their own widths"])
def test_the_projections_of_an_attention_are_layers_on_its_own_memory(
    kind: type[nn.MultiheadAttention], widths: dict[str, int]
) -> None:
    # traps: nn.MultiheadAttention: out_proj is a Linear subclass, in_proj_weight a bare parameter
    attention = kind(8, 2, **widths)
    census = walk(nn.Sequential(nn.Linear(8, 8), attention))
    assert list(census.layers) == ["0", *(f"1.{part}" for part in PARTS)] and not census.refused
    layers = [census.layers[f"1.{part}"] for part in PARTS]
    assert [layer.geometry.in_channels for layer in layers] == [8, widths.get("kdim", 8), widths.get("vdim", 8), 8]
    assert all(layer.holder is attention for layer in layers)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.fill_(2.0)
    assert all(bool((layer.weight == 2).all()) and bool((layer.bias == 2).all()) for layer in layers)


def test_a_plain_layer_put_into_attention_is_its_output_projection() -> None:
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)
    assert list(walk(attention).layers) == PARTS


class OwnWay(nn.MultiheadAttention):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


def attention_with(change: Callable[[nn.MultiheadAttention], object]) -> nn.Module:
    attention = nn.MultiheadAttention(8, 2)
    change(attention)
    return attention


def tie(attention: nn.MultiheadAttention) -> None:
    attention.out_proj.weight = nn.Parameter(attention.in_proj_weight.detach()[:8])


ODD_ATTENTION: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "of its own way": (lambda: OwnWay(8, 2), "OwnWay is a subclass of MultiheadAttention with forward of its own"),
    "a parametrized weight": (
        lambda: attention_with(lambda a: parametrize.register_parametrization(a, "in_proj_bias", nn.Tanh())),
        "its in_proj_bias is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "a parametrized output": (
        lambda: attention_with(lambda a: parametrizations.orthogonal(a.out_proj)),
        "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "another output": (
        lambda: attention_with(lambda a: setattr(a, "out_proj", nn.Identity())),
        "its out_proj is a Identity, whose weight it reads itself",
    ),
    "more parameters": (
        lambda: attention_with(lambda a: a.register_parameter("gain", nn.Parameter(torch.ones(2)))),
        "it holds more than an attention's weights: gain",
    ),
    "an exchanged forward": (
        lambda: attention_with(lambda a: setattr(a, "forward", a.forward)),
        "its forward was replaced on the object",
    ),
    "modules of its own": (
        lambda: attention_with(lambda a: setattr(a, "norm", nn.ReLU())),
        "it holds modules of its own (norm)",
    ),
    "tied within": (lambda: attention_with(tie), "its weights are tied to those of 0, 0.out_proj"),
}


@pytest.mark.parametrize(("make", "reason"), ODD_ATTENTION.values(), ids=ODD_ATTENTION)
def test_an_attention_that_may_compute_something_else_is_refused_whole(make: Callable[[], nn.Module], reason: str) -> None:
    census = walk(nn.Sequential(make()))
    assert not census.layers and census.refused == {"0": reason}


def test_an_attention_tied_to_another_layer_is_refused_as_that_is() -> None:
    attention, other = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
    other.weight = attention.out_proj.weight
    assert walk(nn.Sequential(attention, other)).refused.keys() == {"0", "1"}


@pytest.mark.parametrize(
    "quiet", [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.PReLU(4), nn.ReLU(), nn.Dropout()], ids=str
)
def test_modules_without_a_matrix_are_nobodys_business(quiet: nn.Module) -> None:
    census = walk(nn.Sequential(quiet))
    assert not census.layers and not census.refused


def test_a_module_under_two_names_is_one_layer_with_both() -> None:
    # traps: one module under two names
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": nn.Sequential(shared)})
    layers = walk(model).layers
    assert list(layers) == ["a", "b"] and layers["a"].names == ("a", "c.0") and layers["a"].name == "a"


def test_layers_in_a_shared_parent_have_a_name_for_every_way_to_them() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": block, "b": block})
    assert walk(model).layers["a.0"].names == ("a.0", "b.0")


def test_tied_weights_are_refused_and_name_each_other() -> None:
    # traps: tied parameters (embedding/head)
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    census = walk(model)
    assert list(census.layers) == ["body"] and "tied to that of embedding" in census.refused["head"]


def test_weights_tied_between_layers_are_refused_on_both_sides() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert walk(model).refused == {"0": "its weight is tied to that of 1", "1": "its weight is tied to that of 0"}


def test_weights_tied_by_storage_are_refused_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert set(walk(model).refused) == {"0", "1"}


def test_a_parameter_that_the_parent_holds_too_is_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.copy_of_weight = model[0].weight
    assert set(walk(model).layers) == set()


def two() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(4, 4), nn.Linear(4, 4)


def refused(**names: nn.Module) -> dict[str, str]:
    return walk(nn.ModuleDict(names)).refused


def test_biases_are_tied_too() -> None:
    a, b = two()
    b.bias = a.bias
    assert refused(a=a, b=b) == {"a": "its weight is tied to that of b", "b": "its weight is tied to that of a"}


def test_the_weights_of_two_layers_that_overlap_in_a_row_are_tied() -> None:
    a, b = two()
    whole = torch.randn(7, 4)
    a.weight, b.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[3:])
    assert set(refused(a=a, b=b)) == {"a", "b"}


def test_weights_beside_one_another_in_one_storage_are_not_tied() -> None:
    a, b = two()
    whole = torch.randn(8, 4)
    a.weight, b.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    assert not refused(a=a, b=b)


def test_query_key_and_value_in_one_weight_are_each_tied_to_it() -> None:
    q, k, v, qkv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 12)
    for number, layer in enumerate((q, k, v)):
        layer.weight = nn.Parameter(qkv.weight.detach()[4 * number : 4 * number + 4])
    assert refused(q=q, k=k, v=v, qkv=qkv) == {
        name: f"its weight is tied to that of {', '.join(sorted({'q', 'k', 'v', 'qkv'} - {name}))}"
        for name in ("q", "k", "v", "qkv")
    }


@pytest.mark.parametrize("bias", [False, True])
def test_a_buffer_that_is_a_view_of_a_tensor_is_named_as_such(bias: bool) -> None:
    a, b = two()
    b.register_buffer("copy", (a.bias if bias else a.weight).detach()[:1])
    b = nn.Sequential(nn.Identity(), b)
    assert refused(a=a, b=b)["a"] == "its weight is tied to that of a tensor of b.1"


@pytest.mark.parametrize(
    "make", [lambda p: p.detach(), lambda p: torch.from_numpy(p.detach().numpy()[1:])], ids=["torch", "numpy"]
)
def test_a_plain_attribute_on_the_same_memory_is_seen(make: Callable[[Tensor], Tensor]) -> None:
    a, b = two()
    model = nn.ModuleDict({"a": a, "b": b})
    model.table = make(a.weight)
    assert walk(model).refused == {"a": "its weight is tied to that of a tensor of the network"}


def test_a_layer_whose_own_weight_and_bias_overlap_is_tied_to_itself() -> None:
    a, b = two()
    a.bias = nn.Parameter(a.weight.detach()[0])
    assert refused(a=a, b=b) == {"a": "its weight is tied to that of a"}
    b.weight = nn.Parameter(a.weight.detach())
    assert refused(a=a, b=b)["a"] == "its weight is tied to that of a, b"
    b.mine = b.weight
    assert set(refused(b=b)) == {"b"}


def test_a_layer_under_two_names_is_not_tied_to_itself() -> None:
    a, b = two()
    assert not refused(a=a, b=b, c=a)


def test_parameters_without_values_are_not_tied_to_one_another() -> None:
    a, b = two()
    for layer in (a, b):
        layer.bias = nn.Parameter(torch.empty(0))
    assert refused(a=a, b=b, c=empty(), d=empty()) == dict.fromkeys("cd", "its weight is empty")


def test_one_empty_parameter_in_two_layers_is_a_tie_all_the_same() -> None:
    a, b = two()
    a.bias = b.bias = nn.Parameter(torch.empty(0))
    assert set(refused(a=a, b=b)) == {"a", "b"}


def test_callables_of_the_users_own_on_a_layer_replace_nothing() -> None:
    layer = nn.Linear(4, 4)
    layer.initialise, layer.extra = (lambda: None), nn.functional.relu
    assert not refused(a=layer)


def test_a_compiled_layer_is_a_layer() -> None:
    layer = nn.Linear(4, 4)
    layer.compile(backend="eager")
    assert not refused(a=layer)


def test_a_layer_is_read_by_its_own_tensors() -> None:
    layer = nn.Conv2d(3, 4, 3)
    found = walk(nn.Sequential(layer)).layers["0"]
    assert found.parameter is layer.weight and found.bias is layer.bias and found.module is layer
    assert found.weight.data_ptr() == layer.weight.data_ptr() and found.title == "0"
    assert walk(layer).layers[""].title == "the network"


def test_a_rebuilt_layer_is_a_plain_one_on_the_same_tensors() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular")
    layer.register_forward_hook(lambda *_: 1)
    layer.mine = 1
    again = walk(layer).layers[""].rebuilt()
    assert again is not layer and again.weight is layer.weight and again.bias is layer.bias
    assert repr(again) == repr(layer) and not again._forward_hooks and not hasattr(again, "mine")


def test_layers_on_the_meta_device_are_not_taken_for_tied() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert set(walk(model).layers) == {"0", "1"}


def test_the_root_can_be_the_layer() -> None:
    # traps: the root itself is the layer
    assert list(walk(nn.Linear(4, 4)).layers) == [""]
    assert walk(nn.Linear(4, 4)).layers[""].names == ("",)


def test_children_of_the_root_are_found_in_their_order() -> None:
    # traps: direct children of the root
    assert list(walk(nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv3d(4, 4, 3))).layers) == ["0", "2"]


def test_nothing_is_changed_by_looking() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyLinear(4))
    before = {name: id(value) for name, value in model.named_parameters()}
    walk(model)
    assert {name: id(value) for name, value in model.named_parameters()} == before


def test_a_scripted_network_is_looked_at_without_a_crash() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    census = walk(scripted)
    assert not census.layers and "0" in census.refused
