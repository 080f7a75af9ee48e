"""The model card of a saved network: what model hubs show of a folder, made of its plan.

The head is what the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards); the text says what is recorded in
the plan, and nothing else. The licence is the user's to name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .plan import Plan
from .values import change

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(model: nn.Module, plan: Plan, weights: Sequence[str]) -> str:
    """A card in Markdown, with a head in YAML.

    Args:
        model: The decomposed network.
        plan: Its plan.
        weights: The names of the files of its weights.
    """
    kind, base = type(model).__name__, _base_model(model)
    head = ["library_name: lamina", "tags:", *(f"- {tag}" for tag in ("lamina", "pytorch", "low-rank", "tensor-decomposition"))]
    if base:
        head.insert(1, f"base_model: {json.dumps(base)}")
    told = [f"- {line}" for line in plan.summary()]
    rows = [
        f"| {f'`{name}`' if name else 'the network'} | {layer.geometry} | {layer.form} "
        f"| {change(layer.before.parameters, layer.after.parameters)} |"
        for name, layer in plan.decomposed.items()
    ]
    table = ["| layer | was | becomes | parameters |", "|---|---|---|---|", *rows] if rows else ["None: every layer is dense."]
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {kind}, decomposed",
        f"A {kind} in which [lamina](https://pypi.org/project/lamina/) has decomposed {len(plan.decomposed)} of "
        f"{len(plan.layers)} layers into thinner plain ones, to make it faster.",
        "## Load",
        "It is loaded onto a network of the original's structure, with any weights. No code of this folder is run.",
        "\n".join(["```python", *_loading(model, base), "```"]),
        "## What was asked, and what is known",
        "\n".join(told),
        "Times, scores and losses are of the network as it was planned and decomposed; what was trained after that is not in "
        f"them. The whole record is `plan.json`; the weights are {', '.join(f'`{name}`' for name in weights)}.",
        "## Layers decomposed",
        "\n".join(table),
    ]
    return "\n\n".join(parts) + "\n"


def _base_model(model: nn.Module) -> str:
    """The hub's name of the network that was decomposed, where it says so itself; empty where it does not.

    A network of transformers keeps what it was loaded from. timm's keeps where weights for it are to be had, whether it took
    them or not, so it tells nothing.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    # A folder of the user's is nobody else's business.
    known = isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if known else ""


def _loading(model: nn.Module, base: str) -> list[str]:
    """Three lines of Python."""
    kind, package = type(model).__name__, type(model).__module__.partition(".")[0]
    if package == "transformers" and base:
        config = f"transformers.AutoConfig.from_pretrained({json.dumps(base)})"
        package, made = "lamina, transformers", f"transformers.{kind}({config})"
    elif package == "timm" and (name := _timm_name(model)):
        package, made = "lamina, timm", f"timm.create_model({', '.join([json.dumps(name), *_classes(model)])})"
    else:
        package, made = "lamina", f"...  # a {kind}, made as the original was"
    return [f"import {package}", f"model = {made}", 'lamina.load(model, ".")  # this folder']


def _timm_name(model: nn.Module) -> str:
    told: Any = getattr(model, "pretrained_cfg", None)
    name = told.get("architecture") if isinstance(told, dict) else None
    return name if isinstance(name, str) else ""


def _classes(model: nn.Module) -> list[str]:
    number = getattr(model, "num_classes", None)
    return [f"num_classes={number}"] if isinstance(number, int) else []
