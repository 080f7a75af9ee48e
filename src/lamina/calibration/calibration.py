"""Calibration: what a network's layers are fed and what its answers depend on, as a value that can be saved and loaded.

    H   second moment of a layer's inputs, of patches (I K, I K) or of channels (I, I)      W   its weight, (O, I, *kernel)
    G   second moment of the gradients at its output, (O, O)                                K   taps of its kernel

To second order a change ΔW of one layer's weight moves the network's answers by

    ½ tr(G ΔW H ΔWᵀ)   nats for each item of a batch

by Kronecker factors (Martens and Grosse, arXiv 1503.05671; with positions, Grosse and Martens, arXiv 1602.01407), where

    H   is summed over all positions of an item, in all calls, and averaged over items
    G   is averaged over items and positions; of the gradient of the log-likelihood of an answer to that item, drawn from the
        network's own output

A moment of channels is the mean over the taps of the moment of patches, so that with it the sum goes over the taps too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from ..curve import Curve
from ..errors import ArtifactError, CalibrationError
from ..factorize.metric import Along, Metric
from ..files import FileValue, read_model
from ..folder import Saved, digest, read_folder, write_folder
from ..network.fingerprint import fingerprint
from ..network.state import state_of
from ..network.wrappers import unwrapped
from ..shown import Shown
from ..values import Count, Geometry, quantity
from .gram import Gram, packed
from .outputs import Categorical, Gaussian, Outputs, Own

FORMAT = 3
DAMPING = 1e-3
"""Of moments of which nothing was held out to choose one by."""
_FILE = "calibration.json"
_WHAT = "saved calibration"


def _current(number: int) -> int:
    if number < FORMAT:
        raise PydanticCustomError("older", "of an older lamina, which measured less of what layers lose: calibrate anew")
    return number


@final
class FunctionName(FileValue):
    """A function of the user's, which no file holds."""

    kind: Literal["function"] = "function"
    name: str


@final
class LayerRecord(FileValue):
    """What is said of one layer's moments, beside their numbers."""

    geometry: Geometry
    inputs: Literal["patches", "channels"]
    directions: Count = 0
    gradients: bool
    rows: Annotated[int, Field(ge=1, lt=2**63)]
    input_error: NonNegativeFloat | None = None
    gradient_error: NonNegativeFloat | None = None
    curve: Curve = Curve()
    damping: PositiveFloat | None = None

    @property
    def taps(self) -> int:
        """Taps that the moment of its inputs tells apart."""
        return self.geometry.taps if self.inputs == "patches" else 1

    @property
    def n(self) -> int:
        """Side of that moment."""
        return self.geometry.in_channels * self.taps

    def sizes(self) -> dict[str, int]:
        """Numbers in each of its tensors."""
        sizes = {"inputs": packed(self.n), "mean": self.n}
        if p := self.directions:
            I, O, n = self.geometry.in_channels, self.geometry.out_channels, p * self.geometry.taps
            sizes |= {"directions": p * I, "along": packed(n), "cross": O * n}
        return sizes | ({"gradients": packed(self.geometry.out_channels)} if self.gradients else {})


