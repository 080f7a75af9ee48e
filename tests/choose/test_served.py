"""The watch of another runtime: what it tells, and how much it has the runtime hold at a time. No clock is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lamina import Dense, ExampleError, Inference, LowRank, Workload, comparison
from lamina.choose.served import ServedWatch
from lamina.choose.survey import Survey
from lamina.forms import Form
from lamina.measure import layer_times
from lamina.measure.clock import Effort
from lamina.network.walk import walk
from lamina.runtimes.runtime import Once, Prepared

from ..measure.test_layer_times import Holding, nbytes

WIDTHS = (32, 64, 64, 64, 16)
FORMS: dict[str, Form] = {"0": LowRank(8), "1": LowRank(16), "2": LowRank(16), "3": LowRank(4)}


class Watched:
    """A network of four layers, two of them twins, in a runtime that counts; what is run takes 1, 2, 3, … seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *workloads: Workload) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(WIDTHS[at], WIDTHS[at + 1]) for at in range(4)]).eval()
        self.layers, self.runtime, self.batches = walk(self.model).layers, Holding(), list[int]()
        for place in (layer_times, comparison):
            monkeypatch.setattr(place, "interleave", self.interleave)
        survey = Survey.of(self.model, list(workloads), Inference(), (), (), self.runtime)
        self.watch = ServedWatch(survey, self.model, self.layers, Effort(), Once(self.runtime))

    def interleave(self, runs: list[Callable[[], Any]], *_: Any, **__: Any) -> list[list[float]]:
        self.batches.append(len(runs))
        return [[float(at)] * (4 + len(self.batches)) for at in range(1, len(runs) + 1)]

    def bytes_of(self, forms: dict[str, Form]) -> int:
        return sum(nbytes(forms.get(name, Dense()), layer) for name, layer in self.layers.items())


def test_in_their_places_layers_are_prepared_one_beside_its_form_and_let_go_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch, Workload(torch.randn(3, 32)))
    found = watched.watch.in_place(FORMS)
    pairs = [nbytes(Dense(), layer) + nbytes(FORMS[name], layer) for name, layer in watched.layers.items()]
    assert (watched.runtime.most, watched.runtime.held) == (max(pairs), 0)
    assert watched.runtime.ever == sum(pairs) - pairs[1]  # twins are one
    assert found == {name: [([1.0] * 5, [2.0] * 5)] for name in FORMS}


def test_workloads_of_which_one_is_timed_for_more_rounds_stand_in_rounds_of_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Workload(torch.randn(3, 32), 0.5), Workload(torch.randn(5, 32), 0.5))
    found = watched.watch.in_place({"0": LowRank(8)})
    assert found == {"0": [([1.0] * 5, [2.0] * 5)] * 2}  # the second was timed for six rounds


def test_of_whole_networks_the_dense_one_and_the_last_one_in_forms_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    workloads = [Workload(torch.randn(3, 32), 0.5), Workload(torch.randn(5, 32), 0.5)]
    watched = Watched(monkeypatch, *workloads)
    first, second = {"1": LowRank(16)}, {"0": LowRank(8), "1": LowRank(8)}
    assert watched.watch.whole(first) == [([1.0] * 5, [2.0] * 5), ([3.0] * 5, [4.0] * 5)]
    watched.watch.whole(first)
    dense, *small = (2 * watched.bytes_of(forms) for forms in ({}, first, second))  # for two workloads
    assert watched.runtime.held == watched.runtime.ever == dense + small[0]
    watched.watch.whole(second)
    assert watched.runtime.held == dense + small[1]
    assert (watched.runtime.most, watched.runtime.ever) == (dense + small[0], dense + sum(small))


def test_a_network_that_does_not_run_on_the_example_is_told_so_before_it_is_prepared() -> None:
    once = Once(Holding())
    with pytest.raises(ExampleError, match="does not run on the example"):
        once.prepare(nn.Linear(4, 4), Workload(torch.randn(2, 5)))
    assert isinstance(once.prepare(nn.Linear(4, 4), Workload(torch.randn(2, 4))), Prepared)
