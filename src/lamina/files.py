"""Files that are whole: written in one stroke, and read with their format number looked at before anything else."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from filelock import FileLock

from .errors import LaminaError

Model = TypeVar("Model", bound=pydantic.BaseModel)


class FileValue(pydantic.BaseModel):
    """A part of a file: a value that cannot be changed, with finite numbers, and no fields but its own."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one stroke: a reader finds the old content or the new, never a part, also after a loss of power."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_value(path: str | os.PathLike[str], content: bytes, error: type[LaminaError], what: str) -> None:
    """Write what a user saves as one file; it is there whole or not at all.

    Raises:
        LaminaError: Of the kind that is given: it cannot be written there.
    """
    try:
        write_whole(Path(path), content)
    except (OSError, ValueError) as reason:  # a ValueError is a path that no file can have
        raise error(one_line(f"{path}: {what} cannot be written: {reason}")) from reason


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside a file; what was written there takes the file's place at the end, or is removed after an error.

    A file that is there keeps its mode, and a symbolic link stays one: the file that it points to is replaced. A new file has
    the mode that the user's umask leaves. The file is on the disk before it takes its place, and its place before this ends.

    Raises:
        OSError: The file cannot be written, or something other than a file stands there.
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    # Part of the name says whose it is. All of it, and more, could be longer than a name may be.
    temporary = target.parent / f".{target.name[:32]}.{secrets.token_hex(8)}"
    # Nobody may read it who could not read the old file; the kernel takes the umask away.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600))
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
        yield temporary
        _fsync(temporary, os.O_RDWR)
        temporary.chmod(mode)  # last: it may forbid writing, and who wrote there may have made the file anew
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


PATIENCE_S = 60.0
"""So long a writer waits for another one."""


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files: a new one beside it, which takes its place as a whole at the end.

    A folder cannot be renamed over one that holds something. So the earlier one is moved aside first, as ``.NAME.before``, and
    is removed when the new one stands; after an error or an interrupt it is back. Who is killed between the two renames leaves
    it aside, whole, and the next one that writes here brings it back before anything else.

    Raises:
        OSError: The folder cannot be written, or somebody else has been writing there for `PATIENCE_S`.
    """
    target = Path(os.path.realpath(path))
    before, fresh = (target.parent / f".{target.name}.{end}" for end in ("before", "writing"))
    with locked(target.parent / f".{target.name}.lock"):
        _brought_back(target, before)
        shutil.rmtree(fresh, ignore_errors=True)  # of a writer that was killed
        fresh.mkdir(mode=0o700 if target.exists() else 0o777)  # nobody may read it who could not read the earlier one
        try:
            yield fresh
            for each in fresh.iterdir():
                _fsync(each, os.O_RDWR)
            if target.exists():
                fresh.chmod(stat.S_IMODE(target.stat().st_mode))
            fsync_directory(fresh)
            if target.exists():
                os.rename(target, before)
            os.rename(fresh, target)
        except BaseException:
            _brought_back(target, before)
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        fsync_directory(target.parent)
        shutil.rmtree(before, ignore_errors=True)


def _brought_back(target: Path, before: Path) -> None:
    """What was moved aside stands in its place again, unless something else stands there, which was put there after it."""
    if before.exists() and not target.exists():
        os.rename(before, target)
    shutil.rmtree(before, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One at a time, by a file that stands there meanwhile; a kill releases it.

    Raises:
        Timeout: Somebody else has held it for `PATIENCE_S`.
    """
    with FileLock(path, timeout=PATIENCE_S):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # whoever waits for it notices, and makes it anew


def fsync_directory(path: Path) -> None:
    """Let names that were made, changed or removed in a folder reach the disk, where the platform can be asked to."""
    with contextlib.suppress(OSError):
        _fsync(path, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of(path: Path) -> int | None:
    """The permissions of a file; None where there is none yet."""
    try:
        found = path.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, "not a file, and so not replaced", str(path))
    return stat.S_IMODE(found)


def read_model(
    path: Path,
    kind: type[Model],
    newest: int,
    error: type[LaminaError],
    *,
    unreadable: str,
    foreign: str,
    needs: str = "format",
) -> Model:
    """Read a JSON file that carries a format number.

    Args:
        path: The file.
        kind: What it holds.
        newest: The newest format that can be read.
        error: What is raised.
        unreadable: What is said of a file that is no JSON; the reason follows in brackets.
        foreign: What is said of a file of something else.
        needs: A field by which a file of this kind is known, besides its format number.

    Raises:
        LaminaError: No such file, cut short, of something else, of a newer format, or with a field that makes no sense; as
            ``error``, in one line, and the message names the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as why:  # a ValueError is bytes that are no text, or a path that can be none
        raise error(one_line(f"{unreadable} ({why})")) from why
    return parse_model(text, str(path), kind, newest, error, unreadable=unreadable, foreign=foreign, needs=needs)


def parse_model(
    text: str,
    where: str,
    kind: type[Model],
    newest: int,
    error: type[LaminaError],
    *,
    unreadable: str,
    foreign: str,
    needs: str = "format",
) -> Model:
    """The same from text that was read already; ``where`` is what the message calls it."""
    infinite: list[str] = []

    def number(digits: str) -> float:
        """Python reads NaN and Infinity too, which are no JSON, and makes infinity of what is too large."""
        value = float(digits)
        if not math.isfinite(value):
            infinite.append(digits[:20])
        return value

    try:
        content = json.loads(text, object_pairs_hook=_object, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as why:
        raise error(one_line(f"{unreadable} ({why})")) from why
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is not int or needs not in content:  # not True either, which is an integer in Python
        raise error(one_line(foreign))
    if found > newest:
        raise error(one_line(f"{where}: made by a newer lamina (format {found}, this one reads {newest}): upgrade lamina"))
    try:
        result = kind.model_validate_json(text, strict=True)
    except pydantic.ValidationError as why:
        first = why.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise error(one_line(f"{where}: {field}: {first['msg']}")) from why
    if infinite:  # a kind that forbids it has said which field
        raise error(one_line(f"{unreadable} ({infinite[0]} is not a finite number)"))
    return result


def one_line(text: str) -> str:
    """Text with everything that a terminal cannot show in a line written out: line breaks, control characters, half letters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. JSON itself allows a name twice; which one counts, readers decide differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r} stands there twice")
    return found
