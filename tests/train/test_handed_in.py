"""What a user hands to `finetune`: networks that were frozen before, used optimizers, schedules and losses of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lamina
from lamina import LowRank, SequentialFreezing, TrainingError, VanillaFreezing


@pytest.fixture
def small(planned: Callable[..., lamina.Plan]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return lamina.decompose(model, planned(model, torch.randn(4, 6), {"0": LowRank(3), "2": LowRank(2)}))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(3)]


def moved_by(small: nn.Module, **options: Any) -> set[str]:
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    lamina.finetune(small, data(), **{"loss": F.cross_entropy, "epochs": 2} | options)
    return {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}


# --- what an earlier freezing left at rest


def interrupted(small: nn.Module) -> nn.Module:
    lamina.freeze(small, VanillaFreezing())
    return small


def copied(small: nn.Module) -> nn.Module:
    lamina.freeze(small, VanillaFreezing())
    return copy.deepcopy(small)


@pytest.mark.parametrize("schedule", [None, SequentialFreezing(exclude=("2",))], ids=["without freezing", "with another"])
@pytest.mark.parametrize("left", [interrupted, copied])
def test_training_wakes_all_that_an_earlier_freezing_left_at_rest(small: nn.Module, left: Any, schedule: Any) -> None:
    small = left(small)
    assert moved_by(small, freezing=schedule) == {name for name, _ in small.named_parameters()}
    assert all(p.requires_grad for p in small.parameters())


def test_a_freezing_whose_network_was_trained_by_another_refuses_to_go_on(small: nn.Module) -> None:
    freezing = lamina.freeze(small, VanillaFreezing())
    moved_by(small)
    with pytest.raises(lamina.FreezingError, match="took its place"):
        freezing.start_epoch(1)


def test_what_the_user_let_rest_rests_on(small: nn.Module) -> None:
    small[0].first.weight.requires_grad_(False)  # type: ignore[index, union-attr]
    lamina.freeze(small, VanillaFreezing())
    assert "0.first.weight" not in moved_by(small)


# --- optimizers and schedules


@pytest.mark.parametrize(
    "schedule",
    [None, lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, n), torch.optim.lr_scheduler.CosineAnnealingLR],
    ids=["cosine by default", "one cycle, with momentum", "cosine"],
)
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["a number", "a tensor"])
def test_an_optimizer_is_left_with_the_rates_it_came_with(small: nn.Module, schedule: Any, rate: Any) -> None:
    optimizer = torch.optim.AdamW(small.parameters(), lr=rate, betas=(0.8, 0.9))
    for _ in range(2):
        assert moved_by(small, optimizer=optimizer, schedule=schedule) == {name for name, _ in small.named_parameters()}
        (group,) = optimizer.param_groups
        assert (float(group["lr"]), group["betas"], "initial_lr" in group) == (pytest.approx(0.01), (0.8, 0.9), False)


def test_a_failed_training_puts_the_rates_back_too(small: nn.Module) -> None:
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    with pytest.raises(TrainingError, match="the loss is nan"):
        calls = iter([1.0, float("nan")])
        moved_by(small, optimizer=optimizer, loss=lambda o, y: F.cross_entropy(o, y) * next(calls))
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_reduce_on_plateau_follows_the_loss_of_every_epoch_or_its_score(small: nn.Module, tmp_path: Path) -> None:
    told: list[float] = []

    class Noted(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            told.append(metrics)
            super().step(metrics)

    record = lamina.finetune(small, data(), loss=F.cross_entropy, epochs=2, schedule=lambda o, _: Noted(o))
    assert told == [epoch.loss for epoch in record.epochs]
    told.clear()

    def train(epochs: int) -> list[float]:
        scores = iter([3.0, 2.0, 1.0, 0.0][len(told) :])
        return [
            epoch.rate
            for epoch in lamina.finetune(
                small,
                data(),
                loss=F.cross_entropy,
                epochs=epochs,
                score=lambda _: next(scores),
                schedule=lambda o, _: Noted(o, "max", patience=0),
                checkpoints=lamina.Checkpoints(tmp_path),
            ).epochs
        ]

    assert train(4) == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])  # the rate with which each epoch was trained
    assert told == [3.0, 2.0, 1.0, 0.0]


def holds_weights(_: nn.Module) -> dict[str, Any]:
    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.zeros(3, 3))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output @ self.centres, target)

    return {"loss": Margin()}


def used_up(small: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1)
    optimizer.step()
    schedule.step()
    return {"optimizer": optimizer}


plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
WRONG: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "LBFGS": (lambda _: {"optimizer": torch.optim.LBFGS}, "LBFGS computes the loss itself"),
    "a rate of 0": (used_up, "learning rate is 0"),
    "no schedule": (lambda _: {"schedule": lambda o, n: None}, "schedule returns None"),
    "no score for a plateau": (lambda _: {"schedule": lambda o, n: plateau(o, "max")}, "pass score="),
    "a loss without a gradient": (
        lambda _: {"loss": lambda o, y: F.cross_entropy(o.detach(), y)},
        r"step 1 .*it has no gradient",
    ),
    "a loss that is a number": (lambda _: {"loss": lambda o, y: 1.0}, "no scalar tensor but a float"),
    "many losses": (lambda _: {"loss": lambda o, y: {"a": o.sum(), "b": o.sum()}}, "but a dict: sum up its parts"),
    "a loss with weights": (holds_weights, "the loss holds centres, which nobody would train"),
}


@pytest.mark.parametrize("case", WRONG, ids=WRONG)
def test_what_cannot_be_trained_with_is_refused_in_one_line(small: nn.Module, case: str) -> None:
    make, message = WRONG[case]
    before = copy.deepcopy(dict(small.named_parameters()))
    with pytest.raises(TrainingError, match=message) as caught:
        lamina.finetune(small, data(), **{"loss": F.cross_entropy, "epochs": 1} | make(small))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in small.named_parameters())


def test_a_loss_whose_weights_do_not_train_is_fine(small: nn.Module) -> None:
    assert moved_by(small, loss=nn.CrossEntropyLoss(weight=torch.ones(3)))
