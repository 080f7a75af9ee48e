"""What one budget for the whole network gives: time and accuracy, whether the goal is met, weight error, the solver's time.

    python benchmarks/budget.py demo --publish
    python benchmarks/budget.py demo --threads 1 --publish
    python benchmarks/budget.py goals --publish
    python benchmarks/budget.py resnet50 --publish
    python benchmarks/budget.py resnet50 --mode training --publish
    python benchmarks/budget.py busy --publish
    python benchmarks/budget.py planning --publish
    python benchmarks/budget.py solver --publish

``demo``: the demo's trained network, nothing fine-tuned: the mixed budget, each kind of form alone, and ratios, in one run.
``goals``: networks of torchvision and others, each for three goals; what a comparison afterwards measures against the goal. It
goes on where it was stopped (``benchmarks/runs/budget-goals.jsonl``). ``planning``: seconds and memory of planning, with an
empty table and with a filled one. ``busy``: plans of the demo's network made while another program keeps every core busy, and
made afterwards from the table that was filled then; what they lose is measured on a quiet machine. ``resnet50``: squared weight
errors of a budget, of ratios and of an older commit's ratio, in inference and in a training step; fresh weights. ``solver``:
seconds of the knapsack, 150 layers of 200 candidates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS, only
from pydantic import TypeAdapter
from record import beside_the_goal, conditions, foretold, options, publish, table
from torch import nn

import lamina
from lamina.choose.budget import Row, solve
from lamina.choose.menu import Option, undominated
from lamina.forms import AnyForm, Form
from lamina.layers.build import factored
from lamina.measure.table import TimingTable
from lamina.network.copying import shadow
from lamina.network.walk import walk

HERE = Path(__file__).resolve().parent
GOALS = (1.2, 1.5, 2.0)
Made = tuple[nn.Module, torch.Tensor]


def interval(comparison: lamina.Comparison) -> str:
    low, high = comparison.interval
    return f"×{comparison.speedup:.2f} ({low:.2f} to {high:.2f})"


def setting(model: nn.Module, x: torch.Tensor, mode: lamina.Mode | None = None) -> str:
    return conditions(lamina.compare(model, model, x, mode=mode, seconds=0.1).setting)


# ---- the demo's network ----


def demo(chosen: argparse.Namespace) -> None:
    sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
    from demo import base_network
    from fashion import test_images
    from training import accuracy

    model, images = base_network(), test_images()
    x = images.images[:32]
    rows = [["dense", "", "×1", f"{accuracy(model, images):.2%}", ""]]
    with TimingTable(None) as timings:
        plans: list[tuple[str, str, lamina.Plan]] = []
        for ratio in (2.0, 4.0):
            for rule in (lamina.AtRatio(), lamina.Plateau()):
                made = lamina.make_plan(model, x, lamina.Ratio(ratio), rule=rule, timings=timings)
                plans.append((f"ratio, {type(rule).__name__}", f"{ratio:g}", made))
        for name, kind in KINDS.items():
            for wanted in (1.5, 2.4, 3.3):
                with only(kind):
                    plans.append((name, f"×{wanted:g}", lamina.make_plan(model, x, lamina.Speedup(wanted), timings=timings)))
    for kind_name, asked, plan in plans:
        small = lamina.decompose(model, plan)
        faster = lamina.compare(model, small, x, seconds=chosen.seconds / 2)
        rows.append(
            [
                kind_name,
                asked,
                interval(faster),
                f"{accuracy(small, images):.2%}",
                "best reachable" if any("the best that" in note for note in plan.notes) else "",
            ]
        )
        print(rows[-1], flush=True)
    body = table(["forms", "asked", "measured at batch 32", "accuracy, 10,000 images", "note"], rows)
    on = "one thread" if chosen.threads == 1 else f"{chosen.threads} threads"
    title = f"One budget on the demo's network, nothing fine-tuned, {on}"
    finish(chosen, f"demo-{chosen.threads}", title, f"{body}\n\n{setting(model, x)}", f" --threads {chosen.threads}")


# ---- whether goals are met ----


def torchvision_net(name: str, side: int = 96) -> Made:
    import torchvision

    return getattr(torchvision.models, name)(weights=None).eval(), torch.randn(4, 3, side, side)


def mlp() -> Made:
    widths = [256, *[1024] * 4, 64]
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers).eval(), torch.randn(64, 256)


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536)
    return transformers.BertModel(config).eval(), {"input_ids": torch.randint(1000, (4, 64))}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    **{
        name: lambda name=name: torchvision_net(name)
        for name in ("resnet18", "resnet50", "vgg11", "mobilenet_v2", "densenet121", "squeezenet1_1", "convnext_tiny")
    },
    **{
        name: lambda name=name: torchvision_net(name)
        for name in ("regnet_y_800mf", "efficientnet_b0", "wide_resnet50_2", "alexnet")
    },
    "MLP 1024": mlp,
    "BERT 384, 4 layers": bert,
}


def goals(chosen: argparse.Namespace) -> None:
    path = HERE / "runs" / "budget-goals.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name, make in NETWORKS.items():
        if any(entry["network"] == name for entry in done) or name not in (chosen.network or NETWORKS):
            continue
        torch.manual_seed(0)
        model, example = make()
        with TimingTable(None) as timings:
            for wanted in GOALS:
                began = time.perf_counter()
                plan = lamina.make_plan(model, example, lamina.Speedup(wanted), timings=timings)
                took = time.perf_counter() - began
                faster = lamina.compare(model, lamina.decompose(model, plan, check=False), example, seconds=chosen.seconds / 2)
                entry = {
                    "network": name,
                    "wanted": wanted,
                    "planned": plan.whole and plan.whole.speedup,
                    "measured": faster.speedup,
                    "interval": faster.interval,
                    "said": next(iter(beside_the_goal(plan)), ""),
                    "seconds": took,
                    "put back": len(plan.put_back),
                    "foretold": foretold(plan),
                    "conditions": conditions(faster.setting),
                }
                done.append(entry)
                print(entry, flush=True)
        with path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in done if entry["network"] == name)
    rows = [
        [
            e["network"],
            f"×{e['wanted']:g}",
            f"×{e['planned']:.2f}" if e["planned"] else "dense",
            f"×{e['measured']:.2f} ({e['interval'][0]:.2f} to {e['interval'][1]:.2f})",
            "within 3 %" if abs(e["measured"] / e["wanted"] - 1) <= 0.03 else e["said"] or "NOT",
            e["foretold"],
            f"{e['seconds']:.0f} s",
        ]
        for e in done
    ]
    head = ["network", "asked", "in the plan", "compared afterwards", "", "foretold / measured", "planning"]
    finish(chosen, "goals", "Whether a speed-up that is asked for is met", f"{table(head, rows)}\n\n{done[-1]['conditions']}")


# ---- ResNet-50 against ratios at equal time ----


def lost(layers: Iterable[str], model: nn.Module, small: nn.Module) -> float:
    """‖W − Ŵ‖² / ‖W‖² over all layers that could be decomposed."""
    left = whole = 0.0
    for name in layers:
        dense, now = model.get_submodule(name).weight.detach(), small.get_submodule(name).weight.detach()
        left += float((dense - torch.as_tensor(now)).square().sum())
        whole += float(dense.square().sum())
    return left / whole


def old_ratio(commit: str, training: bool) -> dict[str, Form]:
    """The forms that an older lamina chose for the network below, at a ratio of 2: made by its own code, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=HERE.parent, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        mode = "lamina.Training()" if training else "lamina.Inference()"
        code = f"""
import json, sys, torch, torchvision, lamina
torch.set_num_threads({torch.get_num_threads()})
torch.manual_seed(0)
model = torchvision.models.resnet50(weights=None).eval().to(memory_format=torch.channels_last)
x = torch.randn(8, 3, 160, 160).contiguous(memory_format=torch.channels_last)
lamina.make_plan(model, x, lamina.Ratio(2.0), mode={mode}).save("{folder}/plan.json")
"""
        where = os.environ | {"PYTHONPATH": f"{folder}/src", "LAMINA_CACHE": folder}
        subprocess.run([sys.executable, "-c", code], env=where, check=True)
        layers = json.loads(Path(folder, "plan.json").read_text())["layers"]
    return TypeAdapter(dict[str, AnyForm]).validate_python({name: layer["form"] for name, layer in layers.items()})


