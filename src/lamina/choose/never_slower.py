"""Times the whole network with its planned forms, and puts back what does not pay.

A layer that wins alone may lose in its place: its neighbours' data lies elsewhere in the caches, one more kernel must be
started. So every planned layer is timed inside the running network, dense and decomposed in turn; those that lose there become
dense again; then the whole network is timed, until it is faster with the plan than without, or nothing is left of the plan.

Forms are filled with random weights: a time needs shapes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import torch
from torch import nn

from ..comparison import step
from ..forms import Form
from ..layers.build import random
from ..measure.clock import Effort, interleave, ratio_interval
from ..network.observe import preserved, set_mode
from ..network.surgery import adopt, put
from ..network.walk import Layer
from ..values import Mode, Training, Workload


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What is left of the chosen forms, what was put back and why, and the whole network's times in seconds, round by round."""

    kept: dict[str, Form]
    put_back: dict[str, str]
    before: list[float]
    after: list[float]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the paired ratios before / after."""
        return ratio_interval(self.before, self.after)


Stacks = Mapping[str, nn.Module]
WholeTimes = tuple[list[float], list[float]]


def never_slower(
    model: nn.Module,
    layers: Mapping[str, Layer],
    chosen: Mapping[str, Form],
    judged: Sequence[str],
    examples: Sequence[Workload],
    mode: Mode,
    *,
    effort: Effort | None = None,
    stopwatch: Stopwatch | None = None,
) -> Verdict:
    """Make judged layers dense again until no one loses in its place and the network is not slower on any workload.

    Args:
        model: The dense network.
        layers: Its layers by name.
        chosen: The forms to be judged, and those set by hand, which are only timed along.
        judged: Names in ``chosen`` that may be put back.
        examples: What the network is fed; it must not be slower on any of them.
        mode: Inference or training.
        effort: How long to measure.
        stopwatch: What takes the times; tests give their own.
    """
    watch = stopwatch or Stopwatch(model, layers, examples, mode, effort or Effort(2.0, 9, 100))
    stacks = {name: watch.stack(name, form) for name, form in chosen.items()}
    kept, put_back = dict(chosen), dict[str, str]()
    open_to_doubt = [name for name in judged if name in kept]
    if open_to_doubt:
        for name, (dense_s, form_s) in watch.in_place({name: stacks[name] for name in kept}).items():
            if name in open_to_doubt and form_s >= dense_s:
                form = kept.pop(name)
                share = f"{form} takes {form_s / dense_s:.2f} of the dense layer's time inside the network" if dense_s else ""
                put_back[name] = share or f"the layer is never called in {mode.name}"
    while True:
        before_after = watch.whole({name: stacks[name] for name in kept})
        losing = [r for r in (median(b) / median(a) for b, a in before_after) if r < 1]
        rest = [name for name in open_to_doubt if name in kept]
        if not losing or not rest:
            break
        # What gains least in its place goes first; half of what is left at a time, so that this ends soon.
        gains = watch.in_place({name: stacks[name] for name in kept})
        rest.sort(key=lambda name: gains[name][0] - gains[name][1])
        for name in rest[: (len(rest) + 1) // 2]:
            put_back[name] = f"{kept.pop(name)} gains too little: the whole network ran at ×{losing[0]:.2f} with it"
    weights = [example.weight for example in examples]
    rounds = min(len(before) for before, _ in before_after)
    before, after = (
        [sum(w * pair[side][r] for w, pair in zip(weights, before_after, strict=True)) for r in range(rounds)]
        for side in (0, 1)
    )
    return Verdict(kept, put_back, before, after)


@dataclass(slots=True)
class Stopwatch:
    """Takes the times that `never_slower` judges by."""

    model: nn.Module
    layers: Mapping[str, Layer]
    examples: Sequence[Workload]
    mode: Mode
    effort: Effort

    def stack(self, name: str, form: Form) -> nn.Module:
        """A layer in a form, to be put in its place for a trial."""
        layer = self.layers[name]
        return adopt(random(layer.geometry, form, layer.module), layer.module)

    def whole(self, stacks: Stacks) -> list[WholeTimes]:
        """For each workload the times of the whole network, dense and with the stacks in, in seconds, interleaved."""
        return [self._interleaved(stacks, workload) for workload in self.examples]

    def in_place(self, stacks: Stacks) -> dict[str, tuple[float, float]]:
        """For each layer the time that one run of the network spends in it, dense and as a stack, in seconds.

        It is the sum over the layer's calls, the median of it over the rounds, added up over the workloads by their weights.
        In training this is the forward's time alone; what a layer's backward takes shows in the whole network's time.
        """
        total = {name: (0.0, 0.0) for name in stacks}
        for workload in self.examples:
            spent: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in stacks}

            def begin(side: int, spent: dict[str, tuple[list[float], list[float]]] = spent) -> None:
                for each in spent.values():
                    each[side].append(0.0)

            handles = []
            try:
                for name, stack in stacks.items():
                    for side, module in enumerate((self.layers[name].module, stack)):
                        handles += _timed(module, spent[name][side])
                self._interleaved(stacks, workload, begin)
            finally:
                for handle in handles:
                    handle.remove()
            for name, sides in spent.items():
                dense_s, form_s = (t + workload.weight * median(each) for t, each in zip(total[name], sides, strict=True))
                total[name] = dense_s, form_s
        return total

    def _interleaved(self, stacks: Stacks, workload: Workload, begin: Callable[[int], None] = lambda side: None) -> WholeTimes:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        training = isinstance(self.mode, Training)
        with preserved(self.model), torch.enable_grad() if training else torch.inference_mode():
            set_mode(self.model, training)
            for stack in stacks.values():
                stack.train(training)
            dense = step(self.model, workload, self.mode)
            with self._holding(stacks) as small:
                lean = step(small, workload, self.mode)

            def run_dense() -> Any:
                begin(0)
                return dense()

            def run_lean() -> Any:
                begin(1)
                with self._holding(stacks):
                    return lean()

            before, after = interleave([run_dense, run_lean], device, self.effort)
        return before, after

    @contextmanager
    def _holding(self, stacks: Stacks) -> Iterator[nn.Module]:
        held = self.model
        try:
            for name, stack in stacks.items():
                held = put(held, self.layers[name], stack)
            yield held
        finally:
            for name in stacks:
                put(held, self.layers[name], self.layers[name].module)


def _timed(module: nn.Module, spent: list[float]) -> list[Any]:
    """Hooks that add the seconds of each forward of a module to the last entry."""
    device = next(module.parameters()).device
    wait: Callable[[], None] = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    started: list[float] = []

    def start(*_: Any) -> None:
        wait()
        started.append(time.perf_counter())

    def stop(*_: Any) -> None:
        wait()
        spent[-1] += time.perf_counter() - started.pop()

    return [module.register_forward_pre_hook(start, prepend=True), module.register_forward_hook(stop)]
