"""The whole network's times: dense, with forms in their places, and the verdict over them. Remembered by its structure.

What was found of a network answers again while the network is the same by all that a survey tells of it, and while it runs,
dense, about as fast as it did then. The second is looked at each time: it notices what nobody thought of, a changed forward as
well as another machine. What a busy machine disturbed is not remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from statistics import median
from typing import Any, Generic, final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import nn

from ..comparison import added_up, ready, step
from ..forms import Dense, Form
from ..measure.clock import Effort, alike, disturbed, interleave, ratio_interval, timed, waiter
from ..measure.shares import time_shares
from ..measure.table import TimingTable
from ..network.attention import Attention
from ..network.copying import shadow
from ..network.fingerprint import fingerprint
from ..network.memory import devices_of
from ..network.placing import opened
from ..network.walk import Layer, walk
from ..runtimes.runtime import Once
from .never_slower import Advance, Stopwatch, Verdict, Watch, never_slower, timed_on
from .remembered import Found, digest, remembered
from .served import ServedWatch
from .survey import Survey

_SLOWER = 2.0
"""A shared processor is so many times slower at one minute than at another. What is remembered are ratios of interleaved runs
that nothing disturbed, so they hold on it too; more is another machine, or another network."""
_SAME = 1.03
"""Of what is asked in seconds, as far as a measured whole may lie from a goal."""
_JUDGE = 2
"""Counts up when networks are judged in another way, so that verdicts of before are not given again."""
Rounds = tuple[list[float], list[float]]
"""Seconds before and after, round by round."""
Judged = tuple[dict[str, str], list[float], list[float]]


class _Row(BaseModel, Generic[Found]):
    model_config = ConfigDict(extra="forbid")

    dense_s: float = Field(gt=0, allow_inf_nan=False)
    found: Found


@final
class Whole:
    """Times of a whole network, on a shadow of it: the network itself may be in use meanwhile.

    Args:
        survey: The network.
        table: What remembers.
    """

    def __init__(self, survey: Survey, table: TimingTable) -> None:
        self.survey, self.table = survey, table

    @cached_property
    def shares(self) -> dict[str, float]:
        """Where the dense network's time goes: by layer and refused module, all else by its type.

        In another runtime than eager PyTorch: by layer, as far as their own graphs tell.
        """
        survey = self.survey
        if not survey.runtime.eager:
            return self._shares_of_graphs()

        def find() -> dict[str, float]:
            found: dict[str, float] = {}
            twin = shadow(survey.model, opened(survey.layers.values()), survey.seen.apart)  # its hooks stay on it
            for name, share in time_shares(twin, survey.examples).items():
                module = twin.get_submodule(name) if name else twin
                between = next(module.children(), None) is not None and not isinstance(module, Attention)
                other = f"({'operations between modules' if between else type(module).__name__})"
                key = name if name in survey.layers or name in survey.refused else other
                found[key] = found.get(key, 0.0) + share
            return found

        return self.kept("time shares", dict[str, float], find)

    def _shares_of_graphs(self) -> dict[str, float]:
        survey = self.survey
        alone = {name: survey.times(name, survey.seen.uses[name], self.table)([Dense()]) for name in survey.considered}
        seconds = {name: times[Dense()].median_s for name, times in alone.items()}
        # Alone, layers may take longer than in the whole network, where what is between them is laid out as they want it.
        whole_s = max(self.seconds(), sum(seconds.values()))
        found = {name: each / whole_s for name, each in seconds.items()}
        return found | {"(everything else)": max(1 - sum(found.values()), 0.0)}

    def seconds(self) -> float:
        """One run of the dense network."""

        def find() -> float:
            return self.survey.weighted(median(dense) for dense, _ in self._watch.whole({}))

        return self.kept("dense times", float, find, seconds=True)

    def trial(self, forms: Mapping[str, Form]) -> Rounds:
        """Seconds of the dense network, and of it with some layers in forms, round by round: what a choice goes by."""
        return self._rounds("trials", forms)

    def afresh(self, forms: Mapping[str, Form], *, seconds: bool = False) -> Rounds:
        """The same in rounds that no choice went by: what is reported where the best of several was chosen by its times.

        Where ``seconds`` are asked, by such as hold now.
        """
        return self._rounds("reported times", forms, seconds=seconds)

    def _rounds(self, what: str, forms: Mapping[str, Form], *, seconds: bool = False) -> Rounds:
        """Rounds of one kind, remembered as such. What is disturbed is timed on."""
        others = {name: form for name, form in forms.items() if form != Dense()}

        def find() -> Rounds:
            return timed_on(lambda: added_up(self.survey.examples, self._watch.whole(others)))

        return self.kept(what, Rounds, find, _asked(others), _undisturbed, seconds=seconds)

    def verdict(self, forms: Mapping[str, Form], advance: Advance, *, seconds: bool = False) -> Verdict:
        """What `never_slower` leaves of the forms, by times of before too; where ``seconds`` are asked, by such as hold now."""
        survey = self.survey

        def find() -> Judged:
            watch = None if survey.runtime.eager else self._served(Effort(2.0, 8, 120))
            found = never_slower(
                self._dense, self._layers, forms, survey.examples, survey.mode, stopwatch=watch, advance=advance
            )
            return found.put_back, found.before, found.after

        put_back, before, after = self.kept(
            "verdicts", Judged, find, [_JUDGE, _asked(forms)], lambda found: _undisturbed(found[1:]), seconds=seconds
        )
        return Verdict({name: form for name, form in forms.items() if name not in put_back}, put_back, before, after)

    @cached_property
    def _dense(self) -> nn.Module:
        return shadow(self.survey.model, apart=self.survey.seen.apart)

    @cached_property
    def _layers(self) -> dict[str, Layer]:
        return walk(self._dense).layers

    @cached_property
    def _once(self) -> Once:
        return Once(self.survey.runtime.roughly())

    @cached_property
    def _watch(self) -> Watch:
        survey, effort = self.survey, Effort(1.0, 8, 60)
        if not survey.runtime.eager:
            return self._served(effort)
        return Stopwatch(self._dense, self._layers, survey.examples, survey.mode, effort)

    def _served(self, effort: Effort) -> ServedWatch:
        return ServedWatch(self.survey, self._dense, self._layers, effort, self._once)

    @cached_property
    def _glimpse_s(self) -> float:
        """Two runs of the dense network: what a plan from remembered results has time for."""
        with self._dense_runs() as runs:
            wait = waiter(devices_of(self._dense))
            return self.survey.weighted(min(timed(run, synchronise=wait) for _ in range(2)) for run in runs)

    @cached_property
    def _now_s(self) -> float:
        """The fastest of some runs of the dense network: who interrupts one of them does not make it another network."""
        with self._dense_runs() as runs:
            times = interleave(runs, devices_of(self._dense), Effort(1.0, 5, 9, precision=0))
        return min(self._glimpse_s, self.survey.weighted(map(min, times)))

    @contextmanager
    def _dense_runs(self) -> Iterator[list[Callable[[], Any]]]:
        survey, mode = self.survey, self.survey.mode.unfrozen
        with ready([self._dense], mode):
            yield [step(self._dense, example, mode, runtime=self._once) for example in survey.examples]

    def _runs_as_in(self, seconds: float, factor: float) -> bool:
        """Whether the dense network takes about as long as it did then; looked at longer before it is denied."""
        return alike(seconds, self._glimpse_s, factor) or alike(seconds, self._now_s, factor)

    @cached_property
    def _structure(self) -> list[Any]:
        """What decides how long the network takes, as far as a survey can tell."""
        survey = self.survey
        uses = [{name: [asdict(use) for use in each] for name, each in of_one.items()} for of_one in survey.seen.by_workload]
        fed = [[str(each), each.weight, *(str(tensor.dtype) for tensor in each.tensors)] for each in survey.examples]
        cost = survey.before.parameters, survey.before.macs
        freezing = str(survey.mode.freezing)
        return [fingerprint(survey.model), repr(survey.model), asdict(survey.setting), freezing, fed, uses, cost]

    def kept(
        self,
        what: str,
        kind: Any,
        find: Callable[[], Found],
        asked: Any = (),
        keeps: Callable[[Found], bool] = lambda found: True,
        *,
        seconds: bool = False,
    ) -> Found:
        """What was found before of a network that still takes as long, or what is found now.

        Args:
            what: See `TimingTable.remember`.
            kind: Its type, as pydantic reads and writes it.
            find: Finds it.
            asked: What decides it beside the network, as JSON has it.
            keeps: Whether what is found now is worth remembering: not what a busy machine disturbed.
            seconds: Whether it hangs on seconds, and not only on ratios: then it answers only where the network takes as long.
        """

        def row() -> _Row[Found]:
            self.table.pool = None  # what layers were timed with would lie beside the twins
            return _Row(dense_s=self._now_s, found=find())

        key = digest([self._structure, asked])
        shape: TypeAdapter[_Row[Found]] = TypeAdapter(_Row[kind])
        return remembered(
            self.table,
            what,
            key,
            shape,
            row,
            lambda known: self._runs_as_in(known.dense_s, _SAME if seconds else _SLOWER),
            lambda row: keeps(row.found),
        ).found


def _asked(forms: Mapping[str, Form]) -> list[tuple[str, Any]]:
    return sorted((name, asdict(form)) for name, form in forms.items())  # type: ignore[call-overload]


def _undisturbed(rounds: Rounds) -> bool:
    return not disturbed(ratio_interval(*rounds))