def with_forms(model: nn.Module, forms: dict[str, Form]) -> nn.Module:
    layers = walk(model).layers
    chosen = {name: form for name, form in forms.items() if form != lamina.Dense()}
    return shadow(model, {layers[name].module: factored(layers[name], form) for name, form in chosen.items()})


def resnet50(chosen: argparse.Namespace) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 160, 160).contiguous(memory_format=torch.channels_last)
    rows = []

    def line(mode: lamina.Mode, asked: str, layers: Iterable[str], small: nn.Module, took: float) -> None:
        faster = lamina.compare(model, small, x, mode=mode, seconds=chosen.seconds)
        rows.append([mode.name, asked, interval(faster), f"{lost(layers, model, small):.3f}", f"{took:.0f} s"])
        print(rows[-1], flush=True)

    modes: list[tuple[lamina.Mode, tuple[float, ...]]] = [(lamina.Inference(), (1.65, 1.7)), (lamina.Training(), (1.6,))]
    for mode, speeds in [each for each in modes if each[0].name == chosen.mode]:
        training = isinstance(mode, lamina.Training)
        began = time.perf_counter()
        forms = old_ratio(chosen.old, training)
        line(mode, f"ratio 2 of {chosen.old}", forms, with_forms(model, forms), time.perf_counter() - began)
        made: dict[str, nn.Module] = {}
        with TimingTable(None) as timings:
            asked: list[tuple[str, lamina.goals.Goal, dict[str, Any]]] = [
                *((f"speed-up {s:g}", lamina.Speedup(s), {}) for s in speeds),
                *((f"ratio {r:g}", lamina.Ratio(r), {}) for r in (2.0, 2.5)),
                ("ratio 2, plain ranks", lamina.Ratio(2.0), {"rule": lamina.AtRatio()}),
            ]
            for name, goal, more in asked:
                began = time.perf_counter()
                plan = lamina.make_plan(model, x, goal, mode=mode, timings=timings, **more)
                took = time.perf_counter() - began
                made[name] = lamina.decompose(model, plan, check=False)
                line(mode, name, plan.layers, made[name], took)
        honest = lamina.compare(made["ratio 2, plain ranks"], made["ratio 2"], x, mode=mode, seconds=chosen.seconds)
        rows.append([mode.name, "ratio 2 against its plain ranks", interval(honest), "", ""])
        print(rows[-1], flush=True)
    head = ["mode", "asked", "measured", "squared weight error", "planning"]
    title = f"One budget on ResNet-50, against ratios, {chosen.mode}"
    told = setting(model, x, lamina.Training() if chosen.mode == "training" else lamina.Inference())
    finish(chosen, f"resnet50-{chosen.mode}", title, f"{table(head, rows)}\n\n{told}", f" --mode {chosen.mode}")


