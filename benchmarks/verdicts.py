"""Simulated verdicts: never slower on a machine with noise, where what is true is known. No clock is looked at.

Shared by the tests, which hold it to its promises, and by `judging.py`, which publishes how often it errs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from lamina import Inference, LowRank, Workload
from lamina.choose.never_slower import TWINS, Forms, Pair, never_slower

LAYERS = 20
DECOMPOSED = 0.7
"""Of the network's time, what they take."""
TRIALS = 40


@dataclass
class NoisyWatch:
    """A machine with noise: of 1 % in a run of the network, of 3 % in a run of a layer, and of its own in each twin.

    Twenty layers take 0.7 of the time of the network, each its share of it dense, and so many times that in its form. The
    whole may take a toll beyond, as a share of the network's time where all are decomposed.
    """

    shares: Mapping[str, float]
    toll: float
    draw: random.Random
    placement: float
    bursts: float = 0.0
    """The share of runs that a neighbour makes up to twice as long."""
    rounds: int = 4
    pairs: int = TWINS
    """Of twins a look; at one pair, as of a slow network, every round counts for itself."""

    @property
    def at_one_pair(self) -> bool:
        return self.pairs == 1

    def true(self, forms: Forms) -> tuple[float, float]:
        saved = sum((1 - self.shares[name]) * DECOMPOSED / LAYERS for name in forms)
        return 1.0, 1.0 - saved + self.toll * len(forms) / LAYERS

    def run(self, seconds: float, noise: float) -> float:
        burst = 1 + self.draw.random() if self.draw.random() < self.bursts else 1.0
        return seconds * burst * self.draw.lognormvariate(0, noise)

    def look(self, true: tuple[float, float], noise: float) -> Pair:
        """Of each pair of twins the median of some rounds; of one pair alone these."""
        before, after = list[float](), list[float]()
        for _ in range(self.pairs):
            here = [t * self.draw.lognormvariate(0, self.placement) for t in true]
            if self.pairs == 1:
                return [self.run(here[0], noise) for _ in range(self.rounds)], [
                    self.run(here[1], noise) for _ in range(self.rounds)
                ]
            ratios = [self.run(here[0], noise) / self.run(here[1], noise) for _ in range(self.rounds)]
            before.append(here[0])
            after.append(here[0] / median(ratios))
        return before, after

    def whole(self, forms: Forms) -> list[Pair]:
        return [self.look(self.true(forms), 0.01)]

    def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
        return {name: [self.look((1.0, self.shares[name]), 0.03)] for name in forms}


@dataclass
class Simulated:
    """What came of many judgements: layers kept of each true share of time, the network's true and reported speed-ups."""

    kept: dict[float, float]
    true: list[float]
    bias: float
    covered: float


def simulated(
    shares: Sequence[float],
    toll: float = 0.0,
    placement: float = 0.0,
    bursts: float = 0.0,
    trials: int = TRIALS,
    rounds: int = 4,
    pairs: int = TWINS,
) -> Simulated:
    names = [f"layer {n}" for n in range(LAYERS)]
    of = dict(zip(names, list(shares) * (LAYERS // len(shares)), strict=True))
    chosen: Forms = dict.fromkeys(names, LowRank(2))
    kept, true, reported, covered = dict.fromkeys(shares, 0), [], [], 0
    for seed in range(trials):
        watch = NoisyWatch(of, toll, random.Random(seed), placement, bursts, rounds, pairs)
        verdict = never_slower(nn.ReLU(), {}, chosen, [Workload(torch.zeros(1))], Inference(), stopwatch=watch)
        for name in verdict.kept:
            kept[of[name]] += 1
        before, after = watch.true(verdict.kept)
        if verdict.kept:
            assert verdict.interval and verdict.speedup
            true.append(before / after)
            reported.append(verdict.speedup * after / before)
            covered += verdict.interval[0] <= true[-1] <= verdict.interval[1]
    each = trials * LAYERS / len(shares)
    return Simulated(
        {share: number / each for share, number in kept.items()},
        true,
        median(reported) - 1 if reported else 0.0,
        covered / max(len(true), 1),
    )
