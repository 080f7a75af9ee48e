"""Which factors of a network rest in a phase; and how a network is as long as they do, for a timing.

Names are those that the network itself has for its layers: what wrappers put before or between them is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..network.wrappers import plain, unwrapped
from ..schedules import Group, Schedule
from .decomposed import DecomposedLayer


def decomposed_layers(model: nn.Module) -> dict[str, DecomposedLayer]:
    """The decomposed layers of a network by name."""
    found = unwrapped(model).named_modules()
    return {plain(name): module for name, module in found if isinstance(module, DecomposedLayer)}


def resting_factors(model: nn.Module, schedule: Schedule, resting: Group | None) -> dict[str, nn.Module]:
    """The factors whose weights rest while a group does, by name; those of excluded layers never do."""
    if resting is None:
        return {}
    names = {id(module): plain(name) for name, module in unwrapped(model).named_modules()}
    return {
        names[id(factor)]: factor
        for name, layer in decomposed_layers(model).items()
        if schedule.concerns(name)
        for factor in layer.factor_groups()[resting]
    }


def resting_weights(model: nn.Module, schedule: Schedule | None, resting: Group | None) -> list[nn.Parameter]:
    """The weights that rest while a group does, of those that train otherwise."""
    factors = resting_factors(model, schedule, resting).values() if schedule else []
    return [weight for weight in (factor.weight for factor in factors) if weight.requires_grad]  # type: ignore[misc]


@contextmanager
def at_rest(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """While this lasts some weights require no gradient. Their ``grad`` is left alone: this is for timing, not for training."""
    held = list(weights)
    for weight in held:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in held:
            weight.requires_grad_(True)
