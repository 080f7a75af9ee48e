"""lamina's front against that of Torch-Pruning, whose networks lose whole channels: the demo's network, at equal speed.

    python benchmarks/front.py --publish
    python benchmarks/front.py tuned --publish

Both have the same 512 unlabelled images, and nothing is fine-tuned; batch norm is recalibrated on them. At each speed
Torch-Pruning has the best of its ways by the accuracy on 2,000 other labelled images, a help that lamina does not get: eight
importances, within layers and over all of them, with and without its normaliser; channels in multiples of 8. What needs a loss
has that of answers drawn from the network's own, as lamina has, or of its likeliest ones. Its network is the largest that is no
faster than lamina's beside it. In the end all networks of five draws are timed in one run, interleaved with the original.

The stages ``plans``, ``ways``, ``networks`` and ``all`` follow one another when none is named; each leaves what it found in
``benchmarks/runs/front``, and does not do it again. ``tuned``: both after the same seconds of distillation on the 512 images.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from answers import BATCH, IMAGES, calibrated, drawn, inner, right
from record import IMAGES as PICTURES
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import time_each
from lamina.measure.clock import Effort, ratio, ratio_interval
from lamina.measure.table import TimingTable

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs" / "front"
sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
SEEDS = 5
SPEEDS = (1.3, 1.5, 2.0, 2.5, 3.0, 4.0)
UNIFORM = (2.0, 3.0, 4.0, 6.0)
NO_FASTER = 0.985
"""Torch-Pruning's networks aim at this share of lamina's speed: two quick measurements differ by about one per cent."""


def accuracy(found: Tensor) -> float:
    return 100 * float(found.double().mean())


def speed(model: nn.Module, small: nn.Module, x: Tensor, seconds: float) -> float:
    before, after = time_each([model, small], lamina.values.workloads(x), lamina.Inference(), Effort(seconds, 4, 60, 0.005))[0]
    return ratio(before, after)


def settled(model: nn.Module, small: nn.Module, images: list[Tensor]) -> nn.Module:
    """The network with its batch norms recalibrated, where that brings its answers on the images nearer to the original's."""
    fresh = copy.deepcopy(small)
    lamina.recalibrate(fresh, images)
    return min(small, fresh, key=lambda network: divergence(model, network, images))


@torch.inference_mode()
def divergence(model: nn.Module, small: nn.Module, images: list[Tensor]) -> float:
    outputs = lamina.Categorical()
    return statistics.mean(float(outputs.divergence(model(each), small.eval()(each)).mean()) for each in images)


# ---- lamina ----


def plan_file(seed: int, wanted: float) -> Path:
    return RUNS / f"plan-{seed}-{wanted:g}.json"


