"""What a layer takes at every rank: the staircase of time, as a picture.

    python benchmarks/staircase.py --publish

Two layers of usual sizes, alone, at ranks so close to each other that the steps can be seen: a linear layer by low rank, and a
3×3 convolution by both of its ranks at once and with its input side left whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from record import IMAGES, conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import whole_setting
from lamina.forms import Form
from lamina.measure.table import TimingTable

Made = tuple[nn.Module, Tensor, list[Form]]
LAYERS: dict[str, Callable[[], Made]] = {
    "Linear 768→768, 256 rows": lambda: (
        nn.Sequential(nn.Linear(768, 768)),
        torch.randn(256, 768),
        [lamina.LowRank(rank) for rank in range(32, 385, 4)],
    ),
    "Conv2d 128→128 3×3, 8 × 14×14": lambda: (
        nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)).to(memory_format=torch.channels_last),
        torch.randn(8, 128, 14, 14).to(memory_format=torch.channels_last),
        [
            *(lamina.BlockTerm(rank, rank) for rank in range(16, 113, 2)),
            *(lamina.BlockTerm(None, rank) for rank in range(8, 113, 2)),
        ],
    ),
}


def main() -> None:
    chosen = options(__doc__ or "")
    rows = []
    for number, (name, make) in enumerate(LAYERS.items(), 1):
        model, x, forms = make()
        with TimingTable(None) as timings:
            found = lamina.staircase(model.eval(), x, "0", forms=forms, timings=timings)
        for kind, each in found.kinds.items():
            pairs = [(big, small) for small, big in itertools.pairwise(each)]
            big, small = max(pairs, key=lambda pair: found.shares[pair[0]] - found.shares[pair[1]])
            flat = sum(found.shares[small] >= found.shares[big] * 0.995 for big, small in pairs) / len(pairs)
            step = f"{big} → {small}: {found.shares[big]:.0%} → {found.shares[small]:.0%}"
            rows.append([name, kind, f"{found.dense_s * 1e3:.3g} ms", step, f"{flat:.0%}"])
            print(rows[-1], flush=True)
        if chosen.publish:
            found.plot(IMAGES / f"staircase-{number}.png")
    head = ["layer", "forms", "dense", "the largest step down, of the dense layer's time", "steps down that save nothing"]
    setting = whole_setting(model, lamina.Workload(x), lamina.Inference())
    body = f"""{table(head, rows)}

![Time against weights of the linear layer](../images/staircase-1.png)
![Time against weights of the convolution](../images/staircase-2.png)

{conditions(setting)}"""
    print(body)
    if chosen.publish:
        publish("staircase", "The staircase of two layers", "python benchmarks/staircase.py --publish", body)


if __name__ == "__main__":
    main()
