"""Finds the layers of a network; names what is shared and what is refused, and why.

Nothing is run here and nothing is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..values import Geometry
from .attention import ATTENTION, parts_of, refusal
from .memory import overlapping, tensors_of
from .readers import Reader, own_ways, parent_of, reader


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """One module that can be decomposed, with every name under which the network holds it, the first one first."""

    names: tuple[str, ...]
    module: nn.Module
    geometry: Geometry
    reader: Reader
    holder: nn.MultiheadAttention | None = None
    """The attention that multiplies with its weight itself. The module is then a layer made for it, on that weight's memory."""

    @property
    def name(self) -> str:
        """The name that plans use."""
        return self.names[0]

    @property
    def part(self) -> str:
        """Which projection it is of the attention that holds it."""
        return self.name.rpartition(".")[2]

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the layer stores it: its dtype, device, layout, and whether it trains."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The weight as ``(O, I, *kernel)``, I being one group's; a view of the layer's own."""
        return self.reader.weight(self.parameter)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias ``(O,)``, or None."""
        return self.module.bias  # type: ignore[return-value]

    def rebuilt(self) -> nn.Module:
        """A plain layer of this type with this geometry, on the layer's own weight and bias."""
        return self.reader.dense(self.geometry, self.weight, self.bias)

    @property
    def title(self) -> str:
        """The name for a message, in which the root has one too."""
        return self.name or "the network"


@final
@dataclass(frozen=True, slots=True)
class Census:
    """What `walk` found: layers by name, and the reason for each weighted module that is refused."""

    layers: dict[str, Layer]
    refused: dict[str, str]


_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def walk(model: nn.Module) -> Census:
    """Find every layer of a network.

    A module under several names is one layer. A module that holds a weight of two or more dimensions and is no layer is refused
    with a reason; modules without such a weight (norms, activations) are no one's business.
    """
    names: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
        modules[id(module)] = module

    inside = {id(child) for module in modules.values() for child in _inside(module)}
    tied = _tied(model, names)
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for key, module in modules.items():
        name = names[key][0]
        if key in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            found_in = _in_attention(module, names[key], tied[key].union(*(tied[id(child)] for child in _inside(module))))
            if isinstance(found_in, str):
                refused[name] = found_in
            else:
                layers |= found_in
            continue
        found = reader(module)
        reason = _reason(module, found)
        if reason is None and found is not None:
            geometry = found.geometry(module)
            if isinstance(geometry, str):
                reason = geometry
            elif 0 in Layer((name,), module, geometry, found).parameter.shape:
                reason = "its weight is empty"
            elif tied[key]:
                reason = f"its weight is tied to that of {', '.join(sorted(tied[key]))}"
            else:
                layers[name] = Layer(tuple(names[key]), module, geometry, found)
        if reason:
            refused[name] = reason
    return Census(layers, refused)


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """Modules of an attention, whose weights it reads itself."""
    if isinstance(module, nn.MultiheadAttention):
        yield from (child for child in module.modules() if child is not module)


def _in_attention(module: nn.MultiheadAttention, names: list[str], tied: set[str]) -> dict[str, Layer] | str:
    """The projections of an attention as layers, or why it cannot be taken apart."""
    out = module.out_proj
    reason = _computed(module) or refusal(module) or _odd(module, ATTENTION, {"out_proj"}) or _reason(out, reader(out))
    if reason:
        return reason
    if tied:
        return f"its weights are tied to those of {', '.join(sorted(tied))}"
    layers = {}
    for part, layer in parts_of(module).items():
        found = reader(layer)
        assert found is not None
        geometry = found.geometry(layer)
        assert not isinstance(geometry, str)
        titles = tuple(f"{name}.{part}" if name else part for name in names)
        layers[titles[0]] = Layer(titles, layer, geometry, found, module)
    return layers


def _tied(model: nn.Module, names: dict[int, list[str]]) -> dict[int, set[str]]:
    """For each module, who else holds a tensor that shares memory with one of its own."""
    holders: dict[int, dict[int, str]] = defaultdict(dict)  # tensor → module → how it is called in a message
    tensors: list[Tensor] = []
    for module in model.modules():
        for tensor in tensors_of(module):
            is_parameter = any(tensor is parameter for parameter in module._parameters.values())
            title = names[id(module)][0] or "the network"
            holders[id(tensor)].setdefault(id(module), title if is_parameter else f"a tensor of {title}")
            tensors.append(tensor)
    tied: dict[int, set[str]] = defaultdict(set)
    shared = [[t] for t in tensors if len(holders[id(t)]) > 1]
    for group in [*shared, *overlapping(tensors)]:
        together = [holder for tensor in group for holder in holders[id(tensor)].items()]
        for key, title in together:
            tied[key] |= {other for _, other in together} - {title}
            if len(together) > len({holder for holder, _ in together}):
                tied[key] |= {title}
    return tied


