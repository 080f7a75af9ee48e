"""Freezing in other people's loops: the real Lightning and Transformers trainers, on a network of a few weights."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lamina
from lamina import FreezingError, LowRank, MissingExtra, SequentialFreezing, VanillaFreezing
from lamina.schedules import Schedule
from lamina.train.callbacks import lightning_callback, transformers_callback

from ..processes import in_processes

OUTER, INNER = ("0.first.weight", "2.first.weight"), ("0.second.weight", "2.second.weight")


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, length: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(length, 6, generator=generator)
        self.target = torch.arange(length) % 3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.target[index]}


@pytest.fixture
def net(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return lamina.decompose(model, planned(model, torch.randn(4, 6), {"0": LowRank(3), "2": LowRank(2)}))


def at_rest(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    return tuple(name[name.index(".") + 1 :] for name in names)  # without the name of the network in its holder


EPOCHS = {
    "sequential": (SequentialFreezing(), [OUTER] * 3 + [INNER] * 3 + [OUTER] * 3 + [INNER] * 3),
    "vanilla": (VanillaFreezing(), [OUTER] * 12),
    "unfrozen at the end": (SequentialFreezing(unfrozen_last=1), [OUTER] * 3 + [INNER] * 3 + [OUTER] * 3 + [()] * 3),
    "in steps": (SequentialFreezing(period=2, unit="steps"), ([OUTER] * 2 + [INNER] * 2) * 3),
}
"""Four epochs of three steps: what rests in each step."""


# --- Lightning

lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Notes in each step what rests, and how many parameters got a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[tuple[str, ...]] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(at_rest(self))
        return F.cross_entropy(self.net(batch["x"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def trainer(tmp_path: Path, schedule: Schedule, callbacks: tuple[Any, ...] = (), **options: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": 4, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return lightning.Trainer(callbacks=[lightning_callback(schedule), *callbacks], **(settings | quiet | options))


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(), batch_size=4)


pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore::FutureWarning", "ignore:.*num_workers.*")


@pytest.mark.parametrize(("schedule", "expected"), EPOCHS.values(), ids=EPOCHS)
def test_lightning_trains_under_the_schedule_and_wakes_all_afterwards(
    net: nn.Module, tmp_path: Path, schedule: Schedule, expected: list[tuple[str, ...]]
) -> None:
    module = Module(net)
    trainer(tmp_path, schedule).fit(module, loader())
    assert module.seen == expected
    assert at_rest(module) == ()


def test_with_lightning_frozen_weights_keep_their_bits(net: nn.Module, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer(tmp_path, VanillaFreezing()).fit(Module(net), loader())
    assert {name for name, p in net.named_parameters() if torch.equal(p, before[name])} == set(OUTER)


def test_with_lightning_accumulated_batches_are_one_step(net: nn.Module, tmp_path: Path) -> None:
    module = Module(net)
    batches = DataLoader(Samples(), batch_size=2)  # six an epoch
    trainer(tmp_path, SequentialFreezing(period=1, unit="steps"), accumulate_grad_batches=3, max_epochs=2).fit(module, batches)
    assert module.seen == [OUTER] * 3 + [INNER] * 3 + [OUTER] * 3 + [INNER] * 3


def test_lightning_resumes_in_the_phase_where_it_stopped_with_the_same_bits(net: nn.Module, tmp_path: Path) -> None:
    schedule = SequentialFreezing(period=2, unit="steps", first="inner")
    whole, stopped, resumed = (Module(copy.deepcopy(net)) for _ in range(3))
    trainer(tmp_path, schedule).fit(whole, loader())
    saving = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True, save_on_train_epoch_end=True)
    trainer(tmp_path, schedule, (saving,), max_epochs=3, enable_checkpointing=True).fit(stopped, loader())
    trainer(tmp_path, schedule).fit(resumed, loader(), ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert stopped.seen + resumed.seen == whole.seen
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("schedule", [SequentialFreezing(), SequentialFreezing(unfrozen_last=1)], ids=str)
def test_lightning_resumes_in_the_right_phase_from_a_checkpoint_of_any_step(
    net: nn.Module, tmp_path: Path, schedule: Schedule, stop: int
) -> None:
    """Three steps an epoch: at an epoch's end, Lightning tells nobody that the next one begins."""
    whole, resumed = Module(copy.deepcopy(net)), Module(copy.deepcopy(net))
    options: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    saving = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "kept", **options)
    trainer(tmp_path, schedule, (saving,), enable_checkpointing=True).fit(whole, loader())
    trainer(tmp_path, schedule).fit(resumed, loader(), ckpt_path=tmp_path / "kept" / f"step={stop}.ckpt")
    assert resumed.seen == whole.seen[stop:]
    if stop % 3 == 0:  # in mid-epoch Lightning begins anew with the first batch
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("factors", ["all", "those that train"])
def test_lightning_wakes_what_was_left_at_rest_before_the_optimizer_is_made(
    net: nn.Module, tmp_path: Path, factors: str
) -> None:
    class Chooses(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad or factors == "all"], lr=0.1)

    lamina.freeze(net, VanillaFreezing())
    module = Chooses(net)
    trainer(tmp_path, SequentialFreezing(exclude=("net.2",))).fit(module, loader())
    assert module.seen == [OUTER[:1]] * 3 + [INNER[:1]] * 3 + [OUTER[:1]] * 3 + [INNER[:1]] * 3


