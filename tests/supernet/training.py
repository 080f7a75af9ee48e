"""Trainings of a small supernet in processes of their own: ``python training.py SCENARIO FOLDER``.

``killed``: dies by SIGKILL in the middle of an epoch, unless the folder holds checkpoints already; then it goes on. ``whole``:
the same without dying. ``together,apart``: one of two processes, with RANK and the like set. Each writes its weights.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina.forms import Dense, LowRank
from lamina.supernet.convert import make_supernet
from lamina.supernet.supernet import Supernet
from lamina.supernet.train import Recipe, train_supernet
from lamina.train.checkpoint import Checkpoints

MOVING = Recipe(rate=0.05, norms_in_eval=False)
STILL = Recipe(rate=0.05)
"""Batch statistics would be those of each process's own part."""


def supernet() -> Supernet:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    forms = {"7": [LowRank(1), LowRank(2), Dense()]}
    return make_supernet(model, torch.randn(2, 2, 5, 5), group_sizes=(1, 2, 8), forms=forms)


def batches(number: int = 5, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number * size, 2, 5, 5, generator=generator)
    y = torch.randint(0, 3, (number * size,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def trained(folder: Path, die_at: int | None = None, **options: Any) -> dict[str, Tensor]:
    net, calls = supernet(), 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    train_supernet(net, batches(), loss=loss, epochs=2, seed=3, **options)
    return dict(net.network.state_dict())


def main(scenario: str, place: str) -> None:
    torch.set_num_threads(1)
    folder = Path(place)
    kept = folder / "checkpoints"
    if scenario in ("killed", "whole"):
        fresh = not kept.exists() and scenario == "killed"
        found = trained(folder, 8 if fresh else None, checkpoints=Checkpoints(kept, every=1), recipe=MOVING)
        save_file(found, folder / f"{scenario}.safetensors")
    else:
        for each in scenario.split(","):
            found = trained(folder, apart=each == "apart", recipe=STILL)
            save_file(found, folder / f"{each}.{os.environ['RANK']}.safetensors")
        torch.distributed.barrier()  # a process that ends while the other still talks to it has been seen to abort
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
