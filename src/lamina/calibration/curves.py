"""Curves: what the answers truly lose, against what a layer's moments tell; and against what layers lose each alone.

The moments price a change to second order, as if positions of a map did not know each other, and each layer as if the others
were whole. All three tell too little, the more so the deeper the cut. So the divergence of the whole network is measured

    with one layer cut, to a quarter and to a sixteenth of its weights: points of that layer's curve, by what its moments tell
    with all layers cut at once, to a quarter, to a sixteenth, or some to the one and some to the other: points of one curve,
    what is lost beyond the sum of the layers' own, by what it would be if all their errors pointed one way (`coherence`)

Cuts are fitted as `decompose` fits factors, in the metric of patches where the memory holds it: those of channels lose twice as
much on the demo's network, and thirty times as much in a layer of 64 taps. A price goes along the layer's curve, what a plan
loses beyond the sum of its prices along the other: nothing where one layer is cut, and the smaller a share the smaller the
losses, which a curve of the sum would miss. A layer whose cut costs far more than that of others stays whole where they are cut
together: no budget would choose it, and it would be all of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import final

import torch
from torch import Tensor, nn

from ..curve import Curve, coherence
from ..factorize.metric import Metric
from ..factorize.weighted import price_of_ranks, price_of_sides, weighted_low_rank, weighted_tucker
from ..network.memory import devices_of
from ..network.walk import Layer
from ..progress import Display
from ..values import Workload
from . import ranks
from .calibration import Calibration, Moments, of
from .gram import home
from .outputs import Own
from .probes import Probes

SHARES = (1 / 4, 1 / 16)
"""Of a layer's weights, what its cuts leave: where a budget cuts much, and where it cuts most."""
_ITEMS, _ITEMS_TOGETHER = 16, 64
"""As many are run for a layer's cuts, and for those of many layers at once, which are few and count for all."""
_COPIES = 3
"""Of a moment of patches, in float64, held while factors are fitted in its metric."""
_ROWS = 4
"""Positions that are to be seen for each entry of an input: what is fitted to fewer is at home on them, and the loss that is
measured on them is none. A layer of which fewer were seen has no curve, and costs what its moments tell."""
_SWEEPS = 1
"""Of a fit in the metric of patches; ten leave 2 % less on the demo's layers."""
_DEAR = 8.0
"""A cut that costs so many times as much as the median layer's is made of no layer together with others."""


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """A layer at the ranks that lose least among those of about a share of its weights."""

    told: float
    """What its moments tell of the loss, in nats."""
    weight: Callable[[], Tensor]
    """Makes the weight, of factors."""


def with_curves(
    value: Calibration,
    network: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Workload],
    memory: float,
    shown: Display,
) -> Calibration:
    """A calibration with its curves, the geometric mean over all processes; where divergences can be told.

    Args:
        value: Without curves.
        network: The calibrated one; it is only read.
        layers: Its layers by name.
        batches: Some of what it was calibrated on.
        memory: Bytes that the moments and a metric of patches, in which factors are fitted, may take together.
        shown: Where it says how far it is.
    """
    outputs = value.outputs
    if outputs is None or isinstance(outputs, Own):
        return value
    known = {n: moments for n, moments in value.layers.items() if _can_be_cut(moments)}
    device = home(devices_of(network)[0])
    cuts: dict[str, tuple[Cut, ...]] = {}
    room = memory - value.bytes
    with ranks.together():
        probes = Probes(network, layers, outputs, batches, value.record.seed)
        left = room - max((_fit_bytes(each, room) for each in known.values()), default=0)
        measured, draw = [], probes.drawn(_ITEMS, known, left)
        for name, moments in shown.through(list(known.items()), "measuring what a layer's answers lose"):
            W = layers[name].weight.detach()
            cuts[name] = cuts_of(W, moments.metric(patches=_fit_bytes(moments, room) > 0))
            measured += [(cut.told, draw.lost({name: cut.weight()})) for cut in cuts[name]]
    points = _averaged(measured, device)
    alone = {name: [points.pop(0) for _ in cuts[name]] for name in known}
    curves = {name: Curve.of(each) for name, each in alone.items()}
    chosen = _together(cuts, alone)
    prices = [[curves[name].at(cut.told) for name, cut in each.items()] for each in chosen]
    with ranks.together():
        draw = probes.drawn(_ITEMS_TOGETHER)
        measured = [
            (math.fsum(nats), draw.lost({name: cut.weight() for name, cut in each.items()}))
            for nats, each in zip(prices, chosen, strict=True)
        ]
    beyond = [found - alone for alone, found in _averaged(measured, device)]
    together = Curve.of(zip(map(coherence, prices), beyond, strict=True))
    records = {
        name: each.model_copy(update={"curve": curves[name]}) if name in curves else each
        for name, each in value.record.layers.items()
    }
    tensors = {name: moments.tensors for name, moments in value.layers.items()}
    return of(value.record.model_copy(update={"layers": records, "together": together}), tensors, outputs)