_NO_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
"""What looks rows up, or scales what it is given: nothing is multiplied, so there is nothing to decompose."""


def _added(parameter: Tensor) -> bool:
    """Whether a parameter is shaped to be added or joined to a batch, as tokens and positions are: its first side is 1.

    A matrix of one row has no lower rank either.
    """
    return parameter.shape[0] == 1


def _reason(module: nn.Module, found: Reader | None) -> str | None:
    """Why a module that holds weights cannot be decomposed; None for a layer, and for a module that multiplies by none."""
    kind, parameters = type(module), _parameters_of(module)
    if reason := _recurrent(module) or _computed(module):
        return reason
    if found is None:
        if "quantized" in kind.__module__:
            return f"{kind.__module__}.{kind.__name__} is quantised"
        large = [name for name, p in parameters.items() if p is not None and p.ndim >= 2 and not _added(p)]
        if not large or isinstance(module, _NO_LAYERS):
            return None
        if parent := parent_of(module):
            own = ", ".join(own_ways(module, parent))
            return f"{kind.__name__} is a subclass of {parent.__name__} with {own} of its own, and may compute something else"
        return f"{kind.__name__} (weight {', '.join(large)}) is neither a linear layer nor a convolution"
    if parameters.get("weight") is None:
        return f"its weight is computed by a hook ({', '.join(parameters)}); remove weight_norm or the like first"
    return _odd(module, {"weight", "bias"})


_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.RNNBase, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.RNNCellBase)
"""Whatever is of one of these hands its matrices to a kernel; the nearest first."""


def _recurrent(module: nn.Module) -> str | None:
    """Why a recurrent layer, or one step of it, cannot be decomposed; None for any other module."""
    parent = next((each.__name__ for each in _RECURRENT if isinstance(module, each)), None)
    if parent is None:
        return None
    kind, told = type(module).__name__, vars(module)
    size = f"{told.get('input_size')}→{told.get('hidden_size')}"
    words = {
        f"{kind} {size}": True,
        f"a subclass of {parent}": kind != parent,
        f"{told.get('num_layers')} layers": told.get("num_layers", 1) != 1,
        "both ways": told.get("bidirectional", False),
        f"projected to {told.get('proj_size')}": told.get("proj_size", 0) != 0,
    }
    what = ", ".join(word for word, holds in words.items() if holds)
    return f"{what}: a recurrent layer, whose matrices PyTorch multiplies by itself, step after step, and takes no factors of"


def _parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    return dict(module._parameters.items())  # a scripted module's table is no dict


def _computed(module: nn.Module) -> str | None:
    """Why the parameters of a module are not those that it computes with."""
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        return f"{type(module).__name__} is lazy: run the network once before"
    if parametrize.is_parametrized(module):
        what = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"its {what} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations"
    return None


def _odd(module: nn.Module, usual: Collection[str], inside: Collection[str] = ()) -> str | None:
    """What is unusual of a module of a known type, so that it may not compute what its type says.

    Args:
        module: The module.
        usual: Names of the parameters that it may hold.
        inside: Names of the modules that it holds.
    """
    kind, parameters = type(module), _parameters_of(module)
    for name, p in parameters.items():
        if p is None or name not in usual or name == "bias":
            continue
        if type(p) is not nn.Parameter:
            return f"its {name} is a {type(p).__name__}, not a plain parameter"
        if not p.is_floating_point():
            return f"its {name} is of {p.dtype}; only floating point weights are decomposed"
        if p.layout != torch.strided:
            return f"its {name} is stored as {p.layout}, not as a dense tensor"
    if others := [name for name in module._modules if name not in inside]:
        return f"it holds modules of its own ({', '.join(others)})"
    if extra := set(parameters) - set(usual) | set(module._buffers):
        told = "weight and bias" if "weight" in usual else "an attention's weights"
        return f"it holds more than {told}: {', '.join(sorted(extra))}"
    if lost := [name for name, p in parameters.items() if getattr(module, name, None) is not p]:
        return f"its {lost[0]} is no parameter"
    if "bias" in usual and "bias" not in parameters:
        return "its bias is no parameter"
    if replaced := [name for name, value in vars(module).items() if callable(value) and callable(getattr(kind, name, None))]:
        return f"its {', '.join(replaced)} was replaced on the object"
    if any(getattr(module, hooks) for hooks in _STATE_DICT_HOOKS):
        return "it has state-dict hooks, whose meaning for its factors is unknown"
    return None
