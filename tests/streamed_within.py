"""Decomposes a checkpoint layer by layer: prints by how many bytes the process grew at most, its largest layer, and all of it.

    python streamed_within.py FOLDER DTYPE

What the process grew by is its largest resident set since it began (``VmHWM``) above the one before the call: pages of mapped
files count, though the system may drop them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import lamina
from lamina.network.fingerprint import fingerprint
from lamina.network.walk import walk
from lamina.plan import Plan, PlannedLayer, cost


def now(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def network() -> nn.Module:
    """Layers of 67 MB in bfloat16 and twice that in float32, of which one side is narrow, and an embedding as large."""
    wide, narrow = 32_768, 1024
    return nn.Sequential(nn.Embedding(wide, narrow), nn.Linear(narrow, wide), nn.Linear(wide, narrow), nn.Linear(narrow, wide))


def plan_of(model: nn.Module, rank: int) -> Plan:
    """Every linear layer at one rank, without looking at any value."""
    form = lamina.LowRank(rank)
    layers = {
        name: PlannedLayer(
            geometry=layer.geometry,
            uses=(),
            form=form,
            reason="for the test",
            before=cost(layer.geometry, lamina.Dense(), ()),
            after=cost(layer.geometry, form, ()),
        )
        for name, layer in walk(model).layers.items()
    }
    return Plan(goal=lamina.Ratio(2.0), rule="by hand", layers=layers, fingerprint=fingerprint(model))


if __name__ == "__main__":
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = network().to(dtype)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        save_file({name: torch.empty(tensor.shape, dtype=dtype).normal_()}, folder / f"{number}.safetensors")
    named = {name: f"{number}.safetensors" for number, name in enumerate(sizes)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    plan = plan_of(model, 256)
    with torch.device("meta"):
        small = nn.Linear(8, 8)
    save_file({"weight": torch.randn(8, 8), "bias": torch.zeros(8)}, folder / "small.safetensors")
    # What is loaded at the first call counts as the process's.
    lamina.decompose_checkpoint(small, plan_of(small, 2), folder / "small.safetensors", output=folder / "small")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is counted from here
    before = now("VmRSS")
    lamina.decompose_checkpoint(model, plan, folder / "model.safetensors.index.json", output=folder / "out")
    print(now("VmHWM") - before, max(sizes.values()), sum(sizes.values()))