def _can_be_cut(moments: Moments) -> bool:
    """Whether a layer has a curve. Of one in groups a cut would be one of each group, with a metric of its own."""
    return moments.record.gradients and moments.geometry.groups == 1 and _enough(moments, channels=True)


def _fit_bytes(moments: Moments, room: float) -> int:
    """What a fit by patches takes; 0 where it goes by channels, for want of that room, of positions seen or of taps."""
    record = moments.record
    n = record.directions * record.geometry.taps or record.n
    needed = 8 * _COPIES * n**2
    return needed if moments.geometry.taps > 1 and needed <= room and _enough(moments) else 0


def _enough(moments: Moments, channels: bool = False) -> bool:
    """Whether so many positions were seen that a fit to them loses nearly as much on others."""
    return moments.rows >= _ROWS * (moments.geometry.in_channels if channels else moments.record.n)


def cuts_of(W: Tensor, metric: Metric) -> tuple[Cut, ...]:
    """A weight cut to each of `SHARES`, or as near as its ranks allow.

    Args:
        W: ``(O, I, *kernel)``.
        metric: That of its moments: of patches where there is one, since factors will be fitted in it. What is told goes by its
            channels, as all prices do.
    """
    (O, I), K = W.shape[:2], W[0, 0].numel()
    if K == 1:
        prices = price_of_ranks(W.flatten(1), metric) / 2
        numbers = [max(int(share * O * I / (O + I)), 1) for share in SHARES]
        A, B = weighted_low_rank(W.flatten(1), max(numbers), metric)  # of which the first pairs are best for fewer
        return tuple(Cut(float(prices[r]), _of_pairs(A[:r].clone(), B[:, :r].clone(), W.shape)) for r in numbers)
    prices = price_of_sides(W, metric.of_channels())[1:, 1:] / 2
    t, s = torch.arange(1, O + 1.0)[:, None], torch.arange(1, I + 1.0)[None]
    found = []
    for share in SHARES:
        fits = I * s + K * s * t + t * O <= share * W.numel()
        fits[0, 0] = True
        best = int(torch.where(fits, prices, math.inf).argmin())
        found.append(Cut(float(prices.flatten()[best]), _of_sides(W, best % I + 1, best // I + 1, metric)))
    return tuple(found)


def _of_pairs(A: Tensor, B: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
    return lambda: (B @ A).reshape(shape)


def _of_sides(W: Tensor, rank_in: int, rank_out: int, metric: Metric) -> Callable[[], Tensor]:
    factors = weighted_tucker(W, rank_in, rank_out, metric, sweeps=_SWEEPS)
    reduce, core, expand = factors.reduce, factors.core, factors.expand
    assert reduce is not None
    assert expand is not None
    return lambda: torch.tensordot(expand, torch.tensordot(core, reduce, dims=([1], [0])).movedim(-1, 1), dims=1)


def _averaged(points: Sequence[tuple[float, float]], device: torch.device) -> list[tuple[float, float]]:
    """The geometric mean of each number over all processes; NaN where one of them has found nothing."""
    logs = [[math.log(each) if 0 < each < math.inf else math.nan for each in point] for point in points]
    tensor = torch.tensor(logs, dtype=torch.float64).reshape(-1, 2).to(device)
    ranks.added_up([tensor])
    return [(told, found) for told, found in (tensor / ranks.processes()).exp().tolist()]


def _together(cuts: Mapping[str, Sequence[Cut]], alone: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, Cut]]:
    """What is cut at once: all layers to the first share; those that lose least to the second one; all to the second."""
    affordable: list[dict[str, float]] = []
    for number in range(len(SHARES)):
        costs = {name: points[number][1] for name, points in alone.items() if points[number][1] > 0}
        most = _DEAR * median(costs.values()) if costs else 0.0
        affordable.append({name: nats for name, nats in costs.items() if nats <= most})
    shallow, deep = affordable
    between = {name: 0 for name in shallow}
    total, wanted = sum(shallow.values()), math.sqrt(sum(shallow.values()) * sum(deep.values()))
    for name in sorted(shallow.keys() & deep.keys(), key=lambda name: deep[name]):
        if total + deep[name] - shallow[name] <= wanted:
            total += deep[name] - shallow[name]
            between[name] = 1
    chosen = [dict.fromkeys(shallow, 0), between, dict.fromkeys(deep, 1)]
    return [{name: cuts[name][number] for name, number in each.items()} for each in chosen if len(each) > 1]
