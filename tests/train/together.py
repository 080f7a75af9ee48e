"""Trainings for two processes: ``python together.py SCRATCH SCENARIO…`` in each, with RANK and the like set.

A scenario is a function from a folder to tensors by name; called in one process it gives what two must give. Each process
writes what it got to ``SCENARIO.RANK.safetensors`` in SCRATCH.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lamina
from lamina.train.distributed import agreed, processes, rank, whole

CLASSES = 3
SWAPS, REPEATS = 20, 3


def network(norm: Callable[[], nn.Module] = lambda: nn.GroupNorm(2, 8)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def plan(model: nn.Module) -> lamina.Plan:
    made = lamina.make_plan(model, torch.zeros(1, 2, 5, 5), lamina.Ratio(2.0), rule=lamina.AtRatio())
    return made.with_form("3", lamina.BlockTerm(4, 4, 1)).with_form("7", lamina.LowRank(2)).with_form("0", lamina.Dense())


def decomposed(**options: Any) -> nn.Module:
    model = network(**options)
    return lamina.decompose(model, plan(model), check=False)


def samples(number: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 2, 5, 5, generator=generator)
    return x, torch.randint(0, CLASSES, (number,), generator=generator)


def batches(number: int, size: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    x, y = samples(number * size, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def swaps(_: Path) -> dict[str, Tensor]:
    """A phase for every step, many times over: each wraps anew."""
    found: dict[str, Tensor] = {}
    for repeat in range(REPEATS):
        small = decomposed()
        record = lamina.finetune(
            small,
            batches(SWAPS // 2, 4, repeat),
            loss=F.cross_entropy,
            epochs=2,
            freezing=lamina.SequentialFreezing(unit="steps"),
        )
        found |= {f"{repeat}.{name}": tensor for name, tensor in small.state_dict().items()}
        found |= {f"{repeat}.loss": torch.tensor([epoch.loss for epoch in record.epochs])}
    return found


def accumulated(_: Path) -> dict[str, Tensor]:
    """Accumulation, clipping, a teacher, and a last batch of one sample, which two processes cannot divide."""
    small = decomposed()
    torch.manual_seed(4 + 10 * rank())  # the order must be the same in all
    if rank() == 0:
        torch.manual_seed(4)
    record = lamina.finetune(
        small,
        DataLoader(TensorDataset(*samples(21)), 4, shuffle=True),
        loss=F.cross_entropy,
        epochs=2,
        freezing=lamina.SequentialFreezing(),
        teacher=network(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3),
        accumulate=2,
        clip=0.05,
    )
    return dict(small.state_dict()) | {"loss": torch.tensor([epoch.loss for epoch in record.epochs])}


def statistics(_: Path) -> dict[str, Tensor]:
    """Batch norm: each process sees other batches, and yet all end with the same statistics."""
    small = decomposed(norm=lambda: nn.BatchNorm2d(8))
    lamina.finetune(small, batches(4, 6), loss=F.cross_entropy, epochs=1, freezing=lamina.VanillaFreezing())
    return dict(small.state_dict())


def poisoned(_: Path) -> dict[str, Tensor]:
    """The last process's part of the third batch gives no number: all stop at that step."""
    calls = iter(range(100))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        broken = next(calls) == 2 and rank() == processes() - 1
        return F.cross_entropy(output, target) * (float("nan") if broken else 1.0)

    small = decomposed()
    try:
        lamina.finetune(small, batches(5, 4), loss=loss, epochs=1)
    except lamina.TrainingError as error:
        assert "step 3" in str(error) and "nan" in str(error)
        return dict(small.state_dict())
    raise AssertionError("a loss of NaN went unnoticed")


def plans(_: Path) -> dict[str, Tensor]:
    """Process 0 makes the plan; and where it cannot, all hear why."""
    model = network()

    def make() -> lamina.Plan:
        assert rank() == 0, "a plan is made once"
        return plan(model)

    def fail() -> lamina.Plan:
        raise lamina.PlanError("nothing to plan")

    small = lamina.decompose(model, agreed(make), check=False)
    try:
        agreed(fail)
    except lamina.PlanError as error:
        assert "nothing to plan" in str(error)
        return dict(small.state_dict())
    raise AssertionError("nobody heard that there is no plan")