# ---- what planning takes ----

PLANNING = """
import resource, sys, time, torch, lamina
torch.set_num_threads({threads})
torch.manual_seed(0)
{build}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
began = time.perf_counter()
plan = lamina.make_plan(model, x, lamina.{goal}, timings=r"{table}")
took = time.perf_counter() - began
peak = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print(took, (peak - before) * 1024, len(plan.decomposed))
"""
RESNET50 = "import torchvision; model = torchvision.models.resnet50(weights=None).eval(); x = torch.randn(8, 3, 160, 160)"
VGG16 = "import torchvision; model = torchvision.models.vgg16(weights=None).eval(); x = torch.randn(1, 3, 224, 224)"
THOUSAND = """
widths = [128 + 64 * (n % 8) for n in range(1001)]
model = torch.nn.Sequential(*[torch.nn.Linear(widths[n], widths[n + 1]) for n in range(1000)]).eval()
x = torch.randn(64, 128)
"""


def planning(chosen: argparse.Namespace) -> None:
    rows = []
    asked = [("ResNet-50, 8×3×160×160", RESNET50, "Speedup(1.7)"), ("1,000 linear layers, batch 64", THOUSAND, "Speedup(1.2)")]
    for name, build, goal in [*asked, ("VGG-16, 1×3×224×224", VGG16, "Ratio(2)")]:
        with tempfile.TemporaryDirectory() as folder:
            code = PLANNING.format(threads=torch.get_num_threads(), build=build, goal=goal, table=f"{folder}/t.sqlite")
            for state in ("cold", "warm", "warm again"):
                told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
                took, more, layers = told.splitlines()[-1].split()
                rows.append([name, goal, state, f"{float(took):.1f} s", f"{int(more) / 1e6:.0f} MB", layers])
                print(rows[-1], flush=True)
    head = ["network", "goal", "table and what it remembers", "planning", "memory above the model", "layers decomposed"]
    body = table(head, rows)
    finish(chosen, "planning", "What planning takes", f"{body}\n\n{setting(nn.Linear(4, 4), torch.randn(1, 4))}")


# ---- the solver ----


# ---- a machine that is busy ----

BURN = "import torch; torch.set_num_threads({threads}); a = torch.randn(1500, 1500)\nwhile True: a @ a"


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """Another program that keeps so many cores busy."""
    other = subprocess.Popen([sys.executable, "-c", BURN.format(threads=threads)])
    try:
        time.sleep(5)
        yield
    finally:
        other.kill()
        other.wait()
        time.sleep(2)


