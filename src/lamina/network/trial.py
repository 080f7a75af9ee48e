"""Runs a network on a shadow of itself, and proves by calling: what was exchanged is never read again.

A list of the odd places in which a network may hold a layer would never be complete. So every operation of a run is watched:
one that reads the bytes of a weight that has been exchanged, wherever it found them, is refused by the layer's name.
"""

from __future__ import annotations

import dataclasses
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..errors import LayerError, UntriedWarning
from ..values import Workload
from .copying import Exchanged, shadow
from .memory import Place, place, whole_place
from .observe import Observation, observing, oddity
from .placing import opened, placed
from .preserve import forbid_lazy, repeatable
from .running import ANSWERING, MODES, Looking, complaint, set_mode
from .walk import Layer

_READ_ELSEWHERE = (
    "the network reads this layer's dense weight from another place than the layer, such as a closure or a list of weights"
)


class StillUsed(Exception):
    """A run read a weight that has been exchanged."""


class _Written(Exception):
    """A run was about to write into a tensor of the network that its shadow stands for."""


@final
class _Watch(Looking):
    """Forbids reading what is gone, and writing into what is the network's own."""

    def __init__(self, gone: Mapping[str, Place], own: Sequence[Place]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gone = _Regions(gone.items())
        self.own = _Regions((number, at) for number, at in enumerate(own))
        self.read: list[str] = []
        self.written: set[Place] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.gone:
            for tensor in _tensors(args, kwargs.values()):
                if (title := self.gone.find(place(tensor))) is not None:
                    self.read.append(title)
                    raise StillUsed(title)
        for position, name in _written_by(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in _tensors((value,)):
                at = place(tensor)
                if at and self.own.find(at) is not None:
                    self.written.add(self.own.places[self.own.find(at)])
                    raise _Written("it writes into a tensor of the network itself, not of the copy that is run")
        return func(*args, **kwargs)


class _Regions:
    """Places by which something is found again, sorted so that this is quick."""

    def __init__(self, entries: Iterable[tuple[Any, Place]]) -> None:
        by_start = sorted(((at, key) for key, at in entries), key=lambda entry: entry[0].start)
        self.places = {key: at for at, key in by_start}
        self._keys = [key for _, key in by_start]
        self._starts = [at.start for at, _ in by_start]
        self._reach = list(accumulate((at.end for at, _ in by_start), max))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, at: Place | None) -> Any:
        """The key of a place that overlaps, or None."""
        if at is None:
            return None
        number = bisect_left(self._starts, at.end) - 1
        while number >= 0 and self._reach[number] > at.start:
            if self.places[self._keys[number]].overlaps(at):
                return self._keys[number]
            number -= 1
        return None


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, list | tuple):
                yield from _tensors(item)


