"""Does a decomposed network train faster than the original, and what does freezing add?

    python benchmarks/training.py --publish
    python benchmarks/training.py --network resnet152 --publish    # one network at a time: resnet50, resnet152, vit, demo

Ratio 2, float32. A training step is forward, cross-entropy, backward and a step of SGD with momentum; every variant has a
network and an optimizer of its own, all in one process, in turn. Ranks are chosen for the very mode that is then timed; *plain*
ranks look at no clock. Sequential freezing is the mean over its two phases. Peak memory is in bytes held by tensors:
parameters, buffers, gradients, the optimizer's state, and what a step needs beside them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_over
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.values import Inference, Workload

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
RATIO = 2.0


def resnet(name: str) -> tuple[nn.Module, Tensor]:
    model = lamina.load_model(f"torchvision:{name}").to(memory_format=torch.channels_last)
    return model, torch.randn(8, 3, 160, 160).to(memory_format=torch.channels_last)


def vit() -> tuple[nn.Module, Tensor]:
    # timm's attention calls plain linear layers, so that they are decomposed with the rest.
    return lamina.load_model("timm:vit_base_patch16_224"), torch.randn(4, 3, 224, 224)


def demo() -> tuple[nn.Module, Tensor]:
    from demo import base_network
    from fashion import test_images

    return base_network(), test_images().images[:64]


NETWORKS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "resnet50": ("ResNet-50", functools.partial(resnet, "resnet50")),
    "resnet152": ("ResNet-152", functools.partial(resnet, "resnet152")),
    "vit": ("ViT-B/16", vit),
    "demo": ("the demo's network", demo),
}


@dataclass
class Trainee:
    """A network with its optimizer, and the freezing under which it trains, if any."""

    model: nn.Module
    x: Tensor
    freezing: lamina.Freezing | None = None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        groups = self.freezing.parameter_groups() if self.freezing else self.model.parameters()
        self.optimizer = torch.optim.SGD(groups, lr=1e-5, momentum=0.9)
        self.targets = torch.zeros(len(self.x), dtype=torch.long)

    def step(self, epoch: int = 0) -> None:
        if self.freezing:
            self.freezing.start_epoch(epoch)
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.x), self.targets).backward()
        self.optimizer.step()


def megabytes(trainee: Trainee, epoch: int) -> float:
    """Peak memory of training in one phase."""
    trainee.step(epoch)
    trainee.step(epoch)  # the state of the optimizer stands now
    parameters = list(trainee.model.parameters())
    held = [*parameters, *trainee.model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    held += [v for state in trainee.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return (sum(t.numel() * t.element_size() for t in held) + peak_over(lambda: trainee.step(epoch))) / 1e6


def swap_cost(trainee: Trainee, step_s: float) -> float:
    """Time of one phase change as a share of 100 steps."""
    times = []
    for epoch in range(1, 41):
        began = time.perf_counter()
        trainee.freezing.start_epoch(epoch)
        times.append(time.perf_counter() - began)
    return median(times) / (100 * step_s)


def measure(key: str, seconds: float) -> tuple[list[list[str]], list[list[str]], lamina.Setting]:
    title, make = NETWORKS[key]
    model, x = make()
    goal = lamina.Ratio(RATIO)
    sequential, vanilla = lamina.SequentialFreezing(), lamina.VanillaFreezing()
    modes: dict[str, Any] = {
        "measured ranks": lamina.Training(),
        "measured ranks, vanilla freezing": lamina.Training(freezing=vanilla),
        "measured ranks, sequential freezing": lamina.Training(freezing=sequential),
    }
    plans = {"plain ranks": lamina.make_plan(model, x, goal, rule=lamina.AtRatio())}
    plans |= {name: lamina.make_plan(model, x, goal, mode=mode) for name, mode in modes.items()}
    networks = {name: lamina.decompose(model, plan, check=False) for name, plan in plans.items()}

    inferences = time_each([model, *networks.values()], [Workload(x)], Inference(), Effort(seconds, 7, 100))[0]
    trainees = {
        "dense": Trainee(model, x),
        "plain ranks": Trainee(networks["plain ranks"], x),
        "measured ranks": Trainee(networks["measured ranks"], x),
    }
    for name, schedule in (("vanilla", vanilla), ("sequential", sequential)):
        network = networks[f"measured ranks, {name} freezing"]
        trainees[f"the ranks of {name} freezing, all trained"] = Trainee(
            lamina.decompose(model, plans[f"measured ranks, {name} freezing"], check=False), x
        )
        trainees[f"measured ranks, {name} freezing"] = Trainee(network, x, lamina.freeze(network, schedule))
    runs: dict[str, list[Callable[[], None]]] = {
        name: [functools.partial(t.step, epoch) for epoch in range(2 if "sequential freezing" in name and t.freezing else 1)]
        for name, t in trainees.items()
    }
    flat = [(name, run) for name, each in runs.items() for run in each]
    taken = interleave([run for _, run in flat], x.device, Effort(4 * seconds, 7, 100))
    steps = {
        name: [
            sum(times) / len(runs[name])
            for times in zip(*(t for (n, _), t in zip(flat, taken, strict=True) if n == name), strict=True)
        ]
        for name in runs
    }
    peaks = {name: max(megabytes(t, epoch) for epoch in range(len(runs[name]))) for name, t in trainees.items()}

    rows = []
    for name, times in steps.items():
        place = ["dense", *networks].index(name) if name in ("dense", *networks) else None
        inference = "" if place is None else f"{ratio(inferences[0], inferences[place]):.2f}"
        low, high = ratio_interval(steps["dense"], times)
        parameters = sum(p.numel() for p in trainees[name].model.parameters())
        rows.append(
            [
                f"{title}: {name}",
                inference,
                f"{1e3 * median(times):.0f} ms",
                f"**{ratio(steps['dense'], times):.2f}** ({low:.2f} to {high:.2f})",
                f"{peaks[name]:.0f} MB",
                f"{parameters / 1e6:.1f} M",
            ]
        )
    frozen, free = steps["measured ranks, sequential freezing"], steps["the ranks of sequential freezing, all trained"]
    low, high = ratio_interval(free, frozen)
    swap = swap_cost(trainees["measured ranks, sequential freezing"], median(frozen))
    facts = [
        [
            f"{title}: sequential freezing against none, same ranks",
            f"×{ratio(free, frozen):.3f} ({low:.3f} to {high:.3f})",
        ],
        [f"{title}: a phase change, as a share of 100 steps", f"{swap:.4%}"],
    ]
    return rows, facts, whole_setting(model, Workload(x), lamina.Training())


def main() -> None:
    chosen = options(
        __doc__, lambda parser: parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    )
    for key in chosen.network:
        title, make = NETWORKS[key]
        rows, facts, setting = measure(key, chosen.seconds)
        body = "\n\n".join(
            [
                conditions(setting) + f" Input {'×'.join(map(str, make()[1].shape))}, ratio {RATIO:g}.",
                table(["", "inference, × dense", "training step", "× dense", "peak memory", "parameters"], rows),
                table(["", ""], facts),
            ]
        )
        print(body, flush=True)
        if chosen.publish:
            publish(f"training-{key}", f"Training: {title}", f"python benchmarks/training.py --network {key} --publish", body)


if __name__ == "__main__":
    main()
