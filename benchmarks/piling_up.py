"""Whether errors pile up from layer to layer: other fits of the demo's network, nothing trained, beside the one of the library.

    python benchmarks/piling_up.py --publish

Uniform ratios, two-sided weights on patches throughout, for draws of 512 unlabelled images each. A draw of one ratio takes
minutes: with ``--kept FILE`` each network is kept when it is scored, and what is kept is not made again. What is tried:

``bias``: the mean output of each decomposed layer stays as it was. The demo's convolutions have no bias, so the norm behind
each of them takes the change; ``centred`` fits the factors besides to what a free bias cannot make up for, the moment
H − P μμᵀ of P positions an item.

``sequential``: ``decompose(…, sequential=images)``, the layers one after the other, each on the inputs that it now gets.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from answers import BATCH, calibrated, drawn, inner, lost, right
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.calibration.calibration import Moments
from lamina.factorize.metric import Metric
from lamina.layers.build import factored
from lamina.network.walk import walk

WAYS = ("as it is", "bias", "centred", "sequential")
AGAIN = ", recalibrated"
RATIOS = [6.0]
"""The one at which much is lost."""


def norm_behind(name: str) -> str:
    return name.replace("conv", "bn").replace("shortcut.0", "shortcut.1")


def centred(moments: Moments, calibration: lamina.Calibration) -> Tensor:
    mean = moments.mean()
    return moments.inputs() - moments.rows / calibration.samples * mean[:, None] * mean


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model.eval()(x) for x in images.split(500)])


def shifted(small: nn.Module, name: str, by: Tensor) -> None:
    """Move the mean that the norm behind a layer takes off."""
    small.get_submodule(norm_behind(name)).running_mean += by.float()


@torch.no_grad()
def made(way: str, model: nn.Module, plan: lamina.Plan, calibration: lamina.Calibration, batches: list[Tensor]) -> nn.Module:
    if way in ("as it is", "sequential"):
        return lamina.decompose(model, plan, calibration, sequential=batches if way == "sequential" else None)
    small, layers = copy.deepcopy(model), walk(model).layers
    for name, planned in plan.decomposed.items():
        layer, moments = layers[name], calibration.layers[name]
        W = layer.weight.detach().flatten(1).double()
        H = centred(moments, calibration) if way == "centred" else moments.inputs()
        metric = Metric.of(H, moments.gradients(), taps=layer.geometry.taps, damping=moments.damping)
        module = factored(layer, planned.form, metric)
        small.set_submodule(name, module)
        mean = moments.mean()
        shifted(small, name, module.composed().detach().flatten(1).double() @ mean - W @ mean)
    return small


def main() -> None:
    from demo import base_network
    from fashion import test_images

    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--draws", type=int, default=5)
        parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
        parser.add_argument("--kept", type=Path, help="a file in which what was found is kept, to go on from")

    chosen = options(__doc__ or "", extend)
    model, test = base_network(), test_images()
    x = test.images[:BATCH]
    before, outputs = right(model, test.images, test.labels), lamina.Categorical()
    original = answers(model, test.images)

    def scored(small: nn.Module) -> dict[str, Any]:
        wrong = (~right(small, test.images, test.labels)).nonzero().flatten().tolist()
        return {"wrong": wrong, "nats": float(outputs.divergence(original, answers(small, test.images)).mean())}

    kept = json.loads(chosen.kept.read_text()) if chosen.kept and chosen.kept.exists() else {}
    rows = []
    for ratio in chosen.ratios:
        plan = lamina.make_plan(model, x, lamina.Ratio(ratio), rule=lamina.AtRatio(), include=inner(model, x))
        each: dict[str, list[Tensor]] = {}
        nats: dict[str, list[float]] = {}
        for seed in range(chosen.draws):
            calibration = None
            for way in WAYS:
                key = f"{ratio:g}, {seed}, {way}"
                if key not in kept:
                    calibration = calibration or calibrated(model, seed)
                    began = time.perf_counter()
                    small = made(way, model, plan, calibration, drawn(seed))
                    took = time.perf_counter() - began
                    found = [scored(small)]
                    lamina.recalibrate(small, drawn(seed))
                    found.append(scored(small))
                    kept[key] = found
                    if chosen.kept:
                        chosen.kept.write_text(json.dumps(kept))
                    print(key, f"{took:.0f} s", *((len(one["wrong"]), one["nats"]) for one in found), flush=True)
                for name, one in zip((way, f"{way}{AGAIN}"), kept[key], strict=True):
                    told = torch.ones(len(before), dtype=torch.bool)
                    told[one["wrong"]] = False
                    each.setdefault(name, []).append(told)
                    nats.setdefault(name, []).append(one["nats"])
        for way, tolds in each.items():
            beside = f"{WAYS[0]}{AGAIN}" if way.endswith(AGAIN) and way != f"{WAYS[0]}{AGAIN}" else WAYS[0]
            apart = (torch.stack(tolds).double().mean(0) - torch.stack(each[beside]).double().mean(0)) * 100
            half = 1.96 * float(apart.std()) / len(apart) ** 0.5
            gained = "" if way == beside else f"{float(apart.mean()):+.2f} ± {half:.2f}"
            rows.append([f"{ratio:g}", way, lost(before, tolds), gained, f"{statistics.mean(nats[way]):.4f}"])
            print(rows[-1], flush=True)
    body = table(["ratio", "fitted", "points lost", "gained", "nats an image"], rows)
    body += (
        f"\n\nMeans of {chosen.draws} draws of 512 images; intervals over the 10,000 test images, paired. Gained: over what is "
    )
    body += "fitted as it is; of what is recalibrated, over what is fitted so and recalibrated too."
    body += f" The network tells {float(before.double().mean()):.2%} right before."
    body += f"\n\n{conditions(lamina.compare(model, model, x, seconds=0.1).setting)}"
    print(body)
    if chosen.publish:
        publish("piling-up", "Errors that pile up", "python benchmarks/piling_up.py", body)


if __name__ == "__main__":
    main()
