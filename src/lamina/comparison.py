"""Two whole networks, timed against each other on the same example."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from .answers import TO_DO, change, headline
from .decomposition import plan_of
from .errors import ExampleError, LaminaError, PlanError
from .files import one_line, write_value
from .layers.resting import at_rest, resting_weights
from .measure.clock import Effort, denormals, disturbed, interleave, launching, ratio, ratio_interval, timing
from .measure.conditions import setting_of
from .network.memory import devices_of
from .network.observe import is_channels_last
from .network.preserve import preserved
from .network.running import outside_inference_mode, run, set_mode
from .network.wrappers import unwrapped
from .plan import MUCH
from .runtimes.eager import EAGER
from .runtimes.runtime import Once, Runtime, checked_runtime
from .schedules import Group
from .shown import Shown
from .values import Inference, Mode, Setting, Timing, Training, Workload, workloads


@final
@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Shown):
    """Times of two networks, taken in turn.

    Attributes:
        speedup: Median of the paired ratios before / after, round by round: above 1, the second network is faster.
        interval: Its 95 % confidence interval.
        before, after: The times; with several workloads their weighted sums.
        setting: The conditions.
        example: Shapes of what was fed.
        denormals: Denormal weights in the first and the second network; many of them slow a CPU down.
        change: By how much the outputs in eval mode change on the example, relative to their size; of several the most. None
            where they are not of the same shapes.
        launching: On an accelerator, for what share of the first and of the second network's time the processor is still
            launching kernels, on the first workload.
        planned: What the second network's plan knew of its accuracy when it was made, a line each; empty where it carries none.
    """

    speedup: float
    interval: tuple[float, float]
    before: Timing
    after: Timing
    setting: Setting
    example: str
    denormals: tuple[int, int] = (0, 0)
    change: float | None = None
    launching: tuple[float, float] | None = None
    planned: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON, as ``lamina bench --json`` prints it; the file is there whole or not at all.

        Raises:
            LaminaError: It cannot be written there.
        """
        write_value(path, TypeAdapter(Comparison).dump_json(self, indent=1) + b"\n", LaminaError, "the comparison")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote.

        Raises:
            LaminaError: No such file, or it holds no comparison; the message names it.
        """
        try:
            return TypeAdapter(Comparison).validate_json(Path(path).read_bytes())
        except OSError as error:
            raise LaminaError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise LaminaError(one_line(f"{path}: no comparison of lamina's: {error.errors()[0]['msg']}")) from error

    @property
    def timed(self) -> str:
        """``×1.50 (95 % between 1.49 and 1.51): 3 ms ± 0.01 (9 runs) → 2 ms ± 0.01 (9 runs)``."""
        low, high = self.interval
        busy = ", so the machine is too busy to tell" if disturbed(self.interval) else ""
        return f"×{self.speedup:.2f} (95 % between {low:.2f} and {high:.2f}{busy}): {self.before} → {self.after}"

    def __str__(self) -> str:
        """The result, by how much the answers change, the conditions, and what the plan knew of the accuracy.

        The first line begins with a warning where the answers change much.
        """
        lines = [self.timed, f"on {self.example}; {self.setting}"]
        if self.change is not None:
            told = headline(self.change)
            lines[:1] = [self.timed, told] if self.change <= MUCH else [f"{told}; {self.timed}", TO_DO]
        lines += [f"when planned: {line}" for line in self.planned]
        if any(self.denormals):
            lines.append(
                f"denormal weights: {self.denormals[0]} → {self.denormals[1]}; torch.set_flush_denormal(True) avoids their cost"
            )
        if self.launching and self.launching[1] > _BOUND:
            lines.append(
                "the processor launches kernels for {:.0%} → {:.0%} of the time, so the accelerator waits for it: feed more at "
                'once, or capture the network in a graph, as torch.compile(mode="reduce-overhead") does'.format(*self.launching)
            )
        return "\n".join(lines)


_BOUND = 0.9
"""Above this share of a run's time launching is what it takes, however little there is to compute."""


@outside_inference_mode
def compare(
    model: nn.Module,
    small: nn.Module,
    example: Any,
    *,
    mode: Mode | None = None,
    seconds: float = 2.0,
    runtime: Runtime | None = None,
) -> Comparison:
    """Time two networks against each other, interleaved in one process.

    Args:
        model: The network before.
        small: The network after.
        example: What both are fed: a tensor, a tuple, a mapping, or a list of `Workload`.
        mode: `Inference()` by default: a forward in eval mode without gradients. `Training()`: forward and backward in train
            mode; with a freezing schedule the second network's time is the mean over its phases, by their shares. The first
            network trains whole: it may be the second one itself, and the comparison then tells what freezing gains.
        seconds: The most to spend on each workload; less where the speed-up is known to 0.2 % before, more where 6 rounds, of
            which a 95 % interval is made at the least, take longer.
        runtime: What runs both: eager PyTorch by default. In another one ``change`` is that of what the second network answers
            there against what the first one answers in eager PyTorch.

    Raises:
        ExampleError: One of the networks does not run on the example.
        LaminaError: An argument is not of its kind, or one of the networks does not run in the runtime.
        MissingExtra: The runtime is not installed.
    """
    for network in (model, small):
        if not isinstance(network, nn.Module):
            raise LaminaError(f"a {type(network).__name__} is no network: give two of torch.nn.Module, then the example")
    if not isinstance(seconds, Real) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise LaminaError(f"seconds is {seconds!r}; it must be a positive number")
    mode = checked(mode)
    each = workloads(example)
    modes = [mode.unfrozen, mode]
    once = Once(checked_runtime(runtime) or EAGER)
    once.runtime.check([model, small], mode)
    served = [model, small] if once.eager else [unwrapped(model), unwrapped(small)]
    times = time_each(served, each, modes, Effort(seconds * len(each), 6, 400, 0.002), once)
    before, after = added_up(each, times)
    setting = whole_setting(model, each[0], mode, once.runtime)
    if once.eager:
        runtimes = dict.fromkeys(_runtime(network) for network in (model, small))
        setting = dataclasses.replace(setting, runtime=" → ".join(runtimes))
    return Comparison(
        ratio(before, after),
        ratio_interval(before, after),
        timing(before, setting),
        timing(after, setting),
        setting,
        " and ".join(map(str, each)),
        (denormals(model), denormals(small)),
        change(unwrapped(model), unwrapped(small), each, None if once.eager else partial(_answered, once)),
        _launching((model, small), each[0], modes) if once.eager else None,
        _planned(small),
    )


