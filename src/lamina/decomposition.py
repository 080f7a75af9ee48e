"""Model and plan → model, and back.

`decompose` first makes sure that it can: the plan fits, every weight is finite, each layer computes what can be read off it,
and the network's own code gets on with the new layers in every mode. Only then are weights factorised, one layer after the
other.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibration.calibrate import calibration_on
from .calibration.calibration import Calibration
from .errors import CalibrationWarning, LaminaError, LayerError, PlanError, RankError
from .examples import example_from
from .factorize.metric import Metric
from .forms import Form
from .layers.build import exact, factored, placeholder, skeleton
from .layers.decomposed import DecomposedLayer
from .network.attention import Attention
from .network.copying import cloned
from .network.fingerprint import fingerprint
from .network.foreign import allow_saving, refuse_saving
from .network.inplace import exchange
from .network.patterns import matches
from .network.placing import placed
from .network.readers import on_meta
from .network.running import ANSWERING, first_line, outside_inference_mode
from .network.surgery import adopt, forbid_nonfinite
from .network.trial import forbid_use, prove, tried, warn_untried
from .network.walk import Layer, walk
from .network.wrappers import unwrapped
from .plan import Plan, listed
from .sequential import Inputs, fit_in_sequence
from .values import Geometry, Workload, closest

_PLAN = "_lamina_plan"
_INSTEAD = "pass inplace=True to change it where it is"


@outside_inference_mode
def decompose(
    model: nn.Module, plan: Plan, data: Any = None, *, sequential: Any = None, inplace: bool = False, check: bool = True
) -> nn.Module:
    """Replace the layers of a network as a plan says.

    Args:
        model: A network of the structure that the plan was made for, with any weights. Unless ``inplace``, it is only read and
            may be in use meanwhile.
        plan: What each layer becomes.
        data: What `calibrate` returned for this network, or the data, which are then calibrated on with `Gaussian`; class
            scores want `calibrate` with `Categorical` first. Its factors are then those that change the network's
            answers least. A plan that was made with a calibration wants the same one; one whose factors are those of the
            weights alone, since they scored better, leaves it aside.
        sequential: Unlabelled batches, those of the calibration for example: layers are then fitted one after the other, each
            on the inputs that it now gets, to what the original answers on its own; where that loses less on every fourth
            batch, which is held out. Takes two runs of half the network on all data for each layer, and a second fit. The plan
            of the result remembers it, and wants the same data again; scores in it, which were of other factors, are taken out.
        inplace: Change ``model`` itself; each dense weight is then freed as soon as its factors stand. A layer stays the same
            object, so whoever holds it, another network too, holds the decomposed one. Otherwise a copy is made, which shares
            nothing with ``model``.
        check: Try the network with placeholders in every mode in which it runs (train, eval, eval without gradients,
            inference mode) before anything is factorised, on inputs of the shapes in the plan. This proves that nothing reads a
            dense weight that was exchanged.

    Returns:
        The decomposed network: ``model`` where ``inplace``.

    Raises:
        PlanError: The plan is for another network, wants another calibration or other data in sequence, or its factors were
            trained, in a supernet or by `refine`, and cannot be found anew.
        ExampleError: The data to be fitted to in sequence hold nothing, or can be iterated only once.
        CalibrationError: The calibration is of another network or of other weights.
        LayerError: A weight is not finite, a layer was patched, the network reads a layer's weight from elsewhere, or it does
            not run with a layer decomposed. The network is as it was.
        LaminaError: The network cannot be copied, or the disk is full. The network is as it was.
    """
    chosen = planned_layers(model, plan)
    forbid_trained(plan)
    _want(plan, data)
    inputs = _inputs(model, plan, data, sequential, inplace)
    known = calibration_on(unwrapped(model), data) if inputs or not plan.factors.weights_alone else None
    calibration = None if plan.factors.weights_alone else known
    if calibration:
        if plan.factors.calibration not in (None, calibration.identity):
            raise PlanError(
                "this plan was made with another calibration: pass that one as data=, or make the plan anew; data themselves "
                "are read by outputs=Gaussian(), and in another order make another one each time, so calibrate once with "
                "lamina.calibrate"
            )
        if unknown := [layer.name or "the network" for layer, _ in chosen if layer.name not in calibration.layers]:
            warnings.warn(
                f"the calibration knows nothing of {listed(unknown)}: fitted to the weights alone",
                CalibrationWarning,
                stacklevel=3,
            )
        factors = plan.factors.model_copy(update={"calibration": calibration.identity})
        plan = plan.model_copy(update={"factors": factors})
    layers, forms = [layer for layer, _ in chosen], {layer.name: form for layer, form in chosen}
    for layer in layers:
        forbid_nonfinite(layer)
    examples = [example_from(shape, model) for shape in plan.examples or ()] if check and layers else []
    if check and layers:
        _prove(unwrapped(model), layers, forms, examples)

    def make(layer: Layer) -> DecomposedLayer:
        moments = calibration.layers.get(layer.name) if calibration else None
        metric = moments.metric(plan.factors.damping) if moments else None
        return factored_layer(layer, forms[layer.name], metric, inplace)

    if inplace:
        exchange(layers, make, lambda held: forbid_reading(model, held, examples) if check else None)
        return attach_plan(model, plan)
    news = placed(((layer, make(layer)) for layer in layers), apart=True)
    small = cloned(model, news, _INSTEAD)
    if inputs and known:
        fit = fit_in_sequence(unwrapped(model), unwrapped(small), chosen, known, plan.factors.damping, inputs)
        factors = plan.factors.model_copy(update={"sequential": fit})
        plan = plan.model_copy(update={"factors": factors, "scores": plan.scores if plan.factors.sequential else None})
    return attach_plan(small, plan)


def _want(plan: Plan, data: Any) -> None:
    if plan.factors.calibration and data is None:
        raise PlanError("this plan's factors are fitted to a calibration: pass it as data=, or the data that it was made on")


def of_other_weights(plan: Plan, data: Any, sequential: Any) -> Plan:
    """A plan for other weights of its network: it wants a calibration of these, and inputs where it did before.

    Scores, which were of the weights before, are taken out.

    Raises:
        PlanError: The plan wants a calibration or inputs, and there are none.
    """
    _want(plan, data)
    if plan.factors.sequential and sequential is None:
        raise PlanError(_IN_SEQUENCE)
    factors = plan.factors.model_copy(update={"calibration": None, "sequential": None})
    return plan.model_copy(update={"factors": factors, "scores": None})


_IN_SEQUENCE = "this plan's layers were fitted in sequence: pass what they were fitted on as sequential="


def _inputs(model: nn.Module, plan: Plan, data: Any, sequential: Any, inplace: bool) -> Inputs | None:
    """What layers are fitted on in sequence, if they are to be.

    Raises:
        PlanError: The plan wants other inputs, or no calibration is given.
        LaminaError: It is asked for in place.
        ExampleError: The inputs cannot be used.
    """
    if sequential is None:
        if plan.factors.sequential:
            raise PlanError(_IN_SEQUENCE)
        return None
    if isinstance(sequential, bool | Calibration):
        raise PlanError(
            f"a {type(sequential).__name__} holds no inputs: pass the batches that layers are fitted on as sequential="
        )
    if data is None:
        raise PlanError("layers are fitted in sequence with a calibration: pass one as data=")
    if inplace:
        raise LaminaError("a fit in sequence compares with the original, which in place is gone: leave out inplace=True")
    inputs = Inputs(unwrapped(model), sequential)
    if plan.factors.sequential and plan.factors.sequential.data != inputs.identity:
        raise PlanError("this plan's layers were fitted in sequence on other inputs: pass those as sequential=, in their order")
    return inputs


def forbid_trained(plan: Plan) -> None:
    """Refuse a plan whose factors cannot be found anew.

    Raises:
        PlanError: They were trained, in a supernet or by `refine`.
    """
    if plan.factors.series:
        raise PlanError(
            "this plan's factors were trained in a supernet, and new ones would be others: take them out with "
            "Supernet.extract, or load the saved network with lamina.load"
        )
    if plan.factors.refined:
        raise PlanError(
            "this plan's factors were refined, and new ones would be others: load the saved network with lamina.load, or "
            "decompose by the plan that was refined and call lamina.refine again"
        )


def _prove(model: nn.Module, layers: Sequence[Layer], forms: Mapping[str, Form], examples: Sequence[Workload]) -> None:
    """Make sure that a network gets on with its layers decomposed; what the trial needs is gone afterwards."""
    identities: dict[Any, Tensor] = {}

    def stand_in(layer: Layer) -> DecomposedLayer:
        return placeholder(layer, forms[layer.name])

    def exact_one(layer: Layer) -> DecomposedLayer:
        return exact(layer, forms[layer.name], identities)

    prove(model, layers, stand_in, examples, "decomposed", exact_one)


def forbid_reading(model: nn.Module, held: Mapping[str, Tensor], examples: Sequence[Workload]) -> None:
    """Refuse a network that reads a dense weight which was exchanged, where somebody still holds one.

    Args:
        model: The network after its layers were exchanged; it is only read.
        held: The weights that are still in memory, by title.
        examples: What the network is fed.

    Raises:
        LayerError: The message names the layer.
    """
    if not held:
        return
    for workload in examples:
        forbid_use(tried(unwrapped(model), workload, gone=held))
    if not examples:
        warn_untried(f"the dense weight of {next(iter(held))} is still held by somebody")


def attach_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Let a decomposed network carry its plan, which `lamina.save` writes beside the weights."""
    inner = unwrapped(model)
    vars(inner)[_PLAN] = plan
    refuse_saving(inner)
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a network was decomposed.

    Raises:
        PlanError: It was not, or only a part of it.
    """
    plan = vars(unwrapped(model)).get(_PLAN)
    if isinstance(plan, Plan):
        return plan
    inside = next((name for name, module in model.named_modules() if _PLAN in vars(module)), None)
    if inside is not None:
        raise PlanError(f"what lamina decomposed is not this network but {inside}, which is a part of it: give that one")
    raise PlanError("this network was not decomposed by lamina: it carries no plan")


@outside_inference_mode
def merge(model: nn.Module) -> nn.Module:
    """A copy of a decomposed network with every decomposed layer dense again: the same function, up to rounding.

    The dense weight is the product of the factors, so what the decomposition lost stays lost.

    Raises:
        PlanError: Nothing in the network is decomposed.
        LaminaError: The network cannot be copied.
    """
    result = cloned(model, merged_layers(model))
    vars(unwrapped(result)).pop(_PLAN, None)
    allow_saving(unwrapped(result))
    return result


def merged_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What takes the place of which module, so that a decomposed network is dense and computes the same.

    Raises:
        PlanError: Nothing in the network is decomposed.
    """
    if not _stacks(model):
        raise PlanError("nothing in this network is decomposed, so there is nothing to merge")
    return _dense_again(model, lambda stack: adopt(stack.merged(), stack, skeleton(stack.geometry, stack.form)))


