"""How near the best each strategy of a search comes, and with how many scores: in spaces known whole, and in drawn ones.

    python benchmarks/strategies.py --publish

*Known*: the 4-layer network's two spaces, every configuration scored and timed in ``benchmarks/gross/four_layer.py``; twenty
limits on time, evenly over the range; the best within each is looked up. *Drawn*: spaces of sixteen layers with six forms each,
whose times do not follow their MACs, as on real machines; the score is a sum over layers, with an interaction of each pair of
neighbours that is a fifth of it, and what is believed before is that sum with a noise of a factor of two. There the best is the
knapsack's answer for the sum alone, bettered by descent from it and from all that the strategies found. Nothing here looks at a
clock.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from record import options, publish, table

import lamina
from lamina.forms import BlockTerm, Dense, Form
from lamina.goals import Milliseconds
from lamina.searches.strategies import BreadthFirst, Problem, Sampled, Solved, Strategy, neighbours
from lamina.supernet.space import Choice, Losses, Row, Space
from lamina.values import Cost, Geometry, Setting, Timing

RUNS = Path(__file__).resolve().parent / "runs" / "gross" / "four_layer.json"
STRATEGIES: dict[str, Strategy] = {
    "solved, 64 scores": Solved(),
    "solved, 256 scores": Solved(trials=256, patience=8),
    "breadth first": BreadthFirst(),
    "random, 64 scores": Sampled("random", 64),
}
EQUAL = 64
"""Scores after which all are compared."""
SETTING = Setting("cpu", "recorded", "float32", "contiguous", 1, "inference")


@dataclass(frozen=True)
class Task:
    """A space, what a row scores, what is believed before, and the limit."""

    space: Space
    score: Callable[[Row], float]
    losses: Losses
    limit: Milliseconds


def found_by(strategy: Strategy, task: Task, seed: int) -> dict[Row, float]:
    """What a strategy had scored."""
    scores: dict[Row, float] = {}

    def score(rows: Sequence[Row]) -> dict[Row, float]:
        scores.update({row: task.score(row) for row in rows})
        return {row: scores[row] for row in rows}

    strategy.explore(Problem(task.space, (task.limit,), seed, None, task.losses, score, lambda kind, trials: None))
    return scores


# ---- the 4-layer network's spaces ----


def recorded(space_name: str, recipe: str) -> Iterator[Task]:
    """The space with the published times and a supernet's losses, at twenty limits."""
    kept = json.loads(RUNS.read_text())
    ms, losses, costs = kept[f"{space_name}, ms"], kept[f"{space_name}, {recipe}, trained"], kept[f"{space_name}, costs"]
    names = list(ms)
    sizes = [sorted({int(name.split()[layer]) for name in names}) for layer in range(3)]
    columns = [(layer, size) for layer in range(3) for size in sizes[layer]]
    ones = np.array([[float(int(name.split()[layer]) == size) for layer, size in columns] for name in names])
    # Layers' times and MACs that add up to those of the networks, as a table's do.
    of_ms, of_macs, of_errors = (
        dict(zip(columns, np.linalg.lstsq(ones, np.array(values), rcond=None)[0], strict=True))
        for values in (list(ms.values()), [costs[n]["macs"] for n in names], [costs[n]["errors"] for n in names])
    )
    choices = {}
    for layer in range(3):
        geometry = Geometry("Conv2d", 64, 64, True, (3, 3), (1, 1), (1, 1), (1, 1))
        forms = sorted(sizes[layer], key=lambda size, layer=layer: of_macs[layer, size])
        cheapest = min(of_macs[layer, size] for size in forms)
        choices[f"conv{layer + 2}"] = Choice(
            geometry,
            tuple(BlockTerm(64, 64, 64 // size) for size in forms),
            tuple(
                Cost(0, round(of_macs[layer, size] - cheapest), Timing(1e-3 * of_ms[layer, size], 0.0, 9, SETTING))
                for size in forms
            ),
            Cost(0, 0, Timing(0.0, 0.0, 9, SETTING)),
        )
    space = Space(choices, Cost(0, 0, Timing(1e-9, 0.0, 9, SETTING)), SETTING)

    def score(row: Row) -> float:
        groups = (form.groups for form in space.configuration(row).values())  # type: ignore[attr-defined]
        return -float(losses[" ".join(str(64 // count) for count in groups)][0])

    believed = {
        f"conv{layer + 2}": {BlockTerm(64, 64, 64 // size): of_errors[layer, size] for size in sizes[layer]}
        for layer in range(3)
    }
    times = sorted(Milliseconds(1).of(space.cost(config)) for config in space)
    for share in np.linspace(0.03, 0.97, 20):
        yield Task(space, score, believed, Milliseconds(float(np.quantile(times, share)) * (1 + 1e-9)))


# ---- drawn spaces ----


def drawn(seed: int) -> Iterator[Task]:
    """A space of sixteen layers with six forms each, at three limits."""
    rng = np.random.default_rng(seed)
    choices: dict[str, Choice] = {}
    losses: dict[str, dict[Form, float]] = {}
    for layer in range(16):
        geometry = Geometry("Conv2d", 64, 64, True, (3, 3), (1, 1), (1, 1), (1, 1))
        forms = (*(BlockTerm(64, 64, 64 >> place) for place in range(5)), Dense())
        size = rng.lognormal(0, 0.7)
        # Times rise with the MACs on the whole, and not from step to step.
        seconds = np.sort(rng.uniform(0.3, 1.0, 6)) * rng.lognormal(0, 0.25, 6) * 1e-3
        lost = np.sort(rng.exponential(size, 6))[::-1]
        choices[f"l{layer}"] = Choice(
            geometry,
            forms,
            tuple(Cost(0, 1000 * (place + 1), Timing(float(s), 0.0, 9, SETTING)) for place, s in enumerate(seconds)),
            Cost(0, 6000, Timing(float(seconds[-1]), 0.0, 9, SETTING)),
        )
        losses[f"l{layer}"] = dict(zip(forms, map(float, lost - lost[-1]), strict=True))
    whole = sum(choice.dense.timing.median_s for choice in choices.values() if choice.dense.timing)
    space = Space(choices, Cost(0, 96_000, Timing(whole, 0.0, 9, SETTING)), SETTING)
    pairs = rng.normal(0, 1, (15, 6, 6))
    scale = 0.2 * np.mean([max(each.values()) for each in losses.values()])

    def score(row: Row) -> float:
        own = sum(losses[name][form] for name, form in space.configuration(row).items())
        return -own - scale * float(sum(pairs[i][a, b] for i, (a, b) in enumerate(itertools.pairwise(row))))

    believed = {n: {form: loss * float(rng.lognormal(0, 0.7)) for form, loss in each.items()} for n, each in losses.items()}
    draw = random.Random(seed)
    times = sorted(Milliseconds(1).of(space.cost(space.sample(draw))) for _ in range(2000))
    for share in (0.05, 0.25, 0.6):
        yield Task(space, score, believed, Milliseconds(times[int(share * len(times))]))


def descended(task: Task, start: Row) -> float:
    """The best that is reached from a row, always to the best of all neighbours within the limit."""
    row, best = start, task.score(start)
    while True:
        near = [n for n in neighbours(task.space, row) if task.space.allows(n, [task.limit])]
        top = max(near, key=task.score, default=row)
        if not task.score(top) > best:
            return best
        row, best = top, task.score(top)


def best_of(task: Task, tried: Mapping[str, dict[Row, float]]) -> float:
    """The best within the limit: looked up where the space is small, else the best of many descents."""
    space = task.space
    if space.size <= 1000:
        return max(task.score(space.row(c)) for c in space if space.allows(space.row(c), [task.limit]))
    starts = [max(scores, key=scores.__getitem__) for scores in tried.values()]
    draw = random.Random(1)
    starts += [space.row(space.sample_within(draw, [task.limit])) for _ in range(4)]
    return max(descended(task, row) for row in starts)


def rows_of(tasks: Sequence[Task]) -> list[list[str]]:
    """For each strategy: how often it misses the best, how far it stays behind, and how many scores that took."""
    gaps: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    early: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    counts: dict[str, list[int]] = {name: [] for name in STRATEGIES}
    reached: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for number, task in enumerate(tasks):
        tried = {name: found_by(strategy, task, number) for name, strategy in STRATEGIES.items()}
        best = best_of(task, tried)
        draw = random.Random(number)
        common = median(task.score(task.space.row(task.space.sample_within(draw, [task.limit]))) for _ in range(200))
        rival = max(tried["breadth first"].values())
        for name, scores in tried.items():
            span = max(best - common, 1e-12)
            gaps[name].append((best - max(scores.values())) / span)
            early[name].append((best - max(itertools.islice(scores.values(), EQUAL))) / span)
            counts[name].append(len(scores))
            first = next((n for n, score in enumerate(scores.values(), 1) if score >= rival), None)
            reached[name].append(len(tried["breadth first"]) / first if first else 0.0)
    return [
        [
            name,
            f"{mean(float(gap > 1e-9) for gap in gaps[name]):.0%}",
            f"{mean(early[name]):.3f}",
            f"{mean(gaps[name]):.3f}",
            f"{max(gaps[name]):.2f}",
            f"{mean(counts[name]):.0f}",
            f"{median(reached[name]):.1f}× in the median, never in {sum(r == 0 for r in reached[name])} of {len(tasks)}",
        ]
        for name in STRATEGIES
    ]


def main() -> None:
    chosen = options(__doc__ or "")
    spaces = {
        "4 layers, narrow cores, lamina's supernet": list(recorded("narrow", "ours")),
        "4 layers, narrow cores, the faithful supernet": list(recorded("narrow", "faithful")),
        "4 layers, full cores, lamina's supernet": list(recorded("full", "ours")),
        "4 layers, full cores, the faithful supernet": list(recorded("full", "faithful")),
        "drawn, 16 layers of 6 forms": [task for seed in range(5) for task in drawn(seed)],
    }
    head = [
        "",
        "misses the best",
        f"behind it after {EQUAL} scores",
        "in the end",
        "at worst",
        "scores",
        "fewer scores to breadth first's best",
    ]
    parts = []
    for name, tasks in spaces.items():
        part = f"**{name}**, {tasks[0].space.size:,} configurations, {len(tasks)} limits\n\n{table(head, rows_of(tasks))}"
        print(part, flush=True)
        parts.append(part)
    body = "\n\n".join(parts) + (
        "\n\n*Behind it*: the best score within the limit less the one found, as a share of what the best lies above the "
        f"median of 200 random configurations within the limit; mean over the limits. lamina {lamina.__version__}."
    )
    if chosen.publish:
        publish(
            "supernet-strategies", "How near the best each strategy comes", "python benchmarks/strategies.py --publish", body
        )


if __name__ == "__main__":
    main()
