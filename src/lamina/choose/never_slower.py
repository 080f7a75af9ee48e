"""Times the whole network with its planned forms, and puts back what does not pay.

A layer that wins alone may lose in its place: its neighbours' data lies elsewhere in the caches, one more kernel must be
started. So every planned layer is timed inside the running network, dense and decomposed in turn; those that are not faster
there become dense again. Then the whole network is timed, until it is faster with the plan than without, or nothing is left.

A form costs accuracy, so doubt speaks for the dense layer. The interval of paired ratios has three outcomes: faster by a
margin, beyond doubt; not faster by it, beyond doubt; undecided. What is undecided is measured on, up to a cap, and is dense in
the end. The reported figure comes from rounds that decided nothing, so it owes nothing to luck.

Forms are filled with random weights: a time needs shapes only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from statistics import mean, median
from typing import Any, Protocol, final

from torch import Tensor, nn

from ..comparison import added_up, ready, step, time_each
from ..forms import Form
from ..layers.build import random
from ..measure.clock import Effort, between, disturbed, interleave, mark, ratio, ratio_interval
from ..network.copying import shadow
from ..network.memory import devices_of
from ..network.placing import placed
from ..network.preserve import repeatable
from ..network.surgery import adopt
from ..network.walk import Layer
from ..values import Mode, Workload

MARGIN = 0.01
"""What gains less is not worth a layer's accuracy. Of several workloads, one that loses less loses nothing."""
LEVEL = 0.99
"""Beyond doubt: surer than a report's 95 %, since it is asked of many layers, and up to `LOOKS` times of each."""
LOOKS = 4
"""A question is measured so many times before what is undecided counts as no gain."""
TWINS = 9
"""A look is at so many pairs of twins, where time allows: a 95 % interval may then leave out one at either end."""
_MANY = 100
"""Of a network that runs less often in the time of a look, it is at one pair."""
AGREED, SURER = 2, 0.02
"""At one pair so many looks must say, each for itself, that the whole network is faster, and by so much."""
_MOST_COPIED = 2**28
"""Bytes of dense weights that a twin has elsewhere in memory; more are those of large layers, to which it does not matter."""

