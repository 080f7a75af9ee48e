"""Checkpoints: everything a training needs to go on as if it had never been stopped, on disk whole or not at all. No pickle.

A checkpoint is a folder ``step-00000240``: a saved network (``plan.json`` and its weights, which `lamina.load` reads) with
``training.json`` and ``training.safetensors`` beside it, which hold the rest. Of a sharded network each process writes its part
into ``parts``, by `torch.distributed.checkpoint`, and the saved network is made only where it is asked for.
``training.json`` is the manifest: it names every other file with its hash. The folder is written under another name and
renamed, so a half-written one is never picked up. ``last`` and ``best`` are links to two of them.

The rest is any nesting of dicts, lists, tuples, numbers, strings and arrays with tensors in it; `packed` takes it apart into
JSON and tensors, `unpacked` puts it together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..artifact import PLAN
from ..errors import ArtifactError, LaminaError, TrainingError, TrainingWarning
from ..files import fsync_directory, write_whole
from ..folder import read_tensors, write_folder, write_tensors
from ..network.running import said
from ..plan import Plan
from ..values import dtype_name
from .distributed import from_first, is_spread, processes, rank, together

STATE, WEIGHTS, TENSORS, PARTS = "training.json", "model.safetensors", "training.safetensors", "parts"
FORMAT = 3
_UNFINISHED, _DAMAGED = ".unfinished-", "damaged-"
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
        whole: Of a network that is spread by ``fully_shard``, write a saved network as well, gathered by process 0. Checkpoints
            of other networks are saved networks in any case.

    Raises:
        TrainingError: A number makes no sense.
    """

    folder: str | os.PathLike[str]
    every: int | None = None
    keep: int = 2
    resume: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        for name, number in (("every", self.every), ("keep", self.keep)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise TrainingError(f"{name} is {number!r}; it must be a whole number of 1 or more")


@final
@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of which each process has written its part: its place in the files, to be filled in."""

    place: str
    shape: torch.Size
    dtype: torch.dtype


@final
@dataclass(frozen=True, slots=True)
class Content:
    """What one checkpoint holds: the network's weights by name where they are whole, its plan, and everything else."""

    weights: dict[str, Tensor] | None
    plan: Plan | None
    state: dict[str, Any]
    path: Path | None = None


class _Damaged(TrainingError):
    """A checkpoint is not what was written."""


def write(options: Checkpoints, step: int, content: Content, best: int | None = None) -> Path:
    """Write the checkpoint of a step, whole or not at all, and `settle`; every process must call this.

    Raises:
        TrainingError: The folder cannot be written, or the state holds something that JSON and safetensors cannot.
    """
    folder = Path(options.folder)
    target = folder / f"step-{step:08d}"
    tensors: dict[str, Tensor] = {}
    scratch: Path | None = None
    hashes: dict[str, str] = {}
    try:
        with together(), _named(target):
            state = packed(content.state, tensors, "state")
            if rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                scratch = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
                scratch.mkdir()
                hashes = _write_network(scratch, content)
        if spread := {place: tensor for place, tensor in tensors.items() if is_spread(tensor)}:
            _write_parts(from_first(scratch) / PARTS, spread, target)
        with together(), _named(target):
            if scratch is not None:
                kept = {place: tensor for place, tensor in tensors.items() if place not in spread}
                hashes[TENSORS] = write_tensors(scratch / TENSORS, kept)
                _write_manifest(scratch, hashes, state)
                _remove(target)  # one that stands already
                os.replace(scratch, target)
                fsync_directory(folder)
                settle(options, best)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def _named(target: Path) -> Any:
    try:
        yield
    except (OSError, SafetensorError, ArtifactError) as error:
        raise TrainingError(f"the checkpoint {target} cannot be written: {error}") from error


def _write_parts(folder: Path, spread: dict[str, Tensor], target: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(spread, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise TrainingError(f"the checkpoint {target} cannot be written: {_first(error)}") from error


def fill(content: Content, parts: dict[str, Tensor]) -> None:
    """Read tensors of which each process has written its part into others of their shapes, by their places.

    The others may be spread as they like, over as many processes as there are.

    Raises:
        TrainingError: They cannot be read.
    """
    if not parts:
        return
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    assert content.path is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone
            reader = HuggingFaceStorageReader(str(content.path / PARTS))
            load(dict(parts), storage_reader=reader, no_dist=processes() == 1)
    except CheckpointException as error:
        raise TrainingError(f"{content.path} cannot be read: {_first(error)}") from error


def _first(error: Any) -> str:
    """What the first of the processes said, without its traceback; all of them know."""
    cause: BaseException = next(iter(error.failures.values()))[0]
    return said(cause)


def _write_network(scratch: Path, content: Content) -> dict[str, str]:
    """The network and its plan, where they are whole; the hash of the weights' file."""
    if content.weights is None:
        return {}
    if content.plan is None:
        return {WEIGHTS: write_tensors(scratch / WEIGHTS, content.weights)}
    write_folder(scratch, PLAN, content.plan, content.weights)
    saved = Plan.read(scratch / PLAN).saved
    assert saved is not None
    return {saved.weights: saved.sha256}


def _write_manifest(scratch: Path, hashes: dict[str, str], state: Any) -> None:
    """The hash of every file, and the state."""
    files = [path for path in scratch.rglob("*") if path.is_file()]
    hashes |= {name: _hash(path) for path in files if (name := str(path.relative_to(scratch))) not in hashes}
    text = json.dumps({"hashes": hashes, "state": state})
    head = {"format": FORMAT, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_whole(scratch / STATE, (json.dumps({**head, "state": text}) + "\n").encode())


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


def newest(options: Checkpoints) -> Content | None:
    """The newest whole checkpoint in the folder, None where there is none.

    One that is damaged is passed over with a warning and renamed aside, so that it does not count among those that are kept.

    Raises:
        TrainingError: There are checkpoints, but ``resume`` is False, or all of them are damaged.
    """
    steps = _steps(Path(options.folder))
    if not steps:
        return None
    if not options.resume:
        raise TrainingError(f"{options.folder} holds checkpoints of an earlier training: choose another folder, or resume=True")
    damaged: dict[Path, str] = {}
    for _, path in steps:
        try:
            content = read(path)
        except _Damaged as damage:
            damaged[path] = str(damage)
            continue
        for bad, complaint in damaged.items():
            aside = bad.with_name(f"{_DAMAGED}{bad.name}")
            _remove(aside)
            os.replace(bad, aside)
            warnings.warn(
                f"{complaint}; it is {aside.name} now, going on from {path.name} instead", TrainingWarning, stacklevel=2
            )
        return content
    raise TrainingError(
        f"no checkpoint in {options.folder} is whole: {next(iter(damaged.values()))}; remove the folder to begin anew"
    )


def read(path: Path) -> Content:
    """Read one checkpoint.

    Raises:
        TrainingError: It is damaged, or of another format.
    """
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        number, text, written = (content[key] for key in ("format", "state", "sha256"))
        if number != FORMAT:
            which = "a newer" if number > FORMAT else "an older"
            raise TrainingError(
                f"{path} was written by {which} lamina (format {number}, this one reads {FORMAT}): use that one"
            )
        if hashlib.sha256(text.encode()).hexdigest() != written:
            raise ArtifactError(f"{STATE} was changed")
        rest = json.loads(text)
        files: dict[str, dict[str, Tensor]] = {}
        for name, wanted in rest["hashes"].items():
            if name.endswith(".safetensors") and "/" not in name:
                files[name] = _copied(read_tensors(path / name, wanted))
            elif rank() == 0 and _hash(path / name) != wanted:  # once is enough: the others read parts only
                raise ArtifactError(f"{name} was changed")
        state = unpacked(rest["state"], files.pop(TENSORS))
        plan = Plan.read(path / PLAN).model_copy(update={"saved": None}) if PLAN in rest["hashes"] else None
    except TrainingError:
        raise
    except (OSError, SafetensorError, LaminaError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{path} is damaged: {str(error) if isinstance(error, LaminaError) else said(error)}") from error
    return Content(next(iter(files.values()), None), plan, state, path)


def packed(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """A value as JSON, its tensors put into ``tensors`` under the names of their places.

    What JSON does not know becomes ``{"$kind": …}``, so that it comes back as what it was.

    Raises:
        TrainingError: Something else is in there; the message says where.
    """
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"$part": [place, list(value.shape), dtype_name(value.dtype)]} if is_spread(value) else {"$tensor": place}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors[place] = torch.from_numpy(value.copy())
        return {"$array": place}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        items = [packed(item, tensors, f"{place}.{number}") for number, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value) and not isinstance(value, Counter):
            return {key: packed(item, tensors, f"{place}.{key}") for key, item in value.items()}
        items = [
            [packed(key, tensors, f"{place}.key{number}"), packed(item, tensors, f"{place}.{number}")]
            for number, (key, item) in enumerate(value.items())
        ]
        return {"$counter" if isinstance(value, Counter) else "$items": items}
    raise TrainingError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold without pickle")


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `packed` took apart; tensors that are spread become a `Part`."""
    if isinstance(value, list):
        return [unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (kind, inside), *_ = value.items()
        if kind == "$tensor":
            return tensors[inside]
        if kind == "$array":
            return tensors[inside].numpy()
        if kind == "$part":
            return Part(inside[0], torch.Size(inside[1]), getattr(torch, inside[2]))
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


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Out of the file, whose pieces lie at odd addresses, where matrix products round otherwise."""
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in tensors.items()}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
