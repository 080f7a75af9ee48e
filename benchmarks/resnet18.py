"""ResNet-18, its 3×3 convolutions at ratio 2: lamina against dense and against tltorch at the same ranks.

    python benchmarks/resnet18.py --publish

Input 8×3×160×160, float32, channels last. Both libraries get the same ranks; each decomposes with its own routine.
"""

from __future__ import annotations

import copy
import time

import tltorch
import torch
from record import conditions, options, publish, table
from torch import nn
from torchvision.models import resnet18

import lamina

SHAPE = (8, 3, 160, 160)


def with_tltorch(model: nn.Module, plan: lamina.Plan) -> nn.Module:
    """The network with the plan's layers as tltorch's Tucker convolutions of the same ranks, kernel sides whole."""
    model = copy.deepcopy(model)
    for name, layer in plan.decomposed.items():
        parent, _, child = name.rpartition(".")
        conv = model.get_submodule(name)
        form = layer.form
        rank = (form.rank_out or conv.out_channels, form.rank_in or conv.in_channels, *conv.kernel_size)
        setattr(
            model.get_submodule(parent),
            child,
            tltorch.FactorizedConv.from_conv(
                conv, rank=rank, factorization="tucker", implementation="factorized", decompose_weights=True
            ),
        )
    return model.eval()


def main() -> None:
    chosen = options(__doc__)
    model = resnet18().eval().to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    three_by_three = ["layer?.?.conv?"]
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio(), include=three_by_three)
    measured = lamina.make_plan(model, x, lamina.Ratio(2.0), include=three_by_three)
    began = time.perf_counter()
    small = lamina.decompose(model, plan, check=False)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    theirs_network = with_tltorch(model, plan)
    theirs = time.perf_counter() - began
    by_clock = lamina.decompose(model, measured, check=False)
    theirs_by_clock = with_tltorch(model, measured)

    rows = []
    for label, before, after in (
        ("lamina, plain ranks, against dense", model, small),
        ("lamina, measured ranks, against dense", model, by_clock),
        ("tltorch, plain ranks, against dense", model, theirs_network),
        ("lamina against tltorch, plain ranks", theirs_network, small),
        ("lamina against tltorch, measured ranks", theirs_by_clock, by_clock),
    ):
        result = lamina.compare(before, after, x, seconds=chosen.seconds)
        low, high = result.interval
        rows.append([label, f"{result.before} → {result.after}", f"**{result.speedup:.2f}** ({low:.2f} to {high:.2f})"])
    body = "\n\n".join(
        [
            conditions(result.setting) + f" tltorch {tltorch.__version__}. Input {'×'.join(map(str, SHAPE))}.",
            table(["ResNet-18, 3×3 convolutions at ratio 2", "time", "×"], rows),
            f"Decomposing: lamina {ours:.2f} s, tltorch {theirs:.2f} s: ×{theirs / ours:.1f}.",
        ]
    )
    print(body)
    if chosen.publish:
        publish("resnet18", "ResNet-18 against tltorch", "python benchmarks/resnet18.py --publish", body)


if __name__ == "__main__":
    main()
