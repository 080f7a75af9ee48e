"""What a writer does to the disk, in its order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def noted(monkeypatch: pytest.MonkeyPatch, rename: str) -> list[str]:
    """Steps from now on: ``sync`` for each that reached the disk, and the new name of each that ``os.<rename>`` gave one."""
    sync, renaming, steps = os.fsync, getattr(os, rename), list[str]()

    def synced(descriptor: int) -> None:
        steps.append("sync")
        sync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        steps.append(Path(target).name)
        renaming(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, rename, renamed)
    return steps
