"""A network that others trained, before and after `lamina.faster`, judged by what its task counts.

What is counted is kept by groups, such as the frames of one note or the crops of one photo, which are right or wrong together:
intervals are over groups. Found figures stand in ``benchmarks/runs/published``, and a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lamina
from lamina.errors import LaminaError
from lamina.measure.table import TimingTable
from lamina.runtimes.runtime import Runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import conditions, options, publish, table
from runtimes import in_runtime, served

RUNS = Path(__file__).resolve().parents[1] / "runs" / "published"
INSTALL = "pip install --no-deps -r benchmarks/published/requirements.txt"
DRAWS = 9_999

Counts = dict[str, list[list[float]]]
"""By the figure's name, of each group what is summed over groups."""


@dataclass(frozen=True)
class Figure:
    """What a task counts, from sums over groups; ``beside`` if it compares with the original, and so is of no network alone."""

    name: str
    of: Callable[..., Any]
    form: str = "{:.1%}"
    change: str = "{:+.1%}"
    beside: bool = False


def share(part: Any, whole: Any) -> Any:
    return part / whole


def interval(of: Callable[..., Any], before: Sequence[Sequence[float]] | None, after: Sequence[Sequence[float]]) -> list[float]:
    """The 95 % interval of a figure, or of its change: percentiles of a bootstrap over groups, each paired with itself.

    Args:
        of: From the sums of the columns to the figure.
        before: (groups, columns), or None for the figure of ``after`` itself.
        after: (groups, columns).
    """
    from scipy.stats import bootstrap

    first, second = (None if each is None else np.asarray(each, float) for each in (before, after))

    def figure(groups: Any, axis: int) -> Any:
        told = of(*np.moveaxis(second[groups].sum(-2), -1, 0))
        return told if first is None else told - of(*np.moveaxis(first[groups].sum(-2), -1, 0))

    drawn = bootstrap((np.arange(len(second)),), figure, n_resamples=DRAWS, batch=500, method="percentile", rng=0)
    return [float(end) for end in drawn.confidence_interval]


def told(figure: Figure, before: Counts, after: Counts) -> list[str]:
    """The cells of one figure: before, after and the change with its interval; of one that compares, the figure alone."""
    second = np.asarray(after[figure.name], float)
    value = float(figure.of(*second.sum(0)))
    if figure.beside:
        low, high = (figure.form.format(end) for end in interval(figure.of, None, after[figure.name]))
        return [f"{figure.form.format(value)} ({low} to {high})"]
    first = float(figure.of(*np.asarray(before[figure.name], float).sum(0)))
    low, high = (figure.change.format(end) for end in interval(figure.of, before[figure.name], after[figure.name]))
    return [
        figure.form.format(first),
        figure.form.format(value),
        f"{figure.change.format(value - first)} ({low} to {high})",
    ]


def head(figures: Sequence[Figure], int8: bool) -> list[str]:
    cells = [[f.name] if f.beside else [f"{f.name} before", "after", "change"] for f in figures]
    more = [cell for name in RUNTIMES for cell in (f"{figures[0].name} in {name} int8, original → after", "gain there")]
    told = ["network", "asked", "measured", *(cell for each in cells for cell in each), "layers decomposed", "takes"]
    return [*told, *(more if int8 else ())]


@dataclass(frozen=True)
class Trial:
    """A network to make faster.

    Attributes:
        name: What its rows are called.
        network: It, with its published weights.
        example: What it is fed in use.
        data: What is fed to it to learn from, without labels: batches, or from the network what `calibrate` made.
        answers: From a network, or what is called like one, to what it tells of the tests; no batch is larger than the example.
        count: From answers and the original's to what is counted of them.
        outputs: How its output is read.
        include: Patterns of the layers that are looked at; empty: all. A quick look is at few.
        inputs: Batches like the example, from which the scales of int8 are found; None: it is not looked at in int8.
    """

    name: str
    network: nn.Module
    example: Any
    data: Any
    answers: Callable[[Any], Any]
    count: Callable[[Any, Any], Counts]
    outputs: lamina.Categorical | lamina.Gaussian = lamina.Gaussian()  # noqa: RUF009 - a frozen value
    include: Sequence[str] = ()
    inputs: Sequence[Any] | None = None


RUNTIMES: dict[str, Callable[..., Runtime]] = {"ONNX Runtime": lamina.OnnxRuntime, "OpenVINO": lamina.OpenVINO}


def in_int8(trial: Trial, small: nn.Module, original: Any, seconds: float) -> dict[str, Any]:
    """By runtime what the original and the decomposed network count there in int8, and how they compare; or why not."""
    found: dict[str, Any] = {}
    for name, make in RUNTIMES.items():
        runtime = make(int8=list(trial.inputs or ()))
        try:
            timed = lamina.compare(trial.network, small, trial.example, seconds=seconds, runtime=runtime)
            runs = [served(in_runtime(runtime), each.eval(), trial.example) for each in (trial.network, small)]
            counts = [trial.count(trial.answers(run), original) for run in runs]
        except LaminaError as error:
            found[name] = {"error": str(error)}
            continue
        found[name] = {"before": counts[0], "after": counts[1], "speed": timed.speedup, "interval": timed.interval}
        found[name]["conditions"] = conditions(timed.setting)
    return found


