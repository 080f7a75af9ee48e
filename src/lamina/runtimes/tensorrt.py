"""TensorRT on an NVIDIA GPU, through Torch-TensorRT. Untested on a GPU: its tests stand a module of their own in for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch
from torch import nn

from ..errors import LaminaError, MissingExtra
from ..network.memory import devices_of
from ..network.program import exporting, program_of
from ..network.running import said
from ..values import Mode, Workload
from .runtime import Prepared, Runtime, quietly, tensors_in, versions_of


@final
@dataclass(frozen=True)
class TensorRT(Runtime):
    """TensorRT, through Torch-TensorRT, in the network's own precision and without TF32. Untested on a GPU.

    The network lies on a CUDA device. What TensorRT has no operator for is run by PyTorch in between.
    """

    @property
    def label(self) -> str:
        """``TensorRT, torch_tensorrt 2.14.0, tensorrt 10.14.1``."""
        return ", ".join(filter(None, [f"TensorRT, torch_tensorrt {_package().__version__}", versions_of("tensorrt")]))

    @property
    def devices(self) -> tuple[str, ...]:
        """A CUDA GPU."""
        return ("cuda",)

    def check(self, models: Sequence[nn.Module], mode: Mode) -> None:
        """Make sure that networks can be timed in it.

        Raises:
            LaminaError: There is no GPU, or they lie elsewhere, or a training step is asked for.
            MissingExtra: Torch-TensorRT is not installed.
        """
        _package()
        _forbid_no_gpu()
        super().check(models, mode)

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """The network's program, compiled.

        Raises:
            LaminaError: There is no GPU, or it cannot be exported or compiled.
            MissingExtra: Torch-TensorRT is not installed.
        """
        package = _package()
        _forbid_no_gpu()
        with exporting(), quietly("torch_tensorrt", "torch.export"):
            try:
                compiled = package.dynamo.compile(
                    program_of(model, workload),
                    arg_inputs=workload.args,
                    kwarg_inputs=workload.kwargs,
                    device=next(iter(devices_of(model)), torch.device("cuda")),
                    disable_tf32=True,
                    min_block_size=1,  # else a single layer is left to PyTorch
                )
                compiled(*workload.args, **workload.kwargs)
            except Exception as error:  # an exporter, and a user's network in it, may raise anything
                raise LaminaError(f"TensorRT refuses it: {said(error)}") from error

        def run() -> Any:
            with exporting():
                return compiled(*workload.args, **workload.kwargs)

        return Prepared(run, lambda: [each.clone() for each in tensors_in(run())])


def _forbid_no_gpu() -> None:
    if not torch.cuda.is_available():
        raise LaminaError("TensorRT needs an NVIDIA GPU, and PyTorch sees none here: time it on a machine that has one")


@cache
def _package() -> Any:
    try:
        import torch_tensorrt
    except ImportError as error:
        raise MissingExtra("torch_tensorrt", "tensorrt", "TensorRT") from error
    return torch_tensorrt
