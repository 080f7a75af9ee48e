"""Refining: trains a decomposed network's factors to the original's features and answers, on unlabelled inputs, for minutes.

What each layer's factors lose for itself was made as small as it can be when they were fitted. That they were fitted one by
one, to inputs that they no longer get, is what can still be won back. So they are trained together, by `finetune`: each
decomposed layer to the output that its layer has in the original (Romero et al., arXiv 1412.6550), and all to the original's
answers. Every fourth batch is held out: at ten looks on the way the divergence of the answers to these is told, and the best
look is kept, which may be the network as it came.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..calibration.batches import HELD_OUT, Batches, with_tensors
from ..calibration.calibration import Calibration
from ..calibration.outputs import Gaussian, Outputs, Own, outputs_of
from ..decomposition import attach_plan, forbid_changed, plan_of
from ..errors import LaminaError, PlanError, TrainingError
from ..folder import digest
from ..layers.decomposed import DecomposedLayer
from ..network.fingerprint import fingerprint
from ..network.memory import devices_of
from ..network.preserve import preserved, repeatable
from ..network.running import outside_inference_mode, run, set_mode
from ..network.walk import walk
from ..network.wrappers import unwrapped
from ..plan import Plan, Refined
from ..shown import Shown
from ..values import Workload, dtype_name
from .distill import Distillation
from .distributed import from_first
from .finetune import finetune
from .random_states import seed_all
from .recalibrate import norms_of, recalibrate

LOOKS = 10
"""Times at which the divergence on what is held out is told; the steps are a multiple of it."""
_ITEMS = 32
"""In a batch of a tensor."""
_ANSWERS = 0.1
"""Weight of a nat of the answers beside the features' mean relative squared error. Answers alone are soon learnt by heart."""
_PILOT_S, _PILOT_STEPS = 2.0, 50
"""So long steps are timed, and no more of them, before it is said how many fit into the minutes."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class Refinement(Shown):
    """How a refinement went.

    Attributes:
        steps: Steps of the optimizer that were made; ``refine(…, steps=…)`` makes as many again.
        before: Divergence from the original's answers before, nats for each item held out.
        after: The same afterwards; never more than before.
        looks: What it was along the way.
        recalibrated: Whether batch norms got the statistics of the data first, since that brought the answers nearer.
        kept: Whether training brought them nearer; where not, no factor has changed.
        items: Items trained on.
        held_out: Items held out.
        seconds: What it took altogether.
    """

    steps: int
    before: float
    after: float
    looks: tuple[float, ...]
    recalibrated: bool
    kept: bool
    items: int
    held_out: int
    seconds: float

    def __str__(self) -> str:
        """``480 steps on 384 items in 118 s: 0.0061 → 0.0032 nats of divergence an item, on 128 held out``."""
        end = "" if self.kept else "; no look was better than the start, so the factors are as they were"
        norms = "; batch norm recalibrated" if self.recalibrated else ""
        return (
            f"{self.steps} steps on {self.items} items in {self.seconds:.3g} s: {self.before:.3g} → {self.after:.3g} nats of "
            f"divergence an item, on {self.held_out} held out{norms}{end}"
        )


@outside_inference_mode
def refine(
    small: nn.Module,
    model: nn.Module,
    data: Any,
    *,
    minutes: float = 2.0,
    steps: int | None = None,
    outputs: Outputs = Gaussian(),  # noqa: B008 - a frozen value
    rate: float = 3e-4,
    seed: int = 0,
    progress: bool = False,
) -> Refinement:
    """Train the factors of a decomposed network to the original's answers, in place, without labels.

        >>> small = lamina.decompose(model, plan, data=calibration)
        >>> print(lamina.refine(small, model, images, outputs=lamina.Categorical()))

    Batch norms get the statistics of the data first, where that brings the answers nearer, and keep them: everything is trained
    in eval mode. The parameters of the decomposed layers train, by Adam under a cosine; nothing else changes. What comes out is
    never further from the original's answers on the inputs held out than what came in. The network's plan remembers it, so that
    `decompose` refuses to find these factors anew; a score in it, which was of the network before, is taken out.

    Args:
        small: What `decompose` or `load` returned; changed in place, its modes and ``requires_grad`` are as before.
        model: The untouched original, whose answers are learnt; only read.
        data: Unlabelled batches, those of the calibration for example, as `calibrate` takes them; they and the original's
            answers are kept in memory. Every fourth batch, of fewer than four batches every fourth item, is held out.
        minutes: About how long it may take: some steps are timed, and as many are made as fit in.
        steps: Instead, how many steps are made, rounded up to a multiple of ten. On a CPU with the same number of threads the
            same seed then gives the same bits.
        outputs: How answers are read: `Categorical()` for class scores, `Gaussian()` for anything else.
        rate: Learning rate at the beginning.
        seed: Of the order of the items, and of what the network draws.
        progress: Show a progress bar.

    Raises:
        PlanError: The network was not decomposed or was changed since, or the original is another network.
        TrainingError: There is nothing to train, a number makes no sense, the data are a calibration, which keeps no inputs,
            hold fewer than four items, or the loss is NaN. The network is as it was.
        CalibrationError: The answers cannot be read in this way.
        ExampleError: The data hold nothing, or a network does not run on them.
        MissingExtra: Accelerate is not installed.
    """
    began = time.perf_counter()
    _check(minutes, steps, rate)
    read = _readable(outputs)
    plan, layers = _of_original(small, model)
    inner = unwrapped(small)
    trained = list(dict.fromkeys(p for layer in layers for p in layer.parameters()))
    if coarse := [p for p in trained if p.dtype in (torch.float16, torch.bfloat16)]:
        raise TrainingError(f"weights in {dtype_name(coarse[0].dtype)} are too coarse for small steps: refine in float32")
    statistics = [buffer for norm in norms_of(inner).values() for buffer in norm.buffers(recurse=False)]
    with repeatable(inner, model):
        seed_all(seed)
        known = _asked(unwrapped(model), _batches(data, inner), read, list(plan.decomposed))
        came, best = _Kept(trained, statistics), _Kept(trained, statistics)
        work = _Work(inner, unwrapped(model), known, read, trained, seed)
        try:
            before = nearest = work.look()
            if not math.isfinite(before):
                raise TrainingError("the network's answers hold NaN or infinities: there is nothing to begin from")
            recalibrated = bool(statistics) and work.recalibrate() and (nearest := work.look()) < before
            if recalibrated:
                best.take()
            else:
                best.put_back()
                nearest = before
            if steps is None:
                steps = work.steps_within(60 * minutes - (time.perf_counter() - began))
            looks = min(steps, LOOKS)
            found: list[float] = []

            def score(net: nn.Module) -> float:
                found.append(work.divergence(net))
                if found[-1] < min(nearest, *found[:-1], math.inf):
                    best.take()
                return -found[-1]

            work.train(looks, math.ceil(steps / looks), rate, score, progress)
            best.put_back()
        except BaseException:
            came.put_back()
            raise
    result = Refinement(
        steps=looks * math.ceil(steps / looks),
        before=before,
        after=min(nearest, *found),
        looks=tuple(found),
        recalibrated=recalibrated,
        kept=min(found) < nearest,
        items=sum(batch.items for batch in known.fitted),
        held_out=sum(batch.items for batch in known.held_out),
        seconds=time.perf_counter() - began,
    )
    if result.kept:
        told = Refined(steps=result.steps, seed=seed, data=known.identity, before=before, after=result.after)
        factors = plan.factors.model_copy(update={"refined": (*plan.factors.refined, told)})
        attach_plan(small, plan.model_copy(update={"factors": factors, "scores": None}))
    return result


def _check(minutes: Any, steps: Any, rate: Any) -> None:
    for name, number in (("minutes", minutes), ("rate", rate)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise TrainingError(f"{name} is {number!r}; it must be a positive number")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise TrainingError(f"steps is {steps!r}; it must be a whole number of 1 or more")


def _readable(outputs: Any) -> Outputs:
    read = outputs_of(outputs)
    if read is None or isinstance(read, Own):
        raise TrainingError(
            "only lamina.Categorical() and lamina.Gaussian() tell how far two answers lie apart: pass one as outputs="
        )
    return read


def _of_original(small: nn.Module, model: nn.Module) -> tuple[Plan, list[DecomposedLayer]]:
    """The network's plan and its decomposed layers, after it was made sure that both networks belong together."""
    plan = plan_of(small)
    forbid_changed(small, plan)
    layers = [module for module in unwrapped(small).modules() if isinstance(module, DecomposedLayer)]
    if not layers:
        raise TrainingError("nothing in this network is decomposed, so there is nothing to refine")
    if any(isinstance(module, DecomposedLayer) for module in model.modules()):
        raise PlanError("the original is decomposed itself: pass the untouched one, of which lamina.decompose made a copy")
    if fingerprint(unwrapped(model)) != plan.fingerprint:
        raise PlanError("the original is another network than the one that was decomposed: modules or shapes differ")
    return plan, layers


