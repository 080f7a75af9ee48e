"""Saving and loading a supernet: ``supernet.json`` and its weights in a folder. No pickle.

The JSON is the blueprint: layers, forms, why others stay dense, and the name of the network that it was made from, where it has
one. Loading fits nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import forbid_meta, restore
from ..comparison import whole_setting
from ..errors import ArtifactError, PlanError
from ..examples import example_from
from ..files import one_line, read_model, write_whole
from ..folder import forbid_unwritable, read_folder, write_folder
from ..forms import Form
from ..layers.series import Branch, SeriesLayer
from ..network.fingerprint import fingerprint
from ..network.running import outside_inference_mode
from ..network.state import state_of
from ..network.walk import Layer, walk
from ..plan import Plan
from ..train.recalibrate import statistics_of
from ..values import Setting, closest
from .blueprint import Blueprint
from .fitted import empty
from .space import Configuration, as_json, from_json
from .supernet import Supernet

BLUEPRINT, BEST = "supernet.json", "best.json"
_EXTRA = frozenset({BEST})
_STATISTICS = ".statistics"
"""Where what `Supernet.recalibrate` found stands among the weights; no name in a network begins with a dot."""
_WHAT = "saved supernet"
FORMAT = 2


def forbid_unwritable_supernet(folder: Path) -> None:
    """Refuse, before the work rather than after it, a folder where `save_supernet` could not save.

    Raises:
        ArtifactError: It holds other files, or cannot be written.
    """
    forbid_unwritable(folder, BLUEPRINT, _EXTRA)


def save_supernet(net: Supernet, folder: str | os.PathLike[str]) -> None:
    """Save a supernet, in one stroke; an earlier one is replaced.

    Args:
        net: What `make_supernet` or `load_supernet` returned, trained or not.
        folder: Where to; its parent folders are made.

    Raises:
        ArtifactError: The folder holds other files, or cannot be written.
    """
    blueprint = net.blueprint.model_copy(update={"times": net.space.times()})
    found = {f"{_STATISTICS}.{key}.{name}": t for key, each in net.statistics.items() for name, t in each.items()}
    # What was found with other weights is gone with them.
    write_folder(Path(folder), BLUEPRINT, blueprint, state_of(net.network) | found, extra=_EXTRA)


@outside_inference_mode
def load_supernet(model: nn.Module, folder: str | os.PathLike[str]) -> Supernet:
    """Load a saved supernet onto a fresh network of the kind that it was made from. Nothing is fitted.

    Its times are taken over where they were taken under the conditions that are found here.

    Args:
        model: A network of that structure, with any weights, in the dtype and on the device wanted; changed in place, and only
            once everything is known to fit.
        folder: What `save_supernet` wrote.

    Raises:
        ArtifactError: A file is missing, cut short or changed, of a newer format, or a tensor does not fit; the message names
            the first one.
        PlanError: It was made from another network.
    """
    source = Path(folder)
    blueprint, stored = read_folder(source, BLUEPRINT, _read, what=_WHAT)
    forbid_meta(model)
    layers = _layers(model, blueprint)
    plans = blueprint.layers
    examples = [example_from(shape, model) for shape in blueprint.examples]

    def make(layer: Layer) -> SeriesLayer:
        return empty(layer, plans[layer.name].forms, blueprint.normalise)

    state, statistics = _apart(stored, model, source)
    restore(model, list(layers.values()), make, state, examples, source)
    net = Supernet(model, blueprint.model_copy(update={"saved": None, "times": None}))
    net.statistics = statistics
    if blueprint.times is not None and blueprint.examples:
        here = whole_setting(net.dense_like(), net.example[0], blueprint.timing_mode)
        if Setting(**blueprint.times["setting"]) == here:
            net.adopt(net.space.with_times(blueprint.times))
    return net


def _apart(
    stored: Mapping[str, Tensor], model: nn.Module, source: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The network's own state, and the statistics of its batch norms by configuration."""
    state, statistics, known = dict[str, Tensor](), dict[str, dict[str, Tensor]](), statistics_of(model)
    for name, tensor in stored.items():
        if not name.startswith(_STATISTICS):
            state[name] = tensor
            continue
        config, _, buffer = name.removeprefix(f"{_STATISTICS}.").partition(".")
        if buffer not in known or known[buffer].shape != tensor.shape:
            raise ArtifactError(f"{source}: {buffer} of a batch norm does not fit this network")
        statistics.setdefault(config, {})[buffer] = tensor.clone()
    return state, statistics


def load_terms(net: Supernet, folder: str | os.PathLike[str]) -> dict[str, tuple[Form, ...]]:
    """Take over what a saved supernet of the same network, but of another space, has in common with this one.

    A form that both have becomes what it is there, up to rounding. Others of groups stay what they are here, even though they
    share terms. Ranks of one chain are corners of one another: a lower one that only this supernet has goes with the higher
    one, and a higher one keeps its own rest around their corner, which is no fit of anything; train it anew.
    What stands around the layers, such as norms and biases, is taken over whole.

    Args:
        net: The supernet that takes; changed in place.
        folder: What `save_supernet` wrote.

    Returns:
        The forms taken over, by layer.

    Raises:
        ArtifactError: A file is missing or damaged, or the two have no form in common.
        PlanError: It was made from another network.
    """
    other = load_supernet(net.dense_like(), folder)
    mine, theirs = net.series, other.series
    taken = {name: tuple(f for f in layer.forms if f in theirs[name].forms) for name, layer in mine.items() if name in theirs}
    taken = {name: forms for name, forms in taken.items() if forms}
    if not taken:
        raise ArtifactError(f"{folder}: no layer has a form there that it has in this supernet")
    inside = tuple(_prefix(alias) for plan in net.blueprint.layers.values() for alias in plan.names)
    there = state_of(other.network)
    with torch.no_grad():
        for key, tensor in state_of(net.network).items():
            if not key.startswith(inside) and key in there:
                tensor.copy_(there[key])
    for name, forms in taken.items():
        _take(mine[name], theirs[name], forms)
    net.statistics = {}
    return taken


