"""One supernet of everything: each 3×3 of the demo's network dense, Tucker-2 at several ranks or grouped at several sizes.

    python benchmarks/gross/union.py            # the supernet; goes on where it was
    python benchmarks/gross/union.py --times    # times of layers, and the searches within them: a quiet machine
    python benchmarks/gross/union.py            # what was found, fine-tuned
    python benchmarks/gross/union.py --publish

The same search goes through the whole space, and through the two parts of it that know one form beside the dense one, with the
same shared weights: what the loss rises by when one layer alone takes another form is added up and ranks all configurations
within a time, and the best of them are scored.
Beside what is found stands what takes no search: all layers at the same ratio, or at the same group size.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from runs import SEEDS, MinusLoss, Runs, conditions, extend, options, publish, save_plot, spread, table
from torch import nn, optim

import lamina
from lamina.choose.ratio import tucker_at
from lamina.comparison import time_each, whole_setting
from lamina.forms import Form
from lamina.measure.clock import Effort
from lamina.supernet.offer import grouped
from lamina.supernet.space import Configuration, as_json, from_json
from lamina.values import Geometry, Inference, Workload

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))
from demo import base_network
from fashion import base_images, test_images, tuning_images, validation_images
from training import Augmented, accuracy

RATIOS, SIZES = (2.0, 4.0, 8.0), (1, 8, 32)
SHARES = (0.7, 0.5)  # of the original's time
BATCH = 64
LAYERS = "stage*.conv?"
TITLES = {"union": "everything", "tucker": "dense or Tucker-2", "groups": "dense or grouped"}


@dataclass(frozen=True)
class Budget:
    supernet: tuple[int, int] = (20_000, 1)  # images, epochs; each batch meets three configurations
    tuned: tuple[int, int] = (5_000, 1)
    scored: int = 1_000
    survivors: int = 24
    tested: int = 10_000


QUICK = Budget((128, 1), (64, 1), 64, 2, 64)


def tuckers(layer: Geometry) -> list[Form]:
    return [form for ratio in RATIOS if (form := tucker_at(layer, ratio)) is not None]


def groups(layer: Geometry) -> list[Form]:
    width = min(layer.in_channels, layer.out_channels)
    return [grouped(layer, size, width) for size in SIZES]


PARTS: dict[str, Callable[[Geometry], list[Form]]] = {
    "union": lambda layer: [lamina.Dense(), *tuckers(layer), *groups(layer)],
    "tucker": lambda layer: [lamina.Dense(), *tuckers(layer)],
    "groups": lambda layer: [lamina.Dense(), *groups(layer)],
}


class Experiment:
    """Its stages, each kept."""

    def __init__(self, runs: Runs, budget: Budget) -> None:
        self.runs, self.budget = runs, budget
        self.base, self.example = base_network(), tuning_images().images[:BATCH]

    def made(self, part: str) -> lamina.Supernet:
        geometries = {name: layer.geometry for name, layer in _layers(self.base).items()}
        forms = {name: PARTS[part](geometry) for name, geometry in geometries.items()}
        return lamina.make_supernet(self.base, self.example, forms=forms)

    @functools.cached_property
    def union(self) -> lamina.Supernet:
        """The trained supernet of everything."""

        def make() -> lamina.Supernet:
            net = self.made("union")
            images, epochs = self.budget.supernet
            lamina.train_supernet(
                net,
                Augmented(base_images()[:images], BATCH),
                loss=F.cross_entropy,
                epochs=epochs,
                teacher=self.base,
                precision="bfloat16",
            )
            return net

        return self.runs.supernet("union", self.base, make)

    def part(self, name: str) -> lamina.Supernet:
        """A part of the space, with the union's weights."""
        if name == "union":
            return self.union
        net = self.made(name)
        lamina.load_terms(net, self.runs.weights("union"))
        return net

    def search(self, part: str, share: float, net: lamina.Supernet) -> None:
        def make() -> dict[str, Any]:
            data = validation_images()[: self.budget.scored]
            batches = list(zip(data.images.split(250), data.labels.split(250), strict=True))
            limit = share * self.runs["original, ms"]
            began = time.perf_counter()
            score = MinusLoss(batches)
            screen = lamina.Screen(lamina.score_drops(net, score), self.budget.survivors)
            try:
                found = lamina.search(net, score, limit=lamina.Milliseconds(limit), strategy=lamina.Exhaustive(), screen=screen)
            except lamina.SearchError as error:
                return {"limit": round(limit, 3), "none": str(error)}
            return {
                "limit": round(limit, 3),
                "space": net.space.size,
                "scored": sum(len(forms) - 1 for forms in net.space.forms.values()) + 1 + len(found.trials),
                "score": found.best.score,
                "over": len(found.over),
                "seconds": round(time.perf_counter() - began, 1),
                "config": as_json(found.best.config),
            }

        self.runs.get(f"found, {part}, {share:g}", make)

    def configurations(self) -> dict[str, Configuration]:
        """Everything that is fine-tuned, by name: what was found, and the uniform ones."""
        content = self.runs.all()
        found = {
            f"{part}, {share:g}": from_json(content[key]["config"])
            for part in PARTS
            for share in SHARES
            if "config" in content.get(key := f"found, {part}, {share:g}", {})
        }
        geometries = {name: layer.geometry for name, layer in _layers(self.base).items()}
        uniform = {
            f"all at ratio {ratio:g}": {name: tucker_at(layer, ratio) for name, layer in geometries.items()} for ratio in RATIOS
        }
        uniform |= {
            f"all in groups of {size}": {name: groups(layer)[place] for name, layer in geometries.items()}
            for place, size in enumerate(SIZES)
        }
        return found | uniform

    def tuned(self, name: str, seed: int) -> float:
        """Accuracy on the test images of a configuration taken out of the union and fine-tuned."""

        def make() -> float:
            model = self.union.extract(self.configurations()[name]).requires_grad_(True)
            images, epochs = self.budget.tuned
            lamina.finetune(
                model,
                Augmented(tuning_images()[:images], BATCH, seed),
                loss=F.cross_entropy,
                epochs=epochs,
                optimizer=lambda parameters: optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4),
                precision="bfloat16",
            )
            return self.judged(model)

        return self.runs.get(f"{name}, seed {seed}", make)

    def judged(self, model: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return accuracy(model, test_images()[: self.budget.tested])

    def take_times(self, seconds: float) -> None:
        for part in PARTS:
            net = self.part(part)
            space = net.time(self.runs.weights("timings.sqlite"))
            # One limit for all: that of the first measurement.
            self.runs.get("original, ms", lambda space=space: space.whole.timing.median_ms)
            for share in SHARES:
                self.search(part, share, net)
        models = {name: self.union.extract(config) for name, config in self.configurations().items()}
        workload = Workload(self.example)
        taken = time_each([self.base, *models.values()], [workload], Inference(), Effort(4 * seconds, 9, 200))[0]
        names = ["original", *models]
        self.runs.put("whole", {name: round(1e3 * median(times), 3) for name, times in zip(names, taken, strict=True)})
        self.runs.put("setting", conditions(whole_setting(self.base, workload, Inference())))

    def all(self) -> None:
        """Every stage that does not look at the clock."""
        self.runs.get("original", lambda: self.judged(self.base))
        assert self.union
        for seed in SEEDS:
            for name in self.configurations():
                self.tuned(name, seed)


def _layers(model: nn.Module) -> dict[str, Any]:
    from fnmatch import fnmatchcase

    from lamina.network.walk import walk

    return {name: layer for name, layer in walk(copy.deepcopy(model)).layers.items() if fnmatchcase(name, LAYERS)}


def plot(accuracies: dict[str, list[float]], times: dict[str, float], original: float) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = {title: [name for name in accuracies if name.startswith(f"{part},")] for part, title in TITLES.items()}
    lines |= {f"all layers {what}": [name for name in accuracies if what in name] for what in ("at ratio", "in groups of")}
    for (title, names), style in zip(lines.items(), ("o-", "^-", "s-", "^:", "s:"), strict=True):
        names.sort(key=times.__getitem__)
        axes.plot(
            [times[name] for name in names], [100 * mean(accuracies[name]) for name in names], style, markersize=5, label=title
        )
    axes.plot([times["original"]], [100 * original], "k*", markersize=12, label="original")
    axes.set_xlabel(f"milliseconds, batch {BATCH}")
    axes.set_ylabel("test accuracy after fine-tuning, %")
    axes.legend(fontsize="small", loc="lower right")
    return save_plot(figure, "gross-union", "accuracy against time, all forms and form by form")


def report(experiment: Experiment) -> str:
    runs, budget = experiment.runs.all(), experiment.budget
    times = runs["whole"]
    accuracies = {name: [runs[f"{name}, seed {seed}"] for seed in SEEDS] for name in experiment.configurations()}
    rows = [["original", f"{times['original']:.1f} ms", "1", f"{100 * runs['original']:.2f}", "", ""]]
    for name, values in accuracies.items():
        search = runs.get(f"found, {name}")
        title = f"{TITLES[name.partition(',')[0]]}, within {search['limit']:.1f} ms" if search else name
        rows.append(
            [
                title,
                f"{times[name]:.1f} ms",
                f"{times['original'] / times[name]:.2f}",
                f"**{spread(values)}**",
                f"{search['scored']} of {search['space']:,}" if search else "",
                f"{search['seconds']:.0f} s" if search else "",
            ]
        )
    for part, title in TITLES.items():
        for share in SHARES:
            if "none" in (search := runs[f"found, {part}, {share:g}"]):
                rows.append([f"{title}, within {search['limit']:.1f} ms", "none", "", "", "", ""])
    kinds: dict[str, int] = {}
    for name in accuracies:
        if name.startswith("union,"):
            for form in experiment.configurations()[name].values():
                kind = {"Dense": "dense", "BlockTerm": "Tucker-2"}[type(form).__name__]
                kind = "grouped" if getattr(form, "groups", 1) > 1 else kind
                kinds[kind] = kinds.get(kind, 0) + 1
    what = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    return "\n\n".join(
        [
            f"{runs['setting']} Fashion-MNIST, the demo's network, its eight 3×3 convolutions; Tucker-2 at ratios "
            f"{', '.join(f'{ratio:g}' for ratio in RATIOS)}, group sizes {', '.join(map(str, SIZES))}. Supernet: "
            f"{budget.supernet[0]:,} images, {budget.supernet[1]} epoch of three configurations a batch, learning from the "
            "original, "
            f"{runs['union, seconds']:.0f} s with its fits; a score: loss on {budget.scored:,} validation images; fine-tuning: "
            f"{budget.tuned[0]:,} images, {budget.tuned[1]} epoch, SGD 0.01, batch {BATCH}, under autocast to bfloat16; seeds "
            f"{', '.join(map(str, SEEDS))}; mean ± standard deviation. Times are of whole networks, batch {BATCH}, in turn.",
            table(["", "time", "×", "test accuracy, %", "scored", "search"], rows),
            f"In what was found in the whole space the layers are: {what}.",
            plot(accuracies, times, runs["original"]),
        ]
    )


def main() -> None:
    chosen = options(__doc__, extend)
    experiment = Experiment(Runs("union", chosen.quick), QUICK if chosen.quick else Budget())
    if chosen.times:
        experiment.take_times(chosen.seconds)
        return
    if not chosen.publish:
        experiment.all()
        return
    body = report(experiment)
    print(body)
    publish("gross-union", "GroSS: one supernet of all forms", "python benchmarks/gross/union.py --publish", body)


if __name__ == "__main__":
    main()
