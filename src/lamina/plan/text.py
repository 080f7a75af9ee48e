"""How a plan prints: what was achieved above, a table of layers, and the rest below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from ..values import Cost, change
from .layer import PlannedLayer
from .record import InSequence, Refined

if TYPE_CHECKING:
    from .plan import Plan

_GAP = "  "
"""What stands between columns."""
_SHORTEST = 12
"""A layer's name is shortened to no less."""
_SPELT_OUT = 4
"""So many layers put back are told one by one without `reasons`."""


def printed(plan: Plan, width: int, reasons: bool) -> str:
    """A plan as text; see `Plan.text`."""
    parts = [
        _lines(achieved(plan), width),
        _each(plan, width) if reasons else _alike(plan, width),
        _lines(conditions(plan) if reasons else _shorter(plan), width),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def achieved(plan: Plan) -> list[str]:
    """A warning, if there is one; what was asked and what came of it: sizes, the whole network's time, accuracy, notes."""
    whole = plan.whole
    before, after = costs(plan)
    of = "network" if whole else "these layers"
    step = f", for a training step under {plan.freezing}" if plan.freezing else ""
    lines = [
        *([plan.warning] if plan.warning else []),
        f"{plan.goal}, {plan.rule}{step}: {len(plan.decomposed)} of {len(plan.layers)} layers decomposed, "
        f"{len(plan.refused)} refused",
        f"{of}: parameters {change(before.parameters, after.parameters)}, MACs {change(before.macs, after.macs)}",
    ]
    if whole and whole.speedup and whole.interval:
        low, high = whole.interval
        lines.append(f"whole network: {_times(before, after)}, ×{whole.speedup:.2f} (95 % between {low:.2f} and {high:.2f})")
    return [*lines, *accuracy(plan), *(f"note: {note}" for note in plan.notes)]


def conditions(plan: Plan) -> list[str]:
    """Where the time goes, on which machine, what was put back and what was refused."""
    return [*_conditions(plan), *(f"put back: {name}: {why}" for name, why in plan.put_back.items()), *_refused(plan)]


def accuracy(plan: Plan) -> list[str]:
    """What is known of the accuracy, a line each; see `Plan.accuracy`."""
    lost = _lost(plan)
    return [
        *([f"score: {plan.scores}"] if plan.scores else []),
        *([lost] if lost else []),
        *([f"fitted in sequence: {_nearer(in_sequence)}"] if (in_sequence := plan.factors.sequential) else []),
        *(f"refined: {each.steps} steps, {_nearer(each)}" for each in plan.factors.refined),
    ]


def _nearer(fit: InSequence | Refined) -> str:
    return f"{fit.before:.2g} → {fit.after:.2g} nats of divergence an item held out"


def where(plan: Plan) -> str:
    """Where the dense network's time goes, and what could be gained at best."""
    inside = {name: share for name, share in plan.shares.items() if name in plan.layers}
    decomposed = sum(share for name, share in inside.items() if plan.layers[name].decomposed)
    refused = {name: share for name, share in plan.shares.items() if name in plan.refused}
    most = max(refused, key=lambda name: refused[name], default="") or "the network itself"
    which = f", most of it in {most}" if len(refused) > 1 else f" ({most})"
    parts = {
        "in the layers decomposed": decomposed,
        "in layers left dense": sum(inside.values()) - decomposed,
        f"in what is refused{which}": sum(refused.values()),
    }
    others = sorted(plan.shares.keys() - plan.layers.keys() - plan.refused.keys(), key=lambda name: -plan.shares[name])
    parts |= {name.strip("()"): plan.shares[name] for name in others[:2]}
    parts["elsewhere"] = sum(plan.shares[name] for name in others[2:])
    told = ", ".join(f"{share:.0%} {where}" for where, share in parts.items() if share >= 0.005)
    rest = 1 - sum(inside.values())
    best = f"; at best ×{1 / rest:.2g}, if its layers took no time" if rest > 0.005 else ""
    return f"its time{' in a forward' if plan.mode != 'inference' else ''}: {told}{best}"


def costs(plan: Plan) -> tuple[Cost, Cost]:
    """What the network costs before and after, or where it was not measured these layers."""
    return (plan.whole.before, plan.whole.after) if plan.whole else (_total(plan, "before"), _total(plan, "after"))


def refused_alike(plan: Plan) -> dict[str, list[str]]:
    """Reason → the names of what is refused for it."""
    alike: dict[str, list[str]] = {}
    for name, why in plan.refused.items():
        alike.setdefault(why, []).append(name)
    return alike


def listed(names: Sequence[str]) -> str:
    """Some names, the first four of them."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _conditions(plan: Plan) -> list[str]:
    return [*([where(plan)] if plan.shares else []), *([f"measured on {plan.setting}"] if plan.setting else [])]


def _refused(plan: Plan) -> list[str]:
    return [f"refused: {listed([_called(name) for name in names])}: {why}" for why, names in refused_alike(plan).items()]


def _shorter(plan: Plan) -> list[str]:
    """The conditions without reasons that are each layer's own, and how to see those."""
    dense = [_called(name) for name, layer in plan.layers.items() if not layer.decomposed and name not in plan.put_back]
    lines = _conditions(plan)
    if len(plan.put_back) <= _SPELT_OUT:
        lines += [f"put back: {_called(name)}: {why}" for name, why in plan.put_back.items()]
    else:
        lines.append(f"put back, {len(plan.put_back)} layers: {listed([_called(name) for name in plan.put_back])}")
    if dense:
        lines.append(f"left dense, {len(dense)} of {len(plan.layers)} layers: {listed(dense)}")
    lines += _refused(plan)
    if plan.layers:
        lines.append("why each layer is what it is: lamina show --reasons, or plan.text(reasons=True)")
    return lines


def _lost(plan: Plan) -> str:
    """What is predicted to be lost: of the answers, or where nothing tells that, of the layers' weights or outputs."""
    layers = plan.decomposed
    blind = bool(layers) and all(layer.loss_of == "output" for layer in layers.values())
    by = f", by calibration {plan.factors.calibration[:8]}" if plan.factors.calibration else ""
    if by and layers and not blind:
        return f"predicted loss: {'not known' if plan.nats is None else f'{plan.nats:.2g} nats an item'}{by}"
    losses = {name: layer.loss**0.5 for name, layer in layers.items() if layer.loss is not None}
    if not losses:
        return ""
    worst = max(losses, key=lambda name: losses[name])
    what, of = ("outputs of layers", "outputs") if blind else ("weights", "norm")
    return (
        f"{what}: the layers decomposed lose {median(losses.values()):.0%} of their {of} at the median, "
        f"{losses[worst]:.0%} at most ({worst or 'the network'}){by}; what that does to the answers is not known"
    )


def _total(plan: Plan, when: str) -> Cost:
    costs: list[Cost] = [getattr(layer, when) for layer in plan.layers.values()]
    return Cost(sum(cost.parameters for cost in costs), sum(cost.macs for cost in costs))


def _alike(plan: Plan, width: int) -> list[str]:
    """A line for each kind of decomposed layer: layers that were the same, became the same and take the same are one."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, layer in plan.decomposed.items():
        parameters, macs = (change(getattr(layer.before, n), getattr(layer.after, n)) for n in ("parameters", "macs"))
        cells = (str(layer.geometry), str(layer.form), parameters, macs, _times(layer.before, layer.after))
        kinds.setdefault(cells, []).append(name)
    if not kinds:
        return []
    lost = [_most_lost([plan.layers[name] for name in names]) for names in kinds.values()]
    head = ("layer", "was", "becomes", "parameters", "MACs", "time", "loses")
    rows = [(_counted(names), *cells, most) for (cells, names), most in zip(kinds.items(), lost, strict=True)]
    # Sizes in sum stand above, so they go first where the table is too wide; then names are shortened; then goes what it was.
    empty = () if any(lost) else (6,)
    for left_out in ((), (4,), (3, 4), (1, 3, 4)):
        kept = [column for column in range(len(head)) if column not in (*left_out, *empty)]
        table = [[row[column] for column in kept] for row in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        room = width - sum(widths[1:]) - len(_GAP) * (len(widths) - 1)
        if widths[0] <= room or (room >= _SHORTEST and {3, 4} <= set(left_out)):
            break
    widths[0] = min(widths[0], max(room, _SHORTEST))
    lines = [
        _GAP.join(cell.ljust(w) for cell, w in zip((_shortened(row[0], widths[0]), *row[1:]), widths, strict=True)).rstrip()
        for row in table
    ]
    return [lines[0], "─" * min(sum(widths) + len(_GAP) * (len(widths) - 1), width), *lines[1:]]


def _counted(names: Sequence[str]) -> str:
    return _called(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _shortened(name: str, width: int) -> str:
    """A name in so many columns; what stands in its middle goes first, as beginnings and ends tell layers apart."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def _most_lost(layers: Sequence[PlannedLayer]) -> str:
    """What the layer that loses most loses, in short."""
    most = max(layers, key=lambda layer: layer.nats if layer.nats is not None else layer.loss or 0.0)
    return most.lost.removeprefix("loses ").replace(" of its ", " of ")


def _each(plan: Plan, width: int) -> list[str]:
    """Every layer by itself: its form and costs, below it what it was and why."""
    rows = [
        (
            _called(name),
            str(layer.form),
            change(layer.before.parameters, layer.after.parameters),
            change(layer.before.macs, layer.after.macs),
            _times(layer.before, layer.after),
        )
        for name, layer in plan.layers.items()
    ]
    below = [f"{layer.geometry}{_GAP}{layer.reason}{_GAP}{layer.lost}" for layer in plan.layers.values()]
    head = ("layer", "becomes", "parameters", "MACs", "time")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    wide = sum(widths) + len(_GAP) * (len(widths) - 1)
    lines: list[str] = []
    for row, told in zip((head, *rows), (f"was{_GAP}why", *below), strict=True):
        name, *cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        # Where names are too long for that, they stand in lines of their own.
        lines += [name, _GAP + _GAP.join(cells)] if wide > width else [_GAP.join((name, *cells))]
        lines += _wrapped(told, width, _GAP, _GAP * 2)
        lines += ["─" * min(wide, width)] if row is head else []
    return [line.rstrip() for line in lines]


def _called(name: str) -> str:
    return name or "(the network)"


def _lines(texts: Sequence[str], width: int) -> list[str]:
    return [part for line in texts for part in _wrapped(line, width, "", _GAP)]


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    """A text in lines; a word that is longer than a line stays whole, so that it can be searched for."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _times(before: Cost, after: Cost) -> str:
    if before.timing is None:
        return "not timed"
    if after.timing is None:
        return f"{before.timing.median_ms:.3g} ms → not timed"
    if after.timing == before.timing:
        return f"{before.timing.median_ms:.3g} ms"
    return f"{before.timing.median_ms:.3g} → {after.timing.median_ms:.3g} ms"
