"""The way from a network and unlabelled data to a Calibration: passes over the data, with hooks on a shadow of the network."""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ExampleError
from ..network.copying import shadow
from ..network.fingerprint import fingerprint
from ..network.memory import devices_of
from ..network.observe import autocast_on
from ..network.patterns import selected
from ..network.preserve import repeatable
from ..network.running import ANSWERING, outside_inference_mode, run, said, set_mode
from ..network.trial import tried
from ..network.walk import Layer, walk
from ..network.wrappers import unwrapped
from ..progress import Display, display
from ..values import Workload
from . import ranks
from .batches import HELD_OUT, Batch, Batches, part_of
from .calibration import Calibration, LayerRecord, Record, hashes, in_record, of
from .gram import home
from .outputs import Gaussian, Outputs, Own, outputs_of, tensors_in
from .recorder import Recorder
from .scales import ITEMS, measured_scales
from .sums import Shape, Sums, passes

_WORKSPACE = 2**26
"""Most bytes that are copied at a time, where the memory allows it."""
_FEWEST_BATCHES = 8
"""Before the first look at the errors; then each time the batches have doubled. Who looks more often stops by luck."""
_SCALES = tuple(2.0**n for n in (15, 12, 9, 6, 3, 0))


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
    where that fits the memory, else channels; those of every fourth batch apart, to choose a damping by), their mean, and the
    second moment of the gradients at its output. Those need no labels: answers are drawn from the network's own output. Where
    no gradient can be had, moments of the inputs alone are made, with a warning. A layer that is never called has none, with a
    warning too. All is exact, borders included; values are the network's own, in its own dtype, and sums are float64.

    In several processes (``torch.distributed``) each one gives data of its own, and all get the sums of all.

    Args:
        model: A trained network, on the device and in the dtype in which it is used; autocast counts too.
        data: An iterable of batches, as `recalibrate` takes them: examples, or (input, target) pairs, whose targets are not
            looked at. Or one tensor, whose first dimension is divided into batches. Tensors are moved to the network's device.
            Some hundred items will do. Of fewer than four batches every fourth item is held out, by running it apart.
        outputs: How the output is read: `Categorical()` for class scores, `Gaussian()` for anything else, or a function from
            the output to a scalar, the log-likelihood of a drawn answer or a loss, summed over the items. None: no gradients.
        memory: Bytes that sums and copies may take, besides what the network itself takes to run. Where not all layers fit at
            once, the data are gone through several times, and finished moments wait in the folder for temporary files; of
            data that can be iterated once only, such as a generator, fewer layers get patches.
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
        PlanError: A pattern matches no layer.
    """
    asked = outputs_of(outputs)
    memory, tolerance = _positive("memory", memory, "bytes"), None if tolerance is None else _positive("tolerance", tolerance)
    network = unwrapped(model)
    layers = _layers(network, include, skip)
    if mask is not None and not isinstance(mask, str):
        raise CalibrationError(f"mask is {mask!r}; give the name of a keyword argument, such as 'attention_mask'")
    with repeatable(network), display(progress) as shown:
        work: _Work | None = None
        failure: Exception | None = None
        try:
            work = _prepared(network, Batches(data, devices_of(network)[0]), asked, mask, seed, memory, shown)
        except Exception as error:  # raised below, after other processes have heard of it
            failure = error
        ranks.fail_together(failure)
        assert work is not None
        planned = passes({n: layer.geometry for n, layer in layers.items()}, asked is not None, memory, work.batches.again)
        found = _all_passes(work, planned, tolerance)
        value = _value(network, layers, planned, work, found, tolerance)
        return _scaled(value, network, layers, work)


def _scaled(value: Calibration, network: nn.Module, layers: Mapping[str, Layer], work: _Work) -> Calibration:
    """The value with the scales of its layers, the mean over all processes; where divergences can be told."""
    outputs = value.outputs
    if outputs is None or isinstance(outputs, Own):
        return value
    known = {name: moments for name, moments in value.layers.items() if moments.record.gradients}
    logs = torch.zeros(len(known), dtype=torch.float64, device=work.home)
    failure: Exception | None = None
    try:

        def say(done: int) -> None:
            work.shown.say("measuring what a layer's answers lose", done, len(known))

        scales = measured_scales(network, layers, known, outputs, work.probes, say)
        logs += torch.tensor([math.log(scales.get(name, math.nan)) for name in known], dtype=torch.float64, device=work.home)
    except Exception as error:  # raised below, after other processes have heard of it
        failure = error
    ranks.fail_together(failure)
    ranks.added_up([logs])
    told = dict(zip(known, (logs / ranks.processes()).exp().tolist(), strict=True))
    records = {
        name: each.model_copy(update={"scale": scale}) if math.isfinite(scale := told.get(name, math.nan)) else each
        for name, each in value.record.layers.items()
    }
    tensors = {name: moments.tensors for name, moments in value.layers.items()}
    return of(value.record.model_copy(update={"layers": records}), tensors, outputs)


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


def _prepared(
    network: nn.Module, batches: Batches, outputs: Outputs | None, mask: str | None, seed: int, memory: float, shown: Display
) -> _Work:
    """Try the network on the first batch, and make its shadow.

    Raises:
        ExampleError: There is no batch, or the network does not run on it.
    """
    first = batches.first()
    outcome = tried(network, first, modes=[ANSWERING])
    if complaint := outcome.complaints[ANSWERING]:
        raise ExampleError(f"the network does not run on the data ({first}): {complaint}")
    twin = shadow(network, None, outcome.apart)
    set_mode(twin, False)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return _Work(twin, batches, outputs, mask, seed, home(batches.device), min(memory / 16, _WORKSPACE), shown)


def _positive(name: str, value: Any, unit: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CalibrationError(f"{name} is {value!r}; it must be a positive number{unit and f' of {unit}'}")
    return float(value)


def _layers(network: nn.Module, include: Sequence[str], skip: Sequence[str]) -> dict[str, Layer]:
    """The layers that are wanted, in their order.

    Raises:
        CalibrationError: There are none, or the network has no values.
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
    return layers


