"""From a network to a supernet: which layers become series, of which forms."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.calibrate import calibration_on
from ..choose.prices import Prices, of_weights
from ..choose.survey import Survey
from ..errors import LayerError, PlanError, RankError, SearchError
from ..examples import example_shape
from ..forms import Dense, Form
from ..layers.series import Method, SeriesLayer
from ..measure.table import TimingTable, opened
from ..network.copying import cloned, shadow
from ..network.fingerprint import fingerprint
from ..network.placing import placed
from ..network.preserve import repeatable
from ..network.running import outside_inference_mode
from ..network.surgery import forbid_nonfinite
from ..network.trial import prove
from ..network.walk import Layer
from ..progress import display
from ..values import Inference, Mode, closest
from .blueprint import Blueprint, DensePlan, SeriesPlan
from .fitted import fitted, left_out
from .offer import checked_sizes, in_no_series, offered_forms, worth_offering
from .supernet import Supernet


@outside_inference_mode
def make_supernet(
    model: nn.Module,
    example: Any,
    *,
    group_sizes: Sequence[int] | None = None,
    forms: Mapping[str, Sequence[Form]] | None = None,
    data: Any = None,
    most_forms: int = 8,
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

    By default every layer is offered what `make_plan` chooses among: staying dense, ranks, whole sides and groups, those that
    no other form beats in measured time and in loss.

        >>> net = lamina.make_supernet(model, example, data=calibration)

    GroSS, arXiv 1912.00673: with ``group_sizes`` every convolution with a spatial kernel becomes a 1×1, a grouped core and a
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
        data: What `calibrate` returned for this network, or unlabelled data, calibrated on with `Gaussian`. Series are then
            fitted to what the network cares about, and losses are nats of divergence; without, both are of the weights alone.
        most_forms: How many forms a layer has at most where neither ``group_sizes`` nor ``forms`` says which.
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
        timings: Measure every form at once, with this table of layer times or file. None leaves it until time is asked for;
            without ``group_sizes`` and ``forms`` times say what is offered, and are taken by the table in the user's cache
            folder.
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
    sizes = checked_sizes(group_sizes)
    by_time = sizes is None and forms is None
    if forms is not None and not forms and sizes is None:
        raise SearchError("the space is empty: forms names no pattern")
    if isinstance(most_forms, bool) or not isinstance(most_forms, int) or most_forms < 2:
        raise SearchError(f"most_forms is {most_forms!r}; a layer has a choice among 2 or more")
    if not 0 < widths <= 1:
        raise SearchError(f"widths is {widths!r}; it is a share of a layer's channels, above 0 and at most 1")
    for name, module in model.named_modules():
        if isinstance(module, SeriesLayer):
            raise PlanError(f"{name or 'the network'} is a series already: this is a supernet")
    mode = mode or Inference()
    survey = Survey.of(model, example, mode, include, skip)
    model, layers, uses = survey.model, survey.layers, survey.seen.uses
    patterns = dict(forms or {})
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            raise PlanError(f"pattern {pattern!r} matches no layer{closest(pattern, list(layers))}")

    calibration = calibration_on(model, data, progress)
    # Without times and losses nothing is remembered.
    where = timings if by_time or data is not None or timings is not None else TimingTable(None)
    with repeatable(model), opened(where) as table, display(progress) as shown:
        prices = Prices(survey, table, calibration)
        chosen: dict[str, tuple[Form, ...]] = {}
        left: dict[str, DensePlan] = {}
        by_name: dict[str, tuple[Form, ...]] = {}
        if by_time:
            known = [name for name in survey.considered if _why_not(layers[name], prices) is None]
            by_name = worth_offering(survey, prices, known, most_forms, shown)
        for name, layer in layers.items():
            if name in survey.refused:
                continue
            offered: tuple[Form, ...] | str
            if name not in survey.wanted:
                offered = "it was not wanted: include, skip"
            elif by_time:
                offered = _why_not(layer, prices) or by_name[name]
                if offered == (Dense(),):
                    offered = "no form of it is faster"
            else:
                offered = offered_forms(layer, patterns, sizes, widths, dense)
            if isinstance(offered, str):
                left[name] = DensePlan(geometry=layer.geometry, uses=uses[name], reason=offered)
            else:
                chosen[name] = offered
        if not chosen:
            why = "; ".join(f"{name or 'the network'}: {layer.reason}" for name, layer in list(left.items())[:3])
            raise SearchError(f"the space is empty: no layer has forms to choose among ({why or 'the network has no layer'})")

        made: dict[str, SeriesLayer] = {}
        plans: dict[str, SeriesPlan] = {}
        nats = calibration is not None and all(map(prices.in_nats, chosen))
        for name, forms_of in shown.through(list(chosen.items()), "fitting layers"):
            layer = layers[name]
            forbid_nonfinite(layer)
            metric = prices.metric(name)
            try:
                made[name] = fitted(layer, forms_of, method, normalise, metric, None if resume is None else Path(resume))
            except (RankError, RuntimeError) as error:
                kind = RankError if isinstance(error, RankError) else LayerError
                raise kind(f"{layer.title}: {error}") from error
            squares, shares = left_out(made[name], layer, metric if nats else None)
            plans[name] = SeriesPlan(
                names=layer.names,
                geometry=layer.geometry,
                uses=uses[name],
                forms=forms_of,  # type: ignore[arg-type]
                errors=squares,
                losses=tuple(prices.price(name, share) if nats else of_weights(share) for share in shares),
            )
    prove(model, [layers[name] for name in made], lambda layer: shadow(made[layer.name]), survey.examples, "as a series")
    shapes = [example_shape(workload) for workload in survey.examples]
    blueprint = Blueprint(
        base=base,
        method=method,
        normalise=normalise,
        mode=mode.name,
        freezing=mode.freezing,  # type: ignore[arg-type]
        fingerprint=fingerprint(model),
        layers=plans,
        dense=left,
        refused=survey.refused,
        whole=survey.before,
        examples=tuple(shape for shape in shapes if shape) if all(shapes) else (),
        lost="calibration" if nats else "weights",
    )
    network = cloned(model, placed(((layers[name], layer) for name, layer in made.items()), apart=True))
    net = Supernet(network, blueprint, example)
    if timings is not None or by_time:
        with display(progress) as shown:
            net.time(timings, shown=shown)
    return net


def _why_not(layer: Layer, prices: Prices) -> str | None:
    """Why a layer stays dense where times say what is offered; None where it need not."""
    if why := in_no_series(layer):
        return why
    return None if prices.knows(layer.name) else "the calibration's data never reached it"
