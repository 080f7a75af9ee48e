"""The way from a network to a Plan: walk, observe, ask the rule for each distinct layer, judge the whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from torch import nn

from ..comparison import whole_setting
from ..decomposition import forbid_decomposed
from ..errors import GoalError, PlanError
from ..examples import example_shape
from ..forms import Dense, Form
from ..goals import Goal, Ratio
from ..measure.clock import timing
from ..measure.count import count
from ..measure.layer_times import LayerTimes
from ..measure.table import TimingTable, opened
from ..network.copying import shadow
from ..network.fingerprint import fingerprint
from ..network.preserve import repeatable
from ..network.walk import Layer, walk
from ..network.wrappers import unwrapped
from ..plan import Plan, PlannedLayer, WholeModel, cost
from ..values import Cost, Geometry, Inference, Mode, Setting, Timing, Use, closest, workloads
from .never_slower import Verdict
from .never_slower import never_slower as judge
from .ratio import aligned, path
from .rules import Choice, Plateau, Rule
from .scope import matches, seen_of, selected


def make_plan(
    model: nn.Module,
    example: Any,
    goal: Goal,
    *,
    rule: Rule | None = None,
    mode: Mode | None = None,
    beta: float | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    never_slower: bool = True,
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Choose a form for every layer of a network. It is run and timed on a shadow of it; the network itself is only read.

    Args:
        model: A trained network, on the device, in the dtype and in the memory format in which it will be used.
        example: What it will be fed, batch included: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list
            of `Workload` where one network serves several.
        goal: `Ratio(2.0)`: each layer's weight at least that many times smaller, where this is faster.
        rule: How ranks follow from timings: `Plateau()` by default, `LargestStep()` (paper A), or `AtRatio()` (no timings).
        mode: `Inference()` by default, or `Training()` to time forward and backward; `Training(freezing=SequentialFreezing())`
            for the mean over the phases of the freezing under which the network will be trained.
        beta: Rank out / rank in of Tucker-2; by default max(0.8 O / I, 1).
        include: Patterns as in the shell; only layers matching one of them are decomposed. Empty: all.
        skip: Patterns; layers matching one stay dense.
        never_slower: Time the whole network and put back what does not pay; only for rules that look at timings.
        timings: The table of layer times, or its file; by default one in the user's cache folder. A ``.json`` file is one that
            ``lamina measure`` wrote: if on another machine, ranks follow from that machine's times, the plan bears its setting,
            and the whole network is not timed.
        progress: Show a progress bar.

    Returns:
        The plan; nothing has been decomposed yet.

    Raises:
        ExampleError: The network does not run on the example.
        GoalError: The goal makes no sense, such as a ratio below 1.
        PlanError: A pattern matches no layer (also one of the freezing's), or the network is decomposed already.
        LaminaError: Times were taken on another machine and do not suffice.
    """
    if not isinstance(goal, Ratio):
        raise GoalError(f"a goal is lamina.Ratio(…), not {goal!r}")
    rule, mode = rule or Plateau(), mode or Inference()
    forbid_decomposed(model)
    examples = workloads(example)
    model = unwrapped(model)
    census = walk(model)
    wanted = selected(list(census.layers), include, skip)
    if mode.freezing and (idle := mode.freezing.idle_pattern(census.layers)):
        raise PlanError(f"the freezing's exclude pattern {idle!r} matches no layer{closest(idle, list(census.layers))}")
    seen = seen_of(model, census.layers, examples, mode)
    uses, last, refused = seen.uses, seen.channels_last, census.refused | seen.refused
    setting = whole_setting(model, examples[0], mode)
    before = count(model, example)

    planned: dict[str, PlannedLayer] = {}
    # Timed layers get random weights, and drawing them must not show in the caller's random state.
    with repeatable(model), opened(timings) as table, _progress_bar(progress) as advance:
        taken = table.conditions(setting)
        asked: dict[tuple[Any, ...], _Asked] = {}
        for name, layer in advance(census.layers.items(), len(census.layers)):
            if name in refused:
                continue
            if name not in wanted:
                planned[name] = _left_dense(layer, uses[name], wanted_none=bool(include) and not matches(name, skip))
                continue
            own = mode.of_layer(name)
            freezing = str(own.freezing) if own.freezing else "off"
            here = dataclasses.replace(setting, dtype=str(layer.parameter.dtype).removeprefix("torch."), freezing=freezing)
            key = (layer.geometry, uses[name], last[name], here)
            if key not in asked:
                times = LayerTimes(layer, uses[name], last[name], own, here, table)
                asked[key] = _ask(layer.geometry, goal, beta, rule, times)
            planned[name] = asked[key].planned(layer.geometry, uses[name])

    chosen = {name: layer.form for name, layer in planned.items() if layer.decomposed}
    verdict = None
    # What is chosen by another machine's times cannot be judged by this one's.
    if rule.timed and never_slower and chosen and taken == setting:
        with repeatable(model):
            dense = shadow(model, apart=seen.apart)  # the network itself may be in use meanwhile
            verdict = judge(dense, walk(dense).layers, chosen, list(chosen), examples, mode)
        for name, why in verdict.put_back.items():
            planned[name] = planned[name].with_form(Dense(), f"put back: {why}", "never_slower")
    shapes = [example_shape(workload) for workload in examples]
    return Plan(
        goal=goal,
        rule=str(rule),
        mode=mode.name,
        freezing=mode.freezing,  # type: ignore[arg-type]
        layers=planned,
        refused=refused,
        fingerprint=fingerprint(model),
        setting=taken if rule.timed else None,
        whole=_whole(before, planned, verdict, setting),
        put_back=verdict.put_back if verdict else {},
        examples=tuple(shape for shape in shapes if shape) or None,
    )


