"""Where does ResNet-50 spend its time, and where do plain ranks at ratio 2 gain and lose?

    python benchmarks/resnet50_stages.py --publish

Each distinct layer is timed alone, dense, at the rank that the ratio asks for, and at the rank that the clock chooses; summed
by stage. The rest is what the whole network takes beyond its convolutions and its head: norms, activations, additions, pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from record import conditions, options, publish, table
from torchvision.models import resnet50

import lamina
from lamina.choose.rules import Choice, Question
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort, timing
from lamina.values import Inference, Workload

SHAPE = (8, 3, 160, 160)


@dataclass(frozen=True)
class AtRatioTimed:
    """The rank that the ratio asks for, taken whatever it costs, but timed."""

    timed: bool = True

    def choose(self, question: Question) -> Choice:
        question.times([question.path[0], lamina.Dense()])
        return Choice(question.path[0], "at the ratio asked for")


def main() -> None:
    chosen = options(__doc__)
    model = resnet50().eval().to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    goal = lamina.Ratio(2.0)
    plain = lamina.make_plan(model, x, goal, rule=AtRatioTimed(), never_slower=False)
    measured = lamina.make_plan(model, x, goal, never_slower=False)

    def seconds(plan: lamina.Plan, prefix: str, side: str) -> float:
        costs = [getattr(layer, side) for name, layer in plan.layers.items() if name.startswith(prefix)]
        return sum(cost.timing.median_s for cost in costs)

    def macs(plan: lamina.Plan, prefix: str) -> float:
        layers = [layer for name, layer in plan.layers.items() if name.startswith(prefix)]
        return sum(layer.before.macs for layer in layers) / sum(layer.after.macs for layer in layers)

    rows = []
    for prefix in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc", ""):
        dense, at_ratio, by_clock = (
            seconds(plain, prefix, "before"),
            seconds(plain, prefix, "after"),
            seconds(measured, prefix, "after"),
        )
        rows.append(
            [
                prefix or "**all of these**",
                f"{1e3 * dense:.1f} ms",
                f"{1e3 * at_ratio:.1f} ms (×{dense / at_ratio:.2f}; MACs ÷{macs(plain, prefix):.2f})",
                f"{1e3 * by_clock:.1f} ms (×{dense / by_clock:.2f}; MACs ÷{macs(measured, prefix):.2f})",
            ]
        )
    setting = whole_setting(model, Workload(x), Inference())
    whole = timing(time_each([model], [Workload(x)], Inference(), Effort(chosen.seconds))[0][0], setting).median_s
    rest = whole - seconds(plain, "", "before")
    lost = [
        f"{n} ({p.before.timing.median_s / p.after.timing.median_s:.2f})"
        for n, p in plain.decomposed.items()
        if p.after.timing.median_s >= p.before.timing.median_s
    ]
    alone = seconds(plain, "", "before") / seconds(plain, "", "after")
    best = whole / (rest + seconds(plain, "", "after"))
    body = "\n\n".join(
        [
            conditions(setting) + f" Input {'×'.join(map(str, SHAPE))}, ratio 2.",
            table(["layers of", "dense", "plain ranks", "measured ranks"], rows),
            f"The whole network takes {1e3 * whole:.0f} ms; {1e3 * rest:.0f} ms of it are norms, activations and the like, "
            f"which no rank makes faster. By these sums plain ranks give ×{best:.2f}; without the rest it would be "
            f"×{alone:.2f}. Slower than dense at plain ranks: {', '.join(lost) or 'none'}.",
        ]
    )
    print(body)
    if chosen.publish:
        publish("resnet50-stages", "Where ResNet-50 spends its time", "python benchmarks/resnet50_stages.py --publish", body)


if __name__ == "__main__":
    main()
