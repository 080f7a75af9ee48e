"""The budget on a GPU: is a speed-up that is asked for met, what does finding it take, and what does a calibration cost there?

    python benchmarks/gpu.py budgets --publish
    python benchmarks/gpu.py calibration --publish
    python benchmarks/gpu.py demo --publish
    python benchmarks/gpu.py freezing --publish
    python benchmarks/gpu.py compiled --publish

Networks have fresh weights, as times do not depend on them, but for the demo's, whose accuracy on 10,000 images is shown.
Convolutions run as PyTorch has them by default (TF32 in float32). Each row is printed as soon as it stands.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import beside_the_goal, conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.measure.table import TimingTable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
Made = tuple[nn.Module, Tensor]
PASS, STEP = lamina.Inference(), lamina.Training()


def convolutional(name: str, device: str, dtype: torch.dtype, batch: int, side: int = 224) -> Made:
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).eval().to(device, dtype, memory_format=torch.channels_last)
    return model, torch.randn(batch, 3, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)


def vit(device: str, dtype: torch.dtype, batch: int) -> Made:
    import timm

    model = timm.create_model("vit_base_patch16_224", pretrained=False).eval().to(device, dtype)
    return model, torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)


ASKED: list[tuple[str, Callable[[str], Made], lamina.Mode, tuple[float, ...]]] = [
    ("VGG-16, 64 × 224 px, float16", lambda on: convolutional("vgg16", on, torch.float16, 64), PASS, (1.5, 2.0)),
    ("ViT-B/16, 256 × 224 px, float16", lambda on: vit(on, torch.float16, 256), PASS, (1.5, 2.0)),
    ("ResNet-50, 256 × 224 px, float16", lambda on: convolutional("resnet50", on, torch.float16, 256), PASS, (1.2, 1.5)),
    ("ResNet-50, 64 × 224 px, float32", lambda on: convolutional("resnet50", on, torch.float32, 64), PASS, (1.3,)),
    ("ResNet-50, 64 × 224 px, float32", lambda on: convolutional("resnet50", on, torch.float32, 64), STEP, (1.2,)),
]


def seconds(comparison: lamina.Comparison) -> str:
    low, high = comparison.interval
    return f"{comparison.before} → {comparison.after}, **×{comparison.speedup:.2f}** ({low:.2f} to {high:.2f})"


def said(plan: lamina.Plan) -> str:
    return "; ".join(beside_the_goal(plan))


def launched(comparison: lamina.Comparison) -> str:
    return "{:.0%} → {:.0%}".format(*comparison.launching) if comparison.launching else ""


def budgets(chosen: argparse.Namespace) -> str:
    rows = []
    for name, make, mode, speeds in ASKED:
        torch.manual_seed(0)
        model, x = make(chosen.device)
        with TimingTable(None) as timings:
            for wanted in speeds:
                began = time.perf_counter()
                plan = lamina.make_plan(model, x, lamina.Speedup(wanted), mode=mode, timings=timings)
                took = time.perf_counter() - began
                small = lamina.decompose(model, plan, check=False)
                result = lamina.compare(model, small, x, mode=mode, seconds=chosen.seconds / 2)
                planned = f"×{plan.whole.speedup:.2f}" if plan.whole and plan.whole.speedup else "dense"
                layers = f"{len(plan.decomposed)} of {len(plan.layers)}"
                rows.append(
                    [name, mode.name, f"×{wanted:g}", planned, seconds(result), launched(result), f"{took:.0f} s", layers]
                )
                rows[-1].append(said(plan))
                print(rows[-1], flush=True)
        del model, x, small
    head = ["network", "mode", "asked", "in the plan", "compared afterwards", "launching", "planning", "layers decomposed", ""]
    return table(head, rows)


def calibration(chosen: argparse.Namespace) -> str:
    """What a calibration of ResNet-50 takes, and a plan and factors by it."""
    torch.manual_seed(0)
    model, x = convolutional("resnet50", chosen.device, torch.float32, 16, side=160)
    images = torch.randn(64, 3, 160, 160).split(16)
    rows = []

    def timed(what: str, work: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        found = work()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
        rows.append([what, f"{time.perf_counter() - began:.1f} s", f"{taken / 1e6:.0f} MB"])
        print(rows[-1], flush=True)
        return found

    with TimingTable(None) as timings:
        found = timed("`calibrate`, 64 images of 160 px", lambda: lamina.calibrate(model, images, outputs=lamina.Categorical()))

        def planned() -> lamina.Plan:
            return lamina.make_plan(model, x, lamina.Speedup(1.3), data=found, timings=timings)

        plan = timed("`make_plan(…, Speedup(1.3), data=calibration)`, cold", planned)
        timed("the same from the table", planned)
        timed(f"`decompose` by it, {len(plan.decomposed)} layers", lambda: lamina.decompose(model, plan, found, check=False))
        ratio = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
        timed(
            f"`decompose` at ratio 2, {len(ratio.decomposed)} layers",
            lambda: lamina.decompose(model, ratio, found, check=False),
        )
        timed("the same without data", lambda: lamina.decompose(model, ratio, check=False))
    return table(["ResNet-50, 16 × 160 px, float32", "time", "memory of the GPU above what was held"], rows)


def demo(chosen: argparse.Namespace) -> str:
    """The demo's network, calibrated, nothing fine-tuned; and a training step with frozen factors."""
    from demo import base_network
    from fashion import test_images, tuning_images

    model, test = base_network().to(chosen.device), test_images()
    data = list(tuning_images().images[:512].to(chosen.device).split(32))
    images, labels = test.images.to(chosen.device), test.labels.to(chosen.device)
    x = images[: chosen.batch]

    def accuracy(net: nn.Module) -> float:
        net.eval()
        with torch.inference_mode():
            return (
                sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(images.split(500), labels.split(500), strict=True)) / 1e4
            )

    found = lamina.calibrate(model, data, outputs=lamina.Categorical())
    rows = [["original", "", "", "", f"{accuracy(model):.2%}"]]
    with TimingTable(None) as timings:
        for wanted in (1.5, 2.0, 3.0):
            plan = lamina.make_plan(model, x, lamina.Speedup(wanted), data=found, timings=timings)
            small = lamina.decompose(model, plan, found)
            result = lamina.compare(model, small, x, seconds=chosen.seconds / 4)
            rows.append([f"×{wanted:g}", seconds(result), launched(result), said(plan), f"{accuracy(small):.2%}"])
            print(rows[-1], flush=True)
    return table(
        [f"the demo's network, batch {chosen.batch}, 512 unlabelled images", "measured", "launching", "", "accuracy"], rows
    )


