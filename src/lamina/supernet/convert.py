"""From a network to a supernet: which layers become series, of which forms; and the supernet itself.

g   group size, the channels of a core that one group reads      w   width, the channels that the core reads and writes
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from ..artifact import digest, laid_out
from ..choose.scope import selected, uses_of
from ..comparison import time_whole, whole_setting
from ..decomposition import attach_plan, example_from, example_shape
from ..errors import LaminaError, LayerError, PlanError, RankError, SearchError
from ..files import write_whole
from ..forms import AnyForm, BlockTerm, Dense, Form
from ..goals import Goal, Limit, Within
from ..layers.build import random_weight
from ..layers.decomposed import DecomposedLayer, memory_format
from ..layers.series import Method, SeriesLayer, series
from ..measure.clock import Effort, timing
from ..measure.count import count
from ..measure.layer_times import LayerTimes
from ..measure.table import TimingTable, opened
from ..network.fingerprint import fingerprint
from ..network.observe import modes_that_run, preserved
from ..network.readers import reader_of
from ..network.surgery import adopt, cloned, forbid_nonfinite, put
from ..network.walk import Layer, walk
from ..plan import ExampleShape, FactorMethod, Plan, PlannedLayer, WholeModel, cost
from ..schedules import AnySchedule
from ..values import Cost, Geometry, Inference, Mode, Timing, Training, Use, Workload, closest, workloads
from .space import Choice, Configuration, Space


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@final
class SeriesPlan(_Value):
    """A layer of a supernet: what it was, how the example uses it, its forms as offered, and how well each fits its weight.

    ``errors`` are the squared distances ``‖W − Ŵ‖²`` of the forms' fits before any training, in the order of the forms.
    """

    names: tuple[str, ...]
    geometry: Geometry
    uses: tuple[Use, ...]
    channels_last: bool
    forms: tuple[Annotated[AnyForm, Field(discriminator="form")], ...]
    errors: tuple[float, ...] = ()


@final
class DensePlan(_Value):
    """A layer that stays dense in every configuration, and why."""

    geometry: Geometry
    uses: tuple[Use, ...]
    reason: str


@final
class Blueprint(_Value):
    """Everything about a supernet but its weights: what is written beside them.

    Attributes:
        base: The name of the network it was made from, as the command line takes it; None where it was made in Python.
        method: How group counts follow one another in a series.
        normalise: Whether gradients of shared entries are divided by the number of terms that share them.
        mode: Whether times are those of inference or of a training step.
        freezing: The schedule over whose phases a training step is timed.
        fingerprint: Structure of the network it was made from.
        layers: The layers that became series.
        dense: The layers that stay dense.
        refused: Every weighted module that cannot be decomposed, and why.
        whole: Cost of the network it was made from.
        examples: Shapes of the example or workloads.
    """

    format: Literal[1] = 1
    base: str | None = None
    method: Method = "nested"
    normalise: bool = True
    mode: Literal["inference", "training"] = "inference"
    freezing: Annotated[AnySchedule, Field(discriminator="freezing")] | None = None
    fingerprint: str
    layers: dict[str, SeriesPlan]
    dense: dict[str, DensePlan] = {}
    refused: dict[str, str] = {}
    whole: Cost
    examples: tuple[ExampleShape, ...] = ()

    @property
    def timing_mode(self) -> Mode:
        """The mode as a value."""
        return Training(freezing=self.freezing) if self.mode == "training" else Inference()


@final
class Supernet(nn.Module):
    """A network whose layers are series: every form of each is there, and one of them is active. Made by `make_supernet`.

    It is called as the network was. In eval mode its outputs are, to the bit, those of the network that `extract` takes out.

    Attributes:
        network: The network itself, an instance of its own class; names in it are the original's.
        blueprint: What the supernet is, without its weights.
    """

    def __init__(self, network: nn.Module, blueprint: Blueprint, example: Any = None) -> None:
        super().__init__()
        self.network = network
        self.blueprint = blueprint
        self._example = example
        self._space = _space(blueprint, None, blueprint.whole)
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the active configuration."""
        return self.network(*args, **kwargs)

    @property
    def space(self) -> Space:
        """The configurations and what they cost; with times once `time` has been called."""
        return self._space

    @property
    def series(self) -> dict[str, SeriesLayer]:
        """Layer name → its series."""
        found = {name: self.network.get_submodule(name) if name else self.network for name in self.blueprint.layers}
        return found  # type: ignore[return-value]

    @property
    def refused(self) -> dict[str, str]:
        """Modules that cannot be decomposed, and why."""
        return dict(self.blueprint.refused)

    @property
    def left_dense(self) -> dict[str, str]:
        """Layers that stay dense in every configuration, and why."""
        return {name: layer.reason for name, layer in self.blueprint.dense.items()}

    @property
    def example(self) -> list[Workload]:
        """What the network is fed: as it was given, or random values of the recorded shapes."""
        if self._example is not None:
            return workloads(self._example)
        if not self.blueprint.examples:
            raise SearchError("this supernet knows no example: make it anew with an example of tensors and plain constants")
        return [example_from(shape, self.network) for shape in self.blueprint.examples]

    def sample(self, rng: random.Random) -> Configuration:
        """A configuration, each layer's form drawn uniformly and independently."""
        return self.space.sample(rng)

    def set_active(self, config: Mapping[str, Form]) -> None:
        """Let a configuration run.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form; nothing has changed.
        """
        self.space.row(config)
        for name, layer in self.series.items():
            layer.set_active(config[name])

    def get_active(self) -> Configuration:
        """The configuration that runs."""
        return {name: layer.active for name, layer in self.series.items()}

    def extract(
        self, config: Mapping[str, Form], *, goal: Goal | None = None, rule: str = "a configuration of a supernet"
    ) -> nn.Module:
        """The plain network of a configuration, on its own storage: outputs equal to the bit. `lamina.save` saves it.

        Args:
            config: The configuration.
            goal: What it was chosen for, for its plan.
            rule: How it was chosen, for its plan.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form.
        """
        plan = self.plan(config, goal=goal, rule=rule)
        plain = cloned(self.network, {layer: layer.extract(config[name]) for name, layer in self.series.items()})
        return attach_plan(plain, plan)

    def plan(
        self, config: Mapping[str, Form], *, goal: Goal | None = None, rule: str = "a configuration of a supernet"
    ) -> Plan:
        """The plan of a configuration: a plan like any other, for the network that the supernet was made from.

        Args:
            config: The configuration.
            goal: What it was chosen for.
            rule: How it was chosen.

        Raises:
            SearchError: A layer is missing or unknown, or has no such form.
        """
        after = self.space.cost(config)
        layers: dict[str, PlannedLayer] = {}
        for name, layer in self.blueprint.layers.items():
            choice, form = self.space.choices[name], config[name]
            layers[name] = PlannedLayer(
                geometry=layer.geometry,
                uses=layer.uses,
                form=form,  # type: ignore[arg-type]
                reason=f"one of {len(choice.forms)} forms in the supernet",
                before=choice.dense,
                after=choice.costs[choice.forms.index(form)],
            )
        for name, left in self.blueprint.dense.items():
            same = cost(left.geometry, Dense(), left.uses)
            layers[name] = PlannedLayer(
                geometry=left.geometry, uses=left.uses, form=Dense(), reason=left.reason, before=same, after=same
            )
        return Plan(
            goal=Within() if goal is None else goal,
            rule=rule,
            mode=self.blueprint.mode,
            freezing=self.blueprint.freezing,
            layers=layers,
            refused=self.blueprint.refused,
            fingerprint=self.blueprint.fingerprint,
            setting=self.space.setting,
            whole=WholeModel(
                before=self.space.whole,
                after=dataclasses.replace(after, timing=None),
                predicted_s=after.timing.median_s if after.timing and self.space.whole.timing else None,
            ),
            examples=self.blueprint.examples or None,
            factors=FactorMethod(series=self.blueprint.method),
        )

    def time(
        self,
        timings: TimingTable | str | os.PathLike[str] | None = None,
        *,
        advance: Callable[[Mapping[str, Any], int], Any] | None = None,
    ) -> Space:
        """Measure what every form of every layer takes, and the rest of the network: `space` then knows milliseconds.

        Weights are random, so the supernet is not touched; equal layers are measured once, and the table remembers.

        Args:
            timings: The table of layer times, or its file; by default one in the user's cache folder. A ``.json`` file is one
                that ``lamina measure`` wrote elsewhere: costs then hold the layers' times alone, in that machine's name.
            advance: Wraps the layers while they are measured, for a progress bar.

        Raises:
            ExampleError: The network does not run on the example.
            LaminaError: Times were taken on another machine and do not suffice.
        """
        examples, mode = self.example, self.blueprint.timing_mode
        dense = self.dense_like()
        setting = whole_setting(dense, examples[0], mode)
        times: dict[str, dict[Form, Timing]] = {}
        with preserved(dense), opened(timings) as table:
            taken = table.conditions(setting)
            layers = self.blueprint.layers
            for name, layer in advance(layers, len(layers)) if advance else layers.items():
                module = dense.get_submodule(name) if name else dense
                own = mode.of_layer(name)
                weight: nn.Parameter = module.weight  # type: ignore[assignment]
                here = dataclasses.replace(
                    setting,
                    dtype=str(weight.dtype).removeprefix("torch."),
                    freezing=str(own.freezing) if own.freezing else "off",
                )
                of = Layer(layer.names, module, layer.geometry, reader_of(layer.geometry))
                measured = LayerTimes(of, layer.uses, layer.channels_last, own, here, table)
                times[name] = measured(list(dict.fromkeys([Dense(), *layer.forms])))
        whole = self.blueprint.whole
        if taken == setting:
            rounds = [time_whole([dense], w, mode, Effort(1.0))[0] for w in examples]
            summed = [
                sum(w.weight * each[r] for w, each in zip(examples, rounds, strict=True)) for r in range(min(map(len, rounds)))
            ]
            whole = dataclasses.replace(whole, timing=timing(summed, setting))
        self._space = _space(self.blueprint, times, whole, taken)
        return self._space

    def adopt(self, space: Space) -> None:
        """Go by the times of another space of the same forms, such as that of a study.

        Raises:
            SearchError: It is of other forms.
        """
        if space.fingerprint() != self._space.fingerprint():
            raise SearchError("these times are of another space: layers or forms differ")
        self._space = space

    def dense_like(self) -> nn.Module:
        """The network that the supernet was made from, as to structure; the layers that became series have random weights."""
        replacements: dict[nn.Module, nn.Module] = {}
        generator_state = torch.random.get_rng_state()
        try:
            for layer in self.series.values():
                replacements[layer] = adopt(_random_dense(layer), layer)
        finally:
            torch.random.set_rng_state(generator_state)
        return cloned(self.network, replacements)

    def __deepcopy__(self, memo: dict[int, Any]) -> Supernet:
        twin = Supernet(copy.deepcopy(self.network, memo), self.blueprint, self._example)
        twin._space, twin.training = self._space, self.training
        return twin

    def extra_repr(self) -> str:
        """How many series, how many configurations."""
        return f"{len(self.blueprint.layers)} series, {self.space.size:,} configurations"


