"""Batch norms folded into the convolutions that feed them, for inference.

Which convolution feeds which norm is read from the exported graph, never guessed from the order in which modules are held. Of
two modules that are called more than once, or whose values somebody else reads, nothing is folded. In the end the answers are
held against those of the network.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves

from ..errors import LaminaError
from ..values import Workload
from .copying import shadow
from .program import program_of
from .running import said, set_mode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def folded(model: nn.Module, workload: Workload) -> nn.Module:
    """A shadow of a network in eval mode in which norms are folded; where none can be, it is the same network.

    Args:
        model: The network; it is only read. Convolutions and norms that have hooks, or are of a class of somebody's own, stay.
        workload: What it is fed, for the graph.

    Raises:
        LaminaError: It cannot be exported, so nobody knows what feeds what; or it answers otherwise afterwards.
    """
    twin = shadow(model)
    set_mode(twin, training=False)
    pairs = feeding(twin, workload)
    if not pairs:
        return twin
    before = [each for each in tree_leaves(workload.run(twin)) if isinstance(each, Tensor)]
    for conv_name, norm_name in pairs:
        conv: Any = twin.get_submodule(conv_name)
        norm: Any = twin.get_submodule(norm_name)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # In the strides that it had: a kernel reads the layout of its output from them.
        conv.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), requires_grad=False)
        conv.bias = bias
        parent, _, last = norm_name.rpartition(".")
        setattr(twin.get_submodule(parent), last, nn.Identity())
    after = [each for each in tree_leaves(workload.run(twin)) if isinstance(each, Tensor)]
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point():
            size = old.double().norm().clamp_min(1e-300)
            if not float((old.double() - new.double()).norm() / size) <= torch.finfo(old.dtype).eps ** 0.5:
                raise LaminaError(
                    "with its batch norms folded the network answers otherwise: use lamina.Eager() without folding"
                )
    return twin


def feeding(model: nn.Module, workload: Workload) -> list[tuple[str, str]]:
    """Names of the convolutions that feed a batch norm and nothing else, each with the norm's name.

    Raises:
        LaminaError: The network cannot be exported.
    """
    try:
        program = program_of(model, workload)
    except Exception as error:  # a user's network and an exporter may raise anything
        raise LaminaError(
            f"what feeds its batch norms cannot be read, as the network cannot be exported: {said(error)}"
        ) from error
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    # One name for every parameter, however many modules hold it; those that are called twice are no pair.
    held = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = dict(model.named_modules())

    def owner(node: Any, attribute: str) -> str | None:
        """The module of which a graph's input is an attribute."""
        name = named.get(getattr(node, "name", ""), "")
        module, _, last = name.rpartition(".")
        return (
            module if last == attribute and module in modules and held.get(id(getattr(modules[module], last))) == name else None
        )

    nodes = list(program.graph.nodes)
    uses = Counter(
        named[argument.name]
        for node in nodes
        for argument in tree_leaves((node.args, node.kwargs))
        if isinstance(argument, torch.fx.Node) and argument.name in named
    )
    found = []
    for node in nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        source = node.args[0]
        if not (isinstance(source, torch.fx.Node) and "conv" in str(source.target) and len(source.users) == 1):
            continue
        conv, norm = owner(source.args[1], "weight"), owner(node.args[3], "running_mean")
        if conv is None or norm is None or uses[f"{conv}.weight"] != 1 or uses[f"{norm}.running_mean"] != 1:
            continue
        if type(modules[conv]) in _CONVOLUTIONS and type(modules[norm]) in _NORMS and not _hooked(modules[conv], modules[norm]):
            found.append((conv, norm))
    return found


def _hooked(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules)
