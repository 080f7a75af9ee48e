"""How fairly plans are judged: that all tables can be made, and that twins are of one function."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lamina import Inference, LowRank, Workload
from lamina.measure.clock import Effort
from lamina.network.walk import walk

pytest.importorskip("torchvision")


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, with a small network among its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("judging")
    monkeypatch.setitem(module.NETWORKS, "small", fed)
    monkeypatch.setattr(module, "ROUNDS", 3)
    return module


def fed() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8)


def test_every_column_of_both_tables_is_measured(judging: ModuleType) -> None:
    name, layers, _, *ratios = judging.equal("small", 0.01)
    assert (name, layers, len(ratios)) == ("small", "2", judging.LOOKS + 2)
    assert all(ratio.startswith("×") for ratio in ratios)
    name, layers, inside, outside, _ = judging.single("small")
    assert (name, layers) == ("small", "2")
    assert inside.endswith("%") and outside.endswith("%")


def test_a_simulated_verdict_that_accepts_a_slower_network_is_counted(judging: ModuleType) -> None:
    found = judging.Simulated({0.9: 0.505}, [1.04, 0.99, 1.05], 0.01, 2 / 3)
    assert judging.verdict_of("forms", found) == ["forms", "50.5%", "3", "1", "+1.00%", "67%"]
    assert judging.verdict_of("forms", judging.Simulated({1.0: 0.0}, [], 0.0, 0.0))[-2:] == ["–", "–"]


def test_the_table_of_simulated_verdicts_has_forms_that_gain_nothing_slower_networks_and_gains(judging: ModuleType) -> None:
    rows = judging.verdicts(2)
    assert {len(row) for row in rows} == {6} and len({row[0] for row in rows}) == len(rows)
    for said in ("forms at 0.99", "forms at 1 ", "forms at 1.01", "slower", "forms at 0.9,"):
        assert any(said in row[0] for row in rows)
    assert [row[1:3] for row in rows if row[0] == "forms at 0.9"] == [["100.0%", "2"]]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("dense", ["_as_it_is", "_called"])
def test_both_twins_are_the_network_with_its_layers_made_anew(judging: ModuleType, dense: str, number: int) -> None:
    model, x = fed()
    layers = walk(model).layers
    watch = judging.Twins(model, layers, [Workload(x)], Inference(), Effort(0.01, 2, 2))
    twins = watch._pair(dict.fromkeys(layers, LowRank(1)), number, getattr(watch, dense))
    places = {p.data_ptr() for network in (model, *twins) for p in network.parameters()}
    assert len(places) == 3 * len(list(model.parameters()))
    for twin in twins:
        assert torch.equal(twin(x), model(x))
