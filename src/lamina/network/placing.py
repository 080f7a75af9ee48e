"""Which module of a network makes way for which, where layers become others.

Most layers are modules, and each makes way for its own successor. The projections of an attention are not: it multiplies with
their weights itself. So the whole attention makes way for one that calls its projections.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from .attention import Attention, parts_of
from .surgery import adopt
from .walk import Layer


def placed(news: Iterable[tuple[Layer, nn.Module]], *, apart: bool = False) -> dict[nn.Module, nn.Module]:
    """What takes the place of which module.

    Args:
        news: Each layer with what it becomes.
        apart: Whether what stays of an attention is copied, or lies on the memory of what it was.
    """
    found: dict[nn.Module, nn.Module] = {}
    parts: dict[nn.MultiheadAttention, dict[str, nn.Module]] = {}
    for layer, new in news:
        if layer.holder is None:
            found[layer.module] = new
        else:
            parts.setdefault(layer.holder, {})[layer.part] = new
    for holder, own in parts.items():
        attention = Attention(holder, parts_of(holder) | own)
        if apart:
            attention = copy.deepcopy(attention, {id(part): part for part in own.values()})
        found[holder] = adopt(attention, holder)
    return found


def opened(layers: Iterable[Layer]) -> dict[nn.Module, nn.Module]:
    """What takes the place of each attention, so that those of the layers which are its projections are called one by one."""
    holders = dict.fromkeys(layer.holder for layer in layers if layer.holder is not None)
    return {holder: adopt(Attention(holder, parts_of(holder)), holder) for holder in holders}
