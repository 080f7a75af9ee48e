"""Model and plan → model, and back.

`decompose` first makes sure that it can: the plan fits, every weight is finite, and the network's own code gets on with the new
layers in every mode. Only then are weights factorised, one layer after the other.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import LaminaError, LayerError, PlanError, RankError
from .forms import Form
from .layers.build import factored, placeholder
from .layers.decomposed import DecomposedLayer
from .network.fingerprint import fingerprint
from .network.observe import modes_that_run
from .network.surgery import adopt, cloned, forbid_nonfinite, put
from .network.walk import Layer, walk
from .plan import ExampleShape, Plan, TensorShape
from .values import Workload, closest

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
        The decomposed network: ``model`` where ``inplace``, except that a network which is itself one layer is always returned anew.

    Raises:
        PlanError: The plan is for another network.
        LayerError: A weight is not finite, or the network does not run with a layer decomposed. The network is as it was.
    """
    layers = planned_layers(model, plan)
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
    census = walk(model)
    chosen = []
    for name, planned in plan.layers.items():
        if name not in census.layers:
            reason = census.refused.get(name)
            why = f"cannot be decomposed here: {reason}" if reason else f"not in this network{closest(name, list(census.layers))}"
            raise PlanError(f"{name}: {why}; the plan was made for another network")
        layer = census.layers[name]
        if layer.geometry != planned.geometry:
            raise PlanError(f"{name}: a {layer.geometry} here, a {planned.geometry} in the plan, which was made for another network")
        if planned.decomposed:
            try:
                planned.form.check(layer.geometry)
            except RankError as error:
                raise PlanError(f"{name}: {error}") from error
            chosen.append((layer, planned.form))
    if fingerprint(model) != plan.fingerprint:
        raise PlanError("the plan was made for another network: the planned layers are alike, but modules or shapes beside them differ")
    return chosen


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
            args=tuple(map(shape, workload.args)), kwargs={k: shape(v) for k, v in workload.kwargs.items()}, weight=workload.weight
        )
    except TypeError:
        return None


def example_from(shape: ExampleShape, model: nn.Module) -> Workload:
    """Arguments of a recorded shape on a network's device: normal numbers, and zeros where integers or booleans are wanted."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def value(entry: Any) -> Any:
        if not isinstance(entry, TensorShape):
            return entry
        dtype: torch.dtype = getattr(torch, entry.dtype)
        zeros = torch.zeros(entry.shape, dtype=dtype, device=device)
        return torch.randn_like(zeros) if dtype.is_floating_point else zeros

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
        raise LayerError(f"{layer.name}: cannot be factorised: {error}") from error


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
                raise LayerError(f"{pair[0].name}: with this layer decomposed the network does not run in {mode}: {why}; skip it")
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


def _in_place(model: nn.Module, layers: list[tuple[Layer, Form]]) -> nn.Module:
    """Exchange layer by layer, largest first, keeping each dense weight on disk until all is done, so that an error undoes it all."""
    queue = sorted(layers, key=lambda pair: -pair[0].geometry.parameters)
    layers.clear()
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        done: list[tuple[tuple[str, ...], DecomposedLayer, Path]] = []
        try:
            while queue:
                layer, form = queue.pop(0)
                stack = _factored(layer, form)
                path = Path(folder) / f"{len(done)}.safetensors"
                save_file({"weight": layer.reader.weight(layer.module).detach().contiguous()}, path)
                done.append((layer.names, stack, path))
                model = put(model, layer, stack)
                del layer
        except BaseException:
            for names, stack, path in done:
                _put_back(model, names, stack, path)
            raise
    return model


def _put_back(model: nn.Module, names: tuple[str, ...], stack: DecomposedLayer, path: Path) -> None:
    dense = stack.merged()
    with torch.no_grad():
        weight: nn.Parameter = dense.weight  # type: ignore[assignment]
        stored = load_file(path)["weight"]
        weight.copy_(stored.T if stack.geometry.type == "Conv1D" else stored)
    adopt(dense, stack)
    for name in names:
        if name:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = dense
