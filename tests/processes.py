"""Real processes: that find one another, as a launcher would start them; and one of a test's own, to be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 240
"""Far more than it takes: a process that hangs is what these tests are looking for."""


def in_processes(number: int, script: Path, *words: str | Path, dead: int = 0) -> None:
    """Run a script so many times at once, with RANK and the like set; all but so many ``dead`` ones must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(number)
    common = {
        "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, words)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        complaints = [process.communicate(timeout=TIMEOUT_S)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert sum(process.returncode != 0 for process in running) == dead, "\n".join(complaints)


def forked(work: Callable[[], object]) -> int:
    """Run something in a process of its own, which ends with 0 where nothing was raised."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
