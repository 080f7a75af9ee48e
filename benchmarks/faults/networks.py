"""Networks assembled at random from what people's networks do: second holders, ties, own states, patches, caches.

    python benchmarks/faults/networks.py --examples 300 --seed 0

First every part alone, then as many networks as asked for. Each is planned, decomposed at full and at half rank, as a copy and
in place, saved, loaded onto a network of other weights, merged, verified and quantised. Either lamina refuses by name and
leaves the network as it was, or everything is right:

- at full rank the network answers what the dense one does in train, eval, eval without gradients and inference mode;
- at half rank it answers what a freshly made dense network does into which the products of the factors were written;
- copied, in place, saved and loaded, and deep-copied it is the same to the last bit;
- every layer is called as often as before, and gradients reach every factor of a layer whose weight they reached;
- a copy shares nothing with the original, which answers as before, also in another thread meanwhile;
- what was tied still is; quantised, it runs where the dense network does.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import parts
import torch
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
    changes,
    content,
    default_dtype,
    expect_runs,
    first_line,
    other_bits,
    random_states_kept,
    reason,
    run,
    runs,
    seed_all,
    state,
    where,
)
from parts import PARTS, WIDTH
from torch import Tensor, nn

import lamina

DTYPES = {"float64": torch.float64, "float32": torch.float32}
EXAMPLES = ("tensor", "list", "mapping", "lengths", "constants", "workloads")
OUTPUTS = ("tensor", "mapping", "tuple")
WRAPPERS = ("DataParallel", "compiled")
AFTERWARDS = ("sequential", "DataParallel", "compiled")


@dataclass(frozen=True, repr=False)
class Network(Case):
    """The parts of a network, how it is fed, and what is put around it."""

    parts: tuple[str, ...] = ("plain",)
    kind: str = "vector"
    dtype: str = "float64"
    example: str = "tensor"
    output: str = "tensor"
    training: bool = True
    wrapped: str = ""
    afterwards: str = ""
    served: bool = False
    seed: int = 0


def traits(case: Network) -> frozenset[str]:
    """What is odd about a network."""
    found = {*case.parts} - {"plain"}
    for name, usual in (("example", "tensor"), ("output", "tensor"), ("wrapped", ""), ("afterwards", "")):
        if getattr(case, name) != usual:
            found.add(f"{name}: {getattr(case, name)}")
    if case.served:
        found.add("served meanwhile")
    return frozenset(found)


def may_be_refused(case: Network) -> bool:
    return any(PARTS[p].may_be_refused for p in case.parts) or bool(case.wrapped)


# ---- the network ----


class Body(nn.Module):
    """The parts in turn, and a head."""

    def __init__(self, case: Network) -> None:
        super().__init__()
        self.parts = nn.ModuleList([PARTS[title](case.kind) for title in case.parts])
        self.head = nn.Linear(WIDTH, 3)
        self.answer = case.output

    def run(self, x: Tensor) -> Any:
        for part in self.parts:
            x = torch.sin(part(x)) + 0.5 * x
        y = self.head(x.mean((2, 3)) if x.ndim == 4 else x)
        if self.answer == "mapping":
            return {"logits": y, "features": [x]}
        return (y, x, None) if self.answer == "tuple" else y


class OfTensor(Body):
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class OfList(Body):
    def forward(self, xs: list[Tensor]) -> Any:
        return self.run(torch.stack(xs))


class OfMapping(Body):
    def forward(self, *, x: Tensor, scale: Tensor | None = None) -> Any:
        return self.run(x if scale is None else x * scale)


class OfLengths(Body):
    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        if bool((lengths < 1).any()):
            raise ValueError("a length is not positive")
        return self.run(x / lengths.view(-1, *(1 for _ in x.shape[1:])))


class OfConstants(Body):
    def forward(self, x: Tensor, double: bool, name: str, nothing: None = None) -> Any:
        if name != "x":
            raise ValueError("not my name")
        return self.run(2 * x if double else x)


NETWORKS: dict[str, type[Body]] = {
    "tensor": OfTensor,
    "workloads": OfTensor,
    "list": OfList,
    "mapping": OfMapping,
    "lengths": OfLengths,
    "constants": OfConstants,
}


def build(case: Network, number: int) -> nn.Module:
    """The network of a case; other numbers give other weights."""
    with random_states_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_all(number)
        # Not converted afterwards, which would untie what shares memory.
        with default_dtype(DTYPES[case.dtype]):
            model: nn.Module = NETWORKS[case.example](case)
        return wrap(model.train(case.training), case.wrapped)


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "DataParallel":
        return nn.DataParallel(model)
    if how == "compiled":
        if hasattr(model, "_orig_mod"):  # compiled twice it would be no module
            return model
        torch._dynamo.reset()
        compiled: nn.Module = torch.compile(model, backend="eager")
        return compiled
    if how == "sequential":
        return nn.Sequential(model, nn.Identity()) if isinstance(model, OfTensor) else Around(model)
    return model


class Around(nn.Module):
    """What `nn.Sequential` is to a network of one argument."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def example_of(case: Network, dtype: torch.dtype | None = None) -> Any:
    with random_states_kept():
        seed_all(case.seed + 1)
        shape = (4, WIDTH) if case.kind == "vector" else (4, WIDTH, 5, 5)
        x = torch.randn(shape, dtype=DTYPES[case.dtype]).to(dtype or DTYPES[case.dtype])
        return {
            "tensor": x,
            "workloads": x,
            "list": {"xs": list(x)},
            "mapping": {"x": x, "scale": torch.full((), 0.5, dtype=x.dtype)},
            "lengths": (x, torch.tensor([1, 2, 3, 4])),
            "constants": (x, True, "x"),
        }[case.example]


