"""Fits in sequence: each layer on the inputs that it now gets, to what the original answers on its own.

A layer that is fitted for itself is fitted to inputs that it no longer gets once the layers before it are decomposed. Fitted
one after the other, each may make up for what those before it have lost (AA-SVD, arXiv 2604.02119).

    x, x̂   inputs of a layer in the original, and in the decomposed network      W, Ŵ   its weight, and that of its factors
    Ĥ, C   E x̂ x̂ᵀ and E x x̂ᵀ                                                      G      as in `calibration.calibration`

    E ‖G^½ (W x − Ŵ x̂)‖²  =  tr(G (T − Ŵ) Ĥ (T − Ŵ)ᵀ) + what no Ŵ changes,   T = W C Ĥ⁻¹

So Ŵ is fitted as always: to T, in the metric of Ĥ and G. Ĥ is damped by λ, which draws T towards W:

    T = W + W (C − Ĥ) (Ĥ + λ)⁻¹

C is a block of the moment of x and x̂ side by side, which is added up as a moment of twice as many channels. What a layer then
loses is looked at on inputs held out; where its factors lost less as they were, they stay. So do all factors where the answers
to these inputs come no nearer to the original's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from .calibration import ranks
from .calibration.backward import positions
from .calibration.batches import HELD_OUT, Batch, Batches
from .calibration.calibration import Calibration, tap_by_tap
from .calibration.gram import home
from .calibration.outputs import Categorical, Gaussian, Outputs
from .calibration.recorder import Recorder
from .calibration.sums import Shape, Sums
from .errors import ExampleError, LaminaError, LayerError
from .factorize.metric import Metric, on_sides
from .folder import digest
from .forms import Form
from .layers.build import factored
from .layers.decomposed import DecomposedLayer
from .network.copying import shadow
from .network.memory import devices_of
from .network.placing import opened
from .network.preserve import preserved, repeatable
from .network.running import run, set_mode
from .network.walk import Layer
from .plan import InSequence
from .values import Geometry, Workload

_MEMORY = 5e8
"""Bytes that the sums of a layer may take; of larger ones channels are enough. The matrix itself takes four times as much."""
_WORKSPACE = 2**26


@final
class Inputs:
    """The inputs that layers are fitted on in sequence.

    Args:
        model: The network that they are for.
        data: Unlabelled batches as `calibrate` takes them, every fourth of which is held out.

    Raises:
        ExampleError: They hold fewer than four items, or can be iterated only once.
        LaminaError: It is asked of several processes together.
    """

    def __init__(self, model: nn.Module, data: Any) -> None:
        if ranks.processes() > 1:
            raise LaminaError("layers are fitted in sequence by one process: decompose there, save, and load in the others")
        self.batches = Batches(data, devices_of(model)[0])
        if not self.batches.again:
            raise ExampleError(
                "the data of a fit in sequence are gone through several times a layer: give a list or a loader, no iterator"
            )
        self.first = self.batches.first()
        sizes, identity = [0, 0], hashlib.sha256()
        for batch in self.batches:
            sizes[batch.held_out] += batch.items
            identity.update(digest({f"{n}": tensor for n, tensor in enumerate(batch.workload.tensors)}).encode())
        if not all(sizes):
            raise ExampleError(f"the data hold fewer than {HELD_OUT} items: every fourth is held out, and some must be left")
        self.identity = identity.hexdigest()
        """What tells them from others."""


def fit_in_sequence(
    model: nn.Module,
    small: nn.Module,
    layers: Sequence[tuple[Layer, Form]],
    calibration: Calibration,
    damping: float | None,
    inputs: Inputs,
) -> InSequence:
    """Fit the factors of a decomposed network anew, layer after layer, in place.

    Layers keep the factors that they have where these lose less on what is held out, where they are in groups, and where the
    calibration or the data know nothing of them. All keep them where the answers to what is held out come no nearer.

    Args:
        model: The original; it is only read.
        small: The same, decomposed.
        layers: Those that were, of the original, each with its form.
        calibration: What the factors were fitted to.
        damping: That of the plan; None: each layer has the calibration's.
        inputs: What is fitted on.

    Returns:
        How far the answers to what is held out lie from the original's, before and after.

    Raises:
        ExampleError: A network does not run on the data, or they reach none of the layers.
        LayerError: What a layer gets is not finite; the message names it.
    """
    read = calibration.outputs if isinstance(calibration.outputs, Categorical | Gaussian) else Gaussian()
    factors = [p for layer, _ in layers for p in small.get_submodule(layer.name).parameters()]
    with preserved(small), repeatable(model), torch.no_grad():
        nets = _Pair(shadow(model, opened(layer for layer, _ in layers)), small, calibration.record.mask)
        known = {layer.name: (layer, form) for layer, form in layers if layer.name in calibration.layers}
        called = nets.order(inputs.first, known)
        if not called:
            raise ExampleError("none of the layers decomposed is called on the data of a fit in sequence")
        before, were = nets.divergence(inputs.batches, read), [p.clone() for p in factors]
        for name in called:
            layer, form = known[name]
            if layer.geometry.groups == 1:
                moments = calibration.layers[name]
                given = moments.damping if damping is None else damping
                _fit(nets, inputs.batches, layer, form, moments.gradients(), given)
        after = nets.divergence(inputs.batches, read)
        if not after < before:
            for parameter, was in zip(factors, were, strict=True):
                parameter.copy_(was)
    return InSequence(data=inputs.identity, before=before, after=min(after, before))


def _fit(nets: _Pair, batches: Batches, layer: Layer, form: Form, G: Tensor | None, damping: float) -> None:
    """Fit one layer, and keep what loses less on what is held out."""
    both = replace(layer.geometry, in_channels=2 * layer.geometry.in_channels)
    shape = Shape(both, layer.geometry.patchable, gradients=False)
    if shape.bytes > _MEMORY:
        shape = Shape(both, patches=False, gradients=False)
    sums = Sums(shape, home(batches.device), _WORKSPACE)
    for batch in batches:
        if not batch.held_out:
            for before, now in nets.calls(layer.name, batch):
                side_by_side = torch.cat([before.x, now.x], _channels(layer.geometry, before.x))
                sums.add_inputs(side_by_side, partial(getattr, before, "y"), held_out=False)
    J = tap_by_tap(sums.inputs.flat, both.in_channels, shape.taps)
    n = len(J) // 2
    H, C = J[n:, n:], J[:n, n:]
    if not bool(torch.isfinite(J).all()):
        raise LayerError(f"{layer.title}: what it gets in a fit in sequence holds NaN or infinities: leave out sequential=")
    if not float(H.diagonal().sum()):  # nothing comes in, so nothing can be made up for
        return
    target = layer.weight.detach().double() + shift(layer.weight.detach(), C, H, damping)
    metric = Metric.of(H, G, taps=shape.taps if shape.patches else None, damping=damping)
    stack = nets.small.get_submodule(layer.name)
    assert isinstance(stack, DecomposedLayer)
    anew = factored(layer, form, metric, weight=target)
    root = None if metric.gradients is None else metric.gradients.root
    lost = {stack: 0.0, anew: 0.0}
    for batch in batches:
        if batch.held_out:
            for before, now in nets.calls(layer.name, batch):
                for module in lost:
                    answer = module(now.x.to(layer.parameter.dtype)).to(before.y.dtype)
                    lost[module] += _size(before.y - answer, _channels(layer.geometry, before.y), root)
    if lost[anew] < lost[stack]:
        for factor, found in zip(stack.factors(), anew.factors(), strict=True):
            factor.weight.copy_(found.weight)  # type: ignore[operator, arg-type]


def shift(W: Tensor, C: Tensor, H: Tensor, damping: float) -> Tensor:
    """By how much the weight that is fitted differs from the layer's: ``W (C − Ĥ) (Ĥ + λ)⁻¹``.

    Args:
        W: ``(O, I, *kernel)``.
        C: E x x̂ᵀ of patches ``(I K, I K)``, in the order of ``W.flatten(1)``, or of channels ``(I, I)``.
        H: Ĥ, of the same shape.
        damping: λ, as a share of the mean diagonal entry of Ĥ.

    Returns:
        ``(O, I, *kernel)``, float64.
    """
    ridge = H + damping * float(H.diagonal().mean()) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    near = torch.cholesky_solve((C - H).T, torch.linalg.cholesky(ridge)).T.to(W.device)
    return on_sides(W if len(H) == W.shape[1] else W.flatten(1), near, None).reshape(W.shape)


def _channels(layer: Geometry, x: Tensor) -> int:
    """The dimension in which the channels of an input or an output lie."""
    return x.ndim - 1 - len(layer.kernel)


def _size(wrong: Tensor, channels: int, root: Tensor | None) -> float:
    """``‖G^½ (y − ŷ)‖²``, summed over all positions."""
    if root is not None:
        wrong = torch.tensordot(wrong, root.to(wrong.device, wrong.dtype), dims=([channels], [0]))
    return float(wrong.double().square().sum())


@final
@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer was called with, and what it answered."""

    x: Tensor
    y: Tensor


