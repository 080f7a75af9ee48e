"""Losses measured in the supernet: what its answers move by when one layer takes another form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.outputs import Gaussian, Outputs
from ..errors import SearchError
from ..network.preserve import preserved
from ..network.running import set_mode
from ..progress import display
from ..train.run import at_least_float32
from ..values import Workload, input_of
from .space import Configuration
from .supernet import Supernet

_BATCHES = 8
"""Batches that are looked at, at most, where nothing else is said."""


def measure_losses(
    net: Supernet,
    original: nn.Module,
    data: Iterable[Any],
    *,
    outputs: Outputs | None = None,
    batches: int = _BATCHES,
    progress: bool = False,
) -> None:
    """Measure what each form of each layer costs the answers, all other layers in the forms that lose least.

    `Supernet.within`, `Supernet.order` and `search` then go by nats of divergence from the original's own answers as the
    supernet is now, trained or not; needs no labels. As many networks are run as there are forms in all layers together.

        >>> lamina.measure_losses(net, model, images, outputs=lamina.Categorical())

    Args:
        net: The supernet; its ``losses`` change. One that was trained along an order keeps that order.
        original: The network that it was made from, whose answers count.
        data: Batches as `calibrate` takes them; what they hold beside inputs is not looked at.
        outputs: How answers are read: `Categorical()` for class scores, `Gaussian()` by default.
        batches: How many batches are looked at.
        progress: Show a progress bar.

    Raises:
        SearchError: There is no batch, or a divergence is not finite; the message names the layer.
        CalibrationError: The outputs cannot be read so.
    """
    outputs = outputs or Gaussian()
    seen = [input_of(batch) for batch in itertools.islice(data, batches)]
    if not seen:
        raise SearchError("the data hold no batch, so there is nothing to measure losses on")
    start = net.order[0]
    losses: dict[str, tuple[float, ...]] = {}
    with preserved(net), preserved(original), torch.no_grad(), display(progress) as shown:
        set_mode(net, False)
        set_mode(original, False)
        answers = [_answer(original, workload) for workload in seen]

        def lost(config: Configuration) -> float:
            net.set_active(config)
            pairs = zip(seen, answers, strict=True)
            each = [outputs.divergence(answer, _answer(net.network, workload)) for workload, answer in pairs]
            return float(torch.cat(each).mean())

        base = lost(start)
        for name, layer in shown.through(list(net.blueprint.layers.items()), "measuring losses"):
            found = [0.0 if form == start[name] else lost(start | {name: form}) - base for form in layer.forms]
            if not all(map(math.isfinite, [base, *found])):
                raise SearchError(f"{name or 'the network'}: the divergence of its answers is not finite")
            # By less than nothing no form is worse: that is chance, or what two layers gain together.
            losses[name] = tuple(max(value, 0.0) for value in found)
    layers = {n: layer.model_copy(update={"losses": losses[n]}) for n, layer in net.blueprint.layers.items()}
    net.blueprint = net.blueprint.model_copy(update={"layers": layers, "lost": "answers"})


def _answer(model: nn.Module, workload: Workload) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, at_least_float32, workload.run(model))