def planned_on(case: Network, example: Any) -> Any:
    """What is given to `make_plan`."""
    if case.example == "workloads":
        return [lamina.Workload(example, 3.0), lamina.Workload(example[:1].repeat(2, *(1 for _ in example.shape[1:])))]
    return example


# ---- what is right ----


def tolerance(case: Network) -> float:
    """Half of the digits, relative to an output's size: rounding passes a few layers, norms and divisions on its way."""
    return float(torch.finfo(DTYPES[case.dtype]).eps ** 0.5)


def names_of(model: nn.Module) -> tuple[str, ...]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return tuple(n for n, _ in [*model.named_modules(remove_duplicate=False), *tensors] if n)


@dataclass
class Judge:
    """One network, and what the dense one answers."""

    case: Network

    def __post_init__(self) -> None:
        parts.GLOBAL.clear()
        self.example = example_of(self.case)
        self.dense = runs(self.make(), self.example)
        if all(r.outputs is None for r in self.dense.values()):
            raise Invalid(str(next(iter(self.dense.values())).error))
        try:
            expect_runs("", runs(self.make(), self.example), self.dense, (), other_bits)
        except Ended as ended:
            raise Invalid(f"the dense network is not the same each time: {ended}") from ended
        self.model = self.make()
        self.call = Calls(names_of(self.model))
        self.refusals: list[str] = []

    def make(self, other: int = 0) -> nn.Module:
        return build(self.case, self.case.seed + 1000 * other)

    def off(self, found: Tensor, wanted: Tensor) -> bool:
        return not apart(found, wanted) <= tolerance(self.case)

    def plan(self, model: nn.Module) -> lamina.Plan:
        example = planned_on(self.case, self.example)
        return self.call("make_plan", lambda: lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio()), model)

    def unless_refused(
        self, what: str, work: Callable[[], nn.Module], *held: nn.Module, inplace: bool = False
    ) -> nn.Module | None:
        """What a call returns, or None where it refuses by name."""
        try:
            return self.call(what, work, *(() if inplace else held), on_error_only=held if inplace else ())
        except Ended as ended:
            if ended.outcome.kind != "refused":
                raise
            self.refusals.append(ended.outcome.law)
            return None

    def __call__(self) -> Outcome:
        plan = self.plan(self.model)
        for name, why in plan.refused.items():
            if not why.strip():
                raise broken("a refusal has a reason", name)
        self.refusals += [reason(why, self.call.names) for why in plan.refused.values()]
        full, half = (with_forms(plan, share) for share in (1, 2))
        exact = self._at_full_rank(full)
        small = self._at_half_rank(half)
        if small is not None:
            self._afterwards(small, half)
        self._original_untouched(exact, full)
        return self._outcome(plan, exact, small)

    def _outcome(self, plan: lamina.Plan, exact: nn.Module | None, small: nn.Module | None) -> Outcome:
        silent = [text for text in self.call.warnings if text]
        if not plan.layers or (exact is None and small is None):
            kind = "refused" if may_be_refused(self.case) else "needless"
            return Outcome(kind, self.refusals[0] if self.refusals else "nothing to decompose", "; ".join(self.refusals))
        if self.refusals and not may_be_refused(self.case):
            return Outcome("needless", self.refusals[0], "; ".join(self.refusals))
        if any(text.startswith(("copy", "in place", "save", "load", "merge")) for text in self.refusals):
            return Outcome(
                "refused", next(t for t in self.refusals if t.startswith(("copy", "in place", "save", "load", "merge")))
            )
        return Outcome("right", f"with a warning: {first_line(silent[0])}" if silent else "")

    # -- full rank --

    def _at_full_rank(self, plan: lamina.Plan) -> nn.Module | None:
        law = "full rank answers what the dense network does"
        small = self.unless_refused("copy", lambda: lamina.decompose(self.model, plan), self.model)
        if small is not None:
            self._same_ties(small, plan, "in a copy")
            self._judged(law, small, plan)
        second = self.make()
        own = with_forms(self.plan(second), 1)
        if own != plan:
            raise broken("two plans of equal networks are equal", str(plan.differences(own)))
        changed = self.unless_refused("in place", lambda: lamina.decompose(second, own, inplace=True), second, inplace=True)
        if changed is not None:
            self._same_ties(changed, plan, "in place")
            self._judged(f"in place, {law}", changed, plan)
        return small if small is not None else changed

    def _judged(self, law: str, small: nn.Module, plan: lamina.Plan) -> None:
        found = runs(small, self.example)
        expect_runs(law, found, self.dense, self.call.names, self.off)
        self._gradients(law, small, found, plan)
        self._calls(law, small, plan)

    def _gradients(self, law: str, small: nn.Module, found: dict[str, Run], plan: lamina.Plan) -> None:
        for mode, right in self.dense.items():
            for name in plan.decomposed:
                before, after = path(self.model, name), path(small, name)
                wanted = {leaf for leaf in ("weight", "bias") if f"{before}.{leaf}" in right.gradients}
                for leaf, parameter in small.get_submodule(after).named_parameters():
                    of = "bias" if leaf.rpartition(".")[2] == "bias" else "weight"
                    if of in wanted and parameter.requires_grad and f"{after}.{leaf}" not in found[mode].gradients:
                        raise broken(f"{law}: gradients reach every factor", f"{mode}: none reaches {after}.{leaf}")

    def _calls(self, law: str, small: nn.Module, plan: lamina.Plan) -> None:
        if "compiled" in (self.case.wrapped, self.case.afterwards):
            return
        dense = self.make()
        runs(dense, self.example)  # as the other one was run before: caches are as full
        before, after = called(dense, self.example, plan), called(small, self.example, plan)
        if before is not None and after != before:
            raise broken(f"{law}: every layer is called as often as before", f"{dict(after or {})} in place of {dict(before)}")

    def _same_ties(self, small: nn.Module, plan: lamina.Plan, where_: str) -> None:
        before, after = ties(self.make()), ties(small)
        inside = tuple(f"{path(self.model, name)}." for name in plan.decomposed)
        for pair in before - after:
            if not any(name.startswith(inside) for name in pair):
                raise broken(f"what shares memory still does {where_}", " and ".join(sorted(pair)))

    # -- half rank --

    def _at_half_rank(self, plan: lamina.Plan) -> nn.Module | None:
        small = self.unless_refused("copy", lambda: lamina.decompose(self.model, plan), self.model)
        second = self.make()
        own = with_forms(self.plan(second), 2)
        inplace = self.unless_refused("in place", lambda: lamina.decompose(second, own, inplace=True), second, inplace=True)
        if small is None and inplace is None:
            return None
        same: dict[str, nn.Module] = {}
        first = small if small is not None else inplace
        assert first is not None
        if small is not None and inplace is not None:
            same["in place equals the copy"] = inplace
        loaded = self._saved_and_loaded(first, plan)
        if loaded is not None:
            same["saved and loaded equals saved"] = loaded
        merged = self.unless_refused("merge", lambda: lamina.merge(first), first) if plan.decomposed else None
        if (twin := self._deep_copy(first)) is not None:
            same["a deep copy equals"] = twin
        for law, other in same.items():
            if state(other) != state(first):
                raise broken(f"{law}, bit for bit", f"other are {', '.join(changes(state(first), state(other))[:4])}")
        oracle = self._oracle(first, plan)
        wanted = runs(first, self.example)
        expect_runs("half rank answers what the products of the factors do", wanted, oracle, self.call.names, self.off)
        for law, other in same.items():
            found = runs(other, self.example)
            expect_runs(f"{law}, bit for bit", found, wanted, self.call.names, other_bits)
            self._gradients(law, other, found, plan)
            self._calls(law, other, plan)
        if merged is not None:
            found = runs(merged, self.example)
            expect_runs("merged answers what half rank does", found, wanted, self.call.names, self.off)
            for mode, right in self.dense.items():
                for name in plan.decomposed:
                    before, after = f"{path(self.model, name)}.weight", f"{path(merged, name)}.weight"
                    if before in right.gradients and after not in found[mode].gradients:
                        raise broken("merged: gradients reach every weight", f"{mode}: none reaches {after}")
        return first

    def _saved_and_loaded(self, small: nn.Module, plan: lamina.Plan) -> nn.Module | None:
        with tempfile.TemporaryDirectory(prefix="lamina-campaign-") as scratch:
            folder = f"{scratch}/saved"
            refused = len(self.refusals)
            self.unless_refused("save", lambda: lamina.save(small, folder) or small, small)
            if len(self.refusals) > refused:
                return None
            base = self.make(other=1)
            loaded = self.unless_refused("load", lambda: lamina.load(base, folder), base, inplace=True)
        if loaded is None or not self._torch_restores():
            return None
        self._same_ties(loaded, plan, "after loading")
        return loaded

    def _torch_restores(self) -> bool:
        """Whether PyTorch's own state dict brings the dense network back: more is not asked of lamina."""
        other = self.make(other=2)
        try:
            other.load_state_dict(self.make().state_dict())
            expect_runs("", runs(other, self.example), self.dense, (), self.off)
        except Exception:
            return False
        return True

    def _deep_copy(self, small: nn.Module) -> nn.Module | None:
        try:
            expect_runs("", runs(copy.deepcopy(self.make()), self.example), self.dense, (), other_bits)
        except Exception:
            return None  # PyTorch cannot copy the dense network either
        try:
            return copy.deepcopy(small)
        except Exception as error:
            raise Ended(
                "raw", f"deepcopy raises {type(error).__name__}", f"{first_line(str(error))} @ {where(error)}"
            ) from error

    def _oracle(self, small: nn.Module, plan: lamina.Plan) -> dict[str, Run]:
        """A dense network of the same constructor, with the products of the factors as its weights."""
        model = self.make()
        with torch.inference_mode():  # a weight may have been made there
            for name in plan.decomposed:
                weight = model.get_submodule(path(model, name)).weight
                weight.copy_(product(small.get_submodule(path(small, name))).reshape(weight.shape))
        return runs(model, self.example)

    # -- what comes afterwards --

    def _afterwards(self, small: nn.Module, plan: lamina.Plan) -> None:
        self._in_a_wrapper(plan)
        self._served(plan)
        self._quantised(plan)
        self._verified(plan)

    def _fresh(self, plan: lamina.Plan) -> nn.Module:
        """The network at half rank, made once more in place."""
        return lamina.decompose(self.make(), plan, inplace=True)

    def _in_a_wrapper(self, plan: lamina.Plan) -> None:
        if not self.case.afterwards:
            return
        try:
            inner, plain = self._fresh(plan), runs(self._fresh(plan), self.example)
        except lamina.LaminaError:
            return
        wrapped = wrap(inner, self.case.afterwards)
        with tempfile.TemporaryDirectory(prefix="lamina-campaign-") as scratch:
            folder = f"{scratch}/saved"
            refused = len(self.refusals)
            self.unless_refused("save", lambda: lamina.save(wrapped, folder) or wrapped, wrapped)
            if len(self.refusals) == refused and self._torch_restores():
                loaded = [self._loaded(folder, how) for how in ("", self.case.afterwards)]
                if all(model is None for model in loaded):
                    raise broken("what is saved in a wrapper can be loaded", "neither with nor without it")
                for model in loaded:
                    if model is not None:
                        expect_runs("saved in a wrapper", runs(model, self.example), plain, self.call.names, other_bits)
            del self.refusals[refused:]
        expect_runs("in a wrapper", runs(wrapped, self.example), plain, self.call.names, self.off)

    def _loaded(self, folder: str, how: str) -> nn.Module | None:
        base = wrap(self.make(other=1), how)
        return self.unless_refused("load", lambda: lamina.load(base, folder), base, inplace=True)

    def _served(self, plan: lamina.Plan) -> None:
        """A thread that calls the original while it is planned and decomposed sees only right answers."""
        if not self.case.served or not all(PARTS[p].serves for p in self.case.parts) or self.case.wrapped:
            return
        model = self.make().eval()
        try:
            with torch.inference_mode():
                wanted = run(model, self.example)
        except Exception:
            return
        seen, stop = Counter[str](), threading.Event()

        def serve() -> None:
            with torch.inference_mode():
                while not stop.is_set():
                    try:
                        found = run(model, self.example)
                        seen["right" if not any(map(other_bits, found, wanted)) else "wrong"] += 1
                    except Exception as error:
                        seen[f"{type(error).__name__}: {first_line(str(error))}"] += 1

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            for _ in range(6):
                lamina.make_plan(model, self.example, lamina.Ratio(2.0), rule=lamina.AtRatio())
                lamina.decompose(model, plan)
        except lamina.LaminaError:
            pass  # judged before; here it counts what the thread saw
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
        wrong = {what: n for what, n in seen.items() if what != "right"}
        if wrong:
            raise broken("another thread meanwhile sees right answers only", f"{wrong} of {sum(seen.values())}")

    def _quantised(self, plan: lamina.Plan) -> None:
        """Where the dense network can be quantised dynamically, so can the decomposed one."""
        example = example_of(self.case, torch.float32)
        dense = quantised(self.make, example)
        if isinstance(dense, Exception):
            return
        try:
            plain = self._fresh(plan).float().eval()
            with torch.no_grad(), random_states_kept():
                seed_all(7)
                wanted = run(plain, example)
        except (lamina.LaminaError, RuntimeError):
            return
        found = quantised(lambda: self._fresh(plan), example)
        if isinstance(found, lamina.LaminaError):
            raise Ended("refused", f"quantised: {reason(str(found), self.call.names)}", str(found))
        if isinstance(found, Exception):
            raise Ended("raw", f"quantised it raises {type(found).__name__}", f"{first_line(str(found))} @ {where(found)}")
        for a, b in zip(found, wanted, strict=True):
            # Eight bits keep two digits of every layer; another weight is off by its whole size.
            if a.shape != b.shape or apart(a, b) > 0.5:
                raise broken("quantised it answers nearly the same", f"differs by {apart(a, b):.2g}")

    def _verified(self, plan: lamina.Plan) -> None:
        try:
            small = self._fresh(plan)
        except lamina.LaminaError:
            return
        found = self.call("verify", lambda: lamina.verify(self.make(), small, planned_on(self.case, self.example)), small)
        failed = [str(check) for check in found.checks if not check.passed]
        if failed and not self.refusals:
            raise Ended("alarm", f"verify: {reason(failed[0], self.call.names)}", "; ".join(failed))

    def _original_untouched(self, small: nn.Module | None, plan: lamina.Plan) -> None:
        """A copy shares nothing with the original, and the original answers as before."""
        before = content(self.model)
        if small is not None:
            with torch.no_grad():
                for tensor in [*small.parameters(), *small.buffers()]:
                    if tensor.layout == torch.strided and not tensor.is_inference():
                        try_to_zero(tensor)
        if changed := changes(before, content(self.model)):
            raise broken("a copy shares nothing with the original", f"changed: {', '.join(changed[:4])}")
        expect_runs("the original answers as before", runs(self.model, self.example), self.dense, self.call.names, other_bits)