class _Enough(BaseException):
    """A layer was called as often as it is, so what comes behind it need not run. No network catches it as an error."""


@final
class _Seen:
    """The calls of one layer in one run."""

    gradients = None

    def __init__(self, most: float) -> None:
        self.calls: list[_Call] = []
        self._most = most

    def add_inputs(self, x: Tensor, y: Callable[[], Tensor], held_out: bool) -> None:
        """Keep a call."""
        self.calls.append(_Call(x, y()))
        if len(self.calls) >= self._most:
            raise _Enough

    def add_gradients(self, g: Tensor, held_out: bool) -> None:
        """None are asked for."""


@final
class _Order:
    """How often layers were called in one run, in the order of their first calls."""

    gradients = None

    def __init__(self, name: str, counts: dict[str, int]) -> None:
        self._name, self._counts = name, counts

    def add_inputs(self, x: Tensor, y: Callable[[], Tensor], held_out: bool) -> None:
        """Count a call."""
        self._counts[self._name] = self._counts.get(self._name, 0) + 1

    def add_gradients(self, g: Tensor, held_out: bool) -> None:
        """None are asked for."""


@final
class _Pair:
    """A network and the decomposed one, run side by side.

    Args:
        original: A shadow of it, in which every layer is called.
        small: The decomposed one.
        mask: The name of the keyword argument that says which positions count.
    """

    def __init__(self, original: nn.Module, small: nn.Module, mask: str | None) -> None:
        self.small = small
        self._nets, self._mask = (original, small), mask
        self._counts: dict[str, int] = {}
        for net in self._nets:
            set_mode(net, False)

    def order(self, workload: Workload, names: Collection[str]) -> list[str]:
        """Those of some layers that are called, in the order of their first calls."""
        self._run(self._nets[0], workload, {name: _Order(name, self._counts) for name in names})
        return list(self._counts)

    def calls(self, name: str, batch: Batch) -> list[tuple[_Call, _Call]]:
        """The calls of a layer, in both networks; none where they are not called alike."""
        # A layer that is called several times may be called more often in another batch.
        most = 1 if self._counts[name] == 1 else math.inf
        found: list[list[_Call]] = []
        for net in self._nets:
            seen = _Seen(most)
            with suppress(_Enough):
                self._run(net, batch.workload, {name: seen})
            found.append(seen.calls)
        alike = [call.x.shape for call in found[0]] == [call.x.shape for call in found[1]]
        return list(zip(*found, strict=True)) if alike else []

    def divergence(self, batches: Batches, read: Outputs) -> float:
        """How far the answers lie apart, nats an item held out."""
        total, items = 0.0, 0
        for batch in batches:
            if batch.held_out:
                original, changed = (self._run(net, batch.workload, {}) for net in self._nets)
                total += float(read.divergence(original, changed).sum())
                items += batch.items
        return total / items

    def _run(self, net: nn.Module, workload: Workload, sums: Mapping[str, Any]) -> Any:
        torch.manual_seed(0)  # what a network draws is the same in both
        recorder = Recorder(sums)
        with recorder.recording(net), recorder.running(False, positions(self._mask, workload)):
            return run(net, workload)
