"""The supernet: a network whose layers are series, its configurations, and the plain networks taken out of it."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ..choose.budget import GAP
from ..choose.survey import Survey
from ..comparison import added_up, time_each
from ..decomposition import attach_plan
from ..errors import ExampleError, SearchError
from ..examples import example_from
from ..forms import Dense, Form
from ..goals import Budget, Goal, Macs, Milliseconds, Within, goal_of, in_time, limits_in
from ..layers.build import random_weight
from ..layers.decomposed import laid_out, memory_format
from ..layers.series import SeriesLayer
from ..measure.clock import Effort, disturbed, ratio, ratio_interval, timing
from ..measure.table import TimingTable, opened
from ..network.copying import cloned
from ..network.preserve import preserved
from ..network.readers import reader_of
from ..network.surgery import adopt
from ..plan import FactorMethod, Plan, PlannedLayer, WholeModel, cost
from ..progress import Display
from ..train.recalibrate import norms_of, recalibrate, set_statistics, statistics_of
from ..values import Cost, Timing, Workload, workloads
from .blueprint import Blueprint
from .order import nested_order
from .space import Choice, Configuration, Space, key

_SECONDS = 0.5
"""About how long each whole network is timed."""


@final
class Supernet(nn.Module):
    """A network whose layers are series: every form of each is there, and one of them is active. Made by `make_supernet`.

    It is called as the network was. In eval mode its outputs are, to the bit, those of the network that `extract` takes out.

    Attributes:
        network: The network itself, an instance of its own class; names in it are the original's.
        blueprint: What the supernet is, without its weights.
        statistics: What `recalibrate` found for configurations, by their keys: the running statistics of batch norms, by the
            names of their buffers.
    """

    def __init__(self, network: nn.Module, blueprint: Blueprint, example: Any = None) -> None:
        super().__init__()
        self.network = network
        self.blueprint = blueprint
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._example = example
        self._space = _space(blueprint, None, blueprint.whole)
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the active configuration."""
        return self.network(*args, **kwargs)

    @property
    def space(self) -> Space:
        """The configurations and what they cost; with times once `time` has been called."""
        return self._space

    @property
    def series(self) -> dict[str, SeriesLayer]:
        """Layer name → its series."""
        found = {name: self.network.get_submodule(name) if name else self.network for name in self.blueprint.layers}
        return found  # type: ignore[return-value]

    @property
    def refused(self) -> dict[str, str]:
        """Modules that cannot be decomposed, and why."""
        return dict(self.blueprint.refused)

    @property
    def left_dense(self) -> dict[str, str]:
        """Layers that stay dense in every configuration, and why."""
        return {name: layer.reason for name, layer in self.blueprint.dense.items()}

    @property
    def example(self) -> list[Workload]:
        """What the network is fed: as it was given, or random values of the recorded shapes."""
        if self._example is not None:
            return workloads(self._example)
        if not self.blueprint.examples:
            raise SearchError("this supernet knows no example: make it anew with an example of tensors and plain constants")
        return [example_from(shape, self.network) for shape in self.blueprint.examples]

    def sample(self, rng: random.Random) -> Configuration:
        """A configuration, each layer's form drawn uniformly and independently."""
        return self.space.sample(rng)

    def set_active(self, config: Mapping[str, Form]) -> None:
        """Let a configuration run.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form; nothing has changed.
        """
        self.space.row(config)
        for name, layer in self.series.items():
            layer.set_active(config[name])

    def get_active(self) -> Configuration:
        """The configuration that runs."""
        return {name: layer.active for name, layer in self.series.items()}

    @property
    def losses(self) -> dict[str, dict[Form, float]]:
        """Layer → form → what the network loses by it alone, in the unit that `Blueprint.lost` names. They add up.

        Of a supernet that a lamina before losses were kept has saved they are squared errors of the weights.
        """
        layers = self.blueprint.layers.items()
        return {name: dict(zip(layer.forms, layer.losses or layer.errors, strict=True)) for name, layer in layers}

    @property
    def order(self) -> list[Configuration]:
        """The nested order: configurations each of which has one layer in a cheaper form than the one before.

        It starts where the least is lost and ends at what costs least; cost is time where times are known, else MACs. A
        supernet that was trained along an order keeps that one.
        """
        if self.blueprint.order is not None:
            return self.blueprint.order.configurations
        price = Milliseconds(1.0) if self.space.timed else Macs(1)
        return [self.space.configuration(row) for row in nested_order(self.space, self.losses, price)]

    def within(self, goal: Budget | Sequence[Budget]) -> Configuration:
        """The configuration that loses least within a budget, by the losses of its layers added up.

        Found exactly, in milliseconds. A supernet that was trained along an order answers a configuration of that order, as
        no other was trained.

        Args:
            goal: `Speedup`, `Milliseconds`, `Macs`, `Parameters`, or several. Times must be known, see `time`.

        Raises:
            SearchError: Time is asked for and nothing was timed, or the budget is below the cheapest configuration; the
                message says which that is.
        """
        limits = self.space.absolute(limits_in(goal_of(goal)))
        if self.blueprint.order is not None:
            rows = [self.space.row(config) for config in self.order]
            found = next((row for row in rows if self.space.allows(row, limits)), None)
            if found is None:
                last = self.space.cost_of_row(rows[-1])
                raise SearchError(
                    f"nothing of the order is within {' and '.join(map(str, limits))}: its cheapest takes {last}; "
                    "raise the limit, or offer cheaper forms"
                )
        else:
            self.space.check(limits)
            found = self.space.solved(self.losses, limits, gap=GAP)
            if found is None:
                raise SearchError(f"within {' and '.join(map(str, limits))} every configuration has a form of infinite loss")
        return self.space.configuration(found)

    def at(self, goal: Budget | Sequence[Budget], *, recalibration: Iterable[Any] | None = None) -> nn.Module:
        """The plain network that loses least within a budget: `within`, taken out. Nothing is trained, nothing is searched.

            >>> noon, night = net.at(lamina.Speedup(3)), net.at(lamina.Milliseconds(4.0))

        Args:
            goal: See `within`.
            recalibration: See `extract`; without it the network has the statistics that `recalibrate` keeps for it, if any.

        Raises:
            SearchError: See `within`.
        """
        config = self.within(goal)
        kept = self.statistics.get(key(config), {}) if recalibration is None else {}
        return self._plain(config, recalibration, kept, goal=goal_of(goal), rule="least loss in the supernet")

    def recalibrate(self, data: Iterable[Any]) -> None:
        """Estimate the running statistics of batch norms for each configuration of the nested order, and keep them for `at`.

        While the supernet was trained, its norms had the original's statistics, or gathered those of all configurations. It
        takes as many passes over the data as the order has configurations; `lamina.save` saves what was found, and another
        training forgets it. The supernet itself runs with the statistics that it has.

        Args:
            data: Batches as `lamina.recalibrate` takes them, which can be gone through more than once; an iterator is kept
                whole.

        Raises:
            SearchError: It was not trained along its order, so `at` may answer any configuration.
            ExampleError: The data hold nothing, or the network does not run on them.
            LayerError: A norm's input is not finite. In all cases nothing has changed.
        """
        if self.blueprint.order is None:
            raise SearchError(
                "this supernet was not trained along its order, so a budget may be met by any configuration: train it by "
                "Recipe('order'), or estimate statistics for one network by net.at(goal, recalibration=…)"
            )
        batches = list(data) if isinstance(data, Iterator) else data
        own, active = statistics_of(self.network), self.get_active()
        found: dict[str, dict[str, Tensor]] = {}
        try:
            for config in self.order:
                self.set_active(config)
                if not recalibrate(self.network, batches):
                    return  # it has none, which the warning says
                found[key(config)] = statistics_of(self.network)
        finally:
            self.set_active(active)
            set_statistics(self.network, own)
        self.statistics = found

    def extract(
        self,
        config: Mapping[str, Form],
        *,
        recalibration: Iterable[Any] | None = None,
        goal: Goal | None = None,
        rule: str = "a configuration of a supernet",
    ) -> nn.Module:
        """The plain network of a configuration, on its own storage: outputs equal to the bit. `lamina.save` saves it.

        Args:
            config: The configuration.
            recalibration: Batches on which its batch norms' running statistics are estimated anew: those of the supernet
                gathered while all configurations trained. A score that does so scored this network, see `Scored`.
            goal: What it was chosen for, for its plan.
            rule: How it was chosen, for its plan.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form.
        """
        return self._plain(config, recalibration, {}, goal=goal, rule=rule)

    def _plain(
        self,
        config: Mapping[str, Form],
        recalibration: Iterable[Any] | None,
        statistics: Mapping[str, Tensor],
        *,
        goal: Goal | None,
        rule: str,
    ) -> nn.Module:
        plan = self.plan(config, goal=goal, rule=rule)
        plain = cloned(self.network, {layer: layer.extract(config[name]) for name, layer in self.series.items()})
        set_statistics(plain, statistics)
        if recalibration is not None and norms_of(plain):
            recalibrate(plain, recalibration)
        return attach_plan(plain, plan)

    def plan(
        self, config: Mapping[str, Form], *, goal: Goal | None = None, rule: str = "a configuration of a supernet"
    ) -> Plan:
        """The plan of a configuration: a plan like any other, for the network that the supernet was made from.

        Args:
            config: The configuration.
            goal: What it was chosen for.
            rule: How it was chosen.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form.
        """
        after = self.space.cost(config)
        layers: dict[str, PlannedLayer] = {}
        for name, layer in self.blueprint.layers.items():
            choice, form = self.space.choices[name], config[name]
            layers[name] = PlannedLayer(
                geometry=layer.geometry,
                uses=layer.uses,
                form=form,  # type: ignore[arg-type]
                reason=f"one of {len(choice.forms)} forms in the supernet",
                before=choice.dense,
                after=choice.costs[choice.forms.index(form)],
            )
        for name, left in self.blueprint.dense.items():
            same = cost(left.geometry, Dense(), left.uses)
            layers[name] = PlannedLayer(
                geometry=left.geometry, uses=left.uses, form=Dense(), reason=left.reason, before=same, after=same
            )
        return Plan(
            goal=Within() if goal is None else goal,
            rule=rule,
            mode=self.blueprint.mode,
            freezing=self.blueprint.freezing,
            layers=layers,
            refused=self.blueprint.refused,
            fingerprint=self.blueprint.fingerprint,
            setting=self.space.setting,
            whole=WholeModel(
                before=self.space.whole,
                after=dataclasses.replace(after, timing=None),
                predicted_s=after.timing.median_s if after.timing and self.space.whole.timing else None,
            ),
            examples=self.blueprint.examples or None,
            factors=FactorMethod(series=self.blueprint.method),
        )

    def time(
        self,
        timings: TimingTable | str | os.PathLike[str] | None = None,
        *,
        wholes: int = 6,
        shown: Display | None = None,
    ) -> Space:
        """Measure what every form of every layer takes, and the rest of the network: `space` then knows milliseconds.

        Weights are random, so the supernet is not touched; equal layers are measured once, and the table remembers. Some whole
        networks are timed beside the original, and a line through them corrects what layers alone add up to.

        Args:
            timings: The table of layer times, or its file; by default one in the user's cache folder. A ``.json`` file is one
                that ``lamina measure`` wrote elsewhere: costs then hold the layers' times alone, in that machine's name.
            wholes: How many whole networks; 0 goes by the layers alone.
            shown: Shows how far it is.

        Raises:
            ExampleError: The network does not run on the example, or calls not every series.
            LaminaError: Times were taken on another machine and do not suffice.
        """
        dense, mode = self.dense_like(), self.blueprint.timing_mode
        # As it is used now, which may be under autocast or in another layout than when it was made. Nothing is wanted of it.
        survey = Survey.of(dense, self.example, mode, [], ["*"])
        times: dict[str, dict[Form, Timing]] = {}
        with preserved(dense), opened(timings) as table:
            taken = table.conditions(survey.setting)
            for name, layer in (shown or Display()).through(list(self.blueprint.layers.items()), "timing layers"):
                if not (uses := survey.seen.uses[name]):
                    raise ExampleError(f"{name or 'the network'}: {survey.refused[name]}")
                times[name] = survey.times(name, uses, table)(list(dict.fromkeys([Dense(), *layer.forms])))
        whole = self.blueprint.whole
        space = _space(self.blueprint, times, whole, taken)
        if taken == survey.setting:
            configs = space.spread(wholes) if wholes else []
            effort = Effort(_SECONDS * len(survey.examples), precision=0.01)
            of_dense, measured = added_up(survey.examples, time_each([dense], survey.examples, mode, effort))[0], []
            whole = dataclasses.replace(whole, timing=timing(of_dense, survey.setting))
            space = _space(self.blueprint, times, whole, taken)
            for config in configs:  # one after the other: each has its weights on storage of its own
                rounds = time_each([dense, self.extract(config)], survey.examples, mode, effort)
                # By paired ratios: a drift of the machine meets both. While something else ran nothing is learnt.
                before, after = added_up(survey.examples, rounds)
                if not disturbed(ratio_interval(before, after)):
                    measured.append((config, timing(of_dense, survey.setting).median_s / ratio(before, after)))
            space = space.anchored(measured)
        self._space = space
        return self._space

    def time_for(self, budgets: Sequence[Budget], *, shown: Display | None = None) -> None:
        """Measure, where times are asked for and not known; for ``shown`` see `time`."""
        if in_time(budgets) and not self.space.timed:
            self.time(shown=shown)

    def adopt(self, space: Space) -> None:
        """Go by the times of another space of the same forms, such as that of a study.

        Raises:
            SearchError: It is of other forms.
        """
        if space.fingerprint() != self._space.fingerprint():
            raise SearchError("these times are of another space: layers or forms differ")
        self._space = space

    def dense_like(self) -> nn.Module:
        """The network that the supernet was made from, as to structure; the layers that became series have random weights."""
        replacements: dict[nn.Module, nn.Module] = {}
        generator_state = torch.random.get_rng_state()
        try:
            for layer in self.series.values():
                replacements[layer] = adopt(_random_dense(layer), layer)
        finally:
            torch.random.set_rng_state(generator_state)
        return cloned(self.network, replacements)

    def __deepcopy__(self, memo: dict[int, Any]) -> Supernet:
        twin = Supernet(copy.deepcopy(self.network, memo), self.blueprint, self._example)
        twin._space, twin.training, twin.statistics = self._space, self.training, copy.deepcopy(self.statistics, memo)
        return twin

    def extra_repr(self) -> str:
        """How many series, how many configurations."""
        return f"{len(self.blueprint.layers)} series, {self.space.size:,} configurations"


def _space(blueprint: Blueprint, times: Mapping[str, Mapping[Form, Timing]] | None, whole: Cost, setting: Any = None) -> Space:
    choices = {
        name: Choice.of(layer.geometry, layer.uses, layer.forms, Dense(), None if times is None else times[name])
        for name, layer in blueprint.layers.items()
    }
    return Space(choices, whole, setting)


def _random_dense(layer: SeriesLayer) -> nn.Module:
    """A dense layer of a series' geometry, dtype, device and layout, with random weights."""
    geometry, like = layer.geometry, layer.terms()[0]
    weight = random_weight((geometry.out_channels, geometry.in_channels, *geometry.kernel), like.device).to(like.dtype)
    layouts = {memory_format(term) for term in layer.terms() if term.ndim == weight.ndim > 3}
    layout = next(iter(layouts - {torch.contiguous_format}), torch.contiguous_format)
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    dense = reader_of(geometry).dense(geometry, laid_out(weight, layout), bias)
    return dense.requires_grad_(True)