class Stopped(Exception):
    pass


def kept(folder: Path, *, stop: int | None = None, sharding: bool = False) -> dict[str, Tensor]:
    """A training with a checkpoint every two steps, which stops by itself in the middle of a step, or goes on.

    One process goes on from what two have written, and two from what one has.
    """
    small = spread(decomposed()) if sharding else decomposed()
    calls = iter(range(100))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(calls) == stop:
            raise Stopped
        return F.cross_entropy(output, target)

    torch.manual_seed(4)
    try:
        record = lamina.finetune(
            small,
            DataLoader(TensorDataset(*samples(24)), 4, shuffle=True),
            loss=loss,
            epochs=3,
            freezing=lamina.SequentialFreezing(period=3, unit="steps"),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3),
            checkpoints=lamina.Checkpoints(folder, every=2),
        )
    except lamina.TrainingError as error:
        assert isinstance(error.__cause__, Stopped) and stop is not None
        return {}
    found = {name: whole(tensor) for name, tensor in small.state_dict().items()}
    return found | {
        "losses": torch.tensor([epoch.loss for epoch in record.epochs]),
        "from": torch.tensor(record.resumed_at or 0),
    }


def stops(folder: Path) -> dict[str, Tensor]:
    return kept(folder / f"DDP by {processes()}", stop=9)


def stops_sharded(folder: Path) -> dict[str, Tensor]:
    return kept(folder / f"FSDP2 by {processes()}", stop=9, sharding=True)


def goes_on(folder: Path) -> dict[str, Tensor]:
    return kept(folder / f"DDP by {3 - processes()}")


def goes_on_sharded(folder: Path) -> dict[str, Tensor]:
    return kept(folder / f"FSDP2 by {3 - processes()}", sharding=True)


def spread(model: nn.Module) -> nn.Module:
    """FSDP2, where there is more than one process."""
    if processes() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (processes(),))
    for name in ("3", "7"):
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing is sharded"
    return model


def sharded_loop(_: Path) -> dict[str, Tensor]:
    """FSDP2 in a loop of the user's own, a phase for every step, many times over."""
    found: dict[str, Tensor] = {}
    for repeat in range(REPEATS):
        small = spread(decomposed())
        freezing = lamina.freeze(small, lamina.SequentialFreezing(unit="steps"))
        optimizer = torch.optim.SGD(freezing.parameter_groups(weight_decay=1e-2), lr=0.05, momentum=0.9)
        for x, y in batches(SWAPS, 4, repeat):
            before = {name: whole(p).clone() for name, p in small.named_parameters() if name in freezing.resting}
            assert before
            part = slice(rank() * 4 // processes(), (rank() + 1) * 4 // processes())
            F.cross_entropy(small(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, value in before.items():
                assert torch.equal(whole(small.get_parameter(name)), value), f"{name} moved while it rested"
            freezing.step()
        found |= {f"{repeat}.{name}": whole(tensor) for name, tensor in small.state_dict().items()}
    return found


def sharded_finetune(_: Path) -> dict[str, Tensor]:
    """The same through `finetune`, with accumulation and clipping."""
    small = spread(decomposed())
    lamina.finetune(
        small,
        batches(10, 4),
        loss=F.cross_entropy,
        epochs=2,
        freezing=lamina.SequentialFreezing(unit="steps"),
        accumulate=2,
        clip=0.05,
    )
    return {name: whole(tensor) for name, tensor in small.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState()
    scratch = Path(sys.argv[1])
    for scenario in sys.argv[2:]:
        tensors = globals()[scenario](scratch)
        save_file(
            {k: t.detach().clone().contiguous() for k, t in tensors.items()}, scratch / f"{scenario}.{rank()}.safetensors"
        )
    torch.distributed.barrier()  # a process that ends while the other still talks to it has been seen to abort
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads have been seen to abort a process that ends in order, one in some dozens
