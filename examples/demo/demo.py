"""The main job on real input: a trained network goes in, a faster one comes out, with the proof.

    lamina demo            # or: make demo

Takes the network in ``weights/`` (see train_base.py) and the images in ``data/``. For speed-ups of 1.5 and 2 it chooses forms
by measured time, decomposes, scores the 10,000 test images before and after one short fine-tune with freezing, times batches
of 1, 32 and 128 and a training step against the original, saves, loads into a fresh network and compares the bits. Everything
printed is also written to ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion import HERE, Images, test_images, tuning_images
from network import fashion_net
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from training import Augmented, accuracy

import lamina
from lamina.folder import size

WEIGHTS = HERE / "weights" / "base.safetensors"
BATCHES = (1, 32, 128)
TRAINING_BATCH = 64
FREEZING = lamina.SequentialFreezing()
console = Console(width=150, record=True)


def base_network() -> nn.Module:
    """The trained network: stored in half precision, run in float32, channels last."""
    model = fashion_net()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def fed(images: Images) -> list[lamina.Workload]:
    """Batches of 1, 32 and 128 real images; weights make an image count the same in each."""
    return [lamina.Workload(images.images[:batch], 1 / batch) for batch in BATCHES]


def training_table(steps: dict[str, lamina.Comparison]) -> Table:
    """Throughput of training, the original beside the decomposed network, all factors training or some at rest."""
    table = Table("", "images/s", "original", "", title=f"training, forward and backward at batch {TRAINING_BATCH}")
    for name, timed in steps.items():
        here, original = (f"{TRAINING_BATCH / timing.median_s:,.0f}" for timing in (timed.after, timed.before))
        low, high = timed.interval
        table.add_row(name, here, original, f"×{timed.speedup:.2f} (95 %: {low:.2f} to {high:.2f})")
    return table


def readme_table(results: list[dict[str, Any]]) -> str:
    """What the README shows: before and after, a column a goal, in Markdown."""

    def of(key: str, name: str) -> list[str]:
        return [f"{run[key][name]:.2%} ({100 * (run[key][name] - run['accuracy']['before']):+.2f})" for run in results]

    def timed(key: str, name: Any) -> list[str]:
        each = [run[key].get(name) for run in results]
        return [
            "–" if t is None else f"**×{t['speedup']:.2f}** ({t['interval'][0]:.2f} to {t['interval'][1]:.2f})" for t in each
        ]

    def smaller(name: str) -> list[str]:
        return [f"÷{run['costs'][0][name] / run['costs'][1][name]:.2f}" for run in results]

    rows = [
        ["", *(f"speed-up {run['asked']:g}" for run in results)],
        ["---"] * (1 + len(results)),
        ["test accuracy before any fine-tuning", *of("accuracy", "untuned")],
        ["after 2 epochs on 5,000 images, a minute's work", *of("accuracy", "tuned")],
        *([f"inference, batch {batch}", *timed("times", batch)] for batch in BATCHES),
        ["training step", *timed("training", "decomposed")],
        ["training step with sequential freezing", *timed("training", "decomposed, with freezing")],
        ["parameters", *smaller("parameters")],
        ["multiply-accumulates", *smaller("macs")],
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def publish(results: list[dict[str, Any]], setting: lamina.Setting) -> None:
    """Put the table into the README, with its conditions."""
    page = HERE.parents[1] / "README.md"
    body = f"{readme_table(results)}\n\nMeasured {time.strftime('%Y-%m-%d')} on {setting}."
    text = re.sub(
        "<!-- demo -->.*?<!-- /demo -->", lambda _: f"<!-- demo -->\n{body}\n<!-- /demo -->", page.read_text(), flags=re.S
    )
    page.write_text(text)


def run(asked: float, model: nn.Module, before: float, test: Images, tuning: Images, epochs: int, out: Path) -> dict[str, Any]:
    """The whole way to one speed-up; what was found is printed, and returned for the record."""
    folder = out / f"speedup-{asked:g}"
    console.rule(f"speed-up {asked:g}")

    began = time.perf_counter()
    plan = lamina.make_plan(model, fed(test), lamina.Speedup(asked), progress=True)
    planning = time.perf_counter() - began
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    console.print(str(plan), highlight=False, soft_wrap=True)

    began = time.perf_counter()
    small = lamina.decompose(model, plan)
    decomposing = time.perf_counter() - began
    untuned = accuracy(small, test)
    began = time.perf_counter()
    training = lamina.finetune(
        small,
        Augmented(tuning, TRAINING_BATCH),
        loss=F.cross_entropy,
        epochs=epochs,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.001, momentum=0.9),  # the fits are good: gently
        freezing=FREEZING if plan.decomposed else None,
        teacher=model,
        distillation=lamina.Distillation(weight=0.5, temperature=1.0),
        progress=True,
    )
    tuning_time = time.perf_counter() - began
    tuned = accuracy(small, test)

    timings = {batch: lamina.compare(model, small, test.images[:batch]) for batch in BATCHES}
    trainings = {"decomposed": lamina.Training()}
    if plan.decomposed:
        trainings["decomposed, with freezing"] = lamina.Training(freezing=FREEZING)
    steps = {name: lamina.compare(model, small, test.images[:TRAINING_BATCH], mode=mode) for name, mode in trainings.items()}
    costs = [lamina.count(net, test.images[:1]) for net in (model, small)]
    lamina.save(small, folder / "network")
    again = lamina.load(fashion_net(), folder / "network").eval()
    with torch.inference_mode():
        identical = torch.equal(again(test.images[:256]), small.eval()(test.images[:256]))

    table = Table("", "before", "after", "", title=f"FashionNet, {asked:g} times as fast")
    table.add_row("test accuracy, not fine-tuned", f"{before:.2%}", f"{untuned:.2%}", f"{100 * (untuned - before):+.2f} points")
    table.add_row(
        f"test accuracy, {epochs} epochs on 5,000 images",
        f"{before:.2%}",
        f"{tuned:.2%}",
        f"{100 * (tuned - before):+.2f} points",
    )
    for batch, timed in timings.items():
        low, high = timed.interval
        table.add_row(
            f"time, batch {batch}", str(timed.before), str(timed.after), f"×{timed.speedup:.2f} (95 %: {low:.2f} to {high:.2f})"
        )
    for name in ("parameters", "macs"):
        was, now = (getattr(cost, name) for cost in costs)
        table.add_row(name, f"{was / 1e6:.3f} M", f"{now / 1e6:.3f} M", f"÷{was / now:.2f}")
    dense_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    table.add_row(
        "weights on disk (float32)", f"{dense_bytes / 1e6:.1f} MB", f"{size(folder / 'network') / 1e6:.1f} MB", "plan included"
    )
    console.print(table)
    console.print(training_table(steps))
    console.print(
        f"{timings[32].setting}; denormal weights {timings[32].denormals[0]} → {timings[32].denormals[1]}", highlight=False
    )
    console.print(
        f"forms found in {planning:.1f} s, decomposed in {decomposing:.1f} s, fine-tuned in {tuning_time:.0f} s; "
        f"saved, loaded into a fresh network: outputs {'bit-identical' if identical else 'DIFFER'}"
    )
    return {
        "asked": asked,
        "accuracy": {"before": before, "untuned": untuned, "tuned": tuned},
        "times": {batch: dataclasses.asdict(timed) for batch, timed in timings.items()},
        "training": {name: dataclasses.asdict(timed) for name, timed in steps.items()},
        "epochs": [dataclasses.asdict(epoch) for epoch in training.epochs],
        "costs": [dataclasses.asdict(cost) for cost in costs],
        "bytes": {"before": dense_bytes, "after": size(folder / "network")},
        "seconds": {"planning": planning, "decomposing": decomposing, "fine_tuning": tuning_time},
        "identical": identical,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(prog="lamina demo", description=__doc__.splitlines()[0])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning on 5,000 images")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--publish", action="store_true", help="put the table into the README")
    options = parser.parse_args(argv)

    began = time.perf_counter()
    torch.manual_seed(0)
    test, tuning = test_images(), tuning_images()
    model = base_network()
    before = accuracy(model, test)
    console.print(f"FashionNet, {before:.2%} of {len(test):,} test images right")
    results = [run(asked, model, before, test, tuning, options.epochs, options.out) for asked in options.speedups]
    record = {"python": platform.python_version(), "torch": torch.__version__, "lamina": lamina.__version__, "runs": results}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    console.rule()
    # Beyond what noise explains: the whole interval lies below 1.
    slower = [(r["asked"], batch) for r in results for batch, timed in r["times"].items() if timed["interval"][1] < 1]
    for asked, batch in slower:
        console.print(f"speed-up {asked:g} ran slower than the original at batch {batch}", style="red")
    console.print(
        f"done in {time.perf_counter() - began:.0f} s; plans, networks, results.json and report.txt are in {options.out}"
    )
    (options.out / "report.txt").write_text(console.export_text())
    if options.publish:
        publish(results, lamina.Setting(**results[0]["times"][32]["setting"]))
    return 1 if slower or not all(r["identical"] for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
