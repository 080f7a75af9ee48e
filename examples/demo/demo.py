"""The main job on real input: a trained network goes in, a faster one comes out, with the proof.

    lamina demo            # or: make demo

Takes the network in ``weights/`` (see train_base.py) and the images in ``data/``. One calibration on 512 unlabelled images; for
speed-ups of 1.5, 2 and 3 at batch 32 it chooses forms by measured time and decomposes; the 10,000 test images say what is kept
without any fine-tuning. Each is timed at batches of 1, 32 and 128 against the original, saved, loaded into a fresh network and
its bits compared. The middle one is fine-tuned too, shortly and with freezing, timed in a training step, and in the runtimes
that are installed, in int8 too. The front of the three is drawn with the same ratio for every layer beside it, and a page for a
browser shows all of it.
Everything printed is also written to ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
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
from lamina.plan import MUCH

WEIGHTS = HERE / "weights" / "base.safetensors"
BATCH, BATCHES = 32, (1, 32, 128)
"""What is planned for, and what is timed."""
UNLABELLED = 512
TRAINING_BATCH, TUNED, EPOCHS = 64, 1_280, 2
FREEZING = lamina.SequentialFreezing()
UNIFORM = (2.0, 4.0)
"""The ratios beside the front."""
PICTURE, PAGE = "front.png", "report.html"
console = Console(width=150, record=True)
Tell = Callable[[str], None]
"""Prints a line with the seconds since the beginning."""


def base_network() -> nn.Module:
    """The trained network: stored in half precision, run in float32, channels last."""
    model = fashion_net()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def training_table(steps: dict[str, lamina.Comparison]) -> Table:
    """Throughput of training, the original beside the decomposed network, all factors training or some at rest."""
    table = Table("", "images/s", "original", "", title=f"training, forward and backward at batch {TRAINING_BATCH}")
    for name, timed in steps.items():
        here, original = (f"{TRAINING_BATCH / timing.median_s:,.0f}" for timing in (timed.after, timed.before))
        low, high = timed.interval
        table.add_row(name, here, original, f"×{timed.speedup:.2f} (95 %: {low:.2f} to {high:.2f})")
    return table


def readme_table(results: Sequence[dict[str, Any]]) -> str:
    """What the README shows: before and after, a column a network, in Markdown."""

    def of(name: str) -> list[str]:
        each = [(run["accuracy"].get(name), run["accuracy"]["before"]) for run in results]
        return ["–" if now is None else f"{now:.2%} ({100 * (now - before):+.2f})" for now, before in each]

    def timed(key: str, name: Any) -> list[str]:
        each = [run.get(key, {}).get(name) for run in results]
        return [
            "–" if t is None else f"**×{t['speedup']:.2f}** ({t['interval'][0]:.2f} to {t['interval'][1]:.2f})" for t in each
        ]

    def smaller(name: str) -> list[str]:
        return [f"÷{run['costs'][0][name] / run['costs'][1][name]:.2f}" for run in results]

    rows = [
        ["speed-up asked for", *(f"{run['asked']:g}" for run in results)],
        ["---"] * (1 + len(results)),
        [f"test accuracy with {UNLABELLED} unlabelled images, nothing fine-tuned", *of("untuned")],
        [f"after {EPOCHS} epochs on {TUNED:,} images, ten seconds' work", *of("tuned")],
        *([f"inference, batch {batch}", *timed("times", batch)] for batch in BATCHES),
        ["training step", *timed("training", "decomposed")],
        ["training step with sequential freezing", *timed("training", "decomposed, with freezing")],
        ["parameters", *smaller("parameters")],
        ["multiply-accumulates", *smaller("macs")],
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def publish(results: Sequence[dict[str, Any]], setting: str, seconds: float, picture: Path) -> None:
    """Put the table into the README, with its conditions and the seconds of the whole run, and the picture into the docs."""
    root = HERE.parents[1]
    page = root / "README.md"
    when = f"Measured {time.strftime('%Y-%m-%d')}, the whole demo in {seconds:.0f} s, on {setting}."
    body = f"{readme_table(results)}\n\n{when}"
    text = re.sub(
        "<!-- demo -->.*?<!-- /demo -->", lambda _: f"<!-- demo -->\n{body}\n<!-- /demo -->", page.read_text(), flags=re.S
    )
    page.write_text(text)
    if picture.exists():
        shutil.copyfile(picture, root / "docs" / "images" / "demo-front.png")


def table_of(found: dict[str, Any], title: str) -> Table:
    """Accuracies, times and costs of one network, before and after."""
    change = found["times"][BATCH]["change"]
    warned = "" if change is None or change <= MUCH else "WARNING: outputs change much. "
    table = Table("", "before", "after", "", title=f"{warned}{title}")
    names = {"untuned": "test accuracy, not fine-tuned", "tuned": f"test accuracy, fine-tuned on {TUNED:,} images"}
    before = found["accuracy"]["before"]
    for key, name in names.items():
        if key in found["accuracy"]:
            now = found["accuracy"][key]
            table.add_row(name, f"{before:.2%}", f"{now:.2%}", f"{100 * (now - before):+.2f} points")
    for batch, timed in found["times"].items():
        low, high = timed["interval"]
        ms = [f"{1e3 * timed[when]['median_s']:.3g} ms" for when in ("before", "after")]
        table.add_row(f"time, batch {batch}", *ms, f"×{timed['speedup']:.2f} (95 %: {low:.2f} to {high:.2f})")
    sizes = [f"{found['bytes'][when] / 1e6:.1f} MB" for when in ("before", "after")]
    table.add_row("weights on disk (float32)", *sizes, "plan included")
    table.add_row(f"outputs, batch {BATCH}", "", "–" if change is None else f"change by {change:.2g} of their size")
    for name in ("parameters", "macs"):
        was, now = (cost[name] for cost in found["costs"])
        table.add_row(name, f"{was / 1e6:.3f} M", f"{now / 1e6:.3f} M", f"÷{was / now:.2f}")
    return table


def shown(
    asked: float, model: nn.Module, small: nn.Module, before: float, test: Images, tuning: Images | None, out: Path, tell: Tell
) -> dict[str, Any]:
    """One network: how good it is, before and perhaps after a fine-tune, how fast, how large, and whether it is saved whole."""
    untuned = accuracy(small, test)
    accuracies = {"before": before, "untuned": untuned}
    tell(f"speed-up {asked:g}: {untuned:.2%} of the test images right, {100 * (untuned - before):+.2f} points")
    found: dict[str, Any] = {"asked": asked, "accuracy": accuracies}
    if tuning:
        training = lamina.finetune(
            small,
            Augmented(tuning, TRAINING_BATCH),
            loss=F.cross_entropy,
            epochs=EPOCHS,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.001, momentum=0.9),  # the fits are good: gently
            freezing=FREEZING,
            teacher=model,
            distillation=lamina.Distillation(weight=0.5, temperature=1.0),
            progress=True,
        )
        accuracies["tuned"] = accuracy(small, test)
        tell(f"fine-tuned: {accuracies['tuned']:.2%}, {100 * (accuracies['tuned'] - before):+.2f} points")
        found["epochs"] = [dataclasses.asdict(epoch) for epoch in training.epochs]
    times = {batch: lamina.compare(model, small, test.images[:batch], seconds=0.5) for batch in BATCHES}
    found["times"] = {batch: dataclasses.asdict(timed) for batch, timed in times.items()}
    found["costs"] = [dataclasses.asdict(lamina.count(net, test.images[:1])) for net in (model, small)]
    lamina.save(small, out / "network")
    again = lamina.load(fashion_net(), out / "network").eval()
    with torch.inference_mode():
        found["identical"] = torch.equal(again(test.images[:256]), small.eval()(test.images[:256]))
    dense_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    found["bytes"] = {"before": dense_bytes, "after": size(out / "network")}
    console.print(table_of(found, f"FashionNet, asked for a speed-up of {asked:g} at batch {BATCH}"))
    if tuning:
        modes = {"decomposed": lamina.Training(), "decomposed, with freezing": lamina.Training(freezing=FREEZING)}
        steps = {
            name: lamina.compare(model, small, test.images[:TRAINING_BATCH], mode=mode, seconds=0.5)
            for name, mode in modes.items()
        }
        found["training"] = {name: dataclasses.asdict(timed) for name, timed in steps.items()}
        console.print(training_table(steps))
    tell(f"timed; saved, loaded into a fresh network: outputs {'bit-identical' if found['identical'] else 'DIFFER'}")
    return found


def in_runtimes(
    model: nn.Module, small: nn.Module, x: torch.Tensor, data: Sequence[torch.Tensor]
) -> tuple[Table, list[lamina.Comparison]]:
    """The original and a faster network in the runtimes that are installed; in int8 by unlabelled images."""
    kinds: dict[str, Callable[[], Any]] = {
        "eager PyTorch": lamina.Eager,
        "the same, batch norms folded": lambda: lamina.Eager(folded=True),
        "ONNX Runtime": lamina.OnnxRuntime,
        "ONNX Runtime, int8": lambda: lamina.OnnxRuntime(int8=data),
        "OpenVINO": lamina.OpenVINO,
        "OpenVINO, int8": lambda: lamina.OpenVINO(int8=data),
    }
    rows = Table("run in", "original", "decomposed", "gain inside", "over the original in eager PyTorch", box=None)
    eager, timed = lamina.compare(model, model, x, seconds=0.3).before.median_s, list[lamina.Comparison]()
    for name, make in kinds.items():
        try:
            found = lamina.compare(model, small, x, runtime=make(), seconds=0.5)
        except lamina.MissingExtra as missing:
            rows.add_row(name, str(missing))
            continue
        timed.append(found)
        times = f"{found.before.median_ms:.2f} ms", f"{found.after.median_ms:.2f} ms"
        rows.add_row(name, *times, f"×{found.speedup:.2f}", f"×{eager / found.after.median_s:.2f}")
    return rows, timed


def picture(front: lamina.Front, path: Path) -> Any:
    """The front with what stands beside it, written to a file; the Matplotlib figure.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    figure = front.plot()
    (axes,) = figure.axes
    axes.set_xlabel(f"measured speed-up at batch {BATCH}")
    axes.set_ylabel("accuracy on 10,000 test images, nothing fine-tuned")
    figure.savefig(path, dpi=150)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(prog="lamina demo", description=__doc__.splitlines()[0])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--tuned", type=float, nargs="*", default=[2.0], help="the speed-ups that are fine-tuned too")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--publish", action="store_true", help="put the table into the README, the picture into the docs")
    options = parser.parse_args(argv)

    began = time.perf_counter()

    def tell(text: str) -> None:
        console.print(f"{time.perf_counter() - began:4.0f} s  {text}", highlight=False, soft_wrap=True)

    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    test, tuning = test_images(), tuning_images()
    model, x = base_network(), test.images[:BATCH]
    before = accuracy(model, test)
    tell(f"FashionNet, {before:.2%} of {len(test):,} test images right")
    calibration = lamina.calibrate(model, tuning.images[:UNLABELLED], outputs=lamina.Categorical(), progress=True)
    tell("calibrated on unlabelled images:")
    console.print(str(calibration), highlight=False, soft_wrap=True)

    # Without a score: test images tell how good the networks are, and choose nothing.
    speeds = {"speedups": options.speedups, "ratios": UNIFORM}
    front = lamina.pareto(model, x, data=calibration, seconds=0.5, progress=True, **speeds)
    tell(f"planned {len(front.points)} speeds by measured time, decomposed and measured them, and beside them uniform ratios")
    results, points = [], []
    served = front.points[len(front.points) // 2] if front.points else None
    for point in front.points:
        asked = point.asked or 0.0
        console.rule(f"speed-up {asked:g}")
        console.print(str(point.plan), highlight=False, soft_wrap=True)
        small = lamina.decompose(model, point.plan, data=calibration, check=False)  # pareto has tried it already
        own = tuning[:TUNED] if asked in options.tuned else None
        if point is served:
            untuned = copy.deepcopy(small)
        results.append(shown(asked, model, small, before, test, own, options.out / f"speedup-{asked:g}", tell))
        points.append(point.model_copy(update={"score": results[-1]["accuracy"]["untuned"]}))
    timed: list[lamina.Comparison] = []
    if served:
        console.rule(f"speed-up {served.asked or 0:g} where networks are served")
        rows, timed = in_runtimes(model, untuned, x, tuning.images[:UNLABELLED].split(BATCH))
        console.print(rows)
        tell("ranks were chosen by the times of eager PyTorch; make_plan(runtime=...) chooses by another's")
    console.rule("the front")
    uniform = [
        point.model_copy(update={"score": accuracy(lamina.decompose(model, point.plan, data=calibration, check=False), test)})
        for point in front.uniform
    ]
    front = front.model_copy(update={"before": before, "points": tuple(points), "uniform": tuple(uniform)})
    front.save(options.out / "front")
    tell("nothing fine-tuned, the score is the accuracy on the test images:")
    console.print(str(front), highlight=False, soft_wrap=True)
    try:
        picture(front, options.out / PICTURE)
        tell(f"both as a picture: {options.out / PICTURE}")
        if served:
            network = options.out / f"speedup-{served.asked:g}" / "network"
            page = lamina.report(network, options.out / PAGE, model="FashionNet", front=front, comparisons=timed)
            tell(f"{page}")
    except lamina.MissingExtra as missing:
        tell(f"no picture or no page: {missing}")

    record: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lamina": lamina.__version__,
        "runs": results,
    }
    record["uniform"] = [(point.speedup, point.score) for point in uniform]
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    console.rule()
    # Beyond what noise explains: the whole interval lies below 1.
    slower = [(r["asked"], batch) for r in results for batch, timed in r["times"].items() if timed["interval"][1] < 1]
    for asked, batch in slower:
        console.print(f"speed-up {asked:g} ran slower than the original at batch {batch}", style="red")
    console.print(f"measured on {front.conditions}", highlight=False, soft_wrap=True)
    tell(f"done; plans, networks, {PAGE}, {PICTURE}, results.json and report.txt are in {options.out}")
    (options.out / "report.txt").write_text(console.export_text())
    if options.publish:
        publish(results, front.conditions, time.perf_counter() - began, options.out / PICTURE)
    return 1 if slower or not all(r["identical"] for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
