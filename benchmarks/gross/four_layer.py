"""The 4-layer network of GroSS, all its configurations: what a supernet's scores are worth, and what is found with them.

    python benchmarks/gross/four_layer.py --threads 1        # everything that does not look at the clock; goes on where it was
    python benchmarks/gross/four_layer.py --times            # times of layers and networks: a minute of a quiet machine
    python benchmarks/gross/four_layer.py --threads 1        # what is found within these times, fine-tuned
    python benchmarks/gross/four_layer.py --publish

Two spaces: *full* is the paper's (cores as wide as the layers' inputs, 252 configurations), *narrow* has cores of a quarter of
that (80), where accuracies spread. For each: a supernet by the faithful recipe and one by lamina's, all configurations scored
before and after training, and 24 of them trained one by one from their own fits. Then, for the MACs and the time of each
uniform configuration, what each way of choosing finds is tuned, and the uniform one too. ``--share 1/2`` and ``2/2`` in two
processes halve the fine-tuning. CIFAR-10 in its binary format: ``--cifar FOLDER``.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import Batches, Images, Splits, in_order, splits
from networks import four_layers
from runs import Runs, conditions, extend, judged, options, publish, save_plot, sizes, spread, table, trained
from scipy.stats import kendalltau, rankdata, spearmanr
from torch import Tensor, nn

import lamina
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort
from lamina.values import Inference, Workload

SIZES = (1, 2, 4, 8, 16, 32, 64)
SPACES = {"narrow": 0.25, "full": 1.0}
UNIFORM = {"full": (32, 16, 8, 4, 1), "narrow": (8, 4, 2, 1)}
SURVIVORS = 10
BATCH = 64  # of the example: costs and times are those of 64 images


@dataclass(frozen=True)
class Budget:
    base: tuple[int, int] = (50_000, 4)  # images, epochs
    supernet: tuple[int, int] = (50_000, 12)  # of one configuration a batch; a third where a batch meets three
    tuned: tuple[int, int] = (20_000, 2)
    rate: float = 1e-2  # of fine-tuning
    scored: int = 5_000
    alone: int = 24  # configurations trained one by one
    # Images, epochs and rate of these: in the narrow space they begin far from where they end.
    trained: tuple[tuple[str, tuple[int, int, float]], ...] = (("narrow", (50_000, 4, 3e-2)), ("full", (20_000, 3, 1e-2)))
    tested: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Budget(
    (1_000, 1), (256, 3), (128, 1), 1e-2, 100, 4, (("narrow", (128, 1, 1e-2)), ("full", (128, 1, 1e-2))), 100, (0, 1)
)
RECIPES = {"faithful": "faithful", "ours": "nested"}


class Experiment:
    """The stages for both spaces, each kept."""

    def __init__(self, runs: Runs, data: Splits, budget: Budget) -> None:
        self.runs, self.data, self.budget = runs, data, budget

    @functools.cached_property
    def base(self) -> nn.Module:
        images, epochs = self.budget.base

        def train(model: nn.Module) -> list[float]:
            data = self.data.training.first(images)
            return judged(trained(model, data, epochs=epochs, batch=128, rate=0.1, seed=0, from_scratch=True), self.test)

        return self.runs.base(four_layers, train)

    @property
    def example(self) -> Tensor:
        return self.data.validation.inputs(self.data.validation.pixels[:BATCH])

    @property
    def test(self) -> Images:
        return self.data.test.first(self.budget.tested)

    def fits(self, space: str, recipe: str) -> lamina.Supernet:
        """A supernet before any training."""

        def make() -> lamina.Supernet:
            return lamina.make_supernet(
                self.base, self.example, group_sizes=SIZES, widths=SPACES[space], method=RECIPES[recipe]
            )

        return self.runs.supernet(f"{space}-{recipe}-fits", self.base, make)

    def supernet(self, space: str, recipe: str) -> lamina.Supernet:
        """A trained supernet."""

        def make() -> lamina.Supernet:
            net = self.fits(space, recipe)
            images, epochs = self.budget.supernet
            chosen = lamina.Recipe.faithful() if recipe == "faithful" else lamina.Recipe()
            lamina.train_supernet(
                net,
                Batches(self.data.training.first(images), 128, seed=0),
                loss=F.cross_entropy,
                epochs=epochs if chosen.draws == "uniform" else epochs // 3,
                recipe=chosen,
                teacher=None if recipe == "faithful" else self.base,
                precision="bfloat16",
            )
            return net

        return self.runs.supernet(f"{space}-{recipe}", self.base, make)

    def scores(self, space: str, recipe: str, trained: bool) -> dict[str, list[float]]:
        """Loss and accuracy of every configuration on validation images."""
        images = self.data.validation.first(self.budget.scored)

        def make() -> dict[str, list[float]]:
            return judged_all(self.supernet(space, recipe) if trained else self.fits(space, recipe), images)

        return self.runs.get(f"{space}, {recipe}, {'trained' if trained else 'fits'}", make)

    def tuned(self, space: str, start: str, config: str, seed: int) -> list[float]:
        """Loss and accuracy on the test images of a configuration taken out and fine-tuned.

        It starts from a trained supernet, or, with ``fits``, from the independent fits of its own sizes; with ``alone`` too,
        and is then trained until it is what a ranking should be judged by.
        """

        def make() -> list[float]:
            net = self.fits(space, "faithful") if start in ("fits", "alone") else self.supernet(space, start)
            model = net.extract(by_sizes(net)[config]).requires_grad_(True)
            images, epochs, rate = (
                dict(self.budget.trained)[space] if start == "alone" else (*self.budget.tuned, self.budget.rate)
            )
            data = self.data.training.first(images)
            return judged(trained(model, data, epochs=epochs, batch=128, rate=rate, seed=seed), self.test)

        return self.runs.get(_key(space, start, config, seed), make)

    def alone(self, space: str) -> list[str]:
        """Configurations that are trained one by one: the range of MACs is cut into parts, and one is drawn from each."""
        costs = self.costs(space)
        ordered = sorted(costs, key=lambda config: costs[config]["macs"])
        rng = random.Random(0)
        return [ordered[int(rng.choice(part))] for part in np.array_split(np.arange(len(ordered)), self.budget.alone)]

    def costs(self, space: str) -> dict[str, dict[str, float]]:
        """MACs of an image, the sum of squared weight errors and, once taken, measured milliseconds, by configuration."""

        def make() -> dict[str, dict[str, float]]:
            net = self.fits(space, "faithful")
            lost = lamina.weight_errors(net)
            return {
                sizes(config): {
                    "macs": net.space.cost(config).macs / BATCH,
                    "errors": round(sum(lost[name][form] for name, form in config.items()), 6),
                }
                for config in net.space
            }

        costs = self.runs.get(f"{space}, costs", make)
        times = self.runs.all().get(f"{space}, ms", {})
        return {config: cost | ({"ms": times[config]} if times else {}) for config, cost in costs.items()}

    def picks(self, space: str, by: str) -> dict[int, dict[str, str]]:
        """For the MACs or the time of each uniform configuration, what each way of choosing holds for the best within.

        Lamina's is that of a search with a screen: of those with the least sum of squared weight errors the supernet chooses.
        """
        costs, found = self.costs(space), {}
        ours, faithful = self.scores(space, "ours", True), self.scores(space, "faithful", True)
        for size in UNIFORM[space]:
            uniform = " ".join([str(size)] * 3)
            within = [config for config in costs if costs[config][by] <= costs[uniform][by]]
            by_errors = sorted(within, key=lambda config: costs[config]["errors"])
            found[size] = {
                "uniform": uniform,
                "ours": min(by_errors[:SURVIVORS], key=lambda config: ours[config][0]),
                "faithful": min(within, key=lambda config: faithful[config][0]),
                "fits": by_errors[0],
            }
        return found

    def jobs(self) -> list[tuple[str, str, str, int]]:
        """Every fine-tuning that the tables need, those of the rankings first."""
        wanted = [(space, "alone", config, seed) for space in SPACES for seed in (0, 1) for config in self.alone(space)]
        for seed in self.budget.seeds:
            for space in SPACES:
                for by in self.limited(space):
                    for found in self.picks(space, by).values():
                        starts = [("ours" if name == "uniform" else name, config) for name, config in found.items()]
                        wanted += [(space, start, config, seed) for start, config in starts]
        return list(dict.fromkeys(wanted))

    def missing(self) -> list[tuple[str, str, str, int]]:
        """Fine-tunings that are still to be done."""
        there = self.runs.all()
        return [job for job in self.jobs() if _key(*job) not in there]

    def limited(self, space: str) -> tuple[str, ...]:
        """What is limited: MACs, and time once it is taken."""
        return ("macs", "ms") if f"{space}, ms" in self.runs else ("macs",)


def _key(space: str, start: str, config: str, seed: int) -> str:
    return f"{space}, {config}, from {start}, seed {seed}"


def by_sizes(net: lamina.Supernet) -> dict[str, dict[str, Any]]:
    return {sizes(config): config for config in net.space}


@torch.no_grad()
def judged_all(net: lamina.Supernet, data: Images) -> dict[str, list[float]]:
    """Loss and accuracy of every configuration of a supernet whose network is a chain.

    What stands before a series runs once for all configurations that agree up to there.
    """
    chain = list(net.network.eval())
    places = {int(name): layer for name, layer in net.series.items()}
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def go(x: Tensor, y: Tensor, start: int, chosen: tuple[str, ...]) -> None:
        for place in range(start, len(chain)):
            if place in places:
                for form in places[place].forms:
                    places[place].set_active(form)
                    go(chain[place](x), y, place + 1, (*chosen, str(form.rank_in // form.groups)))
                return
            x = chain[place](x)
        total = totals[" ".join(chosen)]
        total[0] += float(F.cross_entropy(x.float(), y, reduction="sum"))
        total[1] += int((x.argmax(1) == y).sum())

    for x, y in in_order(data):
        with torch.autocast("cpu", torch.bfloat16):
            go(x, y, 0, ())
    return {config: [round(value / len(data), 6) for value in total] for config, total in totals.items()}


def take_times(experiment: Experiment, seconds: float) -> None:
    """The times of all networks, whole and in turn, and what the table of layer times says of them."""
    runs = experiment.runs
    for space in SPACES:
        net = experiment.supernet(space, "ours")
        priced = net.time(runs.weights("timings.sqlite"))
        configs = {sizes(config): config for config in priced}
        models = [experiment.base, *(net.extract(config) for config in configs.values())]
        workload = Workload(experiment.example)
        taken = time_each(models, [workload], Inference(), Effort(60 * seconds, 15, 40))[0]
        original, *each = (round(1e3 * median(times), 4) for times in taken)
        runs.put(f"{space}, table ms", [round(1e3 * priced.cost(config).timing.median_s, 4) for config in configs.values()])
        runs.put(f"{space}, original ms", original)
        runs.put(f"{space}, ms", dict(zip(configs, each, strict=True)))
    runs.put("setting", conditions(whole_setting(experiment.base, workload, Inference())))


def priced(experiment: Experiment, space: str) -> str:
    """What the table of layer times is worth: against whole networks, and beside MACs."""
    runs = experiment.runs
    whole, table_ms = list(runs[f"{space}, ms"].values()), runs[f"{space}, table ms"]
    macs = [cost["macs"] for cost in experiment.costs(space).values()]
    off = median(abs(t / w - 1) for t, w in zip(table_ms, whole, strict=True))
    by_table, by_macs = (spearmanr(costs, whole).statistic for costs in (table_ms, macs))
    return (
        f"**Time, {space} space**: the {len(whole)} networks, measured whole, take {min(whole):.2f} to {max(whole):.2f} ms, "
        f"the original {runs[f'{space}, original ms']:.2f} ms. The table of layer times is {100 * off:.1f} % off at the median "
        f"and ranks them with ρ = {by_table:.2f}; MACs rank them with ρ = {by_macs:.2f}."
    )


def ranking(experiment: Experiment, space: str) -> str:
    """How well each way of scoring ranks the networks that were trained one by one."""
    alone = experiment.alone(space)
    each = [[experiment.tuned(space, "alone", config, seed) for config in alone] for seed in (0, 1)]
    loss, accuracy = (np.mean([[value[i] for value in run] for run in each], axis=0) for i in (0, 1))
    costs = experiment.costs(space)
    scorers: dict[str, list[float]] = {}
    for recipe, title in (("ours", "supernet, lamina's recipe"), ("faithful", "supernet, faithful recipe")):
        scores = experiment.scores(space, recipe, True)
        scorers[f"{title}: loss"] = [scores[config][0] for config in alone]
        scorers[f"{title}: accuracy"] = [-scores[config][1] for config in alone]
    for recipe, title in (("faithful", "independent fits"), ("ours", "nested fits")):
        scores = experiment.scores(space, recipe, False)
        scorers[f"nothing trained, {title}: loss"] = [scores[config][0] for config in alone]
    scorers["nothing trained: sum of squared weight errors"] = [costs[config]["errors"] for config in alone]
    ranks = [
        rankdata(scorers[name]) for name in ("supernet, lamina's recipe: loss", "nothing trained: sum of squared weight errors")
    ]
    scorers["both: mean rank of lamina's supernet and the squared weight errors"] = list(sum(ranks))
    scorers["nothing trained: MACs"] = [-costs[config]["macs"] for config in alone]

    def agreement(a: Any, b: Any) -> list[str]:
        return [f"{spearmanr(a, b).statistic:.2f}", f"{kendalltau(a, b).statistic:.2f}"]

    rows = [[name, *agreement(values, loss), *agreement(values, -accuracy)] for name, values in scorers.items()]
    seeds = [[[value[i] for value in run] for run in each] for i in (0, 1)]
    rows.append(["**ceiling**: one seed against the other", *agreement(*seeds[0]), *agreement(*seeds[1])])
    low, high = 100 * accuracy.min(), 100 * accuracy.max()
    images, epochs, rate = dict(experiment.budget.trained)[space]
    return (
        f"**Ranking, {space} space**: {len(alone)} configurations trained one by one from their own fits ({images:,} images, "
        f"{epochs} epochs, SGD {rate:g}), mean of two seeds; test accuracy from {low:.2f} to {high:.2f} %.\n\n"
        + table(["scored by", "ρ, loss", "τ, loss", "ρ, accuracy", "τ, accuracy"], rows)
    )


def found_against_uniform(experiment: Experiment, space: str, by: str) -> str:
    costs, runs = experiment.costs(space), experiment.runs
    whole = runs.all().get(f"{space}, ms", {})

    def cell(start: str, config: str) -> str:
        accuracies = [experiment.tuned(space, start, config, seed)[1] for seed in experiment.budget.seeds]
        cost = f"{costs[config]['macs'] / 1e6:.2f} M" + (f", {whole[config]:.2f} ms" if config in whole else "")
        return f"[{config.replace(' ', ', ')}] {cost}: **{spread(accuracies)}**"

    rows = []
    for size, found in experiment.picks(space, by).items():
        limit = costs[found["uniform"]][by]
        rows.append(
            [
                f"uniform {size}: " + (f"{limit / 1e6:.2f} M MACs" if by == "macs" else f"{limit:.2f} ms"),
                *(cell("ours" if name == "uniform" else name, config) for name, config in found.items()),
            ]
        )
    what = {"macs": "MACs", "ms": "measured time"}[by]
    head = ["limit", "uniform", "found, lamina's", "found, faithful recipe", "found, nothing trained"]
    return f"**Found against uniform at equal {what}, {space} space**\n\n" + table(head, rows)


def plot(experiment: Experiment) -> str:
    """Accuracy against MACs: every configuration in the supernet, and what was fine-tuned, uniform and found."""
    from matplotlib.figure import Figure

    seeds = experiment.budget.seeds
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for axes, space in zip(figure.subplots(1, 2), SPACES, strict=True):
        costs, scores = experiment.costs(space), experiment.scores(space, "ours", True)
        macs = {config: cost["macs"] / 1e6 for config, cost in costs.items()}
        axes.scatter(
            [macs[c] for c in scores],
            [100 * scores[c][1] for c in scores],
            s=6,
            color="0.75",
            label="in the supernet, validation",
        )
        for name, style in (("uniform", "s--"), ("ours", "o-")):
            configs = dict.fromkeys(found[name] for found in experiment.picks(space, "macs").values())
            if any(_key(space, "ours", config, seed) not in experiment.runs for config in configs for seed in seeds):
                continue
            values = [[100 * experiment.tuned(space, "ours", config, seed)[1] for seed in seeds] for config in configs]
            axes.errorbar(
                [macs[c] for c in configs],
                [mean(v) for v in values],
                yerr=[np.std(v, ddof=1) for v in values],
                fmt=style,
                markersize=4,
                capsize=2,
                label="uniform, fine-tuned" if name == "uniform" else "found, fine-tuned",
            )
        axes.axhline(100 * experiment.runs["base"][1], color="0.4", linestyle=":", label="original")
        axes.set_title(f"{space} space")
        axes.set_xlabel("million MACs")
        axes.set_ylabel("accuracy, % (test, where fine-tuned)")
        axes.legend(fontsize="small", loc="lower right")
    return save_plot(figure, "gross-four-layer", "accuracy against MACs, in the supernet and fine-tuned")


def report(experiment: Experiment) -> str:
    budget, runs = experiment.budget, experiment.runs
    taken = f" Milliseconds are those of a batch of {BATCH}; every network of the spaces was measured whole, in turn. "
    parts = [
        (runs["setting"] + taken if "setting" in runs else "")
        + f"{experiment.data.name}; MACs are those of an image, biases of linear layers included. The original has "
        f"{100 * runs['base'][1]:.2f} % on the test images. Base: {budget.base[0]:,} images, {budget.base[1]} epochs, SGD 0.1. "
        f"Supernets: {budget.supernet[0]:,} images, {budget.supernet[1]} epochs, batch 128; faithful: independent fits, SGD "
        "1e-4, steps; lamina's: a third of the epochs, since each batch meets three configurations; nested fits, normalised "
        "steps, SGD 1e-2, cosine, learning from the original. Scored by loss on "
        f"{budget.scored:,} validation images. Fine-tuned: {budget.tuned[0]:,} images, {budget.tuned[1]} epochs, "
        f"SGD {budget.rate:g}, for all alike. All training and scoring "
        "under autocast to bfloat16; accuracies are those of the 10,000 test images; "
        f"mean ± standard deviation over seeds {', '.join(map(str, budget.seeds))}, which change order and flips."
    ]
    missing = experiment.missing()
    for space in SPACES:
        ranked = {(space, "alone", config, seed) for seed in (0, 1) for config in experiment.alone(space)}
        if not ranked & set(missing):
            parts.append(ranking(experiment, space))
        if not any(job[0] == space for job in missing):
            if "ms" in experiment.limited(space):
                parts.append(priced(experiment, space))
            parts += [found_against_uniform(experiment, space, by) for by in experiment.limited(space)]
    if missing:
        parts.append(f"{len(missing)} fine-tunings are still to be done, and tables that need them are left out.")
    return "\n\n".join(parts)


def main() -> None:
    def more(parser: Any) -> None:
        extend(parser)
        parser.add_argument("--share", default="1/1", help="which part of the fine-tuning: 1/2, 2/2")
        parser.add_argument("--as-is", action="store_true", help="report what is there, and make nothing more")
        parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10 in its binary format")

    chosen = options(__doc__, more)
    name = "four_layer" if chosen.cifar is None else "four_layer-cifar"
    experiment = Experiment(Runs(name, chosen.quick), splits(chosen.cifar), QUICK if chosen.quick else Budget())
    if chosen.times:
        take_times(experiment, chosen.seconds)
        return
    part, of = map(int, chosen.share.split("/"))
    if not chosen.as_is:
        for space in SPACES:
            for recipe in RECIPES:
                for ready in (False, True):
                    experiment.scores(space, recipe, ready)
        for job in experiment.jobs()[part - 1 :: of]:
            experiment.tuned(*job)
        if of > 1:
            return
    body = report(experiment)
    print(body)
    if chosen.publish:
        body = f"{body}\n\n{plot(experiment)}"
        publish("gross-four-layer", "GroSS: the 4-layer network", "python benchmarks/gross/four_layer.py --publish", body)


if __name__ == "__main__":
    main()
