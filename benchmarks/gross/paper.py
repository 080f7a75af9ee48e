"""The paper's question: does a search in a supernet of group sizes find better networks than one size everywhere?

    python benchmarks/gross/paper.py narrow            # everything that does not look at the clock; goes on where it was
    python benchmarks/gross/paper.py narrow --times    # times, and the searches within them: minutes of a quiet machine
    python benchmarks/gross/paper.py narrow            # what was found within these times, tuned
    python benchmarks/gross/paper.py narrow --publish
    python benchmarks/gross/paper.py full              # and likewise, as are vgg16 and resnet18

GroSS, arXiv 1912.00673, section 4, on Fashion-MNIST of 32×32, or on CIFAR-10 in its binary format: ``--cifar FOLDER``.
*full* and *narrow* are its 4-layer network with cores as wide as the layers' inputs and with cores of a quarter of that.

*Found against uniform*: the limit is the MACs, or the time, of a uniform configuration. It, and what a search finds within the
limit, are taken out of one supernet and tuned alike; and so are it and what loses least by the predicted losses, out of fits
that nobody trained. Five seeds of tuning, paired over the test images.

*Ranking*: sixty configurations, from the smallest groups to the largest, are tuned one by one from their own fits, with two
seeds; ρ of their losses with what each way to score says of them beforehand, and its interval by the bootstrap.

All but the faithful recipe learn from the original's answers without labels, at a gentle rate, from fits by 512 images. The
supernets cost the same. ``--quick`` sees whether it runs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import Batches, in_order, splits
from networks import four_layers, resnet_18, vgg_16
from runs import (
    MinusLoss,
    Runs,
    above,
    conditions,
    extend,
    judged,
    options,
    points,
    publish,
    read,
    sizes,
    table,
    taught,
    told,
    trained,
)
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from answers import calibrated, drawn

import lamina
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort
from lamina.supernet.space import Configuration
from lamina.values import Inference, Workload

BATCH = 64
"""Of the example: times are those of so many images."""
SEEDS, PAIR = (0, 1, 2, 3, 4), (0, 1)
RATE = 1e-3
RECIPES = {
    "uniform": lamina.Recipe("uniform", rate=RATE),
    "order": lamina.Recipe("order", rate=RATE),
    "sandwich": lamina.Recipe("sandwich", rate=RATE),
    "faithful": lamina.Recipe.faithful(),
}


@dataclass(frozen=True)
class Case:
    """A network, its space, and how long everything is trained: images and passes over them."""

    title: str
    network: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    uniform: tuple[int, ...]
    """Sizes whose cost is a limit."""
    base: tuple[int, int]
    supernet: tuple[int, int]
    tuned: tuple[int, int]
    widths: float = 1.0
    rate: float = 0.05
    """Of the base's training."""
    drawn: int = 60
    scored: int = 2_000
    tested: int = 10_000


SMALL, LARGE = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 32)
CASES = {
    "narrow": Case("4 layers, narrow cores", four_layers, SMALL, (8, 4, 2), (50_000, 12), (50_000, 6), (20_000, 2), 0.25, 0.1),
    "full": Case("4 layers", four_layers, SMALL, (32, 16, 8, 4), (50_000, 12), (50_000, 6), (20_000, 2), 1.0, 0.1),
    "vgg16": Case("VGG-16", vgg_16, LARGE, (16, 4), (50_000, 6), (20_000, 3), (5_000, 1), scored=1_000),
    "resnet18": Case("ResNet-18", resnet_18, LARGE, (16, 4), (50_000, 6), (20_000, 3), (5_000, 1), scored=1_000),
}


