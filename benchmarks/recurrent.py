"""Does it pay to decompose the input matrices of recurrent layers?

    python benchmarks/recurrent.py --publish

The input matrix of a layer, n H × I with n = 4 for an LSTM and 3 for a GRU, is B A of rank r: a linear layer I→r before a layer
of input size r computes the same, exact at full rank. Both directions of a layer read the same input and share A; layers that
stand on each other are run apart. The recurrent matrix, n H × H, is multiplied inside PyTorch's own loop over the sequence:
two factors of it would need a loop in Python, so it stays whole. Fresh weights, I = H, sequences of 100; dense, at ratios 2 and
4 of the input matrices, and, as the bound of all ranks, with an input of one feature; interleaved. Rows are kept in
``benchmarks/runs/recurrent.jsonl``, and it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import ready, whole_setting
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.runtimes.runtime import Runtime
from lamina.values import Inference, Workload

KEPT = Path(__file__).parent / "runs" / "recurrent.jsonl"
STEPS, RATIOS, FULL = 100, (2.0, 4.0), 2**31
KINDS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"LSTM": nn.LSTM, "GRU": nn.GRU}


class Narrowed(nn.Module):
    """Recurrent layers one after the other, each behind the linear layer that its input matrices share."""

    def __init__(self, firsts: list[nn.Linear], layers: list[nn.Module]) -> None:
        super().__init__()
        self.firsts, self.layers = nn.ModuleList(firsts), nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for first, layer in zip(self.firsts, self.layers, strict=True):
            x = layer(first(x))[0]
        return x


def narrowed(dense: nn.LSTM | nn.GRU, rank: float | int) -> nn.Module:
    """Its input matrices at a rank, or at a share of their weights; by a truncated SVD, exact at full rank."""
    firsts, layers = [], []
    sides = ("", "_reverse") if dense.bidirectional else ("",)
    for at in range(dense.num_layers):
        W = torch.cat([getattr(dense, f"weight_ih_l{at}{side}") for side in sides]).detach()
        rows, I = W.shape
        r = rank if isinstance(rank, int) else max(int(rows * I * rank / (rows + I)), 1)
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        r = min(r, len(S))
        first = nn.Linear(I, r, bias=False)
        layer = type(dense)(r, dense.hidden_size, batch_first=True, bidirectional=dense.bidirectional)
        with torch.no_grad():
            first.weight.copy_(S[:r, None].sqrt() * V[:r])
            for side, part in zip(sides, (U[:, :r] * S[:r].sqrt()).chunk(len(sides)), strict=True):
                getattr(layer, f"weight_ih_l0{side}").copy_(part)
                for name in ("weight_hh", "bias_ih", "bias_hh"):
                    getattr(layer, f"{name}_l0{side}").copy_(getattr(dense, f"{name}_l{at}{side}"))
        firsts.append(first)
        layers.append(layer)
    return Narrowed(firsts, layers)


def row(kind: str, H: int, layers: int, both: bool, batch: int, runtime: Runtime, seconds: float) -> list[str]:
    """The time of one layer, dense, and what each of the others gains."""
    dense = KINDS[kind](H, H, layers, batch_first=True, bidirectional=both)
    x = torch.randn(batch, STEPS, H)
    kinds: list[nn.Module] = [dense, *(narrowed(dense, 1 / each) for each in RATIOS), narrowed(dense, 1)]
    with ready(kinds, Inference()):
        runs = [runtime.prepare(each, Workload(x)).run for each in kinds]
        own, *others = interleave(runs, x.device, Effort(seconds, 7, 60, precision=0.005))

    def gain(other: list[float]) -> str:
        low, high = ratio_interval(own, other)
        return f"×{ratio(own, other):.2f} ({low:.2f} to {high:.2f})"

    return [f"{1000 * sorted(own)[len(own) // 2]:.3g} ms", *map(gain, others)]


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
        parser.add_argument("--runtime", nargs="+", default=["eager"], choices=["eager", "onnxruntime", "openvino"])

    chosen = options(__doc__ or "", more)
    dense, x = nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True).eval(), torch.randn(3, 5, 12)
    torch.testing.assert_close(narrowed(dense, FULL)(x), dense(x)[0])
    every = {"eager": lamina.Eager(), "onnxruntime": lamina.OnnxRuntime(), "openvino": lamina.OpenVINO()}
    kept = {tuple(row[:3]): row for row in map(json.loads, KEPT.read_text().splitlines() if KEPT.exists() else ())}
    sizes = [(H, layers, both) for H in chosen.sizes for layers, both in ((1, False), (2, False), (1, True), (2, True))]
    for runtime in (every[label] for label in chosen.runtime):
        for kind, (H, layers, both), batch in itertools.product(KINDS, sizes, (1, 8)):
            title = f"{kind} {H}→{H}" + (f", {layers} layers" if layers > 1 else "") + (", both ways" if both else "")
            name = title, str(batch), str(runtime)
            if name not in kept:
                kept[name] = [*name, *row(kind, H, layers, both, batch, runtime, chosen.seconds / 8)]
                KEPT.parent.mkdir(exist_ok=True)
                with KEPT.open("a") as file:
                    file.write(json.dumps(kept[name]) + "\n")
                print(" | ".join(kept[name]), flush=True)
    rows = list(kept.values())
    head = ["layer", "batch", "run in", "dense", *(f"ratio {each:g} of the input matrices" for each in RATIOS), "an input of 1"]
    body = f"{table(head, rows)}\n\n{conditions(whole_setting(dense, Workload(x), Inference()))}"
    print(body)
    if chosen.publish:
        publish("recurrent", "Input matrices of recurrent layers", "python benchmarks/recurrent.py --publish", body)


if __name__ == "__main__":
    main()