def test_lightning_is_told_of_an_optimizer_that_moves_what_rests(net: nn.Module, tmp_path: Path) -> None:
    class Moves(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(FreezingError, match="LBFGS moves parameters that have no gradient"):
        trainer(tmp_path, SequentialFreezing()).fit(Moves(net), loader())
    assert at_rest(net) == ()


@pytest.fixture
def one_process_of_many() -> Iterator[None]:
    """What a launcher would set; what Lightning and torch set besides is put back too."""
    before = dict(os.environ)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("one_process_of_many")
def test_lightning_wraps_ddp_anew_when_what_rests_changes(net: nn.Module, tmp_path: Path) -> None:
    """One process over gloo: a wrapper that waited for what rests would complain in the next step."""
    waited_for: list[int] = []

    class Noted(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            waited_for.append(self.trainer.strategy.model._get_ddp_logging_data()["num_parameter_tensors"])
            return super().training_step(batch, index)

    module = Noted(net)
    strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo")
    trainer(tmp_path, SequentialFreezing(unfrozen_last=1), strategy=strategy).fit(module, loader())
    assert module.seen == [OUTER] * 3 + [INNER] * 3 + [OUTER] * 3 + [()] * 3
    assert waited_for == [4] * 9 + [6] * 3


def test_lightning_is_told_of_an_optimizer_that_lacks_factors_and_of_a_dense_network(net: nn.Module, tmp_path: Path) -> None:
    class Forgets(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.net[2].first.weight], lr=0.1)

    with pytest.raises(FreezingError, match=r"^net\.0\.first\.weight is not in the optimizer"):
        trainer(tmp_path, SequentialFreezing()).fit(Forgets(net), loader())
    with pytest.raises(FreezingError, match="nothing in this network is decomposed"):
        trainer(tmp_path, SequentialFreezing()).fit(Module(nn.Linear(6, 3)), loader())


# --- Transformers

transformers = pytest.importorskip("transformers")


class Model(nn.Module):
    """What a Transformers trainer trains: it takes keywords and returns its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[tuple[str, ...]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(at_rest(self))
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Passes(IterableDataset[dict[str, Tensor]]):
    """Three batches of four a pass, and no length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        samples = Samples()
        return (samples[i] for i in range(len(samples)))


def hf_trainer(model: nn.Module, tmp_path: Path, schedule: Schedule | None, data: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "weight_decay": 0.1,
        "learning_rate": 0.1,
    }
    arguments = transformers.TrainingArguments(**(settings | options))
    callbacks = [transformers_callback(schedule)] if schedule else []
    return transformers.Trainer(model=model, args=arguments, train_dataset=data or Samples(), callbacks=callbacks)


def train_hf(model: nn.Module, tmp_path: Path, schedule: Schedule, resume: Path | None = None, **options: Any) -> None:
    hf_trainer(model, tmp_path, schedule, **options).train(resume_from_checkpoint=resume and str(resume))


@pytest.mark.parametrize(("schedule", "expected"), EPOCHS.values(), ids=EPOCHS)
def test_transformers_trains_under_the_schedule_and_wakes_all_afterwards(
    net: nn.Module, tmp_path: Path, schedule: Schedule, expected: list[tuple[str, ...]]
) -> None:
    model = Model(net)
    train_hf(model, tmp_path, schedule)
    assert model.seen == expected
    assert at_rest(model) == ()


def test_with_transformers_frozen_weights_keep_their_bits(net: nn.Module, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train_hf(Model(net), tmp_path, VanillaFreezing())
    assert {name for name, p in net.named_parameters() if torch.equal(p, before[name])} == set(OUTER)


def test_with_transformers_accumulated_batches_are_one_step(net: nn.Module, tmp_path: Path) -> None:
    model = Model(net)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    train_hf(model, tmp_path, SequentialFreezing(period=1, unit="steps"), **options)
    assert model.seen == [OUTER] * 3 + [INNER] * 3 + [OUTER] * 3 + [INNER] * 3


@pytest.mark.parametrize("schedule", [SequentialFreezing(), SequentialFreezing(period=2, unit="steps")], ids=str)
@pytest.mark.parametrize("stop", [3, 5])
def test_transformers_resumes_in_the_phase_where_it_stopped(
    net: nn.Module, tmp_path: Path, schedule: Schedule, stop: int
) -> None:
    whole, resumed = Model(copy.deepcopy(net)), Model(copy.deepcopy(net))
    train_hf(whole, tmp_path, schedule, save_strategy="steps", save_steps=stop)
    train_hf(resumed, tmp_path, schedule, resume=tmp_path / "out" / f"checkpoint-{stop}")
    assert resumed.seen == whole.seen[stop:]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_transformers_swaps_with_every_pass_where_the_data_have_no_length(net: nn.Module, tmp_path: Path) -> None:
    model = Model(net)
    train_hf(model, tmp_path, SequentialFreezing(), data=Passes(), max_steps=12)
    assert model.seen == [OUTER] * 3 + [INNER] * 3 + [OUTER] * 3 + [INNER] * 3


AFTER = {2: [OUTER, *[INNER] * 3, *[OUTER] * 3, *[INNER] * 3], 3: [*[INNER] * 3, *[OUTER] * 3, *[INNER] * 3]}


@pytest.mark.parametrize("restored", [False, True], ids=["", "with the states of callbacks"])
@pytest.mark.parametrize("stop", AFTER)
def test_without_a_length_transformers_resumes_in_the_pass_where_it_stopped(
    net: nn.Module, tmp_path: Path, stop: int, restored: bool
) -> None:
    options: dict[str, Any] = {"data": Passes(), "max_steps": 12, "save_strategy": "steps", "save_steps": stop}
    whole, resumed = Model(copy.deepcopy(net)), Model(copy.deepcopy(net))
    train_hf(whole, tmp_path, SequentialFreezing(), **options)
    path = tmp_path / "out" / f"checkpoint-{stop}"
    train_hf(resumed, tmp_path, SequentialFreezing(), path, restore_callback_states_from_checkpoint=restored, **options)
    assert resumed.seen == whole.seen[stop:] == AFTER[stop]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_transformers_goes_on_from_a_checkpoint_made_without_freezing(net: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    hf_trainer(Model(copy.deepcopy(net)), tmp_path, None, **options).train()
    resumed = Model(net)
    train_hf(resumed, tmp_path, SequentialFreezing(), tmp_path / "out" / "checkpoint-3", **options)
    assert resumed.seen == [INNER] * 3 + [OUTER] * 3 + [INNER] * 3


def test_a_second_training_by_the_same_transformers_trainer_begins_at_the_beginning(net: nn.Module, tmp_path: Path) -> None:
    model = Model(net)
    both = hf_trainer(model, tmp_path, SequentialFreezing(), data=Passes(), max_steps=4)
    both.train()
    both.train()
    assert model.seen == ([OUTER] * 3 + [INNER]) * 2


@pytest.mark.parametrize("next_one", ["with the callback", "finetune"])
def test_after_an_exception_in_transformers_whoever_trains_next_trains_all(
    net: nn.Module, tmp_path: Path, next_one: str
) -> None:
    class Fails(Model):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if len(self.seen) == 4:
                raise KeyError("in the middle")
            return super().forward(x, labels)

    with pytest.raises(KeyError, match="in the middle"):
        train_hf(Fails(net), tmp_path, SequentialFreezing())
    assert at_rest(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    if next_one == "finetune":
        lamina.finetune(net, [(Samples().x, Samples().target)], loss=F.cross_entropy, epochs=2)
    else:
        train_hf(Model(net), tmp_path, SequentialFreezing(exclude=("net.0",)))
    assert at_rest(net) == ()
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_transformers_is_told_of_an_optimizer_that_moves_what_rests_and_all_wake(net: nn.Module, tmp_path: Path) -> None:
    refused = hf_trainer(Model(net), tmp_path, SequentialFreezing())
    refused.optimizer = torch.optim.LBFGS(net.parameters())
    with pytest.raises(FreezingError, match="LBFGS moves parameters that have no gradient"):
        refused.train()
    assert at_rest(net) == ()


@pytest.mark.parametrize("options", [{}, {"ddp_find_unused_parameters": True, "fsdp": True}], ids=["DDP", "FSDP"])
def test_transformers_in_several_processes_is_refused_where_it_would_wait_for_what_rests(options: dict[str, Any]) -> None:
    callback = transformers_callback(SequentialFreezing())
    arguments = SimpleNamespace(**{"world_size": 2, "ddp_find_unused_parameters": None} | options)
    with pytest.raises(FreezingError, match=r"runs in 2 processes.*ddp_find_unused_parameters=True.*lamina\.finetune"):
        callback.on_train_begin(arguments, None, None)


@pytest.mark.slow
def test_transformers_trains_under_ddp_and_both_processes_end_alike(tmp_path: Path) -> None:
    """Four epochs of three steps in each of two real processes; what rests is noted in every step."""
    in_processes(2, Path(__file__).with_name("trained_by_two.py"), tmp_path)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert [found[rank]["seen"].tolist() for rank in (0, 1)] == [[1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2]] * 2
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


# --- neither


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [(lightning_callback, "lightning", "lightning"), (transformers_callback, "transformers", "zoo")],
)
def test_without_its_framework_a_callback_names_the_extra(
    make: Callable[[Schedule], Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'lamina\[{extra}\]'"):
        make(SequentialFreezing())


def test_importing_the_callbacks_imports_no_framework() -> None:
    code = "import sys, lamina.train.callbacks; print({'lightning', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
