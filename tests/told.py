"""A runtime whose clock is told: times follow from weights, and whatever is timed by another clock is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import pytest
from torch import Tensor, nn

from lamina import comparison
from lamina.choose import never_slower, whole
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure import layer_times
from lamina.runtimes.runtime import Prepared, Runtime, tensors_in
from lamina.values import Workload


@final
class Run:
    """What takes so many seconds, by the clock that is told."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        """There is nothing to do."""


def by_weights(layer: nn.Module) -> float:
    """A nanosecond a weight."""
    return 1e-9 * sum(parameter.numel() for parameter in layer.parameters())


@final
class Told(Runtime):
    """What a layer takes is told, and ``penalty`` seconds more for each decomposed one where it is part of a network."""

    label = "told"

    def __init__(self, takes: Callable[[nn.Module], float] = by_weights, penalty: float = 0.0) -> None:
        self.takes, self.penalty = takes, penalty

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        return Prepared(Run(self.seconds(model)), lambda: tensors_in(workload.run(model)))

    def prepare_layer(self, module: nn.Module, x: Tensor) -> Prepared:
        return Prepared(Run(self.takes(module)), lambda: tensors_in(module(x)))

    def seconds(self, model: nn.Module) -> float:
        """One run of a network: the sum over its layers."""
        return sum(self.takes(layer) + self.penalty * isinstance(layer, DecomposedLayer) for layer in layers_in(model))


def layers_in(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers in a network, decomposed ones whole."""
    if isinstance(module, DecomposedLayer | nn.Linear | nn.Conv2d):
        yield module
        return
    for child in module.children():
        yield from layers_in(child)


def instead_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a test runs, what `Told` prepared takes what it says, and anything else that is timed is an error."""

    def told(runs: Sequence[Any], *_: Any) -> list[list[float]]:
        assert all(isinstance(run, Run) for run in runs), "eager PyTorch was timed"
        return [[run.seconds] * 9 for run in runs]

    def never(*_: Any) -> Any:
        raise AssertionError("a network was timed in eager PyTorch")

    for room in (layer_times, whole, comparison):
        monkeypatch.setattr(room, "interleave", told)
    monkeypatch.setattr(whole, "timed", lambda run, **_: told([run])[0][0])
    for room in (whole, never_slower):
        monkeypatch.setattr(room, "Stopwatch", never)
    monkeypatch.setattr(whole, "time_shares", never)
