"""Scales: by how much a layer's moments misjudge what the answers lose; measured once for each layer.

The moments price a change as if positions of a map did not know each other, and to second order. So the divergence is measured
of the whole network with one layer cut to about a quarter of its weights, which is where a budget cuts most; and the price of
every other change is scaled alike. One evaluation a layer (the idea of LEMS, 2026, there for linear layers and their spectra).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..factorize.metric import Metric
from ..factorize.weighted import price_of_ranks, price_of_sides, weighted_low_rank, weighted_tucker
from ..network.copying import shadow
from ..network.running import set_mode
from ..network.walk import Layer
from ..values import Workload
from .calibration import Moments
from .outputs import Outputs

_SHARE = 0.25
ITEMS = 32
"""As many are run for each layer: on the demo's network the scales of 32 and of 512 images differ by a tenth."""


def measured_scales(
    network: nn.Module,
    layers: Mapping[str, Layer],
    moments: Mapping[str, Moments],
    outputs: Outputs,
    batches: Sequence[Workload],
    say: Callable[[int], None],
) -> dict[str, float]:
    """For each layer the divergence that is measured with the layer cut, as a multiple of the one that its moments tell.

    Args:
        network: It is only read.
        layers: The layers by name.
        moments: Theirs.
        outputs: How answers are read.
        batches: What the network is fed.
        say: Told how many layers are done.

    Returns:
        By layer; those are missing whose cut changes no answer, or all of them by moments alone.
    """
    scales: dict[str, float] = {}
    with torch.no_grad():
        before = _answers(network, batches)
        for done, (name, known) in enumerate(moments.items()):
            say(done)
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
