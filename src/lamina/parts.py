"""A folder's weights written part by part, in the memory of one slice; a writer that was killed goes on where it was.

Which tensor lies where in which file follows from names, types and shapes alone, so each part is put in its place as it is
made. It reaches the disk before a journal says that it is there, with its hash. All this stands in a folder of its own beside
what was saved before; only when every part is there do the files get their names, and the document, written last, commits them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pydantic
import torch
from torch import Tensor

from .errors import ArtifactError, LayerError
from .files import fsync_directory
from .folder import WRITING, Card, WeightsFile, code_of, commit, emptied, metadata, named, writer

_JOURNAL = "journal"
_LARGEST_FILE = 2**32
"""About as many bytes are in one file: a part is whole in one."""
_BLOCK = 2**20


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Some tensors that are made at once.

    Attributes:
        title: Its name, which no other part has.
        tensors: Tensors without values, by name: their data types and shapes.
        make: Gives their values, each in pieces along its first side; pieces of one tensor come in their order.
    """

    title: str
    tensors: Mapping[str, Tensor]
    make: Callable[[], Iterable[tuple[str, Tensor]]]

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def write_parts(
    folder: Path,
    name: str,
    document: Callable[[int], pydantic.BaseModel],
    parts: Sequence[Part],
    aliases: Mapping[str, str],
    identity: str,
    progress: Callable[[int], object] = lambda done: None,
    card: Card | None = None,
) -> int:
    """Write a document and its weights, as `folder.write_folder` does, but one part after the other.

    A call that ends before its time, by a kill, an interruption or an error, leaves an earlier document and its weights as they
    were. The parts that it made wait in the folder, and the same call goes on from them; any other writer removes them.

    Args:
        folder: Where to.
        name: The document's file.
        document: What it holds, by the number of files that the weights lie in; its field ``saved`` is filled in.
        parts: The weights.
        aliases: For every other name of a tensor the name under which it is stored.
        identity: What the values of all parts follow from: only a call with the same one goes on.
        progress: Told how many parts are there.
        card: See `folder.write_folder`.

    Returns:
        How many parts an earlier call had made.

    Raises:
        ArtifactError: The folder holds other files or cannot be written, the disk is too small, or a part cannot be read.
        LayerError: A part cannot be made.
    """
    files = _laid_out(parts, aliases)
    about = json.dumps([1, identity, *(hashlib.sha256(file.header).hexdigest() for file in files)])
    with writer(folder, name) as target:
        work = target / WRITING
        with _Journal.opened(work, hashlib.sha256(about.encode()).hexdigest()) as journal:
            there = {file.number: file.found(work, target, journal) for file in files}
            earlier = sum(len(done) for done in there.values())
            _forbid_full(folder, target, [p for file in files for p in file.parts if p.title not in there[file.number]])
            try:
                _make(files, there, work, journal, earlier, progress)
            except (OSError, ArtifactError, LayerError) as error:
                kind = LayerError if isinstance(error, LayerError) else ArtifactError
                waits = f"what is done waits in {folder / WRITING}, and the same call goes on from it" if journal.made else ""
                raise kind("; ".join(filter(None, [f"{folder}: {error}", waits]))) from error
            weights = [file.settled(work, target, journal) for file in files]
            fsync_directory(target)
        commit(target, name, document(len(files)), weights, card)
    return earlier


def _make(
    files: Sequence[_File],
    there: Mapping[int, set[str]],
    work: Path,
    journal: _Journal,
    done: int,
    progress: Callable[[int], object],
) -> None:
    for file in files:
        missing = [part for part in file.parts if part.title not in there[file.number]]
        if missing or not file.parts:
            with file.open(work) as descriptor:
                for part in missing:
                    progress(done)
                    journal.note(part=part.title, sha256=file.put(descriptor, part))
                    done += 1
    progress(done)