@final
@dataclass(frozen=True, slots=True)
class _Batch:
    """Some inputs, and what the original answers."""

    workload: Workload
    answer: Any
    items: int


@final
@dataclass(frozen=True, slots=True)
class _Known:
    """All that a network learns from."""

    fitted: list[_Batch]
    held_out: list[_Batch]
    identity: str
    features: tuple[str, ...]
    """Decomposed layers whose outputs can be compared: called on every batch, and a tensor."""


def _batches(data: Any, model: nn.Module) -> Batches:
    if data is None or isinstance(data, Calibration):
        raise TrainingError(
            "a calibration keeps no inputs, and there is nothing to train on without: pass the batches as data="
        )
    if isinstance(data, Tensor) and data.ndim and len(data):
        data = torch.split(data, _ITEMS)
    return Batches(data, devices_of(model)[0])


def _asked(model: nn.Module, batches: Batches, outputs: Outputs, layers: Sequence[str]) -> _Known:
    """Ask the original, once."""
    found: tuple[list[_Batch], list[_Batch]] = ([], [])
    seen: dict[str, Tensor] = {}
    reached: dict[str, int] = dict.fromkeys(layers, 0)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.no_grad())
        known = walk(model).layers
        for name in layers:
            called = known[name].holder or known[name].module
            stack.callback(called.register_forward_hook(_counter(reached, name, found)).remove)
        set_mode(model, False)
        batches.first()  # which says where there is none
        for batch in batches:
            answer = tree_map_only(Tensor, torch.Tensor.detach, run(model, batch.workload))
            if not bool(torch.isfinite(outputs.divergence(answer, answer)).all()):
                raise TrainingError(f"the original's answers hold NaN or infinities in batch {batch.number} of the data")
            found[batch.held_out].append(_Batch(batch.workload, answer, batch.items))
            seen |= {f"{len(seen) + n:08d}": tensor for n, tensor in enumerate(batch.workload.tensors)}
    fitted, held_out = found
    if not held_out or not fitted:
        raise TrainingError(f"the data hold fewer than {HELD_OUT} items: every fourth is held out, and some must be left")
    features = tuple(name for name, batches_seen in reached.items() if batches_seen == len(fitted) + len(held_out))
    return _Known(fitted, held_out, digest(seen), features)


