"""Saving and loading whatever lamina makes: a decomposed network, or a supernet out of which networks are taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from . import artifact
from .errors import ArtifactError
from .goals import Budget, goal_of, limits_in
from .supernet.files import BLUEPRINT, load_supernet, save_supernet
from .supernet.supernet import Supernet


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a decomposed network or a supernet: a JSON document, and weights under a name that holds their hash.

    The document is written last and in one stroke: whoever loads meanwhile, or after a kill at any moment, finds what stood
    there before or what is written now.

    Args:
        model: What `decompose` or `load` returned, fine-tuned or not, inside ``torch.compile`` or DDP perhaps; or a supernet,
            trained or not.
        folder: Where to; its parent folders are made. What was saved in it before is replaced, with its card; a card that
            somebody has changed counts as another file.

    Raises:
        PlanError: The network was not decomposed, or is not what its plan says any more.
        ArtifactError: The folder holds other files, cannot be written, or the network's state cannot be stored.
    """
    if isinstance(model, Supernet):
        save_supernet(model, folder)
    else:
        artifact.save(model, folder)


def load(model: nn.Module, folder: str | os.PathLike[str], *, at: Budget | Sequence[Budget] | None = None) -> nn.Module:
    """Load a saved network onto a fresh base model; out of a saved supernet, the one within a budget. Nothing is fitted.

        >>> small = lamina.load(base, "out/")
        >>> small = lamina.load(base, "elastic/", at=lamina.Speedup(2))

    The weights are loaded by the network's own ``load_state_dict``, so that hooks and modules with a state of their own have
    their say, and are then held against the file.

    Args:
        model: A network of the structure that was decomposed, with any weights, in the dtype and on the device wanted. It is
            changed in place, all or nothing; its layers stay the same objects. Where ``at`` is given it becomes the supernet.
        folder: What `save` wrote.
        at: Of a supernet, what the network may cost: see `Supernet.at`. Times that were taken under other conditions are taken
            anew, which may need a minute.

    Returns:
        ``model``, decomposed; with ``at``, a network of its own.

    Raises:
        ArtifactError: A file is missing, cut short or changed, or a tensor does not fit; the message names the first one. Or
            the folder holds a supernet and ``at`` does not say what to take, or the other way round.
        PlanError: The plan is for another network.
        LayerError: The network reads the dense weight of a layer from elsewhere.
        SearchError: The budget is below the cheapest configuration.
    """
    elastic = (Path(folder) / BLUEPRINT).is_file()
    if at is None:
        if elastic:
            raise ArtifactError(
                f"{folder} holds a supernet: say what to take out, as in at=lamina.Speedup(2), or use lamina.load_supernet"
            )
        return artifact.load(model, folder)
    if not elastic:
        raise ArtifactError(f"{folder} holds no supernet, so at= has nothing to choose among: load it without")
    asked = goal_of(at)
    net = load_supernet(model, folder)
    net.time_for(limits_in(asked))
    return net.at(at)
