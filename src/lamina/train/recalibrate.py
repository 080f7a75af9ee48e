"""Batch norm statistics, estimated anew on unlabelled data.

A decomposed layer hands the norm behind it other activations than the layer it replaced, and a norm in eval mode goes on with
the statistics of the old ones. Estimating them takes a few forwards, no labels and no gradients: after `decompose`, before
fine-tuning.

    n   values a channel has had so far      m   their mean      M   sum of their squared deviations from it
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ExampleError, LayerError, TrainingWarning
from ..network.preserve import preserved
from ..network.running import run, set_mode
from ..values import input_of


def recalibrate(model: nn.Module, data: Iterable[Any]) -> tuple[str, ...]:
    """Set the running mean and variance of every batch norm to those of the activations that some data causes.

    While it runs, norms normalise by the batch at hand, as in training, so that each one sees what its settled predecessors
    will hand it; everything else is in eval mode: dropout does nothing. The statistics are pooled over all positions of all
    batches, each value counted once, the variance unbiased as PyTorch's own is. Modes, gradients, random states and all other
    buffers are as before.

    Args:
        model: A network, changed in place: its norms' ``running_mean``, ``running_var`` and ``num_batches_tracked``. One
            process feeds it: under DDP, recalibrate before wrapping.
        data: An iterable of examples (a tensor, a tuple of arguments, a mapping, a `Workload`), or of (input, target) pairs,
            whose targets are not looked at. Batches as large as in training, some hundred examples altogether.

    Returns:
        Names of the norms that were recalibrated. A network without any warns and is left as it is; so is a norm that the
        data never reach.

    Raises:
        ExampleError: The data hold nothing, or the network does not run on them; nothing has changed.
        LayerError: A norm's input is not finite; the message names it, and nothing has changed.
    """
    norms = norms_of(model)
    if not norms:
        warnings.warn(
            "this network has no batch norm with running statistics: there is nothing to recalibrate",
            TrainingWarning,
            stacklevel=2,
        )
        return ()
    pools = _pools_over(model, norms, data)
    if not pools:
        raise ExampleError("no batch norm of the network is reached on this data, so there is nothing to estimate")
    with torch.no_grad():
        for name, pool in pools.items():
            norm = norms[name]
            norm.running_mean.copy_(pool.mean)  # type: ignore[union-attr]
            norm.running_var.copy_(pool.variance)  # type: ignore[union-attr]
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(pool.batches)
    return tuple(pools)


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a network that have running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics of a network's batch norms, by the names of their buffers."""
    norms = norms_of(model).items()
    return {
        f"{name}.{buffer}".lstrip("."): value.clone()
        for name, norm in norms
        for buffer, value in norm.named_buffers(recurse=False)
    }


def set_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Give a network's batch norms what `statistics_of` found."""
    with torch.no_grad():
        for name, value in statistics.items():
            model.get_buffer(name).copy_(value)


def _pools_over(model: nn.Module, norms: dict[str, _BatchNorm], data: Iterable[Any]) -> dict[str, _Pool]:
    """Run the data through the network; what each norm that was reached has seen."""
    pools: dict[str, _Pool] = {}
    handles = []
    for name, norm in norms.items():

        def record(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            pools.setdefault(name, _Pool()).add(args[0])

        handles.append(norm.register_forward_pre_hook(record))
    batches = 0
    try:
        # Running statistics, which train mode moves, are put back here too: all or nothing is written afterwards.
        with preserved(model), torch.no_grad():
            set_mode(model, False)
            for norm in norms.values():
                norm.training = True
            for item in data:
                run(model, input_of(item))
                for name, pool in pools.items():
                    if not pool.finite:
                        raise LayerError(
                            f"{name or 'the network'}: its input holds NaN or infinities in batch {batches} of the data"
                        )
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ExampleError("the data hold no batch, so no statistics can be estimated")
    return pools


@final
@dataclass(slots=True)
class _Pool:
    """Mean and variance of values that come batch by batch (Chan, Golub and LeVeque, 1979), in float64."""

    n: int = 0
    m: Tensor | None = None
    M: Tensor | None = None
    batches: int = 0

    def add(self, x: Tensor) -> None:
        """Take in ``(N, C, *map)``."""
        values = x.detach().transpose(0, 1).flatten(1).double()
        m = values.mean(1)
        M = (values - m[:, None]).square().sum(1)
        if self.m is None or self.M is None:
            self.n, self.m, self.M = values.shape[1], m, M
        else:
            n = self.n + values.shape[1]
            apart = m - self.m
            self.M += M + apart.square() * (self.n * values.shape[1] / n)
            self.m += apart * (values.shape[1] / n)
            self.n = n
        self.batches += 1

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity came in."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.variance).all())

    @property
    def mean(self) -> Tensor:
        """``m``."""
        assert self.m is not None
        return self.m

    @property
    def variance(self) -> Tensor:
        """``M / (n − 1)``."""
        assert self.M is not None
        return self.M / max(self.n - 1, 1)
