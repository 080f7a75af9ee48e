"""Query, key and value in one matrix: decomposed as one or as three; and whether a softmax behind it changes what counts.

    pip install --no-deps -r benchmarks/published/requirements.txt
    python benchmarks/fused.py --publish

The published language model of ``benchmarks/published/antibodies.py``, whose queries, keys and values are layers of their own.
Its twin computes the three of a block by one matrix, as many transformers do. Both are calibrated on the same sequences. Each
block is cut to equal numbers of weights: the one matrix at a rank r, the three at ranks that add up to 2 r, each step given to
the one that gains most by it. What the answers lose is measured on other sequences, in nats a position. Times are of one matrix
of 512 → 1,536, and of three behind one first factor, for a batch and for a single sequence.

In the second table the factors of queries and keys, which a softmax reads, are fitted by inputs and gradients or by the first
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import whole_setting
from lamina.factorize.metric import Metric
from lamina.factorize.weighted import price_of_ranks, weighted_low_rank
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval

sys.path.insert(0, str(Path(__file__).resolve().parent / "published"))
import antibodies

PARTS = ("query", "key", "value")
RANKS = (64, 128, 192)
WAYS = ("inputs and gradients", "queries and keys by inputs alone", "all three by inputs alone")


class Fused(nn.Module):
    """Three linear layers as one, whose outputs are handed out part by part."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        first = parts[0]
        self.whole = nn.Linear(first.in_features, 3 * first.out_features)
        self.whole.weight.data = torch.cat([part.weight for part in parts]).detach()
        self.whole.bias.data = torch.cat([part.bias for part in parts]).detach()
        self.x: Tensor | None = None
        self.answer: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, part: int) -> Tensor:
        if self.x is not x:
            self.x, self.answer = x, self.whole(x).chunk(3, -1)
        return self.answer[part]


class Part(nn.Module):
    def __init__(self, fused: Fused, part: int) -> None:
        super().__init__()
        self.fused, self.part = fused, part

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.part)


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if all(hasattr(module, part) for part in PARTS)]


def cut_as_one(model: nn.Module, found: lamina.Calibration, rank: int) -> list[tuple[nn.Linear, Tensor]]:
    names = {id(module): name for name, module in model.named_modules()}
    cuts = []
    for attention in attentions(model):
        whole = attention.query.fused.whole
        A, B = weighted_low_rank(whole.weight.detach(), rank, found.layers[names[id(whole)]].metric())
        cuts.append((whole, (B @ A).to(whole.weight.dtype)))
    return cuts


def cut_as_three(
    model: nn.Module, found: lamina.Calibration, rank: int, alone: tuple[str, ...] = ()
) -> list[tuple[nn.Linear, Tensor]]:
    """Ranks that add up to twice as much, each step of one given where it gains most by inputs and gradients."""
    names = {id(module): name for name, module in model.named_modules()}
    cuts = []
    for attention in attentions(model):
        layers = [getattr(attention, part) for part in PARTS]
        moments = [found.layers[names[id(layer)]] for layer in layers]
        gains = torch.stack(
            [-price_of_ranks(layer.weight.detach(), each.metric()).diff() for layer, each in zip(layers, moments, strict=True)]
        )
        taken = gains.flatten().topk(2 * rank).indices // gains.shape[1]  # gains of a layer only fall
        for number, (part, layer, each) in enumerate(zip(PARTS, layers, moments, strict=True)):
            metric = Metric.of(each.channels(), damping=each.damping) if part in alone else each.metric()
            A, B = weighted_low_rank(layer.weight.detach(), max(int((taken == number).sum()), 1), metric)
            cuts.append((layer, (B @ A).to(layer.weight.dtype)))
    return cuts


