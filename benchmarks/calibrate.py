"""What calibration takes, and what is done with it: seconds, and memory above the model; and what a damping is worth.

    python benchmarks/calibrate.py time --publish
    python benchmarks/calibrate.py plan --publish
    python benchmarks/calibrate.py damping --publish

``time``: each network in a process of its own, whose own memory counts, activations included; pages of mapped files, which
the system takes back when it needs them, apart; beside it seconds and memory of a forward and a backward alone, on
the same batches. ``plan``: planning ResNet-50 with a calibration, with an empty table and with a filled one, and decomposing
all of its layers with it; fresh weights, a process each. ``damping``: the demo's network at uniform ratios, factors fitted to
few and to many images under one damping for all layers and under the one that held-out images chose.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import conditions, options, publish, table
from torch import nn

import lamina
from lamina.calibration.damping import GRID

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
CODE = """
import threading, time, torch, lamina
torch.set_num_threads({threads})
torch.manual_seed(0)
{build}
def used():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return [1024 * int(status[what].split()[0]) for what in ("RssAnon", "RssFile")]
def watch():
    while True:
        peaks[:] = map(max, peaks, used())
        time.sleep(0.005)
def alone(batch):
    x = batch.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
for parameter in model.parameters():
    parameter.requires_grad_(False)
before = used()
peaks = list(before)
threading.Thread(target=watch, daemon=True).start()
began = time.perf_counter()
{work}
print(time.perf_counter() - began, *(peak - own for peak, own in zip(peaks, before)), *told)
"""
ALONE = """
for batch in data:
    alone(batch)
told = []
"""
CALIBRATE = """
found = lamina.calibrate(model, data, outputs={outputs}, memory={memory}, tolerance=None)
patches = sum(layer.taps is not None for layer in found.layers.values())
told = [found.bytes, found.record.passes, patches, len(found.layers)]
"""
RESNET50 = """
import torchvision
model = torchvision.models.resnet50(weights=None).eval()
data = torch.randn(64, 3, 160, 160).split(8)
"""
DETECTOR = """
from torch import nn
layers, width = [], 3
for wide in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512):
    layers += [nn.Conv2d(width, wide, 3, padding=1), nn.ReLU(inplace=True)] if wide else [nn.MaxPool2d(2)]
    width = wide or width
model = nn.Sequential(*layers, nn.Conv2d(512, 2, 1)).eval()
data = torch.randn(12, 3, 384, 384).split(1)
"""
BERT = """
import transformers
class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536)
        self.bert = transformers.BertForSequenceClassification(config)
    def forward(self, x):
        return self.bert(inputs_embeds=x).logits
