"""Weights of a network in safetensors files, one or many: looked at by their headers, read by the slice.

A tensor that is read lies in the file, whose pages the system drops when it needs memory, and is gone from memory with the
tensor: each reading maps the file anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ArtifactError
from .files import one_line
from .folder import code_of

_FILE, _INDEX = ".safetensors", ".safetensors.index.json"
_SLICE_BYTES = 2**26


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of some safetensors files by name. No value has been read."""

    path: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Look at every file's header, so that a file that is missing or cut short is found before any work.

        Args:
            path: A ``.safetensors`` file; the ``.safetensors.index.json`` of many; or a folder that holds either.

        Raises:
            ArtifactError: A file is missing, cut short or no safetensors, or a tensor is not where the index says. The message
                names the first such file.
        """
        start = Path(path)
        try:
            source = _in_folder(start) if start.is_dir() else start
            if not source.is_file():
                raise ArtifactError(f"{source}: there is no such file: name a safetensors file, its index, or their folder")
            return cls(start, _indexed(source) if source.name.endswith(_INDEX) else _header(source))
        except (OSError, ValueError) as error:
            raise ArtifactError(one_line(f"{start}: not readable weights: {error}")) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or some of its rows; it lies in the file.

        Raises:
            ArtifactError: The file cannot be read any more.
        """
        file = self.tensors[name].file
        try:
            with safe_open(file, "pt") as opened:
                if start == 0 and stop is None:
                    whole: Tensor = opened.get_tensor(name)
                    return whole
                rows: Tensor = opened.get_slice(name)[start:stop]
                return rows
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(one_line(f"{file}: {name} cannot be read any more: {error}")) from error

    def slices(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Some of a tensor's rows, or all of them, a bounded number at a time and in their order."""
        stored = self.tensors[name]
        if stored.bytes <= _SLICE_BYTES or not stored.shape:
            yield self.read(name, start, stop)
            return
        end = stored.shape[0] if stop is None else stop
        step = max(1, _SLICE_BYTES * stored.shape[0] // stored.bytes)
        for first in range(start, end, step):
            yield self.read(name, first, min(first + step, end))

    def digest(self) -> str:
        """A hash of every byte of every file.

        Raises:
            ArtifactError: A file cannot be read to its end.
        """
        total = hashlib.sha256()
        for file in sorted({stored.file for stored in self.tensors.values()}):
            try:
                with file.open("rb") as content:
                    total.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
            except OSError as error:
                raise ArtifactError(f"{file} cannot be read: {error}") from error
        return total.hexdigest()


def in_parts(path: Path) -> bool:
    """Whether weights are named by a folder or an index, as those in many files are."""
    return path.is_dir() or path.name.endswith(_INDEX)


def is_safetensors(path: Path) -> bool:
    """Whether weights are named that a `Checkpoint` reads."""
    return in_parts(path) or path.name.endswith(_FILE)


def _in_folder(folder: Path) -> Path:
    found = sorted(each for each in folder.iterdir() if each.name.endswith(_INDEX))
    found = found or sorted(each for each in folder.iterdir() if each.name.endswith(_FILE))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ArtifactError(f"{folder}: there are no weights in it, neither *{_INDEX} nor *{_FILE}")
    if found[0].name.endswith(_INDEX):
        raise ArtifactError(f"{folder}: {len(found)} indices are in it, such as {found[0].name}: name the one")
    raise ArtifactError(f"{folder}: {len(found)} files *{_FILE} and no index are in it: name one, or fetch the index too")


def _indexed(index: Path) -> dict[str, Stored]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(one_line(f"{index}: not a readable index ({error}): fetch it again")) from error
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ArtifactError(f"{index}: not an index: it has no weight_map of tensors and their files")
    headers: dict[str, dict[str, Stored]] = {}
    found: dict[str, Stored] = {}
    for name, file in named.items():
        if file not in headers:
            if Path(file).name != file:
                raise ArtifactError(one_line(f"{index}: names {file!r}, which is no file beside it"))
            if not (index.parent / file).is_file():
                raise ArtifactError(f"{index.parent / file} is missing, and {index.name} names it: fetch it again")
            headers[file] = _header(index.parent / file)
        if name not in headers[file]:
            raise ArtifactError(one_line(f"{index}: {name} is not in {file}, where it should be: fetch both again"))
        found[name] = headers[file][name]
    return found


def _header(file: Path) -> dict[str, Stored]:
    dtypes, found = _dtypes(), dict[str, Stored]()
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - only has keys()
                part = opened.get_slice(name)
                code = part.get_dtype()
                if code not in dtypes:
                    raise ArtifactError(f"{file}: {name} is of {code}, which PyTorch has no type for")
                found[name] = Stored(file, dtypes[code], tuple(part.get_shape()))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(one_line(f"{file}: cut short, or no safetensors ({error}): fetch it again")) from error
    return found


@cache
def _dtypes() -> dict[str, torch.dtype]:
    """Data types by what safetensors files call them."""
    every = dict.fromkeys(value for value in vars(torch).values() if isinstance(value, torch.dtype))
    # Quantised and half complex ones are in no such file, and PyTorch warns of them where one is only asked for.
    plain = [dtype for dtype in every if not str(dtype).startswith("torch.q") and (not dtype.is_complex or dtype.itemsize > 4)]
    return {code: dtype for dtype in plain if (code := code_of(dtype)) is not None}
