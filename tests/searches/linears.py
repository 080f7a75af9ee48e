"""A supernet that is made in a moment, 81 configurations, and scores that follow from the configuration alone."""

from __future__ import annotations

import torch
from torch import nn

from lamina.forms import Dense, Form, LowRank
from lamina.layers.series import SeriesLayer
from lamina.supernet.convert import make_supernet
from lamina.supernet.space import Configuration
from lamina.supernet.supernet import Supernet

FORMS: list[Form] = [LowRank(2), LowRank(5), Dense()]
WORTH = {"0": (0.0, 3.0, 4.0), "2": (0.0, 1.0, 5.0), "4": (0.5, 1.0, 1.5), "6": (0.0, 2.0, 2.5)}


def supernet() -> Supernet:
    torch.manual_seed(3)
    layers: list[nn.Module] = [
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
    ]
    return make_supernet(nn.Sequential(*layers).eval(), torch.randn(4, 16), forms={"*": FORMS})


def worth(config: Configuration) -> float:
    """A made-up score: additive, but for two layers that do better together."""
    total = sum(values[FORMS.index(config[name])] for name, values in WORTH.items())
    return total + (0.75 if config["0"] == config["6"] == LowRank(5) else 0.0)


def active(model: nn.Module) -> Configuration:
    return {name: layer.active for name, layer in model.named_children() if isinstance(layer, SeriesLayer)}


def score(model: nn.Module) -> float:
    return worth(active(model))
