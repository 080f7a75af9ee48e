"""One training, every speed: networks taken out of one trained supernet against networks decomposed and tuned one by one.

    python benchmarks/gross/every_speed.py          # everything that does not look at the clock; goes on where it was
    python benchmarks/gross/every_speed.py --times  # times of all networks: minutes of a quiet machine
    python benchmarks/gross/every_speed.py --publish

The demo's network, at batch 32 and eight speed-ups. Everything learns from the original's answers to the demo's 5,000 tuning
images, augmented, without labels; calibrations are of 512 of them, another draw for each seed.

    (a)   one supernet, trained for C along its nested order; each speed taken out with no training more
    (b)   a budget's plan for each speed, decomposed and tuned for C / 8
    (c)   the same, tuned for C: eight times the cost of (a)

C is eight passes over the images. (a) and (b) untrained stand beside; all on the 10,000 test images, paired. ``--recipe``
makes (a) by another draw of configurations at the same cost. ``--quick`` sees whether it runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from runs import Runs, conditions, extend, options, publish, table
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples" / "demo")]
from answers import BATCH, calibrated, right  # noqa: E402
from demo import base_network  # noqa: E402
from fashion import test_images, tuning_images  # noqa: E402
from training import Augmented  # noqa: E402

import lamina  # noqa: E402
from lamina.comparison import time_each  # noqa: E402
from lamina.measure.clock import Effort, ratio, ratio_interval  # noqa: E402
from lamina.measure.table import TimingTable  # noqa: E402

SPEEDS = (1.2, 1.5, 1.8, 2.1, 2.5, 2.9, 3.4, 4.0)
SEEDS = (0, 1, 2, 3, 4)
PASSES = 8
RATE = 1e-2
"""Of all trainings: SGD with momentum 0.9, a cosine to 0."""
RECIPES = ("order", "uniform", "sandwich")


def kept(found: Tensor) -> str:
    """Which images are told right, in hexadecimal."""
    return np.packbits(found.numpy()).tobytes().hex()


def read(text: str) -> Tensor:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    return torch.from_numpy(bits[:10_000].astype(np.float64))


class Experiment:
    """The stages for every seed, each kept."""

    def __init__(self, runs: Runs, chosen: argparse.Namespace) -> None:
        self.runs = runs
        self.model, self.x = base_network(), torch.randn(BATCH, 1, 28, 28)
        self.images, self.test = tuning_images(), test_images()
        self.speeds, self.seeds, self.passes = SPEEDS, SEEDS, PASSES
        if chosen.quick:
            self.images, self.test = self.images[:256], self.test[:1000]
            self.speeds, self.seeds, self.passes = (1.5, 3.0), (0,), 2
        self.rate = chosen.rate
        self.table = TimingTable(HERE.parent / "runs" / "gross" / "weights" / "every_speed.sqlite")

    def batches(self, seed: int) -> Augmented:
        return Augmented(self.images, 64, seed)

    def judged(self, model: nn.Module) -> str:
        return kept(right(model, self.test.images, self.test.labels))

    def elastic(self, seed: int, recipe: str) -> lamina.Supernet:
        """The supernet of a seed, trained by a recipe; ``untrained`` trains it by none."""

        def make() -> lamina.Supernet:
            calibration = calibrated(self.model, seed)
            net = lamina.make_supernet(self.model, self.x, data=calibration, timings=self.table)
            if recipe != "untrained":
                # A batch of a sandwich meets three configurations: a third of the passes cost as much.
                passes = math.ceil(self.passes / 3) if recipe == "sandwich" else self.passes
                torch.manual_seed(seed)
                options = lamina.Recipe(recipe, rate=self.rate)  # type: ignore[arg-type]
                lamina.train_supernet(net, self.batches(seed), teacher=base_network(), epochs=passes, recipe=options, seed=seed)
            return net

        return self.runs.supernet(f"{recipe}, seed {seed}", self.model, make)

    def out_of_one(self, recipe: str) -> None:
        for seed in self.seeds:
            names = [f"{recipe}, ×{speed:g}, seed {seed}" for speed in self.speeds]
            if all(name in self.runs for name in names):
                continue
            net = self.elastic(seed, recipe)
            if not net.space.timed:
                net.time(self.table)
            for name, speed in zip(names, self.speeds, strict=True):
                self.runs.get(name, lambda net=net, speed=speed: self.judged(net.at(lamina.Speedup(speed))))

    def decomposed(self, seed: int, speed: float) -> nn.Module:
        calibration = calibrated(self.model, seed)
        plan = lamina.make_plan(self.model, self.x, lamina.Speedup(speed), data=calibration, timings=self.table)
        return lamina.decompose(self.model, plan, data=calibration, check=False)

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
                        torch.manual_seed(seed)
                        lamina.finetune(
                            small,
                            self.batches(seed),
                            loss=lambda output, target: output.sum() * 0,
                            epochs=passes,
                            teacher=base_network(),
                            distillation=lamina.Distillation(weight=1.0),
                            optimizer=lambda parameters: torch.optim.SGD(
                                parameters, lr=self.rate, momentum=0.9, weight_decay=1e-4
                            ),
                            clip=1.0,
                            eval_mode=True,
                        )
                        return self.judged(small)

                    self.runs.get(f"{name}, {where}", tuned)

    def times(self, recipe: str, seconds: float) -> None:
        """Measured speed-ups of the networks of both ways, all of a seed in one run."""
        for seed in self.seeds:
            if f"speeds, seed {seed}" in self.runs:
                continue
            net = self.elastic(seed, recipe)
            if not net.space.timed:
                net.time(self.table)
            networks = [net.at(lamina.Speedup(speed)) for speed in self.speeds]
            networks += [self.decomposed(seed, speed) for speed in self.speeds]
            together = [self.model, *networks]
            effort = Effort(seconds * len(together), 6, 200, 0.005)
            dense, *others = time_each(together, lamina.values.workloads(self.x), lamina.Inference(), effort)[0]
            self.runs.put(f"speeds, seed {seed}", [[ratio(dense, o), *ratio_interval(dense, o)] for o in others])
            self.runs.put("setting", conditions(lamina.compare(self.model, self.model, self.x, seconds=0.1).setting))


def points(bits: list[Tensor]) -> float:
    return 100 * float(torch.stack(bits).mean())


def above(a: list[Tensor], b: list[Tensor]) -> str:
    """Points by which a lies above b, with a 95 % interval: over the images, and over the seeds, each paired with itself."""
    apart = 100 * (torch.stack(a) - torch.stack(b))
    by_image = float(apart.mean(0).std()) / apart.shape[1] ** 0.5
    by_seed = float(apart.mean(1).std()) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    return f"{float(apart.mean()):+.2f} ± {1.96 * math.hypot(by_image, by_seed):.2f}"


def tables(experiment: Experiment, recipe: str) -> str:
    runs, seeds = experiment.runs, experiment.seeds

    def of(name: str, speed: float) -> list[Tensor]:
        return [read(runs[f"{name}, ×{speed:g}, seed {seed}"]) for seed in seeds]

    def measured(speed: float, second: bool) -> str:
        place = experiment.speeds.index(speed) + len(experiment.speeds) * second
        found = [runs[f"speeds, seed {seed}"][place][0] for seed in seeds if f"speeds, seed {seed}" in runs]
        return f"×{mean(found):.2f}" if found else "–"

    rows = []
    for speed in experiment.speeds:
        a, b, c = of(recipe, speed), of("C / 8", speed), of("C", speed)
        bare = [f"{points(of(name, speed)):.2f}" for name in ("untrained", "none")]
        with_them = [f"{points(each):.2f}" for each in (a, b, c)]
        times = [measured(speed, second) for second in (False, True)]
        rows.append([f"×{speed:g}", *times, *bare, *with_them, above(a, b), above(a, c)])
    head = [
        "asked",
        "(a) measured",
        "(b), (c) measured",
        "(a) untrained",
        "(b) untrained",
        "(a)",
        "(b)",
        "(c)",
        "(a) − (b)",
        "(a) − (c)",
    ]
    body = table(head, rows)
    others = [
        r
        for r in RECIPES
        if r != recipe and all(f"{r}, ×{s:g}, seed {seed}" in runs for s in experiment.speeds for seed in seeds)
    ]
    if others:
        compared = [
            [
                f"×{s:g}",
                *(f"{points(of(r, s)):.2f}" for r in (recipe, *others)),
                *(above(of(recipe, s), of(r, s)) for r in others),
            ]
            for s in experiment.speeds
        ]
        body += "\n\nDraws of configurations, at equal cost:\n\n"
        body += table(["asked", recipe, *others, *(f"{recipe} − {r}" for r in others)], compared)
    before, images = (
        points([right(experiment.model, experiment.test.images, experiment.test.labels).double()]),
        experiment.images,
    )
    cost = [runs[f"{recipe}, seed {seed}, seconds"] for seed in seeds if f"{recipe}, seed {seed}, seconds" in runs]
    body += (
        f"\n\nThe original tells {before:.2f} % right. C is {experiment.passes} passes over {len(images):,} images. "
        f"To calibrate, fit, time and train one supernet took {mean(cost) / 60:.1f} minutes. "
        f"± is 95 %, over images and {len(seeds)} seeds."
    )
    return body + (f"\n\n{runs['setting']}" if "setting" in runs else "")


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        extend(parser)
        parser.add_argument("--recipe", choices=("untrained", *RECIPES), help="make (a) by this one alone")
        parser.add_argument("--rate", type=float, default=RATE)

    chosen = options(__doc__ or "", more)
    experiment = Experiment(Runs("every_speed", chosen.quick), chosen)
    if chosen.times:
        experiment.times("order", chosen.seconds / 4)
    elif not chosen.publish:
        for recipe in [chosen.recipe] if chosen.recipe else ["untrained", "order"]:
            experiment.out_of_one(recipe)
        if not chosen.recipe:
            experiment.one_by_one()
    if chosen.publish or not chosen.recipe:
        print(found := tables(experiment, "order"))
        if chosen.publish:
            publish("gross-every-speed", "One training, every speed", "python benchmarks/gross/every_speed.py --publish", found)


if __name__ == "__main__":
    main()
