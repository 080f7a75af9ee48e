"""One training, every speed: networks taken out of one trained supernet against networks decomposed and tuned one by one.

    python benchmarks/gross/every_speed.py          # everything that does not look at the clock; goes on where it was
    python benchmarks/gross/every_speed.py --times  # times of all networks: minutes of a quiet machine
    python benchmarks/gross/every_speed.py --publish
    python benchmarks/gross/every_speed.py --network resnet18   # and likewise

The demo's network, and a ResNet-18 of full width for 32 px, at batch 32 and eight speed-ups. Everything learns from the
original's answers to 5,000 images that it was not trained on, augmented, without labels; calibrations are of 512 of them,
another draw for each seed.

    (a)   one supernet, trained for C along its nested order; each speed taken out with no training more
    (b)   a budget's plan for each speed, decomposed and tuned for C / 8
    (c)   the same, tuned for C: eight times the cost of (a)

C is eight passes over the images. (a) and (b) untrained stand beside; all on the 10,000 test images, paired. ``--recipe``
makes (a) in another way at the same cost: by other draws of configurations, held against the original's features too, with
batch norm statistics of its own for each step of the order, or of forms of one kind alone; with ``--times`` it measures the
networks of that way. ``--quick`` sees whether it runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from data import Batches, in_order, splits
from networks import resnet_18
from runs import (
    Runs,
    above,
    conditions,
    extend,
    judged,
    kept,
    options,
    points,
    publish,
    read,
    table,
    taught,
    trained,
)
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples" / "demo")]
from answers import BATCH, calibrated, drawn, right  # noqa: E402
from demo import base_network  # noqa: E402
from fashion import test_images, tuning_images  # noqa: E402
from kinds import KINDS, only  # noqa: E402
from training import Augmented  # noqa: E402

import lamina  # noqa: E402
from lamina.comparison import time_each  # noqa: E402
from lamina.measure.clock import Effort, ratio, ratio_interval  # noqa: E402
from lamina.measure.table import TimingTable  # noqa: E402

SPEEDS = (1.2, 1.5, 1.8, 2.1, 2.5, 2.9, 3.4, 4.0)
SEEDS = (0, 1, 2, 3, 4)
PASSES = 8
RATE = 1e-3
"""Of all trainings: SGD with momentum 0.9, a cosine to 0."""
FEATURES = 0.3
"""Weight of all features together, beside a nat of the answers."""
ALONE = tuple(f"order, {kind}" for kind in KINDS if kind != "mixed")
OTHERS = ("uniform", "sandwich", "order, features", "order, statistics")


@dataclass(frozen=True)
class Case:
    """A trained network, images that it was not trained on, and those that judge."""

    base: Callable[[], nn.Module]
    images: Tensor
    test: tuple[Tensor, Tensor]
    batches: Callable[[int], Any]
    """From a seed to batches of 64 augmented images, with labels that nobody looks at."""


def of_demo(runs: Runs, quick: bool) -> Case:
    images, test = tuning_images(), test_images()
    if quick:
        images, test = images[:256], test[:1000]
    return Case(base_network, images.images, (test.images, test.labels), lambda seed: Augmented(images, 64, seed))


def of_resnet18(runs: Runs, quick: bool) -> Case:
    data = splits()
    epochs, known = (1, data.training.first(256)) if quick else (6, data.training)
    tuned, test = (data.validation.first(256), data.test.first(1000)) if quick else (data.validation.first(5000), data.test)

    def base() -> nn.Module:
        def train(model: nn.Module) -> list[float]:
            return judged(trained(model, known, epochs=epochs, batch=64, rate=0.05, seed=0, from_scratch=True), test)

        return runs.base(resnet_18, train)

    seen, labels = (torch.cat(parts) for parts in zip(*in_order(test), strict=True))
    return Case(base, tuned.inputs(tuned.pixels), (seen, labels), lambda seed: Batches(tuned, 64, seed))


CASES = {"demo": of_demo, "resnet18": of_resnet18}


class Experiment:
    """The stages for every seed, each kept."""

    def __init__(self, name: str, runs: Runs, chosen: argparse.Namespace) -> None:
        self.runs = runs
        self.case = CASES[name](runs, chosen.quick)
        self.model = self.case.base().eval()
        self.x = self.case.images[:BATCH]
        self.speeds, self.seeds, self.passes = SPEEDS, SEEDS, PASSES
        if chosen.quick:
            self.speeds, self.seeds, self.passes = (1.5, 3.0), (0,), 2
        self.rate = chosen.rate
        self.table = TimingTable(HERE.parent / "runs" / "gross" / "weights" / f"{runs.name}.sqlite")

    def calibrated(self, seed: int) -> lamina.Calibration:
        return calibrated(self.model, seed, self.case.images)

    def right(self, model: nn.Module) -> Tensor:
        return right(model, *self.case.test)

    def judged(self, model: nn.Module) -> str:
        return kept(self.right(model))

    def elastic(self, seed: int, way: str) -> lamina.Supernet:
        """The supernet of a seed, trained in one way; ``untrained`` trains it in none."""
        draws, _, more = way.partition(", ")

        def make() -> lamina.Supernet:
            with only(KINDS.get(more, KINDS["mixed"])):
                net = lamina.make_supernet(self.model, self.x, data=self.calibrated(seed), timings=self.table)
            if way != "untrained":
                # A batch of a sandwich meets three configurations: a third of the passes cost as much.
                passes = math.ceil(self.passes / 3) if draws == "sandwich" else self.passes
                torch.manual_seed(seed)
                names = tuple(net.series) if more == "features" else ()
                lamina.train_supernet(
                    net,
                    self.case.batches(seed),
                    teacher=self.case.base(),
                    epochs=passes,
                    recipe=lamina.Recipe(draws, rate=self.rate),  # type: ignore[arg-type]
                    distillation=lamina.Distillation(
                        weight=1.0, features=names, feature_weight=FEATURES / max(len(names), 1), relative=True
                    ),
                    seed=seed,
                )
            return net

        if more != "statistics":
            return self.runs.supernet(f"{way}, seed {seed}", self.model, make)
        net = self.elastic(seed, draws)
        net.recalibrate(drawn(seed, self.case.images))
        return net

    def out_of_one(self, way: str) -> None:
        for seed in self.seeds:
            names = [f"{way}, ×{speed:g}, seed {seed}" for speed in self.speeds]
            if all(name in self.runs for name in names):
                continue
            net = self.elastic(seed, way)
            if not net.space.timed:
                net.time(self.table)
            for name, speed in zip(names, self.speeds, strict=True):

                def scored(net: lamina.Supernet = net, speed: float = speed, name: str = name) -> str | None:
                    goal = lamina.Speedup(speed)
                    try:
                        config = net.within(goal)
                    except lamina.SearchError as error:  # out of reach of one kind
                        print(f"{name}: {error}")
                        return None
                    net.plan(config, goal=goal).save(self.plan_at(name))
                    return self.judged(net.at(goal))

                self.runs.get(name, scored)

    def plan_at(self, name: str) -> Path:
        """Where the plan of a network is kept: those that are timed are those that were scored."""
        return self.runs.weights(f"{name}.plan.json")

    def decomposed(self, seed: int, speed: float) -> nn.Module:
        calibration, path = self.calibrated(seed), self.plan_at(f"budget, ×{speed:g}, seed {seed}")
        if not path.exists():
            goal = lamina.Speedup(speed)
            lamina.make_plan(self.model, self.x, goal, data=calibration, timings=self.table).save(path)
        return lamina.decompose(self.model, lamina.Plan.read(path), data=calibration, check=False)

    def one_by_one(self) -> None:
        for seed in self.seeds:
            for speed in self.speeds:
                where = f"×{speed:g}, seed {seed}"
                if f"C, {where}" in self.runs:
                    continue
                small = self.decomposed(seed, speed)
                self.runs.get(f"none, {where}", lambda small=small: self.judged(small))
                state = {name: value.clone() for name, value in small.state_dict().items()}
                for name, passes in (("C / 8", max(self.passes // 8, 1)), ("C", self.passes)):

                    def tuned(small: nn.Module = small, passes: int = passes, seed: int = seed, state: Any = state) -> str:
                        small.load_state_dict(state)
                        batches, teacher = self.case.batches(seed), self.case.base()
                        taught(small, batches, teacher, passes=passes, rate=self.rate, seed=seed)
                        return self.judged(small)

                    self.runs.get(f"{name}, {where}", tuned)

    def times(self, way: str, seconds: float) -> None:
        """Measured speed-ups of the networks of a way, all of a seed in one run; beside (a) those of (b) and (c)."""
        for seed in self.seeds:
            if (name := f"speeds, {way}, seed {seed}") in self.runs:
                continue
            net = self.elastic(seed, way)
            paths = [self.plan_at(f"{way}, ×{speed:g}, seed {seed}") for speed in self.speeds]
            plans = [lamina.Plan.read(path) for path in paths if path.exists()]
            networks = [net.extract({layer: plan.layers[layer].form for layer in net.series}) for plan in plans]
            if way == "order":
                networks += [self.decomposed(seed, speed) for speed in self.speeds]
            together = [self.model, *networks]
            effort = Effort(seconds * len(together), 6, 200, 0.005)
            dense, *others = time_each(together, lamina.values.workloads(self.x), lamina.Inference(), effort)[0]
            self.runs.put(name, [[ratio(dense, other), *ratio_interval(dense, other)] for other in others])
            self.runs.put("setting", conditions(lamina.compare(self.model, self.model, self.x, seconds=0.1).setting))


def tables(experiment: Experiment, way: str) -> str:
    runs, seeds, speeds = experiment.runs, experiment.seeds, experiment.speeds

    def of(name: str, speed: float) -> list[Tensor] | None:
        """Which images are told right, by seed; None where the speed is out of reach, or nothing was run."""
        found = [runs.all().get(f"{name}, ×{speed:g}, seed {seed}") for seed in seeds]
        return [read(each) for each in found] if all(found) else None

    def right(name: str, speed: float) -> str:
        return f"{points(found):.2f}" if (found := of(name, speed)) else "–"

    def apart(a: str, b: str, speed: float) -> str:
        one, other = of(a, speed), of(b, speed)
        return above(one, other) if one and other else "–"

    def measured(name: str, speed: float, second: bool = False) -> str:
        place = speeds.index(speed) + len(speeds) * second
        keys = [key for seed in seeds if (key := f"speeds, {name}, seed {seed}") in runs]
        found = [runs[key][place][0] for key in keys if place < len(runs[key])]
        return f"×{mean(found):.2f}" if found else "–"

    rows = []
    for speed in speeds:
        times = [measured(way, speed, second) for second in (False, True)]
        bare = [right(name, speed) for name in ("untrained", "none")]
        trained_ones = [right(name, speed) for name in (way, "C / 8", "C")]
        rows.append([f"×{speed:g}", *times, *bare, *trained_ones, *(apart(way, name, speed) for name in ("C / 8", "C"))])
    head = ["asked", "(a) measured", "(b), (c) measured", "(a) untrained", "(b) untrained"]
    parts = [table([*head, "(a)", "(b)", "(c)", "(a) − (b)", "(a) − (c)"], rows)]
    if others := [w for w in OTHERS if all(of(w, s) for s in speeds)]:
        compared = [
            [f"×{s:g}", right(way, s), *(cell for w in others for cell in (right(w, s), apart(way, w, s)))] for s in speeds
        ]
        head = ["asked", way, *(cell for w in others for cell in (w, f"{way} − {w}"))]
        parts += ["Other ways to train it, at equal cost:", table(head, compared)]
    if kinds := [w for w in ALONE if of(w, speeds[0])]:
        compared = [
            [
                f"×{s:g}",
                f"{measured(way, s)}: {right(way, s)}",
                *(cell for w in kinds for cell in (f"{measured(w, s)}: {right(w, s)}", apart(way, w, s))),
            ]
            for s in speeds
        ]
        head = ["asked", "all kinds", *(cell for w in kinds for cell in (w.partition(", ")[2], "all kinds above it by"))]
        parts += ["Supernets of one kind of form alone, beside staying dense, trained alike:", table(head, compared)]
    before, images = points([read(experiment.judged(experiment.model), len(experiment.case.test[1]))]), experiment.case.images
    cost = [runs[key] for seed in seeds if (key := f"{way}, seed {seed}, seconds") in runs]
    minutes = f"To calibrate, fit, time and train one supernet took {mean(cost) / 60:.1f} minutes. " if cost else ""
    parts.append(
        f"The original tells {before:.2f} % right. C is {experiment.passes} passes over {len(images):,} images. {minutes}"
        f"± is 95 %, over images and {len(seeds)} seeds."
    )
    return "\n\n".join([*parts, *([runs["setting"]] if "setting" in runs else [])])


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        extend(parser)
        parser.add_argument("--network", choices=CASES, default="demo")
        parser.add_argument("--recipe", choices=("untrained", "order", *OTHERS, *ALONE), help="(a) in this way alone")
        parser.add_argument("--rate", type=float, default=RATE)

    chosen = options(__doc__ or "", more)
    name = "every_speed" if chosen.network == "demo" else f"every_speed-{chosen.network}"
    experiment = Experiment(chosen.network, Runs(name, chosen.quick), chosen)
    if chosen.times:
        experiment.times(chosen.recipe or "order", chosen.seconds / 4)
    elif not chosen.publish:
        for way in [chosen.recipe] if chosen.recipe else ["untrained", "order"]:
            experiment.out_of_one(way)
        if not chosen.recipe:
            experiment.one_by_one()
    if chosen.publish or not chosen.recipe:
        print(found := tables(experiment, "order"))
        if chosen.publish:
            of = {"demo": "the demo's network", "resnet18": "a ResNet-18"}[chosen.network]
            command = f"python benchmarks/gross/every_speed.py --network {chosen.network} --publish"
            publish(f"gross-{name.replace('_', '-')}", f"One training, every speed: {of}", command, found)


if __name__ == "__main__":
    main()
