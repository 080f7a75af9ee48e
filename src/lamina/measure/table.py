"""Keeps layer times, one row a signature, so that nothing is measured twice under the same conditions.

Of a form the ratio to the dense layer beside which it was timed is kept, and the dense layer's seconds stand apart, written
once or, where the layer is clearly faster or slower by now, anew: so times that several processes took, in quick moments and in
slow ones, never mix. Each row bears what the dense layer
took in its batch, and answers only while that layer takes about as long: a machine that was busy then, or is another one now,
shows.

Where the rows lie, and what becomes of a file that is damaged, locked or somebody else's, `store` says. Times travel:
`TimingTable.export` writes those of one run as JSON, `TimingTable.imported` reads them on another machine, where they answer in
that machine's name or not at all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import Any, final

from platformdirs import user_cache_path

from ..errors import LaminaError
from ..forms import Form
from ..values import Geometry, Setting, Timing, quoted
from .clock import alike
from .exports import Taken, read_export, write_export
from .signature import described, on_machine_of, retaken, setting_in, timed_in
from .staircase import Staircase
from .store import File, Layout, Row, Store, Table, first_bytes


def _same_machine(first: Row, new: Row) -> bool:
    return alike(Taken(*first).dense_s, Taken(*new).dense_s)


_TIME = tuple(field.name for field in fields(Taken))
_TIMES = ("anchors", "ratios")
_LAYOUT = Layout(
    tables={
        # A dense time that is there stays, unless it was then clearly faster or slower.
        "anchors": Table("signature", _TIME, "times", stays=_same_machine),
        "ratios": Table("signature", _TIME, "times"),
        "kept": Table("key", ("content",), "other results"),
    },
    mark=0x6C616D69,  # "lami"
    version=3,
    called="timing table",
    foreign="no table of times: name one that lamina made, a new file, or one of lamina measure",
)


def default_path() -> Path:
    """Where the table lies: ``$LAMINA_CACHE`` or the user's cache folder."""
    folder = os.environ.get("LAMINA_CACHE")
    return (Path(folder) if folder else user_cache_path("lamina")) / "timings.sqlite"


