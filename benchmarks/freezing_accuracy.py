"""How accurate is a network that was fine-tuned with freezing, and how soon?

    python benchmarks/freezing_accuracy.py --publish

The demo's network at ratios 2 and 4, fine-tuned on 5,000 images it has not seen, scored on 5,000 others after every epoch
and on the 10,000 test images at the end. Every way of training starts from the same decomposed network and sees the same
images in the same order; the seeds change order and augmentation. Accuracies do not depend on the clock, so they may be
computed on a busy machine, and each run is kept in ``benchmarks/runs`` as soon as it is done: what was interrupted goes on.
Times are taken separately, in float32 (``--publish``, on a quiet machine): steps of all ways interleaved, times their
number. Scoring is not counted.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import whole_setting
from lamina.measure.clock import Effort, interleave
from lamina.values import Workload

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
from demo import base_network
from fashion import Images, test_images, tuning_images, validation_images
from training import accuracy, augment

RUNS = Path(__file__).resolve().parent / "runs"
RATIOS, SEEDS, EPOCHS, BATCH, RATE = (2.0, 4.0), (0, 1, 2), 3, 64, 0.01
TARGET = 0.003  # below the original's accuracy


@dataclass(frozen=True)
class Way:
    """A way of training."""

    freezing: lamina.SequentialFreezing | lamina.VanillaFreezing | None = None
    distilled: bool = False
    dense: bool = False


WAYS = {
    "original, trained on": Way(dense=True),
    "unfrozen": Way(),
    "vanilla freezing": Way(lamina.VanillaFreezing()),
    "sequential freezing": Way(lamina.SequentialFreezing()),
    "sequential, last epoch unfrozen": Way(lamina.SequentialFreezing(unfrozen_last=1)),
    "sequential, distilled": Way(lamina.SequentialFreezing(), distilled=True),
}


class Batches:
    """Augmented batches in an order of its own each epoch."""

    def __init__(self, data: Images, seed: int) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.data), generator=self.generator)[: len(self) * BATCH].split(BATCH):
            yield augment(self.data.images[chosen], self.generator), self.data.labels[chosen]


def decomposed(ratio: float, example: Tensor) -> nn.Module:
    """The network that all ways of one ratio start from; its plan is kept, so that a run that goes on has the same."""
    path = RUNS / f"plan-{ratio:g}.json"
    if not path.exists():
        mode = lamina.Training(freezing=lamina.SequentialFreezing())
        lamina.make_plan(base_network(), example, lamina.Ratio(ratio), mode=mode).save(path)
    return lamina.decompose(base_network(), lamina.Plan.load(path))


@functools.cache
def start(ratio: float | None) -> tuple[nn.Module, float, float]:
    """The network before any training, None for the original, and its accuracy on the validation and the test images."""
    model = base_network() if ratio is None else decomposed(ratio, tuning_images().images[:BATCH])
    return model, accuracy(model, validation_images()), accuracy(model, test_images())


def train(way: Way, ratio: float, seed: int, images: tuple[Images, Images, Images]) -> dict[str, Any]:
    tuning, validation, test = images
    torch.manual_seed(seed)
    untrained, *before = start(None if way.dense else ratio)
    model = copy.deepcopy(untrained)
    curve = before[:1]
    lamina.finetune(
        model,
        Batches(tuning, seed),
        loss=F.cross_entropy,
        epochs=EPOCHS,
        freezing=way.freezing,
        precision="bfloat16",
        teacher=base_network() if way.distilled else None,
        distillation=lamina.Distillation(weight=0.5, temperature=1.0) if way.distilled else None,
        optimizer=lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=1e-4),
        score=lambda network: curve.append(accuracy(network, validation)) or curve[-1],
    )
    return {"validation": curve, "test": [before[1], accuracy(model, test)]}


def runs_of(seed: int, images: tuple[Images, Images, Images]) -> dict[str, Any]:
    """Every run of a seed, from its file or made now."""
    path = RUNS / f"freezing_accuracy-{seed}.json"
    runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for ratio in RATIOS:
        for name, way in WAYS.items():
            key = f"{'dense' if way.dense else f'ratio {ratio:g}'}, {name}"
            if key in runs:
                continue
            began = time.perf_counter()
            runs[key] = train(way, ratio, seed, images)
            path.write_text(json.dumps(runs, indent=1) + "\n")
            print(f"{key}, seed {seed}: {runs[key]['test'][1]:.2%} in {time.perf_counter() - began:.0f} s", flush=True)
    return runs


def step_times(ratio: float, x: Tensor, y: Tensor, seconds: float) -> dict[str, float]:
    """Median seconds of a step of each way, interleaved; freezing counts the mean over its phases."""
    teacher = base_network()
    steps: list[tuple[str, Callable[[], None]]] = []
    for name, way in WAYS.items():
        model = (base_network() if way.dense else decomposed(ratio, x)).train()
        freezing = lamina.freeze(model, way.freezing, epochs=EPOCHS) if way.freezing else None
        optimizer = torch.optim.SGD(freezing.parameter_groups() if freezing else model.parameters(), lr=1e-6, momentum=0.9)
        for epoch in range(EPOCHS if freezing else 1):

            def step(model=model, optimizer=optimizer, freezing=freezing, epoch=epoch, distilled=way.distilled) -> None:
                if freezing:
                    freezing.start_epoch(epoch)
                optimizer.zero_grad(set_to_none=True)
                scores = model(x)
                loss = F.cross_entropy(scores, y)
                if distilled:
                    with torch.no_grad():
                        wanted = teacher(x).softmax(1)
                    loss = 0.5 * loss + 0.5 * F.cross_entropy(scores, wanted)
                loss.backward()
                optimizer.step()

            steps.append((name, step))
    taken = interleave([step for _, step in steps], x.device, Effort(4 * seconds, 7, 60))
    times: dict[str, list[float]] = {}
    for (name, _), each in zip(steps, taken, strict=True):
        times.setdefault(name, []).append(median(each))
    return {name: mean(each) for name, each in times.items()}


def main() -> None:
    chosen = options(__doc__, lambda parser: parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS)))
    RUNS.mkdir(exist_ok=True)
    images = tuning_images(), validation_images(), test_images()
    runs = {seed: runs_of(seed, images) for seed in chosen.seeds}
    if not chosen.publish:
        return
    tuning = images[0]
    x, y = tuning.images[:BATCH], tuning.labels[:BATCH]
    batches = len(tuning) // BATCH
    original = next(iter(runs.values()))["dense, original, trained on"]["validation"][0]
    rows = []
    for ratio in RATIOS:
        times = step_times(ratio, x, y, chosen.seconds)
        for name, way in WAYS.items():
            key = "dense" if way.dense else f"ratio {ratio:g}"
            each = [runs[seed][f"{key}, {name}"] for seed in chosen.seeds]
            epoch_s = times[name] * batches
            reached = [next((n for n, a in enumerate(run["validation"]) if a >= original - TARGET), None) for run in each]
            soon = [f"{n * epoch_s:.0f} s" if n is not None else "not reached" for n in reached]
            final = [100 * run["test"][1] for run in each]
            rows.append(
                [
                    f"ratio {ratio:g}: {name}",
                    f"{100 * each[0]['test'][0]:.2f}",
                    f"**{mean(final):.2f}** ± {stdev(final):.2f}",
                    f"{100 * mean(run['validation'][-1] for run in each):.2f}",
                    f"{epoch_s:.1f} s (×{times['original, trained on'] / times[name]:.2f})",
                    ", ".join(soon),
                ]
            )
    setting = whole_setting(base_network(), Workload(x), lamina.Training())
    head = ["", "test before, %", "test after, %", "validation after, %", "an epoch (× original)", "to the target, by seed"]
    body = "\n\n".join(
        [
            f"{conditions(setting)} {len(tuning):,} images, batch {BATCH}, {EPOCHS} epochs, SGD {RATE} with momentum 0.9, "
            "weight decay 1e-4, cosine, trained under autocast to bfloat16 and scored in float32; "
            f"seeds {', '.join(map(str, chosen.seeds))}; mean ± standard deviation. The target is the "
            f"original's validation accuracy ({100 * original:.2f} %) less {100 * TARGET:.1f} points, looked for at epochs' "
            "ends; 0 s is before any training.",
            table(head, rows),
        ]
    )
    print(body)
    publish("freezing-accuracy", "Accuracy with freezing", "python benchmarks/freezing_accuracy.py --publish", body)


if __name__ == "__main__":
    main()
