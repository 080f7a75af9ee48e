"""The series layer: a layer that holds every form of an ordered list at once and runs the active one.

Forms that share weights make a *branch*, and the weights they share are cut into *terms* (`branches`). A form's weights are
composed of its active terms, then exactly the layers of the plain form run on them. So gradients reach every active term and no
other, a step costs what the plain form costs, and taking a form out gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import RankError
from ..factorize.metric import Metric
from ..forms import Form
from ..network.readers import plain, reader_of
from ..network.surgery import adopt
from ..network.walk import Layer
from ..values import Geometry
from .branches import BRANCHES, Branch, Method
from .composed import is_recorded
from .decomposed import StandIn, laid_out, memory_format

# A series is read through its branches: who uses the one needs the names of the other.
__all__ = ["Branch", "Method", "SeriesLayer", "series"]


class _Weight(nn.Module):
    """Answers a layer's dense weight ``(O, I, *kernel)`` where it is called."""

    def __init__(self, layer: nn.Module, geometry: Geometry) -> None:
        super().__init__()
        self.layer, self.geometry = layer, geometry

    def forward(self) -> Tensor:
        if isinstance(self.layer, StandIn):
            return self.layer.composed()
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return reader_of(self.geometry).weight(weight)


# What a parameter was when it was looked at: its storage (held weakly, so that no other can take its name), where in it, and
# the number of changes in place.
_Stamp = tuple[StorageWeakRef, int, int, torch.dtype]


