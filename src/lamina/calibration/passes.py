"""Passes over the data: each makes the sums of some layers, until they are known well enough; then these become moments."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ..errors import CalibrationError, ExampleError
from ..network.preserve import repeatable
from ..network.walk import Layer
from ..progress import Display
from ..values import Workload
from . import ranks
from .backward import NoBackward, Runner
from .batches import Batch, Batches, part_of
from .calibration import LayerRecord
from .damping import GRID, Pair, held_out_losses
from .probes import MOST
from .recorder import Recorder
from .sums import Shape, Sums

_FEWEST_BATCHES = 8
"""Before the first look at the errors; then each time the batches have doubled. Who looks more often stops by luck."""

Found = dict[str, tuple[LayerRecord, dict[str, Tensor]]]


@final
@dataclass(slots=True)
class Work:
    """What passes share: the network, the data, and what is learnt of these on the way."""

    runner: Runner
    batches: Batches
    layers: Mapping[str, Layer]
    home: torch.device
    """Where sums are kept."""
    workspace: float
    shown: Display
    counted: int | None = None
    """Batches of the first pass; the others go as far."""
    sizes: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Items fitted to, held out, and batches, in the last pass."""
    probes: list[Workload] = field(default_factory=list)
    """The first batches, for as long as it works: whole networks are run on them."""


def all_passes(work: Work, planned: list[dict[str, Shape]], tolerance: float | None) -> Found:
    """What each pass finds; of several each waits on disk for the others."""
    if len(planned) == 1:
        return _in_step(work, planned[0], tolerance, "calibrating")
    found: Found = {}
    # Mapped files outlive their names where the system lets them be removed; else they go with the process.
    with tempfile.TemporaryDirectory(prefix="lamina-", ignore_cleanup_errors=True) as folder:
        for number, shapes in enumerate(planned, 1):
            what = f"calibrating, pass {number} of {len(planned)}"
            made = _in_step(work, shapes, tolerance if number == 1 else None, what)
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


def _in_step(work: Work, shapes: Mapping[str, Shape], tolerance: float | None, what: str) -> Found:
    """One pass of all processes, whose sums are added up."""
    with ranks.together():
        sums = _one_pass(work, shapes, tolerance, what)
    counts = torch.tensor([*work.sizes, *(each.rows for each in sums.values())], dtype=torch.float64, device=work.home)
    lost = torch.tensor([float(work.runner.no_backward is not None)], device=work.home)
    ranks.added_up([lost])
    if float(lost) and work.runner.no_backward is None:
        work.runner.no_backward = "another process could compute none"
    if not work.runner.gradients:
        for each in sums.values():
            each.gradients = None
    ranks.added_up([counts, *(tensor for name in sorted(sums) for tensor in sums[name].tensors())])
    work.sizes = [int(n) for n in counts[:3].tolist()]
    for each, rows in zip(sums.values(), counts[3:].tolist(), strict=True):
        each.rows = int(rows)
    reached = {name: [bool(n) for n in each.reached.tolist()] for name, each in sums.items() if each.rows}
    called = {name: moved for name, (called, moved) in reached.items() if called}
    with ranks.together():
        losses = {name: _held_out_losses(work, name, sums[name], moved) for name, moved in called.items()}
    ranks.added_up(losses.values())  # rounding may differ between machines, and all must choose alike
    # Taken out one by one, so that nothing is kept of those that are done.
    return {name: _finished(sums.pop(name), moved, _best(losses[name])) for name, moved in called.items()}


def _held_out_losses(work: Work, name: str, sums: Sums, moved: bool) -> Tensor:
    """What a layer's factors lose on what was held out, for each damping; NaN where nothing can be told."""
    fitted, held_out, _ = work.sizes
    if not fitted or not held_out or sums.shape.geometry.groups > 1:  # whose groups have metrics of their own
        return torch.full((len(GRID),), math.nan, dtype=torch.float64, device=work.home)
    held = Pair(sums.held_out.dense(), None)
    fit = Pair(sums.inputs.over_taps(sums.shape.taps) - held.inputs, None)
    if moved and sums.gradients is not None and sums.held_out_gradients is not None:
        there = sums.held_out_gradients.dense()
        held, fit = Pair(held.inputs, there), Pair(fit.inputs, sums.gradients.dense() - there)
    return held_out_losses(work.layers[name].weight, fit, held)


