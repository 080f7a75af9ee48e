"""A table of many times: how large it is, and what opening it, asking it, adding to it and showing it take.

    python benchmarks/many_times.py --threads 1

As many forms of convolutions as there are rows, with times that nobody took.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import options, table
from torch import nn

from lamina import BlockTerm, Dense, Geometry, Timing
from lamina.measure.conditions import setting_of
from lamina.measure.signature import signature
from lamina.measure.table import TimingTable, kept, kept_besides
from lamina.values import Use

FORMS = [BlockTerm(rank_in, rank_out) for rank_in in range(1, 41) for rank_out in range(1, 6)]


def batches(rows: int) -> list[dict[str, Timing]]:
    """Layers, each with its dense time first."""
    setting = setting_of(nn.Linear(4, 4), "inference", channels_last=False)
    found = []
    for number in range(rows // (len(FORMS) + 1)):
        layer = Geometry("Conv2d", 64 + number, 64, True, (3, 3), (1, 1), (1, 1), (1, 1))
        use = Use((8, 64, 28, 28), (8, 64 + number, 28, 28))
        found.append({signature(layer, form, use, False, setting): Timing(1.0, 0.01, 7, setting) for form in (Dense(), *FORMS)})
    return found


def seconds(work: Callable[[], object], times: int = 3) -> str:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return f"{statistics.median(taken):.3f} s"


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, default=200_000)

    chosen = options(__doc__ or "", more)
    with tempfile.TemporaryDirectory() as folder:
        path, every = Path(folder) / "t.sqlite", batches(chosen.rows)
        with TimingTable(path) as filled:
            for batch in every:
                filled.put(next(iter(batch)), batch)
        setting = next(iter(every[0].values())).setting
        rows = [["size of the file", f"{path.stat().st_size / 1e6:.0f} MB"]]
        rows.append(["opening and closing it", seconds(lambda: TimingTable(path).close())])
        with TimingTable(path) as opened:
            rows.append(
                [
                    "asking for 1,005 times",
                    seconds(lambda: [opened.get(next(iter(each)), each, setting, lambda then_s: True) for each in every[:5]]),
                ]
            )
            rows.append(["adding a batch of 201", seconds(lambda: opened.put(next(iter(every[-1])), every[-1]))])
        rows.append(["lamina cache show", seconds(lambda: (kept(path), kept_besides(path)))])
        print(table([f"{chosen.rows:,} rows", f"{torch.get_num_threads()} threads; {setting}"], rows))


if __name__ == "__main__":
    main()
