"""Checkpoints: everything a training needs to go on as if it had never been stopped, on disk whole or not at all. No pickle.

A checkpoint is a folder ``step-00000240``: a saved network (``plan.json`` and its weights, which `lamina.load` reads) with
``training.json`` and ``training.safetensors`` beside it, which hold the rest. It is written under another name and renamed, so
a half-written one is never picked up. ``last`` and ``best`` are links to two of them.

The rest is any nesting of dicts, lists, tuples, numbers and strings with tensors in it; `packed` takes it apart into JSON and
tensors, `unpacked` puts it together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..artifact import PLAN
from ..errors import ArtifactError, LaminaError, TrainingError
from ..folder import read_folder, read_tensors, write_folder, write_tensors
from ..plan import Plan

STATE, WEIGHTS, TENSORS = "training.json", "model.safetensors", "training.safetensors"
FORMAT = 2
_UNFINISHED = ".unfinished-"
_NAME = re.compile(r"step-(\d{8,})")


@final
@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where and how often a training is kept.

    Args:
        folder: The training's own folder; on many machines one that all of them see.
        every: Steps of the optimizer between two checkpoints inside an epoch; None for one at each epoch's end only, which is
            written in any case.
        keep: So many of the newest are kept, and the one of the best epoch.
        resume: Go on from the newest checkpoint in the folder. Without it, a folder that holds any is an error.

    Raises:
        TrainingError: A number makes no sense.
    """

    folder: str | os.PathLike[str]
    every: int | None = None
    keep: int = 2
    resume: bool = True

    def __post_init__(self) -> None:
        for name, number in (("every", self.every), ("keep", self.keep)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise TrainingError(f"{name} is {number!r}; it must be a whole number of 1 or more")


@final
@dataclass(frozen=True, slots=True)
class Content:
    """What one checkpoint holds: the network's weights by name, its plan where it has one, and everything else."""

    weights: dict[str, Tensor]
    plan: Plan | None
    state: dict[str, Any]


class _Damaged(Exception):
    """A checkpoint is not what was written."""


def write(options: Checkpoints, step: int, content: Content) -> Path:
    """Write the checkpoint of a step; it is there whole or not at all.

    Raises:
        TrainingError: The folder cannot be written, or the state holds something that JSON and safetensors cannot.
    """
    folder = Path(options.folder)
    target = folder / f"step-{step:08d}"
    tensors: dict[str, Tensor] = {}
    state = packed(content.state, tensors, "state")
    scratch: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED))
        if content.plan is not None:
            write_folder(scratch, PLAN, content.plan, content.weights)
            hashes = {}
        else:
            hashes = {WEIGHTS: write_tensors(scratch / WEIGHTS, content.weights)}
        hashes[TENSORS] = write_tensors(scratch / TENSORS, tensors)
        text = json.dumps({"hashes": hashes, "state": state})
        head = {"format": FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        (scratch / STATE).write_text(json.dumps({**head, "state": text}) + "\n", encoding="utf-8")
        for entry in scratch.iterdir():
            entry.chmod(0o644)
            _sync(entry)
        scratch.chmod(0o755)
        _remove(target)  # a damaged one that was passed over
        os.replace(scratch, target)
        _sync(folder)
    except (OSError, SafetensorError, ArtifactError) as error:
        raise TrainingError(f"the checkpoint {target} cannot be written: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def settle(options: Checkpoints, best: int | None) -> None:
    """Point ``last`` and ``best`` at their checkpoints, remove those that are too old, and what a killed run left half-written.

    Args:
        options: The folder, and how many to keep.
        best: The step of the best epoch's checkpoint.
    """
    folder = Path(options.folder)
    steps = _steps(folder)
    if not steps:
        return
    _point(folder / "last", steps[0][1].name)
    kept = {step for step, _ in steps[: options.keep]}
    for step, path in steps:
        if step == best:
            _point(folder / "best", path.name)
        elif step not in kept:
            _remove(path)
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


def newest(options: Checkpoints) -> Path | None:
    """The newest whole checkpoint in the folder, None where there is none.

    One that is damaged is passed over with a warning.

    Raises:
        TrainingError: There are checkpoints, but ``resume`` is False, or all of them are damaged.
    """
    steps = _steps(Path(options.folder))
    if not steps:
        return None
    if not options.resume:
        raise TrainingError(f"{options.folder} holds checkpoints of an earlier training: choose another folder, or resume=True")
    complaints = []
    for _, path in steps:
        try:
            _read(path)
        except _Damaged as damage:
            complaints.append(str(damage))
            continue
        for complaint in complaints:
            warnings.warn(f"{complaint}; going on from {path.name} instead", stacklevel=2)
        return path
    raise TrainingError(f"no checkpoint in {options.folder} is whole: {complaints[0]}; remove the folder to begin anew")


def read(path: Path) -> Content:
    """Read one checkpoint.

    Raises:
        TrainingError: It is damaged.
    """
    try:
        return _read(path)
    except _Damaged as damage:
        raise TrainingError(str(damage)) from damage


def packed(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """A value as JSON, its tensors put into ``tensors`` under the names of their places.

    Tuples, tensors, counters and dicts whose keys are no strings become ``{"$kind": …}``, so that they come back as what they
    were.

    Raises:
        TrainingError: Something else is in there; the message says where.
    """
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"$tensor": place}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"$tuple": [packed(item, tensors, f"{place}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [packed(item, tensors, f"{place}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value) and not isinstance(value, Counter):
            return {key: packed(item, tensors, f"{place}.{key}") for key, item in value.items()}
        items = [
            [packed(key, tensors, f"{place}.key{i}"), packed(item, tensors, f"{place}.{i}")]
            for i, (key, item) in enumerate(value.items())
        ]
        return {"$counter" if isinstance(value, Counter) else "$items": items}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy's
        return value.item()
    raise TrainingError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold without pickle")


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `packed` took apart."""
    if isinstance(value, list):
        return [unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (kind, inside), *_ = value.items()
        if kind == "$tensor":
            return tensors[inside]
        if kind == "$tuple":
            return tuple(unpacked(item, tensors) for item in inside)
        if kind in ("$items", "$counter"):
            pairs = {unpacked(key, tensors): unpacked(item, tensors) for key, item in inside}
            return Counter(pairs) if kind == "$counter" else pairs
    return {key: unpacked(item, tensors) for key, item in value.items()}


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _read(path: Path) -> Content:
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        number, text, written = (content[key] for key in ("format", "state", "sha256"))
        if number > FORMAT:
            raise TrainingError(
                f"{path} was written by a newer lamina (format {number}, this one reads {FORMAT}): upgrade lamina"
            )
        if hashlib.sha256(text.encode()).hexdigest() != written:
            raise _Damaged(f"{path} is damaged: {STATE} was changed")
        rest = json.loads(text)
        plan = None
        if WEIGHTS in rest["hashes"]:
            weights = read_tensors(path / WEIGHTS, rest["hashes"][WEIGHTS])
        else:
            saved, weights = read_folder(path, PLAN, Plan.read)
            plan = saved.model_copy(update={"saved": None})
        state = unpacked(rest["state"], _copied(read_tensors(path / TENSORS, rest["hashes"][TENSORS])))
    except (OSError, SafetensorError, LaminaError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TrainingError):
            raise
        raise _Damaged(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return Content(_copied(weights), plan, state)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Out of the file, whose pieces lie at odd addresses, where matrix products round otherwise."""
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in tensors.items()}


def _point(link: Path, target: str) -> None:
    """Make a link, or point it elsewhere, in one go."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    fresh = link.with_name(f"{_UNFINISHED}{link.name}")
    with contextlib.suppress(OSError):  # a file system without links: the folders speak for themselves
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        os.replace(fresh, link)


def _remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that a half-removed one is never picked up."""
    if path.exists():
        grave = path.with_name(f"{_UNFINISHED}{path.name}")
        shutil.rmtree(grave, ignore_errors=True)
        os.replace(path, grave)
        shutil.rmtree(grave, ignore_errors=True)


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # folders cannot be opened everywhere
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
