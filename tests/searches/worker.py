"""One worker of a study: ``python worker.py URL LOG LEASE STRATEGY [HANG_AT]``.

Every score leaves a line ``key worker`` in the log, written before it begins. At its HANG_AT-th score it leaves a file beside
the log and waits to be killed. It begins once there is a file LOG.go.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import linears
import torch
from torch import nn

from lamina.searches.search import search
from lamina.searches.strategies import BreadthFirst, Exhaustive, Sampled
from lamina.searches.study import Study
from lamina.supernet.space import key

STRATEGIES = {"exhaustive": Exhaustive(), "breadth first": BreadthFirst(beam=3, restarts=1), "tpe": Sampled("tpe", trials=12)}


def main(url: str, log: str, lease_s: str, strategy: str, hang_at: str = "0") -> None:
    torch.set_num_threads(1)
    scored = 0

    def score(model: nn.Module) -> float:
        nonlocal scored
        scored += 1
        with open(log, "a") as file:
            file.write(f"{key(linears.active(model))} {os.getpid()}\n")
        if scored == int(hang_at):
            Path(f"{log}.hangs").write_text(key(linears.active(model)))
            time.sleep(600)
        time.sleep(0.03)
        return linears.score(model)

    net = linears.supernet()
    Path(f"{log}.ready-{os.getpid()}").touch()
    while not Path(f"{log}.go").exists():
        time.sleep(0.02)
    result = search(net, score, strategy=STRATEGIES[strategy], study=Study(url, lease_s=float(lease_s)), limit=())
    print(key(result.best.config), len(result.scored))


if __name__ == "__main__":
    main(*sys.argv[1:])
