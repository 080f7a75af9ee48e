"""DDP under freezing: wrapped anew in every phase, against once with ``find_unused_parameters=True``.

    python benchmarks/ddp_phases.py --publish

Two processes over gloo on one machine, a thread each, and both ways in turn on copies of one network. A swap is what changes
the phase, the wrapping with it, and what the two steps after it take longer than others.
"""

from __future__ import annotations

import copy
import os
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.measure.conditions import setting_of
from lamina.train.distributed import wrapped

PROCESSES, STEPS, ROUNDS = 2, 10, 14


def layers() -> tuple[nn.Module, Tensor]:
    """Fifty layers of 64 channels, where calls count."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(50))), torch.randn(16, 64)


def resnet18() -> tuple[nn.Module, Tensor]:
    from torchvision.models import resnet18

    return resnet18(num_classes=10), torch.randn(8, 3, 64, 64)


def resnet50() -> tuple[nn.Module, Tensor]:
    from torchvision.models import resnet50

    return resnet50(num_classes=10), torch.randn(4, 3, 64, 64)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "50 linear layers of 64": layers,
    "ResNet-18, 8 × 64×64": resnet18,
    "ResNet-50, 4 × 64×64": resnet50,
}


class Trained:
    """A network on its way in one of the two ways."""

    def __init__(self, small: nn.Module, *, once: bool) -> None:
        self.small, self.once = small, once
        self.net: nn.Module = wrapped(small, None, find_unused_parameters=once)
        self.freezing = lamina.freeze(small, lamina.SequentialFreezing())
        self.optimizer = torch.optim.SGD(self.freezing.parameter_groups(), lr=1e-3, momentum=0.9)
        self.epoch = 0
        if not once:
            self.net = wrapped(small, self.net)

    def swap(self) -> None:
        self.epoch += 1
        if self.freezing.start_epoch(self.epoch) and not self.once:
            self.net = wrapped(self.small, self.net)

    def step(self, x: Tensor) -> None:
        output = self.net(x)
        F.cross_entropy(output, torch.arange(len(output)) % 10).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_process(rank: int, port: int, name: str, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
    small = lamina.decompose(model, plan, check=False).train()
    torch.manual_seed(rank)
    x = torch.randn_like(x)
    ways = [Trained(copy.deepcopy(small), once=once) for once in (False, True)]
    steady: list[list[float]] = [[], []]
    swaps: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for number, way in enumerate(ways):

            def begin(way: Trained = way) -> None:
                way.swap()
                way.step(x)
                way.step(x)

            swaps[number].append(timed(begin))
            steady[number] += [timed(lambda way=way: way.step(x)) for _ in range(STEPS)]  # type: ignore[misc]
    anew, once = (dict(way.small.state_dict()) for way in ways)
    buffers = {name for name, _ in small.named_buffers()}
    same_ways = all(torch.equal(anew[key], once[key]) for key in anew if key not in buffers)
    same_ranks = True
    for state in (anew, once):
        for key in sorted(set(state) - buffers):
            others = [torch.empty_like(state[key]) for _ in range(PROCESSES)]
            dist.all_gather(others, state[key].contiguous())
            same_ranks &= all(torch.equal(other, state[key]) for other in others)
    if rank == 0:
        steps = [median(each) * 1e3 for each in steady]
        extra = [median(each) * 1e3 - 2 * step for each, step in zip(swaps, steps, strict=True)]
        answers.put((steps, extra, same_ways, same_ranks))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answers = mp.get_context("spawn").SimpleQueue()
        running = mp.spawn(one_process, (port, name, answers), nprocs=PROCESSES, join=False)
        steps, extra, same_ways, same_ranks = answers.get()
        running.join()
        saved = steps[1] - steps[0]
        pays = f"{max(extra[0] - extra[1], 0) / saved:.0f}" if saved > 0 else "never"
        cells = [f"{value:.3g} ms" for value in (*steps, *extra)]
        rows.append([name, *cells, pays, f"{'yes' if same_ranks else 'NO'}, {'yes' if same_ways else 'NO'}"])
        print(*rows[-1], sep=" | ", flush=True)
    head = ["network", "a step, anew", "a step, once", "a swap, anew", "a swap, once", "anew pays from … steps a phase"]
    rows_of = table([*head, "equal weights: processes, ways"], rows)
    body = f"{conditions(setting_of(nn.Linear(1, 1), 'training', channels_last=False))} Two processes.\n\n{rows_of}"
    if chosen.publish:
        publish("ddp-phases", "DDP under freezing", "python benchmarks/ddp_phases.py --publish", body)


if __name__ == "__main__":
    main()
