"""What networks are assembled from: one class for each thing that somebody's network may do with its layers and tensors.

Every part maps vectors ``(N, 6)`` to vectors, or images ``(N, 6, 5, 5)`` to images, so that any part may follow any other.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import math
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WIDTH = 6
KINDS = ("vector", "image")


class Part(nn.Module):
    """A piece of a network with at least one layer, ``fc``."""

    title: ClassVar[str]
    may_be_refused: ClassVar[bool] = False
    """Whether lamina may refuse it, or something of it, by name."""
    serves: ClassVar[bool] = True
    """Whether two threads may call it in eval mode at once and both get the right answer."""
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc = dense(kind)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer does, by its weight alone."""
        return F.linear(x, weight, bias) if self.kind == "vector" else F.conv2d(x, weight, bias, padding=1)

    def along(self, tensor: Tensor) -> Tensor:
        """A number a channel, shaped to be multiplied with the values."""
        return tensor if self.kind == "vector" else tensor[:, None, None]


def dense(kind: str) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH) if kind == "vector" else nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (WIDTH,)))


PARTS: dict[str, type[Part]] = {}


def part(title: str, *, refused: bool = False, serves: bool = True, kinds: tuple[str, ...] = KINDS) -> Callable[[Any], Any]:
    """Enters a part under its title."""

    def enter(cls: type[Part]) -> type[Part]:
        assert title not in PARTS
        cls.title, cls.may_be_refused, cls.serves, cls.kinds = title, refused, serves, kinds
        PARTS[title] = cls
        return cls

    return enter


# ---- what every network has ----


