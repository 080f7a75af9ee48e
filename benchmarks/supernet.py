"""What a supernet costs: its training step and its memory against plain networks, a configuration's price, a whole search.

    python benchmarks/supernet.py --publish

Steps are forward, cross-entropy, backward and a step of SGD with momentum, in float32; each configuration runs in the supernet
and as the plain network taken out of it, all in turn. Terms and images are random numbers: their values do not matter here.
Memory is in bytes held by tensors. (For the time of the fits see ``block_term.py``.)
"""

from __future__ import annotations

import dataclasses
import random
import sys
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
import torch.nn.functional as F
from memory import peak_over
from record import conditions, options, publish, table
from torch import Tensor, nn
from torchvision.models import resnet18

import lamina
from lamina.comparison import whole_setting
from lamina.factorize.series import METHODS, Series
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.supernet.space import Configuration
from lamina.values import Inference, Workload

sys.path.insert(0, str(Path(__file__).resolve().parent / "gross"))
from networks import four_layers

SCORED = 5_000


def random_series(W: Tensor, s: int | None, t: int | None, groups: Sequence[int]) -> Series:
    """Terms of the right shapes, without any fit."""
    (O, I, *kernel), count = W.shape, len(groups)
    width_in, width_out = s or I, t or O
    reduce = [torch.randn(width_in, I) / I**0.5 / count for _ in groups] if s else []
    expand = [torch.randn(O, width_out) / width_out**0.5 / count for _ in groups] if t else []
    core = [torch.randn(width_out, width_in // G, *kernel) / (width_in // G * 9) ** 0.5 for G in groups]
    return Series(tuple(groups), reduce, core, expand)


def resnet() -> tuple[lamina.Supernet, Tensor]:
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(memory_format=torch.channels_last).eval()
    x = torch.randn(64, 3, 64, 64).to(memory_format=torch.channels_last)
    return lamina.make_supernet(model, x, group_sizes=(1, 4, 16, 32)), x


def small() -> tuple[lamina.Supernet, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    return lamina.make_supernet(four_layers().eval(), x, group_sizes=(1, 2, 4, 8, 16, 32, 64)), x


NETWORKS: dict[str, Callable[[], tuple[lamina.Supernet, Tensor]]] = {
    "ResNet-18, 64 px, batch 64": resnet,
    "4-layer network, 32 px, batch 128": small,
}


def stepping(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-6, momentum=0.9)
    y = torch.zeros(len(x), dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def configurations(net: lamina.Supernet) -> dict[str, Configuration]:
    """The uniform configurations and two drawn ones."""
    rng = random.Random(0)
    uniform = {f"uniform, {place + 1} of {len(all_)}": c for all_ in [net.space.uniforms()] for place, c in enumerate(all_)}
    return uniform | {f"drawn {number}": net.sample(rng) for number in (1, 2)}


def steps(title: str, net: lamina.Supernet, x: Tensor, seconds: float) -> list[list[str]]:
    configs = configurations(net)
    step_of_net = stepping(net, x)

    def inside(config: Configuration) -> Callable[[], None]:
        def step() -> None:
            net.set_active(config)
            step_of_net()

        return step

    runs = [run for config in configs.values() for run in (inside(config), stepping(net.extract(config), x))]
    taken = interleave(runs, x.device, Effort(6 * seconds, 9, 60))
    rows, totals = [], ([0.0] * len(taken[0]), [0.0] * len(taken[0]))
    for number, name in enumerate(configs):
        pair = taken[2 * number : 2 * number + 2]
        for total, times in zip(totals, pair, strict=True):
            total[:] = [a + b for a, b in zip(total, times, strict=True)]
        rows.append(_step_row(f"{title}: {name}", *pair))
    return [*rows, _step_row(f"**{title}: all of these**", *totals)]


def _step_row(name: str, supernet: list[float], plain: list[float]) -> list[str]:
    low, high = ratio_interval(supernet, plain)
    return [
        name,
        f"{1e3 * median(supernet):.1f} ms",
        f"{1e3 * median(plain):.1f} ms",
        f"**{ratio(supernet, plain):.3f}** ({low:.3f} to {high:.3f})",
    ]


def memory(title: str, net: lamina.Supernet, x: Tensor) -> list[str]:
    """Of the configuration with the most terms: what is held, and the peak of a training forward over it."""
    config = net.space.uniforms()[-1]
    net.set_active(config)
    plain = net.extract(config)
    series = list(net.series)
    composed = size(p for name in series for p in plain.get_submodule(name).parameters())
    y = torch.zeros(len(x), dtype=torch.long)
    over = []
    for model in (net, plain):
        model.train()
        over.append(peak_over(lambda model=model: F.cross_entropy(model(x), y)))
    return [
        title,
        *(f"{size(model.parameters()) / 1e6:.1f} MB" for model in (net, plain)),
        *(f"{peak / 1e6:.1f} MB" for peak in over),
        f"{(over[0] - over[1]) / composed:.2f} × {composed / 1e6:.2f} MB",
    ]


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def price(net: lamina.Supernet, setting: lamina.Setting) -> float:
    """Seconds to price one configuration by a table with times."""
    time = [1e-3, 1e-5, 9]
    layers = {name: [time] * (1 + len(forms)) for name, forms in net.space.forms.items()}
    space = net.space.with_times({"setting": dataclasses.asdict(setting), "whole": [1e-1, 1e-3, 9], "layers": layers})
    config = space.sample(random.Random(0))
    return min(timeit.repeat(lambda: space.cost(config), number=1000, repeat=7)) / 1000


def scoring(net: lamina.Supernet) -> float:
    """Seconds of an exhaustive search of the 4-layer network's space."""
    x = torch.randn(SCORED, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (SCORED,))
    score = lamina.Scored(
        list(zip(x.split(500), y.split(500), strict=True)), lambda output, target: -F.cross_entropy(output, target)
    )
    began = perf_counter()
    found = lamina.search(net, score, strategy=lamina.Exhaustive(), limit=())
    assert len(found.scored) == net.space.size == 252
    return perf_counter() - began


def main() -> None:
    chosen = options(__doc__)
    rows, held, facts = [], [], []
    with patch.dict(METHODS, nested=random_series):
        nets = {title: make() for title, make in NETWORKS.items()}
    for title, (net, x) in nets.items():
        rows += steps(title, net, x, chosen.seconds)
        held.append(memory(title, net, x))
    (big, x), (little, _) = nets.values()
    setting = whole_setting(big, Workload(x), lamina.Training())
    seconds = price(big, whole_setting(big, Workload(x), Inference()))
    facts.append(
        [f"pricing a configuration of a space of {len(big.space)} layers by the table, times too", f"{1e6 * seconds:.1f} µs"]
    )
    facts.append(
        [
            f"scoring all {little.space.size} configurations of the 4-layer network on {SCORED:,} images",
            f"{scoring(little):.0f} s",
        ]
    )
    body = "\n\n".join(
        [
            conditions(setting),
            table(["training step", "in the supernet", "as a plain network", "ratio (95 %)"], rows),
            "Of the dearest uniform configuration, which sums up all terms:",
            table(
                [
                    "memory",
                    "parameters, supernet",
                    "parameters, plain",
                    "peak of a forward over them, supernet",
                    "peak, plain",
                    "difference, in composed copies of the series' layers",
                ],
                held,
            ),
            table(["", ""], facts),
        ]
    )
    print(body)
    if chosen.publish:
        publish("supernet", "What a supernet costs", "python benchmarks/supernet.py --publish", body)


if __name__ == "__main__":
    main()