def _dense_again(model: nn.Module, make: Callable[[DecomposedLayer], nn.Module]) -> dict[nn.Module, nn.Module]:
    """For each decomposed layer of a network a dense one; for an attention that calls its projections one that holds them."""
    found: dict[nn.Module, nn.Module] = {stack: make(stack) for stack in _stacks(model).values()}
    for attention in unwrapped(model).modules():
        if isinstance(attention, Attention):
            parts = dict(attention.named_children())
            found[attention] = adopt(attention.closed({n: found.pop(part, part) for n, part in parts.items()}), attention)
    return found


@outside_inference_mode
def plain(model: nn.Module) -> nn.Module:
    """A copy of a decomposed network of PyTorch's own modules alone: each decomposed layer is a `nn.Sequential` of its factors.

    It is scripted, pickled, quantised and fused by whatever knows PyTorch, and runs where lamina is not installed. With lamina
    it is saved and frozen no more: it carries no plan.

    Args:
        model: What `decompose` or `load` returned; it is only read.

    Raises:
        PlanError: Nothing in the network is decomposed.
        LayerError: The network's own code reads something of a layer that a `nn.Sequential` does not have, such as its weight.
        LaminaError: The network cannot be copied.
    """
    model = unwrapped(model)
    stacks = _stacks(model)
    if not stacks:
        raise PlanError("nothing in this network is decomposed, so it is plain already")
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            raise LayerError(f"{name or 'the network'}: PyTorch's own attention takes no factors: skip its layers")
    stages: dict[nn.Module, nn.Module] = {stack: adopt(_sequential(stack), stack) for stack in stacks.values()}
    result = cloned(model, stages)
    plan: Plan | None = vars(result).pop(_PLAN, None)
    allow_saving(result)
    for shape in (plan.examples or ()) if plan else ():
        workload = example_from(shape, model)
        before, after = (tried(each, workload, modes=(), answering=True) for each in (model, result))
        complaint = after.complaints[ANSWERING]
        if complaint and not before.complaints[ANSWERING]:
            raise LayerError(f"the network does not run with plain layers: {complaint}; it reads one of {listed(list(stacks))}")
        if any(not torch.equal(a, b) and not bool(a.isnan().any()) for a, b in zip(before.answer, after.answer, strict=False)):
            raise LayerError("with plain layers the network answers otherwise: its code looks at the type of a layer")
    return result


