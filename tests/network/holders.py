"""Small networks that hold a layer, or its weight, in a second place; and what the tests of this room ask of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Calls(nn.Module):
    """One layer ``fc``, called as ``run(self, x)``; ``setup(self)`` holds it, or its weight, in a second place."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], setup: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.run = run
        self.held = setup(self) if setup else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Helper:
    """An object of the user's that is no module."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def flat(weight: Tensor) -> Tensor:
    """All that a weight's storage holds, as one vector."""
    return torch.empty(0).set_(weight.untyped_storage())


# Networks that read the bytes of the layer's weight from another place than the layer.
READERS: dict[str, Callable[[], nn.Module]] = {
    "a list of weights": lambda: Calls(lambda s, x: s.fc(x) + linear(x, s.held[0]), lambda s: [s.fc.weight]),
    "a closure over the weight": lambda: Calls(lambda s, x: s.fc(x) + s.held(x), lambda s: _closure(s.fc.weight)),
    "a closure over a view": lambda: Calls(lambda s, x: s.fc(x) + s.held(x), lambda s: _closure(s.fc.weight.detach()[1:2])),
    "a closure over the layer": lambda: Calls(lambda s, x: s.held(x), lambda s: _calling(s.fc)),
    "a list of tensors as an argument": lambda: Calls(
        lambda s, x: s.fc(x) + torch.cat([x, s.held[0]]).sum(), lambda s: [s.fc.weight]
    ),
    "keyword arguments": lambda: Calls(
        lambda s, x: torch.add(input=s.fc(x), other=x, out=None) + torch.zeros(4).addmv(mat=s.held[0], vec=x[0]),
        lambda s: [s.fc.weight],
    ),
    "a foreach operation": lambda: Calls(_foreach, lambda s: [s.fc.weight]),
    "a try that swallows every error": lambda: Calls(_swallowing, lambda s: [s.fc.weight]),
}
VIEWERS: dict[str, Callable[[], nn.Module]] = {
    "a list of views": lambda: Calls(lambda s, x: s.fc(x) + s.held[0].sum(), lambda s: [s.fc.weight.detach()[1:2]]),
    "a list of detached weights": lambda: Calls(lambda s, x: s.fc(x) + linear(x, s.held[0]), lambda s: [s.fc.weight.detach()]),
    "its storage, flattened": lambda: Calls(lambda s, x: s.fc(x) + s.held[0].sum(), lambda s: [flat(s.fc.weight.detach())]),
}


def _foreach(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = self.fc(x) + torch._foreach_add([x, self.held[0]], 1.0)[1].sum()
    return y


def _closure(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, weight)


def _calling(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)


def _swallowing(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.fc(x)
    try:
        return y + self.held[0].sum()
    except Exception:
        return y


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a network is: the very objects in its tables and attributes, its tensors' values, classes and flags."""
    modules = dict(model.named_modules())
    tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        "modules": {
            name: (id(m), type(m), m.training, [(k, id(v)) for k, v in vars(m).items()]) for name, m in modules.items()
        },
        "tables": {
            name: [(k, id(v)) for t in (m._parameters, m._buffers, m._modules) for k, v in t.items()]
            for name, m in modules.items()
        },
        "tensors": {
            name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.detach().numpy().tobytes(), dict(vars(t)), id(t.grad))
            for name, t in tensors.items()
        },
    }
