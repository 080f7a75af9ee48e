"""By how much two networks' answers differ, and the batches on which that is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calibration.outputs import tensors_in
from ..network.preserve import preserved
from ..network.running import run, set_mode
from ..values import Workload, input_of

_ITEMS = 32
"""Of a tensor that are a batch, about."""


def batches_of(data: Any, device: torch.device) -> Iterator[Workload]:
    """The batches of a ``data`` argument as they are, on a device; a tensor is divided evenly, so that no rest is tiny."""
    if isinstance(data, Tensor):
        data = torch.tensor_split(data, max(round(len(data) / _ITEMS), 1))
    for item in [data] if isinstance(data, Mapping | Workload) else data:
        workload = input_of(item)
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (workload.args, workload.kwargs))
        moved = Workload(args, workload.weight)
        moved.kwargs.update(kwargs)
        yield moved


def relative_change(model: nn.Module, small: nn.Module, batches: Iterable[Workload]) -> float | None:
    """By how much the second network's answers differ from the first's, ‖after − before‖ / ‖before‖ over all numbers in them.

    Both are run in eval mode without gradients, and left as they were.

    Returns:
        None where it cannot be told: no numbers, other shapes, or a change that is not finite.

    Raises:
        ExampleError: One of them does not run.
    """
    apart = size = 0.0
    with preserved(model, small), torch.no_grad():
        for network in (model, small):
            set_mode(network, False)
        for workload in batches:
            before, after = (list(tensors_in(run(network, workload))) for network in (model, small))
            if [each.shape for each in before] != [each.shape for each in after]:
                return None
            for old, new in zip(before, after, strict=True):
                if old.is_floating_point() or old.is_complex():
                    apart += float((new - old).abs().double().square().sum())
                    size += float(old.abs().double().square().sum())
    change = math.sqrt(apart / size) if size else math.nan
    return change if math.isfinite(change) else None
