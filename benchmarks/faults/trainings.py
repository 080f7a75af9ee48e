"""Trainings killed at random moments and resumed: do they end with the bits of one that was never killed?

    python benchmarks/faults/trainings.py --trials 6 --seed 0 --publish

Each configuration is trained once without checkpoints. Then, six times, it is trained with them and killed (SIGKILL) after a
time drawn at random over the whole run, in a third of the trials up to four times in a row. Of several processes some are
killed, once they know one another: before that, to end the others is for whoever launches them. What comes out must be equal to
the last bit: weights, losses, scores, rates, what rested, and the next random numbers of Python, NumPy and torch. The first
training with checkpoints, which is not killed, must be equal as well. A configuration that is done stands in the file of
results: a campaign that was stopped goes on where it was while the code is the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from campaign import FOLDER, fingerprint, prepare, table, versions
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lamina
from lamina.folder import digest
from lamina.train.distributed import processes, whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import publish

CLASSES, SAMPLES, BATCH, EPOCHS = 3, 22, 4, 4  # 6 batches an epoch, the last one of 2
LONGEST_S = 120


class Noisy(Dataset[Any]):
    """Draws from all three libraries for every sample, as augmentation does."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(SAMPLES, 2, 5, 5, generator=generator)
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


class Told:
    """A loader of the user's own, which is told of the epoch."""

    def __init__(self) -> None:
        self.data, self.epoch = Noisy(), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        for chosen in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).split(BATCH):
            yield self.data.x[chosen] + torch.rand(()), self.data.y[chosen]


def images(**options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(Noisy(), BATCH, shuffle=True, **options)


def batches() -> list[Any]:
    data = Noisy()
    return list(zip(data.x.split(BATCH), data.y.split(BATCH), strict=True))


def score(model: nn.Module) -> float:
    return -float(whole(model(torch.ones(2, 2, 5, 5)).square().mean()))


@dataclass(frozen=True)
class Configuration:
    """How one training is made."""

    loader: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    every: int = 2
    keep: int = 2
    teacher: bool = False
    processes: int = 1
    sharded: bool = False
    compiled: bool = False
    supernet: bool = False


def adamw(**options: Any) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, **options)


EPOCH, STEPS = lamina.SequentialFreezing(), lamina.SequentialFreezing(period=2, unit="steps")
CONFIGURATIONS: dict[str, Configuration] = {
    "SGD, shuffled loader that draws from three libraries": Configuration(images(), {"freezing": EPOCH}),
    "AdamW, accumulate 2, clip, freezing every 2 steps": Configuration(
        images(), {"freezing": STEPS, "optimizer": adamw(), "accumulate": 2, "clip": 0.5}
    ),
    "2 workers, AdamW": Configuration(images(num_workers=2), {"freezing": EPOCH, "optimizer": adamw()}),
    "2 workers that persist, accumulate 3": Configuration(
        images(num_workers=2, persistent_workers=True), {"freezing": STEPS, "optimizer": adamw(), "accumulate": 3}
    ),
    "bfloat16, fused AdamW, a generator, last epoch unfrozen": Configuration(
        lambda: DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)),
        {
            "freezing": lamina.SequentialFreezing(unfrozen_last=1),
            "precision": "bfloat16",
            "optimizer": adamw(fused=True),
        },
    ),
    "distillation with features, OneCycle, score, patience": Configuration(
        images(),
        {
            "freezing": EPOCH,
            "distillation": lamina.Distillation(features=("3",)),
            "clip": 0.1,
            "patience": 3,
            "score": score,
            "schedule": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
        },
        teacher=True,
    ),
    "Adafactor, vanilla freezing, a list, keep=1, every step": Configuration(
        batches,
        {"freezing": lamina.VanillaFreezing(), "optimizer": lambda p: torch.optim.Adafactor(p, lr=1e-2)},
        every=1,
        keep=1,
    ),
    "a stream": Configuration(lambda: DataLoader(Stream(), BATCH), {"freezing": STEPS, "optimizer": adamw()}),
    "a stream in a worker, NAdam, bfloat16": Configuration(
        lambda: DataLoader(Stream(), BATCH, num_workers=1),
        {
            "freezing": EPOCH,
            "optimizer": lambda p: torch.optim.NAdam(p, lr=1e-2),
            "accumulate": 2,
            "precision": "bfloat16",
        },
        every=1,
    ),
    "a loader with set_epoch": Configuration(Told, {"freezing": STEPS}, every=1),
    "compiled (eager backend)": Configuration(images(), {"freezing": EPOCH, "optimizer": adamw()}, compiled=True),
    "no freezing, a constant rate, checkpoints at the ends of epochs": Configuration(
        images(), {"schedule": lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)}, every=1000
    ),
    "a supernet": Configuration(batches, every=1, supernet=True),
    "2 processes, DDP": Configuration(images(), {"freezing": EPOCH, "optimizer": adamw()}, processes=2),
    "3 processes, DDP, a worker each, SGD": Configuration(images(num_workers=1), {"freezing": STEPS}, processes=3),
    "2 processes, DDP, accumulate 2, a stream": Configuration(
        lambda: DataLoader(Stream(), BATCH), {"freezing": STEPS, "accumulate": 2, "score": score}, processes=2
    ),
    "2 processes, FSDP2, AdamW": Configuration(
        images(), {"freezing": STEPS, "optimizer": adamw(), "clip": 0.5}, processes=2, sharded=True
    ),
}


