"""OpenVINO on the CPU, in float32, in halves of it, or in int8."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LaminaError, MissingExtra
from ..network.running import first_line
from ..values import Workload
from .graphs import EXPORTER, arrays_of, layer_bytes, neighbours_bytes, onnx_bytes, onnx_program
from .int8 import batches_like, checked_data, first_of, runs_over
from .runtime import Prepared, Runtime, checked_threads, quietly, versions_of

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_NAMES = {hint: name for name, hint in _HINTS.items()}
_BATCHES = 300
"""Of the data, what int8 is calibrated on at most: NNCF's own number."""
_NEXT_TO_NOTHING = 1e-20
"""A bias that changes no answer, and is no denormal."""


@final
@dataclass(frozen=True)
class OpenVINO(Runtime):
    """OpenVINO, on the CPU.

    Args:
        precision: What it computes in: ``"float32"``; ``"bfloat16"`` or ``"float16"``, where the processor has them and which
            are refused where it has not; or ``"default"``, OpenVINO's own choice, which is bfloat16 on processors that are fast
            in it.
        int8: Unlabelled data, as `calibrate` takes them: convolutions and products are then computed in int8, by scales that
            NNCF finds on these inputs; the rest in ``precision``.
        threads: How many threads it uses; by default as many as torch does.

    Raises:
        CalibrationError: ``int8`` holds no inputs.
        LaminaError: Another argument is none of these.
    """

    precision: Literal["float32", "bfloat16", "float16", "default"] = "float32"
    int8: Any = field(default=None, repr=False)
    threads: int | None = None

    def __post_init__(self) -> None:
        checked_data(self.int8, "int8")
        checked_threads(self.threads)
        if self.precision != "default" and self.precision not in _HINTS:
            raise LaminaError(f"precision is {self.precision!r}; give one of {', '.join(map(repr, [*_HINTS, 'default']))}")

    def __eq__(self, other: object) -> bool:
        """Whether they are set alike; data for int8 are equal to themselves alone."""
        return isinstance(other, OpenVINO) and self.int8 is other.int8 and self._settings == other._settings

    def __hash__(self) -> int:
        """As equality has it."""
        return hash((id(self.int8), self._settings))

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.precision, self.threads

    @property
    def computes(self) -> str:
        """The precision; by default the one that OpenVINO chooses on this processor."""
        return _chosen() if self.precision == "default" else self.precision

    def __str__(self) -> str:
        """``OpenVINO 2026.4.1 float32``, and int8 where it is; ``default (bfloat16)`` by default."""
        version, int8 = _package().__version__.partition("-")[0], "int8, " if self.int8 is not None else ""
        return f"OpenVINO {version} {int8}{self.precision if self.precision in _HINTS else f'default ({self.computes})'}"

    @property
    def label(self) -> str:
        """``OpenVINO 2026.4.1 float32, onnx 1.23.2, onnxscript 0.7.2, onnx-ir 1.1.0``: with what makes its graphs.

        In int8 that is NNCF as well.
        """
        makers = [*EXPORTER, *(["nncf"] if self.int8 is not None else [])]
        return ", ".join(filter(None, [str(self), versions_of(*makers)]))

    @property
    def own_threads(self) -> int | None:
        """As many as it was told."""
        return self.threads

    @property
    def exact(self) -> bool:
        """In float32 alone."""
        return self.int8 is None and self.computes == "float32"

    def roughly(self) -> Runtime:
        """In int8, scales of the first batch alone."""
        return self if self.int8 is None else dataclasses.replace(self, int8=first_of(self.int8))

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """The network's ONNX graph, compiled."""
        with tempfile.TemporaryDirectory() as scratch:
            return self._compiled(self._model(model, workload, Path(scratch)), workload.tensors)

    def prepare_layer(self, module: nn.Module, x: Tensor) -> Prepared:
        """One layer, compiled."""
        graph = layer_bytes(module, x, int8=self._flowing, neighbours=True)
        if graph is None:  # no scales of the data are its own
            return dataclasses.replace(self, int8=None).prepare(module, Workload(x))
        return self._compiled(_read(graph), [x])

    def neighbours(self, x: Tensor) -> Prepared | None:
        """These alone, compiled."""
        graph = neighbours_bytes(x, int8=self._flowing)
        return None if graph is None else self._compiled(_read(graph), [x])

    @property
    def _flowing(self) -> torch.dtype | None:
        """The type of what flows between layers in int8."""
        return None if self.int8 is None else torch.int8

    def onnx(self, model: nn.Module, workload: Workload, *, dynamic_batch: bool = False, opset: int | None = None) -> Any:
        """The network's graph as ONNX's message.

        Raises:
            LaminaError: It cannot be exported; or it is to be in int8, for which OpenVINO has its own format.
        """
        if self.int8 is not None:
            raise LaminaError("OpenVINO's int8 is written in its own format: name a folder, or give OnnxRuntime(int8=...)")
        return onnx_program(model, workload, dynamic_batch=dynamic_batch, opset=opset).model_proto

    def of_file(self, path: Path, workload: Workload) -> Prepared:
        """An ONNX file, or one of OpenVINO's own, ready to be run on an example.

        Raises:
            LaminaError: An operator is missing, or the example does not fit.
        """
        if path.suffix == ".xml":  # read whole: the file may be moved while it is in use
            weights = _package().Tensor(np.fromfile(path.with_suffix(".bin"), dtype=np.uint8))
            return self._compiled(_read(path.read_bytes(), weights), workload.tensors)
        return self._compiled(_read(path), workload.tensors)

    def save(self, model: nn.Module, workload: Workload, folder: Path, *, dynamic_batch: bool = False) -> None:
        """Write a network as ``model.xml`` and ``model.bin``.

        Raises:
            LaminaError: It cannot be exported, or quantised.
        """
        with tempfile.TemporaryDirectory() as scratch:
            made = self._model(model, workload, Path(scratch), dynamic_batch)
            _package().save_model(made, str(folder / "model.xml"), compress_to_fp16=False)

    def _model(self, model: nn.Module, workload: Workload, scratch: Path, dynamic_batch: bool = False) -> Any:
        made = _read(onnx_bytes(model, workload, scratch, dynamic_batch=dynamic_batch))
        return made if self.int8 is None else _quantised(made, self.int8, workload)

    def _compiled(self, model: Any, tensors: Sequence[Tensor]) -> Prepared:
        package, arrays = _package(), arrays_of(tensors, "OpenVINO")
        if _in_float16(model):
            raise LaminaError(
                "OpenVINO crashes on some networks with weights in float16: convert the network and the example to float32; "
                "what it computes in is lamina.OpenVINO(precision)"
            )
        try:
            made = _core().compile_model(model, "CPU", self._options())
            if self.precision in _HINTS and (instead := _precision_of(made)) != self.precision:
                raise LaminaError(
                    f"this processor has no {self.precision}: OpenVINO computes in {instead} in its place; give "
                    f'lamina.OpenVINO("{instead}"), or OpenVINO("default") for its own choice'
                )
            if len(made.inputs) != len(arrays):
                raise LaminaError(f"the exported graph has {len(made.inputs)} inputs, and the example {len(arrays)} tensors")
            request = made.create_infer_request()
            for at, array in enumerate(arrays):
                request.set_input_tensor(at, package.Tensor(array, shared_memory=True))
            request.infer()
        except LaminaError:
            raise
        except Exception as error:  # its errors have no common type
            raise LaminaError(f"OpenVINO does not run it: {first_line(error)}") from error

        def run() -> None:
            request.start_async()
            request.wait()

        def answers() -> list[Tensor]:
            run()
            return [torch.from_numpy(request.get_output_tensor(at).data.copy()) for at in range(len(made.outputs))]

        return Prepared(run, answers)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": self.threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self.precision in _HINTS:
            options["INFERENCE_PRECISION_HINT"] = _HINTS[self.precision]
        return options


