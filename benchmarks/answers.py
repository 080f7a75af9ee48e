"""What a calibration on unlabelled images keeps of the demo's network, nothing fine-tuned.

    python benchmarks/answers.py uniform --publish
    python benchmarks/answers.py budget --publish
    python benchmarks/answers.py loss --publish
    python benchmarks/answers.py refine --publish

Each for draws of 512 images. ``uniform``: the same ratio for every layer but the first and the last, factors of the weights
alone and of the calibration. ``budget``: speed-ups at batch 32, with the calibration, without it, and uniform ratios, measured.
``loss``: the loss that is predicted for plans drawn at random, of forms of all kinds, against the divergence that is measured.
``refine``: the speed-ups of ``budget``, before and after two minutes of ``lamina.refine`` on the calibration's images. The last
three take minutes a draw: with ``--kept FILE`` each result is kept when it is there, and ``--draws 0 3`` makes only some draws.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.choose.menu import worth_measuring
from lamina.choose.prices import Prices
from lamina.choose.survey import Survey
from lamina.forms import Form, candidates
from lamina.measure.table import TimingTable

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
IMAGES, SEEDS, BATCH = 512, 5, 32
PLANS = 15
"""Drawn for each calibration."""
BUDGETS, UNIFORM = (2.0, 3.0), (2.0, 3.0, 4.0, 6.0)


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a network tells right, in eval mode."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)])


def lost(before: Tensor, after: list[Tensor]) -> str:
    """Points lost, mean of several networks, with a 95 % interval over the images: each image is paired with itself."""
    falls = (before.double() - torch.stack(after).double().mean(0)) * 100
    half = 1.96 * float(falls.std()) / len(falls) ** 0.5
    return f"{float(falls.mean()):.2f} ± {half:.2f}"


def drawn(seed: int, images: Tensor | None = None) -> list[Tensor]:
    """Calibration images: 512 of those given, by default of those that the base network was not trained on, in batches."""
    from fashion import tuning_images

    images = tuning_images().images if images is None else images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    return list(images[chosen].split(BATCH))


def calibrated(model: nn.Module, seed: int, images: Tensor | None = None) -> lamina.Calibration:
    return lamina.calibrate(model, drawn(seed, images), outputs=lamina.Categorical(), seed=seed)


def inner(model: nn.Module, x: Tensor) -> list[str]:
    """All layers but the first and the last, whose few channels no uniform ratio leaves alive."""
    return list(lamina.make_plan(model, x, lamina.Ratio(1.0), rule=lamina.AtRatio()).layers)[1:-1]


def uniform(chosen: argparse.Namespace) -> None:
    from demo import base_network
    from fashion import test_images

    model, test = base_network(), test_images()
    x = test.images[:BATCH]
    before = right(model, test.images, test.labels)
    found = [calibrated(model, seed) for seed in range(SEEDS)]
    rows = []
    for ratio in UNIFORM:
        plan = lamina.make_plan(model, x, lamina.Ratio(ratio), rule=lamina.AtRatio(), include=inner(model, x))
        plain = right(lamina.decompose(model, plan, check=False), test.images, test.labels)
        each = [right(lamina.decompose(model, plan, one, check=False), test.images, test.labels) for one in found]
        points = [100 * float((before.double() - one.double()).mean()) for one in each]
        rows.append([f"{ratio:g}", lost(before, [plain]), lost(before, each), f"{min(points):.2f} to {max(points):.2f}"])
        print(rows[-1], flush=True)
    body = table(["ratio", "weights alone: points lost", "calibrated: points lost", "of the five draws"], rows)
    finish(chosen, "uniform", "A uniform ratio with and without calibration", body, model, x, before)


def budget(chosen: argparse.Namespace) -> None:
    from demo import base_network
    from fashion import test_images

    model, test = base_network(), test_images()
    x = test.images[:BATCH]
    before = right(model, test.images, test.labels)
    kept = json.loads(chosen.kept.read_text()) if chosen.kept and chosen.kept.exists() else {}
    with TimingTable(chosen.timings) as timings:

        def measure(asked: str, seed: int | None, data: lamina.Calibration | None) -> None:
            kind, value = asked.split()[0], float(asked.split()[-1])
            if kind == "speed-up":
                plan = lamina.make_plan(model, x, lamina.Speedup(value), data=data, timings=timings)
            else:
                plan = lamina.make_plan(model, x, lamina.Ratio(value), rule=lamina.AtRatio(), include=inner(model, x))
            small = lamina.decompose(model, plan, data, check=False)
            faster = lamina.compare(model, small, x, seconds=chosen.seconds / 2)
            wrong = (~right(small, test.images, test.labels)).nonzero().flatten().tolist()
            kept[f"{asked}, {seed}"] = [faster.speedup, *faster.interval, wrong, predicted(plan)]
            print(asked, seed, *kept[f"{asked}, {seed}"][:3], len(wrong), flush=True)
            if chosen.kept:
                chosen.kept.write_text(json.dumps(kept))

        for seed in chosen.draws:
            one = None
            for asked in (*(f"speed-up {wanted:g}" for wanted in BUDGETS), *(f"ratio {ratio:g}" for ratio in UNIFORM)):
                if f"{asked}, {seed}" not in kept:
                    one = one or calibrated(model, seed)
                    measure(asked, seed, one)
        for wanted in BUDGETS:
            if f"speed-up {wanted:g}, None" not in kept:
                measure(f"speed-up {wanted:g}", None, None)
    rows, found = [], {}
    for asked in (*(f"speed-up {wanted:g}" for wanted in BUDGETS), *(f"ratio {ratio:g}" for ratio in UNIFORM)):
        for seed in (*range(SEEDS), None):
            if (one := kept.get(f"{asked}, {seed}")) is not None:
                speed, low, high, wrong, nats = one
                told = _told(len(before), wrong)
                found.setdefault((asked, seed is not None), []).append((speed, told))
                draw = "weights alone" if seed is None else str(seed)
                rows.append([asked, draw, f"×{speed:.2f} ({low:.2f} to {high:.2f})", lost(before, [told]), nats])
    body = table(["asked", "draw", "measured at batch 32", "points lost", "predicted loss"], rows)
    finish(chosen, "budget", "A speed-up with and without calibration", f"{_beside(found)}\n\n{body}", model, x, before)


def _beside(found: dict[tuple[str, bool], list[tuple[float, Tensor]]]) -> str:
    """The budgets with a calibration against what is about as fast: the means of their draws, each image paired with itself."""
    speeds = {key: statistics.mean(speed for speed, _ in each) for key, each in found.items()}
    tolds = {key: [told for _, told in each] for key, each in found.items()}
    rows = []
    for wanted in BUDGETS:
        own = f"speed-up {wanted:g}", True
        uniform = min((key for key in found if key[0].startswith("ratio")), key=lambda key: abs(speeds[key] - wanted))
        for name, other in (("weights alone", (own[0], False)), (f"uniform {uniform[0]}, calibrated", uniform)):
            gained = lost(torch.stack(tolds[own]).double().mean(0), tolds[other])
            rows.append([own[0], f"×{speeds[own]:.2f}", name, f"×{speeds[other]:.2f}", gained])
    head = ["asked, calibrated", "mean of the draws", "against", "", "points that this keeps more"]
    return table(head, rows)


def predicted(plan: lamina.Plan) -> str:
    return "" if plan.nats is None else f"{plan.nats:.4f} nats"


def loss(chosen: argparse.Namespace) -> None:
    from demo import base_network
    from fashion import test_images
    from scipy.stats import spearmanr

    model, test = base_network(), test_images()
    x, outputs = test.images[:BATCH], lamina.Categorical()
    kept = json.loads(chosen.kept.read_text()) if chosen.kept and chosen.kept.exists() else {}

    @torch.inference_mode()
    def answers(network: nn.Module) -> Tensor:
        return torch.cat([network.eval()(each) for each in test.images.split(500)])

    original = answers(model)
    for seed in chosen.draws:
        missing = [number for number in range(chosen.plans) if f"{seed}, {number}" not in kept]
        if not missing:
            continue
        one = calibrated(model, seed)
        dense = lamina.make_plan(model, x, lamina.Ratio(1.0), rule=lamina.AtRatio(), data=one)
        prices = Prices(Survey.of(model, x, lamina.Inference(), [], []), TimingTable(None), one)
        for number in missing:
            plan = random_plan(dense, prices, random.Random(f"{seed}, {number}"))
            after = answers(lamina.decompose(model, plan, one, check=False))
            kept[f"{seed}, {number}"] = [plan.nats, float(outputs.divergence(original, after).mean())]
            print(seed, number, *kept[f"{seed}, {number}"], flush=True)
            if chosen.kept:
                chosen.kept.write_text(json.dumps(kept))
    each = {seed: [kept[key] for n in range(chosen.plans) if (key := f"{seed}, {n}") in kept] for seed in range(SEEDS)}
    told, found = zip(*(pair for pairs in each.values() for pair in pairs), strict=True)
    rows, order, parts = [], sorted(range(len(told)), key=lambda n: found[n]), 6
    for part in range(parts):
        own = order[part * len(order) // parts : (part + 1) * len(order) // parts]
        low, middle, high = statistics.quantiles([told[n] / found[n] for n in own], n=4)
        means = [statistics.geometric_mean([values[n] for n in own]) for values in (told, found)]
        rows.append([*(f"{mean:.4f}" for mean in means), f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    body = table(["predicted, nats for each image", "measured", "predicted / measured: median (quartiles)"], rows)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(told, found, strict=True)], n=4)
    mean = statistics.geometric_mean([a / b for a, b in zip(told, found, strict=True)])
    body += f"\n\nGeometric means of about {len(told) // parts} plans each, of {len(told)}, in the order of what was measured. "
    body += (
        f"Of all: predicted / measured {mean:.2f} in the geometric mean, {middle:.2f} ({low:.2f} to {high:.2f}) at the median; "
    )
    by_draw = ", ".join(f"{spearmanr(*zip(*pairs, strict=True))[0]:.3f}" for pairs in each.values() if len(pairs) > 2)
    body += f"Spearman's ρ {spearmanr(told, found)[0]:.3f}, of the plans of each draw of {IMAGES} images {by_draw}. "
    body += f"Measured on all {len(test):,} test images."
    before = right(model, test.images, test.labels)
    finish(chosen, "loss", "The predicted loss against the measured one", body, model, x, before)


def random_plan(dense: lamina.Plan, prices: Prices, draw: random.Random) -> lamina.Plan:
    """A plan that decomposes something."""
    while True:
        plan, forms = dense, random_forms(prices, draw)
        for name in dense.layers:
            plan = plan.with_form(name, forms.get(name, lamina.Dense()))
        if plan.decomposed:
            priced = {name: prices.of_planned(name, layer) for name, layer in plan.layers.items()}
            return plan.model_copy(update={"layers": priced})


def random_forms(prices: Prices, draw: random.Random) -> dict[str, Form]:
    """Forms of all kinds, on the fronts of size and loss, at random depths in a random choice of layers."""
    often, found = draw.random(), dict[str, Form]()
    for name, layer in prices.survey.layers.items():
        forms = [form for form in candidates(layer.geometry) if form != lamina.Dense()]
        if forms and draw.random() < often:
            losses = prices.of(name, forms)
            sizes = {form: form.parameters(layer.geometry) for form in forms}
            found[name] = draw.choice(worth_measuring(sizes, losses, 30))
    return found


def refine(chosen: argparse.Namespace) -> None:
    from demo import base_network
    from fashion import test_images

    model, test = base_network(), test_images()
    x = test.images[:BATCH]
    before = right(model, test.images, test.labels)
    kept = json.loads(chosen.kept.read_text()) if chosen.kept and chosen.kept.exists() else {}
    with TimingTable(chosen.timings) as timings:
        for seed in chosen.draws:
            calibration = None
            for wanted in BUDGETS:
                if f"{wanted:g}, {seed}" in kept:
                    continue
                calibration = calibration or calibrated(model, seed)
                plan = lamina.make_plan(model, x, lamina.Speedup(wanted), data=calibration, timings=timings)
                small = lamina.decompose(model, plan, calibration, check=False)
                low, high = (faster := lamina.compare(model, small, x, seconds=chosen.seconds / 2)).interval
                untrained = right(small, test.images, test.labels)
                how = {"minutes": chosen.minutes, "outputs": lamina.Categorical(), "seed": seed}
                found = lamina.refine(small, model, drawn(seed), **how)
                told = [untrained, right(small, test.images, test.labels)]
                kept[f"{wanted:g}, {seed}"] = {
                    "wrong": [(~one).nonzero().flatten().tolist() for one in told],
                    "speed": f"×{faster.speedup:.2f} ({low:.2f} to {high:.2f})",
                    "steps": found.steps,
                    "seconds": found.seconds,
                    "nats": [found.before, found.after],
                }
                print(wanted, seed, found, *(100 * float((before.double() - one.double()).mean()) for one in told), flush=True)
                if chosen.kept:
                    chosen.kept.write_text(json.dumps(kept))
    rows, means = [], []
    for wanted in BUDGETS:
        each = {seed: kept[key] for seed in range(SEEDS) if (key := f"{wanted:g}, {seed}") in kept}
        pairs = {seed: [_told(len(before), wrong) for wrong in one["wrong"]] for seed, one in each.items()}
        for seed, one in each.items():
            nats = " → ".join(f"{n:.4f}" for n in one["nats"])
            took = f"{one['steps']} in {one['seconds']:.0f} s"
            rows.append([f"{wanted:g}", str(seed), one["speed"], took, nats, *(lost(before, [told]) for told in pairs[seed])])
        first, second = ([pair[turn] for pair in pairs.values()] for turn in (0, 1))
        won = lost(torch.stack(second).double().mean(0), first)
        means.append([f"{wanted:g}", lost(before, first), lost(before, second), won])
    head = ["speed-up", "draw", "measured at batch 32", "steps", "nats an image held out", "points lost before", "after"]
    body = table(["speed-up", f"points lost before, mean of {len(each)} draws", "after two minutes", "won back"], means)
    body += "\n\nIntervals of 95 % over the 10,000 test images, each paired with itself.\n\n" + table(head, rows)
    finish(chosen, "refine", "Two minutes of refine", body, model, x, before)


def _told(count: int, wrong: list[int]) -> Tensor:
    told = torch.ones(count, dtype=torch.bool)
    told[wrong] = False
    return told


def finish(chosen: argparse.Namespace, part: str, title: str, body: str, model: nn.Module, x: Tensor, before: Tensor) -> None:
    base = f"The network tells {float(before.double().mean()):.2%} of the 10,000 test images right before."
    setting = conditions(lamina.compare(model, model, x, seconds=0.1).setting)
    body = f"{body}\n\n{base}\n\n{setting}"
    print(body)
    if chosen.publish:
        publish(f"answers-{part}", title, f"python benchmarks/answers.py {part}", body)


PARTS = {"uniform": uniform, "budget": budget, "loss": loss, "refine": refine}


def main() -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("part", choices=PARTS)
        parser.add_argument("--kept", type=Path, help="all but uniform: a file in which what was found is kept, to go on from")
        parser.add_argument("--timings", type=Path, help="budget, refine: a table of times that is kept")
        parser.add_argument(
            "--draws", type=int, nargs="+", default=list(range(SEEDS)), help="all but uniform: which are made now"
        )
        parser.add_argument("--plans", type=int, default=PLANS, help="loss: how many are drawn for each calibration")
        parser.add_argument("--minutes", type=float, default=2.0, help="refine: how long each may take")

    chosen = options(__doc__ or "", extend)
    PARTS[chosen.part](chosen)


if __name__ == "__main__":
    main()
