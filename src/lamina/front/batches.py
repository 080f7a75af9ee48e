"""The batches of a ``data`` argument, as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibration.batches import with_tensors
from ..values import Workload, input_of

_ITEMS = 32
"""Of a tensor that are a batch, about."""


def batches_of(data: Any, device: torch.device) -> Iterator[Workload]:
    """The batches of a ``data`` argument as they are, on a device; a tensor is divided evenly, so that no rest is tiny."""
    if isinstance(data, Tensor):
        data = torch.tensor_split(data, max(round(len(data) / _ITEMS), 1))
    for item in [data] if isinstance(data, Mapping | Workload) else data:
        yield with_tensors(input_of(item), lambda tensor: tensor.to(device))
