"""What a network answers, as a distribution: it says how far two answers lie apart, in nats, and draws answers without labels.

    y   a network's output, the parameters of the distribution      a   an answer drawn from it

The gradient of log p(a | y) for an answer drawn from the network's own output has the Fisher information as its second moment,
and that of a small change is half of what it moves the answers by (Kullback and Leibler). So the two methods of a kind of
outputs belong together: an item's divergence is ½ vᵀ F v for a change v of the weights, to second order.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, final

import torch
from pydantic import Field
from torch import Tensor

from ..errors import CalibrationError

_LOGITS = "logits"


class Outputs(ABC):
    """How a network's output is read. Tensors are found in tuples, lists, mappings, dataclasses; integers are passed over."""

    __slots__ = ()

    @abstractmethod
    def log_likelihood(self, output: Any, generator: torch.Generator) -> Tensor:
        """The log-likelihood of an answer drawn from the output, summed over the items of the batch; a scalar with a gradient.

        Raises:
            CalibrationError: The output cannot be read in this way.
        """

    @abstractmethod
    def stakes(self, output: Any) -> Tensor:
        """How much each item's answer may move when the network is changed: ``(B,)``, at least 0, by any unit.

        Raises:
            CalibrationError: The output cannot be read in this way.
        """

    @abstractmethod
    def divergence(self, original: Any, changed: Any) -> Tensor:
        """How far a changed network's output lies from the original's: nats for each item of the batch, ``(B,)``, float64.

        Raises:
            CalibrationError: The outputs cannot be read in this way, or are not of the same shapes.
        """


@final
@dataclass(frozen=True, slots=True)
class Categorical(Outputs):
    """Class scores before the softmax. An item's divergence is KL(original ‖ changed), summed over its positions.

    Where the output holds several tensors, those named ``logits`` count, else all: each is a choice of its own.

    Attributes:
        dim: The dimension of the classes: 1 for maps ``(B, C, H, W)``, -1 for sequences ``(B, T, C)``. An output ``(B, C)``
            needs none.
    """

    dim: int | None = None
    kind: Literal["categorical"] = "categorical"

    def log_likelihood(self, output: Any, generator: torch.Generator) -> Tensor:
        """Of a class drawn at each position."""
        return torch.stack([self._drawn(scores, generator) for scores in self._scores(output)]).sum()

    def stakes(self, output: Any) -> Tensor:
        """The Fisher information of the scores, its trace: the sum of p (1 − p) over classes and positions."""
        p = [scores.double().softmax(-1) for scores in self._scores(output)]
        return torch.stack([(each * (1 - each)).flatten(1).sum(1) for each in p]).sum(0)

    def divergence(self, original: Any, changed: Any) -> Tensor:
        """Summed over positions."""
        total: Tensor | None = None
        for p, q in _pairs(self._scores(original), self._scores(changed)):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            # A class that cannot be adds nothing, however impossible the other finds it.
            each = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).flatten(1).sum(1)
            total = each if total is None else total + each
        assert total is not None
        return total

    def _drawn(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        log_p = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1).flatten(0, -2)
        answer = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return log_p.gather(1, answer).sum()

    def _scores(self, output: Any) -> list[Tensor]:
        """Tensors of scores, classes last."""
        found = []
        for name, tensor in _named(output, _LOGITS):
            where = f"output {name}" if name else "the output"
            if self.dim is None and tensor.ndim != 2:
                raise CalibrationError(
                    f"{where} is {_shape(tensor)}: say which dimension holds the classes, as in Categorical(dim=1) for maps "
                    "(B, C, H, W) or Categorical(dim=-1) for sequences (B, T, C); what is no class score is for Gaussian()"
                )
            dim = -1 if self.dim is None else self.dim
            if not -tensor.ndim <= dim < tensor.ndim or dim % tensor.ndim == 0:
                raise CalibrationError(f"{where} is {_shape(tensor)}: its dimension {dim} holds no classes")
            found.append(tensor.movedim(dim, -1))
        return found