def _sequential(stack: DecomposedLayer) -> nn.Sequential:
    """The factors in their order, copied, under their names."""
    names = {id(module): name for name, module in stack.named_children()}
    return nn.Sequential(OrderedDict((names[id(factor)], copy.deepcopy(factor)) for factor in stack.factors()))


def planned_layers(model: nn.Module, plan: Plan) -> list[tuple[Layer, Form]]:
    """The network's layers that a plan decomposes, each with its form.

    Raises:
        PlanError: The plan is for another network; the message names the first layer that differs. Or it is none.
        LayerError: A layer became one that cannot be decomposed.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"a {type(plan).__name__} is no plan: give what lamina.make_plan or lamina.Plan.load returns")
    model = unwrapped(model)
    forbid_decomposed(model)
    census = walk(model)
    chosen: list[tuple[Layer, Form]] = []
    for name, planned in plan.layers.items():
        if name not in census.layers:
            if name in census.refused:
                if planned.decomposed:
                    raise LayerError(f"{name or 'the network'}: cannot be decomposed here: {census.refused[name]}; skip it")
                continue
            near = closest(name, list(census.layers))
            raise PlanError(f"{name or 'the network'}: not in this network{near}; the plan was made for another network")
        layer = census.layers[name]
        if layer.geometry != planned.geometry:
            apart = _mismatch(layer.geometry, planned.geometry)
            raise PlanError(f"{layer.title}: {apart} in the plan, which was made for another network")
        if planned.decomposed:
            try:
                planned.form.check(layer.geometry)
            except RankError as error:
                raise PlanError(f"{layer.title}: {error}") from error
            chosen.append((layer, planned.form))
    if fingerprint(model) != plan.fingerprint:
        raise PlanError(
            "the plan was made for another network: the planned layers are alike, modules, shapes or ties beside them differ"
        )
    return chosen


def forbid_decomposed(model: nn.Module) -> None:
    """Refuse a network that has decomposed layers.

    Raises:
        PlanError: The message names the first.
    """
    for name in _stacks(model):
        raise PlanError(f"{name or 'the network'} is decomposed already; lamina.merge brings the dense layers back")


def forbid_changed(model: nn.Module, plan: Plan) -> None:
    """Refuse a network that is no longer what its plan says: it could be saved, but not loaded.

    Raises:
        PlanError: The message names the first layer that differs.
    """
    stacks = _stacks(model)
    for name in dict.fromkeys([*plan.decomposed, *stacks]):
        planned, stack = plan.layers.get(name), stacks.get(name)
        there = planned.form if planned and planned.decomposed else "dense"
        here = stack.form if stack else "dense"
        if here != there or (stack and planned and stack.geometry != planned.geometry):
            raise PlanError(f"{name or 'the network'} is {here}, its plan says {there}: it was changed after it was decomposed")
        if stack and (other := _changed(stack)):
            raise PlanError(
                f"{name or 'the network'}: its factors were changed after it was decomposed, they have {other}: "
                "merge adapters first, with merge_and_unload of PEFT, and save before batch norms are fused"
            )
    if fingerprint(unwrapped(model), _dense_again(model, lambda stack: on_meta(stack.geometry))) != plan.fingerprint:
        raise PlanError("modules or shapes of this network were changed after it was decomposed: its plan describes it no more")


def _changed(stack: DecomposedLayer) -> str:
    """The first tensor that a layer's factors have and should not, or should and have not; empty where there is none."""
    parts = dict(skeleton(stack.geometry, stack.form).named_children())

    def held(factors: Mapping[str, nn.Module]) -> set[tuple[str, tuple[int, ...]]]:
        return {
            (f"{part}.{name}", tuple(tensor.shape))
            for part, factor in factors.items()
            for name, tensor in [*factor.named_parameters(), *factor.named_buffers()]
        }

    here, there = held({part: getattr(stack, part) for part in parts}), held(parts)
    more, less = sorted(here - there), sorted(there - here)
    return more[0][0] if more else f"no {less[0][0]}" if less else ""