def try_to_zero(tensor: Tensor) -> None:
    try:
        tensor.zero_()
    except RuntimeError:  # an expanded one
        return


def quantised(make: Callable[[], nn.Module], example: Any) -> list[Tensor] | Exception:
    """The answer in eval of a network quantised dynamically, or what it raises."""
    with warnings.catch_warnings(), torch.no_grad(), random_states_kept():
        warnings.simplefilter("ignore")
        try:
            model = torch.ao.quantization.quantize_dynamic(make().float().eval(), {nn.Linear})
            seed_all(7)
            return run(model, example)
        except Exception as error:
            return error


def with_forms(plan: lamina.Plan, share: int) -> lamina.Plan:
    """Every layer at its full rank divided by a number."""
    for name, layer in plan.layers.items():
        O, I = layer.geometry.out_channels, layer.geometry.in_channels
        if layer.geometry.pointwise:
            plan = plan.with_form(name, lamina.LowRank(max(1, min(O, I) // share)))
        else:
            plan = plan.with_form(name, lamina.BlockTerm(max(1, I // share), max(1, O // share)))
    return plan


def path(model: nn.Module, name: str) -> str:
    """The full name of a planned layer in a network that may be wrapped."""
    known = dict(model.named_modules(remove_duplicate=False))
    return next(full for full in (name, f"module.{name}", f"_orig_mod.{name}") if full in known)


def product(layer: nn.Module) -> Tensor:
    """The dense weight that a layer's factors make, from the definition."""
    factors = {name: p.detach() for name, p in layer.named_parameters() if name.rpartition(".")[2] == "weight"}
    if "core.weight" in factors:
        expand, core, reduce = (factors[f"{n}.weight"] for n in ("expand", "core", "reduce"))
        return torch.einsum("ot,ts...,si->oi...", expand.flatten(1), core, reduce.flatten(1))
    return factors["second.weight"].flatten(1) @ factors["first.weight"].flatten(1)


def called(model: nn.Module, example: Any, plan: lamina.Plan) -> Counter[str] | None:
    """How often each planned layer is called in eval without gradients; None where the network does not run there."""
    count: Counter[str] = Counter()
    handles = []
    for name in plan.decomposed:

        def one(_: nn.Module, __: Any, name: str = name) -> None:
            count[name] += 1

        handles.append(model.get_submodule(path(model, name)).register_forward_pre_hook(one))
    try:
        return count if runs(model, example, ("eval + no_grad",))["eval + no_grad"].outputs is not None else None
    finally:
        for handle in handles:
            handle.remove()


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Pairs of names whose tensors share a storage."""
    holders: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if tensor.layout == torch.strided and tensor.numel():
            holders.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return {frozenset((names[0], other)) for names in holders.values() for other in names[1:]}


def judge(case: Network) -> Outcome:
    judged = Judge(case)
    try:
        return judged()
    except Ended as ended:
        if ended.outcome.kind == "refused" and not may_be_refused(case):
            return dataclasses.replace(ended.outcome, kind="needless")
        raise judged.call.warned(ended) from ended


# ---- how they are drawn ----


@st.composite
def networks(draw: st.DrawFn) -> Network:
    kind = draw(st.sampled_from(["vector", "image"]))
    titles = [title for title, part in PARTS.items() if kind in part.kinds]
    several = draw(st.lists(st.sampled_from(titles), min_size=1, max_size=3))
    return Network(
        parts=tuple(several),
        kind=kind,
        dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        example=draw(st.sampled_from(["tensor", "tensor", *EXAMPLES])),
        output=draw(st.sampled_from(["tensor", *OUTPUTS])),
        training=draw(st.booleans()),
        wrapped=draw(st.sampled_from(["", "", "", "", "", "", "", "", *WRAPPERS])),
        afterwards=draw(st.sampled_from(["", "", "", "", *AFTERWARDS])),
        served=draw(st.integers(0, 3)) == 3,
        seed=draw(st.integers(0, 99)),
    )


def each_alone() -> Iterator[Network]:
    """Every part by itself in every kind, and every way to feed and wrap a plain network."""
    for title, part in PARTS.items():
        for kind in part.kinds:
            yield Network(parts=(title,), kind=kind)
    for kind in parts.KINDS:
        for example in EXAMPLES:
            yield Network(kind=kind, example=example, output="mapping")
        yield Network(parts=("dropout", "batch norm"), kind=kind, served=True)
        for wrapped in WRAPPERS:
            yield Network(kind=kind, wrapped=wrapped)
        for afterwards in AFTERWARDS:
            yield Network(kind=kind, afterwards=afterwards)


CAMPAIGN = Campaign(
    name="networks",
    description=__doc__,
    cases=networks(),
    judge=judge,
    traits=traits,
    known={"Network": Network},
    per_chunk=50,
    first=tuple(each_alone()),
)

if __name__ == "__main__":
    sys.exit(CAMPAIGN.run())
