"""Model and plan → model, and back.

`decompose` first makes sure that it can: the plan fits, every weight is finite, and the network's own code gets on with the new
layers in every mode. Only then are weights factorised, one layer after the other.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.weak import TensorWeakRef

from .errors import LaminaError, LayerError, PlanError, RankError
from .forms import Form
from .layers.build import factored, placeholder
from .layers.decomposed import DecomposedLayer
from .network.fingerprint import fingerprint
from .network.observe import first_line, modes_that_run
from .network.surgery import adopt, cloned, forbid_nonfinite, hand_over_hooks, put, put_under
from .network.walk import Layer, walk
from .plan import ExampleShape, Plan, TensorShape
from .values import Geometry, Workload, closest

_PLAN = "_lamina_plan"


def decompose(model: nn.Module, plan: Plan, data: Any = None, *, inplace: bool = False, check: bool = True) -> nn.Module:
    """Replace the layers of a network as a plan says.

    Args:
        model: A network of the structure that the plan was made for, with any weights.
        plan: What each layer becomes.
        data: Calibration inputs, for plans whose factors are data-aware.
        inplace: Change ``model`` itself; each dense weight is then freed as soon as its factors stand. Otherwise a copy is
            made, which shares nothing with ``model``.
        check: Try the network with placeholders in every mode in which it runs (train, eval, eval without gradients,
            inference mode) before anything is factorised, on inputs of the shapes in the plan.

    Returns:
        The decomposed network: ``model`` where ``inplace``, except that a network which is itself one layer is always
        returned anew.

    Raises:
        PlanError: The plan is for another network, or its factors were trained in a supernet and cannot be found anew.
        LayerError: A weight is not finite, or the network does not run with a layer decomposed. The network is as it was.
    """
    layers = planned_layers(model, plan)
    if plan.factors.series:
        raise PlanError(
            "this plan's factors were trained in a supernet, and new ones would be others: take them out with "
            "Supernet.extract, or load the saved network with lamina.load"
        )
    if plan.factors.data_aware and data is None:
        raise PlanError("this plan's factors are fitted to data: pass the calibration inputs as data=")
    _forbid_nonfinite(layers)
    if check and layers:
        _try_placeholders(model, layers, plan)
    if inplace:
        result = _in_place(model, layers)
    else:
        result = cloned(model, {layer.module: _factored(layer, form) for layer, form in layers})
    return attach_plan(result, plan)


def attach_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Let a decomposed network carry its plan, which `lamina.save` writes beside the weights."""
    model.__dict__[_PLAN] = plan
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a network was decomposed.

    Raises:
        PlanError: It was not.
    """
    plan = model.__dict__.get(_PLAN)
    if not isinstance(plan, Plan):
        raise PlanError("this network was not decomposed by lamina: it carries no plan")
    return plan


def merge(model: nn.Module) -> nn.Module:
    """A copy of a decomposed network with every decomposed layer dense again: the same function, up to rounding.

    The dense weight is the product of the factors, so what the decomposition lost stays lost.

    Raises:
        PlanError: Nothing in the network is decomposed.
    """
    stacks = [module for module in model.modules() if isinstance(module, DecomposedLayer)]
    if not stacks:
        raise PlanError("nothing in this network is decomposed, so there is nothing to merge")
    result = cloned(model, {stack: adopt(stack.merged(), stack) for stack in stacks})
    result.__dict__.pop(_PLAN, None)
    return result


def planned_layers(model: nn.Module, plan: Plan) -> list[tuple[Layer, Form]]:
    """The network's layers that a plan decomposes, each with its form.

    Raises:
        PlanError: The plan is for another network; the message names the first layer that differs.
    """
    for name, module in model.named_modules():
        if isinstance(module, DecomposedLayer):
            raise PlanError(f"{name or 'the network'} is decomposed already; lamina.merge brings the dense layers back")
    census = walk(model)
    chosen: list[tuple[Layer, Form]] = []
    for name, planned in plan.layers.items():
        if name not in census.layers:
            why = f"not in this network{closest(name, list(census.layers))}"
            if name in census.refused:
                why = f"cannot be decomposed here: {census.refused[name]}"
            raise PlanError(f"{name or 'the network'}: {why}; the plan was made for another network")
        layer = census.layers[name]
        if layer.geometry != planned.geometry:
            apart = _mismatch(layer.geometry, planned.geometry)
            raise PlanError(f"{layer.title}: {apart} in the plan, which was made for another network")
        if planned.decomposed:
            try:
                planned.form.check(layer.geometry)
            except RankError as error:
                raise PlanError(f"{layer.title}: {error}") from error
            chosen.append((layer, planned.form))
    if fingerprint(model) != plan.fingerprint:
        raise PlanError(
            "the plan was made for another network: the planned layers are alike, but modules or shapes beside them differ"
        )
    return chosen


def _mismatch(here: Geometry, there: Geometry) -> str:
    pairs = {f.name: (getattr(here, f.name), getattr(there, f.name)) for f in dataclasses.fields(Geometry)}
    apart = [f"{name} {a!r} and not {b!r}" for name, (a, b) in pairs.items() if a != b]
    return f"a {here} ({', '.join(apart)}) here, a {there}"


def example_shape(workload: Workload) -> ExampleShape | None:
    """A workload without its values; None where an argument is neither a tensor nor a plain constant."""

    def shape(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return TensorShape(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError

    try:
        return ExampleShape(
            args=tuple(map(shape, workload.args)),
            kwargs={k: shape(v) for k, v in workload.kwargs.items()},
            weight=workload.weight,
        )
    except TypeError:
        return None


def example_from(shape: ExampleShape, model: nn.Module) -> Workload:
    """Arguments of a recorded shape on a network's device: normal numbers, and zeros where integers or booleans are wanted.

    Raises:
        PlanError: There is no such dtype or shape.
    """
    generator = torch.Generator().manual_seed(0)  # not the global one, whose state is the user's
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def value(entry: Any) -> Any:
        if not isinstance(entry, TensorShape):
            return entry
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype) or any(side < 0 for side in entry.shape):
            raise PlanError(f"the plan's example makes no sense: a tensor of {entry.dtype}, {entry.shape}")
        if not dtype.is_floating_point:
            return torch.zeros(entry.shape, dtype=dtype, device=device)
        return torch.randn(entry.shape, generator=generator).to(device, dtype)

    workload = Workload(tuple(map(value, shape.args)), shape.weight)
    workload.kwargs.update({name: value(entry) for name, entry in shape.kwargs.items()})
    return workload


def _forbid_nonfinite(layers: list[tuple[Layer, Form]]) -> None:
    for layer, _ in layers:
        forbid_nonfinite(layer)


def _factored(layer: Layer, form: Form) -> DecomposedLayer:
    try:
        return factored(layer, form)
    except (LaminaError, RuntimeError) as error:
        raise LayerError(f"{layer.title}: cannot be factorised: {first_line(error)}") from error


def _try_placeholders(model: nn.Module, layers: list[tuple[Layer, Form]], plan: Plan) -> None:
    """Refuse where the network runs in a mode now but not with its layers exchanged; the first culprit is named."""
    for shape in plan.examples or ():
        workload = example_from(shape, model)
        ran = modes_that_run(model, workload)
        broken = {mode: why for mode, why in _modes_with(model, layers, workload).items() if why and ran[mode] is None}
        if not broken:
            continue
        for pair in layers:
            alone = {mode: why for mode, why in _modes_with(model, [pair], workload).items() if why and mode in broken}
            if alone:
                mode, why = next(iter(alone.items()))
                raise LayerError(
                    f"{pair[0].title}: with this layer decomposed the network does not run in {mode}: {why}; skip it"
                )
        mode, why = next(iter(broken.items()))
        raise LayerError(f"with these layers decomposed the network does not run in {mode}: {why}; the network is as it was")


def _modes_with(model: nn.Module, layers: list[tuple[Layer, Form]], workload: Workload) -> dict[str, str | None]:
    trial = model
    try:
        for layer, form in layers:
            trial = put(trial, layer, placeholder(layer, form))
        return modes_that_run(trial, workload)
    finally:
        for layer, _ in layers:
            put(trial, layer, layer.module)


@final
@dataclass(frozen=True, slots=True)
class _WayBack:
    """Brings one dense layer back whose weight was freed: the layer without it, and the weight on disk.

    Whoever else holds the layer or its weight keeps it alive; then that very object comes back.
    """

    names: tuple[str, ...]
    shell: nn.Module
    module: weakref.ref[nn.Module]
    weight: TensorWeakRef
    like: nn.Parameter
    """The weight on the meta device: its layout, attributes, and whether it trains."""
    device: torch.device
    path: Path

    @classmethod
    def of(cls, layer: Layer, path: Path) -> _WayBack:
        weight: nn.Parameter = layer.module.weight  # type: ignore[assignment]
        stored = {"weight": weight} if weight.grad is None else {"weight": weight, "grad": weight.grad}
        save_file({name: tensor.detach().contiguous() for name, tensor in stored.items()}, path)
        shell = copy.copy(layer.module)
        shell._parameters = layer.module._parameters | {"weight": None}
        like = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        vars(like).update(vars(weight))
        return cls(layer.names, shell, weakref.ref(layer.module), TensorWeakRef(weight), like, weight.device, path)

    def take(self, model: nn.Module) -> None:
        module = self.module()
        if module is None:
            module = self.shell
            weight = self.weight()
            module._parameters["weight"] = self._restored() if weight is None else weight
        put_under(model, self.names, module)

    def _restored(self) -> nn.Parameter:
        files = load_file(self.path)
        stored = {name: torch.empty_like(self.like, device=self.device).copy_(value) for name, value in files.items()}
        weight = nn.Parameter(stored["weight"], requires_grad=self.like.requires_grad)
        weight.grad = stored.get("grad")
        vars(weight).update(vars(self.like))
        return weight


def _in_place(model: nn.Module, layers: list[tuple[Layer, Form]]) -> nn.Module:
    """Exchange layer by layer, largest first; each dense weight is kept on disk until all is done: an error undoes it all."""
    queue = sorted(layers, key=lambda pair: -pair[0].geometry.parameters)
    layers.clear()
    done: list[tuple[_WayBack, DecomposedLayer]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="lamina-", ignore_cleanup_errors=True) as folder:
            try:
                while queue:
                    layer, form = queue.pop(0)
                    stack = _factored(layer, form)
                    done.append((_WayBack.of(layer, Path(folder) / f"{len(done)}.safetensors"), stack))
                    model = put(model, layer, stack)
                    del layer
            except BaseException:
                for way_back, _ in done:
                    way_back.take(model)
                raise
    except (OSError, SafetensorError) as error:
        raise LaminaError(f"working in place keeps the dense weights in {tempfile.gettempdir()} meanwhile: {error}") from error
    for way_back, stack in done:
        if stack is not model:
            hand_over_hooks(stack, way_back.shell)
    return model
