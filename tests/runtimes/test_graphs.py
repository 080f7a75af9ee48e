"""Layers as graphs: what a runtime computes of one is what PyTorch computes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.forms import BlockTerm, Form, LowRank, Separable
from lamina.layers.build import random
from lamina.network.readers import reader_of
from lamina.network.walk import walk
from lamina.runtimes.graphs import layer_bytes, onnx_program
from lamina.runtimes.onnxruntime import OnnxRuntime
from lamina.runtimes.openvino import OpenVINO
from lamina.values import Workload

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "linear of tokens without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 7, 6)),
    "1d": (lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 9, 8)),
    "2d, sides": (lambda: nn.Conv2d(6, 5, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1), bias=False), (2, 6, 9, 8)),
    "2d, same": (lambda: nn.Conv2d(6, 5, (2, 4), padding="same", dilation=(1, 3)), (2, 6, 9, 8)),
    "2d, valid": (lambda: nn.Conv2d(6, 5, 3, padding="valid"), (2, 6, 9, 8)),
    "2d, reflect": (lambda: nn.Conv2d(6, 5, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 9, 8)),
    "2d, replicate": (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="replicate"), (2, 6, 9, 8)),
    "2d, circular": (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), (2, 6, 9, 8)),
    "2d, grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 9, 8)),
    "1×1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 9, 8)),
    "3d": (lambda: nn.Conv3d(4, 5, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 5, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1)), (2, 6, 9, 8)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(6, 4, 3, 2, groups=2, bias=False), (2, 6, 9)),
}


def answered(module: nn.Module, x: Tensor) -> Tensor:
    graph = layer_bytes(module, x)
    assert graph is not None
    (answer,) = OnnxRuntime()._session(graph, [x]).answers()
    return answer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_written_by_hand_computes_what_it_does(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(answered(layer, x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "linear of tokens", "1d", "2d", "2d, grouped", "1×1", "3d", "transposed"])
def test_it_is_written_with_the_operators_of_the_exporter(name: str) -> None:
    import onnx

    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    graph = layer_bytes(layer, x)
    assert graph is not None
    by_hand, by_exporter = onnx.load_from_string(graph), onnx_program(layer, Workload(x)).model_proto
    assert [node.op_type for node in by_hand.graph.node] == [node.op_type for node in by_exporter.graph.node]


def test_so_is_a_stack_of_factors() -> None:
    import onnx

    layer = nn.Conv2d(6, 5, 3, stride=2, padding=1)
    geometry = walk(nn.Sequential(layer)).layers["0"].geometry
    stack, x = random(geometry, BlockTerm(4, 4, 2), layer).eval(), torch.randn(2, 6, 9, 8)
    graph = layer_bytes(stack, x)
    assert graph is not None
    by_hand, by_exporter = onnx.load_from_string(graph), onnx_program(stack, Workload(x)).model_proto
    assert [node.op_type for node in by_hand.graph.node] == [node.op_type for node in by_exporter.graph.node]


@pytest.mark.parametrize("form", [LowRank(3), BlockTerm(4, 3), BlockTerm(None, 3), BlockTerm(4, 4, 2), Separable(4)], ids=str)
def test_so_does_a_stack_of_factors(form: Form) -> None:
    layer = nn.Conv2d(6, 5, 1 if isinstance(form, LowRank) else 3, stride=2, padding=0 if isinstance(form, LowRank) else 1)
    geometry = walk(nn.Sequential(layer)).layers["0"].geometry
    stack, x = random(geometry, form, layer).eval(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(answered(stack, x), stack(x), rtol=1e-4, atol=1e-5)


def test_so_does_a_layer_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(5, 6), torch.randn(2, 7, 6)
    geometry = walk(nn.Sequential(layer)).layers["0"].geometry
    assert type(reader_of(geometry).dense(geometry, layer.weight.T, layer.bias)) is Conv1D
    with torch.no_grad():
        torch.testing.assert_close(answered(layer, x), layer(x), rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_as_such() -> None:
    layer, x = nn.Linear(6, 5).half(), torch.randn(3, 6).half()
    answer = answered(layer, x)
    assert answer.dtype == torch.float16
    with torch.no_grad():
        torch.testing.assert_close(answer, layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_between_neighbours_a_convolution_computes_the_same_and_anything_else_stands_alone(name: str) -> None:
    import onnx

    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    graph = layer_bytes(layer, x, neighbours=True)
    assert graph is not None
    nodes = onnx.load_from_string(graph).graph.node
    groups = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "group"]
    ends = [] if isinstance(layer, nn.Linear) else [layer.in_channels, layer.out_channels]
    assert [groups[0], groups[-1]] == ends if ends else not groups
    (answer,) = OnnxRuntime()._session(graph, [x]).answers()
    with torch.no_grad():
        torch.testing.assert_close(answer, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 6, 9, 8), (2, 4, 3, 6, 6)], ids=str)
def test_neighbours_alone_give_what_they_are_given(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for runtime in (OnnxRuntime(), OpenVINO()):
        (answer,) = runtime.neighbours(x).answers()
        torch.testing.assert_close(answer, x)
    (answer,) = OpenVINO(int8=[x]).neighbours(x).answers()
    assert 0 < float((answer - x).norm() / x.norm()) < 0.2
    assert OnnxRuntime().neighbours(x.bfloat16()) is None


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear of tokens", "2d", "2d, reflect", "1×1", "transposed"])
def test_in_int8_it_computes_about_the_same_from_weights_of_eight_bits(name: str, kind: torch.dtype) -> None:
    import onnx

    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    graph = layer_bytes(layer, x, int8=kind)
    assert graph is not None
    kinds = {each.data_type for each in onnx.load_from_string(graph).graph.initializer if len(each.dims) > 1}
    assert kinds == {onnx.TensorProto.INT8}
    (answer,) = OnnxRuntime()._session(graph, [x]).answers()
    with torch.no_grad():
        expected = layer(x)
    assert float((answer - expected).norm() / expected.norm()) < 0.1


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def test_what_is_no_plain_layer_is_left_to_the_exporter() -> None:
    x = torch.randn(3, 6)
    assert layer_bytes(Own(), x) is None
    assert layer_bytes(nn.Linear(6, 5).bfloat16(), x.bfloat16()) is None
    assert layer_bytes(nn.Conv2d(6, 5, 3), torch.randn(6, 9, 8)) is None  # unbatched
    (answer,) = OnnxRuntime().prepare_layer(Own(), x).answers()
    torch.testing.assert_close(answer, x.sin())


def test_a_layer_in_the_room_of_layers_is_timed_from_its_graph() -> None:
    plan = lamina.make_plan(nn.Sequential(nn.Linear(64, 64)), torch.randn(8, 64), lamina.Ratio(2.0), runtime=OnnxRuntime())
    assert plan.layers["0"].before.timing is not None
    assert plan.setting is not None
    assert plan.setting.runtime.startswith("ONNX Runtime")
