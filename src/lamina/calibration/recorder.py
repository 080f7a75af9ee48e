"""Hooks that add up what reaches each layer of a network, and the gradients at its outputs, while it runs. Nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from ..network.running import unfused
from .gram import exact_products


class Adding(Protocol):
    """The sums of one layer."""

    gradients: Any
    """None where those at its output are not wanted."""

    def add_inputs(self, x: Tensor, y: Callable[[], Tensor], held_out: bool) -> None:
        """Take in what the layer was called with, and what it answered, which is read when it is asked for."""

    def add_gradients(self, g: Tensor, held_out: bool) -> None:
        """Take in the gradient at its output."""


SomeSums = TypeVar("SomeSums", bound=Adding)


@final
class Recorder(Generic[SomeSums]):
    """Adds up into the sums of some layers; works while `recording`.

    Weights need no gradients for that, and get none: autograd is led through the network by a zero that is added to the outputs
    with which it would begin. Products are made outside autocast.

    Args:
        sums: Those of the layers, by name; may be exchanged between batches.
    """

    def __init__(self, sums: Mapping[str, SomeSums]) -> None:
        self.sums = sums
        self.held_out = False
        self.mask: Tensor | None = None
        """Positions that count, of the shape ``(B, T)``; None where all do."""
        self.scale = 1.0
        """What the log-likelihood was multiplied with."""
        self.roots: list[Tensor] = []
        """Where gradients end; of this batch."""
        self.largest: float | None = None
        """While it is no None, nothing is added up, and the largest gradient is noted."""
        self._running = False
        self._exact: dict[torch.device, bool] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Hooks on the layers, in front of all others: these may change outputs."""
        handles = []
        try:
            for name in self.sums:
                module = model.get_submodule(name)
                handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True))
            with unfused():  # nested tensors lead nothing back
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def running(self, held_out: bool, mask: Tensor | None) -> Iterator[None]:
        """While the network runs forward: what is run again by a backward is not counted twice."""
        self.held_out, self.mask, self.roots = held_out, mask, []
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def _hook(self, name: str) -> Any:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                return None
            if self._running and self.largest is None:
                with _plainly(x.device):
                    self.sums[name].add_inputs(self._read(x), lambda: self._read(output), self.held_out)
            if self.sums[name].gradients is None or not torch.is_grad_enabled() or output.is_nested:
                return None
            # Also where a checkpoint runs a part again: it wants to find what it found before.
            if not output.requires_grad or not self.roots:
                root = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
                self.roots.append(root)
                output = output + root
            if self._running:
                output.register_hook(lambda gradient: self._gradient(name, gradient))
            return output

        return called

    def _gradient(self, name: str, gradient: Tensor) -> None:
        with _plainly(gradient.device):
            if self.largest is not None:
                self.largest = max(self.largest, float(gradient.abs().max().nan_to_num(torch.inf)))
                return
            g = self._read(gradient)
            self.sums[name].add_gradients(g if self.scale == 1 else g / self.scale, self.held_out)

    def _read(self, x: Tensor) -> Tensor:
        """Values in which products are exact, without positions that do not count."""
        x = x.detach()
        if x.is_nested:
            x = torch.cat([t.reshape(-1, t.shape[-1]) for t in x.unbind()])
        elif self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        if x.dtype == torch.float64:
            return x
        if x.device not in self._exact:
            self._exact[x.device] = exact_products(x.device)
        return x.to(torch.float32 if self._exact[x.device] else torch.float64)


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