def _counter(reached: dict[str, int], name: str, done: tuple[list[_Batch], list[_Batch]]) -> Callable[..., None]:
    """A hook that counts the batches on which a module answers a tensor."""

    def count(_: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and reached[name] == sum(map(len, done)):
            reached[name] += 1

    return count


@final
class _Kept:
    """What some tensors held when it was last taken."""

    def __init__(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        self._tensors = (*parameters, *buffers)
        self._contents: list[Tensor] = []
        self.take()

    def take(self) -> None:
        """Keep what they hold now."""
        self._contents = [tensor.detach().clone() for tensor in self._tensors]

    def put_back(self) -> None:
        """Let them hold what was taken."""
        with torch.no_grad():
            for tensor, content in zip(self._tensors, self._contents, strict=True):
                tensor.copy_(content)


@final
@dataclass(frozen=True, slots=True)
class _Work:
    """The network that is refined, and what it is refined with."""

    small: nn.Module
    model: nn.Module
    known: _Known
    outputs: Outputs
    trained: list[nn.Parameter]
    seed: int

    def look(self) -> float:
        """The divergence of the network as it is; nothing of it changes."""
        with preserved(self.small):
            return self.divergence(self.small)

    def divergence(self, net: nn.Module) -> float:
        """Nats an item held out; infinite where numbers are no longer finite, so that no such network is kept."""
        set_mode(net, False)
        device, total, batches = devices_of(net)[0], 0.0, self.known.held_out
        with torch.no_grad():
            for batch in batches:
                answer = run(net, with_tensors(batch.workload, lambda tensor: tensor.to(device)))
                total += float(self.outputs.divergence(batch.answer, answer).sum())
        nats = total / sum(batch.items for batch in batches)
        agreed: float = from_first(nats if math.isfinite(nats) else math.inf)
        return agreed

    def recalibrate(self) -> bool:
        """Give batch norms the statistics of the data; whether that was possible. If not, nothing has changed."""
        try:
            recalibrate(self.small, [batch.workload for batch in (*self.known.fitted, *self.known.held_out)])
        except LaminaError:
            return False
        return True

    def steps_within(self, seconds: float) -> int:
        """How many steps fit into some seconds, looks and what it takes to find out included; one at least."""
        began = time.perf_counter()
        self.look()
        looking = LOOKS * (time.perf_counter() - began)
        # The first step warms up.
        step_s = self.train(2, 1, None)
        if (more := min(int(_PILOT_S / step_s), _PILOT_STEPS)) > 1:
            step_s = self.train(1, more, None)
        steps = max(int((seconds - looking - (time.perf_counter() - began)) / step_s), 1)
        agreed: int = from_first(steps if steps < LOOKS else steps // LOOKS * LOOKS)
        return agreed

    def train(
        self,
        looks: int,
        each: int,
        rate: float | None,
        score: Callable[[nn.Module], float] | None = None,
        progress: bool = False,
    ) -> float:
        """Make so many steps between looks; the seconds that one took at last. Without a rate nothing is learnt of it."""
        features = self.known.features
        alike = Distillation(weight=0.0, features=features, feature_weight=1 / max(len(features), 1), relative=True)
        answers = _ANSWERS if features else 1.0
        with _only(self.small, self.trained):
            record = finetune(
                self.small,
                _Drawn(self.known.fitted, each, self.seed),
                loss=lambda output, answer: answers * self.outputs.divergence(answer, output).mean(),
                epochs=looks,
                teacher=self.model if features else None,
                distillation=alike if features else None,
                eval_mode=True,
                optimizer=partial(torch.optim.Adam, lr=rate or 1.0),
                schedule=None if rate else _standing_still,
                score=score,
                progress=progress,
            )
        items = sum(batch.items for batch in self.known.fitted) / len(self.known.fitted)
        return items / record.epochs[-1].samples_per_s


def _standing_still(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)


@contextmanager
def _only(small: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let some parameters train and no others."""
    with ExitStack() as undo:
        for parameter in small.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield


@final
class _Drawn:
    """Batches for a training, so many each time it is iterated; it goes on where it was.

    All are seen before one is seen again. Where batches and answers are tensors that differ in their number of items alone,
    items go from one batch into another.
    """

    def __init__(self, batches: list[_Batch], each: int, seed: int) -> None:
        # A pair, as `finetune` takes it.
        self._pairs = [(batch.workload.kwargs or batch.workload.args, batch.answer) for batch in batches]
        self._items = [batch.items for batch in batches]
        self._whole = _joined(self._pairs, self._items)
        self._each, self._draws, self._coming = each, torch.Generator().manual_seed(seed), list[Tensor]()

    def __len__(self) -> int:
        return self._each

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._each):
            if not self._coming:
                self._coming = self._order()
            yield self._drawn(self._coming.pop(0))

    def _drawn(self, chosen: Tensor) -> Any:
        """A batch by its number, or some items."""
        return self._pairs[int(chosen)] if self._whole is None else tree_map_only(Tensor, lambda t: t[chosen], self._whole)

    def _order(self) -> list[Tensor]:
        if self._whole is None:
            return list(torch.randperm(len(self._pairs), generator=self._draws))
        return list(torch.randperm(sum(self._items), generator=self._draws).tensor_split(len(self._pairs)))


def _joined(pairs: list[Any], items: list[int]) -> Any:
    """All pairs as one, None where they cannot be."""
    flat, specs = zip(*(tree_flatten(pair) for pair in pairs), strict=True)
    if any(spec != specs[0] for spec in specs):
        return None
    leaves = list(zip(*flat, strict=True))
    for leaf in leaves:
        if not all(isinstance(t, Tensor) and t.ndim and len(t) == n for t, n in zip(leaf, items, strict=True)):
            return None
        if any((t.shape[1:], t.dtype) != (leaf[0].shape[1:], leaf[0].dtype) for t in leaf):
            return None
    return tree_unflatten([torch.cat(leaf) for leaf in leaves], specs[0])