class Experiment:
    """The stages of a case, each kept."""

    def __init__(self, name: str, chosen: argparse.Namespace) -> None:
        case = CASES[name]
        if chosen.quick:
            case = replace(case, base=(1024, 1), supernet=(128, 3), tuned=(64, 1), drawn=4, scored=64, tested=200)
            case = replace(case, uniform=case.uniform[:1])
        data, ending = splits(chosen.cifar), "-cifar" if chosen.cifar else ""
        self.case, self.data = case, data
        self.runs = Runs(f"paper-{name}{ending}", chosen.quick)
        self.seeds = SEEDS[:1] if chosen.quick else SEEDS
        self.known = data.validation.inputs(data.validation.pixels[:5_000])
        """Unlabelled, for calibrations; nothing is trained on these, and configurations are scored on others."""
        self.validation = replace(data.validation, pixels=data.validation.pixels[5_000:], labels=data.validation.labels[5_000:])
        self.test = data.test.first(case.tested)

    @functools.cached_property
    def base(self) -> nn.Module:
        images, epochs = self.case.base

        def train(model: nn.Module) -> list[float]:
            data = self.data.training.first(images)
            return judged(
                trained(model, data, epochs=epochs, batch=64, rate=self.case.rate, seed=0, from_scratch=True), self.test
            )

        return self.runs.base(self.case.network, train)

    @property
    def example(self) -> Tensor:
        return self.known[:BATCH]

    @functools.cached_property
    def calibration(self) -> lamina.Calibration:
        return calibrated(self.base, 0, self.known)

    # ---- supernets ----

    @functools.cache  # noqa: B019 - an experiment lives as long as the program
    def fits(self, faithful: bool) -> lamina.Supernet:
        """A supernet before any training: by the calibration, or independent fits of the weights, as in the paper."""

        def make() -> lamina.Supernet:
            how: dict[str, Any] = {"method": "faithful"} if faithful else {"data": self.calibration}
            return lamina.make_supernet(self.base, self.example, group_sizes=self.case.sizes, widths=self.case.widths, **how)

        return self.runs.supernet("faithful fits" if faithful else "fits", self.base, make)

    @functools.cache  # noqa: B019
    def supernet(self, recipe: str) -> lamina.Supernet:
        """A trained supernet."""

        def make() -> lamina.Supernet:
            net = copy.deepcopy(self.fits(recipe == "faithful"))
            images, passes = self.case.supernet
            learnt: dict[str, Any] = {"loss": F.cross_entropy}
            if recipe != "faithful":
                learnt = {"teacher": self.base, "distillation": lamina.Distillation(weight=1.0)}
            torch.manual_seed(0)
            lamina.train_supernet(
                net,
                Batches(self.data.training.first(images), 64, seed=0),
                # A batch of a sandwich meets three configurations: a third of the passes cost as much.
                epochs=math.ceil(passes / 3) if recipe == "sandwich" else passes,
                recipe=RECIPES[recipe],
                precision="bfloat16",
                **learnt,
            )
            return net

        return self.runs.supernet(recipe, self.base, make)

    @functools.cached_property
    def score(self) -> MinusLoss:
        """By the loss on validation images; batch norms know 512 others in each configuration."""
        return MinusLoss(list(in_order(self.validation.first(self.case.scored), 250)), drawn(0, self.known))

    def configuration(self, written: str) -> Configuration:
        """The configuration of some group sizes, written layer by layer."""
        pairs = zip(self.fits(False).space.forms.items(), written.split(), strict=True)
        return {name: next(form for form in forms if sizes({name: form}) == size) for (name, forms), size in pairs}

    def taken_out(self, net: lamina.Supernet, written: str) -> nn.Module:
        return net.extract(self.configuration(written), recalibration=drawn(0, self.known))

    def tuned(self, net: lamina.Supernet, written: str, seed: int) -> tuple[float, str]:
        """Loss on the test images, and which are told right, of a configuration taken out and tuned."""
        images, passes = self.case.tuned
        batches = Batches(self.data.training.first(images), 64, seed)
        model = self.taken_out(net, written).requires_grad_(True)
        return told(taught(model, batches, self.base, passes=passes, rate=RATE, seed=seed, precision="bfloat16"), self.test)

    # ---- ranking ----

    def ranked(self) -> list[str]:
        """The configurations that are tuned one by one: from one whose groups are small to one whose groups are large."""

        def draw() -> list[str]:
            draws, forms, found = random.Random(0), self.fits(False).space.forms, []
            for share in itertools.cycle(np.linspace(0, 1, self.case.drawn)):
                config = {name: each[sum(draws.random() < share for _ in each[1:])] for name, each in forms.items()}
                if (written := sizes(config)) not in found:
                    found.append(written)
                if len(found) == self.case.drawn:
                    return found
            raise AssertionError

        return self.runs.get("ranked", draw)

    def scorers(self) -> Iterator[tuple[str, Callable[[], list[float]]]]:
        """What says beforehand how a configuration will do; the higher the better."""

        def by(net: Callable[[], lamina.Supernet]) -> Callable[[], list[float]]:
            return lambda: [float(s) for s in self.score.score_many(net(), list(map(self.configuration, self.ranked())))]

        def summed(losses: Callable[[], Mapping[str, Mapping[Any, float]]]) -> Callable[[], list[float]]:
            def sums() -> list[float]:
                each = losses()
                configs = map(self.configuration, self.ranked())
                return [-sum(each[name][form] for name, form in config.items()) for config in configs]

            return sums

        for recipe in RECIPES:
            yield f"supernet, {recipe}", by(functools.partial(self.supernet, recipe))
        yield "nothing trained: loss of fits by the calibration", by(lambda: self.fits(False))
        yield "nothing trained: loss of faithful fits", by(lambda: self.fits(True))
        yield "nothing run: predicted losses", summed(lambda: self.fits(False).losses)
        yield "nothing run: squared weight errors", summed(lambda: lamina.weight_errors(self.fits(True)))
        yield (
            "nothing run: MACs",
            lambda: [float(self.fits(False).space.cost(self.configuration(c)).macs) for c in self.ranked()],
        )
        yield (
            "nothing run: logarithms of the group sizes",
            lambda: [sum(math.log(int(s)) for s in c.split()) for c in self.ranked()],
        )

    def ranking(self) -> None:
        for name, make in self.scorers():
            self.runs.get(f"scored by {name}", make)
        for seed in PAIR:
            for config in self.ranked():
                self.runs.get(
                    f"alone, {config}, seed {seed}", lambda config=config, seed=seed: self.tuned(self.fits(False), config, seed)
                )

    # ---- found against uniform ----

    def limits(self) -> list[tuple[str, int]]:
        """The limits there are: on time once times are taken."""
        by = ("macs", "ms") if "setting" in self.runs else ("macs",)
        return list(itertools.product(by, self.case.uniform))

    def found(self, by: str, size: int) -> dict[str, Any]:
        """For the cost of a uniform configuration: it, what the search finds, and what loses least by the predicted losses."""

        def make() -> dict[str, Any]:
            net, fits = self.supernet("uniform"), self.fits(False)
            uniform = " ".join([str(size)] * len(net.space))
            cost = net.space.cost(self.configuration(uniform))
            limit: Any = lamina.Macs(float(cost.macs))
            if by == "ms":
                net.time(self.runs.weights("timings.sqlite"))
                fits.time(self.runs.weights("timings.sqlite"))
                limit = lamina.Milliseconds(net.space.cost(self.configuration(uniform)).timing.median_ms)
            result = lamina.search(net, self.score, limit=limit)
            return {
                "limit": str(limit),
                "uniform": uniform,
                "searched": sizes(result.best.config),
                "solved": sizes(fits.within(limit)),
                "scored": len(result.trials),
            }

        return self.runs.get(f"found, {by} {size}", make)

    def pairs(self) -> None:
        """Every network of the table: untrained, and tuned with each seed."""
        for by, size in self.limits():
            found = self.found(by, size)
            for start, names in (("uniform", ("uniform", "searched")), ("fits", ("uniform", "solved"))):
                net = self.supernet("uniform") if start == "uniform" else self.fits(False)
                for config in dict.fromkeys(found[name] for name in names):
                    self.runs.get(f"{start}, {config}, as it is", lambda c=config, n=net: told(self.taken_out(n, c), self.test))
                    for seed in self.seeds:
                        self.runs.get(f"{start}, {config}, seed {seed}", lambda c=config, n=net, s=seed: self.tuned(n, c, s))

    def times(self, seconds: float) -> None:
        """The searches within a time, and whole networks in one run: all of a small space, else those of the table."""
        workload, net = Workload(self.example), self.fits(False)
        self.runs.put("setting", conditions(whole_setting(self.base, workload, Inference())))
        named = {self.found(by, size)[n] for by, size in self.limits() for n in ("uniform", "searched", "solved")}
        if self.small:
            named = set(map(sizes, net.space))
        networks = [self.base, *(net.extract(self.configuration(config)) for config in sorted(named))]
        taken = time_each(networks, [workload], Inference(), Effort(seconds * len(networks), 9, 200))[0]
        names = ["original", *sorted(named)]
        self.runs.put("whole", {name: round(1e3 * median(each), 4) for name, each in zip(names, taken, strict=True)})

    @property
    def small(self) -> bool:
        """Whether each configuration of the space can be scored and timed."""
        return self.fits(False).space.size <= 1000

    def all_scores(self) -> None:
        """What is known of every configuration of a small space, to try strategies on."""
        net = self.fits(False)
        configs = {sizes(config): config for config in net.space}
        for recipe in ("uniform", "faithful"):

            def scores(recipe: str = recipe) -> dict[str, float]:
                each = self.score.score_many(self.supernet(recipe), list(configs.values()))
                return {name: float(score) for name, score in zip(configs, each, strict=True)}  # type: ignore[arg-type]

            self.runs.get(f"all, {recipe}", scores)
        self.runs.get("all, macs", lambda: {name: net.space.cost(config).macs for name, config in configs.items()})
        lost = net.losses
        self.runs.get(
            "all, predicted", lambda: {name: sum(lost[n][f] for n, f in config.items()) for name, config in configs.items()}
        )


