"""Calibrates within a limit: prints by how many bytes the process's own memory grew, what the moments take, and the passes.

    python within.py LIMIT

Its own memory is what no file holds (``RssAnon``); of mapped files the system drops pages whenever it needs them.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import lamina


def own() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), *(nn.Conv2d(128, 128, 3, padding=1) for _ in range(16))).eval()
    data = torch.randn(16, 3, 8, 8)
    model(data[:2]).sum().backward()
    model.zero_grad()
    lamina.calibrate(nn.Sequential(nn.Conv2d(3, 8, 3)), data)  # what is loaded at the first call counts as the process's
    before, peak, done = own(), 0, threading.Event()

    def watch() -> None:
        global peak
        while not done.is_set():
            peak = max(peak, own())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    found = lamina.calibrate(model, data.split(2), memory=float(sys.argv[1]), tolerance=None)
    done.set()
    watcher.join()
    print(peak - before, found.bytes, found.record.passes)
