"""The mutants that were chosen by hand can be made: the text that each changes stands in its file, once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mutants() -> Iterator[Any]:
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks" / "faults"))
    yield importlib.import_module("mutants")
    sys.path[:] = path


def test_each_mutant_changes_a_text_that_stands_in_its_file_once(mutants: Any) -> None:
    chosen = [
        each
        for value in vars(mutants).values()
        if isinstance(value, list | tuple)
        for each in value
        if type(each).__name__ == "Mutant"
    ]
    assert len(chosen) > 50 and len({mutant.name for mutant in chosen}) == len(chosen)
    gone = [mutant.name for mutant in chosen if mutant.change(ROOT) is None]
    assert not gone, f"to be written anew: {', '.join(gone)}"
    assert all((ROOT / test).exists() for mutant in chosen for test in mutant.tests)