@final
@dataclass(slots=True)
class _LayerQuestion:
    """A layer's question to a rule, answered from its times."""

    geometry: Geometry
    path: tuple[Form, ...]
    aligned: tuple[Form, ...]
    layer_times: LayerTimes
    seen: dict[Form, Timing] = field(default_factory=dict)

    def times(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        found = self.layer_times(forms)
        self.seen |= found
        return found


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """A rule's choice for one distinct layer, with the times it was based on."""

    choice: Choice
    times: dict[Form, Timing]

    def planned(self, geometry: Geometry, uses: tuple[Use, ...]) -> PlannedLayer:
        before, after = (
            dataclasses.replace(cost(geometry, form, uses), timing=self.times.get(form)) for form in (Dense(), self.choice.form)
        )
        return PlannedLayer(
            geometry=geometry,
            uses=uses,
            form=self.choice.form,  # type: ignore[arg-type]
            reason=self.choice.reason,
            before=before,
            after=after,
        )


def _ask(geometry: Geometry, goal: Ratio, beta: float | None, rule: Rule, times: LayerTimes) -> _Asked:
    steps = path(geometry, goal.value, beta)
    if not steps:
        return _Asked(Choice(Dense(), f"no rank makes this layer {goal.value:g} times smaller"), {})
    question = _LayerQuestion(geometry, steps, aligned(geometry, steps), times)
    return _Asked(rule.choose(question), question.seen)


def _left_dense(layer: Layer, uses: tuple[Use, ...], *, wanted_none: bool) -> PlannedLayer:
    same = cost(layer.geometry, Dense(), uses)
    reason = "matches no include pattern" if wanted_none else "skipped"
    return PlannedLayer(geometry=layer.geometry, uses=uses, form=Dense(), reason=reason, before=same, after=same)


def _whole(before: Cost, planned: dict[str, PlannedLayer], verdict: Verdict | None, setting: Setting) -> WholeModel:
    """The network's cost: what the layers save is taken off what was counted and measured of the whole."""
    saved = [
        (layer.before.parameters - layer.after.parameters, layer.before.macs - layer.after.macs) for layer in planned.values()
    ]
    after = Cost(before.parameters - sum(p for p, _ in saved), before.macs - sum(m for _, m in saved))
    if verdict is None:
        return WholeModel(before=before, after=after)
    dense, small = timing(verdict.before, setting), timing(verdict.after, setting)
    gains = [
        layer.before.timing.median_s - layer.after.timing.median_s
        for layer in planned.values()
        if layer.before.timing and layer.after.timing
    ]
    return WholeModel(
        before=dataclasses.replace(before, timing=dense),
        after=dataclasses.replace(after, timing=small),
        predicted_s=dense.median_s - sum(gains),
        speedup=verdict.speedup,
        interval=verdict.interval,
    )


@contextmanager
def _progress_bar(shown: bool) -> Iterator[Any]:
    if not shown:
        yield lambda items, total: items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:  # what a program prints is its result
        yield lambda items, total: bar.track(items, total=total, description="timing layers")
