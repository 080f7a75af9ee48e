"""What should be known of a calibration: moments that are missing, and why."""

from __future__ import annotations

from collections.abc import Mapping

from .batches import HELD_OUT
from .calibration import LayerRecord
from .passes import Work


def notes(work: Work, records: Mapping[str, LayerRecord]) -> tuple[list[str], list[str]]:
    """What there is to say of the layers of these records and of those without one, aloud and quietly."""
    quiet, loud = [], []
    if work.runner.no_backward is not None:
        loud.append(f"no gradients can be computed ({work.runner.no_backward}): there are moments of inputs alone")
    if unseen := [name for name in work.layers if name not in records]:
        loud.append(f"{_some(unseen)} never called on these data: no moments")
    if work.runner.gradients and (blind := [name for name, record in records.items() if not record.gradients]):
        loud.append(f"{_some(blind)} reached by no gradient: moments of inputs alone")
    if along := {name: record.directions for name, record in records.items() if record.directions}:
        few = ", ".join(str(number) for number in sorted(set(along.values())))
        quiet.append(f"{_some(list(along))} known by patches along {few} directions of the channels, not of all")
    if coarse := [
        name for name, record in records.items() if record.geometry.patchable and record.taps == 1 and not record.directions
    ]:
        why = "more memory would give patches" + ("" if work.batches.again else ", or data that can be iterated more than once")
        quiet.append(f"{_some(coarse)} known by channels, not by patches: {why}")
    if not work.sizes[1]:
        quiet.append(f"nothing is held out: the data hold fewer than {HELD_OUT} items")
    return loud, quiet


def _some(names: list[str]) -> str:
    shown = ", ".join(name or "the network" for name in names[:3])
    if len(names) > 3:
        return f"{shown} and {len(names) - 3} more layers are"
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
