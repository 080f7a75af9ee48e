"""What makes each step: every sample as a plain loop would see it, from any place in an epoch on, to the same bits."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

import lamina
from lamina.folder import digest

SAMPLES, BATCH, EPOCHS = 24, 4, 3
X = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (SAMPLES,), generator=torch.Generator().manual_seed(2))


class Stopped(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def order(epoch: int) -> Any:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))


class Plain(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Noisy(Plain):
    """Draws from all three libraries for every sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + random.random() + float(np.random.rand()) + float(torch.rand(())), Y[index]


class Epochs(Plain):
    """A data set that is told of the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] * (1 + self.epoch), Y[index]


class EpochSampler(Sampler[int]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.epoch).tolist())


class Own:
    """A loader of the user's that is told of the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def __iter__(self) -> Iterator[Any]:
        for chosen in order(self.epoch).split(BATCH):
            yield X[chosen], Y[chosen]


class EpochStream(IterableDataset[Any]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[Any]:
        return ((X[i], Y[i]) for i in order(self.epoch).tolist())


class Counting:
    """A loader that counts its passes by itself, as most do: at their end."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def __iter__(self) -> Iterator[Any]:
        for chosen in order(self.passes).split(BATCH):
            yield X[chosen], Y[chosen]
        self.passes += 1


class KeepsPlace(Counting):
    """The same with a state: pass and place, as torchdata's loaders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.place = self.begin = self.begun = 0

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes, self.begin = state["passes"], state["place"]

    def __iter__(self) -> Iterator[Any]:
        self.place, self.begin = self.begin, 0
        for chosen in order(self.passes).split(BATCH)[self.place :]:
            self.begun += 1
            self.place += 1
            yield X[chosen] + torch.rand(()), Y[chosen]
        self.passes, self.place = self.passes + 1, 0


class OwnDraws(Plain):
    """A data set with a generator of its own, whose state it tells."""

    def __init__(self) -> None:
        self.draws = random.Random(0)

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws.setstate(state["draws"])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + self.draws.random(), Y[index]


class Weighted(nn.Module):
    """A loss that remembers: its weight decays call by call, and it is asked for no gradient."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.weight *= 0.95
        return F.cross_entropy(output, target) * self.weight


def train(
    loader: Any, folder: Path | None = None, stop: int | None = None, loss: Any = F.cross_entropy, **options: Any
) -> tuple[str, lamina.TrainingRecord]:
    """A training that stops by itself in a step of that number, or goes on; its weights' hash."""
    model = options.pop("model", None) or network()
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    steps = itertools.count()
    run = model.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if model.training and next(steps) == stop:
            raise Stopped
        return run(*inputs, **named)

    model.forward = forward
    arguments: dict[str, Any] = {
        "loss": loss,
        "epochs": EPOCHS,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        "checkpoints": None if folder is None else lamina.Checkpoints(folder, every=1),
    }
    record = lamina.finetune(model, loader, **arguments | options)
    return digest(dict(model.state_dict())), record


def assert_goes_on_alike(folder: Path, make: Callable[[], Any], stop: int = 9, **options: Callable[[], Any]) -> None:
    def made() -> dict[str, Any]:
        return {name: one() for name, one in options.items()}

    wanted, whole = train(make(), **made())
    assert train(make(), folder / "undisturbed", **made())[0] == wanted, "checkpoints change the training"
    with pytest.raises(lamina.TrainingError) as caught:
        train(make(), folder / "stopped", stop, **made())
    assert isinstance(caught.value.__cause__, Stopped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found, record = train(make(), folder / "stopped", **made())
    assert record.resumed_at == stop
    assert [epoch.loss for epoch in record.epochs] == [epoch.loss for epoch in whole.epochs]
    assert found == wanted


TOLD: dict[str, Callable[[], Any]] = {
    "loader": Own,
    "sampler": lambda: DataLoader(Plain(), BATCH, sampler=EpochSampler()),
    "data set": lambda: DataLoader(Epochs(), BATCH, shuffle=True),
    "stream": lambda: DataLoader(EpochStream(), BATCH),
    "data set in workers that persist": lambda: DataLoader(
        Epochs(), BATCH, shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    ),
}


@pytest.mark.parametrize("case", TOLD, ids=TOLD)
def test_who_wants_to_know_the_epoch_is_told_when_it_begins_and_when_it_is_resumed(tmp_path: Path, case: str) -> None:
    assert_goes_on_alike(tmp_path, TOLD[case])


def test_every_epoch_of_a_stream_that_is_told_has_its_own_order() -> None:
    seen: list[Tensor] = []
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    train(DataLoader(EpochStream(), BATCH), model=model)
    for epoch in range(EPOCHS):
        assert torch.equal(torch.cat(seen[epoch * 6 : epoch * 6 + 6]), X[order(epoch)])


@pytest.mark.parametrize("kept", [False, True], ids=["without checkpoints", "with checkpoints"])
def test_a_pass_is_run_to_its_end_so_that_a_loader_can_count_it(tmp_path: Path, kept: bool) -> None:
    loader = Counting()
    train(loader, tmp_path if kept else None)
    assert loader.passes == EPOCHS


def test_an_endless_batch_sampler_with_a_length_is_cut_there() -> None:
    asked = 0

    class Endless(Sampler[list[int]]):
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[list[int]]:
            nonlocal asked
            for first in itertools.cycle(range(0, SAMPLES, BATCH)):
                asked += 1
                yield list(range(first, first + BATCH))

    _, record = train(DataLoader(Plain(), batch_sampler=Endless()))
    assert record.steps == 5 * EPOCHS and asked <= 6 * EPOCHS


@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "workers that persist"])
def test_workers_fetch_the_same_noise_as_the_process_itself_also_after_a_resume(tmp_path: Path, persistent: bool) -> None:
    def workers() -> DataLoader[Any]:
        return DataLoader(
            Noisy(), BATCH, shuffle=True, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork"
        )

    assert train(workers())[0] == train(DataLoader(Noisy(), BATCH, shuffle=True))[0]
    assert_goes_on_alike(tmp_path, workers, stop=15)  # in the last epoch: workers that persist were begun in the first


