"""Networks and single layers as ONNX graphs, which the runtimes for serving read.

A network goes through PyTorch's own exporter. That takes about a second even for a single layer, and to choose ranks takes
hundreds of layers: so a layer, or a stack of factors, is written here directly, as the exporter writes it. What is no plain
layer goes through the exporter as well.

With ``int8`` set, a layer's inputs and weights pass through a pair of QuantizeLinear and DequantizeLinear, as they do in a
quantised network. The scales are those of the random numbers at hand: times do not depend on them.

A convolution stands between two neighbours, depthwise 1×1s, which take part in its time. Runtimes keep maps in blocks of
channels, and in int8, from one convolution to the next. A graph of one layer alone would turn its input and output for every
form that uses blocks, and for none that does not, where in the network it is the other way round. Between neighbours every
form pays for both ends alike, and for what it breaks in between. What the neighbours take alone is taken off each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LaminaError, MissingExtra
from ..layers.decomposed import DecomposedLayer
from ..network.program import exporting, program_of
from ..network.running import first_line, said
from ..values import Workload
from .runtime import quietly

_OPSET, _IR = 20, 10
"""Of the graphs of layers."""
EXPORTER = ("onnx", "onnxscript", "onnx-ir")
"""The packages beside torch that decide which graph is made of a network."""
_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
_CONVOLUTIONS: dict[type[nn.Module], int] = {
    **{nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3},
    **{nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3},
}


def onnx_program(model: nn.Module, workload: Workload, *, dynamic_batch: bool = False, opset: int | None = None) -> Any:
    """What `torch.onnx.export` makes of a network in eval mode; it is only read.

    Args:
        model: The network.
        workload: What it is fed. Its tensors are the graph's inputs, in their order; all else is a constant in it.
        dynamic_batch: The first side of every tensor may be another one later.
        opset: The version of ONNX's operators; None: the exporter's own choice.

    Raises:
        LaminaError: The exporter refuses the network; its first line is quoted.
        MissingExtra: onnx or onnxscript is not installed.
    """
    _forbid_missing()
    options: dict[str, Any] = {"opset_version": opset} if opset else {}
    with exporting(), quietly("torch.onnx", "onnxscript", "torch.export"):
        try:
            program = program_of(model, workload, dynamic_batch=dynamic_batch)
            return torch.onnx.export(program, dynamo=True, verbose=False, **options)
        except Exception as error:  # an exporter, and a user's network in it, may raise anything
            raise LaminaError(f"it cannot be exported to ONNX: {_cause(error)}") from error


def _forbid_missing() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(str(error.name), "export", "a graph in ONNX") from error


def _cause(error: BaseException) -> str:
    """The error at the root, which says what the exporter stumbled over."""
    while error.__cause__ is not None:
        error = error.__cause__
    return said(error)


def onnx_bytes(model: nn.Module, workload: Workload, scratch: Path, *, dynamic_batch: bool = False) -> bytes | Path:
    """A network's graph with its weights: in memory, or a file in a folder where it is too large for one message.

    Raises:
        LaminaError: The exporter refuses it.
    """
    program = onnx_program(model, workload, dynamic_batch=dynamic_batch)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if size < 2**30:
        return bytes(program.model_proto.SerializeToString())
    path = scratch / "model.onnx"
    program.save(str(path), external_data=True)
    return path


def save_file(graph: Any, path: Path) -> None:
    """Write a graph, with its weights in a file beside it where it is too large for one message."""
    import onnx

    onnx.save_model(graph, str(path), save_as_external_data=graph.ByteSize() >= 2**30)


def check_file(path: Path) -> None:
    """Hold an ONNX file against the format's own rules, the shapes and types of all its values included.

    Raises:
        LaminaError: It breaks one.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # its errors have no common type
        raise LaminaError(f"onnx's checker refuses the file: {first_line(error)}") from error


def layer_bytes(module: nn.Module, x: Tensor, *, int8: torch.dtype | None = None, neighbours: bool = False) -> bytes | None:
    """The graph of a plain layer, or of a stack of factors, fed with a tensor of its shape; None where it is something else.

    Args:
        module: The layer.
        x: What it is fed.
        int8: The type of what flows between layers in int8, ``torch.int8`` or ``torch.uint8``; None: it is not quantised.
        neighbours: A convolution stands between two depthwise ones.
    """
    factors = module.factors() if isinstance(module, DecomposedLayer) else [module]
    _forbid_missing()
    if not _readable(x, int8):
        return None
    graph = _Graph(int8)
    name, ndim = "x", x.ndim
    first, last = factors[0], factors[-1]
    between = neighbours and isinstance(first, tuple(_CONVOLUTIONS)) and isinstance(last, tuple(_CONVOLUTIONS))
    if between:
        name = graph.neighbour(name, int(first.in_channels), x)  # type: ignore[arg-type]
    for factor in factors:
        after = graph.add(factor, name, ndim)
        if after is None:
            return None
        name = after
    if between:
        name = graph.neighbour(name, int(last.out_channels), x)  # type: ignore[arg-type]
    return graph.whole(x, name)


def neighbours_bytes(x: Tensor, *, int8: torch.dtype | None = None) -> bytes | None:
    """The graph of two neighbours without a convolution between them; None where `layer_bytes` makes none either."""
    _forbid_missing()
    if not _readable(x, int8):
        return None
    graph = _Graph(int8)
    name = "x"
    for _ in range(2):
        name = graph.neighbour(name, x.shape[1], x)
    return graph.whole(x, name)