def freezing(chosen: argparse.Namespace) -> str:
    """What a step of training costs with the groups of sequential freezing at rest, against none, in turn."""
    from lamina.measure.clock import Effort, interleave, ratio, ratio_interval

    rows = []
    for batch in (32, 256):
        torch.manual_seed(0)
        model, x = convolutional("resnet50", chosen.device, torch.float32, batch)
        target = torch.randint(1000, (len(x),), device=chosen.device)
        plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())

        def step_of(net: nn.Module, x: Tensor = x, target: Tensor = target) -> Callable[[], None]:
            net.train()
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3, momentum=0.9)

            def step() -> None:
                optimizer.zero_grad()
                F.cross_entropy(net(x), target).backward()
                optimizer.step()

            return step

        free, frozen = lamina.decompose(model, plan, check=False), lamina.decompose(model, plan, check=False)
        lamina.freeze(frozen, lamina.VanillaFreezing())
        steps = [step_of(net) for net in (model, free, frozen)]
        dense, without, with_ = interleave(steps, x.device, Effort(2 * chosen.seconds, 7, 60))
        peaks = []
        for each in steps:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            each()
            peaks.append(f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB")
        for name, (a, b), peak in (
            ("plain ranks against dense", (dense, without), f"{peaks[0]} → {peaks[1]}"),
            ("with vanilla freezing against dense", (dense, with_), f"{peaks[0]} → {peaks[2]}"),
            ("vanilla freezing against none, same ranks", (without, with_), f"{peaks[1]} → {peaks[2]}"),
        ):
            low, high = ratio_interval(a, b)
            rows.append([f"batch {batch}: {name}", f"×{ratio(a, b):.2f} ({low:.2f} to {high:.2f})", peak])
            print(rows[-1], flush=True)
    return table(["a training step of ResNet-50 at ratio 2, 224 px, float32", "", "memory of a step"], rows)


def compiled(chosen: argparse.Namespace) -> str:
    """What plans made by eager times gain where both networks are compiled, and run as one captured graph."""
    rows = []
    for name, make, mode, (wanted, *_) in ASKED[:2]:
        torch.manual_seed(0)
        model, x = make(chosen.device)
        with TimingTable(None) as timings:
            plan = lamina.make_plan(model, x, lamina.Speedup(wanted), mode=mode, timings=timings)
        small = lamina.decompose(model, plan, check=False)
        for runtime in (lamina.Eager(), lamina.Compiled("reduce-overhead", freezing=False)):
            began = time.perf_counter()
            result = lamina.compare(model, small, x, seconds=chosen.seconds / 2, runtime=runtime)
            made = f"{time.perf_counter() - began:.0f} s"
            layers = f"{len(plan.decomposed)} of {len(plan.layers)}"
            rows.append([name, f"×{wanted:g}", str(runtime), seconds(result), layers, made, said(plan)])
            print(rows[-1], flush=True)
        del model, x, small
    head = ["network", "asked, by eager times", "run in", "measured", "layers decomposed", "compiling and measuring", ""]
    return table(head, rows)


TITLES = {
    "compiled": "On a GPU: in torch.compile",
    "budgets": "On a GPU: a speed-up that is asked for",
    "calibration": "On a GPU: calibration of ResNet-50",
    "demo": "On a GPU: the demo's network",
    "freezing": "On a GPU: frozen factors",
}
PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "budgets": budgets,
    "calibration": calibration,
    "demo": demo,
    "freezing": freezing,
    "compiled": compiled,
}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("part", choices=PARTS)
        parser.add_argument("--device", default="cuda")
        parser.add_argument("--batch", type=int, default=512, help="of the demo's network")

    chosen = options(__doc__, more)
    any_ = nn.Linear(4, 4).to(chosen.device)
    setting = lamina.compare(any_, any_, torch.randn(1, 4, device=chosen.device), seconds=0.1).setting
    # What a network runs in stands in its row.
    here = conditions(setting).replace(", float32, contiguous, inference, eager", "")
    body = f"{PARTS[chosen.part](chosen)}\n\n{here}"
    print(body)
    if chosen.publish:
        publish(f"gpu-{chosen.part}", TITLES[chosen.part], f"python benchmarks/gpu.py {chosen.part} --publish", body)


if __name__ == "__main__":
    main()
