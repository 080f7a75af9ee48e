"""Checkpoint and plan → saved network, layer by layer: for networks that are larger than memory.

The network itself has no values. It says what the saved network's state is, and where each tensor of that comes from: a factor
from its layer's weight in the checkpoint, all else from the tensor of its name, or from some rows of an attention's packed one.
`decompose` finds the factors of a layer by the very same function.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor, nn

from .artifact import PLAN
from .card import model_card
from .decomposition import factored_layer, forbid_changed, forbid_trained, planned_layers
from .errors import ArtifactError, PlanError
from .folder import code_of, forbid_unwritable
from .forms import Form
from .layers.build import empty
from .layers.decomposed import DecomposedLayer
from .network.attention import rows_of
from .network.copying import cloned
from .network.inplace import exchange
from .network.running import outside_inference_mode
from .network.state import names_in, state_of
from .network.surgery import forbid_nonfinite
from .network.walk import Layer
from .network.wrappers import unwrapped
from .parts import Part, write_parts
from .plan import Plan
from .progress import display
from .values import closest
from .weights import Checkpoint

_METHOD = 1
"""Raised where factors of the same weight and form become others: work that was cut off before is begun anew."""
_TOGETHER_BYTES = 2**26
"""So many bytes of tensors that are copied make one part, or one tensor that has more."""


@outside_inference_mode
def decompose_checkpoint(
    model: nn.Module,
    plan: Plan,
    weights: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> int:
    """Decompose a network whose weights are too many for memory, from safetensors files into a folder for `load`.

        >>> with torch.device("meta"):
        ...     model = network()
        >>> lamina.decompose_checkpoint(model, plan, "big/model.safetensors.index.json", output="out")

    What is saved is what `decompose` and `save` of the whole network would save, tensor for tensor. The weights are read one
    layer at a time, so memory is that of factorising one layer. The network is not run, so nothing is tried on it; `load` makes
    sure that it reads no dense weight. The files are read twice: first to see that they can be, which they are, and that no
    weight to be factorised has NaN or infinite entries.

    A call that is killed leaves what the folder held, and the same call goes on from the last layer that was done; nothing of
    it can be loaded before all of it is there.

    Args:
        model: The network on the meta device: its structure, and the data types of the result; it is only read.
        plan: What each layer becomes; one whose factors are fitted to the weights alone.
        weights: A ``.safetensors`` file, the ``.safetensors.index.json`` of many, or a folder that holds either. Of tensors
            that are tied in the network it may hold one.
        output: The folder; an earlier saved network in it is replaced at the end.
        dtype: Floating-point tensors are converted to it. By default those of the checkpoint must have the network's types.
        device: Where layers are factorised.
        progress: Show on stderr how many layers are done.

    Returns:
        How many parts of the result an earlier call that was cut off had made.

    Raises:
        PlanError: The plan is for another network, or its factors cannot be found from weights alone.
        ArtifactError: A file is missing, cut short or no safetensors; a tensor is missing, left over or does not fit; or the
            folder holds other files or cannot be written. The message names the first.
        LayerError: A weight to be factorised is not finite, or cannot be factorised.
    """
    source = Checkpoint.open(weights)
    network = _without_values(model)
    made = {name: tensor.dtype for name, tensor in state_of(network).items()}
    network.to(dtype=dtype)
    forms = _forms(network, plan)
    dense = _Dense.of(network, source, made, converted=dtype is not None)
    weights_of = {layer: _weight_of(layer, dense) for layer in forms}
    parts, aliases = _parts(network, dense, forms, weights_of, torch.device(device))
    forbid_changed(network, plan)
    forbid_unwritable(Path(output), PLAN)
    with display(progress) as shown:
        for layer in shown.through(list(forms), "read"):
            forbid_nonfinite(_with_values(layer, dense.read(weights_of[layer])))
        return write_parts(
            Path(output),
            PLAN,
            lambda files: plan.model_copy(update={"format": 1 if files == 1 else 2}),
            parts,
            aliases,
            _identity(plan, dense, device),
            lambda done: shown.say("decompose", done, len(parts)),
            card=lambda files: model_card(network, plan, files),
        )


def _identity(plan: Plan, dense: _Dense, device: str | torch.device) -> str:
    """What factors follow from: another PyTorch may find others, up to rounding."""
    about = [str(_METHOD), dense.source.digest(), plan.model_dump_json(), torch.__version__, str(device)]
    return "\n".join([*about, *(f"{name} {dtype}" for name, dtype in dense.made.items())])


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a network's structure.

    Raises:
        ArtifactError: A parameter has values.
    """
    for name, parameter in unwrapped(model).named_parameters():
        if not parameter.is_meta:
            raise ArtifactError(
                f"{name} of this network is in memory: make the network under torch.device('meta'), or use lamina.decompose"
            )
    return cloned(unwrapped(model))


