"""Whether errors pile up from layer to layer: other fits of the demo's network, nothing trained, beside the one of the library.

    python benchmarks/piling_up.py --publish

Uniform ratios, two-sided weights on patches throughout, for draws of 512 unlabelled images each. A draw of one ratio takes
minutes: with ``--kept FILE`` each network is kept when it is scored, and what is kept is not made again. What is tried:

``bias``: the mean output of each decomposed layer stays as it was. The demo's convolutions have no bias, so the norm behind
each of them takes the change; ``centred`` fits the factors besides to what a free bias cannot make up for, the moment
H − P μμᵀ of P positions an item.

``sequential``: the layers one after the other, each fitted on the inputs x̂ that it now gets, to what the original gave on its
own inputs x (AA-SVD, arXiv 2604.02119): with Ĥ = E x̂x̂ᵀ and C = E xx̂ᵀ the error E ‖G^½ (W x − Ŵ x̂)‖² is that of the weight
W C Ĥ⁻¹ in the metric of Ĥ and G, up to a constant.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from answers import BATCH, calibrated, drawn, inner, lost, right
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.calibration.calibration import Moments
from lamina.factorize.metric import Metric
from lamina.layers.build import factored
from lamina.network.walk import Layer, walk

WAYS = ("as it is", "bias", "centred", "sequential", "sequential, bias")
AGAIN = ", recalibrated"
RATIOS = [6.0, 4.0, 2.0]


def norm_behind(name: str) -> str:
    return name.replace("conv", "bn").replace("shortcut.0", "shortcut.1")


def patches(layer: Layer, x: Tensor) -> Tensor:
    """What a convolution multiplies its weight with, ``(I K, rows)``."""
    geometry = layer.geometry
    cut = F.unfold(x, geometry.kernel, padding=geometry.padding, stride=geometry.stride)
    return cut.transpose(0, 1).flatten(1)


@torch.no_grad()
def inputs_of(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(batch)
    handle.remove()
    return seen[0]


@dataclasses.dataclass
class Sums:
    """Of the inputs that a layer gets now, and of those beside the original's."""

    own: Tensor
    both: Tensor
    mean: Tensor
    mean_before: Tensor
    items: int


def sums(layer: Layer, before: nn.Module, now: nn.Module, batches: list[Tensor]) -> Sums:
    size = layer.weight[0].numel()
    own, both = torch.zeros(2, size, size, dtype=torch.float64)
    mean, mean_before, rows = torch.zeros(size).double(), torch.zeros(size).double(), 0
    for batch in batches:
        x, y = (patches(layer, inputs_of(net, layer.name, batch)) for net in (before, now))
        own += (y @ y.T).double()
        both += (x @ y.T).double()
        mean += y.double().sum(1)
        mean_before += x.double().sum(1)
        rows += x.shape[1]
    items = sum(map(len, batches))
    return Sums(own / items, both / items, mean / rows, mean_before / rows, items)


def centred(moments: Moments, calibration: lamina.Calibration) -> Tensor:
    mean = moments.mean()
    return moments.inputs() - moments.rows / calibration.samples * mean[:, None] * mean


def fitted(layer: Layer, form: lamina.BlockTerm, W: Tensor, metric: Metric) -> nn.Module:
    module = copy.deepcopy(layer.module)
    module.weight.data.copy_(W.reshape(module.weight.shape))
    return factored(dataclasses.replace(layer, module=module), form, metric)


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model.eval()(x) for x in images.split(500)])


def shifted(small: nn.Module, name: str, by: Tensor) -> None:
    """Move the mean that the norm behind a layer takes off."""
    small.get_submodule(norm_behind(name)).running_mean += by.float()


def made(way: str, model: nn.Module, plan: lamina.Plan, calibration: lamina.Calibration, batches: list[Tensor]) -> nn.Module:
    small, layers = copy.deepcopy(model), walk(model).layers
    for name, planned in plan.decomposed.items():
        layer, moments = layers[name], calibration.layers[name]
        damping = moments.damping
        W, gradients = layer.weight.detach().flatten(1).double(), moments.gradients()
        if way.startswith("sequential"):
            found = sums(layer, model, small, batches)
            ridge = damping * float(found.own.diagonal().mean()) * torch.eye(len(found.own), dtype=torch.float64)
            target = torch.linalg.solve(found.own + ridge, (found.both + ridge).T @ W.T).T
            metric = Metric.of(found.own, gradients, taps=layer.geometry.taps, damping=damping)
            mean, wanted = found.mean, W @ found.mean_before
        else:
            H = centred(moments, calibration) if way == "centred" else moments.inputs()
            target, metric = W, Metric.of(H, gradients, taps=layer.geometry.taps, damping=damping)
            mean, wanted = moments.mean(), W @ moments.mean()
        module = fitted(layer, planned.form, target, metric)
        small.set_submodule(name, module)
        if "bias" in way or way == "centred":
            shifted(small, name, module.composed().detach().flatten(1).double() @ mean - wanted)
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