@final
@dataclass(frozen=True, slots=True)
class Gaussian(Outputs):
    """Anything else: numbers, each output with noise of its own size. An item's divergence is half the squared relative change.

    An output y becomes the mean of a normal distribution with the variance s² = mean over the batch's items of ‖y‖², for each
    tensor its own, so that all of them count alike: ``‖y' − y‖² / (2 s²)``, summed over the tensors. A divergence of 0.005 is a
    change by a tenth.
    """

    kind: Literal["gaussian"] = "gaussian"

    def log_likelihood(self, output: Any, generator: torch.Generator) -> Tensor:
        """Of the output with noise added; up to a constant."""
        return torch.stack([self._drawn(y, generator) for _, y in _named(output)]).sum()

    def stakes(self, output: Any) -> Tensor:
        """The same for all items."""
        (_, y), *_ = _named(output)
        return torch.ones(len(y), dtype=torch.float64, device=y.device)

    def divergence(self, original: Any, changed: Any) -> Tensor:
        """Summed over the output's tensors."""
        total: Tensor | None = None
        for y, other in _pairs([y for _, y in _named(original)], [y for _, y in _named(changed)]):
            apart = (other.double() - y.double()).reshape(len(y), -1).square().sum(1)
            each = apart / (2 * _variance(y))
            # Where the original answers nothing but zeros, no change of it is small.
            each = torch.where(apart == 0, 0.0, each)
            total = each if total is None else total + each
        assert total is not None
        return total

    def _drawn(self, y: Tensor, generator: torch.Generator) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=wide.dtype)
        deviation = _variance(y).sqrt().to(wide.dtype)
        # ∇ log N(a; y, s²) = (a − y) / s², and a − y is s times the noise.
        return (wide * noise).sum() / torch.where(deviation > 0, deviation, 1)


@final
@dataclass(frozen=True, slots=True)
class Own(Outputs):
    """A function of the user's: from an output to the log-likelihood of a drawn answer, or a loss, summed over the items."""

    name: str
    function: Callable[[Any], Tensor] | None = field(default=None, compare=False, repr=False)
    kind: Literal["function"] = "function"

    def log_likelihood(self, output: Any, generator: torch.Generator) -> Tensor:
        """What the function answers, summed."""
        if self.function is None:
            raise CalibrationError(f"outputs are told by {self.name}, a function that no file holds")
        value = self.function(output)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = f"a {type(value).__name__}" if not isinstance(value, Tensor) else f"a tensor of {value.dtype}"
            raise CalibrationError(f"{self.name} returned {what}; it must return a log-likelihood or a loss, as a tensor")
        return value.sum()

    def stakes(self, output: Any) -> Tensor:
        """There are none, as there is no divergence."""
        return self.divergence(output, output)

    def divergence(self, original: Any, changed: Any) -> Tensor:
        """There is none."""
        raise CalibrationError(
            f"{self.name} tells no divergence between two outputs: calibrate with lamina.Categorical() or lamina.Gaussian()"
        )


AnyOutputs: TypeAlias = Annotated[Categorical | Gaussian, Field(discriminator="kind")]


def outputs_of(given: Any) -> Outputs | None:
    """Read an ``outputs`` argument.

    Raises:
        CalibrationError: It is none.
    """
    if given is None or isinstance(given, Outputs):
        return given
    if isinstance(given, type) or not callable(given):
        raise CalibrationError(
            f"outputs is {given!r}; give lamina.Categorical(), lamina.Gaussian(), a function from output to scalar, or None"
        )
    return Own(getattr(given, "__qualname__", type(given).__qualname__), given)


def _named(output: Any, only: str | None = None) -> list[tuple[str, Tensor]]:
    """The tensors of floating point numbers in an output, with their names; of several those of one name, where it has any.

    Raises:
        CalibrationError: There is none.
    """
    found = [(name, tensor) for name, tensor in _leaves(output, "") if tensor.is_floating_point() and tensor.ndim]
    if only and len(found) > 1:
        found = [(name, tensor) for name, tensor in found if name.rpartition(".")[2] == only] or found
    if not found:
        raise CalibrationError(f"the network's output, a {type(output).__name__}, holds no tensor of floating point numbers")
    return found


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor in an output, in order."""
    return (tensor for _, tensor in _leaves(output, ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):  # also those of transformers, which are dataclasses besides
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value):
        items = [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _pairs(original: list[Tensor], changed: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    shapes, others = [[_shape(t) for t in tensors] for tensors in (original, changed)]
    if shapes != others:
        raise CalibrationError(f"two outputs of unlike shapes, {', '.join(shapes)} and {', '.join(others)}, have no divergence")
    yield from zip(original, (t.to(o.device) for t, o in zip(changed, original, strict=True)), strict=True)


def _variance(y: Tensor) -> Tensor:
    return y.detach().double().square().sum() / len(y)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))