@final
class TimingTable:
    """Times by signature. Use as a context manager, or call `close`.

    Args:
        path: The SQLite file; made with its folder where missing. None keeps everything in memory.

    Attributes:
        target: The setting of the machine whose times these are; None for this one.
        looked: What dense layers take now, by their signatures; kept here for whoever measures.
        pool: What is timed lies in it; likewise.

    Raises:
        LaminaError: The file is none that lamina made, or a newer lamina did. In lamina's own place this is a warning.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.target: Setting | None = None
        self.looked: dict[Any, float] = {}
        self.pool: object = None
        self._asked: dict[str, None] = {}
        # A run goes by one dense time of a layer, whatever others write meanwhile, and looks once at what it goes by.
        self._units: dict[str, Taken] = {}
        self._held: set[str] = set()
        self._store = Store(None if path is None else _file(path), _LAYOUT)

    @classmethod
    def imported(cls, path: str | os.PathLike[str]) -> TimingTable:
        """A table in memory of the times that `export` wrote.

        On the machine that took them, under the same conditions, it is a table like any other. Elsewhere it gives the times
        that it has in that machine's name, and a time that it lacks is an error, as it cannot be taken here.

        Raises:
            LaminaError: No such file, cut short, of another format, or with a value that makes no sense; the message names it.
        """
        content = read_export(Path(path))
        table = cls(None)
        table.path, table.target = Path(path), content.setting
        table._put({"anchors": content.dense, "ratios": content.timings})
        return table

    def export(self, path: str | os.PathLike[str], setting: Setting) -> int:
        """Write the times that were asked for since the table was opened as JSON; the file is there whole or not at all.

        Args:
            path: The file.
            setting: One that times were taken under. Times of other dtypes, memory formats and modes are written too, those of
                another device, number of threads or version are not.

        Returns:
            The number of times written.

        Raises:
            LaminaError: The file cannot be written.
        """
        asked = [key for key in self._asked if (taken := setting_in(key)) and on_machine_of(setting, taken) == taken]
        dense, timings = (self._taken(name, asked) for name in _TIMES)
        write_export(Path(path), setting, dense, timings)
        return len(dense) + len(timings)

    def conditions(self, setting: Setting) -> Setting:
        """The conditions under which this table's times were taken, for a network that would run here in a setting."""
        return setting if self.target is None else on_machine_of(self.target, setting)

    def __enter__(self) -> TimingTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what could not be written to it so far is written now, or its loss is said."""
        self._store.close()
        self.pool = None

    def __len__(self) -> int:
        """The number of times kept."""
        return sum(len(self._store.keys(name)) for name in _TIMES)

    def get(
        self, anchor: str, signatures: Iterable[str], setting: Setting, holds: Callable[[float], bool]
    ) -> dict[str, Timing]:
        """The times that are known among some signatures of one layer.

        Args:
            anchor: The signature of the dense layer, which the others' ratios are of.
            signatures: As `signature` makes them here; the anchor may be among them.
            setting: The conditions here, which the times are to bear.
            holds: Whether a dense layer that took so many seconds takes about as long now: else what was taken beside it does
                not answer. It is not asked of what was taken in this run or held in it before, nor of another machine's times.

        Raises:
            LaminaError: The times were taken on another machine, and one of those asked for was not.
        """
        signatures = list(signatures)
        there = self.conditions(setting)
        foreign = there != setting
        kept = {
            key: retaken(key, self.target) if foreign and self.target else key for key in dict.fromkeys([anchor, *signatures])
        }
        self._asked |= dict.fromkeys(kept)
        if anchor not in self._units:
            dense = self._taken("anchors", [kept[anchor]]).get(kept[anchor])
            if dense and (foreign or holds(dense.dense_s)):
                self._units[anchor] = dense
        unit = self._units.get(anchor)
        rows = self._taken("ratios", [name for key, name in kept.items() if key != anchor]) if unit else {}
        known: dict[str, Timing] = {}
        for key in signatures:
            row = unit if key == anchor else rows.get(kept[key])
            if unit and row and row.value > 0 and (foreign or row is unit or key in self._held or holds(row.dense_s)):
                self._held.add(key)
                known[key] = row.timing(1.0 if key == anchor else unit.value, there)
            elif foreign:
                raise LaminaError(f"{self.path} has no time of {described(kept[key])}: take it there with lamina measure")
        return known

    def staircases(self, setting: Setting) -> dict[tuple[Geometry, tuple[int, ...]], Staircase]:
        """By layer and input shape what is kept of its forms under a setting, whatever the dtype of its input.

        Args:
            setting: The conditions; under a freezing schedule the times of its phases are averaged.
        """

        def plain(one: Setting) -> Setting:
            return replace(one, freezing="off", autocast="off")

        def of_it(key: str) -> bool:
            taken = setting_in(key)
            return (
                taken is not None and plain(taken) == plain(setting) and (setting.freezing != "off" or taken.freezing == "off")
            )

        anchors, ratios = (self._taken(name, [key for key in self._store.keys(name) if of_it(key)]) for name in _TIMES)
        found: dict[tuple[Geometry, tuple[int, ...]], dict[Form, list[float]]] = {}
        for key, taken in ratios.items():
            timed = timed_in(key)
            found.setdefault((timed.geometry, timed.input_shape), {}).setdefault(timed.form, []).append(taken.value)
        dense = {
            (timed.geometry, timed.input_shape): taken.value for key, taken in anchors.items() for timed in [timed_in(key)]
        }
        return {
            place: Staircase(place[0], dense[place], {form: mean(each) for form, each in forms.items()})
            for place, forms in found.items()
            if place in dense
        }

    def put(self, anchor: str, batch: Mapping[str, Timing]) -> dict[str, Timing]:
        """Keep the times of one batch, all of them or none.

        Args:
            anchor: The signature of the dense layer, whose time is part of the batch.
            batch: Times by signature.

        Returns:
            The batch by the dense time that this run goes by: the one that was there first, whoever took it, unless it was
            clearly another.
        """
        dense_s = batch[anchor].median_s
        if not dense_s > 0:
            return dict(batch)  # a clock that stood still tells no ratio
        self._asked |= dict.fromkeys(batch)
        ratios = {key: Taken.of(each, dense_s, dense_s) for key, each in batch.items() if key != anchor}
        fresh = {} if anchor in self._units else {anchor: Taken.of(batch[anchor], 1.0, dense_s)}
        written = self._put({"anchors": fresh, "ratios": ratios})["anchors"]
        for key, row in written.items():
            self._units.setdefault(key, Taken(*row))
        unit = self._units[anchor]
        self._held |= batch.keys()
        return {
            key: unit.timing(1.0, each.setting) if key == anchor else ratios[key].timing(unit.value, each.setting)
            for key, each in batch.items()
        }

    def recall(self, kind: str, key: str) -> str | None:
        """What `remember` kept; None where there is nothing."""
        row = self._store.rows("kept", [_kept_key(kind, key)]).get(_kept_key(kind, key))
        return None if row is None else str(row[0])

    def remember(self, kind: str, key: str, content: str) -> None:
        """Keep another result than a time beside the times, as text; it replaces what was kept under this key before.

        Where times are kept in memory, so is this; `export` leaves it out.

        Args:
            kind: What the results of this kind are called, in plain words and the plural: ``losses``, ``dense times``.
            key: Everything that decides the result.
            content: The result.

        Raises:
            ValueError: The kind is not in plain words.
        """
        self._store.put({"kept": {_kept_key(kind, key): (content,)}})

    def _taken(self, name: str, keys: Iterable[str]) -> dict[str, Taken]:
        return {key: Taken(*row) for key, row in self._store.rows(name, keys).items()}

    def _put(self, taken: Mapping[str, Mapping[str, Taken]]) -> dict[str, dict[str, Row]]:
        return self._store.put({name: {key: astuple(each) for key, each in rows.items()} for name, rows in taken.items()})


@final
@dataclass(frozen=True, slots=True)
class Held:
    """Times that were taken under one setting.

    Attributes:
        times: How many.
        oldest: When the oldest was taken, in seconds since 1970.
        spread: Their median absolute deviation as a share of them, at the median.
    """

    times: int
    oldest: float
    spread: float


def kept(path: Path) -> tuple[int, dict[Setting, Held]]:
    """How many times a file holds, and what it holds of each setting; the file is only read.

    Raises:
        LaminaError: It cannot be read, or is none of lamina's.
    """
    number, by_setting = 0, dict[Setting, list[tuple[float, float]]]()
    for key, row, when in (written for name in _TIMES for written in _file(path).written(name)):
        number += 1
        if setting := setting_in(key):
            one = Taken(*row)
            by_setting.setdefault(setting, []).append((when, one.mad / one.value if one.value else 0.0))
    return number, {
        setting: Held(len(times), min(when for when, _ in times), median(spread for _, spread in times))
        for setting, times in by_setting.items()
    }


def kept_besides(path: Path) -> Counter[str]:
    """How many results of each kind a file holds beside the times; the file is only read.

    Raises:
        LaminaError: It cannot be read, or is none of lamina's.
    """
    return Counter(key.partition(":")[0] for key in _file(path).keys()["kept"])


def forget(path: Path) -> int:
    """Forget every time in a file, and all that is kept beside them; it shrinks. Returns how many times there were.

    Raises:
        LaminaError: The file cannot be written, or is none of lamina's; nothing is forgotten then.
    """
    found = _file(path).clear()
    return sum(len(found[name]) for name in _TIMES)


@contextmanager
def opened(timings: TimingTable | str | os.PathLike[str] | None) -> Iterator[TimingTable]:
    """A table as users name it: itself, a file of `TimingTable.export`, a table's file, or None for the default one.

    What a file is, is told by what stands in it. A file that is not there becomes a table.

    Raises:
        LaminaError: The file is something else; it is left as it was.
    """
    if isinstance(timings, TimingTable):
        yield timings
        return
    if not (timings is None or isinstance(timings, str | os.PathLike)):
        raise LaminaError(f"timings is {quoted(timings)}; give the name of a file, or None for the times of this machine")
    with TimingTable(default_path()) if timings is None else _named(Path(timings)) as table:
        yield table


def _named(path: Path) -> TimingTable:
    try:
        export = path.is_file() and first_bytes(path, 16).lstrip().startswith(b"{")
    except OSError as error:
        raise LaminaError(f"{path} cannot be read: {error.strerror}") from error
    if export:
        return TimingTable.imported(path)
    if path.suffix == ".json" and not path.exists():
        raise LaminaError(f"{path}: no such file; lamina measure writes one, and a new table has a name without .json")
    return TimingTable(path)


def _file(path: Path) -> File:
    return File(path, _LAYOUT, own=path == default_path())


def _kept_key(kind: str, key: str) -> str:
    if not all(word.isalpha() for word in kind.split(" ")):
        raise ValueError(f"{kind!r} does not say in plain words what results these are")
    return f"{kind}:{key}"