@torch.inference_mode()
def lost(model: nn.Module, cuts: list[tuple[nn.Linear, Tensor]], tests: list[Any]) -> tuple[float, float]:
    """Nats a position by which the answers move, and half of the interval of 95 % over batches."""

    def answers() -> list[Tensor]:
        return [F.log_softmax(model(ids, mask)[mask.bool()], -1) for ids, mask, _ in tests]

    before = answers()
    kept = [layer.weight.detach() for layer, _ in cuts]
    for layer, weight in cuts:
        layer.weight.data = weight
    after = answers()
    for (layer, _), weight in zip(cuts, kept, strict=True):
        layer.weight.data = weight
    nats = torch.stack([F.kl_div(b, a, log_target=True, reduction="batchmean") for b, a in zip(after, before, strict=True)])
    return float(nats.mean()), float(1.96 * nats.std() / len(nats) ** 0.5)


def shown(told: tuple[float, float]) -> str:
    return f"{told[0]:.4f} ± {told[1]:.4f}"


def three_behind_one(rank: int, width: int) -> Callable[[Tensor], Tensor]:
    size = 2 * rank // 3
    first, rest = nn.Linear(width, 3 * size, bias=False), nn.ModuleList(nn.Linear(size, width) for _ in PARTS)
    return lambda x: torch.cat([each(y) for each, y in zip(rest, first(x).chunk(3, -1), strict=True)], -1)


def times(shape: tuple[int, ...], rank: int, seconds: float) -> str:
    """The time of one matrix at a rank by that of three at ranks that add up to twice as much."""
    width, x = shape[-1], torch.randn(*shape)
    one = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, 3 * width))
    three = three_behind_one(rank, width)
    with torch.inference_mode():
        together, apart = interleave([lambda: one(x), lambda: three(x)], x.device, Effort(seconds, 7, 200))
    low, high = ratio_interval(apart, together)
    return f"×{ratio(apart, together):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    chosen = options(__doc__ or "")
    model, vocabulary = antibodies.published()
    twin, _ = antibodies.published()
    for attention in attentions(twin):
        fused = Fused([getattr(attention, part) for part in PARTS])
        for number, part in enumerate(PARTS):
            setattr(attention, part, Part(fused, number))
    tests = antibodies.batches(antibodies.sequences("human", 1)[:128], vocabulary)
    heard = antibodies.batches(antibodies.sequences("balbc", 0), vocabulary)
    data = [{"ids": ids, "mask": mask} for ids, mask, _ in heard]
    with torch.inference_mode():
        assert torch.allclose(model(*tests[0][:2]), twin(*tests[0][:2]), atol=1e-4)
    apart, together = (
        lamina.calibrate(each, data, outputs=lamina.Categorical(-1), mask="mask", include=include, tolerance=None)
        for each, include in ((model, [f"*.{part}" for part in PARTS]), (twin, ["*.whole"]))
    )
    rows, fits = [], []
    for rank in RANKS:
        one, three = lost(twin, cut_as_one(twin, together, rank), tests), lost(model, cut_as_three(model, apart, rank), tests)
        shapes = ((antibodies.BATCH, 120, 512), (1, 120, 512))
        rows.append([str(rank), shown(one), shown(three), *(times(shape, rank, chosen.seconds) for shape in shapes)])
        alone = [lost(model, cut_as_three(model, apart, rank, each), tests) for each in ((), PARTS[:2], PARTS)]
        fits.append([f"{2 * rank} of {3 * 512}", *map(shown, alone)])
        print(*rows[-1], *fits[-1], sep=" | ", flush=True)
    x, mask = tests[0][:2]
    body = f"""\
{table(["rank of the one matrix", "nats lost, as one", "as three", "time as three / as one, 16×120", "1×120"], rows)}

{table(["ranks of the three together, a block", *WAYS], fits)}

Nats a position, with 95 % intervals over {len(tests)} batches of {antibodies.BATCH} sequences.

{conditions(whole_setting(model, lamina.Workload((x, mask)), lamina.Inference()))}"""
    print(body)
    if chosen.publish:
        publish("fused", "Query, key and value: one matrix or three", "python benchmarks/fused.py", body)


if __name__ == "__main__":
    main()
