"""A fake machine: a nanosecond a multiply-accumulate, and a penalty for each new kernel; and a network for it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import Dense, Timing, Workload, comparison
from lamina.choose import never_slower as judge
from lamina.choose import whole
from lamina.forms import Form
from lamina.layers.build import random
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure import layer_times
from lamina.network.copying import shadow
from lamina.network.walk import walk
from lamina.values import Use

from .choose.test_make_plan import Content

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, convolutions of decaying spectra, a 1×1, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)])
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pointwise(self.body(self.stem(x))).mean((2, 3)))
        return y


class Machine:
    """Times follow from multiply-accumulates; inside the network each decomposed layer costs ``penalty`` seconds more."""

    def __init__(self) -> None:
        self.penalty = 0.0
        self.measured: list[Form] = []

    def alone(self, layer: Any, forms: Sequence[Form], use: Use, *_: Any) -> dict[Form, Timing]:
        self.measured += forms
        one, setting = Use(use.input_shape, use.output_shape), _[2]
        return {form: Timing(1e-9 * form.macs(layer.geometry, one), 0.0, 7, setting) for form in forms}

    def stopwatch(self, model: nn.Module, layers: Any, examples: Sequence[Workload], *_: Any) -> Any:
        def whole(forms: dict[str, Form]) -> list[tuple[list[float], list[float]]]:
            others = {layers[n].module: random(layers[n].geometry, form, layers[n].module) for n, form in forms.items()}
            both = (model, shadow(model, others))
            return [tuple([self.seconds(each, workload)] * 9 for each in both) for workload in examples]  # type: ignore[misc]

        return SimpleNamespace(whole=whole, in_place=Content(model, layers, examples).in_place)

    def shares(self, twin: nn.Module, examples: Sequence[Workload]) -> dict[str, float]:
        layers, macs = walk(twin).layers, dict[str, float]()
        for name, layer in layers.items():
            layer.module.register_forward_hook(
                lambda _, args, out, name=name, layer=layer: macs.update(
                    {name: Dense().macs(layer.geometry, Use(tuple(args[0].shape), tuple(out.shape)))}
                )
            )
        examples[-1].run(twin)
        return {name: each / sum(macs.values()) for name, each in macs.items()}

    def seconds(self, model: nn.Module, workload: Workload) -> float:
        decomposed = sum(isinstance(module, DecomposedLayer) for module in model.modules())
        return 1e-9 * lamina.count(model, workload.example).macs + self.penalty * decomposed

    @classmethod
    def instead(cls, monkeypatch: pytest.MonkeyPatch) -> Machine:
        """One that tells all times while a test runs."""
        fake = cls()
        monkeypatch.setattr(layer_times, "measure_forms", fake.alone)
        monkeypatch.setattr(whole, "Stopwatch", fake.stopwatch)
        monkeypatch.setattr(judge, "Stopwatch", fake.stopwatch)
        monkeypatch.setattr(whole, "time_shares", fake.shares)
        return fake

    def compares(self, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
        """Let it time whole networks that are compared, too; returns the second ones, as they come."""
        seen: list[nn.Module] = []

        def times(models: Sequence[nn.Module], examples: Sequence[Workload], *_: Any) -> list[list[list[float]]]:
            seen.append(models[1])
            return [[[self.seconds(each, workload)] * 9 for each in models] for workload in examples]

        monkeypatch.setattr(comparison, "time_each", times)
        return seen


def decaying() -> Net:
    """The network with spectra that decay more and less."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for conv, decay in zip(net.body, (0.5, 0.8, 1.0), strict=True):
            scale = decay ** torch.arange(32.0)
            conv.weight.mul_(scale[:, None, None, None] * scale[None, :, None, None])
    return net