Forms = Mapping[str, Form]
Pair = tuple[list[float], list[float]]
"""Seconds dense and decomposed, round by round."""
Advance = Callable[[str, int, int], object]
"""Is told what is being timed, how many looks have been taken at it, and how many there are at most."""


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What is left of the chosen forms, what was put back and why, and the whole network's times in seconds, round by round.

    Where nothing is left, ``after`` is ``before``, and there is no speed-up to speak of.
    """

    kept: dict[str, Form]
    put_back: dict[str, str]
    before: list[float]
    after: list[float]

    @property
    def speedup(self) -> float | None:
        """The median of the paired ratios before / after."""
        return ratio(self.before, self.after) if self.kept else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        return ratio_interval(self.before, self.after) if self.kept else None


class Watch(Protocol):
    """What takes the times that `never_slower` judges by; each call is a look at networks made anew.

    One that has an attribute ``at_one_pair``, and it is true, looks at one pair of networks each time, so that where these lie
    in memory is in all the times of a look. Of one that has ``alone``, times in place are of layers alone: they say which layer
    gains least where the whole network loses, and put nothing back by themselves.
    """

    def whole(self, forms: Forms) -> list[Pair]:
        """For each workload the times of the whole network."""

    def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
        """For each layer and each workload the times that a run of the network spends in that layer."""


def never_slower(
    model: nn.Module,
    layers: Mapping[str, Layer],
    chosen: Forms,
    examples: Sequence[Workload],
    mode: Mode,
    *,
    effort: Effort | None = None,
    stopwatch: Watch | None = None,
    advance: Advance = lambda what, looks, most: None,
) -> Verdict:
    """Make layers dense again until each is faster in its place, and the whole faster and on no workload slower.

    Args:
        model: The dense network.
        layers: Its layers by name.
        chosen: The forms to be judged.
        examples: What the network is fed; it must not be slower on any of them.
        mode: Inference or training, under a freezing schedule perhaps.
        effort: How long a look takes.
        stopwatch: What takes the times; tests give their own.
        advance: Is told how the judging goes on, for a progress bar.
    """
    watch = stopwatch or Stopwatch(model, layers, examples, mode, effort or Effort(2.0, 8, 120))
    kept, put_back = dict(chosen), dict[str, str]()
    undecided = [] if getattr(watch, "alone", False) else list(kept)

    places: dict[str, list[Pair]] = {}
    for look in range(LOOKS):
        if not undecided:
            break
        advance("timing layers in their places", look, LOOKS)
        for name, pairs in watch.in_place(kept).items():
            places[name] = _more(places.get(name), pairs)
        answers = {name: _gains(_asked(examples, places[name])[0], 1 + MARGIN, look) for name in undecided}
        undecided = [name for name, answer in answers.items() if answer is None and look + 1 < LOOKS]
        for name in [name for name, answer in answers.items() if not answer and name not in undecided]:
            (dense, decomposed), form = _asked(examples, places[name])[0], kept.pop(name)
            if any(dense):
                put_back[name] = f"{form} takes {ratio(decomposed, dense):.2f} of the dense layer's time inside the network"
            else:
                put_back[name] = f"the layer is never called in {mode.name}"

    least = 1
    while rest := list(kept):
        verdict = _losing(watch, kept, examples, advance)
        if verdict is None:
            break
        places = places or watch.in_place(kept)
        at, lost, why = verdict
        gained = {name: median(d - f for d, f in zip(*_asked(examples, places[name])[at], strict=True)) for name in rest}
        rest.sort(key=lambda name: gained[name])
        # As many as make up for the loss by their own times; where those do not explain it, twice as many as the last time.
        made_up = accumulate(-gained[name] for name in rest)
        enough = next((number for number, seconds in enumerate(made_up, 1) if seconds >= lost), 0)
        for name in rest[: max(enough, least)]:
            put_back[name] = f"{kept.pop(name)} gains too little: {why}"
        least *= 2

    advance("timing the whole network", 0, 1)
    before, after = timed_on(lambda: added_up(examples, watch.whole(kept)))
    return Verdict(kept, put_back, before, after if kept else before)


def timed_on(look: Callable[[], Sequence[list[float]]]) -> Pair:
    """The times of one look after the other, until nothing disturbs what they tell: more rounds tell more surely even so."""
    found: Pair = [], []
    for _ in range(LOOKS):
        before, after = look()
        found = found[0] + before, found[1] + after
        if not disturbed(ratio_interval(*found)):
            break
    return found


def _losing(watch: Watch, forms: Forms, examples: Sequence[Workload], advance: Advance) -> tuple[int, float, str] | None:
    """Which question (see `_asked`) the whole network fails, by how many seconds, and in words; None where it fails none."""
    pairs: list[Pair] | None = None
    agreed = 0
    for look in range(LOOKS):
        advance("timing the whole network", look, LOOKS)
        pairs = _more(pairs, fresh := watch.whole(forms))
        asked = _asked(examples, pairs)
        alone = getattr(watch, "at_one_pair", False)
        bounds = [1 + (SURER if alone else MARGIN)] + [1 - MARGIN] * (len(asked) - 1)
        answers = [_gains(pair, bound, look) for pair, bound in zip(asked, bounds, strict=True)]
        agreed += all(_gains(pair, bound, look) for pair, bound in zip(_asked(examples, fresh), bounds, strict=True))
        if alone and agreed < AGREED:
            answers = [None if answer else answer for answer in answers]
        if all(answers):
            return None
        if False in answers:
            break
    at = min((at for at, answer in enumerate(answers) if not answer), key=lambda at: (answers[at] is None, ratio(*asked[at])))
    dense, small = asked[at]
    lost = median(s - d / bounds[at] for d, s in zip(dense, small, strict=True))
    return at, lost, f"the whole network ran at ×{ratio(dense, small):.2f} with it" + (f" on {examples[at - 1]}" if at else "")


def _asked(examples: Sequence[Workload], pairs: Sequence[Pair]) -> list[Pair]:
    """What is asked for gains: the workloads' sum by their weights; where there are several, then each of them."""
    dense, decomposed = added_up(examples, pairs)
    return [(dense, decomposed), *(pairs if len(pairs) > 1 else ())]


def _gains(pair: Pair, bound: float, look: int) -> bool | None:
    """Whether the ratio is at least the bound, beyond doubt; None where it is undecided, also after a first look that says no.

    One bad moment may last as long as a look, and what is put back is not asked again.
    """
    if not any(pair[0]):
        return False
    low, high = ratio_interval(*pair, LEVEL)
    return True if low >= bound else False if high < bound and look > 0 else None


def _more(pairs: list[Pair] | None, more: list[Pair]) -> list[Pair]:
    return more if pairs is None else [(a + c, b + d) for (a, b), (c, d) in zip(pairs, more, strict=True)]


