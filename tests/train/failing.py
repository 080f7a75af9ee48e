"""Trainings that must fail in every process, in the same words: ``python failing.py SCRATCH SCENARIO…`` in each, with RANK set.

A message between processes may take ten seconds here. So one that waits for another which has given up fails as well, in words
of its own. Every process goes on after a failure, as a program does that catches it. Each writes what was said.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from together import batches, decomposed, network, samples, spread

import lamina
from lamina.train import checkpoint
from lamina.train.distributed import from_each, processes, rank

X, Y = samples(24)


def last() -> bool:
    return rank() == processes() - 1


def at(number: int, who: Callable[[], bool], what: Callable[[], Any]) -> Callable[[], None]:
    """Something that happens in one process, at its call of that number."""
    calls = iter(range(1000))

    def call() -> None:
        if next(calls) == number and who():
            what()

    return call


def mine() -> Any:
    raise RuntimeError("mine\nwith a second line")


def train(loader: Any, folder: Path | None = None, model: nn.Module | None = None, **options: Any) -> lamina.TrainingRecord:
    arguments: dict[str, Any] = {
        "loss": F.cross_entropy,
        "epochs": 3,
        "freezing": lamina.SequentialFreezing(),
        "checkpoints": None if folder is None else lamina.Checkpoints(folder, every=2),
    }
    return lamina.finetune(decomposed() if model is None else model, loader, **arguments | options)


class Whole(Dataset[Any]):
    """All samples, or from one on; reading may fail."""

    def __init__(self, first: int = 0, length: int = 24, read: Callable[[], None] = lambda: None) -> None:
        self.first, self.length, self.read = first, length, read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read()
        return X[self.first + index], Y[self.first + index]


class Unseeded(Sampler[int]):
    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(rank()).sample(range(24), 24))


class Stream(IterableDataset[Any]):
    """Its order is drawn by a generator that is seeded otherwise in every process."""

    def __init__(self, given: int = 24, read: Callable[[], None] = lambda: None) -> None:
        self.given, self.read = given, read

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[Any]:
        for index in random.Random(rank()).sample(range(24), self.given):
            self.read()
            yield X[index] * 0 + index, Y[index]


# Which data


def uneven(_: Path) -> Any:
    return train(batches(5 - last(), 4))


def batch_sizes(_: Path) -> Any:
    return train(DataLoader(TensorDataset(X, Y), 8 if last() else 4))


def sizes_of_lists(_: Path) -> Any:
    return train(batches(3, 8 if last() else 4))


def kinds(_: Path) -> Any:
    return train(DataLoader(TensorDataset(X, Y), 4) if last() else batches(6, 4))


def own_shards(_: Path) -> Any:
    size = 24 // processes()
    return train(DataLoader(Whole(rank() * size, size), 4, shuffle=True))


def own_orders(_: Path) -> Any:
    return train(DataLoader(Whole(), 4, sampler=Unseeded()))


def rates(_: Path) -> Any:
    return train(batches(5, 4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1 if last() else 0.2))


def short_stream(_: Path) -> Any:
    return train(DataLoader(Stream(given=8), 4))


def stream(_: Path) -> Any:
    """Fails in no process: the batch of process 0 is divided, whatever the others would have drawn."""
    seen: list[int] = []
    small = decomposed()
    small.register_forward_pre_hook(lambda module, inputs: seen.extend(int(v) for v in inputs[0][:, 0, 0, 0]))
    train(DataLoader(Stream(), 4), model=small, epochs=1)
    everyone = sorted(index for part in from_each(seen) for index in part)
    assert everyone == list(range(24)), everyone
    raise lamina.TrainingError("every sample once")


# What fails


def setting_up(_: Path) -> Any:
    return train(batches(5, 4), optimizer=lambda p: mine() if last() else torch.optim.SGD(p))


def reading(_: Path) -> Any:
    return train(DataLoader(Whole(read=at(9, last, mine)), 4))


def reading_a_stream(_: Path) -> Any:
    return train(DataLoader(Stream(read=at(9, lambda: rank() == 0, mine)), 4))


def feeding(_: Path) -> Any:
    call = at(3, last, mine)
    return train(batches(6, 4), feed=lambda batch: (call(), batch)[1])


def running(_: Path) -> Any:
    """In the second forward after a wrapping, where DDP talks to the others before the network runs."""
    small, call = decomposed(), at(1, last, mine)
    small[0].register_forward_pre_hook(lambda module, inputs: call())  # type: ignore[index, union-attr]
    return train(batches(6, 4), model=small)


def losing(_: Path, model: nn.Module | None = None) -> Any:
    call = at(8, last, mine)
    return train(batches(6, 4), loss=lambda output, y: (F.cross_entropy(output, y), call())[0], model=model)


def losing_sharded(_: Path) -> Any:
    return losing(_, spread(decomposed()))


def scoring(_: Path) -> Any:
    call = at(1, last, mine)
    return train(batches(6, 4), score=lambda net: (1.0, call())[0])


def stepping(_: Path) -> Any:
    call = at(4, last, mine)

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            call()
            return super().step(closure)

    return train(batches(6, 4), optimizer=lambda p: Failing(p, lr=0.1), freezing=None)


def tracking(folder: Path) -> Any:
    """The main process alone tracks."""
    from accelerate.tracking import GeneralTracker

    class Failing(GeneralTracker):
        name, requires_logging_directory, tracker = "failing", False, None

        def __init__(self) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            if rank() == 0:
                mine()

    return train(batches(6, 4), tracking=lamina.Tracking(folder, log_with=(Failing(),), every=2))


def full_disk(folder: Path, model: nn.Module | None = None) -> Any:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    kept, checkpoint.write_tensors = checkpoint.write_tensors, full
    try:
        return train(batches(6, 4), folder / "full", model)
    finally:
        checkpoint.write_tensors = kept


def full_disk_sharded(folder: Path) -> Any:
    return full_disk(folder / "sharded", spread(decomposed()))


def full_disk_of_one_part(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    kept = HuggingFaceStorageWriter.write_data

    def full(*arguments: Any) -> Any:
        if last():
            raise OSError(28, "No space left on device")
        return kept(*arguments)

    HuggingFaceStorageWriter.write_data = full  # type: ignore[method-assign]
    try:
        return train(batches(6, 4), folder / "part", spread(decomposed()))
    finally:
        HuggingFaceStorageWriter.write_data = kept  # type: ignore[method-assign]


def no_folder(folder: Path) -> Any:
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("")
    return train(batches(6, 4), folder / "file", spread(decomposed()))


def other_checkpoint(folder: Path) -> Any:
    train(batches(6, 4), folder / "there", epochs=1)
    return train(batches(6, 4), folder / "there", epochs=1, clip=1.0)


# What is sharded


def half_sharded(_: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    small = decomposed()
    fully_shard(small[3], mesh=init_device_mesh("cpu", (processes(),)))  # type: ignore[index, arg-type]
    return train(batches(6, 4), model=small)


def statistics_of_sharded(_: Path) -> Any:
    """Fails in no process: running statistics are process 0's everywhere."""
    small = spread(decomposed(norm=lambda: nn.BatchNorm2d(8)))
    train(batches(6, 4), model=small)
    for name, buffer in small.named_buffers():
        first, *others = from_each(buffer)
        assert all(torch.equal(first, other) for other in others), name
    raise lamina.TrainingError("alike")


