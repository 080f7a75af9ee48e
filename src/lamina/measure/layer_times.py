"""How long a layer takes in a form, on inputs of the shape that the network really feeds it.

Weights are random: a time needs shapes only, so no factorisation is done to choose a rank. The dense layer is timed beside
every batch of forms; forms timed later are scaled by what the dense layer took then and now, so that drift cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import nn

from ..forms import Dense, Form
from ..layers.build import random, random_weight
from ..network.walk import Layer
from ..values import Mode, Setting, Timing, Training, Use
from .clock import Effort, interleave, timing
from .table import TimingTable, signature


@final
@dataclass(slots=True)
class LayerTimes:
    """Times of one layer's forms, over all its uses, measured when asked for and kept in a table.

    ``taken`` counts the forms that were measured and not found in the table.
    """

    layer: Layer
    uses: tuple[Use, ...]
    channels_last: bool
    mode: Mode
    setting: Setting
    table: TimingTable
    effort: Effort = field(default_factory=Effort)
    taken: int = 0

    def __call__(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        """The time of each form: the sum over the layer's uses of calls × weight × time of one call."""
        total: dict[Form, Timing] = {}
        for use in self.uses:
            share = use.calls * use.weight
            for form, one in self._of_one_call(use, forms).items():
                median_s, mad_s = one.median_s * share, one.mad_s * share
                if form in total:
                    median_s, mad_s = median_s + total[form].median_s, mad_s + total[form].mad_s
                total[form] = replace(one, median_s=median_s, mad_s=mad_s)
        return total

    def _of_one_call(self, use: Use, forms: Sequence[Form]) -> dict[Form, Timing]:
        dense = Dense()
        keys = {
            form: signature(self.layer.geometry, form, use, self.channels_last, self.setting)
            for form in dict.fromkeys([dense, *forms])
        }
        known = self.table.get(keys.values(), self.setting)
        missing = [form for form in dict.fromkeys(forms) if keys[form] not in known]
        if missing:
            anchored = [dense, *(form for form in missing if form != dense)]
            measured = measure_forms(self.layer, anchored, use, self.channels_last, self.mode, self.setting, self.effort)
            self.taken += len(missing)
            if keys[dense] in known:
                scale = known[keys[dense]].median_s / measured[dense].median_s
                measured = {f: replace(t, median_s=t.median_s * scale, mad_s=t.mad_s * scale) for f, t in measured.items()}
                del measured[dense]
            fresh = {keys[form]: one for form, one in measured.items()}
            self.table.put(fresh)
            known |= fresh
        return {form: known[keys[form]] for form in dict.fromkeys(forms)}


def measure_forms(
    layer: Layer, forms: Sequence[Form], use: Use, channels_last: bool, mode: Mode, setting: Setting, effort: Effort
) -> dict[Form, Timing]:
    """Time some forms of a layer against each other: one call of a forward pass, or of forward and backward."""
    weight: nn.Parameter = layer.module.weight  # type: ignore[assignment]
    x = torch.randn(use.input_shape, device=weight.device).to(weight.dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    modules = [
        _random_dense(layer) if isinstance(form, Dense) else random(layer.geometry, form, layer.module) for form in forms
    ]
    step = _training_step if isinstance(mode, Training) else _forward
    with torch.inference_mode() if not isinstance(mode, Training) else torch.enable_grad():
        times = interleave([step(module, x) for module in modules], weight.device, effort)
    return {form: timing(each, setting) for form, each in zip(forms, times, strict=True)}


def _random_dense(layer: Layer) -> nn.Module:
    weight = layer.reader.weight(layer.module)
    values = random_weight(tuple(weight.shape), weight.device).to(weight.dtype)
    # empty_like keeps the strides, and with them the layout.
    bias = torch.zeros(layer.geometry.out_channels, dtype=weight.dtype, device=weight.device) if layer.geometry.bias else None
    return layer.reader.dense(layer.geometry, torch.empty_like(weight).copy_(values), bias)


def _forward(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    module.eval()
    return lambda: module(x)


def _training_step(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    module.train().requires_grad_(True)
    x = x.detach().requires_grad_(True)
    wanted = [x, *module.parameters()]
    gradient = torch.randn_like(module(x))

    def step() -> Any:
        return torch.autograd.grad(module(x), wanted, gradient)

    return step