model = Scores().eval()
data = torch.randn(128, 64, 384).split(16)
"""
SAVE = """
lamina.calibrate(model, data, outputs=lamina.Categorical()).save(r"{folder}/calibration")
told = []
"""
PLAN = """
found = lamina.Calibration.load(r"{folder}/calibration")
plan = lamina.make_plan(model, data[0], lamina.Speedup({speed}), data=found, timings=r"{folder}/times.sqlite")
told = [len(plan.decomposed), plan.whole.speedup or 1]
"""
DECOMPOSE = """
found = lamina.Calibration.load(r"{folder}/calibration")
plan = lamina.make_plan(model, data[0], lamina.Ratio(2), rule=lamina.AtRatio(), data=found)
peaks[:] = before = used()
began = time.perf_counter()
small = lamina.decompose(model, plan, data=found, sequential={sequential})
told = [len(plan.decomposed)]
"""
ROWS = {
    "ResNet-50, 64×3×160×160": (RESNET50, "lamina.Categorical()", 2e9),
    "the same, 600 MB": (RESNET50, "lamina.Categorical()", 6e8),
    "a detector (VGG-16), 12×3×384×384": (DETECTOR, "lamina.Gaussian()", 2e9),
    "BERT 384, 4 layers, 128×64 tokens": (BERT, "lamina.Categorical()", 2e9),
}


def run(build: str, work: str) -> list[float]:
    code = CODE.format(threads=torch.get_num_threads(), build=build, work=work)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [float(number) for number in told.splitlines()[-1].split()]


def time(chosen: argparse.Namespace) -> None:
    rows = []
    for name, (build, outputs, memory) in ROWS.items():
        alone, own, _ = run(build, ALONE)
        took, more, mapped, held, passes, patches, layers = run(build, CALIBRATE.format(outputs=outputs, memory=memory))
        row = [name, f"{memory / 1e9:g} GB", f"{took:.1f} s", f"{alone:.1f} s"]
        row += [f"{number / 1e6:.0f} MB" for number in (more, own, mapped, held)]
        rows.append([*row, f"{passes:.0f}", f"{patches:.0f} of {layers:.0f}"])
        print(rows[-1], flush=True)
    times, memories = ["calibrate", "network alone"], ["own memory above the model", "network alone", "mapped files", "moments"]
    body = table(["network and data", "memory", *times, *memories, "passes", "layers with patches"], rows)
    finish(chosen, "time", "What calibration takes", body)


def plan(chosen: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def row(what: str, work: str, **options: Any) -> None:
            took, more, _, *told = run(RESNET50, work.format(folder=folder, **options))
            layers, *speedup = told or [""]
            faster = [f"×{each:.2f}" for each in speedup] or [""]
            rows.append([what, f"{took:.1f} s", f"{more / 1e6:.0f} MB", f"{layers:.0f}" if told else "", *faster])
            print(rows[-1], flush=True)

        row("calibrate, and save", SAVE)
        row("plan Speedup(1.5), nothing timed before", PLAN, speed=1.5)
        row("plan Speedup(1.5), from the table and the calibration", PLAN, speed=1.5)
        row("plan Speedup(1.3), from the same", PLAN, speed=1.3)
        row("decompose, every layer at ratio 2", DECOMPOSE, sequential=None)
        row("the same in sequence", DECOMPOSE, sequential="data")
    network = "ResNet-50, 64×3×160×160, planned for 8×3×160×160"
    head = [network, "takes", "memory above the model", "layers decomposed", "in the plan"]
    finish(chosen, "plan", "What planning and decomposing with a calibration take", table(head, rows))


def finish(chosen: argparse.Namespace, part: str, title: str, body: str) -> None:
    body += "\n\n" + conditions(lamina.compare(nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(1, 4), seconds=0.1).setting)
    print(body)
    if chosen.publish:
        publish(f"calibrate-{part}", title, f"python benchmarks/calibrate.py {part}", body)


def damping(chosen: argparse.Namespace) -> None:
    from answers import drawn, inner, right
    from demo import base_network
    from fashion import test_images

    model, test = base_network(), test_images()
    x = test.images[:32]
    before = right(model, test.images, test.labels)
    with torch.inference_mode():
        answers = torch.cat([model(part) for part in test.images.split(500)])
    plans = {
        ratio: lamina.make_plan(model, x, lamina.Ratio(ratio), rule=lamina.AtRatio(), include=inner(model, x))
        for ratio in (2.0, 4.0, 6.0)
    }
    dampings: list[float | None] = [*GRID, None]
    rows = []
    for images, seeds in ((16, 3), (64, 3), (512, 1)):
        batches = [list(torch.cat(drawn(seed))[:images].split(max(images // 8, 1))) for seed in range(seeds)]
        found = [lamina.calibrate(model, each, outputs=lamina.Categorical(), tolerance=None) for each in batches]
        chose = sorted(each.layers[name].damping for each in found for name in plans[2.0].layers if name in each.layers)
        print(images, chose, flush=True)
        for ratio, plan in plans.items():
            row = [f"{images}", f"{ratio:g}"]
            for number in dampings:
                lost, nats = 0.0, 0.0
                for one in found:
                    method = plan.factors.model_copy(update={"damping": number})
                    small = lamina.decompose(model, plan.model_copy(update={"factors": method}), one, check=False)
                    lost += 100 * float((before.double() - right(small, test.images, test.labels).double()).mean()) / seeds
                    with torch.inference_mode():
                        after = torch.cat([small(part) for part in test.images.split(500)])
                    nats += float(lamina.Categorical().divergence(answers, after).mean()) / seeds
                row.append(f"{nats:.5f} ({lost:.2f})")
            rows.append(row)
            print(rows[-1], flush=True)
    heads = ["images", "ratio", *(f"{number:g}" for number in GRID), "chosen on held-out images"]
    body = f"{table(heads, rows)}\n\nNats from the original's answers on 10,000 test images, and points lost."
    finish(chosen, "damping", "What a damping is worth", body)


PARTS = {"time": time, "plan": plan, "damping": damping}


def main() -> None:
    chosen = options(__doc__ or "", lambda parser: parser.add_argument("part", choices=PARTS))
    PARTS[chosen.part](chosen)


if __name__ == "__main__":
    main()
