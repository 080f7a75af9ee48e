"""How long a layer takes in a form, on inputs of the shape and the dtype that the network really feeds it.

Weights are random: a time needs shapes only, so no factorisation is done to choose a rank. The dense layer is timed beside
every batch of forms, and a form's time is its ratio to the dense layer's in the same round: so drift cancels, within a batch
and between batches.

A training step under a freezing schedule is timed phase by phase, and each phase is kept for itself: a time is their mean by
shares, and every schedule is served by the same few times. The gradient for the layer's input is always part of the step, as it
is everywhere but at the network's own input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any, final

import torch
from torch import nn

from ..forms import Dense, Form
from ..layers.build import random
from ..layers.decomposed import DecomposedLayer
from ..network.walk import Layer
from ..runtimes.eager import EAGER
from ..runtimes.runtime import Runtime
from ..schedules import Group, phase_name
from ..values import Mode, Setting, Timing, Training, Use
from .clock import Effort, alike, interleave, timing
from .graphs import REPEATS, captured
from .pool import Pool, moving, pool_of
from .signature import signature
from .table import TimingTable

_LOOKS = Effort(0.02, 2, 5, precision=0), Effort(0.3, 5, 20, precision=0)
"""How long a dense layer is looked at, to tell whether it takes as long as it did; the second look only where the first denies.
The fastest run counts: who interrupts one of them does not make it another machine."""

_LEAST = 0.05
"""Of a graph's time, that its layer takes at least, however long its neighbours took."""

_BELIEVED = 3.0
"""So many times as fast again as its MACs make it a form may be: a cache may hold its weights, and not the dense ones."""

_MOST_BYTES = 2**29
"""Of weights that another runtime holds at a time."""