def test_what_a_worker_sets_on_its_data_set_is_set_there() -> None:
    class Opened(Plain):
        file: Any = None

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            assert self.file == "open"
            return super().__getitem__(index)

    def open_file(worker: int) -> None:
        info: Any = torch.utils.data.get_worker_info()
        info.dataset.file = "open"

    train(DataLoader(Opened(), BATCH, num_workers=1, worker_init_fn=open_file, multiprocessing_context="fork"))


ORPHAN = """
import os, signal, time
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
import lamina

def kill(worker):
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.01)

data = TensorDataset(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))
loader = DataLoader(data, 2, num_workers=1, worker_init_fn=kill, multiprocessing_context="fork")
lamina.finetune(torch.nn.Linear(6, 3), loader, loss=F.cross_entropy, epochs=1)
"""


def test_a_worker_whose_parent_is_killed_while_it_begins_ends_too() -> None:
    """It holds the parent's connections, here its output: where it lives on, nobody sees their end."""
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_what_a_loader_draws_does_not_touch_what_the_network_draws() -> None:
    """Dropout after as many batches is the same whatever the data set drew; else how torch fetches would change a training."""
    after = []
    for dataset in (Plain(), Noisy()):
        train(DataLoader(dataset, BATCH, shuffle=True))
        after.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert after[0] == after[1]


def test_a_checkpoint_holds_a_position_and_a_seed_and_not_the_order(tmp_path: Path) -> None:
    class Long(Plain):
        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return super().__getitem__(index % SAMPLES)

    sizes = []
    for length in (16, 1_600):
        folder = tmp_path / str(length)
        loader = DataLoader(Long(length), length // 2, shuffle=True, collate_fn=lambda items: (X[:4], Y[:4]))
        train(loader, folder)
        sizes.append(sum(path.stat().st_size for path in (folder / "last").iterdir()))
    assert abs(sizes[0] - sizes[1]) < 200


def torchdatas(dataset: Any, **options: Any) -> Callable[[], Any]:
    """Its loader draws a seed when it is made."""

    def make() -> Any:
        torch.manual_seed(4)
        return StatefulDataLoader(dataset(), BATCH, **options)

    return make


class PlacedStream(EpochStream):
    """A stream that counts its passes and tells its place."""

    place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]

    def __iter__(self) -> Iterator[Any]:
        for index in order(self.epoch).tolist()[self.place :]:
            self.place += 1
            yield X[index], Y[index]
        self.epoch, self.place = self.epoch + 1, 0


WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}
STATES: dict[str, dict[str, Callable[[], Any]]] = {
    "loader": {"make": KeepsPlace},
    "data set": {"make": lambda: DataLoader(OwnDraws(), BATCH, shuffle=True)},
    "generator of a sampler": {
        "make": lambda: DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))
    },
    "torchdata's loader": {"make": torchdatas(Noisy, shuffle=True)},
    "torchdata's loader with workers": {"make": torchdatas(Plain, shuffle=True, **WORKERS)},
    "a stream in torchdata's loader": {"make": torchdatas(PlacedStream)},
    "loss": {"make": lambda: DataLoader(Plain(), BATCH, shuffle=True), "loss": Weighted},
}


