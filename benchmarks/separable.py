"""Separable kernels against block terms: which takes less time at the same loss, on the demo's trained layers.

    python benchmarks/separable.py --seconds 12 --threads 1 --publish

Each kind of 3×3 convolution of the demo's network, in both layouts and at two batch sizes: separable forms of about ten ranks,
and every block term on a budget's fronts of size and loss, timed beside the dense layer, interleaved. To each separable form
the fastest block term is held that loses no more of the weight (in groups, of what a fit is foretold to lose).
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import torch
from record import conditions, options, publish, table
from safetensors.torch import load_file
from torch import nn

from lamina import Dense, Inference, Separable, Setting, Workload
from lamina.choose.menu import worth_measuring
from lamina.comparison import whole_setting
from lamina.forms import Form, candidates
from lamina.layers.build import losses
from lamina.measure.clock import Effort
from lamina.measure.layer_times import measure_forms
from lamina.network.walk import walk
from lamina.values import Use

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
WEIGHTS = DEMO / "weights" / "base.safetensors"
sys.path.insert(0, str(DEMO))
from network import fashion_net  # noqa: E402

LAYERS = {"stage1.0.conv1": 14, "stage1.0.conv2": 14, "stage2.0.conv1": 14, "stage2.1.conv1": 7}
"""A layer of each kind → the side of its input's map."""
RANKS = 10
MODERATE = 0.3
"""The share of its squared norm that a layer may lose and still be used."""


def compared(conv: nn.Conv2d, side: int, batch: int, channels_last: bool, seconds: float, setting: Setting) -> list[str]:
    """How often a separable form is faster than the dense layer, and than every block term that loses no more."""
    conv = conv.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    layer = walk(conv).layers[""]
    geometry, out = layer.geometry, side // conv.stride[0]
    use = Use((batch, conv.in_channels, side, side), (batch, conv.out_channels, out, out))
    offered = [form for form in candidates(geometry) if form != Dense()]
    ranks = range(8, Separable(1).at_full_rank(geometry).rank, 8)
    smaller = [form for form in map(Separable, ranks) if form.parameters(geometry) < geometry.parameters]
    separable: list[Form] = list(smaller[:: max(1, len(smaller) // RANKS)])
    lost = losses(layer, [*offered, *separable])
    block_terms = worth_measuring({form: form.macs(geometry, use) for form in offered}, lost, len(offered))
    forms = [Dense(), *block_terms, *separable]
    times = measure_forms(layer, forms, use, channels_last, Inference(), setting, Effort(seconds, 8, 400))
    taken = {form: times[form].median_s / times[Dense()].median_s for form in forms}
    best = {
        form: min(taken[other] for other in [Dense(), *block_terms] if other == Dense() or lost[other] <= lost[form])
        for form in separable
    }
    wins = [form for form in separable if taken[form] < best[form]]
    moderate = [form for form in separable if lost[form] <= MODERATE]
    return [
        str(geometry),
        str(batch),
        "channels last" if channels_last else "contiguous",
        f"{times[Dense()].median_ms:.3g} ms",
        f"{sum(taken[form] < 1 for form in separable)} of {len(separable)}",
        f"{len(wins)} of {len(separable)}",
        f"{len(set(wins) & set(moderate))} of {len(moderate)}",
        f"{median(taken[form] / best[form] for form in moderate):.2f}",
    ]


def main() -> None:
    chosen = options(__doc__)
    network = fashion_net()
    network.load_state_dict(load_file(WEIGHTS))
    network.eval()
    setting = whole_setting(network, Workload(torch.randn(1, 1, 28, 28)), Inference())
    rows = []
    for name, side in LAYERS.items():
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        for batch in (8, 32):
            for channels_last in (False, True):
                rows.append(compared(conv, side, batch, channels_last, chosen.seconds, setting))
                print(" | ".join(rows[-1]), flush=True)
    head = ["layer", "batch", "layout", "dense", "faster than dense", "than every block term that loses no more"]
    head += [f"of those that lose {MODERATE} at most", "their time over the block term's, median"]
    body = "\n\n".join([conditions(setting), table(head, rows)])
    print(body)
    if chosen.publish:
        command = "python benchmarks/separable.py --seconds 12 --threads 1 --publish"
        publish("separable", "Separable kernels against block terms", command, body)


if __name__ == "__main__":
    main()