def network(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


def decomposed(model: nn.Module) -> nn.Module:
    plan = lamina.make_plan(model, torch.zeros(1, 2, 5, 5), lamina.Ratio(2.0), rule=lamina.AtRatio())
    for name, form in {"0": lamina.Dense(), "3": lamina.BlockTerm(4, 4, 1), "8": lamina.LowRank(2)}.items():
        plan = plan.with_form(name, form)
    return lamina.decompose(model, plan, check=False)


def made(configuration: Configuration) -> tuple[nn.Module, nn.Module]:
    model = network(norm=not configuration.sharded)
    if configuration.supernet:
        return model, lamina.make_supernet(model.eval(), torch.randn(2, 2, 5, 5), group_sizes=(1, 2, 8))
    small = decomposed(model)
    if configuration.sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes(),))
        for name in ("3", "8"):
            fully_shard(small.get_submodule(name), mesh=mesh)
        fully_shard(small, mesh=mesh)
    if configuration.compiled:
        small = torch.compile(small, backend="eager")  # type: ignore[assignment]
    return model, small


def train(configuration: Configuration, folder: Path | None) -> dict[str, Any]:
    """One training; everything by which two of them are compared, and from where it went on."""
    model, small = made(configuration)
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    kept = None if folder is None else lamina.Checkpoints(folder, every=configuration.every, keep=configuration.keep)
    options = configuration.options | ({"teacher": model.eval()} if configuration.teacher else {})
    trained = lamina.train_supernet if configuration.supernet else lamina.finetune
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = trained(small, configuration.loader(), loss=F.cross_entropy, epochs=EPOCHS, checkpoints=kept, **options)
    return {
        "weights": digest({name: whole(value) for name, value in small.state_dict().items()}),
        "losses": [epoch.loss for epoch in record.epochs],
        "scores": [epoch.score for epoch in record.epochs],
        "rates": [epoch.rate for epoch in record.epochs],
        "resting": [list(epoch.resting) for epoch in record.epochs],
        "best": record.best.number,
        "next": [float(torch.rand(())), random.random(), float(np.random.rand())],
        "steps": record.steps,
        "resumed_at": record.resumed_at,
    }