def _stamp(parameter: nn.Parameter) -> _Stamp:
    storage = StorageWeakRef(parameter.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, parameter.data_ptr(), parameter._version, parameter.dtype


@final
class _Steps:
    """Counts the steps of all optimizers: a fused one changes parameters without PyTorch counting the change."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.taken += 1


@cache
def _steps() -> _Steps:
    return _Steps()


@final
@dataclass(frozen=True, slots=True)
class _Ready:
    """A plain layer with composed weights, and what they were composed of."""

    form: Form
    stamps: list[_Stamp]
    steps: int
    layer: nn.Module

    def holds(self, form: Form, parameters: list[nn.Parameter]) -> bool:
        """Whether it still is what the parameters make in this form."""
        return (
            form == self.form
            and self.steps == _steps().taken
            and len(parameters) == len(self.stamps)
            and all(
                p.untyped_storage()._cdata == storage.cdata and (p.data_ptr(), p._version, p.dtype) == rest
                for p, (storage, *others) in zip(parameters, self.stamps, strict=True)
                for rest in [tuple(others)]
            )
        )


@final
class SeriesLayer(StandIn):
    """A layer in every form of a list at once, of which one is active.

    Args:
        geometry: The layer it stands for.
        forms: The forms, in the order in which they are offered; the last one is active at first.
        normalise: Divide the gradient of each entry that several active terms share by their number, so that one step moves the
            composed weight as far as it would move a plain one. Off, it is as in arXiv 1912.00673.
        options: ``device`` and ``dtype`` of the terms, which are left uninitialised: `series` fits them.

    Raises:
        RankError: There is no form, one does not fit the layer or stands there twice, group counts do not nest, or the layer
            itself has groups.
    """

    bias: nn.Parameter | None

    def __init__(self, geometry: Geometry, forms: Sequence[Form], *, normalise: bool = False, **options: Any) -> None:
        super().__init__(geometry)
        self.forms = tuple(forms)
        self.normalise = normalise
        if not self.forms:
            raise RankError(f"a series of a {geometry} needs at least one form")
        if geometry.groups > 1:
            raise RankError(f"a {geometry} is in no series: only convolutions of one group are")
        for form in self.forms:
            form.check(geometry)
            if self.forms.count(form) > 1:
                raise RankError(f"{form} stands twice in the series of a {geometry}")
        self.branches = nn.ModuleDict()
        for kind in dict.fromkeys(map(type, self.forms)):
            family = [form for form in self.forms if type(form) is kind]
            self.branches.update(BRANCHES[kind](geometry, family, **options))
        self._home = {form: name for name, branch in self.branches.items() for form in branch.forms}  # type: ignore[union-attr]
        # In a tuple, so that they are no modules of this one: their parameters hold nothing.
        self._plain = {form: (self._branch(form).plain(form),) for form in self.forms}
        self._names = {
            form: [name for name, _ in plain.named_parameters() if name.endswith("weight")]
            for form, (plain,) in self._plain.items()
        }
        bias = nn.Parameter(torch.empty(geometry.out_channels, **options)) if geometry.bias else None
        self.register_parameter("bias", bias)
        self._active = self.forms[-1]
        self._ready: _Ready | None = None

    def _branch(self, form: Form) -> Branch:
        branch = self.branches[self._home[form]]
        assert isinstance(branch, Branch)
        return branch

    @property
    def active(self) -> Form:
        """The form that runs."""
        return self._active

    def set_active(self, form: Form) -> None:
        """Let another of the forms run.

        Raises:
            RankError: It is none of them.
        """
        self._check(form)
        self._active = form

    def _check(self, form: Form) -> None:
        if form not in self._home:
            raise RankError(f"{form} is none of the forms of this series: {', '.join(map(str, self.forms))}")

    def terms(self, form: Form | None = None) -> list[nn.Parameter]:
        """The terms that a form, by default the active one, is made of: those that its gradients reach. Not the bias."""
        form = form or self.active
        self._check(form)
        return self._branch(form).terms(form)

    def forward(self, input: Tensor) -> Tensor:
        """The layers of the active form on its composed weights.

        Without gradients the composed weights are kept until a term changes. A change is seen by PyTorch's own count of changes
        in place, or by an optimizer's step; writing into ``parameter.data`` escapes both, and `forget` is there for this.
        """
        if torch.is_grad_enabled() or is_recorded():
            (plain,) = self._plain[self.active]
            y: Tensor = functional_call(plain, self._weights(self.active), (input,))
        else:
            y = self._composed_layer()(input)
        return y

    def _weights(self, form: Form) -> dict[str, Tensor]:
        """The parameters of a form's plain layer, by name."""
        branch, names = self._branch(form), self._names[form]
        layouts = {memory_format(term) for term in branch.terms(form) if term.ndim > 2}
        layout = next(iter(layouts - {torch.contiguous_format}), torch.contiguous_format)
        weights = {
            name: laid_out(weight, layout) if weight.ndim > 2 else weight
            for name, weight in zip(names, branch.composed(form, self.normalise), strict=True)
        }
        if self.bias is not None:
            weights[names[-1].removesuffix("weight") + "bias"] = self.bias
        return weights

    def _composed_layer(self) -> nn.Module:
        parameters = [*self.terms(), *([] if self.bias is None else [self.bias])]
        ready = self._ready
        if any(p.is_inference() for p in parameters):
            # Nobody counts the changes of such a tensor.
            return self._filled(self.active)
        if ready is None or not ready.holds(self.active, parameters):
            # Made as ordinary tensors, which may later be used where gradients flow.
            with torch.inference_mode(False), torch.no_grad():
                layer = self._filled(self.active)
            ready = self._ready = _Ready(self.active, [_stamp(p) for p in parameters], _steps().taken, layer)
        return ready.layer

    def _filled(self, form: Form) -> nn.Module:
        """The plain layer of a form with its composed weights; a single term is not copied."""
        layer = self._branch(form).plain(form)
        for name, value in self._weights(form).items():
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, nn.Parameter(value.detach(), requires_grad=False))
        return layer.train(self.training)

    def forget(self) -> None:
        """Drop the composed weights that are kept."""
        self._ready = None

    def train(self, mode: bool = True) -> SeriesLayer:
        """Set the mode, and drop the composed weights that are kept."""
        self.forget()
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}

    def extract(self, form: Form | None = None) -> nn.Module:
        """The plain layer of a form, by default of the active one: outputs equal to the bit, storage of its own.

        Its weights require gradients if a term does. It has the hooks and the training flag of this layer.

        Raises:
            RankError: The form is none of the series'.
        """
        form = form or self.active
        trains = any(term.requires_grad for term in self.terms(form))
        with torch.no_grad():
            layer = self._filled(form)
            for parameter in layer.parameters():
                parameter.data = parameter.detach().clone(memory_format=torch.preserve_format)
        for name, parameter in layer.named_parameters():
            is_bias = name.endswith("bias") and self.bias is not None
            parameter.requires_grad_(self.bias.requires_grad if is_bias and self.bias is not None else trains)
        return adopt(layer, self)

    def composed(self) -> Tensor:
        """The dense weight of the active form, ``(O, I, *kernel)``."""
        (plain,) = self._plain[self.active]
        weights = {f"layer.{name}": weight for name, weight in self._weights(self.active).items()}
        weight: Tensor = functional_call(_Weight(plain, self.geometry), weights, ())
        return weight

    def weights(self) -> list[Tensor]:
        """The terms of the active form."""
        return list(self.terms())

    def extra_repr(self) -> str:
        """The geometry, the forms and the active one."""
        return f"{self.geometry}, {' | '.join(map(str, self.forms))}, active {self.active}"


def series(
    layer: Layer,
    forms: Sequence[Form],
    *,
    method: Method = "nested",
    normalise: bool = False,
    metric: Metric | None = None,
) -> SeriesLayer:
    """A layer of the network in several forms, fitted to its weight; hooks, mode, dtype, device and layout are kept.

    Args:
        layer: The layer, as `walk` found it.
        forms: The forms, in the order in which they are offered; the last one is active at first.
        method: How group counts follow one another: ``"nested"``, each fitted from the one before, or ``"faithful"``,
            independently, as in arXiv 1912.00673.
        normalise: See `SeriesLayer`.
        metric: What an error of the weight costs, by its channels; by default all errors cost alike.

    Raises:
        RankError: A form does not fit the layer, or group counts do not nest.
    """
    module = SeriesLayer(layer.geometry, forms, normalise=normalise, device="meta")
    weight, bias = layer.parameter, layer.bias
    W, layout = layer.weight.detach(), memory_format(weight)
    for branch in module.branches.values():
        assert isinstance(branch, Branch)
        for name, values in branch.fitted(W, method, metric).items():
            values = laid_out(values.to(weight.device, weight.dtype, copy=True), layout)
            branch.register_parameter(name, nn.Parameter(values, requires_grad=weight.requires_grad))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    adopt(module, layer.module, plain(layer.geometry))
    return module
