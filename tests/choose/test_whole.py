"""What a plan found is remembered, answers while it is true, and is found anew where anything that decides it changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import BlockTerm, Plan, Speedup, Workload
from lamina.choose import prices, whole
from lamina.choose.prices import Prices
from lamina.choose.survey import Survey
from lamina.choose.whole import Whole
from lamina.measure.clock import Effort
from lamina.measure.table import TimingTable
from lamina.values import Inference

X = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, and rests as long as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.rest_s = 0.002

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.rest_s)
        y: Tensor = self.second(self.first(x))
        return y


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def survey_of(model: nn.Module, example: Any = X) -> Survey:
    return Survey.of(model, example, Inference(), (), ())


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return self.function(*args, **named)


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(partial(whole.never_slower, effort=Effort(0.02, 2, 3)))
    monkeypatch.setattr(whole, "never_slower", counted)
    monkeypatch.setattr(whole, "disturbed", lambda *_: False)  # whatever else this machine does
    return counted


@pytest.fixture
def pricing(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(prices.losses)
    monkeypatch.setattr(prices, "losses", counted)
    return counted


FORMS = {"first": BlockTerm(4, 4), "second": BlockTerm(8, None)}


def verdict(model: nn.Module, table: TimingTable, forms: Any = None, example: Any = X) -> Any:
    return Whole(survey_of(model, example), table).verdict(forms or FORMS, lambda *_: None)


def test_a_verdict_is_remembered_with_every_round_and_reason(model: Net, judging: Counted, tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        found = verdict(model, table)
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert verdict(model, table) == found
    assert judging.calls == 1
    assert not found.kept.keys() & found.put_back.keys() and found.kept.keys() | found.put_back.keys() == FORMS.keys()


def test_what_a_busy_machine_disturbed_is_not_remembered(model: Net, judging: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TimingTable(None)
    monkeypatch.setattr(whole, "disturbed", lambda interval: interval[0] <= interval[1])
    verdict(model, table)
    monkeypatch.setattr(whole, "disturbed", lambda interval: False)
    verdict(model, table)
    assert judging.calls == 2
    verdict(model, table)
    assert judging.calls == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "rest_s", 0.02),
        lambda model: model.add_module("third", nn.ReLU()),
        lambda model: setattr(model.second, "padding", (2, 2)),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
    ids=["slower by what no survey sees", "another module", "another padding", "another layout"],
)
def test_of_a_network_that_changed_nothing_is_remembered(
    model: Net, judging: Counted, change: Callable[[nn.Module], object]
) -> None:
    table = TimingTable(None)
    verdict(model, table)
    change(model)
    verdict(model, table)
    assert judging.calls == 2


@pytest.mark.parametrize(
    "asked",
    [{"forms": {"first": BlockTerm(4, 4)}}, {"example": X[:2]}, {"example": [Workload(X, 1.0), Workload(X[:2], 3.0)]}],
    ids=["other forms", "another batch", "workloads"],
)
def test_another_question_is_not_answered_by_what_is_remembered(model: Net, judging: Counted, asked: dict[str, Any]) -> None:
    table = TimingTable(None)
    verdict(model, table)
    verdict(model, table, **asked)
    assert judging.calls == 2


def test_what_is_remembered_but_cannot_be_read_is_found_anew(
    model: Net, judging: Counted, pricing: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = TimingTable(None)
    for text in ("", "[]", '{"dense_s": 0, "found": 1}', "[NaN]"):
        with monkeypatch.context() as patch:
            patch.setattr(table, "recall", lambda *_, text=text: text)
            verdict(model, table)
            Prices(survey_of(model), table).fitted("first", BlockTerm(4, 4))
    assert judging.calls == pricing.calls == 4


def test_losses_are_remembered_by_the_weight_and_not_by_the_name(model: Net, pricing: Counted) -> None:
    table = TimingTable(None)
    found = Prices(survey_of(model), table).fitted("first", BlockTerm(4, 4))
    assert Prices(survey_of(model), table).fitted("first", BlockTerm(4, 4)) == found
    assert pricing.calls == 1
    assert Prices(survey_of(model), table).fitted("second", BlockTerm(4, 4)) != found
    with torch.no_grad():
        model.second.weight.copy_(model.first.weight)
    assert Prices(survey_of(model), table).fitted("second", BlockTerm(4, 4)) == found
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] += 1
    assert Prices(survey_of(model), table).fitted("first", BlockTerm(4, 4)) != found
    assert pricing.calls == 3


def test_a_plan_that_is_made_again_times_nothing_and_is_the_same(
    judging: Counted, pricing: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(48, 48, 3, padding=1) for _ in range(3)]).eval()
    x = torch.randn(2, 48, 20, 20)
    looking = Counted(whole.Stopwatch)
    monkeypatch.setattr(whole, "Stopwatch", looking)
    monkeypatch.setattr(whole, "alike", lambda *_: True)  # whatever else this machine does

    def made() -> Plan:
        return lamina.make_plan(model, x, Speedup(1.5), timings=tmp_path / "t.sqlite")

    first = made()
    calls = judging.calls, pricing.calls, looking.calls
    assert made() == first
    assert (judging.calls, pricing.calls, looking.calls) == calls
