"""From a layer to its geometry, weight and bias, and back to the same layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.network import readers
from lamina.network.readers import convolution, linear, reader, reader_of
from lamina.values import Geometry

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "conv1d": lambda: nn.Conv1d(6, 4, 3, 2, 1, 2),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), bias=False),
    "conv3d": lambda: nn.Conv3d(6, 4, 3, padding="same", padding_mode="circular"),
    "valid": lambda: nn.Conv2d(6, 4, 3, padding="valid"),
    "groups": lambda: nn.Conv2d(48, 32, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, bias=False),
    "1×1 in groups": lambda: nn.Conv1d(48, 51, 1, groups=3),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 4, 3, 2, 1, 1, dilation=2),
    "transposed 2d": lambda: nn.ConvTranspose2d(6, 4, (3, 2), (2, 3), (1, 0), (1, 2), bias=False),
    "transposed 3d": lambda: nn.ConvTranspose3d(6, 4, 2).to(memory_format=torch.channels_last_3d),
}


def conv1d_of_hugging_face() -> nn.Module:
    layer: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    return layer


@pytest.mark.parametrize("make", [*LAYERS.values(), conv1d_of_hugging_face], ids=[*LAYERS, "Conv1D"])
def test_what_is_read_makes_the_same_layer_again(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    found = reader(layer)
    assert found is not None
    geometry = found.geometry(layer)
    assert not isinstance(geometry, str)
    assert reader_of(geometry) is not None
    weight = found.weight(layer.weight)
    assert torch.equal(found.stored(weight), layer.weight)
    assert weight.shape == (geometry.out_channels, geometry.widths[0], *geometry.kernel)
    again = found.dense(geometry, weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
    assert repr(again) == repr(layer)
    x = torch.randn(2, *[geometry.in_channels, 7, 8, 9][: max(1, 1 + len(geometry.kernel))])
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("make", [*LAYERS.values(), conv1d_of_hugging_face], ids=[*LAYERS, "Conv1D"])
def test_the_weight_that_is_read_is_the_layers_own(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    assert reader(layer).weight(layer.weight).data_ptr() == layer.weight.data_ptr()


def test_a_type_that_computes_in_a_way_of_its_own_has_no_reader() -> None:
    class Mine(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    assert reader(Mine(3, 4, 3)) is reader(nn.Conv2d(3, 4, 3)) is not None
    assert reader(Other(3, 4, 3)) is None


def geometry_of(layer: nn.Module) -> Geometry | str:
    found = reader(layer)
    assert found is not None
    return found.geometry(layer)


@pytest.mark.parametrize("make", [*LAYERS.values(), conv1d_of_hugging_face], ids=[*LAYERS, "Conv1D"])
def test_channels_and_kernel_are_those_of_the_weight_whatever_the_attributes_say(make) -> None:  # type: ignore[no-untyped-def]
    """PyTorch computes with the weight: it may have been pruned, or summed over the channels of the input."""
    layer = make()
    before = geometry_of(layer)
    for name in ("in_channels", "out_channels", "in_features", "out_features", "nx", "nf", "kernel_size"):
        if hasattr(layer, name):
            setattr(layer, name, 99)
    assert geometry_of(layer) == before


def test_a_stem_of_one_channel_is_read_as_what_it_computes() -> None:
    layer = nn.Conv2d(3, 9, 3)
    layer.weight = nn.Parameter(layer.weight.detach().sum(1, keepdim=True)[:7])
    layer.bias = nn.Parameter(layer.bias.detach()[:7])
    geometry = geometry_of(layer)
    assert isinstance(geometry, Geometry) and (geometry.out_channels, geometry.in_channels) == (7, 1)
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(reader(layer).dense(geometry, layer.weight, layer.bias)(x), layer(x))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2, (2,), [2], [2, 2], (2, 2)], ids=repr)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d], ids=["Conv2d", "ConvTranspose2d"])
def test_a_number_or_a_list_of_one_stands_for_all_sides(kind: type[nn.Module], name: str, value: object) -> None:
    layer = kind(3, 4, 3)
    if kind is nn.ConvTranspose2d and name == "padding":
        value = (2, 2)  # of which PyTorch takes no other
    setattr(layer, name, value)
    geometry = geometry_of(layer)
    assert isinstance(geometry, Geometry) and getattr(geometry, name) == (2, 2)
    x, found = torch.randn(2, 3, 9, 8), reader(layer)
    assert found is not None
    assert torch.equal(found.dense(geometry, found.weight(layer.weight), layer.bias)(x), layer(x))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_sides_are_read_one_by_one(name: str) -> None:
    geometry = geometry_of(nn.Conv3d(3, 4, 2, **{name: (1, 2, 3)}))
    assert isinstance(geometry, Geometry) and getattr(geometry, name) == (1, 2, 3)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Linear(6, 4), (4, 6, 1), "its weight has 3 dimensions, not 2"),
        (nn.Linear(6, 4), (24,), "its weight has 1 dimensions, not 2"),
        (nn.Conv1d(6, 4, 3), (4, 6, 3, 3), "its weight has 4 dimensions, not 3"),
        (nn.Conv2d(6, 4, 3), (4, 6, 3), "its weight has 3 dimensions, not 4"),
        (nn.Conv3d(6, 4, 3), (4, 6, 3, 3), "its weight has 4 dimensions, not 5"),
        (nn.ConvTranspose1d(6, 4, 3), (72,), "its weight has 1 dimensions, not 3"),
    ],
    ids=repr,
)
def test_a_weight_of_other_dimensions_is_refused(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    layer.weight = nn.Parameter(torch.randn(shape))
    assert geometry_of(layer) == reason


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *TRANSPOSED])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [2, 3])
def test_narrow_groups_and_those_of_transposed_convolutions_are_refused_by_number_and_widths(
    kind: type[nn.Conv2d], kernel: int, groups: int
) -> None:
    narrow = geometry_of(kind(15 * groups, 18 * groups, kernel, groups=groups))
    assert isinstance(narrow, str) and narrow.startswith(f"it has {groups} groups of 15→18 channels: ")
    wide = geometry_of(kind(16 * groups, 18 * groups, kernel, groups=groups))
    if kind in TRANSPOSED:
        assert isinstance(wide, str) and wide.startswith(f"it has {groups} groups of 16→18 channels: a transposed")
    else:
        assert isinstance(wide, Geometry) and (wide.groups, wide.widths) == (groups, (16, 18))
    assert (
        geometry_of(kind(6, 6, kernel, groups=6))
        == "it is depthwise, one filter for each channel: there are no channels to cut"
    )


@pytest.mark.parametrize("make", [*LAYERS.values(), conv1d_of_hugging_face], ids=[*LAYERS, "Conv1D"])
def test_a_layer_tells_of_its_geometry_by_its_own_names(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    geometry = geometry_of(layer)
    assert isinstance(geometry, Geometry)
    told = reader_of(geometry).attributes(geometry)
    assert told and told == {name: getattr(layer, name) for name in told}
    own = {name for name in vars(layer) if not name.startswith("_") and name != "training"}
    assert own - set(told) <= {"padding_mode"}


@pytest.mark.parametrize("make", [*LAYERS.values(), conv1d_of_hugging_face], ids=[*LAYERS, "Conv1D"])
@pytest.mark.parametrize("trains", [(True, False), (False, True), (True, True), (False, False)], ids=str)
def test_a_layer_made_anew_trains_what_it_was_given_to_train(make, trains: tuple[bool, bool]) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    geometry = geometry_of(layer)
    assert isinstance(geometry, Geometry)
    weight = reader_of(geometry).weight(layer.weight).detach().clone().requires_grad_(trains[0])
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_(trains[1])
    again = reader_of(geometry).dense(geometry, weight, bias)
    assert again.weight.requires_grad is trains[0] and again.weight.is_leaf
    assert again.bias is None if bias is None else again.bias.requires_grad is trains[1]
    assert set(dict(again.named_parameters())) == ({"weight"} if bias is None else {"weight", "bias"})


def test_parameters_are_taken_as_they_are_and_tensors_are_not_copied() -> None:
    layer = nn.Linear(3, 3)
    again = reader(layer).dense(geometry_of(layer), layer.weight, layer.bias)  # type: ignore[union-attr,arg-type]
    assert again.weight is layer.weight and again.bias is layer.bias
    weight = torch.randn(3, 3)
    made = reader(layer).dense(geometry_of(layer), weight, None)  # type: ignore[union-attr,arg-type]
    assert made.weight.data_ptr() == weight.data_ptr()


def test_a_dense_weight_that_is_stored_transposed_lies_in_memory_as_the_type_stores_it() -> None:
    layer = conv1d_of_hugging_face()
    geometry = geometry_of(layer)
    assert isinstance(geometry, Geometry)
    made = reader_of(geometry).dense(geometry, torch.randn(4, 6), None)
    assert made.weight.shape == (6, 4) and made.weight.is_contiguous()


# Layers without values, which are copied from one that is kept.

EMPTY = {
    "linear": lambda: linear(6, 4, True),
    "linear without bias": lambda: linear(6, 4, False),
    "convolution": lambda: convolution(Geometry("Conv2d", 4, 6, True, (3, 2), (2, 1), (1, 0), (1, 2), "circular")),
    "convolution in groups": lambda: convolution(Geometry("Conv1d", 4, 6, False, (3,), (1,), "same", (1,)), 2),
}
OF_PYTORCH = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "convolution": lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), padding_mode="circular"),
    "convolution in groups": lambda: nn.Conv1d(6, 4, 3, padding="same", groups=2, bias=False),
}
empties = pytest.mark.parametrize("name", EMPTY)


@empties
def test_a_layer_without_values_is_what_pytorch_makes(name: str) -> None:
    made, wanted = EMPTY[name](), OF_PYTORCH[name]()
    assert type(made) is type(wanted) and repr(made) == repr(wanted)
    tensors = {"_parameters"}
    assert {k: v for k, v in vars(made).items() if k not in tensors} == {
        k: v for k, v in vars(wanted).items() if k not in tensors
    }
    assert list(made._parameters) == list(wanted._parameters)
    for key, parameter in made._parameters.items():
        other = wanted._parameters[key]
        assert (parameter is None) == (other is None)
        if parameter is not None and other is not None:
            assert parameter.is_meta and type(parameter) is nn.Parameter and parameter.requires_grad
            assert parameter.shape == other.shape and parameter.dtype == other.dtype


@empties
def test_layers_without_values_share_nothing_with_one_another(name: str) -> None:
    one, two = EMPTY[name](), EMPTY[name]()
    assert one is not two
    tables = [key for key, value in vars(one).items() if isinstance(value, dict | set | list)]
    assert "_parameters" in tables and "_forward_hooks" in tables and "_non_persistent_buffers_set" in tables
    assert not [key for key in tables if vars(one)[key] is vars(two)[key]]
    assert not [key for key, p in one._parameters.items() if p is not None and p is two._parameters[key]]


@empties
def test_what_is_done_to_one_is_not_seen_in_the_next(name: str) -> None:
    before, one = repr(EMPTY[name]()), EMPTY[name]()
    one.weight.requires_grad_(False)
    one.weight.note = 1
    one.register_buffer("more", torch.zeros(1), persistent=False)
    one.register_forward_hook(lambda *_: None)
    one.inside = nn.Linear(1, 1)
    one.mine = 1
    one.eval()
    two = EMPTY[name]()
    assert repr(two) == before and two.training and two.weight.requires_grad and not vars(two.weight)
    assert not hasattr(two, "mine") and not two._forward_hooks and not two._buffers and not two._non_persistent_buffers_set


@empties
def test_no_random_number_is_drawn_for_a_layer_without_values_that_is_made_again(name: str) -> None:
    EMPTY[name]()
    state = torch.get_rng_state()
    EMPTY[name]()
    assert torch.equal(torch.get_rng_state(), state)


@empties
def test_a_layer_first_made_in_inference_mode_is_made_to_be_trained_afterwards(name: str) -> None:
    readers._linear.cache_clear(), readers._convolution.cache_clear()
    with torch.inference_mode():
        EMPTY[name]()
    assert not any(p.is_inference() or not p.requires_grad for p in EMPTY[name]().parameters())


def test_the_types_that_are_read_have_the_names_that_files_hold() -> None:
    transposed = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
    assert list(readers._OF_KIND) == ["Linear", "Conv1d", "Conv2d", "Conv3d", *transposed, "Conv1D"]
    assert len(readers._OF_KIND) == len(readers._READERS)


@empties
def test_a_layer_without_values_has_none_when_it_is_first_made_either(name: str) -> None:
    for made in (readers._linear, readers._convolution):
        made.cache_clear()
    assert all(parameter.is_meta for parameter in EMPTY[name]().parameters())
