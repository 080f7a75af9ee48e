"""Are decomposed layers faster with one factor of the form [I T]?

    python benchmarks/pivoted.py --publish

Between the factors of a rank r lies a free r × r matrix. Chosen so that r rows of a factor become the identity, these rows
cost nothing (PIFA, arXiv 2501.19090): y₁ = A' x, y₂ = T y₁, and y is y₁ above y₂, with r² weights fewer; of a Tucker-2 both
outer factors, s² + t² fewer. Networks with fresh weights, all layers between the first and the last at ratio 2 by plain ranks,
against the same ranks pivoted, and against the dense network: whole networks, interleaved, in each runtime. Pivots are the
first rows and columns here, as they would be where the permutation is folded into the neighbours; ``gather`` brings them into
their order behind each layer, as it must be where it cannot be folded.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from record import conditions, options, publish, table
from runtimes import resnet50_made, vit_made
from torch import Tensor, nn

import lamina
from lamina.comparison import ready
from lamina.layers.decomposed import BlockTermLayer, LowRankLayer
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.network.copying import shadow
from lamina.runtimes.runtime import Runtime
from lamina.values import Inference, Workload


class Rest(nn.Module):
    """``y`` from its pivots: themselves, and what ``T`` makes of them."""

    def __init__(self, factor: Any, gather: bool) -> None:
        super().__init__()
        self.linear = isinstance(factor, nn.Linear)
        O, r = factor.weight.shape[:2]
        bias = factor.bias is not None
        self.rest = nn.Linear(r, O - r, bias) if self.linear else type(factor)(r, O - r, 1, bias=bias)
        self.order = nn.Buffer(torch.randperm(O)) if gather else None

    def forward(self, pivots: Tensor) -> Tensor:
        side = -1 if self.linear else 1
        y = torch.cat([pivots, self.rest(pivots)], side)
        return y if self.order is None else y.index_select(side, self.order)


class Sum(nn.Module):
    """What reads pivots as they are, and the rest by ``T``."""

    def __init__(self, factor: Any, gather: bool) -> None:
        super().__init__()
        s, I = factor.weight.shape[:2]
        self.s = s
        self.rest = type(factor)(I - s, s, 1, bias=False)
        self.order = nn.Buffer(torch.randperm(I)) if gather else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x.index_select(1, self.order)
        return x[:, : self.s] + self.rest(x[:, self.s :])


def pivoted(model: nn.Module, gather: bool) -> nn.Module:
    """A network of the same structure and MACs as the pivoted one would have; weights are fresh."""
    exchanged: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            first, second = layer.factors()
            r, O = second.weight.shape[1], second.weight.shape[0]
            if r < O:
                exchanged[layer] = nn.Sequential(first, Rest(second, gather))
        elif isinstance(layer, BlockTermLayer) and layer.reduce is not None and layer.expand is not None:
            s, I = layer.reduce.weight.shape[:2]
            t, O = layer.expand.weight.shape[1], layer.expand.weight.shape[0]
            if s < I and t < O:
                exchanged[layer] = nn.Sequential(Sum(layer.reduce, gather), layer.core, Rest(layer.expand, gather))
    return shadow(model, exchanged).eval()


def row(name: str, model: nn.Module, small: nn.Module, x: Tensor, runtime: Runtime, seconds: float) -> list[str]:
    kinds = [model, small, pivoted(small, gather=False), pivoted(small, gather=True)]
    with ready(kinds, Inference()):
        runs = [runtime.prepare(each, Workload(x)).run for each in kinds]
        dense, plain, contiguous, gathered = interleave(runs, x.device, Effort(3 * seconds, 7, 60, precision=0))

    def told(a: list[float], b: list[float]) -> str:
        low, high = ratio_interval(a, b)
        return f"×{ratio(a, b):.2f} ({low:.2f} to {high:.2f})"

    return [name, str(runtime), told(dense, plain), told(dense, contiguous), told(plain, contiguous), told(plain, gathered)]


def main() -> None:
    chosen: argparse.Namespace = options(__doc__)
    rows, counted = [], []
    for name, make in (("ResNet-50, 8×3×160×160", resnet50_made), ("ViT-B/16, 4×3×224×224", vit_made)):
        torch.manual_seed(0)
        model, x = make()
        names = list(lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio()).layers)
        plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio(), skip=[names[0], names[-1]])
        small = lamina.decompose(model, plan, check=False).eval()
        macs = [lamina.count(each, x).macs for each in (model, small, pivoted(small, gather=False))]
        counted.append(f"{name}: MACs ÷{macs[0] / macs[1]:.2f} by plain ranks, ÷{macs[0] / macs[2]:.2f} pivoted.")
        for runtime in (lamina.Eager(), lamina.OnnxRuntime(), lamina.OpenVINO()):
            rows.append(row(name, model, small, x, runtime, chosen.seconds))
            print(rows[-1], flush=True)
    head = ["network", "run in", "plain ranks over dense", "pivoted over dense", "pivoted over plain", "the same with gather"]
    setting = lamina.compare(nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(1, 4), seconds=0.1).setting
    body = f"{table(head, rows)}\n\n{' '.join(counted)}\n\n{conditions(setting)}"
    print(body)
    if chosen.publish:
        publish("pivoted", "Factors of the form [I T]", "python benchmarks/pivoted.py --publish", body)


if __name__ == "__main__":
    main()
