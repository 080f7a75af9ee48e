"""Peak memory of decomposing a checkpoint of several gigabytes layer by layer, against its largest layer.

    python benchmarks/streaming.py --threads 1 --publish

A checkpoint of a language model's shapes is written under the folder for temporary files, in shards with an index, and deleted
afterwards. A process of its own decomposes it. What that grew by is its largest resident set (``VmHWM``) above the one
before the call; pages of the mapped shards count as long as they are resident, so do all buffers of the factorisation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import conditions, options, publish, table
from safetensors.torch import save_file
from torch import nn

import lamina
from lamina.measure.conditions import setting_of
from lamina.network.fingerprint import fingerprint
from lamina.network.walk import walk
from lamina.plan import Plan, PlannedLayer, cost

WIDTH, INNER, VOCABULARY = 2048, 16_384, 32_000


class Block(nn.Module):
    """The shapes of a block: four projections of attention, and two wide layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)


def network(blocks: int, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        made = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *(Block() for _ in range(blocks)))
        return made.to(dtype)


def plan_of(model: nn.Module, ratio: float) -> Plan:
    """The wide layers at a ratio, what is narrow dense; no value is looked at, as there is none."""
    layers = {}
    for name, layer in walk(model).layers.items():
        O, I = layer.geometry.out_channels, layer.geometry.in_channels
        form = lamina.LowRank(int(O * I / ratio / (O + I))) if max(O, I) == INNER else lamina.Dense()
        before, after = (cost(layer.geometry, each, ()) for each in (lamina.Dense(), form))
        layers[name] = PlannedLayer(
            geometry=layer.geometry, uses=(), form=form, reason="by its shape", before=before, after=after
        )
    return Plan(goal=lamina.Ratio(ratio), rule="by hand", layers=layers, fingerprint=fingerprint(model))


def generate(model: nn.Module, folder: Path) -> None:
    """Random weights, a shard for each block."""
    generator, named = torch.Generator().manual_seed(0), {}
    shards: dict[str, list[str]] = {}
    state = model.state_dict()
    for name in state:
        shards.setdefault(f"model-{name.split('.')[0]}.safetensors", []).append(name)
    for file, names in shards.items():
        drawn = {name: torch.empty(state[name].shape, dtype=state[name].dtype) for name in names}
        for tensor in drawn.values():
            tensor.normal_(0, 0.02, generator=generator)
        save_file(drawn, folder / file)
        named |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))


def now(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def child(folder: Path, blocks: int, dtype: torch.dtype, ratio: float) -> None:
    """Decompose, and print by how much the process grew, and the seconds."""
    model = network(blocks, dtype)
    plan = plan_of(model, ratio)
    with torch.device("meta"):
        small = nn.Linear(INNER, 8, dtype=dtype)
    tensors = {"weight": torch.randn(8, INNER).to(dtype), "bias": torch.zeros(8, dtype=dtype)}
    save_file(tensors, folder / "small.safetensors")
    # What is loaded at the first call counts as the process's.
    lamina.decompose_checkpoint(small, plan_of(small, 2.0), folder / "small.safetensors", output=folder / "first")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is counted from here
    before, began = now("VmRSS"), time.perf_counter()
    index = folder / "model.safetensors.index.json"
    lamina.decompose_checkpoint(model, plan, index, output=folder / "out")
    print(now("VmHWM") - before, time.perf_counter() - began, len(plan.decomposed))


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the network, 335 MB each in float32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    chosen = options(__doc__, more)
    dtype = getattr(torch, chosen.dtype)
    if chosen.folder:
        child(chosen.folder, chosen.blocks, dtype, chosen.ratio)
        return
    model = network(chosen.blocks, dtype)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        generate(model, folder)
        words = ("--folder", made, "--blocks", chosen.blocks, "--dtype", chosen.dtype, "--ratio", chosen.ratio)
        command = [sys.executable, __file__, *map(str, (*words, "--threads", chosen.threads))]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        written = sum(path.stat().st_size for path in (folder / "out").iterdir())
    grown, seconds, decomposed = int(found[0]), float(found[1]), int(found[2])
    state = model.state_dict()
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    largest = max(size for name, size in sizes.items() if not name.startswith("0."))
    rows = [
        ["checkpoint", f"{sum(sizes.values()) / 1e9:.2f} GB in {chosen.blocks + 1} shards, {chosen.dtype}"],
        ["its largest layer", f"{largest / 1e6:.0f} MB ({WIDTH} → {INNER})"],
        ["its embedding, which is copied", f"{sizes['0.weight'] / 1e6:.0f} MB"],
        ["layers factorised", f"{decomposed}, the rest is copied; {written / 1e9:.2f} GB are saved"],
        ["largest growth of the resident set", f"{grown / 1e6:.0f} MB = {grown / largest:.2f} × the largest layer"],
        ["time", f"{seconds:.0f} s"],
    ]
    body = conditions(setting_of(nn.Linear(1, 1), "inference", channels_last=False)) + "\n\n"
    body += table([f"ratio {chosen.ratio:g}, layer by layer", ""], rows)
    print(body)
    if chosen.publish:
        publish(
            "streaming",
            "Memory of decomposing a checkpoint layer by layer",
            "python benchmarks/streaming.py --threads 1 --publish",
            body,
        )


if __name__ == "__main__":
    main()
