"""The memory that `calibrate` takes above the network's own stays within the limit, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("within.py")
LIMIT = 48_000_000
SLACK = 4_000_000
"""What malloc and the interpreter hold beyond what they were asked for; of the usual limit it is nothing."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory is a process's own")
@pytest.mark.parametrize("limit", [LIMIT, 1_000_000_000])
def test_several_passes_take_no_more_memory_than_the_limit_above_the_networks_own(limit: int) -> None:
    ran = subprocess.run([sys.executable, str(SCRIPT), str(limit)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    above, moments, passes = (int(number) for number in ran.stdout.split())
    assert moments > 2 * LIMIT  # so that it cannot hold them all
    assert above <= limit + SLACK
    assert passes > 2 if limit == LIMIT else (passes == 1 and above > 2 * LIMIT)  # what is held at once is seen