def make_supernet(
    model: nn.Module,
    example: Any,
    *,
    group_sizes: Sequence[int] | None = None,
    forms: Mapping[str, Sequence[Form]] | None = None,
    widths: float = 1.0,
    dense: bool = False,
    method: Method = "nested",
    normalise: bool = True,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    mode: Mode | None = None,
    timings: TimingTable | str | os.PathLike[str] | None = None,
    base: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Supernet:
    """Turn a trained network into a supernet: each of its layers in every one of several forms, sharing weights.

    GroSS, arXiv 1912.00673. With ``group_sizes`` every convolution with a spatial kernel becomes a 1×1, a grouped core and a
    1×1, whose group size is searched; a layer takes the sizes that divide its width. One that fewer than two of them divide
    stays dense, as a stem does, and so do linear layers and 1×1 convolutions; `Supernet.left_dense` says why.

        >>> net = lamina.make_supernet(model, example, group_sizes=(1, 4, 16, 32))

    Args:
        model: A trained network, on the device, in the dtype and in the memory format in which it will be used. It is left as
            it is; the supernet shares nothing with it.
        example: What it will be fed, batch included: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list
            of `Workload`.
        group_sizes: Channels a group, each dividing the next.
        forms: Forms by pattern as in the shell: the first pattern that a layer's name matches says what it may be, `Dense()`
            among it where wanted. It goes before ``group_sizes``.
        widths: The core's channels as a share of the narrower side of its layer, rounded down to a multiple of the largest
            group size that fits. 1 is the paper's.
        dense: With ``group_sizes``: whether layers may also stay dense.
        method: How the sizes of a layer follow one another: ``"nested"``, each fitted from the one before, or ``"faithful"``,
            independently, as in the paper.
        normalise: Divide the gradient of an entry that several terms share by their number, so that one step moves the weight
            as far as it would move a plain one; ``train_supernet`` decides for itself.
        include: Patterns; only layers matching one of them become series. Empty: all.
        skip: Patterns; layers matching one stay dense.
        mode: What times are of: `Inference()` by default, or `Training()`.
        timings: Measure every form at once, with this table of layer times or file. None leaves it until time is asked for.
        base: The name of the network, as the command line takes it, to be kept with the supernet.
        resume: A folder in which fitted layers are kept; a conversion that was stopped then goes on with the next layer.
        progress: Show a progress bar.

    Returns:
        The supernet, with the modes of ``model``; active is each layer's last form.

    Raises:
        ExampleError: The network does not run on the example.
        PlanError: A pattern matches no layer, or the network is decomposed already.
        RankError: A form does not fit its layer, or group sizes do not nest; the message names the layer.
        LayerError: A weight is not finite, or the network does not run with a layer as a series. The network is as it was.
        SearchError: No layer has forms to choose among.
    """
    sizes = _checked_sizes(group_sizes)
    if sizes is None and not forms:
        raise SearchError("the space is empty: pass group_sizes=(1, 4, 16, 32), or forms={pattern: [form, …]}")
    if not 0 < widths <= 1:
        raise SearchError(f"widths is {widths!r}; it is a share of a layer's channels, above 0 and at most 1")
    _forbid_decomposed(model)
    mode, examples = mode or Inference(), workloads(example)
    census = walk(model)
    wanted = selected(list(census.layers), include, skip)
    patterns = dict(forms or {})
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in census.layers):
            raise PlanError(f"pattern {pattern!r} matches no layer{closest(pattern, list(census.layers))}")
    uses, last = uses_of(model, census.layers, examples)
    refused = census.refused | {name: "it is never called on this example" for name in census.layers if not uses[name]}

    chosen: dict[str, tuple[Form, ...]] = {}
    left: dict[str, DensePlan] = {}
    for name, layer in census.layers.items():
        if name in refused:
            continue
        offered = _offered(layer, patterns, sizes, widths, dense) if name in wanted else "it was not wanted: include, skip"
        if isinstance(offered, str):
            left[name] = DensePlan(geometry=layer.geometry, uses=uses[name], reason=offered)
        else:
            chosen[name] = offered
    if not chosen:
        why = "; ".join(f"{name or 'the network'}: {layer.reason}" for name, layer in list(left.items())[:3])
        raise SearchError(f"the space is empty: no layer has forms to choose among ({why or 'the network has no layer'})")

    made: dict[str, SeriesLayer] = {}
    plans: dict[str, SeriesPlan] = {}
    with _bar(progress, "fitting layers") as advance:
        for name, offered in advance(chosen, len(chosen)):
            layer = census.layers[name]
            forbid_nonfinite(layer)
            try:
                made[name] = _fitted(layer, offered, method, normalise, None if resume is None else Path(resume))
            except (RankError, RuntimeError) as error:
                kind = RankError if isinstance(error, RankError) else LayerError
                raise kind(f"{layer.title}: {error}") from error
            plans[name] = SeriesPlan(
                names=layer.names,
                geometry=layer.geometry,
                uses=uses[name],
                channels_last=last[name],
                forms=offered,
                errors=_errors(made[name], layer),
            )
    _try_series(model, census.layers, made, examples)
    shapes = [example_shape(workload) for workload in examples]
    blueprint = Blueprint(
        base=base,
        method=method,
        normalise=normalise,
        mode=mode.name,
        freezing=mode.freezing,  # type: ignore[arg-type]
        fingerprint=fingerprint(model),
        layers=plans,
        dense=left,
        refused=refused,
        whole=count(model, example),
        examples=tuple(shape for shape in shapes if shape) if all(shapes) else (),
    )
    network = cloned(model, {census.layers[name].module: layer for name, layer in made.items()})
    net = Supernet(network, blueprint, example)
    if timings is not None:
        with _bar(progress, "timing layers") as advance:
            net.time(timings, advance=advance)
    return net


