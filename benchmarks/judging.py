"""How fairly plans are judged: twins of equal speed, and what tells the gain of one layer.

    python benchmarks/judging.py --publish --threads 1 --seconds 2
    python benchmarks/judging.py --simulated --publish --threads 1

In the first table the "decomposed" layers are dense, with the same weights. So the truth is ×1.00, and whatever is found
beyond it is a fault of the judging. In the second the gain of single layers is looked for twice with as many rounds: from the
times of the whole network with and without them, and from times taken in their places.

With ``--simulated`` no clock is looked at: verdicts are those of a simulated machine, of which the truth is known (`verdicts`).
"""

from __future__ import annotations

import copy
import datetime
import platform
from collections.abc import Callable
from statistics import median

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v2, resnet18
from verdicts import DECOMPOSED, LAYERS, TRIALS, Simulated, simulated

import lamina
from lamina import Inference, LowRank, Workload, compare
from lamina.choose.never_slower import TWINS, Forms, Pair, Stopwatch
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort, ratio, ratio_interval
from lamina.network.walk import Layer, walk

LOOKS = 3
ROUNDS = 30
SINGLE = 6
SIMULATED = 5 * TRIALS
"""Networks that are judged for a row."""


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


def verdict_of(what: str, found: Simulated) -> list[str]:
    """What came of the verdicts of one kind of network."""
    accepted, wrong = len(found.true), sum(true < 1 for true in found.true)
    kept = ", ".join(f"{share:.1%}" for share in found.kept.values())
    report = [f"{found.bias:+.2%}", f"{found.covered:.0%}"] if accepted else ["–", "–"]
    return [what, kept, str(accepted), str(wrong), *report]


def verdicts(trials: int) -> list[list[str]]:
    """Rows of forms that gain nothing, of networks that are slower as a whole, and of forms that gain a tenth."""
    rows = []
    for share in (0.99, 1.0, 1.01):
        for placement in (0.0, 0.01):
            what = f"forms at {share:g} of the time{', twins apart' if placement else ''}"
            rows.append(verdict_of(what, simulated([share], placement=placement, trials=trials)))
    for share, toll in ((0.96, 0.03), (0.9, 0.08)):
        for pairs, rounds in ((None, 4), (1, 30), (1, 120)):
            how = f", one pair of twins, {rounds} rounds" if pairs else ""
            what = f"forms at {share:g}, the whole {toll - (1 - share) * DECOMPOSED:.1%} slower, twins apart{how}"
            rows.append(verdict_of(what, simulated([share], toll, 0.01, 0.0, trials, rounds, pairs or TWINS)))
    for placement, bursts in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.2)):
        what = f"forms at 0.9{', twins apart' if placement else ''}{', a fifth of the runs disturbed' if bursts else ''}"
        rows.append(verdict_of(what, simulated([0.9], 0.0, placement, bursts, trials)))
    return rows


def simulation(trials: int) -> str:
    """The table of simulated verdicts, with what it is of."""
    head = ["what is true", "forms kept", "networks accepted", "of these truly slower", "speed-up told beyond the true one"]
    return f"""\
{trials} networks a row are judged on a simulated machine: {LAYERS} layers, all with forms that take so many times as long as
dense, make {DECOMPOSED:.0%} of the network's time. A run of the network differs by 1 %, one of a layer by 3 %; twins that are
apart differ by 1 % more for where they lie in memory. A network counts as accepted where any form is kept.

{table([*head, "95 % intervals that hold it"], verdicts(trials))}

{datetime.date.today().isoformat()}; Python {platform.python_version()}, lamina {lamina.__version__}; no clock is looked at."""


def main() -> None:
    chosen = options(
        __doc__ or "",
        lambda parser: parser.add_argument("--simulated", action="store_true", help="the table of simulated verdicts alone"),
    )
    if chosen.simulated:
        body = simulation(SIMULATED)
        print(body)
        if chosen.publish:
            command = "python benchmarks/judging.py --simulated --publish --threads 1"
            publish("judging-simulated", "How often a verdict errs where the truth is known", command, body)
        return
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
