"""ExecuTorch on the CPU: programs for phones and other small devices, with XNNPACK's kernels, run here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from torch import nn

from ..errors import LaminaError, MissingExtra
from ..network.program import exporting, program_of
from ..network.running import first_line, said
from ..values import Workload
from .runtime import Prepared, Runtime, quietly, tensors_in


@final
@dataclass(frozen=True)
class ExecuTorch(Runtime):
    """ExecuTorch with XNNPACK, which computes in the network's float32, on threads of its own, whose number it chooses.

    A program is written for a device; its times here say which of two networks is faster, not how fast it is there.
    """

    @property
    def label(self) -> str:
        """``ExecuTorch 1.5.1 XNNPACK``."""
        return f"ExecuTorch {_version()} XNNPACK"

    @property
    def own_threads(self) -> int | None:
        """As many as its pool has, where it tells: it is the process's, and cannot be changed while a program is loaded."""
        _version()
        try:
            from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count
        except ImportError:
            return None
        return int(_threadpool_get_thread_count())

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """The network's program, loaded."""
        return self.loaded(self.program(model, workload), workload)

    def program(self, model: nn.Module, workload: Workload, *, dynamic_batch: bool = False) -> bytes:
        """A network as ExecuTorch's program.

        Raises:
            LaminaError: It cannot be exported, or lowered.
        """
        _version()
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        with exporting(), quietly("executorch", "root", "torch.export"):
            try:
                made = program_of(model, workload, dynamic_batch=dynamic_batch, most=_MOST)
                lowered = to_edge_transform_and_lower(made, partitioner=[XnnpackPartitioner()])
                return bytes(lowered.to_executorch().buffer)
            except Exception as error:  # an exporter, and a user's network in it, may raise anything
                raise LaminaError(f"ExecuTorch refuses it: {said(error)}") from error

    def of_file(self, path: Path, workload: Workload) -> Prepared:
        """A program's file, ready to be run on an example."""
        return self.loaded(path.read_bytes(), workload)

    def loaded(self, program: bytes, workload: Workload) -> Prepared:
        """A program, ready to be run on an example.

        Raises:
            LaminaError: The example does not fit.
        """
        from executorch.runtime import Runtime as Native

        fed = [each.contiguous() for each in workload.tensors]
        try:
            made = Native.get().load_program(program)
            method = made.load_method("forward")
            method.execute(fed)
        except Exception as error:  # its errors have no common type
            raise LaminaError(f"ExecuTorch does not run it: {first_line(error)}") from error

        held = program, made  # a method reads them, and does not keep them

        def run() -> Any:
            return method.execute(fed) if held else None

        return Prepared(run, lambda: [each.clone() for each in tensors_in(list(run()))])


_MOST = 1024
"""The largest batch of a program for any batch: its memory is planned for it."""


@cache
def _version() -> str:
    try:
        import executorch.runtime  # noqa: F401
    except ImportError as error:
        raise MissingExtra("executorch", "executorch", "ExecuTorch") from error
    from importlib.metadata import version

    return version("executorch")
