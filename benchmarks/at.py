"""How long a supernet takes to answer a budget: the solver alone, the nested order, and ``net.at`` with the network taken out.

    python benchmarks/at.py --publish

A space of fifty layers with a hundred forms each, drawn; and a supernet of the demo's network in the forms that pay here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from record import conditions, options, publish, table

import lamina
from lamina.choose.budget import GAP
from lamina.forms import BlockTerm, Form
from lamina.goals import Milliseconds
from lamina.supernet.order import nested_order
from lamina.supernet.space import Choice, Space
from lamina.values import Cost, Geometry, Setting, Timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
LAYERS, FORMS, BUDGETS = 50, 100, 20


def drawn() -> tuple[Space, dict[str, dict[Form, float]]]:
    """A space whose times rise with the sizes on the whole, and losses that fall with them."""
    rng, setting = np.random.default_rng(0), Setting("cpu", "drawn", "float32", "contiguous", 1, "inference")
    geometry = Geometry("Conv2d", 128, 128, True, (3, 3), (1, 1), (1, 1), (1, 1))
    forms = tuple(BlockTerm(rank, rank) for rank in range(1, FORMS + 1))
    choices, losses = {}, {}
    for layer in range(LAYERS):
        seconds = np.sort(rng.uniform(0.2, 1.0, FORMS)) * rng.lognormal(0, 0.1, FORMS) * 1e-3
        costs = tuple(Cost(rank, 1000 * rank, Timing(float(s), 0.0, 9, setting)) for rank, s in enumerate(seconds, 1))
        choices[f"l{layer}"] = Choice(geometry, forms, costs, costs[-1])
        lost = np.sort(rng.exponential(rng.lognormal(0, 0.7), FORMS))[::-1]
        losses[f"l{layer}"] = dict(zip(forms, map(float, lost), strict=True))
    whole = Cost(1, 10**8, Timing(0.06, 0.0, 9, setting))
    return Space(choices, whole, setting), losses


def taken(work: Callable[[], Any]) -> str:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return f"{1e3 * median(times):.0f} ms"


def main() -> None:
    from demo import base_network

    chosen = options(__doc__ or "")
    space, losses = drawn()
    low, high = (Milliseconds(1).of(space.cost(space.uniform(i))) for i in (0, FORMS))
    limits = [Milliseconds(low + share * (high - low)) for share in np.linspace(0.1, 0.9, BUDGETS)]
    times = []
    for limit in limits:
        began = time.perf_counter()
        assert space.solved(losses, [limit], gap=GAP) is not None
        times.append(1e3 * (time.perf_counter() - began))
    model, x = base_network(), torch.randn(32, 1, 28, 28)
    net = lamina.make_supernet(model, x)
    fast, slow = (Milliseconds(1).of(net.space.cost(each)) for each in (net.order[-1], net.order[0]))
    middle = Milliseconds((fast + slow) / 2)
    rows = [
        [
            f"the solver, {LAYERS} layers × {FORMS} forms, {BUDGETS} budgets: median; longest",
            f"{median(times):.0f} ms; {max(times):.0f} ms",
        ],
        ["the whole nested order", taken(lambda: nested_order(space, losses, Milliseconds(1)))],
        ["net.at, the demo's network, taken out", taken(lambda: net.at(middle))],
    ]
    body = f"{table(['', 'takes'], rows)}\n\n{conditions(lamina.compare(model, model, x, seconds=0.1).setting)}"
    print(body)
    if chosen.publish:
        publish("supernet-at", "What it takes to answer a budget", "python benchmarks/at.py --publish", body)


if __name__ == "__main__":
    main()
