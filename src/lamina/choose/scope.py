"""What a choice is about: the layers that are wanted, and how the example uses them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import ExampleError, PlanError
from ..network.observe import observe
from ..network.walk import Layer
from ..values import Use, Workload, closest


def uses_of(
    model: nn.Module, layers: dict[str, Layer], examples: Sequence[Workload]
) -> tuple[dict[str, tuple[Use, ...]], dict[str, bool]]:
    """For each layer its uses over all workloads, and whether its input lies channels last.

    Raises:
        ExampleError: The network does not run on an example, or calls no layer.
    """
    uses: dict[str, tuple[Use, ...]] = dict.fromkeys(layers, ())
    last = dict.fromkeys(layers, False)
    for workload in examples:
        for name, seen in observe(model, layers, workload).items():
            uses[name] += seen.as_uses(workload.weight)
            last[name] |= seen.channels_last
    if not any(uses.values()) and layers:
        raise ExampleError(f"no layer of the network is called on the example ({examples[0]})")
    return uses, last


def selected(names: list[str], include: Sequence[str], skip: Sequence[str]) -> set[str]:
    """The names that are wanted: of those that match a pattern in ``include``, or of all, what matches none in ``skip``.

    Raises:
        PlanError: A pattern matches no name.
    """
    for pattern in [*include, *skip]:
        if not any(matches(name, [pattern]) for name in names):
            raise PlanError(f"pattern {pattern!r} matches no layer{closest(pattern, names)}")
    return {name for name in names if (not include or matches(name, include)) and not matches(name, skip)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of some patterns, as the shell reads them."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
