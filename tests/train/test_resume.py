"""A training that is killed at any moment and resumed ends with the bits of one that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("killed.py")
LOADERS = ["list", "shuffled", "generator", "workers", "stream", "own"]
Scenario = tuple[str, str, int]
"""What the data come from, at what the training dies, and how many of those it lives through."""


def outcomes(folder: Path, scenarios: list[Scenario]) -> dict[Scenario, dict[str, Any]]:
    """What comes of each: the result, how often it was killed, and what lies in its folder."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        input="".join(json.dumps(scenario) + "\n" for scenario in scenarios),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(scenarios, map(json.loads, done.stdout.splitlines()), strict=True))


def assert_as_if_never_killed(found: dict[Scenario, dict[str, Any]], least: int) -> None:
    for (loader, moment, count), outcome in found.items():
        if moment == "never":
            continue
        assert outcome["deaths"] >= least, (loader, moment, count)
        assert outcome["result"] == found[loader, "never", 0]["result"], (loader, moment, count)
        left = outcome["left"]
        assert {"best", "last"} <= set(left) and len(left) <= 5, left
        assert all(name.startswith("step-") for name in set(left) - {"best", "last"}), left


@pytest.mark.slow
def test_killed_in_the_middle_of_a_step_a_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    never: list[Scenario] = [(loader, "never", 0) for loader in LOADERS]
    killed: list[Scenario] = [("shuffled", "step", count) for count in (0, 1, 5, 6, 17)]
    killed += [(loader, "step", 9) for loader in LOADERS if loader != "shuffled"]
    found = outcomes(tmp_path, [*never, *killed])
    assert_as_if_never_killed(found, 1)
    # Order, noise and dropout matter, else equal bits would prove nothing.
    assert len({found[scenario]["result"]["weights"] for scenario in never}) == len(LOADERS)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_a_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    # A file half-written; a checkpoint not yet under its name, or a link; an old checkpoint half-removed.
    moments = [("writing", 0), ("writing", 5), ("renaming", 1), ("renaming", 2), ("renaming", 5), ("removing", 3)]
    found = outcomes(tmp_path, [("list", "never", 0), *(("list", moment, count) for moment, count in moments)])
    assert_as_if_never_killed(found, 1)


@pytest.mark.slow
def test_killed_again_and_again_a_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    # Each attempt lives through five batches: enough to get to the next checkpoint, and a bit.
    loaders = ("shuffled", "workers", "own")
    found = outcomes(
        tmp_path, [(loader, moment, count) for loader in loaders for moment, count in (("never", 0), ("again and again", 5))]
    )
    assert_as_if_never_killed(found, 2)
