"""What a training is told and what it holds: compared, taken out of a network and its optimizer, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decomposition import plan_of
from ..errors import PlanError, TrainingError
from ..folder import digest
from ..network.fingerprint import fingerprint
from ..network.state import state_of
from ..plan import Plan
from .checkpoint import Content, Part, fill
from .distributed import from_each, is_spread

Settings = dict[str, Any]


def planned(model: nn.Module) -> Plan | None:
    """The plan that a network carries, None where it has none."""
    try:
        return plan_of(model)
    except PlanError:
        return None


def of_network(model: nn.Module) -> Settings:
    """Its layers' forms, and what it is, sharded or not: the structure that its plan was made for, or its own."""
    plan = planned(model)
    if plan is None:
        return {"network: its structure": fingerprint(model)}
    forms = {f"plan: {name}": str(layer.form) for name, layer in plan.layers.items()}
    return forms | {"network: its structure": plan.fingerprint}


def of_teacher(teacher: nn.Module | None) -> Settings:
    """The hash of its weights; what is spread over processes is left out."""
    if teacher is None:
        return {}
    state = teacher.state_dict().items()
    return {"hash of the teacher": digest({name: t for name, t in state if isinstance(t, Tensor) and not is_spread(t)})[:8]}


def of_groups(optimizer: torch.optim.Optimizer) -> Settings:
    """The plain values of an optimizer's groups, by ``rate``'s own name: ``optimizer.lr``."""
    found: Settings = {"optimizer": type(optimizer).__name__}
    many = len(optimizer.param_groups) > 1
    for number, group in enumerate(optimizer.param_groups):
        found |= _plain(f"optimizer.{number}" if many else "optimizer", {k: v for k, v in group.items() if k != "params"})
        found[f"parameters of group {number}"] = len(group["params"])
    return found


def of_schedule(schedule: Any) -> Settings:
    """The plain values of a learning rate schedule that has not begun."""
    return {"schedule": type(schedule).__name__} | _plain("schedule", schedule.state_dict())


def _plain(place: str, value: Any) -> Settings:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Mapping):
        items = [(f"{place}.{key}", item) for key, item in value.items() if not str(key).startswith("_")]
    elif isinstance(value, list | tuple):
        items = [(f"{place}.{number}", item) for number, item in enumerate(value)]
    else:
        return {place: value} if value is None or isinstance(value, bool | int | float | str) else {}
    return {name: found for key, item in items for name, found in _plain(key, item).items()}


def _difference(one: Settings, other: Settings) -> tuple[str, Any, Any] | None:
    keys = dict.fromkeys([*one, *other])
    both = ((key, one.get(key, "absent"), other.get(key, "absent")) for key in keys)
    return next((found for found in both if found[1] != found[2]), None)


def expect_same(source: str, there: Settings, here: Settings) -> None:
    """Refuse the checkpoint of another training.

    Raises:
        TrainingError: The message names the first difference.
    """
    if found := _difference(here, there):
        kind, _, name = found[0].rpartition(": ")
        raise TrainingError(
            f"{source} is of another {kind or 'training'}: {name} is {found[2]} there and {found[1]} here; "
            "choose another folder for this training"
        )


def expect_alike(here: Settings) -> None:
    """Refuse processes that were told different things.

    Raises:
        TrainingError: In all of them; the message names the first difference and two that differ.
    """
    first, *others = from_each(here)
    for number, other in enumerate(others, start=1):
        if found := _difference(first, other):
            raise TrainingError(
                f"the processes differ: {found[0]} is {found[1]} in process 0 and {found[2]} in process {number}"
            )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The network's state by name, with the buffers that it leaves out of its own.

    Raises:
        ArtifactError: Something in it is no tensor.
    """
    return state_of(model) | dict(model.named_buffers())


@torch.no_grad()
def restore(source: str, content: Content, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give a network and its optimizer their state back, laid out and spread as they are: equal bits need equal layouts.

    Nothing is changed where anything does not fit.

    Raises:
        TrainingError: A name, shape or dtype differs; the message names the first.
    """
    own = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
    stored = (content.weights or {}) | content.state["tensors"]
    if different := sorted(set(own) ^ set(stored)):
        raise TrainingError(f"{source} is of another network: {different[0]} is in one of the two only")
    for name, tensor in own.items():
        if (stored[name].shape, stored[name].dtype) != (tensor.shape, tensor.dtype):
            raise TrainingError(
                f"{source} is of another network: {name} is {tuple(stored[name].shape)} {stored[name].dtype} there, "
                f"{tuple(tensor.shape)} {tensor.dtype} here"
            )
    parts: dict[str, Tensor] = {}
    loaded = {name: _like(stored[name], tensor, parts) for name, tensor in own.items()}
    state = content.state["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Part) or (isinstance(value, Tensor) and value.ndim and value.shape == parameters[index].shape):
                entries[key] = _like(value, parameters[index], parts)
    fill(content, parts)
    for name, tensor in own.items():
        tensor.copy_(loaded[name])
    optimizer.load_state_dict(state)


def _like(values: Part | Tensor, like: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Values laid out and spread as another tensor of that shape is; those of a part are filled in later."""
    if values.shape == like.shape:
        fresh = torch.empty_like(like, dtype=values.dtype, requires_grad=False)
    else:  # a part of an optimizer's state that is no image of its parameter
        fresh = torch.empty(values.shape, dtype=values.dtype, device=like.device)
    if isinstance(values, Part):
        parts[values.place] = fresh
        return fresh
    if not is_spread(like):
        return fresh.copy_(values)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements)