@final
@dataclass(frozen=True, slots=True)
class _File:
    """A file of weights to be: where each tensor lies in it."""

    number: int
    parts: tuple[Part, ...]
    header: bytes
    places: Mapping[str, tuple[int, int]]
    """Where each tensor begins in the file, and where it ends."""
    length: int

    @classmethod
    def of(cls, number: int, parts: Sequence[Part], aliases: Mapping[str, str]) -> _File:
        tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        # Wide types first, as safetensors has it: so each lies at a multiple of its width.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        told: dict[str, Any] = {"__metadata__": metadata({a: kept for a, kept in aliases.items() if kept in tensors})}
        end = 0
        places = {}
        for name in order:
            tensor = tensors[name]
            start, end = end, end + tensor.numel() * tensor.element_size()
            places[name] = start, end
            told[name] = {"dtype": code_of(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        first = len(header)
        places = {name: (first + start, first + end) for name, (start, end) in places.items()}
        return cls(number, tuple(parts), header, places, first + end)

    @property
    def name(self) -> str:
        """While it is written."""
        return f"weights-{self.number}"

    @contextmanager
    def open(self, work: Path) -> Iterator[int]:
        """Open the file, with its header and in its whole length."""
        descriptor = os.open(work / self.name, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            os.truncate(descriptor, self.length)
            _write(descriptor, self.header, 0)
            yield descriptor
        finally:
            os.close(descriptor)

    def put(self, descriptor: int, part: Part) -> str:
        """Make a part, and bring it to the disk.

        Returns:
            The hash of its bytes, in the order of the pieces.
        """
        total = hashlib.sha256()
        at = {name: self.places[name][0] for name in part.tensors}
        for name, piece in part.make():
            content = piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            _write(descriptor, content, at[name])
            at[name] += len(content)
        assert all(at[name] == self.places[name][1] for name in part.tensors), part.title
        os.fsync(descriptor)
        for block in self._blocks(descriptor, part):
            total.update(block)
        return total.hexdigest()

    def _blocks(self, descriptor: int, part: Part) -> Iterator[bytes]:
        for name in part.tensors:
            start, end = self.places[name]
            for at in range(start, end, _BLOCK):
                yield os.pread(descriptor, min(_BLOCK, end - at), at)

    def found(self, work: Path, target: Path, journal: _Journal) -> set[str]:
        """The parts that an earlier writer has made, as their hashes prove."""
        titles = {part.title for part in self.parts}
        name = journal.named.get(self.number)
        if name and not _is_there(work / self.name) and _hash_if_there(target / name.weights) == name.sha256:
            return titles  # killed while files got their names
        if not _is_there(work / self.name):
            return set()
        found = set()
        with self.open(work) as descriptor:
            for part in self.parts:
                if part.title in journal.made:
                    total = hashlib.sha256()
                    for block in self._blocks(descriptor, part):
                        total.update(block)
                    if total.hexdigest() == journal.made[part.title]:
                        found.add(part.title)
        return found

    def settled(self, work: Path, target: Path, journal: _Journal) -> WeightsFile:
        """Give the file the name by which a document knows it."""
        if not _is_there(work / self.name):
            return journal.named[self.number]
        sha256 = _hash_if_there(work / self.name)
        assert sha256 is not None
        result = named(sha256)
        journal.note(file=self.number, sha256=sha256)
        os.replace(work / self.name, target / result.weights)
        return result


def _laid_out(parts: Sequence[Part], aliases: Mapping[str, str]) -> list[_File]:
    """Parts in files, in their order, none much larger than it should be."""
    together: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if together[-1] and size + part.bytes > _LARGEST_FILE:
            together.append([])
            size = 0
        together[-1].append(part)
        size += part.bytes
    return [_File.of(number, each, aliases) for number, each in enumerate(together)]


@final
class _Journal:
    """What was made, a line each, appended and on the disk before work goes on."""

    def __init__(self, path: Path) -> None:
        self.made: dict[str, str] = {}
        self.named: dict[int, WeightsFile] = {}
        head, *lines = path.read_bytes().splitlines(keepends=True)
        whole = len(head)
        with suppress(ValueError, KeyError, TypeError):  # a line cut short by a kill: nothing stands behind it
            for line in lines:
                self._take(json.loads(line))
                whole += len(line) if line.endswith(b"\n") else 0
        self._file = os.open(path, os.O_RDWR)
        os.truncate(self._file, whole)
        os.lseek(self._file, 0, os.SEEK_END)

    @classmethod
    @contextmanager
    def opened(cls, work: Path, identity: str) -> Iterator[_Journal]:
        """The journal of an earlier writer of the same; else one in an emptied folder."""
        path, head = work / _JOURNAL, json.dumps({"of": identity}).encode() + b"\n"
        try:
            ours = path.read_bytes().startswith(head)
        except OSError:
            ours = False
        if not ours:
            emptied(work)
            path.write_bytes(head)
        journal = cls(path)
        try:
            yield journal
        except BaseException:
            if not journal.made:
                shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            os.close(journal._file)

    def _take(self, entry: dict[str, Any]) -> None:
        if "part" in entry:
            self.made[entry["part"]] = entry["sha256"]
        else:
            self.named[entry["file"]] = named(entry["sha256"])

    def note(self, **entry: Any) -> None:
        """Append a line."""
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        os.fsync(self._file)
        self._take(entry)


def _write(descriptor: int, content: bytes | memoryview, at: int) -> None:
    left = memoryview(content)
    while left:
        done = os.pwrite(descriptor, left[: 2**30], at)
        left, at = left[done:], at + done


def _hash_if_there(path: Path) -> str | None:
    with suppress(FileNotFoundError), path.open("rb") as file:  # read, not mapped: mapped pages count as the process's
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def _is_there(path: Path) -> bool:
    return path.is_file()


def _forbid_full(folder: Path, target: Path, missing: Sequence[Part]) -> None:
    wanted, free = sum(part.bytes for part in missing), shutil.disk_usage(target).free
    if free < wanted:
        raise ArtifactError(
            f"{folder} cannot be written: the weights take {wanted / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free there"
        )
