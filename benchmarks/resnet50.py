"""ResNet-50 at ratio 2: does it run faster, does choosing ranks by the clock pay, and what does it cost to find out?

    python benchmarks/resnet50.py --publish

Input 8×3×160×160, float32, channels last. The network is torchvision's with fresh weights: times do not depend on weights;
weight errors do, and a trained network's are lower.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from record import conditions, options, publish, table
from torch import nn
from torchvision.models import resnet50

import lamina
from lamina.layers.decomposed import DecomposedLayer
from lamina.network.walk import walk

SHAPE = (8, 3, 160, 160)
RATIO = 2.0


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


def main() -> None:
    chosen = options(__doc__)
    model = resnet50().eval().to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    dense = lamina.count(model, x)

    with tempfile.TemporaryDirectory() as scratch:
        timings = Path(scratch) / "timings.sqlite"
        began = time.perf_counter()
        measured = lamina.make_plan(model, x, lamina.Ratio(RATIO), timings=timings, never_slower=False)
        first = time.perf_counter() - began
        began = time.perf_counter()
        lamina.make_plan(model, x, lamina.Ratio(RATIO), timings=timings, never_slower=False)
        again = time.perf_counter() - began
        measured = lamina.make_plan(model, x, lamina.Ratio(RATIO), timings=timings)
        training = lamina.make_plan(model, x, lamina.Ratio(RATIO), timings=timings, mode=lamina.Training())
    plain = lamina.make_plan(model, x, lamina.Ratio(RATIO), rule=lamina.AtRatio())
    equal = at_equal_macs(model, x, measured)

    plans = {"plain ranks": plain, "measured ranks": measured, "plain ranks, MACs as measured": equal}
    networks = {}
    for name, plan in plans.items():
        began = time.perf_counter()
        networks[name] = lamina.decompose(model, plan, check=False).eval()
        if plan is plain:
            decomposing = time.perf_counter() - began
    compared = {name: lamina.compare(model, small, x, seconds=chosen.seconds) for name, small in networks.items()}
    against = lamina.compare(networks["plain ranks, MACs as measured"], networks["measured ranks"], x, seconds=chosen.seconds)
    trained = lamina.decompose(model, training, check=False)
    step = lamina.compare(model, trained, x, mode=lamina.Training(), seconds=2 * chosen.seconds)
    plain_step = lamina.compare(model, networks["plain ranks"], x, mode=lamina.Training(), seconds=2 * chosen.seconds)

    rows = [["dense", "", "1", f"{dense.parameters / 1e6:.2f} M", f"{dense.macs / 1e9:.2f} G", ""]]
    for name, result in compared.items():
        cost = lamina.count(networks[name], x)
        low, high = result.interval
        rows.append(
            [
                f"{name}, inference",
                f"{result.before} → {result.after}",
                f"**{result.speedup:.2f}** ({low:.2f} to {high:.2f})",
                f"{cost.parameters / 1e6:.2f} M (÷{dense.parameters / cost.parameters:.2f})",
                f"{cost.macs / 1e9:.2f} G (÷{dense.macs / cost.macs:.2f})",
                f"{weight_error(model, networks[name]):.3f}",
            ]
        )
    for name, result, small in (("plain ranks", plain_step, networks["plain ranks"]), ("measured ranks", step, trained)):
        cost = lamina.count(small, x)
        low, high = result.interval
        rows.append(
            [
                f"{name}, training step",
                f"{result.before} → {result.after}",
                f"**{result.speedup:.2f}** ({low:.2f} to {high:.2f})",
                f"{cost.parameters / 1e6:.2f} M (÷{dense.parameters / cost.parameters:.2f})",
                f"{cost.macs / 1e9:.2f} G (÷{dense.macs / cost.macs:.2f})",
                f"{weight_error(model, small):.3f}",
            ]
        )
    low, high = against.interval
    predicted = {}
    for name in ("measured ranks",):
        gains = sum(
            layer.before.timing.median_s - layer.after.timing.median_s
            for layer in plans[name].layers.values()
            if layer.before.timing and layer.after.timing
        )
        real = compared[name]
        predicted[name] = (real.before.median_s - gains) / real.after.median_s
    facts = [
        ["measured ranks against plain ranks of equal MACs", f"×{against.speedup:.3f} ({low:.3f} to {high:.3f})"],
        ["finding ranks by measurement, first time (whole-model timing aside)", f"{first:.1f} s"],
        ["the same from the table", f"{again:.2f} s"],
        ["decomposing all layers (SVD, HOOI)", f"{decomposing:.1f} s"],
        [
            "predicted whole time (dense − what the layers save) / measured, measured ranks",
            f"{predicted['measured ranks']:.3f}",
        ],
        [
            "layers decomposed / left dense / put back",
            f"{len(measured.decomposed)} / {len(measured.layers) - len(measured.decomposed)} / {len(measured.put_back)}",
        ],
    ]
    body = "\n\n".join(
        [
            conditions(compared["plain ranks"].setting) + f" Input {'×'.join(map(str, SHAPE))}, ratio {RATIO:g}.",
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
