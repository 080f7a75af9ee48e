"""Survey: what there is before anything is timed: the layers, how they are used, which are wanted and which refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ..comparison import whole_setting
from ..decomposition import forbid_decomposed
from ..errors import PlanError
from ..forms import Dense, Form, candidates
from ..layers.build import placeholder
from ..measure.count import count
from ..measure.layer_times import LayerTimes
from ..measure.table import TimingTable
from ..network.copying import shadow
from ..network.patterns import selected
from ..network.running import observed_in
from ..network.surgery import forbid_nonfinite_values
from ..network.trial import objections
from ..network.walk import Layer, walk
from ..network.wrappers import compiled_in, unwrapped
from ..plan import listed
from ..runtimes.eager import EAGER
from ..runtimes.runtime import Runtime
from ..values import Cost, Mode, Setting, Use, Workload, closest, dtype_name, workloads
from .scope import Seen, seen_of


@final
@dataclass(frozen=True, slots=True)
class Survey:
    """A network, what it is fed, and what is asked of its layers.

    Attributes:
        model: The network itself, out of its wrappers.
        examples: What it is fed.
        mode: What times are of.
        layers: Its layers by name, refused ones too.
        wanted: Names of the layers that may be decomposed.
        refused: Every weighted module that cannot be, and why.
        seen: How the examples use the layers.
        setting: The conditions here.
        before: What the network costs; without a time.
        runtime: What runs it where times are taken.
        notes: What the user should know of what was looked at.
    """

    model: nn.Module
    examples: list[Workload]
    mode: Mode
    layers: dict[str, Layer]
    wanted: set[str]
    refused: dict[str, str]
    seen: Seen
    setting: Setting
    before: Cost
    runtime: Runtime = EAGER
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Any,
        mode: Mode,
        include: Sequence[str],
        skip: Sequence[str],
        runtime: Runtime = EAGER,
    ) -> Survey:
        """Look at a network; a shadow of it is run, the network itself is only read.

        Raises:
            ExampleError: It does not run on the example.
            PlanError: A pattern matches no layer, or the network is decomposed already.
            LayerError: A weight is not finite.
            LaminaError: It cannot be timed in the runtime.
        """
        forbid_decomposed(model)
        examples, wrapper, model = workloads(example), model, unwrapped(model)
        inside = f"planned is the network inside {type(wrapper).__name__}, as it runs without it"
        notes = [] if model is wrapper else [inside]
        if compiled := [name or "the network" for name in compiled_in(model)]:
            notes.append(f"compiled with torch.compile: {listed(compiled)}; planned is how the network runs without that")
        runtime.check([model], mode)
        census = walk(model)
        wanted = selected(list(census.layers), include, skip)
        if mode.freezing and (idle := mode.freezing.idle_pattern(census.layers)):
            raise PlanError(f"the freezing's exclude pattern {idle!r} matches no layer{closest(idle, list(census.layers))}")
        seen = seen_of(model, census.layers, examples, mode)
        refused = census.refused | seen.refused
        # Here, since what is cut to nothing loses a share of NaN, which no budget notices.
        forbid_nonfinite_values(layer for name, layer in census.layers.items() if name in wanted and name not in refused)
        smallest = {n: form for n, layer in census.layers.items() if n in wanted and (form := _smallest(layer))}
        for example in examples:
            exchanged = [layer for name, layer in census.layers.items() if name in smallest and name not in refused]
            refused |= objections(
                model, exchanged, lambda layer: placeholder(layer, smallest[layer.name]), example, observed_in(mode)
            )
        return cls(
            model,
            examples,
            mode,
            census.layers,
            wanted,
            refused,
            seen,
            whole_setting(model, examples[0], mode, runtime),
            count(model, example, mode=mode),
            runtime,
            tuple(notes),
        )

    @property
    def considered(self) -> list[str]:
        """Names of the layers that may be decomposed and can be, in the network's order."""
        return [name for name in self.layers if name in self.wanted and name not in self.refused]

    def twin(self) -> nn.Module:
        """A shadow of the network, to be run in its stead: the network itself may be in use meanwhile."""
        return shadow(self.model, apart=self.seen.apart)

    @property
    def weights(self) -> list[float]:
        """Of the workloads; they sum to 1."""
        return [example.weight for example in self.examples]

    def weighted(self, seconds: Iterable[float]) -> float:
        """One time for those of one run of each workload: their mean by the workloads' weights."""
        return sum(weight * s for weight, s in zip(self.weights, seconds, strict=True))

    def times(self, name: str, uses: tuple[Use, ...], table: TimingTable) -> LayerTimes:
        """What tells the times of one layer's forms over some uses."""
        layer, own = self.layers[name], self.mode.of_layer(name)
        freezing = str(own.freezing) if own.freezing else "off"
        here = dataclasses.replace(self.setting, dtype=dtype_name(layer.parameter.dtype), freezing=freezing)
        return LayerTimes(layer, uses, self.seen.channels_last[name], own, here, table, runtime=self.runtime)

    def kinds(self, names: Iterable[str]) -> dict[tuple[Any, ...], list[str]]:
        """Layers whose times are the same, by what they share."""
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for name in names:
            kinds.setdefault(self.kin(name), []).append(name)
        return kinds

    def kin(self, name: str) -> tuple[Any, ...]:
        """What two layers share whose times are the same."""
        own = self.mode.of_layer(name)
        layer = self.layers[name]
        uses = tuple(each[name] for each in self.seen.by_workload)
        return layer.geometry, uses, self.seen.channels_last[name], str(own.freezing), layer.parameter.dtype


def _smallest(layer: Layer) -> Form | None:
    """A form that a layer may take, to try whether the network gets on with it."""
    forms = [form for form in candidates(layer.geometry) if form != Dense()]
    return min(forms, key=lambda form: form.parameters(layer.geometry), default=None)
