"""Single layers with every attribute, layout, dtype, patch and hook: drawn by the thousand, none silently wrong.

    python benchmarks/faults/layers.py --examples 10000 --seed 0

Each layer is planned, decomposed at full and at half rank, as a copy and in place, saved, loaded onto other weights and merged.
Either lamina refuses by name and leaves the layer as it was, or everything is right:

- at full rank the outputs and their gradients are the dense layer's;
- at half rank they are those of the dense layer that has the merged weight, and that weight is as near to the layer's own as
  the discarded singular values allow;
- in place, copied, and saved and loaded are the same to the last bit;
- shape, dtype, device and layout in memory, hooks and what trains are as before.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import tempfile
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from campaign import Campaign
from judging import (
    Calls,
    Case,
    Ended,
    Invalid,
    Outcome,
    Run,
    apart,
    broken,
    default_dtype,
    expect_runs,
    first_line,
    look,
    other_bits,
    random_states_kept,
    reason,
    run,
    runs,
    seed_all,
    state,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lamina

CONVOLUTIONS: dict[str, type[nn.Module]] = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta device by default": lambda: torch.device("meta"),
}


@dataclass(frozen=True, repr=False)
class Layer(Case):
    """A layer, its input, and what is done to it."""

    kind: str = "Linear"
    O: int = 4
    I: int = 4
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    bias: bool = True
    batch: tuple[int, ...] = (2,)
    dtype: str = "float32"
    layer_channels_last: bool = False
    input_channels_last: bool = False
    weight: str = ""
    scale: int = 0
    frozen: tuple[str, ...] = ()
    changed: str = ""
    patch: str = ""
    hooks: tuple[str, ...] = ()
    attribute: str = ""
    context: str = ""
    holder: str = "sequential"
    sides: str = "both"
    groups: int = 1
    seed: int = 0


MAY_BE_REFUSED = (
    "changed:",
    "patch:",
    "attribute:",
    "hook: state",
    "hook: reads",
    "weight: inference",
    "weight: nan",
    "no channels",
    "overflow",
)
"""What lamina may refuse: whatever else is refused is a layer like any other, and `needless`."""


def traits(case: Layer) -> frozenset[str]:
    """What is odd about a layer."""
    found = {f"hook: {hook}" for hook in case.hooks} | {f"frozen {what}" for what in case.frozen}
    for name in ("weight", "changed", "patch", "attribute", "context"):
        if value := getattr(case, name):
            found.add(f"{name}: {value}")
    if case.holder != "sequential":
        found.add(f"held: {case.holder}")
    if case.scale:
        found.add("overflow" if abs(case.scale) > 3 and case.dtype == "float16" else "scaled")
    if case.dtype != "float32":
        found.add(case.dtype)
    if case.layer_channels_last or case.input_channels_last:
        found.add("channels last")
    if case.O * case.I == 0:
        found.add("no channels")
    if case.padding_mode != "zeros":
        found.add(f"padding mode {case.padding_mode}")
    if isinstance(case.padding, str):
        found.add(f"padding {case.padding}")
    if 0 in case.batch:
        found.add("empty batch")
    if not case.batch:
        found.add("unbatched")
    return frozenset(found)


# ---- the layer ----


class Holder(nn.Module):
    """A network of one layer, which it calls in one way or another."""

    def __init__(self, layer: nn.Module, way: str) -> None:
        super().__init__()
        self.stem = layer
        self.way = way
        if way == "under two names":
            self.again = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.way == "keyword":
            y = self.stem(x=x) if isinstance(self.stem, Conv1D) or hasattr(self.stem, "nf") else self.stem(input=x)
        elif self.way == "called twice":
            y = self.stem(x) + self.stem(0.5 * x)
        elif self.way == "under two names":
            y = self.stem(x) + self.again(0.5 * x)
        elif self.way == "reads an attribute":
            y = self.stem(x) * self.stem.gain
        else:
            y = self.stem(x)
        return y


def build(case: Layer, number: int, log: list[str]) -> nn.Module:
    """The network of a case, the same for the same number; its hooks write into a log."""
    with random_states_kept():
        seed_all(number)
        context = torch.inference_mode() if case.weight == "inference" else contextlib.nullcontext()
        with context:
            layer = _constructed(case)
        _reweighted(case, layer)
        _changed(case, layer)
        _patched(case, layer)
        _hooked(case, layer, log)
        for name in case.frozen:
            if getattr(layer, name, None) is not None:
                getattr(layer, name).requires_grad_(False)
        if case.attribute:
            layer.gain = 2.0
        if case.attribute == "gradients":
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
        if case.holder == "root":
            return layer
        if case.holder == "sequential":
            return nn.Sequential(OrderedDict(stem=layer))
        return Holder(layer, case.holder)


def _constructed(case: Layer) -> nn.Module:
    dtype = DTYPES[case.dtype]
    if case.kind == "Linear":
        return nn.Linear(case.I, case.O, bias=case.bias, dtype=dtype)
    if case.kind == "Conv1D":
        layer = Conv1D(case.O, case.I)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    options: dict[str, Any] = {"bias": case.bias, "padding_mode": case.padding_mode, "dtype": dtype}
    made = CONVOLUTIONS[case.kind](case.I, case.O, case.kernel, case.stride, case.padding, case.dilation, **options)
    if case.layer_channels_last and len(case.kernel) > 1:
        made = made.to(memory_format=torch.channels_last if len(case.kernel) == 2 else torch.channels_last_3d)
    return made


def _reweighted(case: Layer, layer: nn.Module) -> None:
    weight = layer.weight.detach()
    inputs = 0 if case.kind == "Conv1D" else 1
    if case.scale:
        weight = weight * 10.0**case.scale
    if case.weight == "zeros":
        weight = torch.zeros_like(weight)
    elif case.weight == "nan":
        weight = torch.full_like(weight, math.nan)
    elif case.weight == "every second of a larger one":
        weight = torch.randn(2 * weight.shape[0], *weight.shape[1:], dtype=weight.dtype)[::2]
    elif case.weight == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    elif case.weight == "expanded":
        weight = weight.narrow(inputs, 0, 1).expand(weight.shape) if weight.shape[inputs] else weight
    elif case.weight == "of rank one":
        first = torch.randn(weight.shape[0], *(1 for _ in weight.shape[1:]), dtype=weight.dtype)
        weight = first * torch.randn_like(weight[:1])
    elif case.weight == "one huge channel" and weight.numel():
        weight = weight.clone()
        weight.select(1 - inputs, 0).mul_(1e3)
    if case.scale or case.weight not in ("", "inference"):
        layer.weight = nn.Parameter(weight)


def _changed(case: Layer, layer: nn.Module) -> None:
    """Attributes changed after construction, and weights exchanged for others while the attributes stay."""
    how, weight = case.changed, layer.weight.detach()
    if how == "weight of fewer inputs":
        inputs = 0 if case.kind == "Conv1D" else 1
        layer.weight = nn.Parameter(weight.narrow(inputs, 0, max(1, case.I // 2)).clone())
    elif how == "weight of fewer outputs":
        outputs = 1 if case.kind == "Conv1D" else 0
        layer.weight = nn.Parameter(weight.narrow(outputs, 0, max(1, case.O // 2)).clone())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[: max(1, case.O // 2)].clone())
    elif how == "bias taken away":
        layer.bias = None
    elif how == "bias no parameter" and layer.bias is not None:
        bias = layer.bias.detach().clone()
        del layer.bias
        layer.bias = bias
    elif how == "wrong channels said":
        for name in ("in_channels", "in_features", "nx"):
            if hasattr(layer, name):
                setattr(layer, name, getattr(layer, name) + 1)
    elif case.kernel:
        n = len(case.kernel)
        number = {"stride as an int": ("stride", 1), "padding as an int": ("padding", 1), "dilation as an int": ("dilation", 1)}
        others: dict[str, tuple[str, Any]] = {
            "other stride": ("stride", (2,) * n),
            "other padding": ("padding", (2,) * n),
            "padding as a list": ("padding", [1] * n),
            "padding of one": ("padding", (1,)),
            "other padding mode": ("padding_mode", "circular"),
            "other dilation": ("dilation", (2,) * n),
            "other kernel said": ("kernel_size", (5,) * n),
            "padding made beforehand": ("_reversed_padding_repeated_twice", (1, 1) + (0,) * (2 * n - 2)),
        }
        if how in number | others:
            setattr(layer, *(number | others)[how])
        elif how == "other groups" and case.I % 2 == 0 and case.O % 2 == 0 and case.I:
            layer.groups = 2
            layer.weight = nn.Parameter(weight[:, : case.I // 2].clone())


def _patched(case: Layer, layer: nn.Module) -> None:
    if case.patch == "forward doubled":
        plain = layer.forward
        layer.forward = lambda x: plain(x) * 2
    elif case.patch == "forward by an equal one":
        layer.forward = types.MethodType(type(layer).forward, layer)
    elif case.patch == "_conv_forward doubled" and case.kernel:
        inner = layer._conv_forward
        layer._conv_forward = lambda x, w, b: inner(x, w, b) * 2
    elif case.patch == "_conv_forward of seamless tiling" and case.kind == "Conv2d":

        def tiled(self: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
            return F.conv2d(x, w, b, self.stride, 0, self.dilation, self.groups)

        layer._conv_forward = types.MethodType(tiled, layer)
    elif case.patch == "another class":
        layer.__class__ = type("Doubled", (type(layer),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})
    elif case.patch == "buffer beside the weight":
        layer.register_buffer("extra", torch.ones(2))
    elif case.patch == "bias of another dtype" and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().float())


HOOKS = (
    "pre",
    "post",
    "pre, changes",
    "post, changes",
    "pre, kwargs",
    "post, kwargs",
    "pre, kwargs, changes",
    "always called",
    "backward",
    "backward pre",
    "reads the layer it holds",
    "state dict",
)


def _hooked(case: Layer, layer: nn.Module, log: list[str]) -> None:
    made: dict[str, Callable[[], object]] = {
        "pre": lambda: layer.register_forward_pre_hook(lambda m, a: log.append("pre")),
        "post": lambda: layer.register_forward_hook(lambda m, a, y: log.append("post")),
        "pre, changes": lambda: layer.register_forward_pre_hook(lambda m, a: tuple(x * 2 for x in a)),
        "post, changes": lambda: layer.register_forward_hook(lambda m, a, y: y * 2),
        "pre, kwargs": lambda: layer.register_forward_pre_hook(
            lambda m, a, k: log.append(f"pre, {len(a)} {len(k)}"), with_kwargs=True
        ),
        "post, kwargs": lambda: layer.register_forward_hook(
            lambda m, a, k, y: log.append(f"post, {len(a)} {len(k)}"), with_kwargs=True
        ),
        "pre, kwargs, changes": lambda: layer.register_forward_pre_hook(
            lambda m, a, k: (tuple(x * 2 for x in a), {n: x * 2 for n, x in k.items()}), with_kwargs=True
        ),
        "always called": lambda: layer.register_forward_hook(lambda m, a, y: log.append("always"), always_call=True),
        "backward": lambda: layer.register_full_backward_hook(lambda m, i, o: log.append("backward")),
        "backward pre": lambda: layer.register_full_backward_pre_hook(lambda m, o: log.append("backward pre")),
        "reads the layer it holds": lambda: layer.register_forward_hook(lambda m, a, y: y * (1 + layer.weight.norm())),
        "state dict": lambda: layer.register_state_dict_post_hook(lambda m, d, p, local: None),
    }
    for hook in case.hooks:
        made[hook]()


def inputs(case: Layer) -> Tensor:
    with random_states_kept():
        seed_all(case.seed + 1)
        channels = max(1, case.I // 2) if case.changed == "weight of fewer inputs" else case.I
        if not case.kernel:
            return torch.randn(*case.batch, channels, dtype=DTYPES[case.dtype])
        d = len(case.kernel)
        x = torch.randn(*case.batch[:1], channels, *(7, 9, 6)[:d], dtype=DTYPES[case.dtype])
        if case.input_channels_last and d > 1 and case.batch:
            x = x.contiguous(memory_format=torch.channels_last if d == 2 else torch.channels_last_3d)
        return x


# ---- what is right ----


def forms(case: Layer, geometry: lamina.Geometry) -> tuple[Any, Any]:
    """The layer's form at full and at half rank."""
    O, I = geometry.out_channels, geometry.in_channels
    if geometry.pointwise:
        return lamina.LowRank(min(O, I)), lamina.LowRank(max(1, min(O, I) // 2))
    into = None if case.sides == "out" else max(1, I // 2)
    out = None if case.sides == "in" else max(1, O // 2)
    g = case.groups if (into or I) % case.groups == 0 and (out or O) % case.groups == 0 else 1
    return lamina.BlockTerm(into and I, out and O), lamina.BlockTerm(into, out, g)


@dataclass
class Tolerance:
    """How far outputs may lie apart that are equal but for rounding.

    Rounding errors have random signs, so they add up like the output would if the weight's entries had: to the square root of
    the same layer of squared weights on squared inputs, the *size*. At most eight roundings to the dtype's ε meet in an output
    (three factors, three values between and after them, and two of the dense layer); a sum of n products adds √n of them in the
    dtype that sums are kept in. Where the dense layer itself is further than that from its float64 result, twice its own error
    is allowed on top. The floor is what is lost below the smallest normal number.
    """

    case: Layer
    dense: Run

    def __post_init__(self) -> None:
        dtype = DTYPES[self.case.dtype]
        limits, sums = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        taps = math.prod(self.case.kernel) if self.case.kernel else 1
        n = max(1, max(self.case.I, self.case.O) * taps)
        x = inputs(self.case)
        with torch.no_grad():
            size = run(squared(self.case), x.double().square())[0].clamp_min(0).sqrt()
            exact = run(double(self.case), x.double())[0]
        assert self.dense.outputs is not None
        found = self.dense.outputs[0].double()
        known = exact.isfinite() & found.isfinite() & (size < limits.max / 64)
        own = float((found - exact)[known].norm())
        self.size = size
        self.known = known
        step = limits.smallest_normal * limits.eps
        self.allowed = (8 * limits.eps + 2 * math.sqrt(n) * sums.eps) * float(size[known].norm())
        self.allowed += 2 * own + 4 * step * math.sqrt(n * max(1, size.numel()))

    def exceeded(self, found: Tensor, wanted: Tensor) -> bool:
        """Whether two outputs differ by more than rounding; where a number may have overflown nothing is said."""
        a, b = found.double()[self.known], wanted.double()[self.known]
        return not float((a - b).norm()) <= self.allowed


def double(case: Layer) -> nn.Module:
    """The dense network in float64, without hooks that look at what passes."""
    # The same numbers; PyTorch does not convert what was made in inference mode.
    case = dataclasses.replace(case, weight="" if case.weight == "inference" else case.weight)
    model = build(case, case.seed, []).double().eval()
    for module in model.modules():
        if "bias" in vars(module) and module.bias is not None:
            module.bias = module.bias.double()
    return model


def squared(case: Layer) -> nn.Module:
    """The dense network in float64 with squared weights."""
    model = double(case)
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, nn.Parameter):
                    setattr(module, name, nn.Parameter(tensor.double().square(), requires_grad=False))
                elif isinstance(tensor, Tensor):
                    setattr(module, name, tensor.double().square())
    return model


def judge(case: Layer) -> Outcome:
    """Everything lamina does with one layer."""
    log: list[str] = []
    name = "" if case.holder == "root" else "stem"
    x = inputs(case)
    dense = _dense_runs(case, x)
    dense_log = _hooks_called(build(case, case.seed, log), x, dense, log)
    tolerance = Tolerance(case, dense["eval + no_grad"])
    call = Calls(("stem", "again") if name else ())
    try:
        return _judged(case, call, name, x, dense, dense_log, tolerance, log)
    except Ended as ended:
        if ended.outcome.kind == "refused":
            return _refused(case, call, ended.outcome.detail, ended.outcome.law)
        raise call.warned(ended) from ended


def _judged(
    case: Layer,
    call: Calls,
    name: str,
    x: Tensor,
    dense: dict[str, Run],
    dense_log: list[str],
    tolerance: Tolerance,
    log: list[str],
) -> Outcome:
    context = CONTEXTS[case.context]

    def within(work: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            with context():
                return work()

        return wrapped

    model = build(case, case.seed, log)
    plan = call("make_plan", within(lambda: lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())), model)
    if name in plan.refused:
        same = call("decompose", within(lambda: lamina.decompose(model, plan)), model)
        expect_runs("what is left dense computes the same", runs(same, x), dense, call.names, other_bits)
        return _refused(case, call, plan.refused[name])
    if name not in plan.layers:
        raise broken("a layer is planned or refused", f"planned {list(plan.layers)}, refused {plan.refused}")
    full, half = forms(case, plan.layers[name].geometry)

    exact = call("decompose", within(lambda: lamina.decompose(model, plan.with_form(name, full))), model)
    _same_hooks(_hooks_called(exact, x, dense, log), dense_log)
    found = runs(exact, x)
    expect_runs("full rank computes what the dense layer does", found, dense, call.names, tolerance.exceeded)
    _same_look(case, found, dense)
    _same_gradients(case, exact, x, tolerance)
    _at_half_rank(case, call, within, plan.with_form(name, half), model, name, tolerance, log)
    return Outcome("right", f"with a warning: {first_line(call.warnings[0])}" if call.warnings else "")


def _dense_runs(case: Layer, x: Tensor) -> dict[str, Run]:
    try:
        found = runs(build(case, case.seed, []), x)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise Invalid(str(error)) from error
    if found["eval + no_grad"].outputs is None:
        raise Invalid(str(found["eval + no_grad"].error))
    return found


def _refused(case: Layer, call: Calls, why: str, law: str = "") -> Outcome:
    law = law or reason(why, call.names)
    odd = [trait for trait in traits(case) if trait.startswith(MAY_BE_REFUSED)]
    return Outcome("refused" if odd else "needless", law, why)


def _hooks_called(model: nn.Module, x: Tensor, dense: dict[str, Run], log: list[str]) -> list[str]:
    """What the hooks of a layer log where the dense one runs; where that does not, a decomposed one may all the same."""
    log.clear()
    runs(model, x, tuple(mode for mode, run in dense.items() if run.outputs is not None))
    return list(log)


def _same_hooks(log: list[str], dense_log: list[str]) -> None:
    if log != dense_log:
        raise broken("hooks run as before", f"{log[:6]} in place of {dense_log[:6]}")


def _same_look(case: Layer, found: dict[str, Run], dense: dict[str, Run]) -> None:
    if case.kind == "Conv3d":
        return  # PyTorch's own 1×1×1 convolution on a CPU answers contiguous whatever it is fed
    for mode, right in dense.items():
        here = found[mode]
        if right.outputs and here.outputs and look(here.outputs[0]) != look(right.outputs[0]):
            raise broken("outputs lie in memory as before", f"{mode}: {look(here.outputs[0])}, before {look(right.outputs[0])}")


def _same_gradients(case: Layer, exact: nn.Module, x: Tensor, tolerance: Tolerance) -> None:
    """The gradient for the input, of a weighted sum of outputs, is the dense layer's up to rounding."""
    if case.weight == "inference" or case.dtype in ("float16", "bfloat16") or abs(case.scale) > 10:
        return
    pair = []
    for model in (build(case, case.seed, []).eval(), exact.eval()):
        inner = x.clone().requires_grad_()
        try:
            y = run(model, inner)[0]
        except RuntimeError as error:
            raise Ended("raw", "full rank has the dense layer's gradient", first_line(str(error))) from error
        (y * torch.linspace(-1, 1, max(1, y.numel()), dtype=y.dtype)[: y.numel()].view_as(y)).sum().backward()
        assert inner.grad is not None
        pair.append(inner.grad)
    # As many roundings as forwards, and as long sums; the gradient's size is not the output's, hence its own norm, and √n once
    # more for what cancels in it.
    n = max(1, case.I, case.O) * (math.prod(case.kernel) if case.kernel else 1)
    allowed = (8 + 2 * math.sqrt(n)) * math.sqrt(n) * torch.finfo(DTYPES[case.dtype]).eps
    if bool(pair[0].isfinite().all()) and apart(pair[1], pair[0]) > allowed:
        raise broken("full rank has the dense layer's gradient", f"differs by {apart(pair[1], pair[0]):.2g}")


def _at_half_rank(
    case: Layer,
    call: Calls,
    within: Callable[[Callable[[], Any]], Callable[[], Any]],
    plan: lamina.Plan,
    model: nn.Module,
    name: str,
    tolerance: Tolerance,
    log: list[str],
) -> None:
    x = inputs(case)
    small = call("decompose", within(lambda: lamina.decompose(model, plan)), model)
    promised = plan.layers[name].after.parameters
    counted = sum(p.numel() for p in small.get_submodule(name).parameters())
    if counted != promised:
        raise broken("the layer has as many parameters as planned", f"{counted} in place of {promised}")
    _same_training(build(case, case.seed, log).get_submodule(name), small.get_submodule(name))

    second = build(case, case.seed, log)
    inplace = call("decompose in place", within(lambda: lamina.decompose(second, plan, inplace=True)), on_error_only=(second,))
    merged = call("merge", within(lambda: lamina.merge(small)), small)
    with tempfile.TemporaryDirectory(prefix="lamina-campaign-") as scratch:
        folder = f"{scratch}/saved"
        call("save", within(lambda: lamina.save(small, folder)), small)
        base = build(case, case.seed + 1000, log)
        loaded = call("load", within(lambda: lamina.load(base, folder)), on_error_only=(base,))
    others = {
        "in place equals the copy": inplace,
        "saved and loaded equals saved": loaded,
        "a deep copy equals": copy.deepcopy(small),
    }
    log.clear()
    wanted = runs(small, x)
    wanted_log = list(log)
    for law, other in others.items():
        if state(other) != state(small):
            raise broken(f"{law}, bit for bit", "the state differs")
        log.clear()
        expect_runs(f"{law}, bit for bit", runs(other, x), wanted, call.names, other_bits)
        _same_hooks(log, wanted_log)
        _same_look(case, runs(other, x), wanted)
        _same_training(small.get_submodule(name), other.get_submodule(name))

    # The dense layer that has the composed weight, made anew by its own constructor.
    oracle = build(case, case.seed, [])
    layer, composed = oracle.get_submodule(name), merged.get_submodule(name).weight.detach()
    own = layer.weight.detach()
    if type(merged.get_submodule(name)) is not type(layer) or composed.shape != own.shape or composed.dtype != own.dtype:
        raise broken("a merged layer is of the dense layer's type, shape and dtype", f"{composed.shape} {composed.dtype}")
    _near(case, plan, composed, own)
    layer.weight = nn.Parameter(composed.clone())
    right = runs(oracle, x)
    expect_runs(
        "half rank computes what the dense layer with the merged weight does", wanted, right, call.names, tolerance.exceeded
    )
    expect_runs("merged computes what half rank does", runs(merged, x), wanted, call.names, tolerance.exceeded)


def _same_training(dense: nn.Module, small: nn.Module) -> None:
    if dense.training != small.training:
        raise broken("the training flag is kept", f"{small.training}")
    was = {n: getattr(dense, n).requires_grad for n in ("weight", "bias") if getattr(dense, n, None) is not None}
    now = {("bias" if n.rpartition(".")[2] == "bias" else "weight", p.requires_grad) for n, p in small.named_parameters()}
    if type(dense) is not type(small) and now != set(was.items()):
        raise broken("factors train as the weight did and the bias as the bias", f"{sorted(now)} in place of {was}")


def _near(case: Layer, plan: lamina.Plan, composed: Tensor, own: Tensor) -> None:
    """The merged weight is as near to the dense one as truncated singular values are; in groups, no further than nothing is."""
    (planned,) = plan.decomposed.values()
    form, geometry = planned.form, planned.geometry
    W, found = own.double(), composed.double()
    if case.kind == "Conv1D":
        W, found = W.T, found.T
    eps = torch.finfo(own.dtype).eps
    largest = float(W.abs().max())
    limits = torch.finfo(own.dtype)
    if not largest or largest < 100 * limits.smallest_normal / eps or not math.isfinite(float(W.norm())):
        return
    W, found = W / largest, found / largest

    def discarded(side: int, rank: int | None) -> float:
        if rank is None:
            return 0.0
        values = torch.linalg.svdvals(W.movedim(side, 0).flatten(1))
        return float(values[rank:].square().sum())

    if isinstance(form, lamina.LowRank):
        bound = discarded(0, form.rank)
    elif form.groups == 1:
        bound = discarded(0, form.rank_out) + discarded(1, form.rank_in)
    else:
        bound = float(W.square().sum())
    lost = float((W - found).norm())
    # A computed singular value decomposition is exact for a matrix that lies n·ε away, n its longer side.
    allowed = 1.001 * math.sqrt(bound) + 4 * max(W.shape[0], W[0].numel(), 2) * eps * float(W.norm())
    if not lost <= allowed:
        raise broken(
            "the merged weight is as near as its rank allows", f"{form} of {geometry} loses {lost:.3g}, {allowed:.3g} would do"
        )


# ---- how they are drawn ----


def rarely(draw: st.DrawFn, odd: tuple[Any, ...], usual: Any, one_in: int = 6) -> Any:
    return draw(st.sampled_from(odd)) if draw(st.integers(0, one_in - 1)) == one_in - 1 else usual


ANY_CHANGES = (
    "weight of fewer inputs",
    "weight of fewer outputs",
    "bias taken away",
    "bias no parameter",
    "wrong channels said",
)
CHANGES = (
    *ANY_CHANGES,
    "stride as an int",
    "padding as an int",
    "dilation as an int",
    "other stride",
    "other padding",
    "padding as a list",
    "padding of one",
    "other padding mode",
    "other dilation",
    "other kernel said",
    "padding made beforehand",
    "other groups",
)
ANY_PATCHES = (
    "forward doubled",
    "forward by an equal one",
    "another class",
    "buffer beside the weight",
    "bias of another dtype",
)
PATCHES = (*ANY_PATCHES, "_conv_forward doubled")
WEIGHTS = (
    "zeros",
    "every second of a larger one",
    "transposed",
    "expanded",
    "of rank one",
    "one huge channel",
    "inference",
    "nan",
)
HOLDERS = ("root", "keyword", "called twice", "under two names", "reads an attribute")


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kind = draw(st.sampled_from(["Linear", "Conv2d", "Conv1d", "Conv1D", "Conv3d"]))
    d = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}.get(kind, 0)
    sizes = st.sampled_from([4, 2, 3, 5, 6, 8, 1, 0] if draw(st.integers(0, 9)) == 9 else [4, 2, 3, 5, 6, 8, 1])
    O, I = draw(sizes), draw(sizes)
    convolution: dict[str, Any] = {}
    if d:
        mode = rarely(draw, ("reflect", "replicate", "circular"), "zeros", 3)
        padding: Any = tuple(draw(st.integers(0, 2)) for _ in range(d))
        padding = rarely(draw, ("same", "valid"), padding, 4)
        convolution = {
            "kernel": tuple(draw(st.sampled_from([3, 1, 2])) for _ in range(d)),
            "stride": (1,) * d if padding == "same" else tuple(draw(st.integers(1, 2)) for _ in range(d)),
            "padding": padding,
            "dilation": tuple(draw(st.integers(1, 2)) for _ in range(d)),
            "padding_mode": mode,
            "layer_channels_last": d > 1 and draw(st.booleans()),
            "input_channels_last": d > 1 and draw(st.booleans()),
            "sides": draw(st.sampled_from(["both", "in", "out"])),
            "groups": rarely(draw, (2,), 1, 4),
        }
    batches = [(2,), (1,), (3,), (0,), ()] if d else [(2,), (1,), (3,), (0,), (), (2, 3), (2, 0, 3)]
    attribute = rarely(draw, ("gain", "gradients"), "", 8)
    holder = rarely(draw, HOLDERS, "sequential", 3)
    patches = (*PATCHES, "_conv_forward of seamless tiling") if kind == "Conv2d" else PATCHES if d else ANY_PATCHES
    hooks = tuple(sorted(draw(st.sets(st.sampled_from(HOOKS), max_size=3)))) if draw(st.integers(0, 3)) == 3 else ()
    return Layer(
        kind=kind,
        O=O,
        I=I,
        bias=kind == "Conv1D" or draw(st.booleans()),
        batch=draw(st.sampled_from(batches)),
        dtype=rarely(draw, ("float64", "bfloat16", "float16"), "float32", 2),
        weight=rarely(draw, WEIGHTS, "", 5),
        scale=rarely(draw, (-30, -20, -10, -4, 4, 10, 20, 30), 0, 6),
        frozen=rarely(draw, (("weight",), ("bias",), ("weight", "bias")), (), 6),
        changed=rarely(draw, CHANGES if d else ANY_CHANGES, "", 5),
        patch=rarely(draw, patches, "", 8),
        hooks=hooks,
        attribute="gain" if holder == "reads an attribute" else attribute,
        context=rarely(draw, tuple(CONTEXTS)[1:], "", 6),
        holder=holder,
        seed=draw(st.integers(0, 99_999)),
        **convolution,
    )


CAMPAIGN = Campaign(
    name="layers",
    description=__doc__,
    cases=layers(),
    judge=judge,
    traits=traits,
    known={"Layer": Layer},
    per_chunk=500,
)

if __name__ == "__main__":
    sys.exit(CAMPAIGN.run())
