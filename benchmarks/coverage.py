"""Which networks lamina gets on with: other people's, by the hundred, each taken through everything that its original passes.

    python benchmarks/coverage.py --publish

Each network of ``zoo.py`` is planned at ratio 2 without timing, decomposed, run in every mode, trained a step, saved, loaded,
and exported by `torch.export` and to ONNX; `lamina.verify` asks of it what its original passes. What is left dense is counted
by name, in shares of the multiply-accumulates and of the time of a forward pass. Every network has a process of its own and a
limit of time; it goes on where it was stopped (``benchmarks/runs/coverage.jsonl``). ``--only timm`` takes those whose names
begin so, ``--sample 6`` some that the week draws, and fails where one of them breaks a promise: what the tests do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from record import options
from zoo import apart, networks

import lamina
from lamina.errors import LaminaError
from lamina.measure.shares import time_shares
from lamina.network.copying import shadow
from lamina.network.placing import opened
from lamina.network.walk import walk
from lamina.values import workloads

HERE = Path(__file__).resolve().parent
KEPT, PAGE = HERE / "runs" / "coverage.jsonl", HERE.parent / "docs" / "coverage.md"
EXPORTS = ("torch.export", "onnx")


def looked_at(name: str) -> dict[str, Any]:
    """What becomes of one network."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, example = networks()[name]()
    began = time.perf_counter()
    plan = lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio())
    decomposable = {name for name, layer in plan.layers.items() if name not in plan.refused}
    macs = sum(plan.layers[name].before.macs for name in decomposable)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(plan.layers),
        "decomposed": len(plan.decomposed),
        "macs": macs / max(plan.whole.before.macs, 1) if plan.whole else None,
        "time": share_of_time(model, example, decomposable),
        "refused": dict(Counter(map(kind_of, plan.refused.values()))),
        "broken": [],
        "as before": [],
    }
    if plan.decomposed:
        small = lamina.decompose(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            lamina.save(small, Path(folder) / "saved")
        for check in lamina.verify(model, small, example, exports=EXPORTS).checks:
            if not check.passed:
                nor = "nor does the network before" in check.detail
                found["as before" if nor else "broken"].append(f"{check.promise}: {check.detail}"[:300])
    return found | {"seconds": time.perf_counter() - began}


def share_of_time(model: torch.nn.Module, example: Any, decomposable: set[str]) -> float:
    """Of a forward pass of the dense network, in the layers that can be decomposed."""
    twin = shadow(model, opened(walk(model).layers.values()))
    return sum(share for name, share in time_shares(twin.eval(), workloads(example)).items() if name in decomposable)


def kind_of(reason: str) -> str:
    """A reason without the numbers and names of one network."""
    return re.sub(r"that of .*|those of .*", "another module's", re.sub(r"\d+", "N", reason))


def passes(found: dict[str, Any]) -> bool:
    """Whether it passes all that its original passes."""
    return "error" not in found and not found["broken"]


def row(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | | | | | {'refused' if found.get('refusal') else 'ERROR'}: {found['error']} |"
    refused = "; ".join(f"{number} × {reason}" if number > 1 else reason for reason, number in found["refused"].items())
    broken = "; ".join(found["broken"]).replace("|", "/")
    return (
        f"| {name} | {found['parameters'] / 1e6:.1f} | {found['decomposed']} of {found['layers']} | {found['macs']:.0%} | "
        f"{found['time']:.0%} | {'BROKEN: ' + broken if broken else 'passes'} | {refused} |"
    )


def write_page(rows: dict[str, dict[str, Any]]) -> None:
    good = sum(passes(found) for found in rows.values())
    named = sum(bool(found.get("refusal")) for found in rows.values())
    packages = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch", "open_clip_torch")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    head = "network,M parameters,layers decomposed,MACs that can be,time that can be,all that the original passes,left dense"
    both, rest = f"{good} pass all that their originals pass, {named} are refused with a reason", len(rows) - good - named
    lines = [
        "# Coverage",
        "",
        f"{len(rows)} networks of other people with fresh weights: {both}, {rest} do neither. They are planned at ratio 2, "
        "decomposed, run in every mode, trained a step, saved and loaded, and exported by `torch.export` and to ONNX.",
        "",
        "*MACs* and *time*: which share of the dense network's multiply-accumulates, and of the time of a forward pass on two "
        "CPU threads, lies in layers that can be decomposed.",
        "",
        "```console",
        "$ python benchmarks/coverage.py --publish",
        "```",
        "",
        "| " + " | ".join(head.split(",")) + " |",
        "| --- " * 7 + "|",
        *(row(name, found) for name, found in sorted(rows.items())),
        "",
        f"{datetime.date.today().isoformat()}; {', '.join(versions)}; lamina {lamina.__version__}.",
    ]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--network", help="this one, in this process; its row is printed")
        parser.add_argument("--only", default="", help="those whose names begin so")
        parser.add_argument("--sample", type=int, help="so many, drawn by the week; fails where one breaks a promise")
        parser.add_argument("--limit", type=float, default=600.0, help="seconds a network")

    chosen = options(__doc__ or "", more)
    if chosen.network:
        try:
            found = looked_at(chosen.network)
        except LaminaError as error:
            found = {"error": str(error), "refusal": True}
        print(json.dumps(found))
        return
    names = [name for name in networks() if name.startswith(chosen.only)]
    if chosen.sample:
        week = datetime.date.today().isocalendar()[:2]
        names = random.Random(str(week)).sample(names, min(chosen.sample, len(names)))
    rows: dict[str, dict[str, Any]] = {}
    if KEPT.exists() and not chosen.sample:
        rows = {entry["name"]: entry["found"] for entry in map(json.loads, KEPT.read_text().splitlines())}
    for name in names:
        if name in rows:
            continue
        rows[name] = apart(__file__, ["--network", name], chosen.limit)
        print(row(name, rows[name]), flush=True)
        if not chosen.sample:
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            with KEPT.open("a") as file:
                file.write(json.dumps({"name": name, "found": rows[name]}) + "\n")
    if chosen.publish:
        write_page(rows)
    if chosen.sample and (bad := [name for name, found in rows.items() if not passes(found) and not found.get("refusal")]):
        sys.exit(f"not all that the original passes: {', '.join(bad)}")


if __name__ == "__main__":
    main()
