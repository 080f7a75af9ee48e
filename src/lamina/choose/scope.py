"""What a choice is about: the layers that are wanted, and how the example uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from ..errors import ExampleError
from ..network.memory import Place
from ..network.observe import oddity
from ..network.running import observed_in
from ..network.trial import observed
from ..network.walk import Layer
from ..values import Mode, Use, Workload


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """How the examples use a network's layers, by name."""

    uses: dict[str, tuple[Use, ...]]
    """For each layer its uses over all workloads; none where it cannot be decomposed."""
    by_workload: tuple[dict[str, tuple[Use, ...]], ...]
    """The same for one run of each workload, unweighted."""
    channels_last: dict[str, bool]
    refused: dict[str, str]
    """Layers that cannot be decomposed, and why."""
    apart: frozenset[Place]
    """Storages of parameters into which the network writes as it runs."""


def seen_of(model: nn.Module, layers: Mapping[str, Layer], examples: Sequence[Workload], mode: Mode) -> Seen:
    """Run the examples on a shadow of a network and see how each layer is used.

    Raises:
        ExampleError: The network does not run on an example, or calls no layer.
    """
    uses: dict[str, tuple[Use, ...]] = dict.fromkeys(layers, ())
    last = dict.fromkeys(layers, False)
    by_workload: list[dict[str, tuple[Use, ...]]] = []
    refused: dict[str, str] = {}
    apart: frozenset[Place] = frozenset()
    for workload in examples:
        # Some layers are called by a training step alone, as auxiliary heads are.
        found, outcome = observed(model, layers.values(), workload, [observed_in(mode)])
        if complaint := outcome.complaints[observed_in(mode)]:
            raise ExampleError(f"the network does not run on the example ({workload}): {complaint}")
        apart |= outcome.apart
        by_workload.append({name: seen.as_uses() for name, seen in found.items()})
        for name, seen in found.items():
            uses[name] += seen.as_uses(workload.weight)
            last[name] |= seen.channels_last
            if odd := oddity(seen):
                refused[name] = odd
    if not any(uses.values()) and layers:
        raise ExampleError(f"no layer of the network is called on the example ({examples[0]})")
    refused |= {name: "it is never called on this example" for name in layers if not uses[name]}
    return Seen(uses, tuple(by_workload), last, refused, apart)
