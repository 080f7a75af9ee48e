"""A network as the program of operations that `torch.export` reads off it: one way for all who need one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..values import Workload


def program_of(model: nn.Module, workload: Workload, *, dynamic_batch: bool = False, most: int | None = None) -> Any:
    """What `torch.export` makes of a network in eval mode; it is only read, and so is the example.

    What the exporter raises, or the network in it, comes through.

    Args:
        model: The network.
        workload: What it is fed.
        dynamic_batch: The first side of every tensor may be another one later.
        most: How long that side may be at most, where memory is planned for it; by default as long as it likes.
    """
    # The exporter marks tensors, and leaves its marks where it fails: a second export would fail by those of the first.
    args, kwargs = tree_map(
        lambda value: value.detach() if isinstance(value, Tensor) else value, (workload.args, workload.kwargs)
    )
    workload, shapes = Workload(args or kwargs), None
    if dynamic_batch:
        shapes = _first_side(workload, most)
        if most is not None and any(tensor.shape[0] == 1 for tensor in workload.tensors if tensor.ndim):
            workload = one_more(workload)  # a side of one is read as a constant
    # Read obliviously, a side stands for any number, one included. A bound is lost on the way, and memory planned too small.
    config: Any = torch.fx.experimental._config
    oblivious = config.patch(backed_size_oblivious=dynamic_batch and most is None)
    with exporting(), oblivious:
        return torch.export.export(model, workload.args, workload.kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def exporting() -> Iterator[None]:
    """How a network is prepared: without gradients, and outside of inference mode, whose tensors no exporter takes."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def one_more(workload: Workload) -> Workload:
    """An example with the first item of each of its tensors once more."""

    def more(value: Any) -> Any:
        return torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.ndim else value

    args, kwargs = tree_map(more, (workload.args, workload.kwargs))
    return Workload(kwargs if kwargs and not args else args)


def _first_side(workload: Workload, most: int | None) -> Any:
    """That the first side of every tensor may change, as `torch.export` wants to be told."""
    batch = torch.export.Dim.DYNAMIC if most is None else torch.export.Dim("batch", max=most)

    def of(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.ndim else None

    args, kwargs = tree_map(of, (tuple(workload.args), dict(workload.kwargs)))
    return args or kwargs  # a workload has the one or the other
