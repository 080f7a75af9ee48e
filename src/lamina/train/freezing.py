"""Freezing: lets one group of factors rest while the other trains, and has them change places (arXiv 2309.03824, section 3).

What rests has ``requires_grad`` False **and** ``grad`` None: a gradient of zeros would still let momentum, Adam and weight
decay move the weight. The parameters stay the same objects throughout, so an optimizer keeps their state, and they wake with
it. Only weights of factors rest; biases, norms and everything that is not decomposed always train. *When* a group rests is the
schedule's business (`schedules`).
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Any, final

from torch import nn

from ..errors import FreezingError
from ..layers.resting import decomposed_layers, resting_factors
from ..network.wrappers import plain, unwrapped
from ..schedules import Group, Schedule, phase_name
from ..values import closest
from .trial import complaint

_MARK = "_lamina_freezing"
"""Attribute of a factor: by which freezing its weight may have been put to rest. Plain text, so that networks can be copied."""


def wake(model: nn.Module) -> None:
    """Let all train that a freezing put to rest: an earlier one, or that of the network of which this is a copy.

    Whoever takes a network over does this first. The earlier freezing then refuses to go on.
    """
    for module in model.modules():
        if vars(module).pop(_MARK, None) is not None:
            _weight(module).requires_grad_(True)


def freeze(model: nn.Module, schedule: Schedule, *, epochs: int | None = None) -> Freezing:
    """Let a decomposed network train under a freezing schedule; epoch 0 begins at once.

    ::

        freezing = lamina.freeze(small, lamina.SequentialFreezing(period=1))
        optimizer = torch.optim.SGD(freezing.parameter_groups(weight_decay=1e-4), lr=0.01, momentum=0.9)
        for epoch in range(epochs):
            freezing.start_epoch(epoch)
            for x, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(small(x), target).backward()
                optimizer.step()
                freezing.step()

    The optimizer must hold all parameters, resting ones included: those of `Freezing.parameter_groups`, or of
    ``model.parameters()`` unfiltered. A second call for the same network takes the place of the first: all that rested wakes,
    and the first freezing refuses to go on. So it is with a copy that was made while something rested.

    Args:
        model: A decomposed network, also one that is compiled, wrapped in DDP or sharded by ``fully_shard``. DDP settles when
            it wraps which parameters it waits for: wrap anew whenever what rests has changed.
        schedule: `SequentialFreezing()` or `VanillaFreezing()`.
        epochs: How many epochs there will be; needed only where the schedule counts from the end.

    Returns:
        The freezing, which wants to be told of every epoch and every optimizer step.

    Raises:
        FreezingError: Nothing in the network is decomposed, no factor of it trains, a factor's weight is computed from other
            parameters, a pattern in ``exclude`` matches no layer, or the schedule does not fit the number of epochs.
    """
    if not isinstance(schedule, Schedule):
        raise FreezingError(f"a schedule is lamina.SequentialFreezing(…) or lamina.VanillaFreezing(…), not {schedule!r}")
    schedule.check(epochs)
    layers = decomposed_layers(model)
    if not layers:
        raise FreezingError("nothing in this network is decomposed, so there is nothing to freeze: call lamina.decompose first")
    names = [plain(name) for name, _ in unwrapped(model).named_modules()]
    if idle := schedule.idle_pattern(names):
        raise FreezingError(f"exclude pattern {idle!r} matches no layer of this network{closest(idle, list(layers))}")
    return Freezing(model, schedule, epochs)


@final
class Freezing:
    """A network under a freezing schedule. Made by `freeze`.

    A phase changes only at an optimizer step: call `start_epoch` and `step` (or `go_to` for both) when the optimizer has made
    its step, and not while gradients are being accumulated. Pending gradients of what goes to rest are dropped.

    Attributes:
        schedule: When which group of factors rests.
        epochs: How many epochs there will be, None where not known.
        epoch: The epoch that was started last.
        steps: Optimizer steps made so far.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, epochs: int | None) -> None:
        self.schedule = schedule
        self.epochs = epochs
        self.epoch = 0
        self.steps = 0
        self._model = model
        self._token = uuid.uuid4().hex
        self._resting: Group | None = None
        # Factors, not their weights: `fully_shard` exchanges the parameters of a module.
        every = [resting_factors(model, schedule, group) for group in (0, 1)]
        for name, factor in (every[0] | every[1]).items():
            if not isinstance(factor.weight, nn.Parameter):
                raise FreezingError(
                    f"{name}.weight is no parameter but computed from others (by a parametrization, pruning or weight norm): "
                    "take that off first, or exclude its layer"
                )
        self._groups = [{n: f for n, f in group.items() if _weight(f).requires_grad or _MARK in vars(f)} for group in every]
        if not any(self._groups):
            why = "its decomposed layers are all excluded" if not any(every) else "no factor of it requires a gradient"
            raise FreezingError(f"there is nothing to freeze in this network: {why}")
        wake(model)
        for factor in self._factors():
            vars(factor)[_MARK] = self._token
        self._enter(0, 0)

    @property
    def resting(self) -> tuple[str, ...]:
        """Names of the parameters that rest now."""
        return () if self._resting is None else tuple(f"{name}.weight" for name in self._groups[self._resting])

    @property
    def phase(self) -> str:
        """The phase in words: ``outer factors rest``."""
        return phase_name(self._resting)

    def start_epoch(self, epoch: int) -> bool:
        """Begin an epoch, counted from 0.

        Returns:
            Whether the set of resting parameters changed. DDP must then be wrapped anew.

        Raises:
            FreezingError: There is no such epoch, or this freezing was released or replaced.
        """
        return self.go_to(epoch, self.steps)

    def step(self) -> bool:
        """Count an optimizer step that was made. Cheap: some tenths of a microsecond a factor.

        Returns:
            Whether the set of resting parameters changed. DDP must then be wrapped anew.

        Raises:
            FreezingError: This freezing was released or replaced.
        """
        return self._enter(self.epoch, self.steps + 1)

    def go_to(self, epoch: int, steps: int) -> bool:
        """Be where a trainer that counts by itself stands: in an epoch, counted from 0, after so many optimizer steps.

        Returns:
            Whether the set of resting parameters changed. DDP must then be wrapped anew.

        Raises:
            FreezingError: There is no such epoch, or this freezing was released or replaced.
        """
        if epoch < 0 or (self.epochs is not None and epoch >= self.epochs):
            of = "" if self.epochs is None else f" and below {self.epochs}, the number of epochs that lamina.freeze was told"
            raise FreezingError(f"there is no epoch {epoch}: they are counted from 0{of}")
        return self._enter(epoch, steps)

    def parameter_groups(self, *, weight_decay: float | None = None, **options: Any) -> list[dict[str, Any]]:
        """Groups for an optimizer over all parameters that ever train, resting ones included.

        Each of the two groups of factors has an optimizer group of its own: fused SGD cannot begin with a part of one.

        Args:
            weight_decay: For weights, that is, parameters of two or more dimensions; biases and norms get none. None leaves it
                to the optimizer's default, for all alike.
            options: What else every group shall hold, such as ``lr``.
        """
        outer, inner = ([_weight(factor) for factor in group.values()] for group in self._groups)
        mine = {id(p) for p in [*outer, *inner]}
        rest = [p for p in self._model.parameters() if p.requires_grad and id(p) not in mine]
        if weight_decay is None:
            groups: list[dict[str, Any]] = [{"params": params} for params in (outer, inner, rest)]
        else:
            many, few = ([p for p in rest if (p.ndim >= 2) is weighs] for weighs in (True, False))
            decays = [(outer, weight_decay), (inner, weight_decay), (many, weight_decay), (few, 0.0)]
            groups = [{"params": params, "weight_decay": decay} for params, decay in decays]
        return [group | options for group in groups if group["params"]]

    def check(self, *optimizers: Any) -> None:
        """Make sure that an optimizer, or several together, train this network.

        Args:
            optimizers: Anything with ``param_groups``.

        Raises:
            FreezingError: They hold a parameter that is not of this network, as one does that was made before the network was
                decomposed; they lack a factor; or, tried on toys, they move what rests (LBFGS) or fail where a part of a
                parameter group does (fused SGD with momentum). The message names the first.
        """
        known = {id(parameter) for parameter in self._model.parameters()}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for number, group in enumerate(groups):
            names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if id(parameter) not in known:
                    raise FreezingError(
                        f"the optimizer holds a parameter that is not of this network ({name} of group {number}, of shape "
                        f"{tuple(parameter.shape)}): make the optimizer from the decomposed network's parameters"
                    )
        held = {id(parameter) for group in groups for parameter in group["params"]}
        for name, factor in (self._groups[0] | self._groups[1]).items():
            if id(_weight(factor)) not in held:
                raise FreezingError(
                    f"{name}.weight is not in the optimizer and would never be trained: make the optimizer over all "
                    "parameters, resting ones too, as freezing.parameter_groups() gives them"
                )
        sides = [{id(_weight(factor)) for factor in side.values()} for side in self._groups]
        for optimizer in optimizers:
            if wrong := complaint(optimizer, sides):
                raise FreezingError(
                    f"{wrong}: take SGD or AdamW, say, and where it is fused, the groups of freezing.parameter_groups()"
                )

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands, as plain JSON values."""
        return {"schedule": _as_json(self.schedule), "epoch": self.epoch, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another freezing stood: what rested then rests now.

        Raises:
            FreezingError: It followed another schedule, or this is no such state; nothing has changed then.
        """
        try:
            schedule, epoch, steps = state["schedule"], int(state["epoch"]), int(state["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise FreezingError(f"this is not the state of a freezing: {error!r}") from error
        if schedule != _as_json(self.schedule):
            raise FreezingError(f"the saved training followed another schedule, {schedule}, and not {_as_json(self.schedule)}")
        self._enter(epoch, steps)

    def release(self) -> None:
        """Let all train again, for good: this freezing then refuses to go on. A second call does nothing."""
        for factor in self._factors():
            if vars(factor).get(_MARK) == self._token:
                del vars(factor)[_MARK]
                _weight(factor).requires_grad_(True)
        self._resting = None

    def __str__(self) -> str:
        """``sequential freezing every epoch, outer first: outer factors rest in epoch 0, 12 weights``."""
        return f"{self.schedule}: {self.phase} in epoch {self.epoch}, {len(self.resting)} weights"

    def _factors(self) -> list[nn.Module]:
        return [factor for group in self._groups for factor in group.values()]

    def _enter(self, epoch: int, steps: int) -> bool:
        if any(vars(factor).get(_MARK) != self._token for factor in self._factors()):
            raise FreezingError(
                "this freezing was released, or another lamina.freeze or a training of the same network took its place"
            )
        group = self.schedule.resting(epoch, steps, self.epochs)
        self.epoch, self.steps, self._resting = epoch, steps, group
        changed = False
        for number, factors in enumerate(self._groups):
            rests = number == group
            for weight in map(_weight, factors.values()):
                if weight.requires_grad == rests:  # looked up, not remembered: somebody else may have turned it
                    weight.requires_grad_(not rests)
                    changed = True
                    if rests:
                        weight.grad = None
        return changed


def _weight(factor: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = factor.weight  # type: ignore[assignment]
    return weight


def _as_json(schedule: Schedule) -> dict[str, Any]:
    plain_values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(schedule)))  # type: ignore[call-overload]
    return plain_values
