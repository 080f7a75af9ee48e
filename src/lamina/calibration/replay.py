"""Runs of a network of which one layer differs: what ran before the layer answers from memory.

A cut changes nothing before the layer is called. So on the same batch modules that have answered by then need not run again,
which saves about half of each run.

What a module does besides answering is lost then: it may leave something for another one, or be asked for it. So what is
remembered is tried first. Modules at one depth at a time answer from memory, each of them in one trial, and the network must
answer as before, bit for bit. Where it does not, all is run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..values import Workload


@final
@dataclass(slots=True)
class _Call:
    """A call of a module in a run. Moments count the calls and the returns of all modules."""

    caller: _Call | None
    begun: int
    start: float
    ended: float = math.inf
    seconds: float = 0.0
    bytes: float = math.inf
    """Of its answer; infinite where that is no tensor."""

    @property
    def depth(self) -> int:
        """How many calls it is in."""
        return 0 if self.caller is None else 1 + self.caller.depth

    @property
    def until(self) -> float:
        """When that ended which called it."""
        return math.inf if self.caller is None else self.caller.ended


@final
class Replay:
    """A network's answer on one batch, and its answers with one layer cut.

    Args:
        twin: Makes a copy of the network, to be run once.
        batch: What it is fed.
        cuts: Names of modules that will differ, each in runs of its own.
        room: Bytes of what may be remembered.
    """

    def __init__(self, twin: Callable[[], nn.Module], batch: Workload, cuts: Collection[str], room: float) -> None:
        self._batch = batch
        self._users: dict[str, frozenset[str]] = {}
        self._remembered: dict[str, Tensor] = {}
        network = twin()
        recorder = _Recorder(network)
        self.answer = batch.run(network)
        first = {cut: recorder.calls[cut][0].begun for cut in cuts if cut in recorder.calls}
        calls = {name: each[0] for name, each in recorder.calls.items() if len(each) == 1}
        users = {
            name: frozenset(cut for cut, begun in first.items() if call.ended < begun < call.until)
            for name, call in calls.items()
        }
        saved = {name: len(users[name]) * call.seconds / max(call.bytes, 1) for name, call in calls.items()}
        for name in sorted(calls, key=saved.__getitem__, reverse=True):
            if users[name] and calls[name].bytes <= room:
                self._users[name] = users[name]
                room -= calls[name].bytes
        if self._users and not self._hold(twin, {calls[name].depth for name in self._users}, calls):
            self._users.clear()
            self._remembered.clear()

    def run(self, twin: nn.Module, cut: str | None) -> Any:
        """The answer of a copy in which one module differs; None: more than one."""
        self._answering(twin, (name for name, users in self._users.items() if cut in users))
        return self._batch.run(twin)

    def _hold(self, twin: Callable[[], nn.Module], depths: Collection[int], calls: dict[str, _Call]) -> bool:
        """Remember, and say whether the network answers as before where modules of each depth answer from memory."""

        def same(network: nn.Module) -> bool:
            return _same(self.answer, self._batch.run(network))

        try:
            network = twin()
            for name in self._users:
                network.get_submodule(name).register_forward_hook(partial(self._keep, name))
            if not same(network):
                return False
            for depth in sorted(depths):
                network = twin()
                self._answering(network, (name for name in self._users if calls[name].depth == depth))
                if not same(network):
                    return False
        except Exception:  # of a module that was asked for what its run would have left
            return False
        return True

    def _keep(self, name: str, module: nn.Module, args: Any, answer: Tensor) -> None:
        self._remembered[name] = answer.detach().clone()  # which what follows may write into

    def _answering(self, twin: nn.Module, names: Iterable[str]) -> None:
        for name in names:
            vars(twin.get_submodule(name))["forward"] = partial(_again, self._remembered[name])


@final
class _Recorder:
    """Notes the calls of a network's modules in one run, in their order."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: dict[str, list[_Call]] = {}
        self._moments = itertools.count()
        self._open: list[tuple[str | None, _Call | None]] = [(None, None)]
        for name, module in network.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # whose hooks are scripted too
                module.register_forward_pre_hook(partial(self._begin, name), prepend=True)
                module.register_forward_hook(partial(self._end, name))

    def _begin(self, name: str, *_: Any) -> None:
        call = _Call(self._open[-1][1], next(self._moments), time.perf_counter())
        self.calls.setdefault(name, []).append(call)
        self._open.append((name, call))

    def _end(self, name: str, module: nn.Module, args: Any, answer: Any) -> None:
        while self._open[-1][0] != name:  # what raised an error, and somebody caught it
            self._open.pop()
        _, call = self._open.pop()
        assert call is not None
        call.ended, call.seconds = next(self._moments), time.perf_counter() - call.start
        if isinstance(answer, Tensor):
            call.bytes = answer.numel() * answer.element_size()


def _again(answer: Tensor, *_: Any, **__: Any) -> Tensor:
    return answer.clone()


def _same(before: Any, after: Any) -> bool:
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
