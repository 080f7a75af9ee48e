"""Menu: what each layer may become, what that costs and what it loses. Plain values; no network, no clock.

A form is worth measuring where nothing that runs the same kernels is both smaller and closer; an option is worth choosing where
no other is better in everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from ..forms import Form


@final
@dataclass(frozen=True, slots=True)
class Option:
    """One form that a layer may take.

    Attributes:
        form: The form.
        loss: The share of the weight that it leaves out, see `prices`.
        parameters: Weights and biases.
        macs: Multiply-accumulates over all calls of the example, by the workloads' weights.
        seconds: The time of all calls in one run of each workload.
    """

    form: Form
    loss: float
    parameters: int
    macs: int
    seconds: tuple[float, ...]


Menu = Mapping[str, tuple[Option, ...]]
"""Layer name → what it may become, the dense layer first."""


def worth_measuring(sizes: Mapping[Form, int], losses: Mapping[Form, float], most: int) -> list[Form]:
    """Forms on the fronts of size and loss, one front for each structure, thinned out evenly to about ``most`` forms.

    Args:
        sizes: Form → weights or MACs.
        losses: Form → loss, for each of them.
        most: About how many forms of all structures together.
    """
    structures = {form.structure for form in sizes}
    each = max(2, most // max(len(structures), 1))
    chosen: list[Form] = []
    for structure in sorted(structures, key=str):
        front: list[Form] = []
        for form in sorted((f for f in sizes if f.structure == structure), key=lambda f: (sizes[f], losses[f])):
            if not front or losses[form] < losses[front[-1]]:
                front.append(form)
        chosen += evenly(front, each)
    return chosen


def evenly(items: Sequence[Form], most: int) -> list[Form]:
    """So many of some forms, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def undominated(options: Iterable[Option]) -> tuple[Option, ...]:
    """Options none of which is at least as costly in everything as another that loses no more; the first one always stays."""
    first, *rest = options
    kept = [first]
    for option in sorted(rest, key=lambda o: (o.loss, sum(o.seconds), o.parameters, o.macs)):
        if not any(_no_worse(other, option) for other in kept):
            kept.append(option)
    return tuple(kept)


def _no_worse(a: Option, b: Option) -> bool:
    return (
        a.loss <= b.loss
        and a.parameters <= b.parameters
        and a.macs <= b.macs
        and all(x <= y for x, y in zip(a.seconds, b.seconds, strict=True))
    )