def read_blueprint(folder: str | os.PathLike[str]) -> Blueprint:
    """The blueprint of a saved supernet.

    Raises:
        ArtifactError: A file is missing, is no blueprint, or is of a newer format.
    """
    return _read(Path(folder) / BLUEPRINT)


def _read(path: Path) -> Blueprint:
    if not path.is_file():
        raise ArtifactError(f"{path.parent} is not a {_WHAT}: it has no {path.name}")
    return read_model(
        path,
        Blueprint,
        FORMAT,
        ArtifactError,
        unreadable=f"{path} is damaged",
        foreign=f"{path} is no supernet: it has no format number",
    )


def save_best(folder: str | os.PathLike[str], config: Mapping[str, Form], **about: Any) -> Path:
    """Write the configuration that a search found beside a saved supernet, as ``best.json``."""
    path = Path(folder) / BEST
    content = {"config": as_json(config), **about}
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def read_configuration(path: str | os.PathLike[str]) -> Configuration:
    """A configuration from a file: what `save_best` wrote, or layer → form alone.

    Raises:
        ArtifactError: There is no such file, or it is no JSON.
        SearchError: It holds no configuration.
    """
    content = _content(path)
    return from_json(content["config"] if isinstance(content, dict) and "config" in content else content)


def read_plan(path: str | os.PathLike[str]) -> Plan | None:
    """The plan that `save_best` wrote beside a configuration; None where there is none that can be read."""
    try:
        return Plan.model_validate(_content(path)["plan"])
    except (ArtifactError, ValueError, KeyError, TypeError):
        return None


def _content(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(one_line(f"{path} is no readable configuration: {error}")) from error


def _layers(model: nn.Module, blueprint: Blueprint) -> dict[str, Layer]:
    """The layers of a network that a blueprint makes series."""
    for name, module in model.named_modules():
        if isinstance(module, SeriesLayer):
            raise PlanError(f"{name or 'the network'} is a series already: load onto a fresh network")
    census = walk(model)
    for name, plan in blueprint.layers.items():
        if name not in census.layers:
            raise PlanError(
                f"{name or 'the network'}: not in this network{closest(name, list(census.layers))}; "
                "the supernet was made from another one"
            )
        if census.layers[name].geometry != plan.geometry:
            raise PlanError(
                f"{name or 'the network'}: a {census.layers[name].geometry} here, a {plan.geometry} in the supernet, "
                "which was made from another network"
            )
    if fingerprint(model) != blueprint.fingerprint:
        raise PlanError(
            "the supernet was made from another network: its layers are alike, but modules or shapes beside them differ"
        )
    return {name: census.layers[name] for name in blueprint.layers}


@torch.no_grad()
def _take(mine: SeriesLayer, theirs: SeriesLayer, forms: tuple[Form, ...]) -> None:
    """Let some forms of a series be what they are in another, and all others stay what they are."""
    if mine.bias is not None and theirs.bias is not None:
        mine.bias.copy_(theirs.bias)
    for branch in mine.branches.values():
        assert isinstance(branch, Branch)
        wanted = [
            [w.clone() for w in (_branch(theirs, form) if form in forms else branch).composed(form, False)]
            for form in branch.forms
        ]
        before: set[int] = set()
        own: list[list[nn.Parameter]] = []
        for form, weights in zip(branch.forms, wanted, strict=True):
            fresh = [term for term in branch.terms(form) if id(term) not in before]
            before |= {id(term) for term in fresh}
            _add(branch, form, fresh, weights)
            if form in forms:
                # A rank that only this series has is a corner of the next one, and must give way to it.
                for earlier in reversed(own):
                    _add(branch, form, earlier, weights)
                own = []
            else:
                own.append(fresh)
    mine.forget()


def _branch(layer: SeriesLayer, form: Form) -> Branch:
    return next(b for b in layer.branches.values() if isinstance(b, Branch) and form in b.forms)


def _add(branch: Branch, form: Form, terms: list[nn.Parameter], weights: list[Tensor]) -> None:
    """Add to some terms of a form what its composed weights lack of the given ones, as far as it lies in these terms.

    Each entry of a term stands in one place of a composed weight, unchanged. So the gradient of ``⟨R, composed⟩`` for the term
    picks out the entries of R that it must take up, where R is what is missing.
    """
    trains = [term.requires_grad for term in terms]
    for term in terms:
        term.requires_grad_(True)
    with torch.enable_grad():
        composed = branch.composed(form, False)
        missing = [wanted - now.detach() for wanted, now in zip(weights, composed, strict=True)]
        product = torch.stack([(m * now).sum() for m, now in zip(missing, composed, strict=True)]).sum()
        picked = torch.autograd.grad(product, terms, allow_unused=True)
    for term, value, flag in zip(terms, picked, trains, strict=True):
        if value is not None:
            term.add_(value)
        term.requires_grad_(flag)


def _prefix(name: str) -> str:
    return name + "." if name else ""