def plans(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
    """A plan for each draw and speed that has none yet, and how long it took."""
    path = RUNS / "plans.json"
    took: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    with TimingTable(None) as timings:
        for seed in range(SEEDS):
            missing = [each for each in SPEEDS if not plan_file(seed, each).exists()]
            if not missing:
                continue
            began = time.perf_counter()
            one = calibrated(model, seed)
            took[f"{seed}"] = time.perf_counter() - began
            for wanted in missing:
                began = time.perf_counter()
                plan = lamina.make_plan(model, x, lamina.Speedup(wanted), data=one, timings=timings)
                took[f"{seed}-{wanted:g}"] = time.perf_counter() - began
                plan.save(plan_file(seed, wanted))
                print(seed, plan.whole and plan.whole.speedup, plan.whole and plan.whole.interval, plan.notes, flush=True)
                path.write_text(json.dumps(took))


def reached(model: nn.Module, x: Tensor) -> dict[str, float]:
    """What lamina's networks of the first draw take, all in one run."""
    one = calibrated(model, 0)
    each = [lamina.decompose(model, lamina.Plan.load(plan_file(0, wanted)), one, check=False) for wanted in SPEEDS]
    dense, *times = time_each([model, *each], lamina.values.workloads(x), lamina.Inference(), Effort(20.0, 12, 60, 0.004))[0]
    return {f"{wanted:g}": ratio(dense, own) for wanted, own in zip(SPEEDS, times, strict=True)}


def uniform(model: nn.Module, x: Tensor, one: lamina.Calibration, wanted: float) -> nn.Module:
    plan = lamina.make_plan(model, x, lamina.Ratio(wanted), rule=lamina.AtRatio(), include=inner(model, x))
    return lamina.decompose(model, plan, one, check=False)


# ---- Torch-Pruning ----


@dataclass(frozen=True)
class Slopes:
    """What unlabelled images tell.

    By parameter the gradients of the loss of drawn answers and of the likeliest ones, and the squares of the former image by
    image, added up; by layer how strong its inputs are.
    """

    drawn: dict[str, Tensor]
    likeliest: dict[str, Tensor]
    squares: dict[str, Tensor]
    active: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, images: list[Tensor], seed: int) -> Slopes:
        twin, draw = copy.deepcopy(model).eval(), torch.Generator().manual_seed(seed)
        names = dict(twin.named_parameters())
        zeros = [{name: torch.zeros_like(each) for name, each in names.items()} for _ in range(3)]
        drawn_sum, likeliest_sum, squares = zeros
        for x in images:
            for total, answers in ((drawn_sum, None), (likeliest_sum, "likeliest")):
                scores = twin(x)
                y = scores.argmax(1) if answers else torch.multinomial(scores.detach().softmax(1), 1, generator=draw)[:, 0]
                for name, slope in zip(names, torch.autograd.grad(F.cross_entropy(scores, y), [*names.values()]), strict=True):
                    total[name] += slope
            for item in x.split(1):
                scores = twin(item)
                y = torch.multinomial(scores.detach().softmax(1), 1, generator=draw)[:, 0]
                for name, slope in zip(names, torch.autograd.grad(F.cross_entropy(scores, y), [*names.values()]), strict=True):
                    squares[name] += slope.square()
        with torch.no_grad(), tp.importance.ActivationImportance().compute_importance(twin):
            twin(torch.cat(images))
        active = {name: module._importance for name, module in twin.named_modules() if hasattr(module, "_importance")}
        return cls(drawn_sum, likeliest_sum, squares, active)


def taylor(slopes: dict[str, Tensor], small: nn.Module, **options: Any) -> Any:
    for name, parameter in small.named_parameters():
        parameter.grad = slopes[name].clone()
    return tp.importance.GroupTaylorImportance(**options)


def hessian(slopes: dict[str, Tensor], small: nn.Module, **options: Any) -> Any:
    importance = tp.importance.GroupHessianImportance(**options)
    importance.zero_grad()
    for name, parameter in small.named_parameters():
        # What `accumulate_grad` is to sum up, image by image; of 1.6.1 it keeps the last image alone.
        parameter.grad = slopes[name].sqrt()
        importance._accu_grad[parameter] = slopes[name].clone()
        importance._counter[parameter] = IMAGES
    return importance


def activation(active: dict[str, Tensor], small: nn.Module, **options: Any) -> Any:
    for name, strength in active.items():
        small.get_submodule(name)._importance = strength.clone()
    return tp.importance.ActivationImportance(**options)


IMPORTANCES: dict[str, Callable[..., Any]] = {
    "magnitude": lambda slopes, small, **options: tp.importance.GroupMagnitudeImportance(p=2, **options),
    "LAMP": lambda slopes, small, **options: tp.importance.LAMPImportance(**options),
    "BN scale": lambda slopes, small, **options: tp.importance.BNScaleImportance(**options),
    "FPGM": lambda slopes, small, **options: tp.importance.FPGMImportance(**options),
    "Taylor, drawn": lambda slopes, small, **options: taylor(slopes.drawn, small, **options),
    "Taylor, likeliest": lambda slopes, small, **options: taylor(slopes.likeliest, small, **options),
    "activation": lambda slopes, small, **options: activation(slopes.active, small, **options),
    "Hessian": lambda slopes, small, **options: hessian(slopes.squares, small, **options),
}
SCOPES: dict[str, tuple[dict[str, bool], dict[str, Any]]] = {
    "local": ({}, {}),
    "global": ({"global_pruning": True}, {}),
    "global, not normalised": ({"global_pruning": True}, {"normalizer": None}),
}
"""Options of the pruner and of the importance."""
GRID = [0.08 * step for step in range(1, 11)]
JUDGES = 2000
"""Validation images by which the best way is told."""
Way = tuple[str, str]
WAYS: list[Way] = [way for way in itertools.product(IMPORTANCES, SCOPES) if way != ("LAMP", "global, not normalised")]


