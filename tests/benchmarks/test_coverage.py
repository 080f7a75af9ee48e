"""A few of other people's networks, drawn anew each week, pass all that their originals pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "coverage.py"


@pytest.mark.slow
def test_a_sample_of_the_week_passes_all_that_its_originals_pass() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--sample", "3"], capture_output=True, text=True, timeout=2000, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.count("| passes |") + done.stdout.count("| refused:") == 3


@pytest.mark.parametrize("name", ["torch TransformerDecoder", "torch ConvTranspose2d", "transformers Bert"])
def test_a_network_is_looked_at_in_a_process_of_its_own(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--network", name], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"broken": []' in done.stdout and '"refused": {}' in done.stdout
