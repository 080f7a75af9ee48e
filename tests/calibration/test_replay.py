"""What ran before a cut answers from memory: the same answers, and nothing where a module does more than answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.calibration.calibrate import _layers
from lamina.calibration.probes import Probes
from lamina.calibration.replay import Replay
from lamina.values import Workload


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x))).add_(x)


class Shared(nn.Module):
    """Blocks in a row, one of them twice, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = Block(), Block()
        self.rest = nn.Sequential(Block(), nn.ReLU(inplace=True), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        return self.head(self.rest(self.twice(x)))


class Telling(Block):
    told = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.told = float(x.abs().sum())
        return super().forward(x)


class Leaving(nn.Module):
    """One of its parts leaves something for the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Telling(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.head(x) * self.second.told


def attending() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "blocks": (Shared, (6, 8)),
    "leaving something": (Leaving, (6, 8)),
    "attention": (attending, (6, 3, 8)),
    "a layer": (lambda: nn.Linear(8, 5), (6, 8)),
}


def watched(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of linear functions."""
    count = [0]
    real = torch.nn.functional.linear

    def linear(*args: Any) -> Tensor:
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return count


@pytest.mark.parametrize("room", [0.0, 200.0, 1e9])
@pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_what_a_cut_loses_is_the_same_with_and_without_memory(
    make: Callable[[], nn.Module], shape: tuple[int, ...], room: float
) -> None:
    torch.manual_seed(0)
    network = make().eval()
    layers = _layers(network, (), ())
    batches = [Workload((x,)) for x in torch.randn(2, *shape)]
    plain, remembering = (
        Probes(network, layers, lamina.Categorical(), batches, 0).drawn(8, cuts, room) for cuts in ((), layers)
    )
    for name, layer in layers.items():
        W = layer.weight.detach() * 0.5
        assert remembering.lost({name: W}) == plain.lost({name: W}) > 0
    both = {name: layer.weight.detach() * 0.5 for name, layer in layers.items()}
    assert remembering.lost(both) == plain.lost(both)


def test_what_has_answered_before_a_cut_does_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, x = Shared().eval(), torch.randn(6, 8)
    layers = _layers(network, (), ())
    draw = Probes(network, layers, lamina.Categorical(), [Workload((x,))], 0).drawn(6, layers, 1e9)
    draw.lost({})  # what is remembered is recorded before the first cut
    count = watched(network, monkeypatch)
    ran = {}
    for name, layer in layers.items():
        count[0] = 0
        draw.lost({name: layer.weight.detach() * 0.5})
        ran[name] = count[0]
    # Of 11 calls: `twice` is called twice, so it runs; all else runs from the cut layer on.
    assert ran == {
        "first.one": 11, "first.two": 10, "twice.one": 9, "twice.two": 9,
        "rest.0.one": 9, "rest.0.two": 8, "rest.2.one": 7, "rest.2.two": 6, "head": 5,
    }  # fmt: skip


def test_memory_that_is_not_there_is_not_used() -> None:
    network, x = Shared().eval(), torch.randn(6, 8)
    size = 6 * 8 * 4
    for room, most in ((0.0, 0), (size - 1.0, 0), (2.5 * size, 2), (1e9, 10)):
        replay = Replay(lambda: copy.deepcopy(network), Workload((x,)), list(_layers(network, (), ())), room)
        held = sum(each.nbytes for each in replay._remembered.values())
        assert held <= room and len(replay._remembered) <= most
        assert (held > 0) == (most > 0)
