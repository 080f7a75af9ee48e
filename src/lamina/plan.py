"""Plan: for every layer the chosen form, why, and its cost before and after; and the layers refused, each with its reason.

A plan is a value. It is read, printed, edited, saved as JSON, loaded, and compared with another; no network is needed for that.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, final

from pydantic import Field, NonNegativeFloat, PositiveFloat

from .curve import Curve, together
from .errors import PlanError, RankError
from .examples import ExampleShape as ExampleShape
from .examples import TensorShape as TensorShape
from .files import FileValue, one_line, read_model, write_whole
from .folder import Saved
from .forms import AnyForm, Dense, Form
from .goals import Goal
from .schedules import AnySchedule
from .values import Cost, Geometry, Setting, Use, change, closest

FORMAT = 2
"""2 is that of a saved network whose weights lie in several files; whatever else a plan holds is 1."""
MUCH = 0.3
"""Outputs that change by more, relative to their size, are seldom those of the same network for who uses them."""
MUCH_NATS = MUCH**2 / 2
"""The same in nats an item: of `Gaussian` answers the divergence is half of the squared relative change."""
_COLUMNS, _GAP = 80, "  "
"""How wide a plan prints, and what stands between its columns."""


@final
class PlannedLayer(FileValue):
    """One layer: what it was, what it becomes, and why.

    ``before`` and ``after`` count all calls of the example; their times are those of the calls on the machine in the plan's
    setting, None where nothing was timed. ``decided_by`` says whose choice it is: ``rule``, ``hand`` (obeyed as it stands) or
    ``never_slower`` (put back because the whole network was not faster with it). ``loss`` is the share of the weight that the
    form leaves out, where it was estimated. ``loss_of`` says what it is a share of: the weight's squared norm; by a calibration
    what it would cost the answers to lose all of it; or, where no gradient reaches the layer, its squared output. ``nats`` is
    what it costs the answers alone, nats of divergence for each item; None where nothing tells that.
    """

    geometry: Geometry
    uses: tuple[Use, ...]
    form: Annotated[AnyForm, Field(discriminator="form")]
    reason: str
    before: Cost
    after: Cost
    decided_by: Literal["rule", "hand", "never_slower"] = "rule"
    loss: float | None = Field(default=None, ge=0)
    loss_of: Literal["weight", "output", "answers"] = "weight"
    nats: float | None = Field(default=None, ge=0)

    @property
    def decomposed(self) -> bool:
        """Whether the layer does not stay dense."""
        return self.form != Dense()

    @property
    def lost(self) -> str:
        """``loses 0.0012 nats``, or without a calibration ``loses 23% of its norm``; empty where that is none or not known."""
        if not self.decomposed or self.loss is None:
            return ""
        if self.nats is not None:
            return f"loses {self.nats:.2g} nats"
        return f"loses {self.loss**0.5:.0%} of its {'output' if self.loss_of == 'output' else 'norm'}"

    def with_form(self, form: Form, reason: str, decided_by: Literal["rule", "hand", "never_slower"]) -> PlannedLayer:
        """The layer in another form; its time is then not known, unless it is dense again.

        Raises:
            RankError: The form does not fit.
        """
        form.check(self.geometry)
        timing = self.before.timing if form == Dense() else None
        after = dataclasses.replace(cost(self.geometry, form, self.uses), timing=timing)
        unpriced = {"loss": None, "loss_of": "weight", "nats": None}
        return self.model_copy(update={"form": form, "reason": reason, "after": after, "decided_by": decided_by, **unpriced})


@final
class Refined(FileValue):
    """A training of factors to the original's answers, by `lamina.refine`.

    ``steps`` were made on inputs of which ``data`` is a hash, in an order drawn by ``seed``. ``before`` and ``after`` are nats
    of divergence from the original's answers for each item held out.
    """

    steps: Annotated[int, Field(ge=1, lt=2**63)]
    seed: int
    data: str
    before: NonNegativeFloat
    after: NonNegativeFloat


@final
class FactorMethod(FileValue):
    """How the factors of a plan are found, so that applying it twice gives the same network.

    ``calibration`` is the ``identity`` of the `Calibration` that they are fitted to, so that they change the answers on its
    data least; without one they are fitted to the weights alone. ``damping`` is the share of its mean diagonal entry by which
    each of its moments is damped; without it each layer has that of the calibration. ``weights_alone`` says that such factors
    scored better than those fitted to the calibration that the plan was made with: `decompose` then leaves data aside.
    ``series`` names the way in which the series of a supernet was fitted, where the factors were taken out of one: they have
    been trained there, and ``decompose`` can only fit new ones. So it is with factors that were ``refined``, once or several
    times.
    """

    low_rank: Literal["svd"] = "svd"
    block_term: Literal["hooi"] = "hooi"
    separable: Literal["svd"] = "svd"
    calibration: str | None = None
    damping: PositiveFloat | None = None
    weights_alone: bool = False
    series: Literal["nested", "faithful"] | None = None
    refined: tuple[Refined, ...] = ()


@final
class WholeModel(FileValue):
    """The network's own cost, measured as a whole: before, as predicted from the layers, and as it came out.

    ``speedup`` is the median of the paired ratios of interleaved runs, with its 95 % interval; None where nothing
    is decomposed.
    """

    before: Cost
    after: Cost
    predicted_s: float | None = None
    speedup: PositiveFloat | None = None
    interval: tuple[PositiveFloat, PositiveFloat] | None = None


@final
class ScoredPoint(FileValue):
    """A network that was decomposed and scored on the way to a plan.

    ``speedup`` is the measured one; None where the whole network was not timed. ``score`` is None where it was no finite
    number, ``nats`` where no loss was predicted: without a calibration and its gradients, and for factors of the weights alone.
    """

    speedup: PositiveFloat | None
    score: float | None
    nats: float | None = None
    weights_alone: bool = False


@final
class Scores(FileValue):
    """What the user's score said: of the network itself, of this plan's network, and of all that were tried, in their order.

    ``recalibrated`` says that batch norms of this plan's network were recalibrated on data before it was scored so.
    """

    before: float
    after: float
    tried: tuple[ScoredPoint, ...] = ()
    recalibrated: bool = False

    @property
    def drop(self) -> float:
        """By how much the score fell."""
        return self.before - self.after

    def __str__(self) -> str:
        """``0.9337 → 0.932, a drop of 0.0017``."""
        before, after = self.before + 0.0, self.after + 0.0  # not -0
        how = "; batch norm recalibrated" if self.recalibrated else ""
        return f"{before:.6g} → {after:.6g}, a {'drop' if self.drop >= 0 else 'gain'} of {abs(self.drop):.3g}{how}"


@final
class Plan(FileValue):
    """Layer name → chosen form, with its evidence.

    Attributes:
        format: 2 in the ``plan.json`` of a saved network whose weights lie in several files, else 1.
        goal: What was asked for.
        rule: How ranks were chosen, as it prints.
        mode: Whether times are those of inference or of a training step.
        freezing: The freezing schedule over whose phases a training step was timed; None where all train.
        layers: Every layer that can be decomposed, dense ones included.
        refused: Every weighted module that cannot be, and why.
        fingerprint: Structure of the network that the plan is for; any weights of that network will do.
        setting: Conditions of all times in the plan; None where nothing was timed.
        whole: The whole network's cost, None where nothing was timed.
        put_back: Layers that `never_slower` made dense again, and why.
        examples: Shapes of the example or workloads.
        factors: How the factors are found.
        together: The calibration's curve, by which layers lose more at once than each alone (`lamina.curve.together`).
        scores: What the user's score says of the network that `decompose` makes of it, where there is one.
        notes: What the user should know first.
        shares: The share of a dense forward's time in each layer, refused module, and ``(type of other module)``; empty where
            the network was not timed here.
        saved: In the ``plan.json`` of a saved network, the weights that belong to it; `load` leaves it out.
    """

    format: Literal[1, 2] = 1
    goal: Annotated[Goal, Field(discriminator="goal")]
    rule: str
    mode: Literal["inference", "training"] = "inference"
    freezing: Annotated[AnySchedule, Field(discriminator="freezing")] | None = None
    layers: dict[str, PlannedLayer]
    refused: dict[str, str] = Field(default={})
    fingerprint: str
    setting: Setting | None = None
    whole: WholeModel | None = None
    put_back: dict[str, str] = Field(default={})
    examples: tuple[ExampleShape, ...] | None = None
    factors: FactorMethod = FactorMethod()
    together: Curve = Curve()
    scores: Scores | None = None
    notes: tuple[str, ...] = ()
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default={})
    saved: Saved | None = None

    def with_form(self, name: str, form: Form) -> Plan:
        """The plan with one layer in a form set by hand, which is then obeyed without asking the clock.

        Raises:
            PlanError: The layer is not in the plan, or is refused.
            RankError: The form does not fit the layer.
        """
        if name in self.refused:
            raise PlanError(f"{name}: cannot be decomposed: {self.refused[name]}")
        if name not in self.layers:
            raise PlanError(f"{name}: no such layer in this plan{closest(name, list(self.layers))}")
        try:
            changed = self.layers[name].with_form(form, "set by hand, not timed", "hand")
        except RankError as error:
            raise RankError(f"{name}: {error}") from error
        # Factors of the new plan are found anew: what was refined was another network.
        factors = self.factors.model_copy(update={"refined": ()})
        return self.model_copy(
            update={"layers": self.layers | {name: changed}, "whole": None, "scores": None, "factors": factors}
        )

    @property
    def decomposed(self) -> dict[str, PlannedLayer]:
        """The layers that do not stay dense."""
        return {name: layer for name, layer in self.layers.items() if layer.decomposed}

    @property
    def nats(self) -> float | None:
        """What the plan is predicted to cost the network's answers, nats of divergence for each item; None: not known.

        Layers lose more at once than each alone: more than the sum of theirs, by the curve ``together``.
        """
        each = [layer.nats for layer in self.decomposed.values()]
        return None if self.factors.calibration is None or None in each else self._known_nats

    @property
    def _known_nats(self) -> float:
        """What those layers cost the answers together of which it is known."""
        each = [layer.nats for layer in self.decomposed.values()]
        return together((nats for nats in each if nats is not None), self.together)

    @property
    def warning(self) -> str:
        """That the answers are likely to be others than the network's, which is said first; empty where nothing says so.

        It goes by what refining measured, or else by the predicted loss. Where none is known, and no score either, by the
        layers that lose more than `MUCH` of their weights, or of their outputs.
        """
        refined = self.factors.refined
        nats = refined[-1].after if refined else self._known_nats
        if nats > MUCH_NATS:
            told = f"{'lose' if refined else 'are predicted to lose'} {nats:.2g} nats an item"
            rest = "" if refined or self.nats is not None else " and more"
            return f"WARNING: the answers {told}{rest}, and {MUCH_NATS:.2g} is much: measure how accurate the network still is"
        lossy = [layer for layer in self.decomposed.values() if layer.nats is None and (layer.loss or 0.0) ** 0.5 > MUCH]
        if not lossy or self.scores or refined:
            return ""
        told = f"{len(lossy)} of {len(self.decomposed)} layers decomposed lose more than {MUCH} of their "
        told += "outputs" if lossy[0].loss_of == "output" else "norm"
        cure = "" if self.factors.calibration else ", or choose with data= (lamina.calibrate)"
        return (
            f"WARNING: {told}, and what that does to the answers is not known: measure how accurate the network still is{cure}"
        )

    def differences(self, other: Plan) -> dict[str, tuple[str, str]]:
        """What differs between two plans: layer → its form here and there, as printed; ``absent`` where it is not planned."""
        names = dict.fromkeys([*self.layers, *other.layers])
        forms = {
            name: tuple(str(p.layers[name].form) if name in p.layers else "absent" for p in (self, other)) for name in names
        }
        return {name: (here, there) for name, (here, there) in forms.items() if here != there}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is there whole or not at all.

        Raises:
            PlanError: It cannot be written there.
        """
        try:
            write_whole(Path(path), (self.model_dump_json(indent=1) + "\n").encode())
        except (OSError, ValueError) as error:  # a ValueError is a path that no file can have
            raise PlanError(one_line(f"{path}: the plan cannot be written: {error}")) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan, also that of a saved network.

        Raises:
            PlanError: No such file, cut short, of a newer format, or with a field that makes no sense; the message names it.
        """
        return cls.read(path).alone()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The same, with what the file says of weights beside it."""
        plan = read_model(
            Path(path),
            cls,
            FORMAT,
            PlanError,
            unreadable=f"{path}: not a readable plan",
            foreign=f"{path}: not a plan: it has no format number",
        )
        plan.check(str(path))
        return plan

    def alone(self) -> Plan:
        """The plan without what it says of weights beside it."""
        return self.model_copy(update={"saved": None, "format": 1})

    def check(self, where: str = "plan") -> None:
        """Raise `PlanError` where a form does not fit the geometry beside it, or a freezing schedule not the mode."""
        if self.freezing and self.mode != "training":
            raise PlanError(f"{where}: freezing: a schedule belongs to a plan for training, and this one is for {self.mode}")
        for name, layer in self.layers.items():
            try:
                layer.form.check(layer.geometry)
            except RankError as error:
                raise PlanError(one_line(f"{where}: {name}: {error}")) from error

    def __str__(self) -> str:
        """The plan in 80 columns, where no word is longer: each layer's form and costs, below it what it was and why.

        A warning stands above all, the other lines of the summary below.
        """
        rows = [
            (
                name or "(the network)",
                str(layer.form),
                change(layer.before.parameters, layer.after.parameters),
                change(layer.before.macs, layer.after.macs),
                _times(layer.before, layer.after),
            )
            for name, layer in self.layers.items()
        ]
        below = [f"{layer.geometry}{_GAP}{layer.reason}{_GAP}{layer.lost}" for layer in self.layers.values()]
        table = _table(("layer", "becomes", "parameters", "MACs", "time"), f"was{_GAP}why", rows, below)
        warned = [*_wrapped(self.warning, "", _GAP), ""] if self.warning else []
        return "\n".join([*warned, *table, "", *(part for line in self._totals() for part in _wrapped(line, "", _GAP))])

    def summary(self) -> list[str]:
        """The lines beside the table: a warning, if there is one; totals, conditions, what was refused and put back."""
        return [*([self.warning] if self.warning else []), *self._totals()]

    def _totals(self) -> list[str]:
        before, after = (
            (self.whole.before, self.whole.after)
            if self.whole
            else (
                _total([layer.before for layer in self.layers.values()]),
                _total([layer.after for layer in self.layers.values()]),
            )
        )
        of = "network" if self.whole else "these layers"
        step = f", for a training step under {self.freezing}" if self.freezing else ""
        lines = [
            f"{self.goal}, {self.rule}{step}: {len(self.decomposed)} of {len(self.layers)} layers decomposed, "
            f"{len(self.refused)} refused",
            f"{of}: parameters {change(before.parameters, after.parameters)}, MACs {change(before.macs, after.macs)}",
        ]
        if self.whole and self.whole.speedup and self.whole.interval:
            low, high = self.whole.interval
            lines.append(
                f"whole network: {_times(before, after)}, ×{self.whole.speedup:.2f} (95 % between {low:.2f} and {high:.2f})"
            )
        lines += self.accuracy()
        if self.shares:
            lines.append(self._where())
        if self.setting:
            lines.append(f"measured on {self.setting}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"put back: {name}: {why}" for name, why in self.put_back.items()]
        alike: dict[str, list[str]] = {}
        for name, why in self.refused.items():
            alike.setdefault(why, []).append(name or "(the network)")
        lines += [f"refused: {listed(names)}: {why}" for why, names in alike.items()]
        return lines

    def accuracy(self) -> list[str]:
        """What is known of the accuracy, a line each: the score, what was predicted to be lost, and what refining won back."""
        lost = self._lost()
        return [
            *([f"score: {self.scores}"] if self.scores else []),
            *([lost] if lost else []),
            *(
                f"refined: {each.steps} steps, {each.before:.2g} → {each.after:.2g} nats of divergence an item held out"
                for each in self.factors.refined
            ),
        ]

    def _lost(self) -> str:
        """What is predicted to be lost: of the answers, or where nothing tells that, of the layers' weights or outputs."""
        layers = self.decomposed
        blind = bool(layers) and all(layer.loss_of == "output" for layer in layers.values())
        by = f", by calibration {self.factors.calibration[:8]}" if self.factors.calibration else ""
        if by and layers and not blind:
            return f"predicted loss: {'not known' if self.nats is None else f'{self.nats:.2g} nats an item'}{by}"
        losses = {name: layer.loss**0.5 for name, layer in layers.items() if layer.loss is not None}
        if not losses:
            return ""
        worst = max(losses, key=lambda name: losses[name])
        what, of = ("outputs of layers", "outputs") if blind else ("weights", "norm")
        return (
            f"{what}: the layers decomposed lose {median(losses.values()):.0%} of their {of} at the median, "
            f"{losses[worst]:.0%} at most ({worst or 'the network'}){by}; what that does to the answers is not known"
        )

    def _where(self) -> str:
        """Where the dense network's time goes, and what could be gained at best."""
        inside = {name: share for name, share in self.shares.items() if name in self.layers}
        decomposed = sum(share for name, share in inside.items() if self.layers[name].decomposed)
        refused = {name: share for name, share in self.shares.items() if name in self.refused}
        most = max(refused, key=lambda name: refused[name], default="") or "the network itself"
        which = f", most of it in {most}" if len(refused) > 1 else f" ({most})"
        parts = {
            "in the layers decomposed": decomposed,
            "in layers left dense": sum(inside.values()) - decomposed,
            f"in what is refused{which}": sum(refused.values()),
        }
        others = sorted(self.shares.keys() - self.layers.keys() - self.refused.keys(), key=lambda name: -self.shares[name])
        parts |= {name.strip("()"): self.shares[name] for name in others[:2]}
        parts["elsewhere"] = sum(self.shares[name] for name in others[2:])
        told = ", ".join(f"{share:.0%} {where}" for where, share in parts.items() if share >= 0.005)
        rest = 1 - sum(inside.values())
        best = f"; at best ×{1 / rest:.2g}, if its layers took no time" if rest > 0.005 else ""
        return f"its time{' in a forward' if self.mode != 'inference' else ''}: {told}{best}"


def cost(layer: Geometry, form: Form, uses: tuple[Use, ...]) -> Cost:
    """Parameters and MACs of a layer in a form, over all its uses by their weights."""
    return Cost(form.parameters(layer), round(sum(use.weight * form.macs(layer, use) for use in uses)))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a plan file."""
    return Plan.model_json_schema()


def listed(names: list[str]) -> str:
    """Some names, the first four of them."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _total(costs: list[Cost]) -> Cost:
    return Cost(sum(c.parameters for c in costs), sum(c.macs for c in costs))


def _table(head: tuple[str, ...], told: str, rows: Sequence[tuple[str, ...]], below: Sequence[str]) -> list[str]:
    """Rows in columns, each with its text below it; where names are too long for that, they stand in lines of their own."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    wide = sum(widths) + len(_GAP) * (len(widths) - 1)
    lines: list[str] = []
    for row, text in zip((head, *rows), (told, *below), strict=True):
        name, *cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines += [name, _GAP + _GAP.join(cells)] if wide > _COLUMNS else [_GAP.join((name, *cells))]
        lines += _wrapped(text, _GAP, _GAP * 2)
        lines += ["─" * min(wide, _COLUMNS)] if row is head else []
    return [line.rstrip() for line in lines]


def _wrapped(text: str, first: str, others: str) -> list[str]:
    """A text in lines; a word that is longer than a line stays whole, so that it can be searched for."""
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _times(before: Cost, after: Cost) -> str:
    if before.timing is None:
        return "not timed"
    if after.timing is None:
        return f"{before.timing.median_ms:.3g} ms → not timed"
    if after.timing == before.timing:
        return f"{before.timing.median_ms:.3g} ms"
    return f"{before.timing.median_ms:.3g} → {after.timing.median_ms:.3g} ms"
