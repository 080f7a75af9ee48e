"""Scoring configurations: one after the other by a function of the network, or many in one pass over the data."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import SearchError
from ..forms import Form
from ..network.preserve import preserved
from ..network.running import first_line, set_mode
from ..supernet.supernet import Supernet
from ..train.recalibrate import norms_of, recalibrate, set_statistics, statistics_of
from ..values import input_of


@runtime_checkable
class ManyScores(Protocol):
    """A score that judges several configurations together, so that data are read once for all of them."""

    def score_many(self, net: Supernet, configs: Sequence[Mapping[str, Form]]) -> list[float | Exception]:
        """A number for each configuration, higher is better, or what went wrong with it. The supernet is in eval mode."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Scored:
    """The mean of a metric over some data; every batch is fed to all configurations at hand before the next one is read.

        >>> score = lamina.Scored(validation, lambda output, target: -F.cross_entropy(output, target))

    Args:
        loader: An iterable of (input, target) pairs that can be gone through again and again.
        metric: From output and target to a number, the mean over the batch; higher is better.
        recalibration: Batches on which the running statistics of batch norms are estimated anew for every configuration before
            it is scored; None scores with those that stand in the supernet. See `lamina.recalibrate`.
    """

    loader: Iterable[Any]
    metric: Callable[[Any, Any], Tensor | float]
    recalibration: Iterable[Any] | None = None

    def __call__(self, model: nn.Module) -> float:
        """The score of one network, as it stands: `lamina.finetune` and others can ask for it too."""
        total, samples = 0.0, 0
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for batch in self.loader:
            inputs, target, size = _parts(batch, device)
            total += size * _number(self.metric(inputs.run(model), target))
            samples += size
        return _mean(total, samples)

    def score_many(self, net: Supernet, configs: Sequence[Mapping[str, Form]]) -> list[float | Exception]:
        """The scores of some configurations; one that fails is left out from then on."""
        failed: dict[int, Exception] = {}
        statistics: list[dict[str, Tensor]] = [{} for _ in configs]
        if self.recalibration is not None and norms_of(net.network):
            for i, config in enumerate(configs):
                net.set_active(config)
                try:
                    recalibrate(net.network, self.recalibration)
                except Exception as error:  # of the user's data or network, in this configuration
                    failed[i] = error
                statistics[i] = statistics_of(net.network)
        totals, samples = [0.0] * len(configs), 0
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        for batch in self.loader:
            inputs, target, size = _parts(batch, device)
            samples += size
            for i, config in enumerate(configs):
                if i in failed:
                    continue
                net.set_active(config)
                set_statistics(net.network, statistics[i])
                try:
                    totals[i] += size * _number(self.metric(inputs.run(net.network), target))
                except Exception as error:  # of the user's metric, in this configuration
                    failed[i] = error
        return [failed[i] if i in failed else _mean(total, samples) for i, total in enumerate(totals)]


Score = Callable[[nn.Module], float] | ManyScores


def called(score: Any) -> str:
    """What a score is called, the same in every process: ``module:function``, or the name of its class and what it holds.

    What a function does is no part of it: a study goes on once a mistake in it is mended.
    """
    if isinstance(score, Scored):
        return f"Scored({called(score.metric)}{', recalibrated' if score.recalibration is not None else ''})"
    if isinstance(score, functools.partial):
        return f"partial({called(score.func)})"
    of: Any = score if hasattr(score, "__qualname__") else type(score)
    name = f"{of.__module__}:{of.__qualname__}"
    code = getattr(score, "__code__", None)
    if code is None or "<lambda>" not in name:
        return name
    # Two lambdas of one module have one name.
    return f"{name} {hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()[:8]}"


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """A score, or why there is none."""

    score: float | None
    error: str | None


def scores_of(net: Supernet, score: Score, configs: Sequence[Mapping[str, Form]]) -> list[Outcome]:
    """Score some configurations in eval mode without gradients; the supernet is left as it was.

    What the score raises, and a score that is NaN or infinite, becomes the outcome of that configuration.
    """
    with scoring(net):
        if isinstance(score, ManyScores):
            try:
                found: list[float | Exception] = list(score.score_many(net, configs))
            except Exception as error:  # the user's: all of them have failed
                found = [error] * len(configs)
            if len(found) != len(configs):
                raise SearchError(f"score_many returned {len(found)} scores for {len(configs)} configurations")
        else:
            found = []
            for config in configs:
                net.set_active(config)
                try:
                    found.append(float(score(net.network)))
                except Exception as error:  # the user's, in this configuration
                    found.append(error)
    return [_outcome(value) for value in found]


@contextmanager
def scoring(net: Supernet) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers, the active configuration and random states are put back."""
    with preserved(net), torch.no_grad():
        set_mode(net, False)
        yield


def _outcome(value: Any) -> Outcome:
    if not isinstance(value, Exception):
        try:
            value = float(value)
        except Exception as error:  # a tensor of several elements, None, whatever a user's score may return
            value = error
    if isinstance(value, Exception):
        return Outcome(None, f"{type(value).__name__}: {first_line(value)}")
    if not math.isfinite(value):
        return Outcome(None, f"the score is {value}")
    return Outcome(value, None)


def _parts(batch: Any, device: torch.device) -> tuple[Any, Any, int]:
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
    if not (isinstance(moved, tuple | list) and len(moved) == 2):
        raise SearchError("Scored reads (input, target) pairs; its data hold something else")
    inputs = input_of(moved)
    tensors = inputs.tensors
    return inputs, moved[1], tensors[0].shape[0] if tensors and tensors[0].ndim else 1


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _mean(total: float, samples: int) -> float:
    if not samples:
        raise SearchError("the data of the score hold no batch")
    return total / samples
