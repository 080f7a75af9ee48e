"""One batch through the network: forward, and backward from the log-likelihood of drawn answers, where gradients can be had."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ExampleError
from ..network.memory import devices_of
from ..network.observe import autocast_on
from ..network.running import run, said
from ..values import Workload
from . import ranks
from .batches import Batch
from .outputs import Outputs, tensors_in
from .recorder import Recorder

_SCALES = tuple(2.0**n for n in (15, 12, 9, 6, 3, 0))


class NoBackward(Exception):
    """A batch has given no gradients."""


@final
class Runner:
    """Runs batches under a recorder.

    Args:
        twin: A shadow of the network, in eval mode.
        outputs: How answers are read; None: no gradients are asked for.
        mask: Name of the keyword argument that says which positions count.
        seed: Of the answers that are drawn.
    """

    def __init__(self, twin: nn.Module, outputs: Outputs | None, mask: str | None, seed: int) -> None:
        self.twin, self.outputs, self.mask, self.seed = twin, outputs, mask, seed
        self.no_backward: str | None = None
        """Why there are no gradients, although they were asked for."""
        self._scale: float | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def gradients(self) -> bool:
        """Whether gradients are made."""
        return self.outputs is not None and self.no_backward is None

    def begin(self) -> None:
        """Before each pass: it draws the same answers."""
        self._generators.clear()

    def run(self, recorder: Recorder[Any], batch: Batch) -> None:
        """Run one batch.

        Raises:
            NoBackward: There are no gradients of it.
            ExampleError: The network does not run on it, or it names no positions.
        """
        mask = positions(self.mask, batch.workload)
        if not self.gradients:
            with torch.no_grad(), recorder.running(batch.held_out, mask):
                run(self.twin, batch.workload)
            return
        if self._scale is None:
            self._scale = self._found_scale(recorder, batch, mask)
        recorder.scale = self._scale
        self._both_ways(recorder, batch, mask)

    def _both_ways(self, recorder: Recorder[Any], batch: Batch, mask: Tensor | None) -> None:
        assert self.outputs is not None
        with torch.enable_grad():
            try:
                with recorder.running(batch.held_out, mask):
                    output = run(self.twin, batch.workload)
            except ExampleError as error:
                raise NoBackward(str(error)) from error  # if it does not run without them either, that is said next
            value = self.outputs.log_likelihood(output, self._generator(output))
            if not value.requires_grad:
                raise NoBackward("none leads from its output to a layer")
            try:
                # Not backward(), which would leave gradients at weights that a shadow cannot stand for.
                torch.autograd.grad(value * recorder.scale, recorder.roots, allow_unused=True)
            except RuntimeError as error:
                raise NoBackward(said(error)) from error

    def _found_scale(self, recorder: Recorder[Any], batch: Batch, mask: Tensor | None) -> float:
        """What keeps the gradients of a network in float16 from underflow: as much as they bear, with room for larger ones."""
        dtypes = {p.dtype for p in self.twin.parameters()} | {autocast_on(devices_of(self.twin)[0].type)}
        if not dtypes & {torch.float16, "float16"}:
            return 1.0
        try:
            for scale in _SCALES:
                recorder.scale, recorder.largest = scale, 0.0
                self._both_ways(recorder, batch, mask)
                if recorder.largest < 2.0**12:
                    return scale
        finally:
            recorder.largest = None
            self._generators.clear()
        return 1.0

    def _generator(self, output: Any) -> torch.Generator:
        """The one that draws answers, on the device of an output; every process draws its own."""
        device = next((t.device for t in tensors_in(output) if t.is_floating_point()), torch.device("cpu"))
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed + ranks.rank())
        return self._generators[device]


def positions(name: str | None, workload: Workload) -> Tensor | None:
    """Those that count, ``(B, T)``."""
    if name is None:
        return None
    mask = workload.kwargs.get(name)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ExampleError(f"a batch of the data has no keyword argument {name}, a tensor (B, T), which mask names")
    return mask.bool()
