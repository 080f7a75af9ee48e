"""Scales: by how much a layer's moments misjudge what the answers lose; measured once for each layer.

The moments price a change as if positions of a map did not know each other, and to second order. So the divergence is measured
of the whole network with one layer cut to about a quarter of its weights, which is where a budget cuts most; and the price of
every other change is scaled alike. One evaluation a layer (the idea of LEMS, 2026, there for linear layers and their spectra).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..factorize.metric import Metric
from ..factorize.weighted import price_of_ranks, price_of_sides, weighted_low_rank, weighted_tucker
from ..network.copying import shadow
from ..network.memory import devices_of
from ..network.running import set_mode
from ..network.walk import Layer
from ..progress import Display
from ..values import Workload
from . import ranks
from .calibration import Calibration, Moments, of
from .gram import home
from .outputs import Outputs, Own

_SHARE = 0.25
ITEMS = 32
"""As many are run for each layer: on the demo's network the scales of 32 and of 512 images differ by a tenth."""


def with_scales(
    value: Calibration, network: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Workload], shown: Display
) -> Calibration:
    """A calibration with the scales of its layers, the mean over all processes; where divergences can be told.

    Args:
        value: Without scales.
        network: The calibrated one; it is only read.
        layers: Its layers by name.
        batches: Some of what it was calibrated on.
        shown: Where it says how far it is.
    """
    outputs = value.outputs
    if outputs is None or isinstance(outputs, Own):
        return value
    known = {name: moments for name, moments in value.layers.items() if moments.record.gradients}
    with ranks.together():
        scales = measured_scales(network, layers, known, outputs, batches, shown)
    logs = torch.tensor([math.log(scales.get(name, math.nan)) for name in known], dtype=torch.float64)
    logs = logs.to(home(devices_of(network)[0]))
    ranks.added_up([logs])
    told = dict(zip(known, (logs / ranks.processes()).exp().tolist(), strict=True))
    records = {
        name: each.model_copy(update={"scale": scale}) if math.isfinite(scale := told.get(name, math.nan)) else each
        for name, each in value.record.layers.items()
    }
    tensors = {name: moments.tensors for name, moments in value.layers.items()}
    return of(value.record.model_copy(update={"layers": records}), tensors, outputs)


def measured_scales(
    network: nn.Module,
    layers: Mapping[str, Layer],
    moments: Mapping[str, Moments],
    outputs: Outputs,
    batches: Sequence[Workload],
    shown: Display,
) -> dict[str, float]:
    """For each layer the divergence that is measured with the layer cut, as a multiple of the one that its moments tell.

    Args:
        network: It is only read.
        layers: The layers by name.
        moments: Theirs.
        outputs: How answers are read.
        batches: What the network is fed.
        shown: Where it says how far it is.

    Returns:
        By layer; those are missing whose cut changes no answer, or all of them by moments alone.
    """
    scales: dict[str, float] = {}
    with torch.no_grad():
        before = _answers(network, batches)
        for done, (name, known) in enumerate(moments.items()):
            shown.say("measuring what a layer's answers lose", done, len(moments))
            layer = layers[name]
            W = layer.weight.detach()
            cut, price = _cut(W, known.metric(patches=False))
            module = layer.reader.dense(layer.geometry, cut.to(W.device, W.dtype), layer.bias)
            after = _answers(network, batches, {layer.module: module})
            found = torch.cat([outputs.divergence(a, b).double().cpu() for a, b in zip(before, after, strict=True)])
            scale = float(found.mean()) / price if price > 0 else math.nan
            if 0 < scale < math.inf:
                scales[name] = scale
    return scales


def _answers(network: nn.Module, batches: Sequence[Workload], exchanged: dict[nn.Module, nn.Module] | None = None) -> list[Any]:
    twin = shadow(network, exchanged)
    set_mode(twin, False)
    return [batch.run(twin) for batch in batches]


def _cut(W: Tensor, metric: Metric) -> tuple[Tensor, float]:
    """A weight at the ranks that lose least among those of about a quarter of its numbers, and what that costs in nats."""
    (O, I), K = W.shape[:2], W[0, 0].numel()
    most = _SHARE * W.numel()
    if K == 1:
        rank = max(int(most / (O + I)), 1)
        A, B = weighted_low_rank(W.flatten(1), rank, metric)
        return (B @ A).reshape(W.shape), float(price_of_ranks(W.flatten(1), metric)[rank]) / 2
    prices = price_of_sides(W, metric)[1:, 1:]
    t, s = torch.arange(1, O + 1.0)[:, None], torch.arange(1, I + 1.0)[None]
    fits = I * s + K * s * t + t * O <= most
    fits[0, 0] = True
    best = int(torch.where(fits, prices, math.inf).argmin())
    factors = weighted_tucker(W, best % I + 1, best // I + 1, metric)
    assert factors.reduce is not None
    assert factors.expand is not None
    cut = torch.tensordot(factors.expand, torch.tensordot(factors.core, factors.reduce, dims=([1], [0])).movedim(-1, 1), dims=1)
    return cut, float(prices.flatten()[best]) / 2