def pruned(model: nn.Module, x: Tensor, slopes: Slopes, way: Way, share: float) -> nn.Module:
    """A network without a share of its channels; its batch norms are as they were."""
    small, (scope, normalised) = copy.deepcopy(model), SCOPES[way[1]]
    pruner = tp.pruner.BasePruner(
        small,
        x[:1],
        importance=IMPORTANCES[way[0]](slopes, small, **normalised),
        pruning_ratio=share,
        max_pruning_ratio=0.95,
        ignored_layers=[small.head],
        round_to=8,
        **scope,
    )
    pruner.step()
    for parameter in small.parameters():
        parameter.grad = None
    for module in small.modules():
        vars(module).pop("_importance", None)
    return small.eval().to(memory_format=torch.channels_last)


def ways(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
    """For each speed the best way by the accuracy on the validation images, and the share of the channels that goes."""
    from fashion import validation_images

    validation, speeds = validation_images()[:JUDGES], reached(model, x)
    print(speeds, flush=True)
    images, began = drawn(0), time.perf_counter()
    slopes = Slopes.of(model, images, 0)
    found: dict[str, list[list[Any]]] = {wanted: [] for wanted in speeds}
    for way in WAYS:
        told: list[tuple[float, float]] = []
        for share in GRID:
            told.append((share, speed(model, pruned(model, x, slopes, way, share), x, 0.25)))
            if told[-1][1] > 1.05 * max(speeds.values()):
                break
        for wanted, own in speeds.items():
            share = between(told, own * NO_FASTER)
            if share is None:
                continue
            small = pruned(model, x, slopes, way, share)
            lamina.recalibrate(small, images)
            found[wanted].append([accuracy(right(small, validation.images, validation.labels)), *way, share])
        now = {wanted: f"{mark:.2f}" for wanted, each in found.items() for mark, *of, _ in each if tuple(of) == way}
        print(way, now, f"{time.perf_counter() - began:.0f} s", flush=True)
    best = {wanted: sorted(each, reverse=True) for wanted, each in found.items()}
    (RUNS / "ways.json").write_text(json.dumps({"seconds": time.perf_counter() - began, "best": best}, indent=1))


def between(told: list[tuple[float, float]], wanted: float) -> float | None:
    """The least share at which a speed is reached, between those that were timed; None where it is not."""
    for (low, slow), (high, fast) in itertools.pairwise([(0.0, 1.0), *told]):
        if slow <= wanted < fast:
            return low + (high - low) * (wanted - slow) / (fast - slow)
    return None


# ---- both ----


@dataclass(frozen=True)
class Entry:
    """A network of one side, and which test images it tells right."""

    side: str
    wanted: str
    network: nn.Module
    right: Tensor


def made_file(seed: int) -> Path:
    return RUNS / f"networks-{seed}.pt"


def networks(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
    """The networks of both sides for each draw, and which test images they tell right."""
    from fashion import test_images

    test, best = test_images(), json.loads((RUNS / "ways.json").read_text())["best"]
    for seed in [each for each in range(SEEDS) if not made_file(each).exists()]:
        one, images = calibrated(model, seed), drawn(seed)
        slopes, found = Slopes.of(model, images, seed), list[Entry]()

        def add(side: str, wanted: float, small: nn.Module, images: list[Tensor] = images, found: list[Entry] = found) -> None:
            network = settled(model, small, images)
            found.append(Entry(side, f"{wanted:g}", network, right(network, test.images, test.labels)))

        for wanted in SPEEDS:
            add("lamina", wanted, lamina.decompose(model, lamina.Plan.load(plan_file(seed, wanted)), one, check=False))
            _, *way, share = best[f"{wanted:g}"][0]
            add("Torch-Pruning", wanted, pruned(model, x, slopes, (way[0], way[1]), share))
        for wanted in UNIFORM if seed == 0 else ():
            add("uniform", wanted, uniform(model, x, one, wanted))
        torch.save(found, made_file(seed))
        print(f"draw {seed} made", flush=True)


def everything(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
    from fashion import test_images

    test = test_images()
    entries = [entry for seed in range(SEEDS) for entry in torch.load(made_file(seed), weights_only=False)]
    before, marks = right(model, test.images, test.labels), [entry.right for entry in entries]
    timed = [model, *(entry.network for entry in entries)]
    dense, *times = time_each(timed, lamina.values.workloads(x), lamina.Inference(), Effort(90.0, 12, 60, 0.003))[0]
    rows, points = [], list[dict[str, Any]]()

    def of(side: str, wanted: str) -> tuple[list[float], list[tuple[float, float]], Tensor]:
        places = [place for place, entry in enumerate(entries) if (entry.side, entry.wanted) == (side, wanted)]
        speeds = [ratio(dense, times[place]) for place in places]
        intervals = [ratio_interval(dense, times[place]) for place in places]
        return speeds, intervals, torch.stack([marks[place].double() for place in places]).mean(0)

    def point(side: str, wanted: str) -> tuple[str, str, Tensor, float]:
        speeds, intervals, mark = of(side, wanted)
        falls = 100 * (before.double() - mark)
        half = 1.96 * float(falls.std()) / len(falls) ** 0.5
        points.append({"side": side, "wanted": wanted, "speed": statistics.mean(speeds), "accuracy": 100 * float(mark.mean())})
        low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
        told = f"×{statistics.mean(speeds):.2f} ({low:.2f} to {high:.2f})"
        return told, f"{float(falls.mean()):.2f} ± {half:.2f}", mark, statistics.mean(speeds)

    best = json.loads((RUNS / "ways.json").read_text())
    for wanted in [f"{each:g}" for each in SPEEDS]:
        own, own_lost, own_mark, own_speed = point("lamina", wanted)
        other, other_lost, other_mark, other_speed = point("Torch-Pruning", wanted)
        gain = 100 * (own_mark - other_mark)
        half = 1.96 * float(gain.std()) / len(gain) ** 0.5
        slower = "" if other_speed <= own_speed else ", but lamina is slower"
        _, importance, scope, share = best["best"][wanted][0]
        way = f"{importance}, {scope}, {share:.0%} of the channels"
        rows.append([own, own_lost, other, other_lost, way, f"**{float(gain.mean()):+.2f}** ± {half:.2f}{slower}"])
    sides = ["lamina: measured", "points lost", "Torch-Pruning: measured", "points lost", "its best way", "points above it"]
    body = table(sides, rows)
    evens = [[f"{r:g}", *point("uniform", f"{r:g}")[:2]] for r in UNIFORM]
    body += "\n\n" + table(["uniform ratio, calibrated", "measured", "points lost"], evens)
    took = json.loads((RUNS / "plans.json").read_text())
    calibrating = statistics.mean(took[f"{seed}"] for seed in range(SEEDS))
    cold, warm = (sum(took[f"{seed}-{wanted:g}"] for wanted in SPEEDS) for seed in (0, SEEDS - 1))
    body += (
        f"\n\n![The front](../images/front.png)\n\nMeans of {SEEDS} draws of {IMAGES} images, intervals of 95 % over the "
        f"10,000 test images, each paired with itself; of speeds the widest of the {SEEDS} networks'. The network tells "
        f"{accuracy(before):.2f} % right before. lamina calibrates in {calibrating:.0f} s and plans the six speeds in "
        f"{cold:.0f} s with an empty table, in {warm:.0f} s with a filled one; all ways of Torch-Pruning were tried at all "
        f"speeds in {best['seconds']:.0f} s."
    )
    body += f"\n\n{setting(model, x)}"
    print(body)
    (RUNS / "all.json").write_text(json.dumps({"before": accuracy(before), "points": points}, indent=1))
    if chosen.publish:
        draw_picture(points, accuracy(before))
        title = "The front against Torch-Pruning, nothing fine-tuned"
        publish("front", title, "python benchmarks/front.py", body)


def setting(model: nn.Module, x: Tensor) -> str:
    return (
        conditions(lamina.compare(model, model, x, seconds=0.1).setting)[:-1] + f", torch-pruning {version('torch-pruning')}."
    )


def draw_picture(points: list[dict[str, Any]], before: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = {
        "lamina": ("o-", "lamina, Speedup(…)"),
        "uniform": ("^:", "uniform ratios, calibrated"),
        "Torch-Pruning": ("s--", "Torch-Pruning, its best"),
    }
    axes.axhline(before, color="0.6", linewidth=0.8, label="the network itself")
    for side, (style, name) in styles.items():
        own = sorted((each["speed"], each["accuracy"]) for each in points if each["side"] == side)
        axes.plot(*zip(*own, strict=True), style, markersize=5, label=name)
    axes.set_xlabel("times as fast, measured at batch 32")
    axes.set_ylabel("test accuracy, %, nothing fine-tuned")
    axes.set_ylim(bottom=max(before - 12, 0))
    axes.legend(loc="lower left")
    figure.savefig(PICTURES / "front.png", dpi=110)


# ---- after distillation ----


def distilled(
    teacher: nn.Module, starts: list[nn.Module], rates: list[float], images: Tensor, seconds: float
) -> list[nn.Module]:
    """Copies trained on the teacher's answers, in turn, each until it has had its seconds; nothing else is known."""
    from training import augment

    learners = [copy.deepcopy(start).train() for start in starts]
    optimizers = [
        torch.optim.AdamW(learner.parameters(), rate, weight_decay=0.0) for learner, rate in zip(learners, rates, strict=True)
    ]
    spent, draw = [0.0] * len(learners), torch.Generator().manual_seed(0)
    while min(spent) < seconds:
        x = augment(images[torch.randint(len(images), (64,), generator=draw)], draw)
        with torch.no_grad():
            wanted = teacher(x).log_softmax(1)
        for place, (learner, optimizer, rate) in enumerate(zip(learners, optimizers, rates, strict=True)):
            if spent[place] >= seconds:
                continue
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - spent[place] / seconds)
            loss = F.kl_div(learner(x).log_softmax(1), wanted, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spent[place] += time.perf_counter() - began
    return [learner.eval() for learner in learners]


def tuned(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
    from fashion import test_images, validation_images

    test, validation, rates, rows = test_images(), validation_images(), (2e-3, 3e-4), []
    images = torch.cat(drawn(0))
    entries = {(entry.side, entry.wanted): entry.network for entry in torch.load(made_file(0), weights_only=False)}
    for wanted in ("2", "3", "4"):
        starts = [entries[side, wanted] for side in ("lamina", "Torch-Pruning") for _ in rates]
        after = distilled(model, starts, [*rates, *rates], images, chosen.each)
        marks, told = [], list[str]()
        for place in (0, len(rates)):
            own = after[place : place + len(rates)]
            best = max(own, key=lambda network: accuracy(right(network, validation.images, validation.labels)))
            marks.append(right(best, test.images, test.labels).double())
            start = accuracy(right(starts[place], test.images, test.labels))
            told += [f"×{speed(model, best, x, 2.0):.2f}", f"{start:.2f} %", f"{accuracy(marks[-1]):.2f} %"]
        gain = 100 * (marks[0] - marks[1])
        rows.append([wanted, *told, f"**{float(gain.mean()):+.2f}** ± {1.96 * float(gain.std()) / len(gain) ** 0.5:.2f}"])
        print(rows[-1], flush=True)
    head = ["asked", "lamina: measured", "before", "after", "Torch-Pruning: measured", "before", "after", "points above it"]
    body = f"{table(head, rows)}\n\nEach {chosen.each:g} s of distillation from the original on 512 unlabelled images, flipped "
    body += f"and shifted, in turn step by step; the better of two learning rates by the validation images. {setting(model, x)}"
    print(body)
    if chosen.publish:
        publish("front-tuned", "The same after distillation", "python benchmarks/front.py tuned", body)


STAGES = {
    "plans": (plans, plan_file(SEEDS - 1, SPEEDS[-1]).name),
    "ways": (ways, "ways.json"),
    "networks": (networks, f"networks-{SEEDS - 1}.pt"),
    "all": (everything, None),
    "tuned": (tuned, None),
}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("stage", nargs="?", choices=STAGES, help="this one alone; all but the last where none is named")
        parser.add_argument("--each", type=float, default=60.0, help="seconds of distillation, of tuned")

    from demo import base_network
    from fashion import test_images

    chosen = options(__doc__ or "", more)
    RUNS.mkdir(parents=True, exist_ok=True)
    model, x = base_network(), test_images().images[:BATCH]
    for name in [chosen.stage] if chosen.stage else [*STAGES][:-1]:
        work, leaves = STAGES[name]
        if chosen.stage or leaves is None or not (RUNS / leaves).exists():
            work(model, x, chosen)


if __name__ == "__main__":
    main()