@cache
def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes into, by position and name."""
    return tuple(
        (number, argument.name)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@final
@dataclass(slots=True)
class Outcome:
    """What became of a trial: what the network said in each mode, and which exchanged weights were read all the same."""

    complaints: dict[str, str | None] = field(default_factory=dict)
    """For each mode None where the network ran, else its complaint."""
    still_used: list[str] = field(default_factory=list)
    answer: list[Tensor] = field(default_factory=list)
    """The tensors that the network answered in eval without gradients, where they were asked for."""
    apart: frozenset[Place] = frozenset()
    """Storages of parameters into which the network writes as it runs: a `shadow` must have copies of them."""


def tried(
    model: nn.Module,
    workload: Workload,
    exchanged: Exchanged | None = None,
    gone: Mapping[str, Tensor] | None = None,
    *,
    answering: bool = False,
    modes: Iterable[str] = tuple(MODES),
    prepare: Callable[[nn.Module], None] | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Outcome:
    """Run a shadow of a network in each mode, from the same random state each time. The network itself is only read.

    Args:
        model: The network.
        workload: What it is fed.
        exchanged: Modules that others take the place of in the shadow.
        gone: Weights by title that must not be read any more; by default none.
        answering: Whether to run it in eval without gradients first of all, before anything is prepared, and to keep what it
            answers.
        modes: Keys of `MODES`.
        prepare: Is given each shadow before it runs in these modes, to put hooks on it.
        within: A context for each run.
    """
    forbid_lazy(model)
    own = {at for tensor in [*model.parameters(), *model.buffers()] if (at := whole_place(tensor))}
    apart: frozenset[Place] = frozenset()
    gone = gone or {}
    while True:
        twin = shadow(model, exchanged, apart, list(gone.values()))
        watch = _Watch({title: at for title, weight in gone.items() if (at := place(weight))}, list(own))
        answer: list[Tensor] = []
        complaints = {ANSWERING: _said(twin, workload, ANSWERING, watch, within, answer)} if answering else {}
        if prepare:
            prepare(twin)
        complaints |= {mode: _said(twin, workload, mode, watch, within) for mode in modes}
        if watch.written <= apart:  # what is written all the same is reached by a way that a copy does not follow
            return Outcome(complaints, list(dict.fromkeys(watch.read)), answer, apart)
        apart |= watch.written  # nothing was written: once more, with a copy of what the run writes into


def _said(
    model: nn.Module,
    workload: Workload,
    mode: str,
    watch: _Watch,
    within: Callable[[], AbstractContextManager[Any]],
    answer: list[Tensor] | None = None,
) -> str | None:
    training, context = MODES[mode]
    set_mode(model, training)
    said = ""
    # A network that takes gradients within its forward needs what the graph keeps.
    for keeping in (_keeping_nothing, nullcontext):
        with repeatable(model):
            try:
                with context(), keeping(), within(), watch:
                    output = workload.run(model)
                if answer is not None:
                    answer[:] = [leaf.detach() for leaf in tree_iter(output) if isinstance(leaf, Tensor)]
                return None if not watch.written else "it writes into tensors of the network itself"
            except Exception as error:  # whatever the user's forward raises is the answer here
                said = complaint(error, model, workload)
        if watch.written or watch.read:
            break
    return said


@contextmanager
def _keeping_nothing() -> Iterator[None]:
    """No backward follows, so the graph need not keep activations."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        yield


def modes_that_run(model: nn.Module, workload: Workload) -> dict[str, str | None]:
    """For each of train, eval, eval + no_grad and inference_mode: None where the network runs, else what it said."""
    return tried(model, workload).complaints


def prove(
    model: nn.Module,
    layers: Sequence[Layer],
    make: Callable[[Layer], nn.Module],
    examples: Sequence[Workload],
    what: str,
    exact: Callable[[Layer], nn.Module] | None = None,
) -> None:
    """Make sure, before anything is changed, that a network gets on without some of its layers.

    It is run on each example in each mode, as it is and with others in its layers' places. Refused is a layer that does not
    compute what can be read off it, one whose weight is read from elsewhere, and one without which the network does not run in
    a mode in which it ran before. Where an example runs in no mode at all, nothing was proved, and a warning says so.

    Args:
        model: The network; it is only read.
        layers: The layers that are to be exchanged.
        make: What takes a layer's place for the trial.
        examples: What the network is fed.
        what: What becomes of a layer, for the message: "decomposed".
        exact: What computes the same as the layer and is of the kind that will take its place: with it the network must answer
            what it answered, or its own code goes by the types or the number of its modules.

    Raises:
        LayerError: The message names the first culprit.
    """
    if not examples:
        warn_untried("nothing is known of the network's inputs")
    for workload in examples:
        seen, outcome = observed(model, layers, workload, MODES, answering=exact is not None)
        ran, wanted = outcome.complaints, outcome.answer
        for layer in layers:
            if odd := oddity(seen[layer.name]):
                raise LayerError(f"{layer.title}: {odd}; skip it")
        modes = [mode for mode, why in ran.items() if why is None]
        if not modes:
            warn_untried(f"the network does not run on inputs like the example's ({workload}): {ran[ANSWERING]}")
            continue

        def without(some: Sequence[Layer], workload: Workload = workload, modes: Sequence[str] = modes) -> Outcome:
            gone = {layer.title: layer.parameter for layer in some}
            return tried(model, workload, placed((layer, make(layer)) for layer in some), gone, modes=modes)

        outcome = without(layers)
        forbid_use(outcome)
        broken = {mode: why for mode, why in outcome.complaints.items() if why}
        if not broken:
            if exact and ANSWERING in modes:
                _forbid_other_answers(model, layers, exact, workload, wanted, what)
            continue
        for layer in layers:
            alone = {mode: why for mode, why in without([layer]).complaints.items() if why and mode in broken}
            if alone:
                mode, why = next(iter(alone.items()))
                raise LayerError(f"{layer.title}: with this layer {what} the network does not run in {mode}: {why}; skip it")
        mode, why = next(iter(broken.items()))
        raise LayerError(f"with these layers {what} the network does not run in {mode}: {why}; the network is as it was")


