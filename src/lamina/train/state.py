"""What a checkpoint holds of a network and its optimizer: taken out whole, put back laid out and spread as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..decomposition import plan_of
from ..errors import PlanError, TrainingError
from ..network.fingerprint import fingerprint
from ..plan import Plan
from .distributed import spread_like, whole


def planned(model: nn.Module) -> Plan | None:
    """The plan that a network carries, None where it has none."""
    try:
        return plan_of(model)
    except PlanError:
        return None


def forms(model: nn.Module) -> dict[str, str]:
    """Its layers' forms, as they print."""
    plan = planned(model)
    return {} if plan is None else {name: str(layer.form) for name, layer in plan.layers.items()}


def network(model: nn.Module) -> str:
    """What the network is, sharded or not: the structure that its plan was made for, or its own."""
    plan = planned(model)
    return fingerprint(model) if plan is None else plan.fingerprint


def expect_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse the checkpoint of another training; the message names the first difference."""
    elsewhere = "choose another folder for this training"
    for name in dict.fromkeys([*there["forms"], *here["forms"]]):
        old, new = (settings["forms"].get(name, "absent") for settings in (there, here))
        if old != new:
            raise TrainingError(f"{path} is of another plan: {name} is {old} there and {new} here; {elsewhere}")
    for key in here:
        if there.get(key) != here[key]:
            if key == "network":
                raise TrainingError(f"{path} is of another network: modules or shapes differ; {elsewhere}")
            what = f"{key} is {there.get(key)} there and {here[key]} here"
            raise TrainingError(f"{path} is of another training: {what}; {elsewhere}")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The network's state by name, whole on every process.

    Raises:
        TrainingError: Something in it is no tensor.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TrainingError(f"{name}: the network keeps state there that is no tensor, which a checkpoint cannot hold")
    return {name: whole(value) for name, value in state.items()}


@torch.no_grad()
def set_weights(path: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a network its state back, in place; nothing is changed where anything does not fit.

    Raises:
        TrainingError: A name, shape or dtype differs; the message names the first.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if different := sorted(set(own) ^ set(weights)):
        raise TrainingError(f"{path} is of another network: {different[0]} is in one of the two only")
    for name, tensor in own.items():
        stored = weights[name]
        if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
            raise TrainingError(
                f"{path} is of another network: {name} is {tuple(stored.shape)} {stored.dtype} there, "
                f"{tuple(tensor.shape)} {tensor.dtype} here"
            )
    for name, tensor in own.items():
        tensor.copy_(spread_like(weights[name], tensor))


def set_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state with every tensor laid out, and spread, as its parameter is: equal bits need equal layouts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        like = parameters[index]
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == like.shape:
                entries[key] = spread_like(value, like)
    optimizer.load_state_dict(state)
