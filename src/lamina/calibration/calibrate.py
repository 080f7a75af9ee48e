"""The way from a network and unlabelled data to a Calibration: passes over the data, with hooks on a shadow of the network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import CalibrationError, CalibrationWarning, ExampleError
from ..network.copying import shadow
from ..network.fingerprint import fingerprint
from ..network.memory import devices_of
from ..network.patterns import selected
from ..network.placing import opened
from ..network.preserve import repeatable
from ..network.running import ANSWERING, outside_inference_mode, set_mode
from ..network.surgery import forbid_nonfinite_values
from ..network.trial import tried
from ..network.walk import Layer, walk
from ..network.wrappers import unwrapped
from ..progress import display
from ..values import Workload
from . import ranks
from .backward import Runner
from .batches import Batches
from .calibration import Calibration, Record, hashes, in_record, of
from .curves import with_curves
from .directions import with_directions
from .gram import home
from .notes import notes
from .outputs import Gaussian, Outputs, outputs_of
from .passes import Found, Work, all_passes
from .sums import plan_passes

_WORKSPACE = 2**26
"""Most bytes that are copied at a time, where the memory allows it."""


@outside_inference_mode
def calibrate(
    model: nn.Module,
    data: Any,
    *,
    outputs: Outputs | Callable[[Any], Tensor] | None = Gaussian(),  # noqa: B008 - a frozen value
    memory: float = 2e9,
    tolerance: float | None = 0.02,
    mask: str | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """See what a network is fed and what its answers depend on, layer by layer, on unlabelled data. The network is only read.

    A shadow of it is run, in eval mode: modes, gradients, buffers, hooks and random states are as before, whatever happens.

    Of each layer that can be decomposed three things are made, defined in `Moments`: the second moment of its inputs (patches
    where that fits the memory, else channels), their mean, and the second moment of the gradients at its output. Every fourth
    batch is held out, to choose a damping of them by. No labels are needed: answers are drawn from the network's own output.
    At last whole networks are run with layers cut, on some of the items, to learn what that truly costs: `Moments.curve`.
    Where no gradient can be had, moments of the inputs alone are made, with a warning. A layer that is never called has none,
    with a warning too. All is exact, borders included; values are the network's own, in its own dtype, and sums are float64.

    In several processes (``torch.distributed``) each one gives data of its own, and all get the sums of all.

    Args:
        model: A trained network, on the device and in the dtype in which it is used; autocast counts too.
        data: An iterable of batches, as `recalibrate` takes them: examples, or (input, target) pairs, whose targets are not
            looked at. Or one tensor, whose first dimension is divided into batches. Tensors are moved to the network's device.
            Some hundred items will do. Of fewer than four batches every fourth item is held out, by running it apart.
        outputs: How the output is read: `Categorical()` for class scores, `Gaussian()` for anything else, or a function from
            the output to a scalar, the log-likelihood of a drawn answer or a loss, summed over the items. None: no gradients.
        memory: Bytes that sums and copies may take, besides what the network itself takes to run, one copy of its weights, and
            some megabytes that the allocator holds back.
            Where not all layers fit at once, the data are gone through several times, and finished moments wait in the folder
            for temporary files; of data that can be iterated once only, such as a generator, fewer layers get patches.
        tolerance: Stop once the estimated relative error of every moment (Frobenius norm) is at most this, looked at after 8,
            16, 32, … batches. None: go through all data.
        mask: Name of the keyword argument in which the network is told which positions count, ``(B, T)``, as
            ``"attention_mask"``: others are left out of the moments of layers whose inputs are ``(B, T, I)``. By default
            padding counts like any position.
        include: Patterns as in the shell; only layers matching one of them are looked at. Empty: all.
        skip: Patterns; layers matching one are not.
        seed: Of the answers that are drawn.
        progress: Show a progress bar.

    Raises:
        CalibrationError: There is nothing to calibrate, the memory does not suffice, an option makes no sense, the output
            cannot be read in the way asked for, or a layer's inputs or gradients are not finite; the message names it.
        ExampleError: The data hold nothing, the network does not run on them, or they reach no layer.
        LayerError: A weight is not finite.
        PlanError: A pattern matches no layer.
    """
    asked = outputs_of(outputs)
    memory, tolerance = _positive("memory", memory, "bytes"), None if tolerance is None else _positive("tolerance", tolerance)
    network = unwrapped(model)
    layers = _layers(network, include, skip)
    if mask is not None and not isinstance(mask, str):
        raise CalibrationError(f"mask is {mask!r}; give the name of a keyword argument, such as 'attention_mask'")
    with repeatable(network), display(progress) as shown:
        with ranks.together():
            batches = Batches(data, devices_of(network)[0])
            runner = Runner(_shadow(network, layers.values(), batches.first()), asked, mask, seed)
        work = Work(runner, batches, layers, home(batches.device), min(memory / 16, _WORKSPACE), shown)
        planned = plan_passes({n: layer.geometry for n, layer in layers.items()}, asked is not None, memory, batches.again)
        found = all_passes(work, planned, tolerance)
        with_directions(work, found, memory)
        return with_curves(_value(network, work, len(planned), found, tolerance), network, layers, work.probes, memory, shown)


def calibration_on(model: nn.Module, data: Any, progress: bool = False) -> Calibration | None:
    """What a ``data`` argument says of a network: a calibration as it is, data by calibrating on them, None nothing.

    Raises:
        CalibrationError: The calibration is of another network or of other weights; and as `calibrate`.
    """
    if data is None:
        return None
    if not isinstance(data, Calibration):
        return calibrate(model, data, progress=progress)
    data.check(model)
    return data


def _shadow(network: nn.Module, layers: Iterable[Layer], first: Workload) -> nn.Module:
    """A shadow of the network in which every layer is called, in eval mode, once it was tried on the first batch.

    Raises:
        ExampleError: The network does not run on it.
    """
    outcome = tried(network, first, modes=[ANSWERING])
    if complaint := outcome.complaints[ANSWERING]:
        raise ExampleError(f"the network does not run on the data ({first}): {complaint}")
    twin = shadow(network, opened(layers), outcome.apart)
    set_mode(twin, False)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def _positive(name: str, value: Any, unit: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CalibrationError(f"{name} is {value!r}; it must be a positive number{unit and f' of {unit}'}")
    return float(value)


def _layers(network: nn.Module, include: Sequence[str], skip: Sequence[str]) -> dict[str, Layer]:
    """The layers that are wanted, in their order.

    Raises:
        CalibrationError: There are none, or the network has no values.
        LayerError: A weight is not finite.
    """
    census = walk(network)
    wanted = selected(list(census.layers), include, skip)
    layers = {name: layer for name, layer in census.layers.items() if name in wanted}
    if not layers:
        refused = next(iter(census.refused.items()), None)
        why = f" ({refused[0] or 'the network'}: {refused[1]})" if refused and not census.layers else ""
        raise CalibrationError(f"no layer of the network is to be calibrated{why}: nothing to do")
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_meta:
            raise CalibrationError(f"{name} is on the meta device: a network without values has no moments")
    # Here, since the data would be blamed: what is not finite is first seen in the inputs of the next layer.
    forbid_nonfinite_values(layers.values())
    return layers


def _value(network: nn.Module, work: Work, count: int, found: Found, tolerance: float | None) -> Calibration:
    """Put together what was found in so many passes, and say what is missing."""
    if not found:
        raise ExampleError(
            f"no layer of the network is called on the data ({len(work.layers)} were looked at): "
            "give data that reach one, or name others by include and skip"
        )
    runner, (fitted, held_out, seen) = work.runner, work.sizes
    records = {name: found[name][0] for name in work.layers if name in found}
    loud, quiet = notes(work, records)
    for note in loud:
        warnings.warn(note, CalibrationWarning, stacklevel=4)
    errors = [error for each in records.values() for error in (each.input_error, each.gradient_error) if error is not None]
    outputs = runner.outputs if runner.gradients else None
    record = Record(
        fingerprint=fingerprint(network),
        weights=hashes(network),
        outputs=in_record(outputs),
        samples=fitted + held_out,
        held_out=held_out,
        batches=seen,
        passes=count,
        processes=ranks.processes(),
        tolerance=tolerance,
        converged=None if tolerance is None else bool(errors) and max(errors) <= tolerance,
        mask=runner.mask,
        seed=runner.seed,
        notes=(*loud, *quiet),
        layers=records,
    )
    return of(record, {name: found[name][1] for name in records}, outputs)
