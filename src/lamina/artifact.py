"""Saving and loading a decomposed network: ``plan.json`` and ``model.safetensors`` in a folder. No pickle."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .decomposition import attach_plan, plan_of, planned_layers
from .errors import ArtifactError, PlanError
from .layers.build import skeleton
from .layers.decomposed import memory_format
from .network.surgery import adopt, hand_over_hooks, put
from .plan import Plan
from .values import closest

PLAN, WEIGHTS = "plan.json", "model.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a decomposed network. The folder is there whole or not at all; an earlier one is replaced.

    Args:
        model: What `decompose` or `load` returned, fine-tuned or not.
        folder: Where to; its parent folders are made.

    Raises:
        PlanError: The network was not decomposed.
        ArtifactError: The folder holds other files, or cannot be written.
    """
    plan = plan_of(model)

    def write(fresh: Path) -> None:
        plan.save(fresh / PLAN)
        write_tensors(model, fresh / WEIGHTS)
        shutil.copymode(fresh / PLAN, fresh / WEIGHTS)  # safetensors writes for its owner's eyes only

    replace_folder(Path(folder), {PLAN, WEIGHTS}, write)


def replace_folder(target: Path, known: set[str], write: Callable[[Path], None]) -> None:
    """Fill a folder; it is there whole or not at all, and an earlier one is replaced.

    Args:
        target: The folder; its parent folders are made.
        known: Names of the files that may stand there already.
        write: Writes the files into the folder that it is given.

    Raises:
        ArtifactError: The folder holds other files, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or {entry.name for entry in target.iterdir()} - known):
        raise ArtifactError(f"{target} holds other files than a saved network: choose an empty or a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            write(fresh)
            old = Path(scratch) / "old"
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(fresh, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
    except (OSError, SafetensorError, PlanError) as error:
        raise ArtifactError(f"{target} cannot be written: {error}") from error


def write_tensors(model: nn.Module, path: Path) -> None:
    """Write a network's state as `read_tensors` reads it: each tensor once, with a hash over all of them."""
    tensors, aliases = _state(model)
    metadata = {"lamina": "1", "sha256": digest(tensors), **{f"alias:{a}": kept for a, kept in aliases.items()}}
    save_file(tensors, path, metadata=metadata)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a saved network onto a fresh base model. No factorisation is run.

    Args:
        model: A network of the structure that was decomposed, with any weights, in the dtype and on the device wanted; changed
            in place, and only once everything is known to fit.
        folder: What `save` wrote.

    Returns:
        ``model``, decomposed; a network that is itself one layer is returned anew.

    Raises:
        ArtifactError: A file is missing, cut short or changed, or a tensor does not fit; the message names the first one.
        PlanError: The plan is for another network.
    """
    source = Path(folder)
    for name in (PLAN, WEIGHTS):
        if not (source / name).is_file():
            raise ArtifactError(f"{source} is not a saved network: it has no {name}")
    plan = Plan.load(source / PLAN)
    layers = planned_layers(model, plan)
    if any(tensor.is_meta for tensor in own_tensors(model).values()):
        raise ArtifactError("this network is on the meta device: call to_empty(device=...) on it first")
    stacks = [(layer, skeleton(layer.geometry, form)) for layer, form in layers]
    inside = [name + "." if name else "" for layer, _ in layers for name in layer.names]
    expected: dict[str, Tensor] = {
        name: tensor for name, tensor in own_tensors(model).items() if not any(name.startswith(prefix) for prefix in inside)
    }
    for layer, stack in stacks:
        like: nn.Parameter = layer.module.weight  # type: ignore[assignment]
        for name in layer.names:
            prefix = name + "." if name else ""
            expected |= {prefix + key: value.to(like.dtype) for key, value in stack.state_dict().items()}
    stored = read_tensors(source / WEIGHTS, expected)

    with torch.no_grad():
        for layer, stack in stacks:
            prefix = layer.name + "." if layer.name else ""
            like = layer.module.weight  # type: ignore[assignment]
            bias: nn.Parameter | None = layer.module.bias  # type: ignore[assignment]
            for key in dict(stack.named_parameters()):
                owner, _, leaf = key.rpartition(".")
                trains = bias.requires_grad if leaf == "bias" and bias is not None else like.requires_grad
                # A copy: safetensors hands out pieces of the file, at odd addresses, where matrix products round otherwise.
                values = stored[prefix + key].to(like.device, copy=True)
                setattr(stack.get_submodule(owner), leaf, nn.Parameter(laid_out(values, like), requires_grad=trains))
            adopt(stack, layer.module)
        # Nothing of the network was changed up to here, and nothing can fail from here on.
        for layer, stack in stacks:
            model = put(model, layer, stack)
            if stack is not model:
                hand_over_hooks(stack, layer.module)
        for name, tensor in own_tensors(model).items():
            if not any(name.startswith(prefix) for prefix in inside):
                tensor.copy_(stored[name])
    return attach_plan(model, plan)


def size(folder: str | os.PathLike[str]) -> int:
    """Bytes of a saved network's files."""
    return sum((Path(folder) / name).stat().st_size for name in (PLAN, WEIGHTS))


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and every byte of some tensors: safetensors itself does not notice a flipped bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def laid_out(values: Tensor, like: Tensor) -> Tensor:
    """Values in the memory format of a weight, where they have as many dimensions."""
    return values.contiguous(memory_format=memory_format(like)) if values.ndim == like.ndim else values


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network as its own tensors, not copies."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ArtifactError(f"{others[0]}: the network keeps state there that is no tensor, which safetensors cannot hold")
    return {name: value.detach() for name, value in state.items()}


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, each once, and for every other name of a shared tensor the name it is stored under."""
    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in own_tensors(model).items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = place if tensor.numel() else (name,)
        if key in kept:
            aliases[name] = kept[key]
        else:
            kept[key] = name
            tensors[name] = tensor.contiguous()
    # Two names may still be views into one storage, which safetensors refuses.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return tensors, aliases


def read_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors and hold them against what the network wants, before anything is changed."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping, only has keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if metadata.get("lamina") != "1":
        raise ArtifactError(f"{path} was not written by lamina.save, or by a newer lamina")
    if metadata.get("sha256") != digest(stored):
        raise ArtifactError(f"{path} is damaged: its content is not what lamina.save wrote")
    for key, kept in metadata.items():
        if key.startswith("alias:") and kept in stored:
            stored[key.removeprefix("alias:")] = stored[kept]
    for name, tensor in expected.items():
        if name not in stored:
            raise ArtifactError(f"{path}: {name} is missing{closest(name, [n for n in stored if n not in expected])}")
        if stored[name].shape != tensor.shape:
            raise ArtifactError(
                f"{path}: {name} has shape {tuple(stored[name].shape)}, this network wants {tuple(tensor.shape)}"
            )
        if stored[name].dtype != tensor.dtype:
            raise ArtifactError(
                f"{path}: {name} is {stored[name].dtype}, "
                f"this network's is {tensor.dtype}: convert the base model to that first"
            )
    for name in stored:
        if name not in expected:
            raise ArtifactError(f"{path}: {name} has no place in this network")
    return stored