def beside_others(chosen: argparse.Namespace) -> None:
    from answers import BATCH, calibrated, lost, right

    sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
    from demo import base_network
    from fashion import test_images

    model, images = base_network(), test_images()
    x, found = images.images[:BATCH], calibrated(model, 0)
    before = right(model, images.images, images.labels)
    rows = []
    for asked in (3.0,):
        with tempfile.TemporaryDirectory() as folder:
            filled, fresh = Path(folder) / "filled.sqlite", Path(folder) / "fresh.sqlite"
            for state, path in (
                ("beside another program", filled),
                ("afterwards, same table", filled),
                ("quiet, new table", fresh),
            ):
                with TimingTable(path) as timings, busy(chosen.threads) if "beside" in state else nullcontext():
                    plan = lamina.make_plan(model, x, lamina.Speedup(asked), data=found, timings=timings)
                small = lamina.decompose(model, plan, found)
                measured = interval(lamina.compare(model, small, x, seconds=chosen.seconds / 2))
                points = lost(before, [right(small, images.images, images.labels)])
                said = next((note.split(":")[0] for note in plan.notes), "")
                rows.append([f"×{asked:g}", state, measured, points, f"{plan.nats or 0:.2g}", said])
                print(rows[-1], flush=True)
    body = table(["asked", "planned", "measured when quiet", "points lost", "predicted, nats", "said first"], rows)
    finish(chosen, "busy", "A plan made beside another program", f"{body}\n\n{setting(model, x)}")


def problem(layers: int, forms: int, workloads: int, seed: int) -> dict[str, tuple[Option, ...]]:
    """Layers of unlike sizes, whose forms lose more the faster they are, with noise in both; dominated ones are dropped."""
    draw, menu = random.Random(seed), {}
    for number in range(layers):
        size = draw.uniform(0.2, 5)
        unlike = [draw.uniform(0.7, 1.3) for _ in range(workloads)]
        options_of = [Option(lamina.Dense(), 0.0, 1000, 1000, tuple(size * u for u in unlike))]
        for rank in range(1, forms):
            share = draw.uniform(0.05, 1.1)
            loses = max(1e-4, draw.gauss(1, 0.2)) * size * (1 - min(share, 1)) ** 2
            seconds = tuple(size * u * share * draw.uniform(0.9, 1.15) + 0.02 for u in unlike)
            options_of.append(Option(lamina.LowRank(rank), loses, int(1000 * share), int(1000 * share), seconds))
        menu[str(number)] = undominated(options_of)
    return menu


def solver(chosen: argparse.Namespace) -> None:
    rows = []
    for workloads in (1, 3):
        took = []
        for seed in range(5):
            menu = problem(150, 200, workloads, seed)
            losses = {name: [o.loss for o in each] for name, each in menu.items()}

            def saved(number: int | None, menu: dict[str, tuple[Option, ...]] = menu) -> dict[str, list[float]]:
                def of(option: Option) -> float:
                    return statistics.mean(option.seconds) if number is None else option.seconds[number]

                return {name: [of(o) - of(each[0]) for o in each] for name, each in menu.items()}

            whole = sum(statistics.mean(each[0].seconds) for each in menu.values())
            limits = [Row(saved(None), -0.45 * whole), *(Row(saved(n), 0.0, late=True) for n in range(workloads))]
            began = time.perf_counter()
            answer = solve(losses, limits)
            took.append(time.perf_counter() - began)
            assert answer
        left = statistics.mean(map(len, menu.values()))
        rows.append([str(workloads), f"{left:.0f}", f"{statistics.median(took):.2f} s", f"{max(took):.2f} s"])
    head = ["workloads", "options left a layer", "median of five", "longest"]
    body = table(head, rows)
    finish(
        chosen,
        "solver",
        "The knapsack: 150 layers of 200 candidates",
        f"{body}\n\n{setting(nn.Linear(4, 4), torch.randn(1, 4))}",
    )


def finish(chosen: argparse.Namespace, part: str, title: str, body: str, more: str = "") -> None:
    print(body)
    if chosen.publish:
        publish(f"budget-{part}", title, f"python benchmarks/budget.py {chosen.part}{more}", body)


PARTS = {"busy": beside_others, "demo": demo, "goals": goals, "planning": planning, "resnet50": resnet50, "solver": solver}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("part", choices=PARTS)
        parser.add_argument("--mode", choices=("inference", "training"), default="inference", help="of resnet50")
        parser.add_argument("--network", action="append", choices=NETWORKS, help="of goals, this one alone; may be repeated")
        parser.add_argument("--old", default="bb35b08", help="the commit that resnet50 holds the budget against")

    chosen = options(__doc__ or "", more)
    PARTS[chosen.part](chosen)


if __name__ == "__main__":
    main()
