"""Saving and loading a decomposed network: ``plan.json``, its weights and a card in a folder. No pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .card import model_card
from .decomposition import (
    attach_plan,
    decompose,
    forbid_changed,
    forbid_reading,
    merge,
    of_other_weights,
    plan_of,
    planned_layers,
)
from .errors import ArtifactError
from .examples import example_from
from .folder import read_folder, write_folder
from .layers.build import empty
from .network.inplace import exchange
from .network.running import outside_inference_mode
from .network.state import state_of, taken
from .network.walk import Layer
from .network.wrappers import unwrapped
from .plan import Plan
from .values import Workload

PLAN = "plan.json"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a decomposed network: its plan, and its weights under a name that holds their hash.

    The plan is written last and in one stroke: whoever loads meanwhile, or after a kill at any moment, finds the earlier
    network or this one.

    Args:
        model: What `decompose` or `load` returned, fine-tuned or not; inside ``torch.compile`` or DDP perhaps.
        folder: Where to; its parent folders are made. An earlier saved network in it is replaced, with its card; a card that
            somebody has changed counts as another file.

    Raises:
        PlanError: The network was not decomposed, or is not what its plan says any more.
        ArtifactError: The folder holds other files, cannot be written, or the network's state cannot be stored.
    """
    plan = plan_of(model)
    forbid_changed(model, plan)
    inner = unwrapped(model)
    write_folder(Path(folder), PLAN, plan, state_of(inner), card=lambda weights: model_card(inner, plan, weights))


@outside_inference_mode
def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a saved network onto a fresh base model. No factorisation is run.

    The weights are loaded by the network's own ``load_state_dict``, so that hooks and modules with a state of their own have
    their say, and are then held against the file.

    Args:
        model: A network of the structure that was decomposed, with any weights, in the dtype and on the device wanted. It is
            changed in place, all or nothing; its layers stay the same objects.
        folder: What `save` wrote.

    Returns:
        ``model``, decomposed.

    Raises:
        ArtifactError: A file is missing, cut short or changed, or a tensor does not fit; the message names the first one.
        PlanError: The plan is for another network.
        LayerError: The network reads the dense weight of a layer from elsewhere.
    """
    source = Path(folder)
    plan, stored = read_folder(source, PLAN, Plan.read)
    forbid_meta(model)
    chosen = planned_layers(model, plan)
    forms = {layer.name: form for layer, form in chosen}
    examples = [example_from(shape, model) for shape in plan.examples or ()] if chosen else []
    restore(model, [layer for layer, _ in chosen], lambda layer: empty(layer, forms[layer.name]), stored, examples, source)
    return attach_plan(model, plan.alone())


@outside_inference_mode
def load_dense(model: nn.Module, state: Mapping[str, Tensor], data: Any = None, *, sequential: Any = None) -> nn.Module:
    """Load a checkpoint of the dense network into a decomposed one: its layers are factorised on the way, by the same plan.

        >>> lamina.load_dense(small, torch.load("newer.pt", weights_only=True))

    Args:
        model: What `decompose` or `load` returned; it is changed in place, all or nothing.
        state: What the dense network's ``state_dict()`` gives, complete.
        data: As `decompose` takes them, where the plan's factors are fitted to a calibration: of the *new* weights.
        sequential: As `decompose` takes it, where the plan's layers were fitted in sequence.

    Returns:
        ``model``.

    Raises:
        PlanError: The network was not decomposed, or by a plan whose factors cannot be found anew.
        ArtifactError: A tensor is missing, left over or does not fit; the message names the first one.
        CalibrationError: The calibration is of other weights.
    """
    plan, inner = plan_of(model), unwrapped(model)
    if not plan.decomposed:
        with taken(inner, state, "the checkpoint"):
            return model
    dense = unwrapped(merge(model))
    with taken(dense, state, "the checkpoint"):
        fresh = decompose(dense, of_other_weights(plan, data, sequential), data, sequential=sequential, check=False)
    with taken(inner, state_of(unwrapped(fresh)), "the checkpoint"):
        return attach_plan(model, plan_of(fresh))


def restore(
    model: nn.Module,
    layers: Sequence[Layer],
    make: Callable[[Layer], nn.Module],
    stored: Mapping[str, Tensor],
    examples: Sequence[Workload],
    source: Path,
) -> None:
    """Let the layers of a network become others and load its state, all or nothing.

    Args:
        model: The network.
        layers: The layers that become others.
        make: What one becomes, with parameters of the dtype and on the device of the layer's own.
        stored: The state.
        examples: What the network is fed, to prove that it reads no dense weight that somebody still holds.
        source: Where the state comes from, for messages.

    Raises:
        ArtifactError: The state does not fit; the message names the first tensor.
        LayerError: The network reads the dense weight of a layer from elsewhere.
    """
    inner = unwrapped(model)

    def finish(held: Mapping[str, Tensor]) -> None:
        with taken(inner, stored, str(source), [layer.module for layer in layers]):
            forbid_reading(inner, held, examples)

    exchange(layers, make, finish, on_disk=False)


def forbid_meta(model: nn.Module) -> None:
    """Refuse a network that has no values to be replaced.

    Raises:
        ArtifactError: The message names the first tensor.
    """
    inner = unwrapped(model)
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if tensor.is_meta:
            raise ArtifactError(f"{name} of this network is on the meta device: call to_empty(device=...) on the network first")