def _best(losses: Tensor) -> float | None:
    """The damping that loses least, None where nothing can be told."""
    known = losses.nan_to_num(math.inf)
    return GRID[int(known.argmin())] if bool(known.isfinite().any()) else None


def _finished(sums: Sums, moved: bool, damping: float | None) -> tuple[LayerRecord, dict[str, Tensor]]:
    """One layer's moments."""
    tensors = {"inputs": sums.inputs.flat, "mean": sums.total / sums.rows}
    error = None
    if moved and sums.gradients is not None and sums.gradient_scatter is not None:
        tensors["gradients"], error = sums.gradients.flat, sums.gradient_scatter.error()
    record = LayerRecord(
        geometry=sums.shape.geometry,
        inputs="patches" if sums.shape.patches else "channels",
        gradients="gradients" in tensors,
        rows=sums.rows,
        input_error=sums.scatter.error(),
        gradient_error=error,
        damping=damping,
    )
    return record, {what: tensor.cpu() for what, tensor in tensors.items()}


def _one_pass(work: Work, shapes: Mapping[str, Shape], tolerance: float | None, what: str) -> dict[str, Sums]:
    """Run the data, or as many of them as it takes, and add up."""
    runner, recorder = work.runner, Recorder(_empty(work, shapes))
    look, first = _FEWEST_BATCHES, work.counted is None
    work.sizes = [0, 0, 0]
    runner.begin()
    with repeatable(runner.twin), recorder.recording(runner.twin):
        for batch in itertools.islice(work.batches, work.counted):
            work.shown.say(what, batch.number, work.counted or len(work.batches) or None)
            try:
                runner.run(recorder, batch)
            except NoBackward as why:
                if work.sizes[2]:
                    raise ExampleError(f"no gradients can be computed on batch {batch.number} of the data: {why}") from why
                runner.no_backward = str(why)
                recorder.sums = _empty(work, shapes)
                runner.run(recorder, batch)
            _end(recorder, batch)
            if first:
                _keep(work, batch)
            work.sizes[batch.held_out] += batch.items
            work.sizes[2] += 1
            if tolerance is not None and work.sizes[2] == look:
                look *= 2
                if all(error <= tolerance for error in _errors(recorder.sums.values())):
                    break
    work.counted = work.sizes[2]
    return dict(recorder.sums)


def _keep(work: Work, batch: Batch) -> None:
    """Keep the first items of the data, so many as the workspace holds, a few at least."""
    room = MOST - sum(work.sizes[:2])
    held = sum(t.numel() * t.element_size() for kept in (*work.probes, batch.workload) for t in kept.tensors)
    if room > 0 and (held <= work.workspace or not work.probes):
        work.probes.append(part_of(batch.workload, list(range(min(room, batch.items))), batch.items))


def _empty(work: Work, shapes: Mapping[str, Shape]) -> dict[str, Sums]:
    gradients = work.runner.gradients
    return {name: Sums(Shape(s.geometry, s.patches, gradients), work.home, int(work.workspace)) for name, s in shapes.items()}


def _errors(sums: Iterable[Sums]) -> Iterator[float]:
    """Of all moments that there are; infinite where one is not known."""
    for each in sums:
        called, moved = (bool(n) for n in each.reached.tolist())
        if called:
            yield math.inf if (error := each.scatter.error()) is None else error
        if moved and each.gradient_scatter is not None:
            yield 0.0 if (error := each.gradient_scatter.error()) is None else error


def _end(recorder: Recorder[Sums], batch: Batch) -> None:
    """End a batch.

    Raises:
        CalibrationError: A moment is not finite.
    """
    finite = {name: sums.end_batch(batch.items) for name, sums in recorder.sums.items()}
    for number, what in enumerate(("inputs", "gradients")):  # inputs that are not spoil gradients before them
        for name, each in finite.items():
            if not each[number]:
                raise CalibrationError(
                    f"{name or 'the network'}: its {what} hold NaN or infinities in batch {batch.number} of the data; "
                    "leave that batch out, or skip the layer; in float16 try bfloat16 or float32"
                )