@final
@dataclass(slots=True)
class _Work:
    """The shadow and the data, and what is learnt of them on the way."""

    twin: nn.Module
    batches: Batches
    outputs: Outputs | None
    mask: str | None
    seed: int
    home: torch.device
    workspace: float
    shown: Display
    no_backward: str | None = None
    """Why there are no gradients, although they were asked for."""
    scale: float | None = None
    """What log-likelihoods are multiplied with; None until it is known."""
    counted: int | None = None
    """Batches of the first pass; the others go as far."""
    sizes: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Items fitted to, held out, and batches, in the last pass."""
    probes: list[Workload] = field(default_factory=list)
    """The first batches, for as long as it works: whole networks are run on them."""

    @property
    def gradients(self) -> bool:
        """Whether gradients are made."""
        return self.outputs is not None and self.no_backward is None


class _NoBackward(Exception):
    """A batch has given no gradients."""


Found = dict[str, tuple[LayerRecord, dict[str, Tensor]]]


def _all_passes(work: _Work, planned: list[dict[str, Shape]], tolerance: float | None) -> Found:
    """What each pass finds; of several each waits on disk for the others."""
    found: Found = {}
    if len(planned) == 1:
        return _in_step(work, planned[0], tolerance, ())
    # Mapped files outlive their names where the system lets them be removed; else they go with the process.
    with tempfile.TemporaryDirectory(prefix="lamina-", ignore_cleanup_errors=True) as folder:
        for number, shapes in enumerate(planned):
            made = _in_step(work, shapes, tolerance if number == 0 else None, (number + 1, len(planned)))
            _on_disk(made, Path(folder) / f"{number}")
            found |= made
    return found


def _on_disk(found: Found, folder: Path) -> None:
    """Let tensors lie in files, one after the other: never are two copies in memory."""
    folder.mkdir()
    for _, tensors in found.values():
        for what in list(tensors):
            tensor, path = tensors.pop(what), folder / f"{len(list(folder.iterdir()))}"
            tensor.numpy().tofile(path)
            tensors[what] = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=torch.float64)


def _in_step(work: _Work, shapes: Mapping[str, Shape], tolerance: float | None, which: tuple[int, ...]) -> Found:
    """One pass of all processes; a failure of one is a failure of all."""
    failure: Exception | None = None
    sums: dict[str, Sums] = {}
    try:
        sums = _one_pass(work, shapes, tolerance, which)
    except Exception as error:  # raised below, after the others have heard of it
        failure = error
    ranks.fail_together(failure)
    counts = torch.tensor([*work.sizes, *(each.rows for each in sums.values())], dtype=torch.float64, device=work.home)
    lost = torch.tensor([float(work.no_backward is not None)], device=work.home)
    ranks.added_up([lost])
    if float(lost) and work.no_backward is None:
        work.no_backward = "another process could compute none"
    ranks.added_up([counts, *(tensor for name in sorted(sums) for tensor in _kept(sums[name], work.gradients))])
    work.sizes = [int(n) for n in counts[:3].tolist()]
    for each, rows in zip(sums.values(), counts[3:].tolist(), strict=True):
        each.rows = int(rows)
    return {name: finished for name in list(sums) if (finished := _finished(sums.pop(name), work.gradients))}


def _kept(sums: Sums, gradients: bool) -> Iterator[Tensor]:
    if not gradients:
        sums.gradients = None
    return sums.tensors()


def _finished(sums: Sums, gradients: bool) -> tuple[LayerRecord, dict[str, Tensor]] | None:
    """One layer's moments, None where it was never called."""
    called, moved = (bool(n) for n in sums.reached.tolist())
    if not called or not sums.rows:
        return None
    tensors = {"fit": sums.inputs[0].flat, "held_out": sums.inputs[1].flat, "mean": sums.total / sums.rows}
    error = None
    if gradients and moved and sums.gradients is not None and sums.gradient_scatter is not None:
        tensors["gradients"], error = sums.gradients.flat, sums.gradient_scatter.error()
    record = LayerRecord(
        geometry=sums.shape.geometry,
        inputs="patches" if sums.shape.patches else "channels",
        gradients="gradients" in tensors,
        rows=sums.rows,
        input_error=sums.scatter.error(),
        gradient_error=error,
    )
    return record, {what: tensor.cpu() for what, tensor in tensors.items()}


