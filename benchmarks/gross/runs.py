"""Results of stages, kept as soon as they are there, so that an experiment goes on where it was stopped.

Numbers stand in ``benchmarks/runs/gross/NAME.json`` and belong to the repository; weights in ``weights/`` beside it do not. Two
processes may work on one experiment at the same time: each adds what it made to the file as it then is.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from data import Batches, Images, in_order
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

import lamina
from lamina.forms import Form

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import conditions, options, publish, table  # noqa: F401 - handed on to the experiments beside this file

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "gross"
WEIGHTS = FOLDER / "weights"
PLOTS = Path(__file__).resolve().parents[2] / "docs" / "images"
SEEDS = (0, 1, 2)


def extend(parser: argparse.ArgumentParser) -> None:
    """What the command lines of these experiments have in common."""
    parser.add_argument("--quick", action="store_true", help="a few images and nothing kept: does it run?")
    parser.add_argument("--times", action="store_true", help="only what looks at the clock; needs a quiet machine")


class Runs:
    """The results of one experiment, by name."""

    def __init__(self, name: str, quick: bool = False) -> None:
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        self.name = f"quick-{name}" if quick else name
        self.path = (WEIGHTS if quick else FOLDER) / f"{self.name}.json"

    def all(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def __getitem__(self, key: str) -> Any:
        return self.all()[key]

    def __contains__(self, key: str) -> bool:
        return key in self.all()

    def put(self, key: str, value: Any) -> None:
        with (WEIGHTS / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fresh = self.path.with_suffix(".new")
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (self.all() | {key: value}).items()]
            fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            os.replace(fresh, self.path)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """A result, made now unless it is there."""
        if key not in self:
            began = time.perf_counter()
            self.put(key, make())
            print(f"{self.name}: {key} ({time.perf_counter() - began:.0f} s)", flush=True)
        return self[key]

    def weights(self, name: str) -> Path:
        return WEIGHTS / f"{self.name}-{name}"

    def base(self, make: Callable[[], nn.Module], train: Callable[[nn.Module], Any]) -> nn.Module:
        """The network that everything starts from, trained now unless its weights are there."""
        torch.manual_seed(0)
        model, path = make(), self.weights("base.safetensors")
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            self.put("base", train(model))
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
        return model.eval()

    def supernet(self, name: str, base: nn.Module, make: Callable[[], lamina.Supernet]) -> lamina.Supernet:
        """A supernet, made now unless its weights are there; how long it took is kept too."""
        path = self.weights(name)
        if not path.exists():
            began = time.perf_counter()
            lamina.save(make(), path)
            self.put(f"{name}, seconds", round(time.perf_counter() - began, 1))
            print(f"{self.name}: {name} ({time.perf_counter() - began:.0f} s)", flush=True)
        return lamina.load_supernet(copy.deepcopy(base), path)


def trained(
    model: nn.Module, data: Images, *, epochs: int, batch: int, rate: float, seed: int, from_scratch: bool = False
) -> nn.Module:
    """Cross-entropy, SGD with momentum 0.9, weight decay 1e-4 and gradients of norm 1 at most, under autocast to bfloat16.

    The rate falls to 0 as a cosine; from scratch it first rises.
    """

    def rise_and_fall(optimizer: optim.Optimizer, steps: int) -> Any:
        return optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.25)

    lamina.finetune(
        model,
        Batches(data, batch, seed),
        loss=F.cross_entropy,
        epochs=epochs,
        optimizer=lambda parameters: optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4),
        precision="bfloat16",
        clip=1.0,
        schedule=rise_and_fall if from_scratch else None,
    )
    return model


def taught(
    model: nn.Module,
    batches: Any,
    teacher: nn.Module,
    *,
    passes: int,
    rate: float,
    seed: int,
    precision: Literal["bfloat16"] | None = None,
) -> nn.Module:
    """Tuned on a teacher's answers alone: SGD with momentum 0.9, a cosine to 0; batch norms keep their statistics."""
    torch.manual_seed(seed)
    lamina.finetune(
        model,
        batches,
        loss=lambda output, target: output.sum() * 0,
        epochs=passes,
        teacher=teacher,
        distillation=lamina.Distillation(weight=1.0),
        optimizer=lambda parameters: optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4),
        clip=1.0,
        eval_mode=True,
        precision=precision,
    )
    return model


def judged(model: nn.Module, data: Images) -> list[float]:
    """Mean loss and accuracy of a network in eval mode, under autocast to bfloat16."""
    loss, right = told(model, data)
    return [loss, round(float(read(right, len(data)).mean()), 6)]


@torch.no_grad()
def told(model: nn.Module, data: Images) -> tuple[float, str]:
    """Mean loss of a network in eval mode, under autocast to bfloat16, and which images it tells right, as `kept` writes it."""
    model.eval()
    lost, right = 0.0, []
    for x, y in in_order(data):
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(x).float()
        lost += float(F.cross_entropy(scores, y, reduction="sum"))
        right.append(scores.argmax(1) == y)
    return round(lost / len(data), 6), kept(torch.cat(right))


def kept(found: Tensor) -> str:
    """Which images are told right, in hexadecimal."""
    return np.packbits(found.numpy()).tobytes().hex()


def read(text: str, number: int = 10_000) -> Tensor:
    """What `kept` wrote: ones and zeros."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    return torch.from_numpy(bits[:number].astype(np.float64))


def points(bits: Sequence[Tensor]) -> float:
    """Of 100 images, those told right; mean over the seeds."""
    return 100 * float(torch.stack([*bits]).mean())


def above(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
    """Points by which a lies above b, with a 95 % interval: over the images, and over the seeds, each paired with itself."""
    apart = 100 * (torch.stack([*a]) - torch.stack([*b]))
    by_image = float(apart.mean(0).std()) / apart.shape[1] ** 0.5
    by_seed = float(apart.mean(1).std()) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    return f"{float(apart.mean()):+.2f} ± {1.96 * math.hypot(by_image, by_seed):.2f}"


@dataclass(frozen=True, slots=True)
class MinusLoss:
    """A score for searches: minus the mean cross-entropy over some batches, the network under autocast to bfloat16.

    With ``recalibration`` the statistics of batch norms are estimated anew on these inputs for every configuration.
    """

    batches: list[tuple[Tensor, Tensor]]
    recalibration: list[Tensor] | None = None

    def score_many(self, net: lamina.Supernet, configs: Sequence[Mapping[str, Form]]) -> list[float | Exception]:
        scored = lamina.Scored(
            self.batches, lambda output, target: -F.cross_entropy(output.float(), target), self.recalibration
        )
        with torch.autocast("cpu", torch.bfloat16):
            return scored.score_many(net, configs)


def sizes(config: Mapping[str, Form]) -> str:
    """The group sizes of a configuration, layer by layer: ``8 16 64``."""
    return " ".join(str(form.rank_in // form.groups) for form in config.values())


def spread(values: Sequence[float]) -> str:
    """Accuracies as percent, mean ± standard deviation."""
    percent = [100 * value for value in values]
    return f"{mean(percent):.2f}" + (f" ± {stdev(percent):.2f}" if len(percent) > 1 else "")


def save_plot(figure: Any, name: str, title: str) -> str:
    """Write a figure for the results page; returns the line that shows it."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"{name}.png", dpi=80)
    return f"![{title}](../images/{name}.png)"
