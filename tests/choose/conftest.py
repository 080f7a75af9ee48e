"""The fake machine, by which layers and networks are timed, and a network whose spectra decay more and less."""

from __future__ import annotations

import pytest

from ..machine import Machine, Net, decaying


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine.instead(monkeypatch)


@pytest.fixture
def model() -> Net:
    return decaying()
