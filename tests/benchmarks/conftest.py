"""The scripts of the benchmarks as modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Imports the scripts in the ``FOLDER`` of a test's module by name; they find each other on the path."""
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(request.module.FOLDER))
    yield importlib.import_module
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]
