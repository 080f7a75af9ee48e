"""What a case can come to, and the laws that hold for every case.

The law behind all: never silently wrong. A call of lamina either raises a `LaminaError` that names a layer and leaves the
network as it was to the last bit, or what it returns is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lamina

T = TypeVar("T")
HOME = Path(lamina.__file__).resolve().parent

MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[Any]]]] = {
    "eval": (False, torch.enable_grad),
    "eval + no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
    "train": (True, torch.enable_grad),
}


@dataclass(frozen=True)
class Case:
    """What a case is made of: plain values whose defaults are the simplest; it prints as what may be pasted to make it."""

    def __repr__(self) -> str:
        odd = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(odd)})"


@dataclass(frozen=True)
class Outcome:
    """``kind`` is one of `KINDS`; ``law`` is what was broken, or the reason of a refusal."""

    kind: str
    law: str = ""
    detail: str = ""


KINDS = {
    "right": "right",
    "refused": "refused by name",
    "warned": "wrong, with a warning that says so",
    "needless": "refused, though nothing about it is odd",
    "alarm": "right, but `verify` complains",
    "unnamed": "refused, but the error names no layer or has several lines",
    "raw": "an error that is no LaminaError",
    "wrong": "silently wrong",
}
FAULTS = ("unnamed", "raw", "wrong")
"""What must not be: one such case and the campaign has failed."""


class Invalid(Exception):
    """The dense network itself does not run, so that there is nothing to hold lamina against."""


class Ended(Exception):
    """The case is decided."""

    def __init__(self, kind: str, law: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {law}: {detail}")
        self.outcome = Outcome(kind, law, detail)


def broken(law: str, detail: str = "") -> Ended:
    return Ended("wrong", law, detail)


# ---- the state of a network ----


def bits(tensor: Tensor) -> bytes:
    """Every byte of a tensor of any layout, so that NaN equals itself and 0 is not -0."""
    with torch.inference_mode():  # what was made there can be looked at only there
        tensor = tensor.detach()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
        return bytes(flat.view(torch.uint8).numpy().tobytes())


def _described(tensor: Tensor) -> tuple[Any, ...]:
    stride = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
    return tuple(tensor.shape), tensor.dtype, str(tensor.device), stride, tensor.requires_grad, bits(tensor)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS += ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def content(model: nn.Module) -> dict[str, Any]:
    """All that must not change: values, types, training flags, number of hooks, and the random states."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"type of {name or 'the network'}"] = type(module), id(module)
        found[f"training flag of {name}"] = module.training
        found[f"hooks of {name}"] = tuple(len(getattr(module, hooks, ())) for hooks in _HOOKS)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found[f"tensor {name}"] = _described(tensor)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found[f"identity of {name}"] = id(tensor)
    found["torch's random state"] = bits(torch.get_rng_state())
    found["Python's random state"] = random.getstate()
    found["numpy's random state"] = repr(np.random.get_state())
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in [*before, *(after.keys() - before.keys())] if before.get(name) != after.get(name)]


def state(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name with every byte, as far as they are saved."""
    unsaved = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in module._non_persistent_buffers_set
    }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (tuple(t.shape), t.dtype, bits(t)) for name, t in tensors if name not in unsaved}


# ---- calling lamina ----


@dataclass
class Calls:
    """Calls lamina on a network and judges whatever it raises."""

    names: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)

    def __call__(self, what: str, call: Callable[[], T], *untouched: nn.Module, on_error_only: tuple[nn.Module, ...] = ()) -> T:
        """The result of a call. ``untouched`` must be as they were afterwards; ``on_error_only`` only where it raises.

        Raises:
            Ended: It raised; refused by name where it may.
        """
        held = (*untouched, *on_error_only)
        before = [content(model) for model in held]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = call()
        except Exception as error:
            changed = [name for b, model in zip(before, held, strict=True) for name in changes(b, content(model))]
            raise self._judged(what, error, changed) from error
        finally:
            self.warnings += [str(w.message) for w in caught if _ours(w)]
        for b, model in zip(before, untouched, strict=False):
            if changed := changes(b, content(model)):
                raise broken(f"{what} leaves the network as it was", f"changed: {', '.join(changed[:4])}")
        return result

    def _judged(self, what: str, error: Exception, changed: list[str]) -> Ended:
        text = str(error)
        if not isinstance(error, lamina.LaminaError):
            after = f"; the network was changed: {', '.join(changed[:4])}" if changed else ""
            return Ended("raw", f"{what} raises {type(error).__name__}", f"{first_line(text)} @ {where(error)}{after}")
        if changed:
            law = f"{what} refuses and leaves the network as it was"
            return broken(law, f"{first_line(text)}; changed: {', '.join(changed[:4])}")
        if "\n" in text.strip() or not self.named(text):
            return Ended("unnamed", f"{what}: {reason(text, self.names)}", text)
        return Ended("refused", f"{what}: {reason(text, self.names)}", text)

    def warned(self, ended: Ended) -> Ended:
        """The same, but known to whoever reads warnings, where lamina had given one."""
        if ended.outcome.kind != "wrong" or not self.warnings:
            return ended
        return Ended("warned", ended.outcome.law, f"{ended.outcome.detail}; warned: {first_line(self.warnings[0])}")

    def named(self, text: str) -> bool:
        """Whether a message names a layer or module of the network, or speaks of the network as a whole."""
        return "network" in text or any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in self.names if name)


def _ours(warning: warnings.WarningMessage) -> bool:
    inside = Path(warning.filename).resolve().is_relative_to(HOME)
    return inside or warning.category.__module__.partition(".")[0] == "lamina" or "decompos" in str(warning.message)


def where(error: BaseException) -> str:
    """The last line of lamina's that an error came through, else the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if Path(f.filename).resolve().is_relative_to(HOME)]
    last = (inside or frames)[-1]
    return f"{Path(last.filename).name}:{last.name}"


def first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"


def reason(text: str, names: tuple[str, ...]) -> str:
    """The first words of a message, without what differs from case to case."""
    text = first_line(text)
    for name in sorted(names, key=len, reverse=True):
        if name:
            text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w])", "…", text)
    text = re.sub(r"/\S+", "FILE", text)
    text = re.sub(r"\d[\d.e+-]*", "N", text)
    text = re.sub(r"^(…[^:]{0,60}|the network): ", "", text)
    return " ".join(text.split()[:12])