def _quantised(model: Any, data: Any, workload: Workload) -> Any:
    try:
        with quietly("nncf"):
            import nncf
    except ImportError as error:
        raise MissingExtra(str(error.name), "openvino", "int8 in OpenVINO") from error
    batches = [arrays_of(tensors, "OpenVINO") for tensors in batches_like(data, workload, _BATCHES)]
    # By default NNCF spares a bit in the first layer alone; in thin factors, whose weights are large, the others run over too.
    fix = nncf.OverflowFix.ENABLE if runs_over() else nncf.OverflowFix.FIRST_LAYER
    _give_biases(model)
    with quietly("nncf"):
        try:
            more = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
            return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), advanced_parameters=more)
        except Exception as error:  # its errors have no common type
            raise LaminaError(f"NNCF cannot quantise it: {first_line(error)}") from error


def _give_biases(model: Any) -> None:
    """Give products with weights that have no bias one of next to nothing.

    On processors with VNNI OpenVINO 2026.4 answers numbers without meaning (10⁵ to 10¹⁷ times too large, other ones each time)
    where it fuses products in int8 of up to eight rows with one that has no bias, as the first of two factors. With a bias that
    is not the same in all channels, however small, it does not. NNCF then corrects that bias too.
    """
    package = _package()
    for product in [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]:
        users = list(product.output(0).get_target_inputs())
        constant = any(_made_of_constants(value.get_source_output().get_node()) for value in product.inputs())
        if not constant or any(user.get_node().get_type_name() == "Add" for user in users):
            continue
        width = product.output(0).get_partial_shape()[-1].get_length()
        bias = np.where(np.arange(width) % 2, _NEXT_TO_NOTHING, -_NEXT_TO_NOTHING).astype(np.float32)
        added = package.opset13.add(product.output(0), package.opset13.constant(bias))
        for user in users:
            user.replace_source_output(added.output(0))
    model.validate_nodes_and_infer_types()


def _made_of_constants(op: Any) -> bool:
    if op.get_type_name() == "Constant":
        return True
    return op.get_type_name() in ("Transpose", "Reshape", "Convert") and _made_of_constants(op.input_value(0).get_node())


def _read(*graph: Any) -> Any:
    """A graph as OpenVINO's model.

    Raises:
        LaminaError: It is none, or an operator is missing.
    """
    try:
        return _core().read_model(*graph)
    except Exception as error:  # its errors have no common type
        raise LaminaError(f"OpenVINO does not read it: {first_line(error)}") from error


def _in_float16(model: Any) -> bool:
    """Whether a model has weights in float16, vectors apart."""
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return any(op.get_element_type() == _package().Type.f16 and len(op.get_output_shape(0)) > 1 for op in constants)


def _precision_of(made: Any) -> str:
    """What a compiled model computes in. Where a processor lacks what was asked for, OpenVINO takes another one in silence."""
    hint = str(made.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    return _NAMES.get(hint, hint)


@cache
def _chosen() -> str:
    """What OpenVINO computes in by default on this processor, as it tells of a small model."""
    package = _package()
    x = package.opset13.parameter([1, 4], np.float32)
    return _precision_of(_core().compile_model(package.Model([package.opset13.relu(x)], [x]), "CPU"))


@cache
def _core() -> Any:
    """OpenVINO's core, one for the process."""
    return _package().Core()


@cache
def _package() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino", "OpenVINO") from error
    return openvino