@part("plain")
class Plain(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


@part("residual")
class Residual(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = nn.Sequential(nn.Tanh(), dense(kind))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.fc(x))


@part("module list and dict")
class Containers(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.several = nn.ModuleList([dense(kind), nn.ModuleDict({"x": dense(kind)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.several[1]["x"](torch.tanh(self.several[0](self.fc(x))))


@part("batch norm")
class BatchNorm(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.norm = nn.BatchNorm1d(WIDTH) if kind == "vector" else nn.BatchNorm2d(WIDTH)
        nn.init.normal_(self.norm.weight)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


@part("dropout")
class Dropout(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x))


@part("random in eval", serves=False)
class RandomInEval(Part):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.3, training=True) + torch.rand(()) + random.random() + float(np.random.rand())


@part("odd layers", kinds=("image",))
class OddLayers(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.odd = nn.Conv2d(WIDTH, WIDTH, (1, 3), padding="same", padding_mode="circular", bias=False)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(torch.tanh(self.odd(self.fc(x))))


# ---- a second holder of the layer ----


@part("held in a list", refused=True)
class InList(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


@part("held in a list, by a loop over names", refused=True)
class Pyramid(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        laterals = []
        for i in range(2):
            layer = dense(kind)
            self.add_module(f"lateral{i}", layer)
            laterals.append(layer)
        self.laterals = laterals[::-1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.laterals:
            x = torch.tanh(layer(x))
        return self.fc(x)


@part("held in a dict", refused=True)
class InDict(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = {"x": {"y": self.fc}}

    def forward(self, x: Tensor) -> Tensor:
        return self.held["x"]["y"](x)


@part("held in a tuple", refused=True)
class InTuple(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = ((self.fc,), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0][0](x)


class Helper:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class SlottedHelper:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


@dataclasses.dataclass(frozen=True)
class FrozenHelper:
    layers: tuple[nn.Module, ...]


@part("held by a helper", refused=True)
class InHelper(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.helper = Helper(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


@part("held by a helper with slots", refused=True)
class InSlots(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.helper = SlottedHelper(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper.layer(x)


@part("held by a frozen dataclass in a deque", refused=True)
class InDeque(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = collections.deque([FrozenHelper((self.fc,))])

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0].layers[0](x)


@part("held by a helper that holds the network", refused=True)
class InParent(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.helper = types.SimpleNamespace(owner=self)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper.owner.fc(x)


@part("called by a closure over the layer", refused=True)
class ClosureOverLayer(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        layer = self.fc
        self.call = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@part("called by a closure over the network", refused=True)
class ClosureOverSelf(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.call = lambda x: self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@part("called by a default argument", refused=True)
class DefaultArgument(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)

        def call(x: Tensor, layer: nn.Module = self.fc) -> Tensor:
            y: Tensor = layer(x)
            return y

        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@part("called by its bound forward", refused=True)
class BoundForward(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.call = self.fc.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@part("called by a bound method of the network", refused=True)
class BoundMethod(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.call = self.inner

    def inner(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@part("called by a partial", refused=True)
class Partial(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.call = functools.partial(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@part("held by a weak reference", refused=True)
class Weak(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.reference = weakref.ref(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.reference()
        assert layer is not None
        return layer(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Weak:
        # A weak reference is copied as it is, as in plain Python; this network knows that and mends it.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name == "reference" else copy.deepcopy(value, memo)
        new.reference = weakref.ref(new.fc)
        return new


GLOBAL: dict[str, nn.Module] = {}
NUMBERS = itertools.count()


@part("held in a global", refused=True)
class InGlobal(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.key = str(next(NUMBERS))
        GLOBAL[self.key] = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL[self.key](x)


@part("called by another module's hook", refused=True)
class InHook(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.act = nn.Tanh()
        layer = self.fc
        self.act.register_forward_hook(lambda module, args, output: layer(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


@part("held in a list from the first call on", refused=True, serves=False)
class LateList(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.held:
            self.held.append(self.fc)
        return self.held[0](x)


@part("held in a list that nobody calls")
class IdleList(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("held in a list, whose weight is read", refused=True)
class ReadsHeld(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.apply_weight(x, self.held[0].weight)


# ---- its weight held or shared elsewhere ----


@part("weights in a list", refused=True)
class WeightList(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.weights = [self.fc.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.apply_weight(x, self.weights[0])


@part("weights in a list alone", refused=True)
class OnlyWeightList(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.weights = [self.fc.weight, self.fc.bias]

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, *self.weights)


@part("weight in a closure", refused=True)
class WeightClosure(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        weight = self.fc.weight
        self.more = lambda x: self.apply_weight(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.more(x)


@part("bias in a list", refused=True)
class BiasList(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.biases = [self.fc.bias]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.biases[0])


@part("tied by parameter", refused=True)
class TiedParameter(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = dense(kind)
        self.second.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.fc(x)))


@part("tied by storage", refused=True)
class TiedStorage(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = dense(kind)
        self.second.weight = nn.Parameter(self.fc.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.fc(x)))


@part("tied to a buffer", refused=True)
class TiedBuffer(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("tied", self.fc.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.apply_weight(x, self.tied)


@part("tied biases", refused=True)
class TiedBias(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = dense(kind)
        self.second.bias = self.fc.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.fc(x)))


@part("views into one fused weight", refused=True)
class Fused(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        of = (lambda n: nn.Linear(WIDTH, n)) if kind == "vector" else (lambda n: nn.Conv2d(WIDTH, n, 3, padding=1))
        self.qkv, self.q, self.k, self.v = of(3 * WIDTH), of(WIDTH), of(WIDTH), of(WIDTH)
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight = nn.Parameter(self.qkv.weight.detach()[WIDTH * i : WIDTH * (i + 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.qkv(x)[:, :WIDTH] + self.q(x) * self.k(x) + self.v(x))


@part("views that overlap", refused=True)
class Overlapping(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = dense(kind)
        shape = (2 * WIDTH, *self.fc.weight.shape[1:])
        both = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        self.fc.weight, self.second.weight = nn.Parameter(both[: WIDTH + 2][2:]), nn.Parameter(both[3 : WIDTH + 3])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.fc(x)))


@part("weight that is a view of a plain tensor", refused=True)
class ViewOfAttribute(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.whole = self.fc.weight.detach()
        self.fc.weight = nn.Parameter(self.whole.view_as(self.whole))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.apply_weight(x, self.whole)


@part("embedding and head tied", refused=True, kinds=("vector",))
class EmbeddingTied(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.embedding, self.out = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        scores = self.out(self.fc(x + self.embedding(torch.arange(len(x)) % 9)))
        return scores.softmax(-1) @ self.embedding.weight


@part("norms tied", serves=True)
class NormsTied(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.a, self.b, self.c = (nn.GroupNorm(1, WIDTH) for _ in range(3))
        nn.init.normal_(self.a.weight)
        nn.init.normal_(self.c.weight)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.fc(self.a(x))))


# ---- how the layer is called ----


@part("under two names")
class TwoNames(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.again = nn.Sequential(self.fc, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.again(x))


@part("called several times")
class Several(Part):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.fc(x))
        return x


@part("called by keyword")
class Keyword(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x)


@part("called by its forward", refused=True)
class CalledForward(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc.forward(x)


@part("called by functional_call", refused=True)
class FunctionalCall(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.fc, dict(self.fc.named_parameters()), (x,))


@part("called with doubled parameters", refused=True)
class DoubledCall(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.fc, {n: 2 * p for n, p in self.fc.named_parameters()}, (x,))


@part("called under vmap", refused=True, kinds=("vector",))
class Vmapped(Part):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.fc)(x)


@part("called under checkpoint")
class Checkpointed(Part):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.fc, x, use_reentrant=False)


@part("called in train mode only", refused=True)
class OnlyInTrain(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = dense(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) + (self.fc(x) if self.training else 0)


@part("never called", refused=True)
class Never(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.idle = dense(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("called by the type of layer", refused=True)
class ByType(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.wanted = type(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            if isinstance(module, self.wanted):
                x = module(x)
        return x


@part("insists on the type of layer", refused=True)
class Insists(Part):
    def forward(self, x: Tensor) -> Tensor:
        assert type(self.fc) in (nn.Linear, nn.Conv2d), "not my layer"
        return self.fc(x)


@part("does something else for another type", refused=True)
class OtherType(Part):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if type(self.fc) in (nn.Linear, nn.Conv2d) else 2 * y


@part("energy and force")
class Force(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            energy = torch.tanh(self.fc(at)).square().sum()
            (force,) = torch.autograd.grad(energy, at, create_graph=True)
        return force


@part("divides by a norm")
class Normalised(Part):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y = y / y.norm()
        if not bool(y.isfinite().all()):
            raise ValueError("not a number")
        return y


@part("counts its calls", serves=False)
class Counts(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * (1 + self.calls)


# ---- what is read from the layer ----


@part("reads the weight", refused=True)
class ReadsWeight(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.apply_weight(x, self.fc.weight) * 0.5


@part("reads the weight alone", refused=True)
class ReadsOnlyWeight(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.fc.weight, self.fc.bias)


@part("reads the weight's norm", refused=True)
class ReadsNorm(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) / (1 + self.fc.weight.norm() + self.fc.weight.flatten(1)[0].abs().sum())


@part("reads dtype, device and shape")
class ReadsDtype(Part):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        x = x.to(weight.dtype).to(weight.device)
        return self.fc(x) * weight.shape[0] * weight.size(1) * weight.ndim


@part("reads the layer's attributes")
class ReadsAttributes(Part):
    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "vector":
            return self.fc(x) * self.fc.in_features / self.fc.out_features
        return self.fc(x) * self.fc.in_channels * self.fc.kernel_size[0] * self.fc.padding[0] * self.fc.groups


@part("reads the bias", refused=True)
class ReadsBias(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) - self.along(self.fc.bias)


@part("reads an attribute of its own", refused=True)
class ReadsOwn(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * getattr(self.fc, "gain", 1.0)


@part("keeps a product of the weight", refused=True, serves=False)
class KeepsProduct(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = 2 * self.fc.weight.detach()
        return self.fc(x) + self.apply_weight(x, self.kept.clone())


# ---- what is written into the layer ----


@part("max-norm", refused=True, serves=False)
class MaxNorm(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.copy_(torch.renorm(self.fc.weight, 2, 0, 0.25))
        return self.fc(x)


@part("max-norm through data", refused=True, serves=False)
class MaxNormData(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data = torch.renorm(self.fc.weight.data, 2, 0, 0.25)
        return self.fc(x)


@part("clips its weight", refused=True, serves=False)
class Clips(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data.clamp_(-0.1, 0.1)
        return self.fc(x)


@part("clips when it trains", refused=True, serves=False)
class ClipsInTrain(Part):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.fc.weight.clamp_(-0.1, 0.1)
        return self.fc(x)


@part("writes into a norm's weight", serves=False, refused=True)
class WritesNorm(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scale = normal()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(-0.5, 0.5)
        return self.fc(x) * self.along(self.scale)


# ---- states of their own ----


@part("saves another representation")
class OtherRepresentation(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.w = normal()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "w"] = self.w * 2 if keep_vars else self.w.detach() * 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.w.copy_(state_dict[prefix + "w"] / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.w)


@part("saves under another name")
class OtherName(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.w = normal()
        self.register_state_dict_post_hook(self._renamed)
        self.register_load_state_dict_pre_hook(self._renamed_back)

    @staticmethod
    def _renamed(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
        state[prefix + "kernel"] = state.pop(prefix + "w")

    @staticmethod
    def _renamed_back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "kernel" in state:
            state[prefix + "w"] = state.pop(prefix + "kernel")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.w)


@part("clones what it saves")
class Clones(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.w = normal()

        def cloned(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
            for key in [key for key in state if key.startswith(prefix)]:
                state[key] = state[key].detach().clone()

        self.register_state_dict_post_hook(cloned)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.w)


@part("saves in half precision", refused=True)
class SavesHalf(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.w = normal()
        with torch.no_grad():
            self.w.copy_(self.w.bfloat16())

        def smaller(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
            state[prefix + "w"] = state[prefix + "w"].detach().bfloat16()

        self.register_state_dict_post_hook(smaller)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.w)


@part("tables derived when loading", refused=True)
class DerivedTables(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.g = normal()
        self.derived = self.g.detach() * 2
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "derived", module.g.detach() * 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.derived.to(x.dtype))


@part("extra state, a tensor")
class ExtraTensor(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.value = float(torch.randn(()))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.value, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.value = float(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.value


@part("extra state, a dict", refused=True)
class ExtraDict(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.value = float(torch.randn(()))

    def get_extra_state(self) -> dict[str, float]:
        return {"value": self.value}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.value = state["value"]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.value


@part("layer with state-dict hooks", refused=True)
class HookedState(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.register_state_dict_post_hook(lambda module, state, prefix, local: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# ---- buffers ----


@part("buffers of many kinds")
class ManyBuffers(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("flags", torch.rand(WIDTH) > 0.3)
        self.register_buffer("counts", torch.randint(1, 5, (WIDTH,)))
        self.register_buffer("scalar", torch.randn(()))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("small", torch.randint(1, 9, (WIDTH,), dtype=torch.uint8))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.flags * self.counts * self.small * self.scalar + self.empty.sum()).to(x.dtype)


@part("buffer, sparse", refused=True, kinds=("vector",))
class Sparse(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("adjacency", torch.diag(torch.randn(WIDTH)).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency.to(x.dtype), self.fc(x).T).T


@part("buffer, sparse by rows", refused=True, kinds=("vector",))
class SparseRows(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("adjacency", torch.diag(torch.randn(WIDTH)).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return (self.adjacency.to(x.dtype) @ self.fc(x).T).T


@part("buffer, sparse and not saved", kinds=("vector",))
class SparseUnsaved(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("adjacency", torch.diag(torch.arange(1.0, 1.0 + WIDTH)).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency.to(x.dtype), self.fc(x).T).T


@part("buffer, complex")
class Complex(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("rotation", torch.randn(WIDTH, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) * self.along(self.rotation)).real.to(x.dtype)


@part("buffer, complex in double precision", refused=True)
class Complex128(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("rotation", torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) * self.along(self.rotation)).real.to(x.dtype)


@part("buffer, conjugate view", refused=True)
class Conjugate(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("rotation", torch.randn(WIDTH, dtype=torch.complex64).conj())

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) * self.along(self.rotation)).imag.to(x.dtype)


@part("buffer, expanded", refused=True)
class Expanded(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("mask", torch.randn(1).expand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.mask)


@part("buffers that overlap", refused=True)
class OverlappingBuffers(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        both = torch.randn(WIDTH + 2)
        self.register_buffer("a", both[:WIDTH])
        self.register_buffer("b", both[2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.a + self.b)


@part("buffer tied to a norm's parameter")
class BufferOfNorm(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scale = normal()
        self.register_buffer("same", self.scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.scale + self.same)


@part("buffers of one storage, transposed", refused=True)
class Transposed(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        square = torch.randn(WIDTH, WIDTH)
        self.register_buffer("m", square)
        self.register_buffer("t", square.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.m[0] + 2 * self.t[0])


@part("buffer not saved")
class Unsaved(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("table", torch.linspace(1, 2, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.table)


@part("buffer written in forward", serves=False)
class WritesBuffer(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.fc(x) * self.steps.clone()


@part("buffer exchanged in forward", serves=False)
class ExchangesBuffer(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.ones(len(x))
        return self.fc(x) * self.seen.mean().to(x.dtype)


@part("expanded parameter", refused=True)
class ExpandedParameter(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scale = nn.Parameter(torch.randn(1).expand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.scale)


@part("a tensor of autograd beside", refused=True)
class NonLeaf(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scale = normal()
        self.twice = self.scale.detach().requires_grad_() * 0 + 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.along(self.scale) * self.along(self.twice.detach().to(x.dtype))


# ---- caches ----


@part("cache in a dict", serves=False)
class DictCache(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.linspace(1, 2, WIDTH, dtype=x.dtype)
        return self.fc(x * self.along(self.cache[len(x)]))


@part("cache in a list", serves=False)
class ListCache(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.cache:
            self.cache.append(torch.linspace(1, 2, WIDTH, dtype=x.dtype))
        return self.fc(x * self.along(self.cache[0]))


@part("cache in an attribute", serves=False)
class AttributeCache(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.linspace(1, 2, WIDTH, dtype=x.dtype)
        return self.fc(x * self.along(self.cache))


@part("slots", serves=False, refused=True)
class Slots(Part):
    __slots__ = ("cache",)

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cache = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.linspace(1, 2, WIDTH, dtype=x.dtype)
        return self.fc(x * self.along(self.cache))


@part("log of its inputs", serves=False)
class Logs(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.log: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(tuple(x.shape))
        return self.fc(x)


@part("cached answer", serves=False, refused=True)
class Answers(Part):
    """Remembers what the layer answered to an input of this sum."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.known: dict[float, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = float(x.detach().sum())
        if self.training or torch.is_grad_enabled():
            return self.fc(x)
        if key not in self.known:
            self.known[key] = self.fc(x)
        return self.known[key].clone()


# ---- what cannot be copied ----


@part("holds a lock", refused=True)
class Lock(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.fc(x)


@part("holds a generator", refused=True)
class Generator(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.numbers: Iterator[int] = (i for i in range(10**9))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("holds a random generator", serves=False, refused=True)
class RandomGenerator(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        self.generator.manual_seed(3)
        return self.fc(x) * self.along(torch.rand(WIDTH, generator=self.generator, dtype=x.dtype))


@part("forbids to set modules", refused=True)
class Guarded(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.ready = True

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and self.__dict__.get("ready"):
            raise RuntimeError("this network is complete")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# ---- patches and hooks on the layer ----


@part("layer's forward replaced", refused=True)
class PatchedForward(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        plain = self.fc.forward
        self.fc.forward = lambda x: plain(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("layer's _conv_forward replaced", refused=True, kinds=("image",))
class PatchedConvForward(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)

        def tiled(self: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return F.conv2d(F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), w, b)

        self.fc._conv_forward = types.MethodType(tiled, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("layer's padding mode changed", kinds=("image",))
class ChangedMode(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.padding_mode = "circular"

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("layer's padding made beforehand", refused=True, kinds=("image",))
class ChangedPadding(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")
        self.fc._reversed_padding_repeated_twice = (2, 0, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("layer's stride an int", kinds=("image",))
class IntStride(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.stride, self.fc.padding = 1, 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("layer pruned by its weight alone", refused=True)
class Pruned(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.weight = nn.Parameter(self.fc.weight.detach()[:, :3].clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, :3])


@part("layer of another class", refused=True)
class Subclass(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        base = type(self.fc)

        class Doubled(base):  # type: ignore[misc, valid-type]
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        self.fc.__class__ = Doubled

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("hooks that change values")
class Hooks(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.register_forward_pre_hook(lambda module, args: tuple(x * 2 for x in args))
        self.fc.register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True)
        self.fc.register_forward_hook(lambda module, args, output: None, always_call=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("hooks with keywords")
class KeywordHooks(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.register_forward_pre_hook(
            lambda module, args, kwargs: (tuple(x * 2 for x in args), {k: x * 3 for k, x in kwargs.items()}), with_kwargs=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("hooks in the backward pass")
class BackwardHooks(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.register_full_backward_hook(lambda module, into, out: tuple(g if g is None else g * 2 for g in into))
        self.fc.register_full_backward_pre_hook(lambda module, out: tuple(g if g is None else g * 3 for g in out))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("hook that is a method of the network", refused=True)
class MethodHook(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scale = normal()
        self.fc.register_forward_hook(self.scaled)

    def scaled(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.along(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("hook that reads the layer's weight", refused=True)
class WeightHook(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.register_forward_hook(lambda module, args, output: output / (1 + module.weight.norm()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("hook on the parameter", refused=True)
class ParameterHook(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.weight.register_hook(lambda gradient: gradient * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# ---- layers of other kinds ----


@part("weight norm", refused=True)
class WeightNorm(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.normed = parametrizations.weight_norm(dense(kind))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(torch.tanh(self.fc(x)))


@part("spectral norm", refused=True, serves=False)
class SpectralNorm(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.normed = parametrizations.spectral_norm(dense(kind))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(torch.tanh(self.fc(x)))


@part("old weight norm", refused=True, serves=False)
class OldWeightNorm(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.normed = torch.nn.utils.weight_norm(dense(kind))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(torch.tanh(self.fc(x)))


@part("pruned by a mask", refused=True, serves=False)
class Masked(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        from torch.nn.utils import prune

        self.masked = prune.random_unstructured(dense(kind), "weight", 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(torch.tanh(self.fc(x)))


@part("grouped convolution", refused=True, kinds=("image",))
class Grouped(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(torch.tanh(self.fc(x)))


@part("attention", refused=True, kinds=("vector",))
class Attention(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)[None]
        return self.attention(y, y, y, need_weights=False)[0][0]


@part("transformer layer", refused=True, kinds=("vector",))
class Transformer(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.fc(x)[None])[0]


@part("recurrent", refused=True, kinds=("vector",))
class Recurrent(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.fc(x)[None])[0][0]


@part("scripted module inside", refused=True)
class Scripted(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scripted = torch.jit.script(nn.Sequential(dense(kind), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.scripted(x))


@part("traced by FX")
class Traced(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.traced = torch.fx.symbolic_trace(nn.Sequential(dense(kind), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.traced(x))


@part("layer compiled alone", refused=True, serves=False)
class CompiledLayer(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.fc.compile(backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@part("frozen layer and norm")
class Frozen(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.second = dense(kind)
        self.fc.requires_grad_(False)
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.fc(x)))


@part("weight built in inference mode", refused=True)
class InferenceWeight(Part):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        with torch.inference_mode():
            self.second = dense(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if torch.is_grad_enabled() else self.second(torch.tanh(self.fc(x)))