def adapter_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Layers by name, as PEFT's ``target_modules`` takes them: of a decomposed one its factors, which are plain layers.

        >>> LoraConfig(target_modules=lamina.adapter_targets(small, ["q_proj", "v_proj"]))

    Args:
        model: What `decompose` or `load` returned.
        names: Patterns as in the shell, of whole names or of their last parts: ``q_proj`` is every layer of that name.

    Raises:
        PlanError: A pattern matches nothing.
    """
    if isinstance(names, str):
        raise PlanError(f"names is {names!r}; give a list of patterns: [{names!r}]")
    modules = dict(unwrapped(model).named_modules())
    found: dict[str, None] = {}
    for pattern in names:
        wanted = [name for name in modules if matches(name, [pattern, f"*.{pattern}"])]
        if not wanted:
            near = closest(pattern, list(dict.fromkeys(name.rpartition(".")[2] for name in modules)))
            raise PlanError(f"pattern {pattern!r} matches no layer{near}")
        for name in wanted:
            module, prefix = modules[name], f"{name}." if name else ""
            parts = module.named_children() if isinstance(module, DecomposedLayer) else [("", module)]
            found |= dict.fromkeys(f"{prefix}{part}" if part else name for part, _ in parts)
    return list(found)


def _stacks(model: nn.Module) -> dict[str, DecomposedLayer]:
    """The decomposed layers of a network, by the names that plans use."""
    return {name: m for name, m in unwrapped(model).named_modules() if isinstance(m, DecomposedLayer)}


def _mismatch(here: Geometry, there: Geometry) -> str:
    pairs = {f.name: (getattr(here, f.name), getattr(there, f.name)) for f in dataclasses.fields(Geometry)}
    apart = [f"{name} {a!r} and not {b!r}" for name, (a, b) in pairs.items() if a != b]
    return f"a {here} ({', '.join(apart)}) here, a {there}"


def factored_layer(layer: Layer, form: Form, metric: Metric | None = None, own_bias: bool = False) -> DecomposedLayer:
    """What a layer of a network becomes, wherever networks are decomposed: see `layers.build.factored`.

    Raises:
        LayerError: It cannot be factorised; the message names it.
    """
    try:
        return factored(layer, form, metric, own_bias)
    except (LaminaError, RuntimeError) as error:
        raise LayerError(f"{layer.title}: cannot be factorised: {first_line(error)}") from error
