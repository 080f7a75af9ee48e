"""A small training that is killed with SIGKILL, at one moment or another, and then goes on.

``python killed.py SCRATCH`` reads scenarios from its standard input, a JSON list ``[loader, moment, count]`` a line: what the
data come from (LOADERS), when the training dies ("step", "writing", …; "never"), and how many such moments it lives through.
Every attempt is a process of its own, forked before anything was computed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lamina
from lamina.folder import digest
from lamina.train import checkpoint

CLASSES, SAMPLES, BATCH = 4, 22, 4  # 6 batches an epoch, the last one of 2


class Noisy(Dataset[Any]):
    """Draws from all three libraries for every sample, as augmentation does."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(SAMPLES, 2, 6, 6, generator=generator)
        self.y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return self.x[index] + noise, self.y[index]


class Stream(IterableDataset[Any]):
    """Has no index; its order is drawn when it is iterated."""

    def __init__(self) -> None:
        self.data = Noisy()

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[Any]:
        return (self.data[int(index)] for index in torch.randperm(SAMPLES))


class Own:
    """A loader of the user's, with a generator for its order and its noise."""

    def __init__(self) -> None:
        self.data = Noisy()
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        for chosen in torch.randperm(SAMPLES, generator=self.generator).split(BATCH):
            x = self.data.x[chosen]
            yield x + torch.rand(len(x), 1, 1, 1, generator=self.generator), self.data.y[chosen]


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [(x, y) for x, y in zip(Noisy().x.split(BATCH), Noisy().y.split(BATCH), strict=True)],
    "shuffled": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "workers": lambda: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(), BATCH),
    "own": Own,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def decomposed() -> tuple[nn.Module, nn.Module]:
    """A network and a decomposed copy: a triple and a pair."""
    model = network()
    plan = lamina.make_plan(model, torch.zeros(1, 2, 6, 6), lamina.Ratio(2.0), rule=lamina.AtRatio())
    plan = plan.with_form("4", lamina.BlockTerm(4, 4, 1)).with_form("8", lamina.LowRank(2)).with_form("0", lamina.Dense())
    return model, lamina.decompose(model, plan, check=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Wraps a function; dies before, or half-way through, its COUNTth call."""

    def __init__(self, function: Callable[..., Any], count: int, spoil: Callable[..., None] = lambda *_, **__: None) -> None:
        self.function, self.left, self.spoil = function, count, spoil

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            self.spoil(*args, **kwargs)
            die()
        return self.function(*args, **kwargs)


def half_a_file(path: Path, tensors: Any) -> None:
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{")


def die_at(moment: str, count: int, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Arrange a death: the loss to train with."""
    if moment == "step":  # in the middle of a step, between forward and backward
        return Countdown(loss, count)
    if moment == "writing":  # a file of a checkpoint is half-written
        checkpoint.write_tensors = Countdown(checkpoint.write_tensors, count, half_a_file)
    if moment == "renaming":  # a checkpoint is written, but not yet under its name; or a link is
        os.replace = Countdown(os.replace, count)
    if moment == "removing":  # an old checkpoint is half-removed
        checkpoint.shutil.rmtree = Countdown(checkpoint.shutil.rmtree, count)
    return loss


def train(folder: str, loader: str, moment: str, count: int) -> dict[str, Any]:
    model, small = decomposed()
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    record = lamina.finetune(
        small,
        LOADERS[loader](),
        loss=die_at(moment, count, F.cross_entropy),
        epochs=3,
        freezing=lamina.SequentialFreezing(period=2, unit="steps"),
        teacher=model,
        score=lambda net: -float(net(torch.ones(2, 2, 6, 6)).square().mean() + 0 * torch.rand(())),
        optimizer=(lambda p: torch.optim.AdamW(p, lr=1e-2)) if loader == "own" else None,
        accumulate=1 if loader in ("list", "shuffled") else 2,
        checkpoints=None if folder == "-" else lamina.Checkpoints(folder, every=2),
    )
    return {
        "weights": digest(dict(small.state_dict())),
        "losses": [epoch.loss for epoch in record.epochs],
        "scores": [epoch.score for epoch in record.epochs],
        "resting": [list(epoch.resting) for epoch in record.epochs],
        "steps": record.steps,
        "drawn next": float(torch.rand(())),
    }


def attempt(result: Path, *arguments: Any) -> bool:
    """A training in a process of its own; whether it lived. Anything but SIGKILL that ends it early is an error."""
    child = os.fork()
    if child == 0:
        try:
            result.write_text(json.dumps(train(*arguments)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise SystemExit(f"{arguments} ended with status {status}")
    return True


def main(scratch: Path) -> None:
    """For every scenario: what a training gives that is killed and resumed, and how often it was killed."""
    for needed in ("torch._dynamo", "accelerate"):  # by every child, and it takes longer than a training
        importlib.import_module(needed)
    for number, line in enumerate(sys.stdin):
        loader, moment, count = json.loads(line)
        folder, result = scratch / f"run{number}", scratch / f"result{number}.json"
        deaths = 0
        if moment == "never":
            attempt(result, "-", loader, moment, count)
        elif moment == "again and again":
            while not attempt(result, str(folder), loader, "step", count):
                deaths += 1
        else:
            deaths += not attempt(result, str(folder), loader, moment, count)
            attempt(result, str(folder), loader, "never", 0)
        left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        print(json.dumps({"deaths": deaths, "left": left, "result": json.loads(result.read_text())}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
