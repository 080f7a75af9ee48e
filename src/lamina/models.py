"""Networks by name, as the command line takes them.

torchvision:resnet50              a network of torchvision, freshly initialised
torchvision:resnet50@DEFAULT      the same with pretrained weights by their name
timm:vit_base_patch16_224         a network of timm, freshly initialised
timm:resnet50@pretrained          the same with its pretrained weights
hf:google-bert/bert-base-uncased  a network of transformers by its id on the hub, or its folder; freshly initialised
hf:…@pretrained                   the same with its pretrained weights
package.module:factory            whatever your own function returns when called without arguments
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .errors import ArtifactError, MissingExtra, ModelError
from .network.running import first_line
from .network.state import names_in
from .values import closest
from .weights import Checkpoint, is_safetensors


def load_model(name: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Make a network by name, in eval mode, and load weights into it where a file is given.

    Args:
        name: ``torchvision:…``, ``timm:…``, ``hf:…`` or ``package.module:factory``; modules are also found in the current
            folder.
        weights: The network's state dict: a ``.safetensors`` file, the ``.safetensors.index.json`` of many, a folder that holds
            either, or a checkpoint that ``torch.load(weights_only=True)`` reads, possibly under ``state_dict`` or ``model``. Of
            tensors that are tied in the network it may hold one.

    Raises:
        ModelError: No such package, module, function or network, or weights that do not fit.
        MissingExtra: The package is an extra that is not installed.
    """
    source, colon, rest = name.partition(":")
    if not colon or not source or not rest:
        known = "torchvision:resnet50, timm:resnet50, hf:ID or package.module:factory"
        raise ModelError(f"{name!r} names no network: write {known}")
    model = _MAKERS.get(source, lambda _: _from_factory(source, rest))(rest)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model.eval()


def attribute(name: str) -> Any:
    """What ``package.module:name`` points to; the current folder is searched too, after everything else.

    Raises:
        ModelError: No such module or name.
    """
    module_name, _, path = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        # At the end, where it hides nothing: a file colorsys.py there must not take the standard library's place. And for good,
        # since a network's own code may import its neighbours only once it runs.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # its code is somebody's own and may raise anything
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{name}: module {module_name} cannot be imported: {why}") from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            where = getattr(module, "__file__", None) or "no file"
            raise ModelError(f"{name}: {module_name} ({where}) has no {part}{closest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _from_factory(module_name: str, path: str) -> nn.Module:
    name = f"{module_name}:{path}"
    made = attribute(name)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ModelError(f"{name} is a {type(made).__name__}; it must be a network or a function that returns one")
        try:
            made = made()
        except Exception as error:
            raise ModelError(f"{name}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"{name} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _from_torchvision(rest: str) -> nn.Module:
    try:
        from torchvision.models import get_model, list_models
    except ImportError as error:
        raise MissingExtra("torchvision", "zoo", f"torchvision:{rest}") from error
    name, _, weights = rest.partition("@")
    if name not in list_models():
        raise ModelError(f"torchvision has no network {name!r}{closest(name, list_models())}")
    try:
        model: nn.Module = get_model(name, weights=weights or None)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"torchvision:{rest}: {first_line(error)}") from error
    return model


def _from_timm(rest: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "zoo", f"timm:{rest}") from error
    name, _, weights = rest.partition("@")
    if not timm.is_model(name):
        raise ModelError(f"timm has no network {name!r}{closest(name, timm.list_models())}")
    if weights not in ("", "pretrained"):
        raise ModelError(f"timm:{rest}: write timm:{name} or timm:{name}@pretrained")
    try:
        model: nn.Module = timm.create_model(name, pretrained=bool(weights))
    except (RuntimeError, OSError) as error:
        raise ModelError(f"timm:{rest}: {first_line(error)}") from error
    return model


def _from_hub(rest: str) -> nn.Module:
    """Of the class that the checkpoint is of. Code that lies beside it is never run."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "zoo", f"hf:{rest}") from error
    name, at, weights = rest.partition("@")
    if weights != ("pretrained" if at else ""):
        raise ModelError(f"hf:{rest}: write hf:{name} or hf:{name}@pretrained")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        wanted = next(iter(config.architectures or ()), None)
        kind = getattr(transformers, wanted, None) if wanted else None
        if wanted and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ModelError(f"hf:{rest}: transformers has no network {wanted}; code beside a checkpoint is not run")
        model: nn.Module
        if weights:
            model = (kind or transformers.AutoModel).from_pretrained(name, trust_remote_code=False)
        else:
            model = kind(config) if kind else transformers.AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:  # an ImportError: a package it wants besides
        raise ModelError(f"hf:{rest}: {_sentence(error)}") from error
    return model


def _sentence(error: Exception) -> str:
    """What transformers says, in a line: it breaks its messages anywhere."""
    return " ".join(str(error).split())[:400]


_MAKERS = {"torchvision": _from_torchvision, "timm": _from_timm, "hf": _from_hub}


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        if is_safetensors(path):
            stored = Checkpoint.open(path)
            state: Any = {name: stored.read(name) for name in stored.tensors}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactError as error:
        raise ModelError(str(error)) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: not readable weights: {first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError: the file wants to run code
        raise ModelError(f"{path}: refused, since it holds more than tensors: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(_with_ties(model, state))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: these weights are not of this network: {' '.join(str(error).split())[:300]}") from error


def _with_ties(model: nn.Module, state: Any) -> Any:
    """A state in which a tensor that is tied in the network stands under all its names, where it does under one."""
    if not isinstance(state, dict):
        return state
    own = model.state_dict(keep_vars=True)
    tied = {name: there[0] for names in names_in(own).values() if (there := [n for n in names if n in state]) for name in names}
    return state | {name: state[there] for name, there in tied.items() if name not in state}
