"""Two whole networks, timed against each other on the same example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import torch
from torch import Tensor, nn

from .errors import ExampleError
from .layers.resting import at_rest, resting_weights
from .measure.clock import Effort, denormals, interleave, ratio_interval, timing
from .measure.conditions import setting_of
from .network.observe import is_channels_last
from .network.preserve import preserved
from .network.running import run, set_mode
from .schedules import Group
from .values import Inference, Mode, Setting, Timing, Training, Workload, workloads


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Times of two networks, taken in turn.

    Attributes:
        speedup: Median time before / median time after: above 1, the second network is faster.
        interval: 95 % confidence interval of the median of the paired ratios.
        before, after: The times; with several workloads their weighted sums.
        setting: The conditions.
        example: Shapes of what was fed.
        denormals: Denormal weights in the first and the second network; many of them slow a CPU down.
    """

    speedup: float
    interval: tuple[float, float]
    before: Timing
    after: Timing
    setting: Setting
    example: str
    denormals: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        """Two lines: the result and its conditions."""
        low, high = self.interval
        lines = [
            f"×{self.speedup:.2f} (95 % between {low:.2f} and {high:.2f}): {self.before} → {self.after}",
            f"on {self.example}; {self.setting}",
        ]
        if any(self.denormals):
            lines.append(
                f"denormal weights: {self.denormals[0]} → {self.denormals[1]}; torch.set_flush_denormal(True) avoids their cost"
            )
        return "\n".join(lines)


def compare(model: nn.Module, small: nn.Module, example: Any, *, mode: Mode | None = None, seconds: float = 2.0) -> Comparison:
    """Time two networks against each other, interleaved in one process.

    Args:
        model: The network before.
        small: The network after.
        example: What both are fed: a tensor, a tuple, a mapping, or a list of `Workload`.
        mode: `Inference()` by default: a forward in eval mode without gradients. `Training()`: forward and backward in train
            mode; with a freezing schedule the second network's time is the mean over its phases, by their shares. The first
            network trains whole: it may be the second one itself, and the comparison then tells what freezing gains.
        seconds: About how long to measure each workload; at least 7 rounds are made.

    Raises:
        ExampleError: One of the networks does not run on the example.
    """
    mode = mode or Inference()
    effort = Effort(seconds, 7, 400)
    each = workloads(example)
    modes = [Training() if isinstance(mode, Training) else mode, mode]
    times = [time_whole([model, small], workload, modes, effort) for workload in each]
    rounds = min(len(t[0]) for t in times)
    before, after = (
        [sum(w.weight * t[side][r] for w, t in zip(each, times, strict=True)) for r in range(rounds)] for side in (0, 1)
    )
    setting = whole_setting(model, each[0], mode)
    return Comparison(
        median(before) / median(after),
        ratio_interval(before, after),
        timing(before, setting),
        timing(after, setting),
        setting,
        " and ".join(map(str, each)),
        (denormals(model), denormals(small)),
    )


def time_whole(
    models: Sequence[nn.Module], workload: Workload, modes: Mode | Sequence[Mode], effort: Effort
) -> list[list[float]]:
    """Times of whole networks in seconds, interleaved; every network is left as it was.

    Args:
        models: The networks; one of them may stand there twice.
        workload: What they are fed.
        modes: One mode, or one a network: all `Inference`, or all `Training`, with freezing or without. Under freezing a
            round's time is the mean over the phases, by their shares.
        effort: How long to measure.

    Raises:
        ExampleError: One of them does not run on the example.
    """
    each = [modes] * len(models) if isinstance(modes, Inference | Training) else list(modes)
    training = isinstance(each[0], Training)
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    with preserved(*models):
        for model in models:
            set_mode(model, training)
        with torch.enable_grad() if training else torch.inference_mode():
            for model in models:
                run(model, workload)
            runs = [
                (step(model, workload, mode, phase.resting), phase.share, number)
                for number, (model, mode) in enumerate(zip(models, each, strict=True))
                for phase in mode.phases
            ]
            taken = interleave([run for run, _, _ in runs], device, effort)
    rounds = range(len(taken[0]))
    return [
        [sum(share * times[r] for (_, share, owner), times in zip(runs, taken, strict=True) if owner == number) for r in rounds]
        for number in range(len(models))
    ]


def step(model: nn.Module, workload: Workload, mode: Mode, resting: Group | None = None) -> Callable[[], Any]:
    """One timed run: a forward, or forward and backward of the sum of all outputs, which leaves every ``grad`` alone.

    In training, the weights of a group of factors may rest; they do so only while the step runs.
    """
    if not isinstance(mode, Training):
        return lambda: workload.run(model)
    frozen = resting_weights(model, mode.freezing, resting)
    out = {id(p) for p in frozen}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in out]
    if not parameters:
        raise ExampleError("a training step cannot be timed: no parameter of the network requires a gradient")

    def train() -> Any:
        with at_rest(frozen):
            outputs = _float_tensors(workload.run(model))
            total = torch.stack([output.float().sum() for output in outputs]).sum()
            return torch.autograd.grad(total, parameters, allow_unused=True)

    return train


def whole_setting(model: nn.Module, workload: Workload, mode: Mode) -> Setting:
    """The conditions under which a whole network is timed on a workload.

    Its memory format is that of the weights: a network says with them how it wants to be run.
    """
    layouts = [p for p in model.parameters() if p.ndim in (4, 5)] + workload.tensors
    setting = setting_of(model, mode.name, channels_last=any(is_channels_last(t) for t in layouts))
    return dataclasses.replace(setting, freezing=str(mode.freezing)) if mode.freezing else setting


def _float_tensors(output: Any) -> list[Tensor]:
    tensors = [t for t in _leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ExampleError("a training step cannot be timed: the network's output holds no tensor with a gradient")
    return tensors


def _leaves(output: Any) -> list[Any]:
    # Hugging Face's outputs are ordered dictionaries, registered with pytree; other objects are taken by their attributes.
    leaves = torch.utils._pytree.tree_leaves(output)
    return [
        leaf
        for item in leaves
        for leaf in (vars(item).values() if hasattr(item, "__dict__") and not isinstance(item, Tensor) else [item])
    ]
