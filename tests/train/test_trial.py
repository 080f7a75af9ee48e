"""Optimizers are tried, not known by name: whoever moves what rests is refused, and nobody else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import FreezingError, LowRank, SequentialFreezing
from lamina.train.trial import wants_argument


@pytest.fixture
def net(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return lamina.decompose(model, planned(model, torch.randn(4, 6), {"0": LowRank(3), "2": LowRank(2)}))


class Renamed(torch.optim.LBFGS):
    pass


class Decays(torch.optim.SGD):
    """Weight decay for all, whoever has a gradient."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"])
        super().step()


class Follows(torch.optim.SGD):
    """Goes on along its last gradient where there is no new one."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["last"] = parameter.grad.clone()
                elif self.state[parameter]:
                    parameter.data.sub_(self.state[parameter]["last"])
        super().step()


@pytest.mark.parametrize("rate", [0.1, 0.0], ids=["", "in a warm-up"])
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Renamed, Decays, Follows])
def test_an_optimizer_that_moves_what_rests_is_refused_whatever_its_name(net: nn.Module, kind: Any, rate: float) -> None:
    freezing = lamina.freeze(net, SequentialFreezing())
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    optimizer = kind(net.parameters(), lr=rate)
    with pytest.raises(FreezingError, match=rf"^{kind.__name__} moves parameters that have no gradient"):
        freezing.check(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()) and not optimizer.state


KEEPERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    name: getattr(torch.optim, name)
    for name in (
        "SGD",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adagrad",
        "Adadelta",
        "ASGD",
        "Rprop",
        "RMSprop",
        "Adafactor",
    )
} | {
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, fused=True, amsgrad=True),
    "fused SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, fused=True),
    "a tensor for a rate": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), foreach=False, capturable=False),
}


@pytest.mark.parametrize("make", KEEPERS.values(), ids=KEEPERS)
def test_an_optimizer_that_keeps_to_gradients_passes(net: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    freezing = lamina.freeze(net, SequentialFreezing())
    optimizer = make(freezing.parameter_groups(weight_decay=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also that it was tried at all
        freezing.check(optimizer)
        separate = [make([group]) for group in freezing.parameter_groups(weight_decay=0.1)]
        freezing.check(*separate)


def test_an_optimizer_inside_a_wrapper_is_tried(net: nn.Module) -> None:
    lbfgs = torch.optim.LBFGS(net.parameters())
    with pytest.raises(FreezingError, match="LBFGS moves"):
        lamina.freeze(net, SequentialFreezing()).check(SimpleNamespace(optimizer=lbfgs, param_groups=lbfgs.param_groups))


def test_of_an_optimizer_that_cannot_be_tried_a_warning_tells(net: nn.Module) -> None:
    class Peculiar(torch.optim.SGD):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="Peculiar could not be tried on toys .* see for yourself"):
        lamina.freeze(net, SequentialFreezing()).check(Peculiar(net))


def test_a_step_that_wants_an_argument_is_known(net: nn.Module) -> None:
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    schedules = torch.optim.lr_scheduler
    alone = [sgd, schedules.StepLR(sgd, 1), torch.optim.AdamW(net.parameters())]
    assert not any(map(wants_argument, alone))
    assert wants_argument(torch.optim.LBFGS(net.parameters())) and wants_argument(schedules.ReduceLROnPlateau(sgd))