def _forms(network: nn.Module, plan: Plan) -> dict[Layer, Form]:
    chosen = planned_layers(network, plan)
    forbid_trained(plan)
    if plan.factors.calibration and not plan.factors.weights_alone:
        raise PlanError(
            "this plan's factors are fitted to a calibration, and layer by layer they are fitted to the weights alone: "
            "apply it in memory with its data, or plan without data"
        )
    return dict(chosen)


@final
@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a tensor of the checkpoint, by default all."""

    name: str
    start: int = 0
    stop: int | None = None


@final
@dataclass(frozen=True, slots=True)
class _Dense:
    """The dense network's state as the checkpoint holds it."""

    source: Checkpoint
    made: Mapping[str, torch.dtype]
    """Data types of the network's state before it was converted."""
    names: Mapping[int, str]
    """Which tensor of the checkpoint is that of the network, by its ``id``."""
    state: Mapping[str, Tensor]
    """The network's state, without values: data types of the result."""

    @classmethod
    def of(cls, network: nn.Module, source: Checkpoint, made: Mapping[str, torch.dtype], converted: bool) -> _Dense:
        """Find every tensor of a network's state.

        Raises:
            ArtifactError: One is missing, left over or does not fit; or tied ones are not equal.
        """
        state = network.state_dict(keep_vars=True)
        names: dict[int, str] = {}
        for key, tied in names_in(state).items():
            there = [name for name in tied if name in source.tensors]
            if not there:
                near = closest(tied[0], [name for name in source.tensors if name not in state])
                raise ArtifactError(f"{source.path}: {tied[0]} is missing{near}; these are not the weights of this network")
            for name in there:
                _forbid_misfit(source, name, state[name], converted)
            for other in there[1:]:
                _forbid_unequal(source, there[0], other)
            names[key] = there[0]
        for name in source.tensors:
            if name not in state:
                raise ArtifactError(f"{source.path}: {name} has no place in this network")
        return cls(source, made, names, state)

    def name(self, tensor: Tensor) -> str:
        """Under which name a tensor of the network stands in the checkpoint.

        Raises:
            ArtifactError: The network's own code writes its state in another way than its modules do.
        """
        if id(tensor) not in self.names:
            raise ArtifactError(
                "this network's own code makes its state, which cannot be told layer by layer: apply it in memory"
            )
        return self.names[id(tensor)]

    def slices(self, rows: _Rows) -> Iterator[Tensor]:
        """The values, in the type of the result, a bounded number at a time."""
        for values in self.source.slices(rows.name, rows.start, rows.stop):
            yield self._converted(rows.name, values)

    def read(self, rows: _Rows) -> Tensor:
        """The values, in the type of the result."""
        return self._converted(rows.name, self.source.read(rows.name, rows.start, rows.stop))

    def _converted(self, name: str, values: Tensor) -> Tensor:
        wanted = self.state[name].dtype
        # As a network in memory: it takes its state in the type that it was made in, and is then converted.
        return values if values.dtype == wanted else values.to(self.made[name]).to(wanted)


def _forbid_misfit(source: Checkpoint, name: str, wanted: Tensor, converted: bool) -> None:
    given = source.tensors[name]
    if given.shape != tuple(wanted.shape):
        raise ArtifactError(
            f"{source.path}: {name} has shape {given.shape}, this network wants {tuple(wanted.shape)}: these are weights of "
            "another network"
        )
    both = given.dtype.is_floating_point and wanted.is_floating_point()
    if given.dtype != wanted.dtype and not (converted and both):
        cure = "convert with dtype= (--dtype), or make the network in that type" if both else "these are not its weights"
        raise ArtifactError(f"{source.path}: {name} is {given.dtype}, this network's is {wanted.dtype}: {cure}")
    if code_of(wanted.dtype) is None:
        raise ArtifactError(f"{name}: a tensor of {wanted.dtype} cannot be stored: convert it")


def _forbid_unequal(source: Checkpoint, name: str, other: str) -> None:
    pairs = zip_longest(source.slices(name), source.slices(other))
    if not all(a is not None and b is not None and torch.equal(_bits(a), _bits(b)) for a, b in pairs):
        raise ArtifactError(f"{source.path}: {name} and {other} are one tensor in this network, and two here: untie them first")