def rho(a: Sequence[float], b: Sequence[float]) -> str:
    """Spearman's, with a 95 % interval by the bootstrap over the configurations."""
    draws, x, y = np.random.default_rng(0), np.array(a), np.array(b)
    picks = (draws.integers(0, len(x), len(x)) for _ in range(1000))
    low, high = np.nanquantile([spearmanr(x[pick], y[pick]).statistic for pick in picks], [0.025, 0.975])
    return f"{spearmanr(x, y).statistic:.2f} ({low:.2f} to {high:.2f})"


def ranking_table(experiment: Experiment) -> str:
    runs, ranked = experiment.runs, experiment.ranked()
    each = [[runs[f"alone, {config}, seed {seed}"] for config in ranked] for seed in PAIR]
    losses = [[loss for loss, _ in run] for run in each]
    shares = [[points([read(bits)]) for _, bits in run] for run in each]
    loss, right = np.mean(losses, axis=0), np.mean(shares, axis=0)
    rows = [
        [name, rho(runs[f"scored by {name}"], -loss), rho(runs[f"scored by {name}"], right)] for name, _ in experiment.scorers()
    ]
    rows.append(["**ceiling**: one seed against the other", rho(*losses), rho(*shares)])
    head = ["scored by", "ρ with the loss", "ρ with the accuracy"]
    return (
        f"**Ranking**: {len(ranked)} configurations tuned one by one from fits by the calibration, mean of {len(PAIR)} seeds: "
        f"test accuracy from {right.min():.2f} to {right.max():.2f} %.\n\n{table(head, rows)}"
    )


