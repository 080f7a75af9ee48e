"""A clock on which time passes where a test lets it."""

from __future__ import annotations

import pytest
import torch

from lamina.measure.clock import Effort, interleave

CPU = torch.device("cpu")


class Clock:
    """Time by this clock alone passes where a run spends it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("lamina.measure.clock.time.perf_counter", lambda: self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def interleaved(self, *runs: float, effort: Effort) -> list[list[float]]:
        return interleave([lambda t=t: self.spend(t) for t in runs], CPU, effort)  # type: ignore[misc]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)
