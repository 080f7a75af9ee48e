"""What groups lose that are fitted by the channels of a calibration, and by its patches: the demo's network.

    python benchmarks/groups_on_patches.py

Cores of all channels in groups, in every 3×3 convolution, after one draw of 512 unlabelled images. Errors are in the metric of
patches and gradients, as shares of what it costs to lose all of the weight: of factors of the weight alone, of those fitted by
channels, of lamina's, which go downhill from there by patches, and of these after more steps. Then the network with all of
them at once, on the test images. Nothing is trained on labels.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from answers import BATCH, calibrated, lost, right
from record import conditions, options, table
from torch import Tensor, nn

import lamina
from lamina.factorize.block_term import BlockTerms, block_term
from lamina.factorize.metric import Metric
from lamina.factorize.weighted import weighted_block_term
from lamina.network.walk import walk


def share(W: Tensor, fit: BlockTerms, metric: Metric) -> float:
    return metric.error(W.double() - fit.composed().double()) / metric.error(W)


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    small = copy.deepcopy(model)
    for name, W in weights.items():
        small.get_submodule(name).weight.data.copy_(W)
    return small


def main() -> None:
    from demo import base_network
    from fashion import test_images

    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32])
        parser.add_argument("--steps", type=int, nargs="*", default=[], help="so many steps instead, too")
        parser.add_argument("--layers", nargs="+", help="these alone, and no whole network")

    chosen = options(__doc__ or "", extend)
    model, test = base_network(), test_images()
    x, calibration, layers = test.images[:BATCH], calibrated(model, 0), walk(model).layers
    names = chosen.layers or [name for name, layer in layers.items() if layer.geometry.taps > 1][1:]
    before, outputs = right(model, test.images, test.labels), lamina.Categorical()
    with torch.inference_mode():
        original = model(test.images[:1000])
    rows, networks = [], []
    for size in chosen.sizes:
        made: dict[str, dict[str, Tensor]] = {}
        for name in names:
            W, metric = layers[name].weight.detach(), calibration.layers[name].metric()
            width = min(W.shape[:2]) // size * size
            asked = W, width, width, width // size
            ways: dict[str, Callable[[], BlockTerms]] = {
                "the weight alone": partial(block_term, *asked),
                "by channels": partial(weighted_block_term, *asked, metric.of_channels()),
                "by patches": partial(weighted_block_term, *asked, metric),
                **{f"{n} steps": partial(weighted_block_term, *asked, metric, steps=n) for n in chosen.steps},
            }
            found = []
            for way, make in ways.items():
                began = time.perf_counter()
                fit = make()
                found.append(f"{share(W, fit, metric):.2%} in {time.perf_counter() - began:.1f} s")
                made.setdefault(way, {})[name] = fit.composed().float()
            rows.append([str(size), name, *found])
            print(rows[-1], flush=True)
        for way, weights in made.items() if not chosen.layers else ():
            small = with_weights(model, weights)
            with torch.inference_mode():
                nats = float(outputs.divergence(original, small(test.images[:1000])).mean())
            networks.append([str(size), way, f"{nats:.4f}", lost(before, [right(small, test.images, test.labels)])])
            print(networks[-1], flush=True)
    print(table(["group size", "layer", *ways], rows))
    print(table(["group size", "all of them fitted", "nats an image (1,000)", "points lost"], networks))
    print(conditions(lamina.compare(model, model, x, seconds=0.1).setting))


if __name__ == "__main__":
    main()
