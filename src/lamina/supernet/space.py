"""Space: which forms each layer of a supernet may take, and what every configuration costs, without a network.

A *configuration* is a plain dict, layer name → form. Costs are additive: what the layers cost in their forms, and the rest of
the network, which is the whole network's cost less that of its dense layers. So a configuration is priced by a few additions.

Inside, a configuration is a *row*: for each layer the position of its form, where the forms of a layer stand from the cheapest
to the dearest in MACs.

    L   layers      n   forms of a layer
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from ..choose.budget import Row as Limited
from ..choose.budget import solve
from ..errors import GoalError, SearchError
from ..forms import AnyForm, Form
from ..goals import AnyLimit, Budget, Limit, Milliseconds, Speedup
from ..plan import cost as cost_of
from ..values import Cost, Geometry, Setting, Timing, Use, closest

Configuration = dict[str, Form]
Row = tuple[int, ...]
Losses = Mapping[str, Mapping[Form, float]]
"""Layer → form → what the network loses by it; of several layers they add up."""

_CONFIGURATION: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Annotated[AnyForm, Field(discriminator="form")]])
_GAP = 1e-6
"""How exactly the least sum of losses is found, as a share of it: the next best are told apart by less than a plan's own."""
_FLATTEST = 1 / 3
"""Of what layers alone save, a network saves more than this share, and less than its inverse: else it was not quiet."""
_AT_ONCE = 1 << 16
"""Configurations that are priced together when all are."""


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """One layer of a space: its geometry, its forms from the cheapest to the dearest in MACs, their costs and the dense one's.

    Costs are those of all calls of the example.
    """

    geometry: Geometry
    forms: tuple[Form, ...]
    costs: tuple[Cost, ...]
    dense: Cost

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        uses: tuple[Use, ...],
        forms: Iterable[Form],
        dense: Form,
        times: Mapping[Form, Timing] | None = None,
    ) -> Choice:
        """The choice among some forms of a layer that is used so.

        Args:
            geometry: The layer.
            uses: How the example uses it.
            forms: What it may be.
            dense: The form that leaves it as it is.
            times: The time of each of these forms, over all uses; None where they were not timed.
        """

        def priced(form: Form) -> Cost:
            counted = cost_of(geometry, form, uses)
            return counted if times is None else Cost(counted.parameters, counted.macs, times[form])

        pairs = sorted(((priced(form), form) for form in forms), key=lambda pair: (pair[0].macs, pair[0].parameters))
        return cls(geometry, tuple(form for _, form in pairs), tuple(cost for cost, _ in pairs), priced(dense))


