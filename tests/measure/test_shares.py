"""Where the time goes: every module its own, and all of it."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina import Workload
from lamina.measure import clock, shares
from lamina.measure.shares import time_shares


class Takes(nn.Module):
    """Takes so many ticks of a fake clock, itself, beside what its children take."""

    def __init__(self, ticks: float, *children: nn.Module) -> None:
        super().__init__()
        self.ticks = ticks
        self.inner = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.inner:
            x = module(x)
        CLOCK[0] += self.ticks * len(x)
        return x


CLOCK = [0.0]


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "perf_counter", lambda: CLOCK[0])


X = torch.zeros(1, 2)


def test_a_module_is_charged_for_itself_and_not_for_what_it_calls() -> None:
    model = Takes(1.0, Takes(2.0, Takes(3.0)), Takes(4.0))
    found = time_shares(model, [Workload(X)])
    assert found == pytest.approx({"": 0.1, "inner.0": 0.2, "inner.0.inner.0": 0.3, "inner.1": 0.4})


def test_each_call_counts_and_a_module_that_is_never_called_is_left_out() -> None:
    one = Takes(1.0)
    model = Takes(0.0, one, Takes(2.0), one)
    model.idle = Takes(5.0)
    assert time_shares(model, [Workload(X)]) == pytest.approx({"": 0.0, "inner.0": 0.5, "inner.1": 0.5})


def test_workloads_count_by_their_weights() -> None:
    class Either(Takes):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0 if len(x) == 1 else 1](x)  # type: ignore[no-any-return]

    model = Either(0.0, Takes(1.0), Takes(1.0))
    found = time_shares(model, [Workload(X, 0.75), Workload(torch.zeros(3, 2), 0.25)])
    assert found["inner.0"] == found["inner.1"] == pytest.approx(0.5)


def test_no_hook_is_left_whatever_the_network_does() -> None:
    class Fails(Takes):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    for model in (Takes(1.0, Takes(1.0)), Takes(1.0, Fails(1.0))):
        with contextlib.suppress(RuntimeError):
            time_shares(model, [Workload(X)])
        hooks: list[Any] = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        assert not hooks


def test_with_the_real_clock_they_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert time.perf_counter() != CLOCK[0]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    found = time_shares(model, [Workload(torch.randn(2, 8))])
    assert sum(found.values()) == pytest.approx(1) and found.keys() == {"", "0", "1", "2"}


def test_a_part_that_fails_and_is_caught_takes_nothing_from_the_others() -> None:
    class Fails(Takes):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    class Patient(Takes):
        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.inner[0](x)
            return self.inner[1](x)  # type: ignore[no-any-return]

    found = time_shares(Takes(1.0, Patient(0.0, Takes(0.0, Fails(0.0)), Takes(3.0))), [Workload(X)])
    assert found["inner.0.inner.1"] == pytest.approx(0.75) and found[""] == pytest.approx(0.25)


def test_a_scripted_part_counts_as_its_callers_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    assert time_shares(Takes(1.0, scripted, Takes(3.0)), [Workload(X)]) == pytest.approx({"": 0.25, "inner.1": 0.75})
    assert time_shares(scripted, [Workload(X)]) == {}


def test_on_accelerators_modules_are_timed_by_marks_each_on_its_own_device_and_waited_for_at_the_end_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network on two devices: each mark on the second one is two seconds after its last, on the first one second."""
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    log: list[Any] = []
    model = Takes(0.0, nn.Linear(2, 2), nn.Linear(2, 2))
    lies = {id(p): device for at, device in enumerate((first, second)) for p in model.inner[at].parameters()}

    class Parameter(nn.Parameter):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return lies[id(self)]

    for linear in model.inner:
        for parameter in linear.parameters():
            parameter.__class__ = Parameter

    def marked(device: torch.device) -> tuple[torch.device, float]:
        log.append(device)
        return device, (2.0 if device == second else 1.0) * len(log)

    def between(begin: tuple[torch.device, float], end: tuple[torch.device, float]) -> float:
        assert log[-1] == "wait" and begin[0] == end[0]
        return end[1] - begin[1]

    monkeypatch.setattr(shares, "mark", marked)
    monkeypatch.setattr(shares, "between", between)
    monkeypatch.setattr(
        shares, "waiter", lambda devices: lambda: log.append("wait") if set(devices) == {first, second} else None
    )
    monkeypatch.setattr(shares, "repeatable", contextlib.nullcontext)
    monkeypatch.setattr(shares, "_RUNS", 1)
    found = time_shares(model, [Workload(X)])
    run = [first, first, first, second, second, first, "wait"]
    assert log == run * 2
    assert found == pytest.approx({"": 2 / 5, "inner.0": 1 / 5, "inner.1": 2 / 5})
