"""The series of a layer: fitted, or restored from values that were kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from ..errors import LaminaError
from ..factorize.metric import Metric
from ..files import write_whole
from ..folder import digest
from ..forms import Form
from ..layers.decomposed import laid_out, memory_format
from ..layers.series import Method, SeriesLayer, series
from ..network.readers import plain
from ..network.surgery import adopt
from ..network.walk import Layer


def restored(layer: Layer, made: SeriesLayer, values: Mapping[str, Tensor], own_bias: bool = False) -> SeriesLayer:
    """Give a series its parameters by name, laid out as its layer's weight is; hooks and modes are the layer's."""
    like, bias = layer.parameter, layer.bias
    for key in dict(made.named_parameters()):
        owner, _, leaf = key.rpartition(".")
        trains = bias.requires_grad if key == "bias" and bias is not None else like.requires_grad
        # A copy: safetensors hands out pieces of the file, at odd addresses, where matrix products round otherwise.
        value = values[key].to(like.device, copy=True)
        if value.ndim == like.ndim:
            value = laid_out(value, memory_format(like))
        setattr(made.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trains))
    if own_bias and bias is not None:
        made.bias = bias
    adopt(made, layer.module, plain(layer.geometry))
    return made


def empty(layer: Layer, forms: tuple[Form, ...], normalise: bool) -> SeriesLayer:
    """The series of a layer whose terms have no values yet, to be loaded into."""
    made = SeriesLayer(layer.geometry, forms, normalise=normalise, device="meta")
    like = layer.parameter
    values = {n: torch.empty(p.shape, dtype=like.dtype, device=like.device) for n, p in made.named_parameters()}
    return restored(layer, made, values, own_bias=True)


def fitted(
    layer: Layer, forms: tuple[Form, ...], method: Method, normalise: bool, metric: Metric | None, kept: Path | None
) -> SeriesLayer:
    """The series of a layer: from a folder where it was kept, or fitted and kept there."""
    if kept is None:
        return series(layer, forms, method=method, normalise=normalise, metric=metric)
    values = {name: value.detach() for name, value in layer.module.named_parameters()}
    if metric is not None:
        sides = {"inputs": metric.inputs, "gradients": metric.gradients}
        values |= {f"moment of {name}": side.moment for name, side in sides.items() if side is not None}
    about = repr((layer.geometry, forms, method, digest(values)))
    path = kept / f"{hashlib.sha256(about.encode()).hexdigest()[:40]}.safetensors"
    made = SeriesLayer(layer.geometry, forms, normalise=normalise, device="meta")
    try:
        values = load_file(path)
        if values.pop("digest").tolist() == _digest(values):
            return restored(layer, made, values)
    except (OSError, SafetensorError, KeyError, RuntimeError):
        pass  # not kept, or not whole
    made = series(layer, forms, method=method, normalise=normalise, metric=metric)
    values = {name: value.detach().contiguous() for name, value in made.named_parameters()}
    try:
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(path, save_bytes(values | {"digest": torch.tensor(_digest(values), dtype=torch.uint8)}))
    except OSError as error:
        raise LaminaError(f"{kept} cannot be written: {error}") from error
    return made


def _digest(values: dict[str, Tensor]) -> list[int]:
    return list(bytes.fromhex(digest(values)))


def left_out(made: SeriesLayer, layer: Layer, metric: Metric | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each form the squared distance from the weight, and the share of the weight that it leaves out: of its squared norm,
    or of what a metric says of losing all of it.
    """  # noqa: D205 - one sentence
    weight = layer.weight.detach().double()
    active, squares, shares = made.active, [], []
    size = float(weight.square().sum()) if metric is None else metric.error(weight)
    with torch.no_grad():
        for form in made.forms:
            made.set_active(form)
            change = weight - made.composed().double()
            squares.append(float(change.square().sum()))
            shares.append((squares[-1] if metric is None else metric.error(change)) / (size or 1.0))
    made.set_active(active)
    return tuple(squares), tuple(shares)