def _bits(values: Tensor) -> Tensor:
    return values.flatten().view(torch.uint8)


@final
@dataclass(frozen=True, slots=True)
class _Factor:
    """A tensor that is found by factorising a layer: its place among the factors."""

    layer: Layer
    number: int


def _parts(
    network: nn.Module,
    dense: _Dense,
    forms: Mapping[Layer, Form],
    weights: Mapping[Layer, _Rows],
    device: torch.device,
) -> tuple[list[Part], dict[str, str]]:
    """Turn the layers of a network into their forms, without values, and say of what its state is made.

    Returns:
        The parts, and for every other name of a tied tensor the name under which it is stored.
    """
    origins = _exchanged(network, dense, forms)
    state = network.state_dict(keep_vars=True)
    aliases: dict[str, str] = {}
    factors: dict[Layer, dict[str, int]] = {}
    copied: list[dict[str, _Rows]] = [{}]
    size = 0
    for names in names_in(state).values():
        name, *others = names
        aliases |= dict.fromkeys(others, name)
        tensor = state[name]
        origin = origins[id(tensor)] if id(tensor) in origins else _Rows(dense.name(tensor))
        if isinstance(origin, _Factor):
            factors.setdefault(origin.layer, {})[name] = origin.number
            continue
        own = tensor.numel() * tensor.element_size()
        if copied[-1] and size + own > _TOGETHER_BYTES:
            copied.append({})
            size = 0
        copied[-1][name] = origin
        size += own
    parts = [
        Part(f"copy {number}", {name: state[name] for name in rows}, partial(_copied, dense, rows))
        for number, rows in enumerate(copied)
        if rows
    ]
    parts += [
        Part(
            f"layer {layer.name}",
            {name: state[name] for name in numbers},
            partial(_factorised, layer, forms[layer], partial(_read, dense, weights[layer], device), numbers),
        )
        for layer, numbers in factors.items()
    ]
    return parts, aliases


def _weight_of(layer: Layer, dense: _Dense) -> _Rows:
    """Where a layer's weight lies in the checkpoint, as the layer stores it."""
    if layer.holder is None:
        return _Rows(dense.name(layer.parameter))
    parameter, start, stop = rows_of(layer.holder)[layer.part]["weight"]
    return _Rows(dense.name(parameter), start, stop)


def _exchanged(network: nn.Module, dense: _Dense, forms: Mapping[Layer, Form]) -> dict[int, _Factor | _Rows]:
    """Let layers become their forms; where each new tensor comes from, by its ``id``."""
    holders = {layer.holder: None for layer in forms if layer.holder is not None}
    parts = {holder: rows_of(holder) for holder in holders}
    others = {holder: dict(holder._parameters) for holder in holders}
    exchange(list(forms), lambda layer: empty(layer, forms[layer]), lambda held: None, on_disk=False)
    found: dict[int, _Factor | _Rows] = {}
    for layer in forms:
        for number, factor in enumerate(cast(DecomposedLayer, layer.module).factors()):
            found[id(factor.weight)] = _Factor(layer, number)
    for holder in holders:
        for name, own in parts[holder].items():
            module = holder._modules[name]
            last = module.factors()[-1] if isinstance(module, DecomposedLayer) else module
            for what, (parameter, start, stop) in own.items():
                tensor = cast(nn.Module, last)._parameters[what]
                found.setdefault(id(tensor), _Rows(dense.name(parameter), start, stop))
        for name, after in holder._parameters.items():  # biases of keys and values, on memory of their own
            before = others[holder].get(name)
            if after is not None and before is not None:
                found[id(after)] = _Rows(dense.name(before))
    return found


def _read(dense: _Dense, rows: _Rows, device: torch.device) -> Tensor:
    return dense.read(rows).to(device)


def _with_values(layer: Layer, weight: Tensor) -> Layer:
    """A layer of a network without values, with a weight as the layer stores it."""
    return dataclasses.replace(layer, module=layer.reader.dense(layer.geometry, layer.reader.weight(weight), None))


def _copied(dense: _Dense, rows: Mapping[str, _Rows]) -> Iterator[tuple[str, Tensor]]:
    for name, origin in rows.items():
        for values in dense.slices(origin):
            yield name, values


def _factorised(
    layer: Layer, form: Form, read: Callable[[], Tensor], numbers: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    factors = factored_layer(_with_values(layer, read()), form, own_bias=True).factors()
    for name, number in numbers.items():
        yield name, cast(Tensor, factors[number].weight)
