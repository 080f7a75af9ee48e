"""From a layer to its geometry, weight and bias, and back to the same layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.network.readers import known_types, reader, reader_of

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "conv1d": lambda: nn.Conv1d(6, 4, 3, 2, 1, 2),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), bias=False),
    "conv3d": lambda: nn.Conv3d(6, 4, 3, padding="same", padding_mode="circular"),
    "valid": lambda: nn.Conv2d(6, 4, 3, padding="valid"),
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
    assert weight.shape == (geometry.out_channels, geometry.in_channels, *geometry.kernel)
    again = found.dense(geometry, weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
    assert repr(again) == repr(layer)
    x = torch.randn(2, *[6, 7, 8, 9][: max(1, 1 + len(geometry.kernel))])
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("make", [*LAYERS.values(), conv1d_of_hugging_face], ids=[*LAYERS, "Conv1D"])
def test_the_weight_that_is_read_is_the_layers_own(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    assert reader(layer).weight(layer.weight).data_ptr() == layer.weight.data_ptr()


def test_the_exact_type_counts() -> None:
    class Mine(nn.Conv2d):
        pass

    assert reader(Mine(3, 4, 3)) is None and reader(nn.Conv2d(3, 4, 3)) is not None


def test_every_type_known_has_one_name() -> None:
    assert len(set(known_types())) == len(known_types())
