"""One calibration for two processes: ``python together.py SCRATCH`` in each, with RANK and the like set."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lamina


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 3)).double()


def data() -> list[Tensor]:
    return list(torch.randn(32, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split(2))


def wide() -> nn.Module:
    """One whose middle layer is known along directions, where the memory is little."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def drawn(batches: list[Tensor], memory: float = 40_000) -> lamina.Calibration:
    """By answers that are drawn, so with curves."""
    return lamina.calibrate(wide(), batches, outputs=lamina.Categorical(), memory=memory, tolerance=None)


def loss(y: Tensor) -> Tensor:
    return y.sin().sum()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    scratch, rank = Path(sys.argv[1]), dist.get_rank()
    own = data()[rank * 8 : rank * 8 + 8]
    lamina.calibrate(network(), own, outputs=loss).save(scratch / f"whole.{rank}")
    lamina.calibrate(network(), own, outputs=loss, memory=40_000).save(scratch / f"parted.{rank}")
    drawn(own).save(scratch / f"drawn.{rank}")
    drawn(data()[:8]).save(scratch / f"same.{rank}")
    spoilt = [*own[:5], own[5] * torch.nan, *own[6:]]
    for name, broken in (("nan", spoilt), ("empty", [])):
        try:
            lamina.calibrate(network(), broken if rank else own, outputs=loss)
        except lamina.LaminaError as error:
            (scratch / f"{name}.{rank}").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()