# ---- running a network ----


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors in a network's output."""
    workload = lamina.Workload(example)
    return [leaf for leaf in tree_leaves(model(*workload.args, **workload.kwargs)) if isinstance(leaf, Tensor)]


def seed_all(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass
class Run:
    """One mode's outputs, or the error; and after a backward pass what got a gradient."""

    outputs: list[Tensor] | None
    error: BaseException | None = None
    gradients: frozenset[str] = frozenset()


def runs(model: nn.Module, example: Any, modes: tuple[str, ...] = tuple(MODES)) -> dict[str, Run]:
    """Every mode in turn, each from the same random state, with a backward pass where there is something to take back."""
    found: dict[str, Run] = {}
    with random_states_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in modes:
            training, context = MODES[mode]
            model.train(training)
            model.zero_grad()
            seed_all(7)
            try:
                with context():
                    outputs = run(model, example)
                found[mode] = Run([o.detach().clone() for o in outputs])
                if mode in ("eval", "train") and any(o.requires_grad for o in outputs):
                    torch.autograd.backward([o.square().sum() for o in outputs if o.requires_grad])
                    reached = [n for n, p in model.named_parameters(remove_duplicate=False) if _reached(p)]
                    found[mode].gradients = frozenset(reached)
            except Exception as error:
                found[mode] = Run(None, error)
        model.eval()
        model.zero_grad()
    return found


def _reached(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance relative to the size of what is wanted; equal infinities and NaN at the same places are no distance."""
    if found.numel() == 0:
        return 0.0
    a, b = found.detach().to(torch.complex128), wanted.detach().to(torch.complex128)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0, a - b).abs().norm()
    size = torch.where(b.isfinite(), b, 0).abs().norm()
    return float((difference / size.clamp_min(1e-300)).nan_to_num(torch.inf))


def look(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, device and layout in memory. The stride of a side of length 1 says nothing."""
    strides = tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1) if tensor.numel() else ()
    return tuple(tensor.shape), tensor.dtype, str(tensor.device), strides


def expect_runs(
    law: str, found: dict[str, Run], wanted: dict[str, Run], names: tuple[str, ...], off: Callable[..., bool]
) -> None:
    """Hold one network's runs against another's, in every mode in which that other one runs.

    Args:
        law: What it means if they differ.
        found: Of the network that is judged.
        wanted: Of the network that is right.
        names: Names of the network's modules.
        off: Whether an output is too far from the wanted one.
    """
    for mode, right in wanted.items():
        if right.outputs is None or mode not in found:
            continue
        here = found[mode]
        if here.outputs is None:
            assert here.error is not None
            text = f"{type(here.error).__name__}: {first_line(str(here.error))} @ {where(here.error)}"
            kind = "refused" if isinstance(here.error, lamina.LaminaError) else "raw"
            raise Ended(kind, f"{law}: it runs in {mode}", text)
        if len(here.outputs) != len(right.outputs):
            raise broken(law, f"{mode}: {len(here.outputs)} outputs in place of {len(right.outputs)}")
        for a, b in zip(here.outputs, right.outputs, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise broken(law, f"{mode}: {tuple(a.shape)} {a.dtype} in place of {tuple(b.shape)} {b.dtype}")
            if off(a, b):
                raise broken(law, f"{mode}: differs by {apart(a, b):.2g} of its size")


def other_bits(a: Tensor, b: Tensor) -> bool:
    return bits(a) != bits(b)