def _answered(runtime: Runtime, model: nn.Module, workload: Workload) -> list[Tensor]:
    with ready([model], Inference()):
        return runtime.prepare(model, workload).answers()


def _launching(models: Sequence[nn.Module], workload: Workload, modes: Sequence[Mode]) -> tuple[float, float] | None:
    devices = [device for device in devices_of(*models) if device.type != "cpu"]
    if not devices:
        return None
    with ready(models, modes[0]):
        before, after = (
            launching(step(model, workload, mode, mode.phases[0].resting), devices)
            for model, mode in zip(models, modes, strict=True)
        )
    return before, after


def _planned(small: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(plan_of(small).accuracy())
    except PlanError:  # it was not lamina that decomposed it
        return ()


def checked(mode: Any) -> Mode:
    """A ``mode`` argument; None is inference.

    Raises:
        LaminaError: It is no mode.
    """
    if mode is None:
        return Inference()
    if not isinstance(mode, Inference | Training):
        raise LaminaError(f"mode is {mode!r}; give lamina.Inference() or lamina.Training()")
    return mode


def time_each(
    models: Sequence[nn.Module],
    examples: Sequence[Workload],
    modes: Mode | Sequence[Mode],
    effort: Effort,
    runtime: Runtime = EAGER,
) -> list[list[list[float]]]:
    """Times of whole networks on several workloads in seconds, all interleaved: by workload, by network, round by round.

    Args:
        models: The networks; one of them may stand there twice. Every one is left as it was.
        examples: What they are fed.
        modes: One mode, or one a network: all `Inference`, or all `Training`, with freezing or without. Under freezing a
            round's time is the mean over the phases, by their shares.
        effort: How long to measure.
        runtime: What runs them.

    Raises:
        ExampleError: One of them does not run on the example.
        LaminaError: One of them does not run in the runtime.
    """
    own = [modes] * len(models) if isinstance(modes, Inference | Training) else list(modes)
    with ready(models, own[0]):
        for workload in examples if runtime.eager else ():  # others run a network as they make it ready
            for model in models:
                run(model, workload)
        runs = [
            (step(model, workload, mode, phase.resting, runtime), phase.share, (at, number))
            for at, workload in enumerate(examples)
            for number, (model, mode) in enumerate(zip(models, own, strict=True))
            for phase in mode.phases
        ]
        taken = interleave([run for run, _, _ in runs], devices_of(*models), effort)
    times = [[[0.0] * len(taken[0]) for _ in models] for _ in examples]
    for (_, share, (at, number)), seconds in zip(runs, taken, strict=True):
        times[at][number] = [sum_ + share * one for sum_, one in zip(times[at][number], seconds, strict=True)]
    return times


def added_up(examples: Sequence[Workload], times: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """What `time_each` found, added up over the workloads by their weights, round by round: by network."""
    weights = [example.weight for example in examples]
    return [
        [sum(w * t for w, t in zip(weights, round_, strict=True)) for round_ in zip(*of_one, strict=True)]
        for of_one in zip(*times, strict=True)
    ]


@contextmanager
def ready(models: Sequence[nn.Module], mode: Mode) -> Iterator[torch.device]:
    """Networks in the mode in which they are timed, on their device; afterwards they are as they were."""
    training = isinstance(mode, Training)
    with preserved(*models), torch.enable_grad() if training else torch.inference_mode():
        for model in models:
            set_mode(model, training)
        yield next((p.device for model in models for p in model.parameters()), torch.device("cpu"))


def step(
    model: nn.Module, workload: Workload, mode: Mode, resting: Group | None = None, runtime: Runtime = EAGER
) -> Callable[[], Any]:
    """One timed run: a forward, or forward and backward of the sum of all outputs, which leaves every ``grad`` alone.

    In training, the weights of a group of factors may rest; they do so only while the step runs.
    """
    if not isinstance(mode, Training):
        return runtime.prepare(model, workload).run
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


def whole_setting(model: nn.Module, workload: Workload, mode: Mode, runtime: Runtime = EAGER) -> Setting:
    """The conditions under which a whole network is timed on a workload.

    Its memory format is that of the weights: a network says with them how it wants to be run.
    """
    layouts = [p for p in model.parameters() if p.ndim in (4, 5)] + workload.tensors
    setting = runtime.within(setting_of(model, mode.name, channels_last=any(is_channels_last(t) for t in layouts)))
    return dataclasses.replace(setting, freezing=str(mode.freezing)) if mode.freezing else setting


def _runtime(model: nn.Module) -> str:
    """What runs a network: ``eager``, or ``torch.compile`` where the whole of it was compiled."""
    compiled = unwrapped(model) is not model and hasattr(model, "_orig_mod")
    return "torch.compile" if compiled or model._compiled_call_impl is not None else "eager"


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