def _readable(x: Tensor, int8: torch.dtype | None) -> bool:
    return x.dtype == torch.float32 or (int8 is None and x.dtype in (torch.float16, torch.float64))


class _Graph:
    """Nodes and weights of a stack of layers."""

    def __init__(self, int8: torch.dtype | None) -> None:
        import onnx

        self.onnx = onnx
        self.int8 = int8
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, layer: nn.Module, x: str, ndim: int) -> str | None:
        """Add one layer that reads a value; the name of what it gives, None where it is no plain one."""
        if type(layer) is nn.Linear:
            return self._linear(x, layer.weight, layer.bias, ndim)
        if type(layer).__name__ == "Conv1D" and isinstance(layer.weight, Tensor):  # of transformers, stored transposed
            return self._linear(x, layer.weight.T, layer.bias, ndim)  # type: ignore[arg-type]
        if type(layer) in _CONVOLUTIONS and ndim == _CONVOLUTIONS[type(layer)] + 2:
            return self._convolution(x, layer)
        return None

    def neighbour(self, x: str, channels: int, like: Tensor) -> str:
        """Add a depthwise 1×1 convolution."""
        weight = torch.ones(channels, 1, *[1] * (like.ndim - 2), dtype=like.dtype)
        kernel = [1] * (like.ndim - 2)
        return self._node("Conv", [self._quantised(x), self._weight(weight, 0)], kernel_shape=kernel, group=channels)

    def whole(self, x: Tensor, result: str) -> bytes:
        """The graph from a tensor to a result, as a message."""
        helper = self.onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(_numpy(x[:0].detach()).dtype)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "layer", [value("x", kind, list(x.shape))], [value(result, kind, None)], initializer=self.weights
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        return bytes(model.SerializeToString())

    def _linear(self, x: str, weight: Tensor, bias: Tensor | None, ndim: int) -> str:
        x = self._quantised(x)
        if ndim == 2:  # as the exporter writes it
            return self._node("Gemm", [x, self._weight(weight, 0), *self._bias(bias)], transB=1)
        product = self._node("MatMul", [x, self._weight(weight.T, 1)])
        return product if bias is None else self._node("Add", [product, *self._bias(bias)])

    def _convolution(self, x: str, layer: Any) -> str:
        before, after = _padding(layer)
        if layer.padding_mode != "zeros":
            pads = [0, 0, *before, 0, 0, *after]
            x = self._node("Pad", [x, self._constant(torch.tensor(pads))], mode=_MODES[layer.padding_mode])
            before, after = [0] * len(before), [0] * len(after)
        more = {"output_padding": list(layer.output_padding)} if layer.transposed else {}
        return self._node(
            "ConvTranspose" if layer.transposed else "Conv",
            [self._quantised(x), self._weight(layer.weight, int(layer.transposed)), *self._bias(layer.bias)],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=[*before, *after],
            dilations=list(layer.dilation),
            group=layer.groups,
            **more,
        )

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        result = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [result], **attributes))
        return result

    def _constant(self, values: Tensor) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(self.onnx.numpy_helper.from_array(_numpy(values), name))
        return name

    def _weight(self, weight: Tensor, axis: int) -> str:
        """A weight; in int8 with a scale for each output channel, which lie along an axis."""
        if self.int8 is None:
            return self._constant(weight.detach().contiguous())
        largest = weight.detach().abs().amax([side for side in range(weight.ndim) if side != axis]).clamp_min(1e-8)
        scale = largest / 127
        shape = [-1 if side == axis else 1 for side in range(weight.ndim)]
        whole = (weight.detach() / scale.view(shape)).round().clamp(-127, 127).to(torch.int8).contiguous()
        zeros = torch.zeros(len(scale), dtype=torch.int8)
        return self._node("DequantizeLinear", [self._constant(whole), self._constant(scale), self._constant(zeros)], axis=axis)

    def _bias(self, bias: Tensor | None) -> list[str]:
        return [] if bias is None else [self._constant(bias.detach())]

    def _quantised(self, x: str) -> str:
        if self.int8 is None:
            return x
        middle = 0 if self.int8 == torch.int8 else 128
        scale, zero = self._constant(torch.tensor(0.02)), self._constant(torch.tensor(middle, dtype=self.int8))
        return self._node("DequantizeLinear", [self._node("QuantizeLinear", [x, scale, zero]), scale, zero])


def _padding(layer: Any) -> tuple[list[int], list[int]]:
    """What is padded before and after each side of the map."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size), [0] * len(layer.kernel_size)
    if layer.padding == "same":
        both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [each // 2 for each in both], [each - each // 2 for each in both]
    return list(layer.padding), list(layer.padding)


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def arrays_of(tensors: Sequence[Tensor], runtime: str) -> list[Any]:
    """Tensors as arrays that share their memory where it lies in order.

    Raises:
        LaminaError: A dtype that NumPy lacks.
    """
    for tensor in tensors:
        if tensor.dtype == torch.bfloat16:
            raise LaminaError(f"{runtime} is fed with float32 or float16, not bfloat16: convert the network and the example")
    return [_numpy(tensor.contiguous()) for tensor in tensors]