def _one_pass(work: _Work, shapes: Mapping[str, Shape], tolerance: float | None, which: tuple[int, ...]) -> dict[str, Sums]:
    """Run the data, or as many of them as it takes, and add up."""
    generators: dict[torch.device, torch.Generator] = {}
    recorder = Recorder(_empty(work, shapes))
    look, what = _FEWEST_BATCHES, "calibrating" + (f", pass {which[0]} of {which[1]}" if which else "")
    work.sizes = [0, 0, 0]
    with repeatable(work.twin), recorder.recording(work.twin):
        for batch in itertools.islice(work.batches, work.counted):
            work.shown.say(what, batch.number, work.counted or len(work.batches) or None)
            try:
                _run(work, recorder, batch, generators)
            except _NoBackward as why:
                if work.sizes[2]:
                    raise ExampleError(f"no gradients can be computed on batch {batch.number} of the data: {why}") from why
                work.no_backward = str(why)
                recorder.sums = _empty(work, shapes)
                _run(work, recorder, batch, generators)
            _note(recorder, batch)
            room = ITEMS - sum(work.sizes[:2])
            if which[:1] in ((), (1,)) and room > 0:
                few = list(range(min(room, batch.items)))
                work.probes.append(part_of(batch.workload, few, batch.items))
            work.sizes[batch.held_out] += batch.items
            work.sizes[2] += 1
            if tolerance is not None and work.sizes[2] == look:
                look *= 2
                if all(error <= tolerance for error in _errors(recorder.sums.values(), work.gradients)):
                    break
    if work.counted is None:
        work.counted = work.sizes[2]
    return dict(recorder.sums)


def _empty(work: _Work, shapes: Mapping[str, Shape]) -> dict[str, Sums]:
    return {
        name: Sums(Shape(s.geometry, s.patches, work.gradients), work.home, int(work.workspace)) for name, s in shapes.items()
    }


def _errors(sums: Any, gradients: bool) -> Iterator[float]:
    """Of all moments that there are; infinite where one is not known."""
    for each in sums:
        called, moved = (bool(n) for n in each.reached.tolist())
        if called:
            yield math.inf if (error := each.scatter.error()) is None else error
        if moved and gradients:
            yield 0.0 if (error := each.gradient_scatter.error()) is None else error


def _run(work: _Work, recorder: Recorder, batch: Batch, generators: dict[torch.device, torch.Generator]) -> None:
    """Run one batch, forward and, where there are gradients, backward."""
    mask = _mask(work.mask, batch.workload)
    if not work.gradients:
        with torch.no_grad(), recorder.running(batch.held_out, mask):
            run(work.twin, batch.workload)
        return
    if work.scale is None:
        work.scale = _scale(work, recorder, batch, mask, generators)
    recorder.scale = work.scale
    _both_ways(work, recorder, batch, mask, generators)


def _both_ways(
    work: _Work, recorder: Recorder, batch: Batch, mask: Tensor | None, generators: dict[torch.device, torch.Generator]
) -> None:
    assert work.outputs is not None
    with torch.enable_grad():
        try:
            with recorder.running(batch.held_out, mask):
                output = run(work.twin, batch.workload)
        except ExampleError as error:
            raise _NoBackward(str(error)) from error  # if it does not run without them either, that is said next
        value = work.outputs.log_likelihood(output, _generator(generators, output, work.seed))
        if not value.requires_grad:
            raise _NoBackward("none leads from its output to a layer")
        try:
            # Not backward(), which would leave gradients at weights that a shadow cannot stand for.
            torch.autograd.grad(value * recorder.scale, recorder.roots, allow_unused=True)
        except RuntimeError as error:
            raise _NoBackward(said(error)) from error


