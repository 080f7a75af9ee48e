"""Times that travel: a JSON file of seconds of dense layers and ratios of forms, with the machine that took them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..errors import LaminaError
from ..files import read_model, write_whole
from ..values import Setting, Timing
from .store import MAGIC, first_bytes

EXPORT_FORMAT = 3


@final
@dataclass(frozen=True, slots=True)
class Taken:
    """A dense layer's seconds, or a form's ratio to them, with the spread; and what the dense layer took in the same batch."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    mad: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    repeats: Annotated[int, Field(ge=1)]
    dense_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @classmethod
    def of(cls, timing: Timing, unit: float, dense_s: float) -> Taken:
        """A timing in units of some seconds."""
        return cls(timing.median_s / unit, timing.mad_s / unit, timing.repeats, dense_s)

    def timing(self, unit: float, setting: Setting) -> Timing:
        """The same in seconds."""
        return Timing(self.value * unit, self.mad * unit, self.repeats, setting)


def _current(number: int) -> int:
    if number < EXPORT_FORMAT:
        raise PydanticCustomError("older", "of an older lamina, whose times cannot be used: take them anew with lamina measure")
    return number


class Export(BaseModel):
    """What an exported file holds: the machine, seconds of dense layers and ratios of forms, by signature."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[int, AfterValidator(_current)] = EXPORT_FORMAT
    setting: Setting
    dense: dict[str, Taken]
    timings: dict[str, Taken]


def write_export(path: Path, setting: Setting, dense: Mapping[str, Taken], timings: Mapping[str, Taken]) -> None:
    """Write times as JSON; the file is there whole or not at all.

    Raises:
        LaminaError: It cannot be written.
    """
    rows = ({key: rows[key] for key in sorted(rows)} for rows in (dense, timings))
    content = Export.model_construct(setting=setting, dense=next(rows), timings=next(rows))
    try:
        write_whole(path, (content.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise LaminaError(f"{path} cannot be written: {error.strerror}") from error


def read_export(path: Path) -> Export:
    """What `write_export` wrote.

    Raises:
        LaminaError: No such file, cut short, of another format, or with a value that makes no sense; the message names it.
    """
    with suppress(OSError):
        if first_bytes(path, len(MAGIC)) == MAGIC:
            raise LaminaError(f"{path} is a table, no file of timings: lamina measure writes one, for --timings")
    return read_model(
        path,
        Export,
        EXPORT_FORMAT,
        LaminaError,
        unreadable=f"{path}: no readable file of timings",
        foreign=f"{path}: no file of timings: lamina measure writes one",
        needs="timings",
    )
