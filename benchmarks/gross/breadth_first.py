"""VGG-16 and ResNet-18 over group sizes 1, 4, 16, 32: 16.8 million and 4.3 billion configurations, searched breadth first.

    python benchmarks/gross/breadth_first.py            # what does not look at the clock; goes on where it was
    python benchmarks/gross/breadth_first.py --times    # times of layers, and the searches within them: a quiet machine
    python benchmarks/gross/breadth_first.py            # what was found within these times, fine-tuned
    python benchmarks/gross/breadth_first.py --publish

Before a search each layer's forms are scored one at a time, all others as in a uniform configuration. A round looks at all
neighbours of the best configurations, keeps those for which these scores add up to the least loss, and scores them with the
supernet's shared weights. The limits are the MACs, then the time, of the uniform configuration.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

import torch.nn.functional as F
from data import Batches, Splits, in_order, splits
from networks import resnet_18, vgg_16
from runs import (
    SEEDS,
    MinusLoss,
    Runs,
    conditions,
    extend,
    judged,
    options,
    publish,
    save_plot,
    sizes,
    spread,
    table,
    trained,
)
from torch import Tensor, nn

import lamina
from lamina.comparison import time_each, whole_setting
from lamina.measure.clock import Effort
from lamina.supernet.space import Configuration
from lamina.values import Inference, Workload

SIZES = (1, 4, 16, 32)
LIMITS = {"macs": (16, 4), "ms": (16,)}  # uniform configurations whose cost is the limit
BATCH = 64
NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG-16": vgg_16, "ResNet-18": resnet_18}
STRATEGY = lamina.BreadthFirst(beam=4, candidates=16)


@dataclass(frozen=True)
class Budget:
    base: tuple[int, int] = (20_000, 2)  # images, epochs
    supernet: tuple[int, int] = (20_000, 3)
    tuned: tuple[int, int] = (5_000, 1)
    rate: float = 1e-2  # of the supernet and of fine-tuning
    scored: int = 1_000
    tested: int = 10_000
    strategy: lamina.BreadthFirst = STRATEGY


QUICK = Budget((512, 1), (64, 1), (64, 1), 1e-2, 32, 100, lamina.BreadthFirst(beam=1, candidates=2))


class Experiment:
    """The stages for one network, each kept."""

    def __init__(self, name: str, runs: Runs, data: Splits, budget: Budget, uniform: list[int] | None = None) -> None:
        self.name, self.runs, self.data, self.budget, self.wanted = name, runs, data, budget, uniform

    @property
    def example(self) -> Tensor:
        return self.data.validation.inputs(self.data.validation.pixels[:BATCH])

    @functools.cached_property
    def base(self) -> nn.Module:
        images, epochs = self.budget.base

        def train(model: nn.Module) -> list[float]:
            data = self.data.training.first(images)
            return judged(trained(model, data, epochs=epochs, batch=64, rate=0.05, seed=0, from_scratch=True), self.test)

        return self.runs.base(NETWORKS[self.name], train)

    @property
    def test(self) -> Any:
        return self.data.test.first(self.budget.tested)

    @functools.cached_property
    def supernet(self) -> lamina.Supernet:
        """The trained supernet."""
        fits = self.runs.supernet("fits", self.base, lambda: lamina.make_supernet(self.base, self.example, group_sizes=SIZES))

        def make() -> lamina.Supernet:
            images, epochs = self.budget.supernet
            lamina.train_supernet(
                fits,
                Batches(self.data.training.first(images), 64, seed=0),
                loss=F.cross_entropy,
                epochs=epochs,
                # Uniform draws take a third of the time of a sandwich. The fits of weights that were trained for so short a
                # time are far from them, and so are the statistics that batch norms kept.
                recipe=lamina.Recipe(draws="uniform", rate=self.budget.rate, norms_in_eval=False),
                teacher=self.base,
                precision="bfloat16",
            )
            return fits

        return self.runs.supernet("supernet", self.base, make)

    def uniform(self, size: int) -> Configuration:
        return configuration(self.supernet, " ".join([str(size)] * len(self.supernet.space)))

    def searched(self, by: str, size: int) -> dict[str, Any]:
        """What the search finds within the cost of a uniform configuration."""

        def make() -> dict[str, Any]:
            net, uniform = self.supernet, self.uniform(size)
            cost = net.space.cost(uniform)
            images = list(in_order(self.data.validation.first(self.budget.scored), 250))
            began = time.perf_counter()
            inputs = [x for x, _ in in_order(self.data.training.first(self.budget.scored // 2), 250)]
            score = MinusLoss(images, inputs)
            screen = lamina.Screen(lamina.score_drops(net, score, uniform))
            limit = float(cost.macs) if by == "macs" else cost.timing.median_ms
            within = lamina.Macs(limit) if by == "macs" else lamina.Milliseconds(limit)
            found = lamina.search(net, score, limit=within, strategy=self.budget.strategy, screen=screen)
            took = time.perf_counter() - began
            scores = {sizes(trial.config): trial.score for trial in found.trials}
            alone = sum(len(forms) - 1 for forms in net.space.forms.values())
            return {
                "limit": limit,
                "uniform": sizes(uniform),
                "uniform score": scores.get(sizes(uniform)),
                "found": sizes(found.best.config),
                "score": found.best.score,
                "macs": found.best.cost.macs,
                "scored": alone + len(found.trials),
                "seconds": round(took, 1),
            }

        return self.runs.get(f"search, {by} {size}", make)

    def tuned(self, config: str, seed: int) -> list[float]:
        """Loss and accuracy on the test images of a configuration taken out of the supernet and fine-tuned."""

        def make() -> list[float]:
            model = self.supernet.extract(configuration(self.supernet, config)).requires_grad_(True)
            images, epochs = self.budget.tuned
            data = self.data.training.first(images)
            return judged(trained(model, data, epochs=epochs, batch=64, rate=self.budget.rate, seed=seed), self.test)

        return self.runs.get(f"{config}, seed {seed}", make)

    def sizes_for(self, by: str) -> list[int]:
        """The uniform configurations whose MACs or time is a limit, as far as they are wanted."""
        return [size for size in LIMITS[by] if self.wanted is None or size in self.wanted]

    def limits(self) -> Iterator[tuple[str, int]]:
        """The searches that there are: those within a time once the times are taken."""
        for by in LIMITS:
            for size in self.sizes_for(by):
                if by == "macs" or f"search, ms {size}" in self.runs:
                    yield by, size

    def all(self) -> None:
        """Every stage that does not look at the clock."""
        for by, size in self.limits():
            self.searched(by, size)
        for seed in SEEDS:
            for by, size in self.limits():
                for name in ("uniform", "found"):
                    self.tuned(self.searched(by, size)[name], seed)

    def take_times(self, seconds: float) -> None:
        """Times of all layers in all forms, the searches within them, and the networks of the tables, whole."""
        net = self.supernet
        net.time(self.runs.weights("timings.sqlite"))
        for size in self.sizes_for("ms"):
            self.searched("ms", size)
        named = {self.searched(by, size)[name] for by, size in self.limits() for name in ("uniform", "found")}
        models = {config: net.extract(configuration(net, config)) for config in sorted(named)}
        workload = Workload(self.example)
        taken = time_each([self.base, *models.values()], [workload], Inference(), Effort(3 * seconds, 9, 200))[0]
        whole = dict(zip(["original", *models], (round(1e3 * median(times), 3) for times in taken), strict=True))
        self.runs.put("whole", whole)
        self.runs.put("setting", conditions(whole_setting(self.base, workload, Inference())))


def configuration(net: lamina.Supernet, written: str) -> Configuration:
    """The configuration of some group sizes, written layer by layer."""
    pairs = zip(net.space.forms.items(), written.split(), strict=True)
    return {name: next(form for form in forms if sizes({name: form}) == size) for (name, forms), size in pairs}


def rows(experiment: Experiment) -> list[list[str]]:
    runs = experiment.runs
    whole = runs.all().get("whole", {})
    found = []
    for by, size in experiment.limits():
        if f"search, {by} {size}" not in runs:
            continue
        search = experiment.searched(by, size)
        if not all(f"{search[name]}, seed {seed}" in runs for name in ("uniform", "found") for seed in SEEDS):
            continue
        limit = f"{search['limit'] / BATCH / 1e6:.1f} M MACs" if by == "macs" else f"{search['limit']:.1f} ms"
        accuracies = {name: [experiment.tuned(search[name], seed)[1] for seed in SEEDS] for name in ("uniform", "found")}
        times = {name: f", {whole[search[name]]:.1f} ms" if search[name] in whole else "" for name in ("uniform", "found")}
        found.append(
            [
                f"{experiment.name}, uniform {size}: {limit}",
                f"{search['scored']:,}" + (f" in {search['seconds']:.0f} s" if by == "ms" else ""),
                f"{spread(accuracies['uniform'])}{times['uniform']}",
                f"**{spread(accuracies['found'])}**{times['found']}",
                search["found"].replace(" ", ", "),
            ]
        )
    return found


def plot(experiments: list[Experiment]) -> str:
    """Accuracy against the time of whole networks: the originals, uniform configurations and what was found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, experiment in zip(figure.subplots(1, len(experiments), squeeze=False)[0], experiments, strict=True):
        whole = experiment.runs["whole"]
        axes.plot([whole["original"]], [100 * experiment.runs["base"][1]], "k*", markersize=11, label="original")
        for name, style in (("uniform", "s"), ("found", "o")):
            configs = dict.fromkeys(
                experiment.searched(by, size)[name]
                for by, size in experiment.limits()
                if f"search, {by} {size}" in experiment.runs and experiment.searched(by, size)[name] in whole
            )
            values = [[100 * experiment.tuned(config, seed)[1] for seed in SEEDS] for config in configs]
            axes.errorbar(
                [whole[config] for config in configs],
                [mean(v) for v in values],
                yerr=[stdev(v) for v in values],
                fmt=style,
                capsize=2,
                label=f"{name}, fine-tuned",
            )
        axes.set_title(experiment.name)
        axes.set_xlabel(f"milliseconds, batch {BATCH}")
        axes.set_ylabel("test accuracy, %")
        axes.legend(fontsize="small", loc="lower right")
    return save_plot(figure, "gross-breadth-first", "accuracy against time, uniform and found")