def int8_cells(found: dict[str, Any] | None, figure: Figure) -> list[str]:
    """Of each runtime the figure of the original and of the decomposed network in int8, and what that gains there."""
    cells = []
    for name in RUNTIMES:
        one = (found or {}).get(name)
        if one is None or "error" in one:
            cells += [f"failed: {one['error']}".partition("\n")[0][:120] if one else "–", "–"]
            continue
        values = [figure.form.format(float(figure.of(*np.sum(one[when][figure.name], 0)))) for when in ("before", "after")]
        low, high = one["interval"]
        cells += [" → ".join(values), f"×{one['speed']:.2f} ({low:.2f} to {high:.2f})"]
    return cells


def tried(trial: Trial, wanted: float, original: Any, timings: TimingTable, seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    result = lamina.faster(
        trial.network,
        trial.example,
        lamina.Speedup(wanted),
        data=trial.data(trial.network) if callable(trial.data) else trial.data,
        outputs=trial.outputs,
        include=trial.include,
        timings=timings,
        seconds=seconds,
    )
    took = time.perf_counter() - began
    return {
        "network": trial.name,
        "wanted": wanted,
        "speed": result.comparison.speedup,
        "interval": result.comparison.interval,
        "before": trial.count(original, original),
        "after": trial.count(trial.answers(result.model), original),
        "layers": f"{len(result.plan.decomposed)} of {len(result.plan.layers)}",
        "said": list(result.said),
        "time": next((line for line in result.plan.summary() if line.startswith("its time")), ""),
        "seconds": took,
        "conditions": conditions(result.comparison.setting),
        "int8": None if trial.inputs is None else in_int8(trial, result.model, original, seconds),
        "example": result.comparison.example,
    }


def row(found: dict[str, Any], figures: Sequence[Figure], int8: bool) -> list[str]:
    low, high = found["interval"]
    return [
        found["network"],
        f"×{found['wanted']:g}",
        f"×{found['speed']:.2f} ({low:.2f} to {high:.2f})",
        *(cell for figure in figures for cell in told(figure, found["before"], found["after"])),
        found["layers"],
        f"{found['seconds']:.0f} s",
        *(int8_cells(found.get("int8"), figures[0]) if int8 else ()),
    ]


def arguments(
    description: str, extend: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """The command line of these examples: that of the benchmarks, which speeds, and a quick look at whether it runs."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--speedup", type=float, action="append", help="by default 1.5 and 2")
        parser.add_argument("--quick", action="store_true", help="a few items and nothing kept: does it run?")
        extend(parser)

    chosen = options(description, more)
    chosen.speedup = chosen.speedup or [1.5, 2.0]
    return chosen


def judged(name: str, trials: Sequence[Trial], figures: Sequence[Figure], chosen: argparse.Namespace) -> str:
    """The table of all networks and speeds, and what was said of them; printed row by row as it is found."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / f"{name}.jsonl"
    kept = path.exists() and not chosen.quick
    done = [json.loads(line) for line in path.read_text().splitlines()] if kept else []
    int8 = any(trial.inputs is not None for trial in trials)
    rows, said = [], []
    with TimingTable(None if chosen.quick else RUNS / "times.sqlite") as timings:
        for trial in trials:
            original = None
            for wanted in chosen.speedup:
                of_it = (one for one in done if (one["network"], one["wanted"]) == (trial.name, wanted))
                found = next((one for one in of_it if trial.inputs is None or one.get("int8")), None)
                if found is None:
                    original = trial.answers(trial.network) if original is None else original
                    found = tried(trial, wanted, original, timings, chosen.seconds)
                    done.append(found)
                    if not chosen.quick:
                        with path.open("a") as file:
                            file.write(json.dumps(found) + "\n")
                rows.append(row(found, figures, int8))
                said += [f"{trial.name}, ×{wanted:g}: {line}." for line in [*found["said"], found["time"]] if line]
                print(*rows[-1], sep=" | ", flush=True)
    groups = len(next(iter(done[-1]["after"].values())))
    body = table(head(figures, int8), rows)
    body += f"\n\nIntervals of 95 %; those of figures over {groups} groups, each paired with itself."
    body += "".join(f"\n\n*{line}*" for line in dict.fromkeys(said))
    return f"{body}\n\nFed {done[-1]['example']}. {done[-1]['conditions']}"


def finish(name: str, title: str, text: str, body: str, chosen: argparse.Namespace) -> None:
    """Print what was found, and publish it if that is asked for."""
    body = f"{text}\n\n{body}"
    print(body)
    if chosen.publish:
        publish(f"published-{name}", title, f"python benchmarks/published/{name}.py", body)


def folder_of(package: str) -> Path:
    """Where an installed package lies; ends the program where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: {INSTALL}")
    return Path(found.submodule_search_locations[0])


def photos(numbers: Sequence[int]) -> list[tuple[Any, int]]:
    """Photos that foolbox carries, 20 of ImageNet, by their numbers, and the labels that stand in their names."""
    from PIL import Image

    paths = sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg"))
    if len(paths) != 20:
        raise SystemExit(f"foolbox has {len(paths)} photos where there are 20: {INSTALL}")
    return [(Image.open(paths[number]).convert("RGB"), int(paths[number].stem.split("_")[2])) for number in numbers]


def grouped(groups: torch.Tensor, *columns: torch.Tensor) -> list[list[float]]:
    """Columns ``(N,)`` summed within each group, groups ``(N,)`` being numbered from 0."""
    sums = torch.zeros(int(groups.max()) + 1, len(columns), dtype=torch.float64)
    return sums.index_add_(0, groups, torch.stack([column.double() for column in columns], 1)).tolist()
