"""Times the whole network with its planned forms, and puts back what does not pay.

A layer that wins alone may lose in its place: its neighbours' data lies elsewhere in the caches, one more kernel must be
started. So every planned layer is timed inside the running network, dense and decomposed in turn; those that lose there become
dense again; then the whole network is timed, until it is faster with the plan than without, or nothing is left of the plan.

Forms are filled with random weights: a time needs shapes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, final

import torch
from torch import Tensor, nn

from ..comparison import step
from ..forms import Form
from ..layers.build import random
from ..measure.clock import Effort, interleave, ratio_interval
from ..network.copying import shadow
from ..network.preserve import preserved
from ..network.running import set_mode
from ..network.surgery import adopt
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
        mode: Inference or training, under a freezing schedule perhaps.
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
        small = self._small(stacks)
        return [self._interleaved(small, workload) for workload in self.examples]

    def _small(self, stacks: Stacks) -> nn.Module:
        return shadow(self.model, {self.layers[name].module: stack for name, stack in stacks.items()})

    def in_place(self, stacks: Stacks) -> dict[str, tuple[float, float]]:
        """For each layer the time that one run of the network spends in it, dense and as a stack, in seconds.

        It is the sum over the layer's calls, the median of it over the rounds, added up over the workloads by their weights
        and, under freezing, over the phases by their shares. In training it is the time of the forward and of the layer's own
        nodes in the backward.
        """
        shares, small = [phase.share for phase in self.mode.phases], self._small(stacks)
        total = {name: (0.0, 0.0) for name in stacks}
        for workload in self.examples:
            # One list for the dense layer, then one a phase for the stack; an entry a round.
            spent: dict[str, list[list[float]]] = {name: [[] for _ in range(1 + len(shares))] for name in stacks}
            current = [0]

            def begin(run: int, spent: dict[str, list[list[float]]] = spent, current: list[int] = current) -> None:
                current[0] = run
                for each in spent.values():
                    each[run].append(0.0)

            handles = []
            try:
                for name, stack in stacks.items():

                    def add(seconds: float, runs: list[list[float]] = spent[name], current: list[int] = current) -> None:
                        runs[current[0]][-1] += seconds

                    for module in (self.layers[name].module, stack):
                        handles += _timed(module, add)
                self._interleaved(small, workload, begin)
            finally:
                for handle in handles:
                    handle.remove()
            for name, (dense, *phases) in spent.items():
                dense_s, form_s = total[name]
                form_s += workload.weight * sum(share * median(each) for share, each in zip(shares, phases, strict=True))
                total[name] = dense_s + workload.weight * median(dense), form_s
        return total

    def _interleaved(self, small: nn.Module, workload: Workload, begin: Callable[[int], None] = lambda run: None) -> WholeTimes:
        """Whole times; ``begin`` is told before each run whether it is the dense network's (0) or which phase's (1, …)."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        training = isinstance(self.mode, Training)
        with preserved(self.model), torch.enable_grad() if training else torch.inference_mode():
            set_mode(self.model, training)
            set_mode(small, training)
            phases = self.mode.phases
            steps = [
                step(self.model, workload, self.mode),
                *(step(small, workload, self.mode, phase.resting) for phase in phases),
            ]

            def begun(number: int) -> Any:
                begin(number)
                return steps[number]()

            before, *after = interleave([partial(begun, number) for number in range(len(steps))], device, self.effort)
        return before, [sum(p.share * t for p, t in zip(phases, times, strict=True)) for times in zip(*after, strict=True)]


def _timed(module: nn.Module, add: Callable[[float], None]) -> list[Any]:
    """Hooks that report the seconds of each forward of a module, and of each node of its graph in a backward."""
    device = next(module.parameters()).device
    wait: Callable[[], None] = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    started: list[float] = []

    def start(*_: Any) -> None:
        wait()
        started.append(time.perf_counter())

    def stop(*_: Any) -> None:
        wait()
        add(time.perf_counter() - started.pop())

    def stop_forward(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        stop()
        # Node by node: between a layer's nodes the engine may run another branch's, and those are not the layer's time.
        for node in _nodes_of(inputs, output):
            node.register_prehook(start)
            node.register_hook(stop)

    return [module.register_forward_pre_hook(start, prepend=True), module.register_forward_hook(stop_forward)]


def _nodes_of(inputs: tuple[Any, ...], output: Any) -> list[Any]:
    """The nodes of autograd's graph that lead from a module's output back to its inputs."""
    if not isinstance(output, Tensor) or output.grad_fn is None:
        return []
    before = {x.grad_fn for x in inputs if isinstance(x, Tensor)}
    found: dict[Any, None] = {}
    ahead: list[Any] = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        # A leaf's node only takes its gradient in.
        if node is None or node in before or node in found or hasattr(node, "variable"):
            continue
        found[node] = None
        ahead += [following for following, _ in node.next_functions]
    return list(found)
