"""ONNX Runtime on the CPU, in the network's precision or in int8."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import LaminaError, MissingExtra
from ..network.running import first_line
from ..values import Workload
from .graphs import EXPORTER, arrays_of, layer_bytes, neighbours_bytes, onnx_program, save_file
from .int8 import batches_like, checked_data, first_of, runs_over
from .runtime import Prepared, Runtime, checked_threads, quietly, versions_of

_BATCHES = 16
"""Of the data, what int8 is calibrated on at most."""


@final
@dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime, on the CPU.

    Args:
        int8: Unlabelled data, as `calibrate` takes them: convolutions and products are then computed in int8, by scales that
            these inputs show (static quantisation, QDQ, a scale for each output channel of a weight).
        threads: How many threads a session uses; by default as many as torch does.

    Raises:
        CalibrationError: ``int8`` holds no inputs.
        LaminaError: ``threads`` is no number above 0.
    """

    int8: Any = field(default=None, repr=False)
    threads: int | None = None

    def __post_init__(self) -> None:
        checked_data(self.int8, "int8")
        checked_threads(self.threads)

    def __eq__(self, other: object) -> bool:
        """Whether they are set alike; data for int8 are equal to themselves alone."""
        return isinstance(other, OnnxRuntime) and self.int8 is other.int8 and self.threads == other.threads

    def __hash__(self) -> int:
        """As equality has it."""
        return hash((id(self.int8), self.threads))

    def __str__(self) -> str:
        """``ONNX Runtime 1.32.0``, and int8 where it is."""
        return f"ONNX Runtime {_package().__version__}{' int8' if self.int8 is not None else ''}"

    @property
    def label(self) -> str:
        """``ONNX Runtime 1.32.0, onnx 1.23.2, onnxscript 0.7.2, onnx-ir 1.1.0``: with what makes its graphs."""
        return ", ".join(filter(None, [str(self), versions_of(*EXPORTER)]))

    @property
    def own_threads(self) -> int | None:
        """As many as it was told."""
        return self.threads

    @property
    def exact(self) -> bool:
        """Not in int8."""
        return self.int8 is None

    def roughly(self) -> Runtime:
        """In int8, scales of the first batch alone."""
        return self if self.int8 is None else dataclasses.replace(self, int8=first_of(self.int8))

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """A session of the network's ONNX graph."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.onnx"
            save_file(self.onnx(model, workload), file)
            return self.of_file(file, workload)

    def prepare_layer(self, module: nn.Module, x: Tensor) -> Prepared:
        """A session of one layer."""
        graph = layer_bytes(module, x, int8=self._flowing, neighbours=True)
        if graph is None:  # no scales of the data are its own
            return dataclasses.replace(self, int8=None).prepare(module, Workload(x))
        return self._session(graph, [x])

    def neighbours(self, x: Tensor) -> Prepared | None:
        """A session of these alone."""
        graph = neighbours_bytes(x, int8=self._flowing)
        return None if graph is None else self._session(graph, [x])

    @property
    def _flowing(self) -> torch.dtype | None:
        """The type of what flows between layers in int8."""
        return None if self.int8 is None else torch.uint8

    def onnx(self, model: nn.Module, workload: Workload, *, dynamic_batch: bool = False, opset: int | None = None) -> Any:
        """The network's graph as ONNX's message, quantised where it is to be.

        Raises:
            LaminaError: It cannot be exported, or quantised.
        """
        graph = onnx_program(model, workload, dynamic_batch=dynamic_batch, opset=opset).model_proto
        return graph if self.int8 is None else _quantised(graph, self.int8, workload)

    def of_file(self, path: Path, workload: Workload) -> Prepared:
        """An ONNX file, ready to be run on an example.

        Raises:
            LaminaError: An operator is missing, or the example does not fit.
        """
        return self._session(str(path), workload.tensors)

    def _session(self, graph: bytes | str, tensors: Sequence[Tensor]) -> Prepared:
        package, arrays = _package(), arrays_of(tensors, "ONNX Runtime")
        options = package.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        # Threads that wait busily for the next run would take the cores from whatever is timed in between.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = package.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            names = [each.name for each in session.get_inputs()]
            if len(names) != len(arrays):
                raise LaminaError(f"the exported graph has {len(names)} inputs, and the example {len(arrays)} tensors")
            feeds = dict(zip(names, arrays, strict=True))
            session.run(None, feeds)
        except LaminaError:
            raise
        except Exception as error:  # its errors have no common type
            raise LaminaError(f"ONNX Runtime does not run it: {first_line(error)}") from error
        return Prepared(lambda: session.run(None, feeds), lambda: [torch.from_numpy(each) for each in session.run(None, feeds)])


@final
class _Reader:
    """Batches as ONNX Runtime's quantiser wants to read them."""

    def __init__(self, names: Sequence[str], batches: Iterator[list[Tensor]]) -> None:
        self.names, self.batches = names, batches

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the inputs' names."""
        tensors = next(self.batches, None)
        return None if tensors is None else dict(zip(self.names, arrays_of(tensors, "ONNX Runtime"), strict=True))


def _quantised(graph: Any, data: Any, workload: Workload) -> Any:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    held = {each.name for each in graph.graph.initializer}
    names = [each.name for each in graph.graph.input if each.name not in held]
    with tempfile.TemporaryDirectory() as scratch, quietly(""):
        plain, ready, made = (str(Path(scratch) / f"{name}.onnx") for name in ("plain", "ready", "made"))
        onnx.save_model(graph, plain)
        try:
            quant_pre_process(plain, ready, skip_symbolic_shape=True)
            quantize_static(
                ready,
                made,
                _Reader(names, batches_like(data, workload, _BATCHES)),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                reduce_range=runs_over(),
            )
        except LaminaError:
            raise
        except Exception as error:  # its errors have no common type
            raise LaminaError(f"ONNX Runtime cannot quantise it: {first_line(error)}") from error
        return onnx.load(made)


@cache
def _package() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(str(error.name), "export", "ONNX Runtime") from error
    return onnxruntime