def begin(configuration: Configuration, folder: Path | None, results: Path) -> list[int]:
    """Start a training in processes of its own, forked before anything was computed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(configuration.processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os.dup2(os.open(results.with_suffix(f".{rank}.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            if configuration.processes > 1:
                size = str(configuration.processes)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                accelerate: Any = importlib.import_module("accelerate")
                accelerate.PartialState()
                torch.distributed.barrier()
            results.with_suffix(f".{rank}.met").touch()
            found = json.dumps(train(configuration, folder))
            results.with_suffix(f".{rank}.json").write_text(found)
            if configuration.processes > 1:
                torch.distributed.barrier()  # one that ends while the other still talks to it has been seen to abort
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return children


def ended(children: list[int]) -> list[int]:
    """Wait; the status of each, or SIGKILL for one that had to be stopped because it hung."""
    left, statuses, latest = dict(enumerate(children)), dict[int, int](), time.monotonic() + LONGEST_S
    while left:
        for number, child in list(left.items()):
            if time.monotonic() > latest:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[number] = -1 if time.monotonic() > latest else status
                del left[number]
        time.sleep(0.005)
    return [statuses[number] for number in range(len(children))]


def outcome(configuration: Configuration, results: Path, statuses: list[int]) -> dict[str, Any]:
    """What a training came to in all of its processes, or how it failed."""
    if any(statuses):
        last = [path.read_text().strip().splitlines()[-1:] for path in results.parent.glob(f"{results.name}.*.err")]
        return {"failed": f"{statuses} {last}"}
    each = [json.loads(results.with_suffix(f".{rank}.json").read_text()) for rank in range(configuration.processes)]
    alike = ("weights", "losses", "scores", "rates", "resting", "best", "steps")
    if any({key: one[key] for key in alike} != {key: each[0][key] for key in alike} for one in each):
        return {"failed": "the processes end otherwise"}
    return each[0] | {"next": [one["next"] for one in each]}


def trial(configuration: Configuration, scratch: Path, seconds: float, chance: random.Random) -> tuple[int, dict[str, Any]]:
    """A training that is killed, once or again and again, and then left alone: how often, and what it came to."""
    folder, results, kills = scratch / "kept", scratch / "result", 0
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    statuses = [1]
    for _ in range(chance.choice((1, 1, 4))):
        children = begin(configuration, folder, results)
        latest = time.monotonic() + LONGEST_S
        while configuration.processes > len(list(scratch.glob("result.*.met"))) and time.monotonic() < latest:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, seconds))
        victims = [child for child in children if chance.random() < 0.5] or [chance.choice(children)]
        for child in victims:
            os.kill(child, signal.SIGKILL)
        statuses = ended(children)
        if -1 in statuses:
            return kills, {"failed": "one process was killed and another hung"}
        kills += any(os.WIFSIGNALED(status) for status in statuses)
        if not any(statuses):
            break  # it was done already
        for path in scratch.glob("result.*"):
            path.unlink()
    if any(statuses):
        statuses = ended(begin(configuration, folder, results))
    found = outcome(configuration, results, statuses)
    if folder.exists() and (left := [path.name for path in folder.iterdir() if path.name.startswith(".")]):
        found = {"failed": f"left over: {left}"}
    return kills, found


def judged(name: str, trials: int, seed: int) -> dict[str, Any]:
    """All trials of one configuration."""
    configuration, chance = CONFIGURATIONS[name], random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory(prefix="lamina-trainings-") as place:
        alone, undisturbed = Path(place) / "alone", Path(place) / "undisturbed"
        wanted = outcome(configuration, alone, ended(begin(configuration, None, alone)))
        start = time.perf_counter()
        kept = outcome(configuration, alone, ended(begin(configuration, undisturbed, alone)))
        seconds = time.perf_counter() - start
        other = [] if differs(kept, wanted) is None else [f"not killed: {differs(kept, wanted)}"]
        kills = resumed = 0
        for _ in range(trials):
            died, found = trial(configuration, Path(place) / "trial", seconds, chance)
            kills += died
            resumed += 0 < (found.get("resumed_at") or 0) < found.get("steps", 0)
            if (why := differs(found, wanted)) is not None:
                other.append(why)
    return {"trials": trials, "kills": kills, "resumed": resumed, "other": other}


def campaign(trials: int, seed: int, names: list[str], path: Path) -> dict[str, Any]:
    """Every configuration that is not in the file yet; what all came to."""
    command = f"python benchmarks/faults/trainings.py --trials {trials} --seed {seed}"
    result = {"command": command, "versions": versions(fingerprint()), "seconds": 0.0, "rows": {}}
    if path.exists():
        earlier = json.loads(path.read_text())
        if all(earlier[key] == result[key] for key in ("command", "versions")):
            result = earlier
    for needed in ("torch._dynamo", "accelerate", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        importlib.import_module(needed)  # by every child, and it takes longer than a training
    for name in names:
        if name not in result["rows"]:
            began = time.perf_counter()
            row = result["rows"][name] = judged(name, trials, seed)
            result["seconds"] += time.perf_counter() - began
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            went_on, other = row["resumed"], row["other"]
            print(f"{name}: {row['kills']} kills, {went_on} went on in the middle, {len(other)} ended otherwise {other}")
    return result


def differs(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What is not equal; None where everything is."""
    if "failed" in found or "failed" in wanted:
        return str(found.get("failed") or wanted.get("failed"))
    return next((key for key in wanted if key != "resumed_at" and found[key] != wanted[key]), None)


def markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    total = {key: sum(row[key] for row in rows.values()) for key in ("trials", "kills", "resumed")}
    other = sum(len(row["other"]) for row in rows.values())
    lines = [
        [name, *(str(row[key]) for key in ("trials", "kills", "resumed")), str(len(row["other"]))] for name, row in rows.items()
    ]
    lines.append(["**all**", *(f"**{total[key]}**" for key in total), f"**{other}**"])
    head = ["configuration", "trainings", "kills", "went on in the middle", "ended with other bits, hung or failed"]
    seen = result["versions"]
    made_by = f"{seen['lamina']}; torch {seen['torch']}; {seen['machine']}; one thread a process; {result['seconds']:.0f} s."
    return f"{table(head, lines)}\n\n{made_by}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=6, help="of each configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="configurations whose names hold one of these")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--publish", action="store_true", help="write the table into docs/results")
    chosen = parser.parse_args()
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    prepare()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"trainings-{chosen.seed}.json"
    names = [name for name in CONFIGURATIONS if any(word in name for word in chosen.only)]
    result = campaign(chosen.trials, chosen.seed, names, path)
    print(f"\n{markdown(result)}\n\nwritten to {path}")
    if chosen.publish:
        publish("trainings", "Trainings killed and resumed", f"{result['command']} --publish", markdown(result))
    return int(any(row["other"] for row in result["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