def objections(
    model: nn.Module, layers: Iterable[Layer], make: Callable[[Layer], nn.Module], workload: Workload, mode: str
) -> dict[str, str]:
    """Layers that a network does not get on without, by name, and why: found before anything is spent on them.

    It is no proof: one mode is tried, and a network that fails only with several layers exchanged together is not found out.

    Args:
        model: The network; it is only read.
        layers: The layers that may be exchanged.
        make: What takes a layer's place for the trial.
        workload: What the network is fed.
        mode: A key of `MODES` in which it runs.
    """
    rest, found = list(layers), dict[str, str]()

    def without(some: Sequence[Layer]) -> Outcome:
        gone = {layer.title: layer.parameter for layer in some}
        return tried(model, workload, placed((layer, make(layer)) for layer in some), gone, modes=[mode])

    while rest:
        outcome = without(rest)
        why = {layer.name: _READ_ELSEWHERE for layer in rest if layer.title in outcome.still_used}
        if not why and outcome.complaints[mode]:
            alone = ((layer.name, without([layer]).complaints[mode]) for layer in rest)
            why = next(({name: f"without it the network does not run: {says}"} for name, says in alone if says), {})
        if not why:
            break
        found |= why
        rest = [layer for layer in rest if layer.name not in why]
    return found


def _forbid_other_answers(
    model: nn.Module,
    layers: Sequence[Layer],
    exact: Callable[[Layer], nn.Module],
    workload: Workload,
    wanted: Sequence[Tensor],
    what: str,
) -> None:
    def apart(some: Sequence[Layer]) -> bool:
        twins = placed((layer, exact(layer)) for layer in some)
        return not _alike(wanted, tried(model, workload, twins, modes=(), answering=True).answer)

    if apart(layers):
        culprit = next((layer.title for layer in layers if apart([layer])), "with these layers")
        raise LayerError(
            f"{culprit}: {what}, even with factors that compute the same, the network answers something else: its code goes by "
            "the types or the number of its modules; skip it"
        )


def _alike(wanted: Sequence[Tensor], answer: Sequence[Tensor]) -> bool:
    """Whether two answers are equal up to rounding through a deep network, which is half of the digits."""
    if [(t.shape, t.dtype) for t in wanted] != [(t.shape, t.dtype) for t in answer]:
        return False
    for a, b in zip(wanted, answer, strict=True):
        if not a.is_floating_point() or a.is_meta or a.layout != torch.strided or a.is_nested:
            continue
        infinite = ~a.isfinite()
        size, difference = (_norm(t.masked_fill_(infinite, 0.0)) for t in (a.clone(), a - b))
        if not difference <= torch.finfo(a.dtype).eps ** 0.5 * size:
            return False
    return True


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def observed(
    model: nn.Module,
    layers: Iterable[Layer],
    workload: Workload,
    modes: Iterable[str] = (ANSWERING,),
    *,
    answering: bool = False,
) -> tuple[dict[str, Observation], Outcome]:
    """How a network calls each of some layers on a workload, all modes together, by name; and what became of the run."""
    seen: dict[str, Observation] = {}

    def look(twin: nn.Module) -> None:
        for layer in layers:
            seen[layer.name] = Observation()
            module = twin.get_submodule(layer.name) if layer.name else twin
            observing(dataclasses.replace(layer, module=module), seen[layer.name])

    layers = list(layers)
    taken_apart = opened(layers)
    outcome = tried(model, workload, taken_apart, modes=modes, prepare=look, answering=answering and not taken_apart)
    if answering and taken_apart:
        outcome.answer = tried(model, workload, modes=(), answering=True).answer  # that of the network as it is
    return seen, outcome


def warn_untried(why: str) -> None:
    """Say that nothing was proved, and what that means."""
    warnings.warn(
        f"{why}; so the network was not tried with its layers exchanged: compare outputs yourself", UntriedWarning, stacklevel=4
    )


def forbid_use(outcome: Outcome) -> None:
    """Refuse where a trial read the weight of a layer that was exchanged.

    Raises:
        LayerError: The message names the first one.
    """
    if outcome.still_used:
        raise LayerError(f"{outcome.still_used[0]}: {_READ_ELSEWHERE}; skip it")
