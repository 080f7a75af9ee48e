"""What surgery costs: decomposing, saving, loading; and networks that look at the weights of their layers.

    python benchmarks/surgery.py --publish

With ``--against CHECKOUT`` another checkout of lamina is timed in the same run: workers of the two take turns, each in a
process of its own, and the ratio is the median of the paired ones, with its 95 % interval. Without it there is one
column.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

HERE = Path(__file__).resolve()


def resnet(name: str, side: int) -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    return getattr(torchvision.models, name)().eval(), torch.randn(8, 3, side, side)


def many(count: int) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)]), torch.randn(4, 16)


def encoder() -> tuple[nn.Module, torch.Tensor]:
    return nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).eval(), torch.randn(1, 32, 512)


def t5() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    config = transformers.T5Config(vocab_size=100, d_model=512, d_kv=64, d_ff=2048, num_layers=2, num_heads=8)
    ids = {"input_ids": torch.randint(100, (1, 64)), "decoder_input_ids": torch.randint(100, (1, 16))}
    return transformers.T5ForConditionalGeneration(config).eval(), ids


NETWORKS: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    "ResNet-18, 8×3×64×64": lambda: resnet("resnet18", 64),
    "ResNet-50, 8×3×64×64": lambda: resnet("resnet50", 64),
    "500 linear layers 16→16": lambda: many(500),
}
READERS: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    "nn.TransformerEncoderLayer 512/2048, 1×32 tokens": encoder,
    "T5 512/2048, 2 + 2 layers, 64 in, 16 out": t5,
}


def quarter(model: nn.Module, example: object) -> object:
    """A plan with every layer at a quarter of its full rank; nothing is timed."""
    import lamina

    plan = lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio())
    for name, layer in plan.layers.items():
        g = layer.geometry
        sides = [max(1, channels // 4) for channels in (g.in_channels, g.out_channels)]
        plan = plan.with_form(name, lamina.LowRank(min(sides)) if g.pointwise else lamina.BlockTerm(*sides))
    return plan


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def surgery(make: Callable[[], tuple[nn.Module, object]], rounds: int) -> Iterator[tuple[str, float]]:
    """What is done and its seconds, in turns."""
    import lamina

    model, example = make()
    plan = quarter(model, example)
    small = lamina.decompose(model, plan)  # warm
    with tempfile.TemporaryDirectory() as scratch:
        lamina.save(small, f"{scratch}/out")
        lamina.load(make()[0], f"{scratch}/out")
        for _ in range(rounds):
            base, mine = make()[0], make()[0]
            yield "decompose, a copy", seconds(partial(lamina.decompose, model, plan))
            yield "decompose, in place", seconds(partial(lamina.decompose, base, plan, inplace=True))
            yield "save", seconds(partial(lamina.save, small, f"{scratch}/out"))
            yield "load", seconds(partial(lamina.load, mine, f"{scratch}/out"))


def forwards(make: Callable[[], tuple[nn.Module, object]], rounds: int) -> Iterator[tuple[str, float]]:
    """Which of the two networks ran and its seconds, in turns."""
    import lamina

    model, example = make()
    small = lamina.decompose(model, quarter(model, example))
    calls = {
        f"forward, {name}": partial(net, **example) if isinstance(example, dict) else partial(net, example)
        for name, net in (("dense", model), ("decomposed", small))
    }
    with torch.no_grad():
        for turn in range(3 + rounds * 5):
            for name, call in calls.items():
                took = seconds(call)
                if turn >= 3:  # warm
                    yield name, took


def worker(rounds: int) -> dict[str, list[float]]:
    """The times of one process, in seconds, by row."""
    taken: dict[str, list[float]] = {}
    for timed, networks in ((surgery, NETWORKS), (forwards, READERS)):
        for title, make in networks.items():
            torch.manual_seed(0)
            for what, took in timed(make, rounds):
                taken.setdefault(f"{title}: {what}", []).append(took)
    return taken


def run_worker(checkout: Path, rounds: int, threads: int) -> dict[str, list[float]]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE), "--worker", "--rounds", str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from record import conditions, options, publish, table

    from lamina.comparison import whole_setting
    from lamina.values import Inference, Workload

    chosen = options(
        __doc__ or "",
        lambda parser: (
            parser.add_argument("--against", type=Path, help="a checkout of another commit, timed in turns with this one"),
            parser.add_argument("--rounds", type=int, default=3),
            parser.add_argument("--processes", type=int, default=4, help="workers of each checkout"),
        ),
    )
    own = HERE.parent.parent
    times: dict[str, dict[str, list[float]]] = {"here": {}, "there": {}}
    for _ in range(chosen.processes):
        for side, checkout in (("there", chosen.against), ("here", own)):
            if checkout:
                for row, taken in run_worker(checkout, chosen.rounds, chosen.threads).items():
                    times[side].setdefault(row, []).extend(taken)
    rows = []
    for row, here in times["here"].items():
        cells = [row, f"{median(here) * 1e3:.4g} ms"]
        if there := times["there"].get(row):
            from lamina.measure.clock import ratio, ratio_interval

            low, high = ratio_interval(here, there)
            cells += [f"{median(there) * 1e3:.4g} ms", f"{ratio(here, there):.2f} ({low:.2f} to {high:.2f})"]
        rows.append(cells)
    head = ["work", "time"] + (["time at the other commit", "time, relative to it"] if chosen.against else [])
    model, example = encoder()
    text = table(head, rows) + "\n\n" + conditions(whole_setting(model, Workload(example), Inference()))
    print(text)
    if chosen.publish:
        command = "python benchmarks/surgery.py" + (" --against CHECKOUT" if chosen.against else "")
        publish("surgery", "What surgery costs", command, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    known, _ = parser.parse_known_args()
    if known.worker:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        print(json.dumps(worker(known.rounds)))
    else:
        main()
