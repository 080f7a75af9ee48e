"""A layer whose weight another one holds too, as the head of a language model shares the embedding's, given its own."""

from __future__ import annotations

from torch import nn

from ..errors import PlanError
from ..values import closest
from .copying import cloned
from .running import outside_inference_mode
from .wrappers import unwrapped


@outside_inference_mode
def untied(model: nn.Module, *names: str) -> nn.Module:
    """A copy of a network in which some layers share their weights with nobody, so that they can be decomposed.

        >>> model = lamina.untied(gpt2, "lm_head")

    It answers what the network answers and has more weights, which train apart from then on. A saved network is loaded onto a
    network whose layers were untied in the same way. Code of the network that ties weights anew, as ``tie_weights()`` of
    transformers does, is not to be called any more.

    Args:
        model: The network; it is only read.
        names: Names of the layers, as `Plan.refused` has them.

    Raises:
        PlanError: There is no such module, or it shares no parameter.
        LaminaError: The network cannot be copied.
    """
    network = cloned(unwrapped(model))
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules:
            raise PlanError(f"{name!r}: no module of this network has this name{closest(name, list(modules))}")
        module = modules[name]
        elsewhere = {id(p) for other in network.modules() if other is not module for p in other._parameters.values()}
        shared = [key for key, p in module._parameters.items() if p is not None and id(p) in elsewhere]
        if not shared:
            raise PlanError(f"{name or 'the network'}: shares no parameter with another module: nothing to untie")
        for key in shared:
            old = module._parameters[key]
            assert old is not None
            module._parameters[key] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    return network
