"""How fairly plans are judged: twins of equal speed, and what tells the gain of one layer.

    python benchmarks/judging.py --publish --threads 1 --seconds 2

In the first table the "decomposed" layers are dense, with the same weights. So the truth is ×1.00, and whatever is found
beyond it is a fault of the judging. In the second the gain of single layers is looked for twice with as many rounds: from the
times of the whole network with and without them, and from times taken in their places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v2, resnet18

from lamina import Inference, LowRank, Workload, compare
from lamina.choose.never_slower import Forms, Pair, Stopwatch
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort, ratio, ratio_interval
from lamina.network.walk import Layer, walk

LOOKS = 3
ROUNDS = 30
SINGLE = 6


class Perceptron(nn.Sequential):
    """So many equal layers, each with its ReLU."""

    def __init__(self, layers: int) -> None:
        super().__init__(*(layer for _ in range(layers) for layer in (nn.Linear(64, 64), nn.ReLU())))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "20 × Linear 64, batch 1": lambda: (Perceptron(20), torch.randn(1, 64)),
    "200 × Linear 64, batch 8": lambda: (Perceptron(200), torch.randn(8, 64)),
    "1,000 × Linear 64, batch 8": lambda: (Perceptron(1000), torch.randn(8, 64)),
    "MobileNetV2, 32×32": lambda: (mobilenet_v2(), torch.randn(1, 3, 32, 32)),
    "ResNet-18, 32×32": lambda: (resnet18(), torch.randn(1, 3, 32, 32)),
    "DenseNet-121, 32×32": lambda: (densenet121(), torch.randn(1, 3, 32, 32)),
}


class Twins(Stopwatch):
    """Both networks are dense, each with the layers in question made anew."""

    __slots__ = ()

    def _pair(self, forms: Forms, number: int, dense: Callable[[list[Layer]], nn.Module]) -> tuple[nn.Module, nn.Module]:
        first, second = (dense([self.layers[name] for name in forms]) for _ in range(2))
        return (second, first) if number % 2 else (first, second)


def equal(name: str, seconds: float) -> list[str]:
    model, x = NETWORKS[name]()
    layers = walk(model.eval()).layers
    watch = Twins(model, layers, [Workload(x)], Inference(), Effort(seconds, 8, 120))
    forms = dict.fromkeys(layers, LowRank(1))
    looks = [watch.whole(forms)[0] for _ in range(LOOKS)]
    places = sorted(ratio(*pair) for [pair] in watch.in_place(forms).values())
    told = compare(model, copy.deepcopy(model), x, seconds=seconds)
    low, high = told.interval
    return [
        name,
        str(len(layers)),
        f"{median(looks[-1][0]) * 1e3:.3g} ms",
        *map(shown, looks),
        f"×{median(places):.3f} ({places[0]:.2f} to {places[-1]:.2f})",
        f"×{told.speedup:.3f} ({low:.3f} to {high:.3f})",
    ]


def shown(pair: Pair) -> str:
    low, high = ratio_interval(*pair)
    return f"×{ratio(*pair):.3f} ({low:.3f} to {high:.3f})"


def half_width(pair: Pair) -> float:
    """Half of the 95 % interval of the median gain, in seconds."""
    low, high = ratio_interval([before - after for before, after in zip(*pair, strict=True)], [1.0] * len(pair[0]))
    return (high - low) / 2


def single(name: str) -> list[str]:
    """Half widths of the gains of some layers, as shares of what the layers take."""
    model, x = NETWORKS[name]()
    layers = walk(model.eval()).layers
    forms = {name: LowRank(1) for name, layer in layers.items() if layer.geometry.pointwise}
    forms = {name: forms[name] for name in list(forms)[:: max(1, len(forms) // SINGLE)][:SINGLE]}
    effort = Effort(1e-9, ROUNDS, ROUNDS, 0.0)  # so short that a look is at one pair of twins
    watch = Stopwatch(model, layers, [Workload(x)], Inference(), effort)
    places = {name: pair for name, [pair] in watch.in_place(forms).items()}
    inside, outside = [], []
    for layer, (dense, form) in places.items():
        _, small = watch._pair(forms, 0, watch._as_it_is)
        _, without = watch._pair({name: form for name, form in forms.items() if name != layer}, 0, watch._as_it_is)
        [[whole, all_in]] = time_each([without, small], [Workload(x)], Inference(), effort)
        inside.append(half_width((dense, form)) / median(dense))
        outside.append(half_width((whole, all_in)) / median(dense))
    once, times = median(inside), median(o / i for o, i in zip(outside, inside, strict=True))
    return [name, str(len(layers)), f"{once:.1%}", f"{median(outside):.0%}", f"{float(f'{times**2:.2g}'):,.0f}"]


def main() -> None:
    chosen = options(__doc__ or "")
    twins = []
    for name in NETWORKS:
        twins.append(equal(name, chosen.seconds))
        print(*twins[-1], sep=" | ", flush=True)
    singles = []
    for name in NETWORKS:
        singles.append(single(name))
        print(*singles[-1], sep=" | ", flush=True)
    model, x = NETWORKS["MobileNetV2, 32×32"]()
    looks = [f"look {n + 1}" for n in range(LOOKS)]
    body = f"""\
Twins of equal speed as never slower times them: the whole network in {LOOKS} looks, and in one the layers in their places, of
which the middle one, the least and the greatest are shown; and as `compare` tells the network from its copy. The truth is ×1.

{table(["network", "layers", "a run", *looks, "in their places", "compare"], twins)}

What tells the gain of one layer: half of the 95 % interval after {ROUNDS} rounds, as a share of the layer's time, in the median
over {SINGLE} layers. In their places one series of rounds tells it of all layers; leaving out needs longer ones for each.

{table(["network", "layers", "in its place", "left out of the whole", "times as many rounds for as much"], singles)}

{conditions(whole_setting(model, Workload(x), Inference()))}"""
    print(body)
    if chosen.publish:
        publish(
            "judging", "How fairly plans are judged", "python benchmarks/judging.py --publish --threads 1 --seconds 2", body
        )


if __name__ == "__main__":
    main()