@final
class Record(FileValue):
    """All that is said of a calibration, beside the numbers of its moments."""

    format: Annotated[int, AfterValidator(_current)] = FORMAT
    fingerprint: str
    weights: dict[str, str]
    outputs: Annotated[Categorical | Gaussian | FunctionName, Field(discriminator="kind")] | None
    samples: Annotated[int, Field(ge=1, lt=2**63)]
    held_out: Count
    batches: Annotated[int, Field(ge=1, lt=2**63)]
    passes: Annotated[int, Field(ge=1)]
    processes: Annotated[int, Field(ge=1)]
    tolerance: NonNegativeFloat | None
    converged: bool | None
    mask: str | None
    seed: int
    notes: tuple[str, ...]
    layers: dict[str, LayerRecord]
    together: Curve = Curve()
    saved: Saved | None = None

    @property
    def bytes(self) -> int:
        """What the moments take."""
        return 8 * sum(size for layer in self.layers.values() for size in layer.sizes().values())

    @property
    def largest_error(self) -> tuple[str, str, float] | None:
        """Layer, ``inputs`` or ``gradients``, and error of the moment that is known least."""
        errors = [
            (name, what, error)
            for name, layer in self.layers.items()
            for what, error in (("inputs", layer.input_error), ("gradients", layer.gradient_error))
            if error is not None
        ]
        return max(errors, key=lambda entry: entry[2], default=None)

    def __str__(self) -> str:
        """Some lines: samples, what there is of which layers, how well it is known, and notes."""
        patches = sum(layer.inputs == "patches" for layer in self.layers.values())
        gradients = sum(layer.gradients for layer in self.layers.values())
        read = "none" if self.outputs is None else f"of {gradients} layers, by {_said(self.outputs)}"
        lines = [
            f"{self.samples} samples, {self.held_out} of them held out; {quantity(self.bytes)}B",
            f"inputs: patches of {patches} layers, channels of {len(self.layers) - patches}; gradients: {read}",
        ]
        if worst := self.largest_error:
            state = {None: "", True: "converged: ", False: "not converged: "}[self.converged]
            lines.append(f"{state}the largest error is about {worst[2]:.2g}, of the {worst[1]} of {worst[0] or 'the network'}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The moments of one layer. Those of a layer that is called several times count all calls."""

    record: LayerRecord
    tensors: Mapping[str, Tensor]
    """Sums ``inputs`` and ``gradients`` in blocks of their upper half, and the ``mean``; of patches tap after tap. Where these
    are known along some directions of the channels alone: these, the sum along them, and that of the outputs with them."""
    items: int
    """How many items the sum of inputs is of."""

    @property
    def geometry(self) -> Geometry:
        """The layer."""
        return self.record.geometry

    @property
    def taps(self) -> int | None:
        """K where the moment of the inputs is of patches, in the order of ``W.flatten(1)``; None where it is of channels."""
        return self.geometry.taps if self.record.inputs == "patches" else None

    @property
    def rows(self) -> int:
        """Positions seen, over all items and calls."""
        return self.record.rows

    @property
    def input_error(self) -> float | None:
        """By how much H may differ from that of endless data: relative, in the Frobenius norm; None from a single batch."""
        return self.record.input_error

    @property
    def gradient_error(self) -> float | None:
        """The same for G, whose error is also that of the answers that were drawn."""
        return self.record.gradient_error

    def inputs(self) -> Tensor:
        """H, ``(I K, I K)`` or ``(I, I)``, float64, made anew at each call: Σ x xᵀ over all positions, divided by the items."""
        return tap_by_tap(self.tensors["inputs"], self.geometry.in_channels, self.record.taps).div_(self.items)

    def gradients(self) -> Tensor | None:
        """G, ``(O, O)``, float64, made anew at each call: Σ g gᵀ over all positions, by their number; None: not known."""
        if "gradients" not in self.tensors:
            return None
        return Gram(self.geometry.out_channels, self.tensors["gradients"]).dense().div_(self.rows)

    def channels(self) -> Tensor:
        """The moment of channels, ``(I, I)``, float64: of patches the mean over their taps."""
        return Gram(self.record.n, self.tensors["inputs"]).over_taps(self.record.taps).div_(self.items)

    def metric(self, damping: float | None = None, *, patches: bool = True) -> Metric:
        """What a change of the layer's weight costs, as the moments tell: twice the nats that it moves the answers by, an item.

        Args:
            damping: What each moment is damped by, as a share of its mean diagonal entry; None: by `damping`.
            patches: In the metric of patches, where there is one, or with what is known of them along directions; else in that
                of channels, which takes far less memory.
        """
        inputs, taps = (self.inputs(), self.taps) if patches else (self.channels(), None)
        damping, gradients = self.damping if damping is None else damping, self.gradients()
        metric = Metric.of(inputs, gradients, taps=taps, damping=damping)
        if not (patches and self.record.directions):
            return metric
        p, K = self.record.directions, self.geometry.taps
        H = tap_by_tap(self.tensors["along"], p, K)
        size = float(H.diagonal().mean()) or 1.0
        along = Metric.of(H, gradients, taps=K, damping=damping)
        cross = self.tensors["cross"].view(-1, p * K) / size
        return replace(metric, along=Along(self.tensors["directions"].view(p, -1), cross, along))

    @property
    def damping(self) -> float:
        """The damping under which the layer's factors lose least on held-out inputs; `DAMPING` where nothing was held out."""
        return self.record.damping or DAMPING

    @property
    def curve(self) -> Curve:
        """From the nats that the moments tell to those that the answers lose: see `curves`. Without points: not known."""
        return self.record.curve

    def mean(self) -> Tensor:
        """The mean input, ``(I K,)`` or ``(I,)``, float64: over items and positions, so a bias makes up for ΔW by −ΔW mean."""
        return self.tensors["mean"].view(self.record.taps, -1).T.flatten().clone()


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Calibration(Shown):
    """What `calibrate` found: the second moments of each layer's inputs and output gradients. Made by it or by `load`.

    Attributes:
        record: All that is said of it, as it stands in its file.
        layers: The moments, by the layers' names. Layers that were never called have none.
        outputs: How the network's answers were read; None where moments of inputs alone were made.
    """

    record: Record
    layers: Mapping[str, Moments]
    outputs: Outputs | None

    @property
    def samples(self) -> int:
        """Items seen, held out ones included; fewer than the data hold where the moments had converged before."""
        return self.record.samples

    @property
    def held_out(self) -> int:
        """How many of them are held out: every fourth batch, or item of the data in fewer batches."""
        return self.record.held_out

    @property
    def converged(self) -> bool | None:
        """Whether every moment's estimated error is within the tolerance; None where there was none."""
        return self.record.converged

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known of it: moments that are missing, and why."""
        return self.record.notes

    @property
    def together(self) -> Curve:
        """From the `coherence` of what layers lose alone to what they lose beyond the sum; without points: not known."""
        return self.record.together

    @property
    def identity(self) -> str:
        """What tells it from others: by its network, weights, data and settings."""
        return hashlib.sha256(self.record.model_dump_json(exclude={"saved"}).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """What its moments take."""
        return self.record.bytes

    @property
    def largest_error(self) -> tuple[str, str, float] | None:
        """The moment that is known least: layer, ``inputs`` or ``gradients``, and the relative error; None from a batch."""
        return self.record.largest_error

    def check(self, model: nn.Module) -> None:
        """Refuse any other network than the calibrated one, and other weights.

        Raises:
            CalibrationError: It is another network, or a tensor of it has changed; the message names the first one.
        """
        inner = unwrapped(model)
        if fingerprint(inner) != self.record.fingerprint:
            raise CalibrationError(
                "this calibration is of another network: its modules or shapes are not those of this one; calibrate again"
            )
        now = hashes(inner)
        changed = next((name for name, value in now.items() if self.record.weights.get(name) != value), None)
        if changed is not None or now.keys() != self.record.weights.keys():
            what = changed or next(iter(self.record.weights.keys() - now.keys()))
            raise CalibrationError(f"this calibration is of other weights: {what} is not what it was then; calibrate again")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save it in one stroke: ``calibration.json`` and its moments in safetensors; an earlier one is replaced.

        Args:
            folder: Where to; its parent folders are made.

        Raises:
            ArtifactError: The folder holds other files, or cannot be written.
        """
        tensors = {
            f"{what} of {name}": tensor for name, moments in self.layers.items() for what, tensor in moments.tensors.items()
        }
        write_folder(Path(folder), _FILE, self.record, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Load what `save` wrote. The moments lie in the file and are read when they are asked for.

        Raises:
            ArtifactError: A file is missing, damaged, of something else or of a newer format.
        """
        source = Path(folder)
        record, tensors = read_folder(source, _FILE, _read, what=_WHAT)
        by_layer: dict[str, dict[str, Tensor]] = {}
        for name, layer in record.layers.items():
            for what, size in layer.sizes().items():
                tensor = tensors.pop(f"{what} of {name}", None)
                if tensor is None or tuple(tensor.shape) != (size,):
                    raise ArtifactError(f"{source} is damaged: it holds no {what} of {name} with {size} numbers")
                by_layer.setdefault(name, {})[what] = tensor
        if tensors:
            raise ArtifactError(f"{source} is damaged: nothing is said of its {next(iter(tensors))}")
        return of(record.model_copy(update={"saved": None}), by_layer, _outputs(record.outputs))

    def __str__(self) -> str:
        """Some lines: samples, what there is of which layers, how well it is known, and notes."""
        return str(self.record)


def tap_by_tap(flat: Tensor, I: int, K: int) -> Tensor:
    """A sum of patches, which lies tap after tap, as a matrix in the order of ``W.flatten(1)``."""
    H = Gram(I * K, flat).dense()
    return H if K == 1 else H.view(K, I, K, I).permute(1, 0, 3, 2).reshape(I * K, -1)


def of(record: Record, tensors: Mapping[str, Mapping[str, Tensor]], outputs: Outputs | None) -> Calibration:
    """The value of a record and its numbers."""
    layers = {name: Moments(layer, tensors[name], record.samples) for name, layer in record.layers.items()}
    return Calibration(record, layers, outputs)


def hashes(model: nn.Module) -> dict[str, str]:
    """A hash of each tensor of a network's state."""
    return {name: digest({"": tensor})[:16] for name, tensor in state_of(model).items()}


def in_record(outputs: Outputs | None) -> Any:
    """Outputs as a file holds them."""
    return FunctionName(name=outputs.name) if isinstance(outputs, Own) else outputs


def _outputs(found: Any) -> Outputs | None:
    return Own(found.name) if isinstance(found, FunctionName) else found


def _said(outputs: Any) -> str:
    if isinstance(outputs, FunctionName):
        return outputs.name
    if isinstance(outputs, Categorical) and outputs.dim is not None:
        return f"Categorical(dim={outputs.dim})"
    return f"{type(outputs).__name__}()"


def _read(path: Path) -> Record:
    return read_model(
        path,
        Record,
        FORMAT,
        ArtifactError,
        unreadable=f"{path} is damaged",
        foreign=f"{path} is no calibration: it has no format number",
        needs="samples",
    )
