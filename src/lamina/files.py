"""Files that are whole: written in one stroke, and read with their format number looked at before anything else."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TypeVar

import pydantic

from .errors import LaminaError

Model = TypeVar("Model", bound=pydantic.BaseModel)


class FileValue(pydantic.BaseModel):
    """A part of a file: a value that cannot be changed, with finite numbers, and no fields but its own."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename: a reader finds the old content or the new, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
            ``error``, and the message names the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as why:
        raise error(f"{unreadable} ({why})") from why
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int) or needs not in content:
        raise error(foreign)
    if found > newest:
        raise error(f"{path}: made by a newer lamina (format {found}, this one reads {newest}): upgrade lamina")
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as why:
        first = why.errors()[0]
        raise error(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from why
