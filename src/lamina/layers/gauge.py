"""The scales between the factors of a layer: free in exact arithmetic, and chosen so that int8 loses least.

    h   what flows from one factor to the next, (…, r, *map)      s   a scale for each of its channels, (r,)
    A   the first factor's weight, (r, …)                         B   the next one's, (O, r / groups, …)

A / s and B s compute what A and B do. int8 has one scale for all of h, and one for each output channel of a weight: so A is as
fine as before, whatever s is, while a channel of h that is ten times smaller than the largest loses a digit, and so does a
column of B. The scales that balance both are those of SmoothQuant (arXiv 2211.10438), s = max|h|^α / max|B|^(1 − α), which is
there at a price, in the norm or the layer before; between factors it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .decomposed import DecomposedLayer

BALANCE = 0.5
"""α: how far the channels of what flows are evened out, and how far the columns of the weight that reads it."""


def balance(model: nn.Module, runs: Iterable[Callable[[nn.Module], Any]], share: float = BALANCE) -> None:
    """Scale the factors of every decomposed layer of a network for int8, in place: it computes the same up to rounding.

    Args:
        model: The network, in eval mode.
        runs: Each runs it on an input that it will see.
        share: α.
    """
    stacks = [module for module in model.modules() if isinstance(module, DecomposedLayer)]
    largest: dict[nn.Module, Tensor] = {}
    handles = [
        factor.register_forward_hook(_noting(largest, axis=1 if stack.geometry.kernel else -1))
        for stack in stacks
        for factor in stack.factors()[:-1]
    ]
    try:
        with torch.no_grad():
            for run in runs:
                run(model)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for stack in stacks:
            for first, second in pairwise(stack.factors()):
                if first in largest:
                    _rescale(first, second, largest[first], share)


def _noting(largest: dict[nn.Module, Tensor], axis: int) -> Callable[..., None]:
    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        sides = [side for side in range(output.ndim) if side != axis % output.ndim]
        found = output.detach().abs().amax(sides)
        largest[module] = torch.maximum(largest[module], found) if module in largest else found

    return note


def _rescale(first: Any, second: Any, flows: Tensor, share: float) -> None:
    A, B = first.weight, second.weight
    groups = getattr(second, "groups", 1)
    # Of each input channel, over the output channels of its group.
    by_group = B.reshape(groups, len(B) // groups, B.shape[1], -1)
    reads = by_group.abs().amax((1, 3)).flatten()
    scale = flows.clamp_min(1e-12).pow(share) / reads.clamp_min(1e-12).pow(1 - share)
    scale = torch.where((flows > 0) & (reads > 0), scale, torch.ones_like(scale))
    scale /= scale.log().mean().exp()  # the sizes of both weights stay about as they were
    A /= scale.view(-1, *(1,) * (A.ndim - 1))
    by_group *= scale.view(groups, 1, B.shape[1], 1)
    B.copy_(by_group.reshape(B.shape))
