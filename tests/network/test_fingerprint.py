"""Equal for networks of one structure, whatever their values; different for any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lamina.network.fingerprint import fingerprint


def base() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "other weights": lambda _: base(),
    "another dtype": lambda model: model.double(),
    "another device": lambda model: model.to("meta"),
    "another layout": lambda model: model.to(memory_format=torch.channels_last),
    "another mode": lambda model: model.eval(),
    "frozen": lambda model: model.requires_grad_(False),
}
OTHER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a layer more": lambda model: model.append(nn.Linear(2, 2)),  # type: ignore[attr-defined]
    "another type": lambda model: model.__setitem__(2, nn.Identity()) or model,  # type: ignore[operator]
    "another shape": lambda model: model.__setitem__(3, nn.Linear(16, 3)) or model,  # type: ignore[operator]
    "no bias": lambda model: model.__setitem__(3, nn.Linear(16, 2, bias=False)) or model,  # type: ignore[operator]
    "a buffer more": lambda model: model.register_buffer("scale", torch.ones(1)) or model,  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_values_do_not_matter(change: Callable[[nn.Module], nn.Module]) -> None:
    assert fingerprint(change(base())) == fingerprint(base())


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_structure_does(change: Callable[[nn.Module], nn.Module]) -> None:
    assert fingerprint(change(base())) != fingerprint(base())


def test_what_a_network_remembers_of_its_last_input_is_not_its_structure() -> None:
    """Buffers that are not saved are caches: masks and position tables that grow with the input."""
    used = base()
    used.register_buffer("mask", torch.zeros(7, 7), persistent=False)
    assert fingerprint(used) == fingerprint(base())


def test_a_lazy_network_has_one_before_and_another_after_its_first_run() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4))
    before = fingerprint(lazy)
    lazy(torch.randn(2, 3))
    assert fingerprint(lazy) != before