def _scale(
    work: _Work, recorder: Recorder, batch: Batch, mask: Tensor | None, generators: dict[torch.device, torch.Generator]
) -> float:
    """What keeps the gradients of a network in float16 from underflow: as much as they bear, with room for larger ones."""
    dtypes = {p.dtype for p in work.twin.parameters()} | {autocast_on(devices_of(work.twin)[0].type)}
    if not dtypes & {torch.float16, "float16"}:
        return 1.0
    try:
        for scale in _SCALES:
            recorder.scale, recorder.largest = scale, 0.0
            _both_ways(work, recorder, batch, mask, generators)
            if recorder.largest < 2.0**12:
                return scale
    finally:
        recorder.largest = None
        generators.clear()
    return 1.0


def _note(recorder: Recorder, batch: Batch) -> None:
    """End a batch.

    Raises:
        CalibrationError: A moment is not finite.
    """
    finite = {name: sums.end_batch(batch.items, batch.held_out) for name, sums in recorder.sums.items()}
    for number, what in enumerate(("inputs", "gradients")):  # inputs that are not spoil gradients before them
        for name, each in finite.items():
            if not each[number]:
                raise CalibrationError(
                    f"{name or 'the network'}: its {what} hold NaN or infinities in batch {batch.number} of the data"
                )


def _mask(name: str | None, workload: Workload) -> Tensor | None:
    if name is None:
        return None
    mask = workload.kwargs.get(name)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ExampleError(f"a batch of the data has no keyword argument {name}, a tensor (B, T), which mask names")
    return mask.bool()


def _generator(made: dict[torch.device, torch.Generator], output: Any, seed: int) -> torch.Generator:
    """The one that draws answers, on the device of an output; every process draws its own."""
    device = next((tensor.device for tensor in tensors_in(output)), torch.device("cpu"))
    if device not in made:
        made[device] = torch.Generator(device).manual_seed(seed + ranks.rank())
    return made[device]


def _value(
    network: nn.Module,
    layers: Mapping[str, Layer],
    planned: list[dict[str, Shape]],
    work: _Work,
    found: Found,
    tolerance: float | None,
) -> Calibration:
    """Put together what was found, and say what is missing."""
    if not found:
        raise ExampleError(f"no layer of the network is called on the data ({len(layers)} were looked at)")
    fitted, held_out, batches = work.sizes
    records = {name: found[name][0] for name in layers if name in found}
    notes, loud = _notes(layers, records, planned, work)
    for note in loud:
        warnings.warn(note, stacklevel=4)
    errors = [error for each in records.values() for error in (each.input_error, each.gradient_error) if error is not None]
    record = Record(
        fingerprint=fingerprint(network),
        weights=hashes(network),
        outputs=in_record(work.outputs if work.gradients else None),
        samples=fitted + held_out,
        held_out=held_out,
        batches=batches,
        passes=len(planned),
        processes=ranks.processes(),
        tolerance=tolerance,
        converged=None if tolerance is None else bool(errors) and max(errors) <= tolerance,
        mask=work.mask,
        seed=work.seed,
        notes=(*loud, *notes),
        layers=records,
    )
    return of(record, {name: found[name][1] for name in records}, work.outputs if work.gradients else None)


def _notes(
    layers: Mapping[str, Layer], records: Mapping[str, LayerRecord], planned: list[dict[str, Shape]], work: _Work
) -> tuple[list[str], list[str]]:
    """What should be known, quietly and aloud."""
    notes, loud = [], []
    if work.no_backward is not None:
        loud.append(f"no gradients can be computed ({work.no_backward}): there are moments of inputs alone")
    if unseen := [name for name in layers if name not in records]:
        loud.append(f"{_some(unseen)} never called on these data: no moments")
    if work.gradients and (blind := [name for name, record in records.items() if not record.gradients]):
        loud.append(f"{_some(blind)} reached by no gradient: moments of inputs alone")
    shapes = {name: s for each in planned for name, s in each.items()}
    if channels := [n for n, r in records.items() if r.geometry.taps > 1 and not shapes[n].patches]:
        why = "more memory would give patches" + ("" if work.batches.again else ", or data that can be iterated more than once")
        notes.append(f"{_some(channels)} known by channels, not by patches: {why}")
    if not work.sizes[1]:
        notes.append(f"nothing is held out: the data hold fewer than {HELD_OUT} items")
    return notes, loud


def _some(names: list[str]) -> str:
    shown = ", ".join(name or "the network" for name in names[:3])
    if len(names) > 3:
        return f"{shown} and {len(names) - 3} more layers are"
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