@pytest.mark.parametrize("case", STATES, ids=STATES)
@pytest.mark.parametrize("stop", [9, 12], ids=["in mid-epoch", "at an epoch's end"])
def test_what_has_a_state_goes_on_from_it(tmp_path: Path, case: str, stop: int) -> None:
    assert_goes_on_alike(tmp_path, stop=stop, **STATES[case])  # type: ignore[arg-type]


def test_a_loader_that_keeps_its_place_is_not_asked_again_for_what_was_seen(tmp_path: Path) -> None:
    with pytest.raises(lamina.TrainingError):
        train(KeepsPlace(), tmp_path, 9)
    loader = KeepsPlace()
    train(loader, tmp_path)
    assert loader.begun == EPOCHS * 6 - 9


def test_a_loader_without_a_state_begins_the_epoch_anew_and_that_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(lamina.TrainingError):
        train(Own(), tmp_path, 9)
    with pytest.warns(
        UserWarning, match=r"Own does not keep its place \(it has no state_dict\).* beginning of epoch 2"
    ) as said:
        train(Own(), tmp_path)
    assert len([one for one in said if "keep its place" in str(one.message)]) == 1


def test_buffers_that_are_not_saved_with_a_network_go_on_too(tmp_path: Path) -> None:
    class Remembers(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen.mul_(0.9).add_(x.mean(0))
            out: Tensor = self.layer(x - self.seen)
            return out

    assert_goes_on_alike(tmp_path, lambda: DataLoader(Plain(), BATCH, shuffle=True), model=Remembers)


# What a batch is


class Scene:
    """A batch of a class of the user's own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Detector(nn.Module):
    """Takes a list of images, each of a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        assert isinstance(images, list)
        out: Tensor = self.layer(torch.stack([image.mean((1, 2)) for image in images]))
        return out


IMAGES = [torch.randn(3, 4 + i, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
BOXES = [{"boxes": torch.rand(i + 1, 4), "label": i % 2} for i in range(4)]


def boxes_loss(output: Tensor, targets: Any) -> Tensor:
    return F.cross_entropy(output, torch.tensor([target["label"] for target in targets]))


def weighted(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    y, weight = target
    return (F.cross_entropy(output, y, reduction="none") * weight).mean()


FED: dict[str, tuple[Any, Callable[[Any], Any], Callable[..., Tensor], type[nn.Module]]] = {
    "three parts": ([(X[:4], Y[:4], torch.ones(4))], lambda b: (b[0], (b[1], b[2])), weighted, nn.Module),
    "three collated": (
        DataLoader(torch.utils.data.TensorDataset(X, Y, torch.ones(SAMPLES)), BATCH),
        lambda b: (b[0], (b[1], b[2])),
        weighted,
        nn.Module,
    ),
    "an own class": ([Scene(X[:4], Y[:4])], lambda b: (b.x, b.y), F.cross_entropy, nn.Module),
    "a list of images": ([(IMAGES, BOXES)], lambda b: ((b[0],), b[1]), boxes_loss, Detector),
    "a tuple of images": (
        [tuple(zip(IMAGES, BOXES, strict=True))],
        lambda b: (([image for image, _ in b],), [target for _, target in b]),
        boxes_loss,
        Detector,
    ),
}


@pytest.mark.parametrize("case", FED, ids=FED)
def test_every_other_batch_is_refused_with_the_cure_which_works(case: str) -> None:
    loader, feed, loss, kind = FED[case]
    model = network() if kind is nn.Module else kind()
    with pytest.raises(lamina.TrainingError, match="feed=") as caught:
        lamina.finetune(model, loader, loss=loss, epochs=1)
    assert "\n" not in str(caught.value)
    before = digest(dict(model.state_dict()))
    lamina.finetune(model, loader, loss=loss, epochs=1, feed=feed)
    assert digest(dict(model.state_dict())) != before


def test_feed_that_gives_no_pair_is_said() -> None:
    with pytest.raises(lamina.TrainingError, match=r"step 1 .*: a batch cannot be read: KeyError: 'x'"):
        lamina.finetune(network(), [{"y": Y}], loss=F.cross_entropy, epochs=1, feed=lambda batch: (batch["x"], 0))
    with pytest.raises(lamina.TrainingError, match="feed returns a Tensor, which is no pair"):
        lamina.finetune(network(), [(X, Y)], loss=F.cross_entropy, epochs=1, feed=lambda batch: batch[0])