@final
@dataclass(slots=True)
class LayerTimes:
    """Times of one layer's forms, over all its uses, measured when asked for and kept in a table."""

    layer: Layer
    uses: tuple[Use, ...]
    channels_last: bool
    mode: Mode
    setting: Setting
    table: TimingTable
    effort: Effort = field(default_factory=Effort)
    runtime: Runtime = EAGER

    def __call__(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        """The time of each form: the sum over the layer's uses of calls × weight × time of one call."""
        total: dict[Form, Timing] = {}
        for use in self.uses:
            for phase in self.mode.phases:
                share = use.calls * use.weight * phase.share
                for form, one in self._of_one_call(use, forms, phase.resting).items():
                    median_s, mad_s = one.median_s * share, one.mad_s * share
                    if form in total:
                        median_s, mad_s = median_s + total[form].median_s, mad_s + total[form].mad_s
                    total[form] = replace(one, median_s=median_s, mad_s=mad_s, setting=self.table.conditions(self.setting))
        return total

    def _of_one_call(self, use: Use, forms: Sequence[Form], resting: Group | None) -> dict[Form, Timing]:
        dense = Dense()
        plain = replace(self.setting, freezing="off", autocast=use.autocast)
        setting = plain if resting is None else replace(plain, freezing=phase_name(resting))
        keys = {
            # Nothing of a dense layer ever rests.
            form: signature(self.layer.geometry, form, use, self.channels_last, plain if form == dense else setting)
            for form in dict.fromkeys([dense, *forms])
        }
        anchor = keys[dense]
        known = self.table.get(anchor, keys.values(), setting, lambda then_s: self._takes_as_then(then_s, anchor, use))
        if missing := [form for form in dict.fromkeys(forms) if keys[form] not in known]:
            anchored = [dense, *(form for form in missing if form != dense)]
            self.table.pool = pool_of(self.layer.parameter)  # for the next layers too, as long as the table is open
            known |= self._measured(anchored, keys, use, setting, resting)
        return {form: known[keys[form]] for form in dict.fromkeys(forms)}

    def _measured(
        self, anchored: list[Form], keys: dict[Form, str], use: Use, setting: Setting, resting: Group | None
    ) -> dict[str, Timing]:
        """Times of forms that are not known yet, kept in the table; each batch has the dense layer in it.

        What is too fast to be believed is measured once more, and the slower of both is kept.
        """

        def times_of(forms: list[Form]) -> dict[Form, Timing]:
            return measure_forms(
                self.layer, forms, use, self.channels_last, self.mode, setting, self.effort, resting, self.runtime
            )

        found: dict[str, Timing] = {}
        for batch in _batches(self.layer, anchored, self.runtime):
            measured = times_of(batch)
            if doubted := [form for form in batch if _doubted(self.layer, form, use, measured)]:
                measured = _slower(measured, times_of([Dense(), *doubted]))
            found |= self.table.put(keys[Dense()], {keys[form]: one for form, one in measured.items()})
        return found

    def _takes_as_then(self, then_s: float, anchor: str, use: Use) -> bool:
        """Whether the dense layer takes about as long now as it did then; looked at longer before it is denied."""
        looked = self.table.looked
        for effort in _LOOKS:
            if (anchor, effort) not in looked:
                self.table.pool = pool_of(self.layer.parameter)
                found = sampled(self.layer, [Dense()], use, self.channels_last, self.mode, effort, runtime=self.runtime)[
                    Dense()
                ]
                looked[anchor, effort] = min([*found, *(s for (key, _), s in looked.items() if key == anchor)])
            if alike(then_s, looked[anchor, effort]):
                return True
        return False


def _doubted(layer: Layer, form: Form, use: Use, times: dict[Form, Timing]) -> bool:
    """Whether a form is so much faster than the dense layer that its MACs do not explain it."""
    dense, one = Dense(), Use(use.input_shape, use.output_shape)
    fewer = dense.macs(layer.geometry, one) / max(form.macs(layer.geometry, one), 1)
    return form != dense and times[dense].median_s > _BELIEVED * fewer * times[form].median_s


def _slower(first: dict[Form, Timing], second: dict[Form, Timing]) -> dict[Form, Timing]:
    """The first times, and of forms that were timed again the slower ones, beside the dense layer of each."""
    if not second[Dense()].median_s > 0:
        return first
    scale = first[Dense()].median_s / second[Dense()].median_s
    again = {form: replace(one, median_s=scale * one.median_s, mad_s=scale * one.mad_s) for form, one in second.items()}
    return {form: max(one, again.get(form, one), key=lambda each: each.median_s) for form, one in first.items()}


def _batches(layer: Layer, forms: list[Form], runtime: Runtime) -> list[list[Form]]:
    """Forms that are timed together, the dense layer first in each: another runtime keeps weights of its own of each form."""
    if runtime.eager:
        return [forms]
    batches: list[list[Form]] = [forms[:1]]
    room = 0
    for form in forms[1:]:
        size = form.parameters(layer.geometry) * layer.parameter.element_size()
        if len(batches[-1]) > 1 and room + size > _MOST_BYTES:
            batches.append(forms[:1])
            room = 0
        batches[-1].append(form)
        room += size
    return batches


def measure_forms(
    layer: Layer,
    forms: Sequence[Form],
    use: Use,
    channels_last: bool,
    mode: Mode,
    setting: Setting,
    effort: Effort,
    resting: Group | None = None,
    runtime: Runtime = EAGER,
) -> dict[Form, Timing]:
    """What some forms of a layer take, timed against each other: see `sampled`."""
    return _beside_dense(sampled(layer, forms, use, channels_last, mode, effort, resting, runtime), setting)


def sampled(
    layer: Layer,
    forms: Sequence[Form],
    use: Use,
    channels_last: bool,
    mode: Mode,
    effort: Effort,
    resting: Group | None = None,
    runtime: Runtime = EAGER,
) -> dict[Form, list[float]]:
    """Seconds of some forms of a layer, round by round: one call of a forward pass, or of forward and backward.

    In training the factors of one group may rest. In another runtime than eager PyTorch each form is a graph of its own.
    """
    weight = layer.parameter
    dtype = getattr(torch, use.input_dtype) if use.input_dtype else weight.dtype
    x = torch.randn(use.input_shape, device=weight.device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if not runtime.eager:
        return _served(layer, forms, x, use, effort, runtime)
    pool = pool_of(weight)
    pool.reserve(max(form.parameters(layer.geometry) for form in forms))
    modules = [
        _random_dense(layer, pool.view) if form == Dense() else random(layer.geometry, form, layer.module, pool.view)
        for form in forms
    ]
    weights = [[p for name, p in module.named_parameters() if not name.endswith("bias")] for module in modules]
    training, casting = isinstance(mode, Training), use.autocast != "off"
    # Casts are not kept from one run to the next: in use, every forward enters autocast anew.
    cast_to = getattr(torch, use.autocast) if casting else None
    around = torch.autocast(weight.device.type, cast_to, enabled=casting, cache_enabled=False)
    with around, torch.enable_grad() if training else torch.inference_mode():
        # One for all: their outputs are of one shape, and as many gradients could take more memory than all weights.
        gradient = torch.randn_like(modules[0](x)) if training else x
        steps = [_training_step(module, x, gradient, resting) if training else _forward(module, x) for module in modules]
        return dict(zip(forms, _interleaved(pool, weights, steps, effort), strict=True))


def _served(
    layer: Layer, forms: Sequence[Form], x: torch.Tensor, use: Use, effort: Effort, runtime: Runtime
) -> dict[Form, list[float]]:
    """The same in another runtime, which holds weights of its own: so no two forms are in memory as modules.

    What neighbours take that a convolution is timed between is taken off, by the mean of those of its input and its output: the
    same share of the dense layer's graph in each round. They move maps through memory, which others use too, so round by round
    they differ more than the forms do, and a form's savings need not hang on them.
    """

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(like, device=layer.parameter.device)

    runs = []
    for form in forms:
        module = _random_dense(layer, drawn) if form == Dense() else random(layer.geometry, form, layer.module)
        runs.append(runtime.prepare_layer(module.eval(), x).run)
    maps = (x, x.new_zeros(use.output_shape)) if layer.geometry.kernel else ()
    around = [prepared.run for each in maps if (prepared := runtime.neighbours(each))]
    with torch.inference_mode():
        times = interleave([*runs, *around], layer.parameter.device, effort)
    own, others = times[: len(runs)], times[len(runs) :]
    found = dict(zip(forms, own, strict=True))
    if not others:
        return found
    dense = found.get(Dense(), own[0])
    share = median(mean(around) / whole for whole, *around in zip(dense, *others, strict=True))
    return {
        form: [max(seconds - share * whole, _LEAST * seconds) for seconds, whole in zip(each, dense, strict=True)]
        for form, each in found.items()
    }


def _interleaved(
    pool: Pool, weights: Sequence[Sequence[nn.Parameter]], steps: Sequence[Callable[[], Any]], effort: Effort
) -> list[list[float]]:
    """Times of one call of each step; its weights are cold. Moving them takes no part of the time."""
    moves = [moving(pool, each) for each in weights]
    replays = captured(steps, moves, pool.device)
    if replays is None and pool.device.type == "cpu":
        return interleave(steps, pool.device, effort, moves)
    if replays is None:  # a move is over while the device still computes
        return interleave([partial(_moved, *each) for each in zip(moves, steps, strict=True)], pool.device, effort)
    return [[one / REPEATS for one in each] for each in interleave(replays, pool.device, effort)]


def _moved(move: Callable[[], Any], step: Callable[[], Any]) -> Any:
    move()
    return step()


def _beside_dense(times: dict[Form, list[float]], setting: Setting) -> dict[Form, Timing]:
    """What each form takes, by its ratios to the dense run of the same round: what slowed a whole round cancels.

    So a form's time divided by the dense layer's is the median of the paired ratios, and its spread theirs. Where something
    else ran meanwhile, which the dense layer's rounds show, no ratio of a round can be trusted: who is interrupted in it is
    chance. Of each form the fastest run counts then.
    """
    if not all(times.get(Dense(), [0.0])):
        return {form: timing(each, setting) for form, each in times.items()}
    dense = timing(times[Dense()], setting)
    if not alike(dense.median_s, min(times[Dense()])):
        return {form: _uninterrupted(each, setting) for form, each in times.items()}
    found = {}
    for form, each in times.items():
        ratio = timing([one / beside for one, beside in zip(each, times[Dense()], strict=True)], setting)
        found[form] = replace(ratio, median_s=ratio.median_s * dense.median_s, mad_s=ratio.mad_s * dense.median_s)
    return found | {Dense(): dense}


def _uninterrupted(times: list[float], setting: Setting) -> Timing:
    """The fastest run, with the spread of the fastest third."""
    fastest = sorted(times)[: max(len(times) // 3, 1)]
    return Timing(fastest[0], median(each - fastest[0] for each in fastest), len(times), setting)


def _random_dense(layer: Layer, draw: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    weight = layer.weight
    bias = torch.zeros(layer.geometry.out_channels, dtype=weight.dtype, device=weight.device) if layer.geometry.bias else None
    # empty_like keeps the order of the strides, and with it the layout, but no gap that a view may have.
    return layer.reader.dense(layer.geometry, draw(torch.empty_like(weight, device="meta")), bias)


def _forward(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    module.eval()
    return lambda: module(x)


def _training_step(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, resting: Group | None) -> Callable[[], Any]:
    module.train().requires_grad_(True)
    if isinstance(module, DecomposedLayer) and resting is not None:
        for factor in module.factor_groups()[resting]:
            factor.weight.requires_grad_(False)
    x = x.detach().requires_grad_(True)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> Any:
        return torch.autograd.grad(module(x), wanted, gradient)

    return step
