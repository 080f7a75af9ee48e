"""ResNet-50 at ratio 2: does it run faster, does choosing ranks by the clock pay, and what does it cost to find out?

    python benchmarks/resnet50.py --publish

Input 8×3×160×160, float32, channels last. The network is torchvision's with fresh weights: times do not depend on weights;
weight errors do, and a trained network's are lower.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from record import conditions, options, publish, table
from torch import nn
from torchvision.models import resnet50

import lamina
from lamina.layers.decomposed import DecomposedLayer
from lamina.network.walk import walk

SHAPE = (8, 3, 160, 160)
RATIO = 2.0
BLOCK = 16  # float32 numbers in an AVX-512 register: oneDNN's kernels work in blocks of as many channels
T = TypeVar("T")


def weight_error(model: nn.Module, small: nn.Module) -> float:
    """‖W − Ŵ‖ / ‖W‖ over all layers that are decomposed."""
    dense = walk(model).layers
    lost = kept = 0.0
    for name, module in small.named_modules():
        if isinstance(module, DecomposedLayer):
            weight = dense[name].module.weight.detach()
            lost += float((weight - module.weight.detach()).square().sum())
            kept += float(weight.square().sum())
    return (lost / kept) ** 0.5 if kept else 0.0


def at_equal_macs(model: nn.Module, x: torch.Tensor, measured: lamina.Plan) -> lamina.Plan:
    """Plain ranks for the layers that a measured plan decomposes, at the ratio that gives the network the same MACs."""
    wanted = measured.whole.after.macs
    names = list(measured.decomposed)
    low, high = 1.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        plan = lamina.make_plan(model, x, lamina.Ratio(middle), rule=lamina.AtRatio(), include=names)
        low, high = (middle, high) if plan.whole.after.macs > wanted else (low, middle)
    return plan


def rounded_up(plan: lamina.Plan, block: int) -> lamina.Plan:
    """The plan with every rank raised to the next multiple of a block, where the layer has as many channels."""
    for name, layer in plan.decomposed.items():
        ranks = {
            field: -(-rank // block) * block
            for field, rank in dataclasses.asdict(layer.form).items()
            if field.startswith("rank") and rank is not None
        }
        if max(ranks.values()) <= min(layer.geometry.in_channels, layer.geometry.out_channels):
            plan = plan.with_form(name, dataclasses.replace(layer.form, **ranks))
    return plan


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result, and the seconds that it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def main() -> None:
    chosen = options(__doc__)
    model = resnet50().eval().to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    goal = lamina.Ratio(RATIO)

    with tempfile.TemporaryDirectory() as scratch:
        timings = Path(scratch) / "timings.sqlite"
        _, first = timed(lambda: lamina.make_plan(model, x, goal, timings=timings, never_slower=False))
        _, again = timed(lambda: lamina.make_plan(model, x, goal, timings=timings, never_slower=False))
        measured = lamina.make_plan(model, x, goal, timings=timings)
        training = lamina.make_plan(model, x, goal, timings=timings, mode=lamina.Training())
    plain = lamina.make_plan(model, x, goal, rule=lamina.AtRatio())
    plans = {
        "plain ranks": plain,
        f"plain ranks raised to multiples of {BLOCK}": rounded_up(plain, BLOCK),
        "measured ranks": measured,
        "plain ranks, MACs as measured": at_equal_macs(model, x, measured),
        "measured ranks for training": training,
    }
    networks, seconds = {}, {}
    for name, plan in plans.items():
        networks[name], seconds[name] = timed(lambda plan=plan: lamina.decompose(model, plan, check=False))

    def compared(before: nn.Module, name: str, mode: lamina.Inference | lamina.Training) -> lamina.Comparison:
        return lamina.compare(before, networks[name], x, mode=mode, seconds=chosen.seconds)

    dense = lamina.count(model, x)
    rows = [["dense", "", "1", f"{dense.parameters / 1e6:.2f} M", f"{dense.macs / 1e9:.2f} G", ""]]
    inference = {name: compared(model, name, lamina.Inference()) for name in plans if name != "measured ranks for training"}
    step = {name: compared(model, name, lamina.Training()) for name in ("plain ranks", "measured ranks for training")}
    for label, results in (("inference", inference), ("training step", step)):
        for name, result in results.items():
            cost = lamina.count(networks[name], x)
            low, high = result.interval
            rows.append(
                [
                    f"{name}, {label}",
                    f"{result.before} → {result.after}",
                    f"**{result.speedup:.2f}** ({low:.2f} to {high:.2f})",
                    f"{cost.parameters / 1e6:.2f} M (÷{dense.parameters / cost.parameters:.2f})",
                    f"{cost.macs / 1e9:.2f} G (÷{dense.macs / cost.macs:.2f})",
                    f"{weight_error(model, networks[name]):.3f}",
                ]
            )
    against = compared(networks["plain ranks, MACs as measured"], "measured ranks", lamina.Inference())
    low, high = against.interval
    saved = sum(
        layer.before.timing.median_s - layer.after.timing.median_s
        for layer in measured.layers.values()
        if layer.before.timing and layer.after.timing
    )
    real = inference["measured ranks"]
    kept = len(measured.layers) - len(measured.decomposed)
    facts = [
        ["measured ranks against plain ranks of equal MACs", f"×{against.speedup:.3f} ({low:.3f} to {high:.3f})"],
        ["finding ranks by measurement, first time (whole-model timing aside)", f"{first:.1f} s"],
        ["the same from the table", f"{again:.2f} s"],
        ["decomposing all layers (SVD, HOOI)", f"{seconds['plain ranks']:.1f} s"],
        [
            "predicted whole time (dense − what the layers save) / measured, measured ranks",
            f"{(real.before.median_s - saved) / real.after.median_s:.3f}",
        ],
        [
            "layers decomposed / left dense / of these put back",
            f"{len(measured.decomposed)} / {kept} / {len(measured.put_back)}",
        ],
    ]
    body = "\n\n".join(
        [
            conditions(real.setting) + f" Input {'×'.join(map(str, SHAPE))}, ratio {RATIO:g}.",
            table(["ResNet-50", "time", "× dense", "parameters", "MACs", "weight error"], rows),
            table(["", ""], facts),
        ]
    )
    print(measured)
    print(body)
    if chosen.publish:
        publish("resnet50", "ResNet-50 at ratio 2", "python benchmarks/resnet50.py --publish", body)


if __name__ == "__main__":
    main()