def parts(folder: Path) -> Any:
    """Fails in no process: each writes its part and gathers nothing; the whole network is there where it is asked for."""
    from torch.distributed.tensor import DTensor

    gathered: list[int] = []
    full = DTensor.full_tensor

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        gathered.append(self.numel())
        return full(self, *args, **kwargs)

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    adamw: Any = lambda p: torch.optim.AdamW(p, lr=1e-3)  # noqa: E731
    for whole in (False, True):
        kept = lamina.Checkpoints(folder / f"parts {whole}", whole=whole)
        small = spread(decomposed())
        train(batches(6, 4), model=small, optimizer=adamw, checkpoints=kept)
        assert whole or max(gathered, default=1) == 1, "somebody gathered a parameter"
        files = {path.name for path in (folder / f"parts {whole}" / "last" / "parts").iterdir()}
        assert len(files) == processes()
    DTensor.full_tensor = full  # type: ignore[method-assign]
    loaded = dict(lamina.load(network(), folder / "parts True" / "last").state_dict())
    for name, value in small.state_dict().items():
        assert torch.equal(full(value), loaded[name]), name
    assert not list((folder / "parts False" / "last").glob("plan.json"))
    raise lamina.TrainingError("each its part")


def killed(folder: Path) -> Any:
    """One process dies; the others end by themselves."""
    die = at(8, last, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return train(batches(6, 4), folder / "killed", loss=lambda output, y: (F.cross_entropy(output, y), die())[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState(timeout=timedelta(seconds=10))
    scratch = Path(sys.argv[1])
    said: dict[str, str] = {}
    for scenario in sys.argv[2:]:
        try:
            globals()[scenario](scratch)
        except Exception as error:
            said[scenario] = f"{type(error).__name__}: {error}"
        else:
            said[scenario] = "nothing"
        (scratch / f"said.{rank()}.json").write_text(json.dumps(said))
    if "killed" not in said:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(0)