@final
@dataclass(slots=True)
class Stopwatch:
    """Takes the times that `never_slower` judges by.

    Where things lie in memory makes networks of many small layers some per cent faster or slower, and no number of rounds at
    one place averages that out. So a look is at several pairs of twins, each pair gives one pair of times, and intervals are
    over pairs: twins of equal speed then read ×1.00 (benchmarks/judging.py). Of a network so slow that this takes too long, it
    is at one pair, for many rounds, which is made in the other order at every other look: its layers are large.

    Both twins are shadows of the network, and both have the layers in question in fresh memory.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    examples: Sequence[Workload]
    mode: Mode
    effort: Effort
    _runs: float | None = field(default=None, init=False)
    """How many runs of the network a look would take the time of; None before anybody looked."""
    _looked: int = field(default=0, init=False)
    """How many looks at one pair there were."""

    @property
    def at_one_pair(self) -> bool:
        """Whether the network is so slow that a look is at one pair of twins."""
        return self._runs is not None and self._runs < _MANY

    def whole(self, forms: Forms) -> list[Pair]:
        """For each workload the times of the whole network, dense and with the forms, interleaved."""
        return self._look(forms, self._whole, self._as_it_is)

    def in_place(self, forms: Forms) -> dict[str, list[Pair]]:
        """For each layer and workload the seconds that one run of the network spends in it, dense and in its form.

        It is the sum over the layer's calls and, under freezing, the mean over the phases by their shares. In training it is
        the time of the forward and of the layer's own nodes in the backward.
        """
        flat = iter(self._look(forms, self._in_place, self._called))
        return {name: [next(flat) for _ in self.examples] for name in forms}

    def _look(
        self,
        forms: Forms,
        measure: Callable[[nn.Module, nn.Module, Forms, Effort, int], list[Pair]],
        dense: Callable[[list[Layer]], nn.Module],
    ) -> list[Pair]:
        effort = replace(self.effort, seconds=self.effort.seconds * len(self.examples))
        if self._runs is None:
            once = time_each([self.model], self.examples, self._modes[0], Effort(0.0, 1, 1, sample=0.0))
            self._runs = effort.seconds / sum(of_one[0][0] for of_one in once)
        if self.at_one_pair:
            number, self._looked = self._looked % 2, self._looked + 1
            return measure(*self._pair(forms, number, dense), forms, effort, number)
        found: list[Pair] | None = None
        for number in range(TWINS):
            twins = self._pair(forms, number, dense)  # while the last one lives, whose memory it would else get
            one = replace(effort, seconds=effort.seconds / TWINS, least=3, most=-(-effort.most // TWINS))
            found = _more(found, [_middle(pair) for pair in measure(*twins, forms, one, number)])
        assert found is not None
        return found

    def _pair(self, forms: Forms, number: int, dense: Callable[[list[Layer]], nn.Module]) -> tuple[nn.Module, nn.Module]:
        """The network dense and with the forms; every other time made in the other order."""
        layers = [self.layers[name] for name in forms]

        def small() -> nn.Module:
            return shadow(self.model, placed(drawn(layer, forms[layer.name]) for layer in layers))

        with repeatable(self.model):
            if number % 2:
                last = small()
                return dense(layers), last
            return dense(layers), small()

    def _called(self, layers: list[Layer]) -> nn.Module:
        """A dense network in which each of some layers is called."""
        return shadow(self.model, placed(_anew(layer, _copied(layers)) for layer in layers))

    def _as_it_is(self, layers: list[Layer]) -> nn.Module:
        """A dense network: an attention that holds its projections goes on doing so."""
        held = {layer.holder for layer in layers if layer.holder is not None} if _copied(layers) else set()
        alone = placed(_anew(layer, _copied(layers)) for layer in layers if layer.holder is None)
        return shadow(self.model, alone | {holder: copy.deepcopy(holder) for holder in held})

    def _whole(self, dense: nn.Module, small: nn.Module, forms: Forms, effort: Effort, number: int) -> list[Pair]:
        turn = -1 if number % 2 else 1  # neither always stands at the seam of two rounds
        times = time_each([dense, small][::turn], self.examples, self._modes[::turn], effort)
        return [(before, after) for before, after in (each[::turn] for each in times)]

    @property
    def _modes(self) -> list[Mode]:
        """The dense network's, in which nothing rests, and the decomposed one's."""
        return [self.mode.unfrozen, self.mode]

    def _in_place(self, dense: nn.Module, small: nn.Module, forms: Forms, effort: Effort, number: int) -> list[Pair]:
        spent = [self._spent(dense, small, forms, workload, effort, number) for workload in self.examples]
        # A quick workload makes more rounds than a slow one; what is added up must stand in rounds of one number.
        rounds = min((len(dense) for each in spent for dense, _ in each.values()), default=0)
        return [(each[name][0][:rounds], each[name][1][:rounds]) for name in forms for each in spent]

    def _spent(
        self, dense: nn.Module, small: nn.Module, names: Collection[str], workload: Workload, effort: Effort, number: int
    ) -> dict[str, Pair]:
        phases = self.mode.phases
        # By layer and by run, which is the dense network's (0) or a phase's (1, …): for each time it is run the layer's spans.
        spans: dict[str, list[list[list[Span]]]] = {name: [[] for _ in range(1 + len(phases))] for name in names}
        current = 0

        def begun(at: int, run: Callable[[], Any]) -> Any:
            nonlocal current
            current = at
            for each in spans.values():
                each[at].append([])
            return run()

        def keep(each: list[list[list[Span]]], span: Span) -> None:
            each[current][-1].append(span)

        with ready([dense, small], self.mode):
            steps = [step(dense, workload, self._modes[0]), *(step(small, workload, self.mode, p.resting) for p in phases)]
            for name in names:
                for network in (dense, small):
                    _watch(network.get_submodule(name), partial(keep, spans[name]))
            runs = [partial(begun, at, run) for at, run in enumerate(steps)][:: -1 if number % 2 else 1]
            # A run for a sample: its spans are of one run, and of a round the mean over its runs.
            rounds = len(interleave(runs, devices_of(dense, small), replace(effort, precision=0.0, sample=0.0))[0])

        def by_round(runs: list[list[Span]]) -> list[float]:
            times = [sum(between(*span) for span in run) for run in runs]
            times = times[2:]  # two runs warmed up
            each = len(times) // rounds
            return [mean(times[start : start + each]) for start in range(0, len(times), each)]

        spent = {name: [by_round(runs) for runs in each] for name, each in spans.items()}
        return {
            name: (first, [sum(p.share * t for p, t in zip(phases, times, strict=True)) for times in zip(*others, strict=True)])
            for name, (first, *others) in spent.items()
        }


def drawn(layer: Layer, form: Form) -> tuple[Layer, nn.Module]:
    """A layer with what it becomes in a form, of random weights."""
    return layer, adopt(random(layer.geometry, form, layer.module), layer.module)


def _copied(layers: Iterable[Layer]) -> bool:
    return sum(layer.weight.nbytes for layer in layers) <= _MOST_COPIED


def _anew(layer: Layer, copied: bool) -> tuple[Layer, nn.Module]:
    """A layer with a dense one made as its forms are, one after the other, on a copy of its weight."""
    weight, bias = (None if t is None else t.detach().clone() if copied else t.detach() for t in (layer.weight, layer.bias))
    assert weight is not None
    new = layer.reader.dense(layer.geometry, weight, bias)
    for parameter, old in zip(new.parameters(), layer.module.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    return layer, adopt(new, layer.module)


def _middle(pair: Pair) -> Pair:
    """One round for many: of median time before, and of the median of the paired ratios."""
    before = median(pair[0])
    return [before], [before / ratio(*pair) if before else 0.0]


Span = tuple[Any, Any]
"""Where a layer began and where it ended, as `mark` tells it."""


def _watch(module: nn.Module, keep: Callable[[Span], None]) -> None:
    """Keep the span of each forward of a twin's module, and of each node of its graph in a backward, on the module's device."""
    device = next(p.device for p in module.parameters())
    begun: list[Any] = []

    def start(*_: Any) -> None:
        begun.append(mark(device))

    def stop(*_: Any) -> None:
        keep((begun.pop(), mark(device)))

    def stop_forward(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        stop()
        # Node by node: between a layer's nodes the engine may run another branch's, and those are not the layer's time.
        for node in _nodes_of(inputs, output):
            node.register_prehook(start)
            node.register_hook(stop)

    module.register_forward_pre_hook(start, prepend=True)
    module.register_forward_hook(stop_forward)


def _nodes_of(inputs: tuple[Any, ...], output: Any) -> list[Any]:
    """The nodes of autograd's graph that lead from a module's output back to its inputs."""
    if not isinstance(output, Tensor) or output.grad_fn is None:
        return []
    before = {x.grad_fn for x in inputs if isinstance(x, Tensor)}
    found: dict[Any, None] = {}
    ahead: list[Any] = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        # A leaf's node only takes its gradient in.
        if node is None or node in before or node in found or hasattr(node, "variable"):
            continue
        found[node] = None
        ahead += [following for following, _ in node.next_functions]
    return list(found)