def report(experiments: list[Experiment]) -> str:
    budget = experiments[0].budget
    lines, about = [], []
    for experiment in experiments:
        runs = experiment.runs
        if "supernet, seconds" not in runs:
            continue
        lines += rows(experiment)
        whole = f", {runs['whole']['original']:.1f} ms" if "whole" in runs else ""
        about.append(
            f"{experiment.name}: the original has {100 * runs['base'][1]:.2f} %{whole}; fits took "
            f"{runs['fits, seconds']:.0f} s, training the supernet {runs['supernet, seconds']:.0f} s."
        )
    setting = next((experiment.runs["setting"] for experiment in experiments if "setting" in experiment.runs), "")
    return "\n\n".join(
        [
            f"{setting} {experiments[0].data.name}, 32×32. Base: {budget.base[0]:,} images, {budget.base[1]} epochs. Supernet: "
            f"nested, uniform draws, batch norms in training mode, learning from the original, SGD "
            f"{budget.rate:g}, {budget.supernet[0]:,} images, {budget.supernet[1]} epochs. A score: loss on "
            f"{budget.scored:,} validation images, "
            f"batch norms recalibrated on {budget.scored // 2:,} of training for each configuration. Fine-tuning: "
            f"{budget.tuned[0]:,} images, {budget.tuned[1]} epoch, SGD {budget.rate:g}, batch 64, seeds "
            f"{', '.join(map(str, SEEDS))}. Cut for two cores: the paper trains for 200 "
            "epochs of 50,000 images (VGG-16, CIFAR-10) and 8 of ImageNet (ResNet-18). All training and scoring under autocast "
            f"to bfloat16; test accuracy on {budget.tested:,} images, mean ± standard deviation. Fits and "
            "training had one thread, beside other work; the searches within a time, which are timed, had both cores alone. "
            f"{str(budget.strategy).capitalize()}; milliseconds are of a batch of {BATCH}.",
            " ".join(about),
            table(["limit", "scored", "uniform, %", "found, %", "group sizes found"], lines),
        ]
    ).strip()


def main() -> None:
    def more(parser: Any) -> None:
        extend(parser)
        parser.add_argument("--uniform", type=int, nargs="+", help="only what costs as much as these uniform configurations")
        parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))

    chosen = options(__doc__, more)
    data, budget = splits(), QUICK if chosen.quick else Budget()
    experiments = [
        Experiment(name, Runs(f"breadth_first-{name.lower()}", chosen.quick), data, budget, chosen.uniform)
        for name in chosen.network
    ]
    for experiment in experiments:
        if chosen.times:
            experiment.take_times(chosen.seconds)
        elif not chosen.publish:
            experiment.all()
    if chosen.times:
        return
    body = report(experiments)
    print(body)
    if chosen.publish:
        body = f"{body}\n\n{plot(experiments)}"
        publish(
            "gross-breadth-first",
            "GroSS: VGG-16 and ResNet-18, breadth first",
            "python benchmarks/gross/breadth_first.py --publish",
            body,
        )


if __name__ == "__main__":
    main()