@final
class Space:
    """Every configuration of a supernet, and its costs.

    Args:
        choices: Layer name → what it may be.
        whole: The cost of the whole network with these layers dense. Its time may be unknown where the layers' times are not,
            as with times that were taken elsewhere: costs then hold the time of these layers alone.
        setting: Conditions of the times; None where nothing was timed.
        rest_s: Seconds of the network beside these layers; by default what is left of the whole's. See `anchored`.

    Raises:
        SearchError: There is no layer, or one has no form.
    """

    def __init__(
        self, choices: Mapping[str, Choice], whole: Cost, setting: Setting | None = None, rest_s: float | None = None
    ) -> None:
        if not choices:
            raise SearchError("the space is empty: no layer has forms to choose among")
        for name, choice in choices.items():
            if not choice.forms:
                raise SearchError(f"the space is empty: {name or 'the network'} has no form")
        self.choices = dict(choices)
        self.whole = whole
        self.setting = setting
        self.names = tuple(choices)
        each = list(choices.values())
        self._position = [{form: i for i, form in enumerate(choice.forms)} for choice in each]
        self._numbers = [[(c.parameters, c.macs, *_seconds(c)) for c in choice.costs] for choice in each]
        rest = (whole.parameters, whole.macs, *_seconds(whole)) if whole.timing else (whole.parameters, whole.macs, 0.0, 0.0)
        dense = [(c.dense.parameters, c.dense.macs, *(_seconds(c.dense) if whole.timing else (0.0, 0.0))) for c in each]
        left = [float(r) - sum(d[i] for d in dense) for i, r in enumerate(rest)]
        self._rest = (*left[:2], left[2] if rest_s is None else rest_s, left[3])
        self._repeats = min((c.timing.repeats for choice in each for c in choice.costs if c.timing), default=0)

    @property
    def forms(self) -> dict[str, tuple[Form, ...]]:
        """Layer name → its forms, from the cheapest to the dearest in MACs."""
        return {name: choice.forms for name, choice in self.choices.items()}

    @property
    def size(self) -> int:
        """The number of configurations."""
        return math.prod(len(choice.forms) for choice in self.choices.values())

    @property
    def timed(self) -> bool:
        """Whether costs hold times."""
        return self.setting is not None

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.choices)

    def __iter__(self) -> Iterator[Configuration]:
        """Every configuration, one after the other."""
        return (self.configuration(row) for row in itertools.product(*(range(len(c.forms)) for c in self.choices.values())))

    def __contains__(self, config: object) -> bool:
        """Whether a configuration names a form of this space for each of its layers, and no other layer."""
        return isinstance(config, dict) and config.keys() == self.choices.keys() and self._row_or_none(config) is not None

    def cost(self, config: Mapping[str, Form]) -> Cost:
        """What the whole network costs in a configuration.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form.
        """
        return self.cost_of_row(self.row(config))

    def cost_of_row(self, row: Row) -> Cost:
        """The same from a row."""
        parameters, macs, median_s, mad_s = self._rest
        for numbers, i in zip(self._numbers, row, strict=True):
            p, m, s, d = numbers[i]
            parameters, macs, median_s, mad_s = parameters + p, macs + m, median_s + s, mad_s + d
        timing = Timing(median_s, max(mad_s, 0.0), self._repeats, self.setting) if self.setting else None
        return Cost(round(parameters), round(macs), timing)

    def measures(self, rows: NDArray[np.int64], limit: Limit) -> NDArray[np.float64]:
        """What a limit looks at, for many rows ``(N, L)`` at once: ``(N,)``."""
        table, rest = self._table(limit)
        total = np.full(len(rows), rest)
        for layer, values in enumerate(table):
            total += values[rows[:, layer]]
        return total

    def _table(self, limit: Limit) -> tuple[list[NDArray[np.float64]], float]:
        """What a limit looks at: for each layer of each form, and for the rest of the network."""
        self._forbid_untimed([limit])
        table = [np.array([limit.of(cost) for cost in choice.costs], dtype=np.float64) for choice in self.choices.values()]
        first = limit.of(self.cost_of_row((0,) * len(self)))
        return table, first - float(sum(values[0] for values in table))

    def row(self, config: Mapping[str, Form]) -> Row:
        """The positions of a configuration's forms.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form.
        """
        for name in config:
            if name not in self.choices:
                raise SearchError(f"{name or 'the network'}: no such layer in this space{closest(name, list(self.names))}")
        for name, positions in zip(self.names, self._position, strict=True):
            if name not in config:
                raise SearchError(f"{name or 'the network'}: the configuration names no form for this layer")
            if config[name] not in positions:
                known = ", ".join(map(str, self.choices[name].forms))
                raise SearchError(f"{name or 'the network'}: {config[name]} is none of its forms: {known}")
        return tuple(positions[config[name]] for name, positions in zip(self.names, self._position, strict=True))

    def _row_or_none(self, config: Mapping[str, Form]) -> Row | None:
        try:
            return self.row(config)
        except SearchError:
            return None

    def configuration(self, row: Sequence[int]) -> Configuration:
        """The configuration of a row."""
        return {name: choice.forms[i] for (name, choice), i in zip(self.choices.items(), row, strict=True)}

    def key(self, config: Mapping[str, Form]) -> str:
        """The one name of a configuration, the same on every machine: a hash of its layers and forms."""
        return key(config)

    def fingerprint(self) -> str:
        """A hash of the layers, their geometry and their forms; times are not part of it."""
        content = {
            name: [str(choice.geometry), choice.dense.macs, as_json({str(i): form for i, form in enumerate(choice.forms)})]
            for name, choice in self.choices.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def times(self) -> dict[str, Any] | None:
        """The times as JSON values, which `with_times` takes on another machine; None where nothing was timed."""
        if self.setting is None:
            return None

        def of(cost: Cost) -> list[float] | None:
            return None if cost.timing is None else [cost.timing.median_s, cost.timing.mad_s, cost.timing.repeats]

        return {
            "setting": dataclasses.asdict(self.setting),
            "whole": of(self.whole),
            "rest": self._rest[2],
            "layers": {name: [of(choice.dense), *map(of, choice.costs)] for name, choice in self.choices.items()},
        }

    def with_times(self, content: Mapping[str, Any]) -> Space:
        """This space with the times of another one of the same fingerprint."""
        setting = Setting(**content["setting"])

        def of(cost: Cost, time: Sequence[float] | None) -> Cost:
            timing = None if time is None else Timing(float(time[0]), float(time[1]), int(time[2]), setting)
            return dataclasses.replace(cost, timing=timing)

        choices = {}
        for name, choice in self.choices.items():
            dense, *each = content["layers"][name]
            costs = tuple(of(cost, time) for cost, time in zip(choice.costs, each, strict=True))
            choices[name] = dataclasses.replace(choice, costs=costs, dense=of(choice.dense, dense))
        # Studies of before whole networks were timed do not tell the rest.
        return Space(choices, of(self.whole, content["whole"]), setting, content.get("rest"))

    def anchored(self, measured: Sequence[tuple[Mapping[str, Form], float]]) -> Space:
        """This space with its times corrected by a straight line through whole networks that were measured.

        Layers alone add up to another time than the network takes: kernels share caches, and neighbours are fused or not. On
        published times a line through half a dozen networks left 0.7 % of an error of 4 to 5 %.

        Args:
            measured: Configurations, and the seconds that their whole networks took. Together with the whole network itself,
                whose time is known, they must not all cost the same.

        Raises:
            SearchError: Nothing was timed here.
        """
        if self.setting is None or self.whole.timing is None:
            raise SearchError("these costs hold no time of the whole network: call .time() on the supernet")
        whole = self.whole.timing.median_s
        known = [*((Milliseconds(1.0).of(self.cost(config)) / 1e3, seconds) for config, seconds in measured), (whole, whole)]
        table, taken = (np.array(column) for column in zip(*known, strict=True))
        slope, offset = 1.0, 0.0
        if np.ptp(table) > 1e-3 * table.max():
            # By relative errors. A line that falls, or hardly rises, would be of noise alone.
            slope, offset = np.polyfit(table, taken, 1, w=1 / taken) if len(known) > 2 else (1.0, 0.0)
            if not _FLATTEST < slope < 1 / _FLATTEST:
                slope, offset = float(np.median(taken / table)), 0.0

        def corrected(cost: Cost) -> Cost:
            assert cost.timing is not None
            return dataclasses.replace(cost, timing=dataclasses.replace(cost.timing, median_s=slope * cost.timing.median_s))

        choices = {
            name: dataclasses.replace(choice, costs=tuple(map(corrected, choice.costs)), dense=corrected(choice.dense))
            for name, choice in self.choices.items()
        }
        return Space(choices, self.whole, self.setting, float(offset + slope * self._rest[2]))

    def spread(self, number: int, seed: int = 0) -> list[Configuration]:
        """Some configurations, evenly from the fastest to the slowest, to be timed as whole networks.

        Each layer takes the form that is nearest to its share of the way, which differs a little from layer to layer.

        Raises:
            SearchError: Nothing was timed.
        """
        self._forbid_untimed([Milliseconds(1.0)])
        rng, found = random.Random(seed), dict[Row, None]()
        for share in np.linspace(0, 1, number):
            row = []
            for numbers in self._numbers:
                seconds = np.array([each[2] for each in numbers])
                own = min(max(share + rng.uniform(-0.2, 0.2), 0), 1)
                row.append(int(np.abs(seconds - (seconds.min() + own * np.ptp(seconds))).argmin()))
            found[tuple(row)] = None
        return [self.configuration(row) for row in found]

    def sample(self, rng: random.Random) -> Configuration:
        """A configuration, each layer's form drawn uniformly and independently."""
        return self.configuration([rng.randrange(len(choice.forms)) for choice in self.choices.values()])

    def sample_within(self, rng: random.Random, limits: Sequence[Limit]) -> Configuration:
        """A random configuration that limits allow: drawn, and made cheaper layer by layer until they do.

        Where the steps down lead nowhere, it is `dearest_within`.

        Raises:
            SearchError: A limit is below the cheapest configuration.
        """
        self._check_each(limits)
        tables = [self._table(limit) for limit in limits]
        row = [rng.randrange(len(choice.forms)) for choice in self.choices.values()]
        exceeded = None
        for _ in range(10 * sum(len(choice.forms) for choice in self.choices.values())):
            each = zip(limits, tables, strict=True)
            exceeded = next(((limit, table) for limit, (table, rest) in each if _sum(table, rest, row) > _most(limit)), None)
            if exceeded is None:
                return self.configuration(row)
            _, table = exceeded
            # The next cheaper form of a layer drawn at random.
            layer = rng.choice([layer for layer, values in enumerate(table) if values[row[layer]] > values.min()])
            cheaper = np.flatnonzero(table[layer] < table[layer][row[layer]])
            row[layer] = int(cheaper[table[layer][cheaper].argmax()])
        return self._within_all(limits)  # limits that pull in different directions

    def uniform(self, choice: int | Callable[[Geometry], Form]) -> Configuration:
        """The same choice in every layer.

        Args:
            choice: A position among the forms of a layer, from the cheapest on; a layer with fewer takes its dearest. Or a
                function from a layer's geometry to its form; a layer with one form keeps it.

        Raises:
            SearchError: A layer does not have the form that the function names.
        """
        if isinstance(choice, int):
            return self.configuration([min(choice, len(c.forms) - 1) for c in self.choices.values()])
        config = {name: c.forms[0] if len(c.forms) == 1 else choice(c.geometry) for name, c in self.choices.items()}
        self.row(config)
        return config

    def uniforms(self) -> list[Configuration]:
        """The uniform configurations by position, the cheapest first."""
        return [self.uniform(i) for i in range(max(len(choice.forms) for choice in self.choices.values()))]

    def within(self, limits: Sequence[Limit]) -> Iterator[NDArray[np.int64]]:
        """All rows that limits allow, ``(N, L)`` at a time.

        Raises:
            SearchError: A limit is below the cheapest configuration.
        """
        self.check(limits)
        shape = tuple(len(choice.forms) for choice in self.choices.values())
        for start in range(0, self.size, _AT_ONCE):
            numbers = np.arange(start, min(start + _AT_ONCE, self.size))
            rows = np.stack(np.unravel_index(numbers, shape), axis=1)
            for limit in limits:
                rows = rows[self.measures(rows, limit) <= _most(limit)]
            if len(rows):
                yield rows

    def allows(self, row: Row, limits: Sequence[Limit]) -> bool:
        """Whether all limits allow a row."""
        cost = self.cost_of_row(row)
        return all(limit.of(cost) <= _most(limit) for limit in limits)

    def cheapest(self, limit: Limit) -> Configuration:
        """The configuration that costs least of what a limit looks at."""
        table, _ = self._table(limit)
        return self.configuration([int(values.argmin()) for values in table])

    def absolute(self, budgets: Sequence[Budget]) -> tuple[AnyLimit, ...]:
        """Budgets as limits: a speed-up is so many milliseconds of the whole network.

        Raises:
            SearchError: A speed-up is asked for, and nothing was timed.
        """
        if self.whole.timing is None:
            self._forbid_untimed([Milliseconds(1.0) for each in budgets if isinstance(each, Speedup)])
        return tuple(each.absolute(self.whole) for each in budgets)

    def solved(self, losses: Losses, limits: Sequence[Limit], without: Sequence[Row] = (), *, gap: float = _GAP) -> Row | None:
        """The row whose losses add up to the least within limits, to a gap; None where there is none.

        Args:
            losses: Layer → form → loss.
            limits: What it may cost.
            without: Rows that it must not be: asked again and again, the next best follow one another.
            gap: How far above the least the losses may lie, as a share of it. A proof to the last digit takes far longer.

        Raises:
            SearchError: A form has no loss, or no form of a layer a finite one.
        """
        values: dict[str, list[float]] = {}
        kept: dict[str, list[int]] = {}
        tables = [self._table(limit) for limit in limits]
        for layer, (name, choice) in enumerate(self.choices.items()):
            try:
                of_layer = [float(losses[name][form]) for form in choice.forms]
            except KeyError as error:
                raise SearchError(f"{name or 'the network'}: there is no loss of {error.args[0]}") from error
            kept[name] = [i for i, value in enumerate(of_layer) if math.isfinite(value)]
            if not kept[name]:
                raise SearchError(f"{name or 'the network'}: none of its forms has a finite loss")
            if not without:  # what another beats in everything is never the best, though it may be the next best
                kept[name] = _undominated(kept[name], [of_layer, *(table[layer] for table, _ in tables)])
            least = min(of_layer[i] for i in kept[name])
            values[name] = [of_layer[i] - least for i in kept[name]]
        rows = []
        for limit, (table, rest) in zip(limits, tables, strict=True):
            costs = {name: [float(of_layer[i]) for i in kept[name]] for name, of_layer in zip(self.names, table, strict=True)}
            rows.append(Limited(costs, _most(limit) - rest))
        for row in without:
            same = {name: [float(i == taken) for i in kept[name]] for name, taken in zip(self.names, row, strict=True)}
            rows.append(Limited(same, len(self) - 1))
        answer = solve(values, rows, gap=gap)
        found = None if answer is None else tuple(kept[name][answer[name]] for name in self.names)
        return found if found is not None and self.allows(found, limits) and found not in without else None

    def dearest_within(self, limits: Sequence[Limit]) -> Configuration | None:
        """The configuration that costs most of what the first limit looks at, within all of them; None where there is none.

        Of limits that pull in different directions each may allow something, and all together nothing: a knapsack tells.
        """
        if not limits:
            return self.uniforms()[-1]
        table, _ = self._table(limits[0])
        losses = {
            name: dict(zip(choice.forms, (float(v) for v in values.max() - values), strict=True))
            for (name, choice), values in zip(self.choices.items(), table, strict=True)
        }
        found = self.solved(losses, limits)
        return None if found is None else self.configuration(found)

    def check(self, limits: Sequence[Limit]) -> None:
        """Raise `SearchError` where limits allow nothing; of one below the cheapest configuration it says which that is."""
        self._check_each(limits)
        if len(limits) > 1:
            self._within_all(limits)

    def _within_all(self, limits: Sequence[Limit]) -> Configuration:
        """`dearest_within`, or `SearchError` where there is none."""
        found = self.dearest_within(limits)
        if found is None:
            raise SearchError(
                f"no configuration is within {' and '.join(map(str, limits))}, though there are some within each: raise one"
            )
        return found

    def _check_each(self, limits: Sequence[Limit]) -> None:
        """Raise `SearchError` where one of some limits is below the cheapest configuration."""
        self._forbid_untimed(limits)
        for limit in limits:
            config = self.cheapest(limit)
            cost = self.cost(config)
            if not limit.of(cost) <= _most(limit):
                raise SearchError(
                    f"no configuration is within {limit}: the cheapest takes {limit.at(cost)} with "
                    f"{described(config)}; raise the limit, or offer cheaper forms"
                )

    def _forbid_untimed(self, limits: Sequence[Limit]) -> None:
        if self.timed:
            return
        for limit in limits:
            try:
                limit.of(Cost(0, 0))
            except GoalError as error:
                raise SearchError(f"{limit}: {error}; call .time() on the supernet") from error

    def __str__(self) -> str:
        """A line a layer, then the number of configurations."""
        width = max(len(name or "(the network)") for name in self.names)
        lines = [
            f"{(name or '(the network)').ljust(width)}  {choice.geometry}: {' | '.join(map(str, choice.forms))}"
            for name, choice in self.choices.items()
        ]
        return "\n".join([*lines, f"{self.size:,} configurations"])


def key(config: Mapping[str, Form]) -> str:
    """The one name of a configuration: a hash of its layers and forms, in whatever order they stand."""
    content = sorted((name, repr(form)) for name, form in config.items())
    return hashlib.sha256(repr(content).encode()).hexdigest()[:40]


def as_json(config: Mapping[str, Form]) -> dict[str, Any]:
    """A configuration as JSON values; `from_json` reads them."""
    values: dict[str, Any] = _CONFIGURATION.dump_python(dict(config), mode="json")
    return values


def from_json(content: Any) -> Configuration:
    """A configuration from what `as_json` made.

    Raises:
        SearchError: It is something else.
    """
    try:
        return _CONFIGURATION.validate_python(content)
    except (pydantic.ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SearchError(f"this is no configuration: {where}: {first['msg']}") from error


def described(config: Mapping[str, Form]) -> str:
    """A configuration in one line; forms that many layers share are said once."""
    layers: dict[str, list[str]] = {}
    for name, form in config.items():
        layers.setdefault(str(form), []).append(name or "(the network)")
    if len(layers) == 1 and len(config) > 1:
        return f"all {len(config)} layers {next(iter(layers))}"
    return "; ".join(f"{', '.join(names)}: {form}" for form, names in layers.items())


def _most(limit: Limit) -> float:
    """What a sum that is within a limit comes to at most: in another order it is another number, by the last bits."""
    return limit.value * (1 + 1e-9)


def _undominated(places: list[int], numbers: Sequence[Sequence[float] | NDArray[np.float64]]) -> list[int]:
    """Of some options those that none of them beats or equals in all numbers; of equal ones the first."""
    values = np.array([[column[i] for i in places] for column in numbers], dtype=np.float64)
    no_worse = (values[:, :, None] <= values[:, None, :]).all(0)  # [i, j]: i is at most j in everything
    beaten = no_worse & ~(no_worse.T & (np.arange(len(places))[:, None] >= np.arange(len(places))[None, :]))
    return [places[i] for i in np.flatnonzero(~beaten.any(axis=0))]


def _seconds(cost: Cost) -> tuple[float, float]:
    return (cost.timing.median_s, cost.timing.mad_s) if cost.timing else (0.0, 0.0)


def _sum(table: Sequence[NDArray[np.float64]], rest: float, row: Sequence[int]) -> float:
    return rest + float(sum(values[i] for values, i in zip(table, row, strict=True)))
