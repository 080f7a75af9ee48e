"""What every test gets: a seed, one torch thread, a cache folder of its own; and the shortest way from a network to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.forms import Form
from lamina.measure.layer_times import LayerTimes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The timing table of this test alone: no test may see, or write into, the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LAMINA_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is always equally fast: no test may depend on what else runs beside it."""
    monkeypatch.setattr(LayerTimes, "_takes_as_then", lambda *_: True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    assert torch.get_num_threads() == 1, "this test changed the number of threads and left it so"


@pytest.fixture(scope="session")
def planned() -> Callable[..., lamina.Plan]:
    """``planned(model, example, {name: form})``: an untimed plan, all other layers dense. Without forms: full rank for all."""

    def make(model: nn.Module, example: Any, forms: Mapping[str, Form] | None = None) -> lamina.Plan:
        plan = lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio())
        if forms is None:
            forms = {name: full_rank(layer.geometry) for name, layer in plan.layers.items()}
        assert set(forms) <= set(plan.layers), (sorted(forms), sorted(plan.layers), plan.refused)
        for name in plan.layers:
            plan = plan.with_form(name, forms.get(name, lamina.Dense()))
        return plan

    return make


def full_rank(geometry: lamina.Geometry) -> Form:
    if geometry.pointwise:
        return lamina.LowRank(min(geometry.out_channels, geometry.in_channels))
    return lamina.BlockTerm(geometry.in_channels, geometry.out_channels)