def found_table(experiment: Experiment) -> str:
    runs, seeds = experiment.runs, experiment.seeds
    whole, rows = runs.all().get("whole", {}), []

    def bits(start: str, config: str) -> list[Tensor]:
        return [read(runs[f"{start}, {config}, seed {seed}"][1]) for seed in seeds]

    def cell(start: str, config: str) -> str:
        untrained = points([read(runs[f"{start}, {config}, as it is"][1])])
        ms = f", {whole[config]:.2f} ms" if config in whole else ""
        macs = experiment.fits(False).space.cost(experiment.configuration(config)).macs / BATCH
        return (
            f"[{config.replace(' ', ', ')}] {macs / 1e6:.2f} M{ms}: {untrained:.2f} then **{points(bits(start, config)):.2f}**"
        )

    for by, size in experiment.limits():
        found = experiment.found(by, size)
        rows.append([f"uniform {size}: {found['limit']}"])
        for start, name in (("uniform", "searched"), ("fits", "solved")):
            one, other = found[name], found["uniform"]
            same = "the same" if one == other else above(bits(start, one), bits(start, other))
            rows[-1] += [cell(start, other), cell(start, one), same]
    head = [
        "limit",
        "uniform, from the supernet",
        "searched",
        "searched − uniform",
        "uniform, from the fits",
        "solved",
        "solved − uniform",
    ]
    return (
        f"**Found against uniform**: test accuracy as taken out, and tuned, mean of {len(seeds)} seeds.\n\n{table(head, rows)}"
    )


def report(experiment: Experiment) -> str:
    case, runs = experiment.case, experiment.runs
    seconds = {name: runs[f"{name}, seconds"] for name in ("fits", "faithful fits", *RECIPES) if f"{name}, seconds" in runs}
    whole = f", {runs['whole']['original']:.2f} ms for {BATCH} images" if "whole" in runs else ""
    took = ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    about = (
        f"{runs['setting'] + ' ' if 'setting' in runs else ''}{experiment.data.name}. The original, trained on "
        f"{case.base[0]:,} images for {case.base[1]} epochs, has {100 * runs['base'][1]:.2f} % on the {case.tested:,} test "
        f"images{whole}. Supernets saw {case.supernet[0]:,} images {case.supernet[1]} times, one configuration a batch of 64; "
        f"a network is tuned on {case.tuned[0]:,} images, {case.tuned[1]} times, at a rate of {RATE:g}; scores are losses on "
        f"{case.scored:,} validation images. All under autocast to bfloat16. Seconds: {took}."
    )
    return "\n\n".join([about, found_table(experiment), ranking_table(experiment)])


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        extend(parser)
        parser.add_argument("case", choices=CASES)
        parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10 in its binary format")

    chosen = options(__doc__ or "", more)
    experiment = Experiment(chosen.case, chosen)
    if chosen.times:
        return experiment.times(chosen.seconds / 4)
    if not chosen.publish:
        experiment.pairs()
        experiment.ranking()
        if experiment.small:
            experiment.all_scores()
    print(found := report(experiment))
    if chosen.publish:
        command = f"python benchmarks/gross/paper.py {chosen.case} --publish"
        publish(f"gross-paper-{chosen.case}", f"GroSS: {experiment.case.title}", command, found)


if __name__ == "__main__":
    main()