def within(limits: Sequence[Limit]) -> Goal:
    """Some limits as the goal of a plan: a single one as itself."""
    return limits[0] if len(limits) == 1 else Within(tuple(limits))  # type: ignore[return-value, arg-type]


def grouped(layer: Geometry, size: int, width: int | None = None) -> BlockTerm:
    """The form of a layer at a group size, the core reading and writing ``width`` channels; by default the layer's inputs."""
    width = layer.in_channels if width is None else width
    return BlockTerm(width, width, width // size)


def _checked_sizes(group_sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    if group_sizes is None:
        return None
    if isinstance(group_sizes, int) or not group_sizes:
        raise SearchError(f"group_sizes is {group_sizes!r}; give several whole numbers, such as (1, 4, 16, 32)")
    for size in group_sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise SearchError(f"group size {size!r} is not a positive whole number")
    sizes = tuple(sorted(set(group_sizes)))
    for small, large in pairwise(sizes):
        if large % small:
            raise RankError(f"group sizes {small} and {large} do not nest: each must divide the next, as 1, 4, 16, 32 do")
    return sizes


def _offered(
    layer: Layer, patterns: Mapping[str, Sequence[Form]], sizes: tuple[int, ...] | None, widths: float, dense: bool
) -> tuple[Form, ...] | str:
    """What a layer may be, or why it stays dense."""
    for pattern, forms in patterns.items():
        if fnmatch.fnmatchcase(layer.name, pattern):
            return _checked_forms(layer, forms)
    if sizes is None:
        return "it matches no pattern of forms="
    geometry = layer.geometry
    if geometry.pointwise:
        return "group sizes are for convolutions with a spatial kernel"
    narrow = min(geometry.in_channels, geometry.out_channels)
    # At full width a size must divide it; a narrower width is rounded to what divides.
    fitting = [size for size in sizes if (narrow % size == 0 if widths == 1 else size <= narrow * widths)]
    if len(fitting) < min(2, len(sizes)):
        return f"of the group sizes {', '.join(map(str, sizes))} too few divide its {narrow} channels"
    width = int(narrow * widths) // fitting[-1] * fitting[-1]
    grouped_forms = tuple(grouped(geometry, size, width) for size in fitting)
    return (*grouped_forms, Dense()) if dense else grouped_forms


def _checked_forms(layer: Layer, forms: Sequence[Form]) -> tuple[Form, ...]:
    if isinstance(forms, Form) or not all(isinstance(form, Form) for form in forms):
        raise SearchError(f"{layer.title}: its forms are {forms!r}; give a list of forms")
    if not forms:
        raise SearchError(f"{layer.title}: the space is empty: its list of forms is")
    for form in forms:
        try:
            form.check(layer.geometry)
        except RankError as error:
            raise RankError(f"{layer.title}: {error}") from error
    return tuple(dict.fromkeys(forms))


def _forbid_decomposed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, DecomposedLayer):
            raise PlanError(f"{name or 'the network'} is decomposed already; lamina.merge brings the dense layers back")
        if isinstance(module, SeriesLayer):
            raise PlanError(f"{name or 'the network'} is a series already: this is a supernet")


def restored(layer: Layer, made: SeriesLayer, values: Mapping[str, Tensor]) -> SeriesLayer:
    """Give a series its parameters by name, laid out as its layer's weight is; hooks and modes are the layer's."""
    like: nn.Parameter = layer.module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = layer.module.bias  # type: ignore[assignment]
    for key in dict(made.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        trains = bias.requires_grad if key == "bias" and bias is not None else like.requires_grad
        # A copy: safetensors hands out pieces of the file, at odd addresses, where matrix products round otherwise.
        value = laid_out(values[key].to(like.device, copy=True), like)
        setattr(made.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trains))
    adopt(made, layer.module)
    return made


def _fitted(layer: Layer, forms: tuple[Form, ...], method: Method, normalise: bool, kept: Path | None) -> SeriesLayer:
    """The series of a layer: from a folder where it was kept, or fitted and kept there."""
    if kept is None:
        return series(layer, forms, method=method, normalise=normalise)
    own = digest({name: value.detach() for name, value in layer.module.named_parameters()})
    about = repr((layer.geometry, forms, method, own))
    path = kept / f"{hashlib.sha256(about.encode()).hexdigest()[:40]}.safetensors"
    made = SeriesLayer(layer.geometry, forms, normalise=normalise, device="meta")
    try:
        values = load_file(path)
        if values.pop("digest").tolist() == _digest(values):
            return restored(layer, made, values)
    except (OSError, SafetensorError, KeyError, RuntimeError):
        pass  # not kept, or not whole
    made = series(layer, forms, method=method, normalise=normalise)
    values = {name: value.detach().contiguous() for name, value in made.named_parameters()}
    try:
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(path, save_bytes(values | {"digest": torch.tensor(_digest(values), dtype=torch.uint8)}))
    except OSError as error:
        raise LaminaError(f"{kept} cannot be written: {error}") from error
    return made


def _digest(values: dict[str, Tensor]) -> list[int]:
    return list(bytes.fromhex(digest(values)))


def _errors(made: SeriesLayer, layer: Layer) -> tuple[float, ...]:
    """The squared distance of each form from the weight."""
    weight = layer.module.weight.detach().double()  # type: ignore[operator]
    active, found = made.active, []
    with torch.no_grad():
        for form in made.forms:
            made.set_active(form)
            found.append(float((weight - made.weight.double()).square().sum()))
    made.set_active(active)
    return tuple(found)


def _try_series(model: nn.Module, layers: dict[str, Layer], made: dict[str, SeriesLayer], examples: list[Workload]) -> None:
    """Refuse where the network runs in a mode now but not with its layers as series; the first culprit is named."""

    def broken(names: Sequence[str], workload: Workload, ran: dict[str, str | None]) -> tuple[str, str] | None:
        trial = model
        try:
            for name in names:
                trial = put(trial, layers[name], made[name])
            outcome = modes_that_run(trial, workload)
        finally:
            for name in names:
                put(trial, layers[name], layers[name].module)
        return next(((mode, why) for mode, why in outcome.items() if why and ran[mode] is None), None)

    for workload in examples:
        ran = modes_that_run(model, workload)
        together = broken(list(made), workload, ran)
        if together is None:
            continue
        for name in made:
            if alone := broken([name], workload, ran):
                raise LayerError(
                    f"{layers[name].title}: with this layer as a series the network does not run in {alone[0]}: {alone[1]}; "
                    "skip it"
                )
        mode, why = together
        raise LayerError(f"with these layers as series the network does not run in {mode}: {why}; the network is as it was")


def _space(blueprint: Blueprint, times: Mapping[str, Mapping[Form, Timing]] | None, whole: Cost, setting: Any = None) -> Space:
    choices = {
        name: Choice.of(layer.geometry, layer.uses, layer.forms, Dense(), None if times is None else times[name])
        for name, layer in blueprint.layers.items()
    }
    return Space(choices, whole, setting)


def _random_dense(layer: SeriesLayer) -> nn.Module:
    """A dense layer of a series' geometry, dtype, device and layout, with random weights."""
    geometry, like = layer.geometry, layer.terms()[0]
    weight = random_weight((geometry.out_channels, geometry.in_channels, *geometry.kernel), like.device).to(like.dtype)
    layouts = {memory_format(term) for term in layer.terms() if term.ndim == weight.ndim > 3}
    layout = next(iter(layouts - {torch.contiguous_format}), torch.contiguous_format)
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    dense = reader_of(geometry).dense(geometry, weight.contiguous(memory_format=layout), bias)
    return dense.requires_grad_(True)


@contextmanager
def _bar(shown: bool, what: str) -> Iterator[Any]:
    """A function that goes through the items of a mapping, and shows how far it is."""
    if not shown:
        yield lambda items, total: items.items()
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        yield lambda items, total: bar.track(items.items(), total=total, description=what)
