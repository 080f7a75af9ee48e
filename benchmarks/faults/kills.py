"""Saves killed at random moments, while others read and write the same folder: nothing may be lost.

    python benchmarks/faults/kills.py --kills 400 --seed 0

One process saves a network onto a folder over and over and is killed (SIGKILL) after a few milliseconds, 400 times. Meanwhile
a second process saves another network onto the same folder, except at every second kill, where nobody would mend what the kill
broke, and two more load it all the time. After each kill the folder must load. Whatever is loaded, by whom ever, must be one of
the two networks to the last bit. What lies about afterwards is counted before and after one more save.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from campaign import FOLDER, fingerprint, prepare, table, versions
from judging import state
from torch import nn

import lamina

WIDTH = 128
SEEDS = {"killed": 1, "other": 2}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))


def decomposed(seed: int) -> nn.Module:
    model, x = network(seed), torch.randn(2, WIDTH)
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
    for name in plan.layers:
        plan = plan.with_form(name, lamina.LowRank(WIDTH // 2 + seed))
    return lamina.decompose(model, plan)


def known() -> dict[str, dict[str, Any]]:
    """What a folder may hold: the state of either network."""
    return {name: state(decomposed(seed)) for name, seed in SEEDS.items()}


def loaded(folder: Path, right: dict[str, dict[str, Any]]) -> str:
    """The name of the network in a folder, or what is wrong with it."""
    try:
        found = state(lamina.load(network(3), folder))
    except Exception as error:
        kind = "" if isinstance(error, lamina.LaminaError) else f"{type(error).__name__}: "
        return f"error: {kind}{_general(str(error), folder)}"
    return next((name for name, wanted in right.items() if found == wanted), "wrong content")


def _general(text: str, folder: Path) -> str:
    text = text.strip().splitlines()[0].replace(str(folder.parent), "…") if text.strip() else "no message"
    return re.sub(r"/\.[\w.-]+", "/SCRATCH", text)[:140]


def read(folder: Path, stop: Event, rest: Event, pipe: Connection) -> None:
    """Load until told to stop, then tell what was seen."""
    prepare()
    right, seen = known(), Counter[str]()
    while not stop.is_set():
        seen[loaded(folder, right)] += 1
        time.sleep(0.001)
    pipe.send(dict(seen))


def write(folder: Path, stop: Event, rest: Event, pipe: Connection) -> None:
    """Save the other network until told to stop, except while told to rest; then tell how that went."""
    prepare()
    small, seen = decomposed(SEEDS["other"]), Counter[str]()
    while not stop.is_set():
        if rest.is_set():
            time.sleep(0.002)
            continue
        try:
            lamina.save(small, folder)
            seen["saved"] += 1
        except Exception as error:
            kind = "" if isinstance(error, lamina.LaminaError) else f"{type(error).__name__}: "
            seen[f"error: {kind}{_general(str(error), folder)}"] += 1
        time.sleep(0.004)
    pipe.send(dict(seen))


def killed_once(small: nn.Module, folder: Path, seconds: float) -> None:
    """Save again and again in a process of its own, and kill it after some time."""
    process = os.fork()
    if process == 0:
        try:
            while True:
                try:
                    lamina.save(small, folder)
                except Exception:
                    continue  # the other saver's errors are counted; this one dies anyway
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def left_over(folder: Path) -> dict[str, int]:
    """What lies in and beside the folder besides what a clean save leaves there."""
    with tempfile.TemporaryDirectory() as scratch:
        clean = Path(scratch) / "clean"
        lamina.save(decomposed(SEEDS["killed"]), clean)
        wanted = len(list(clean.rglob("*")))
    inside = [path for path in folder.rglob("*")] if folder.is_dir() else []
    beside = [path for entry in folder.parent.iterdir() if entry != folder for path in (entry, *entry.rglob("*"))]
    extra = [*sorted(inside, key=lambda p: p.stat().st_mtime)[: max(0, len(inside) - wanted)], *beside]
    return {"files and folders": len(extra), "KiB": sum(p.stat().st_size for p in extra if p.is_file()) // 1024}


def campaign(kills: int, seed: int) -> dict[str, Any]:
    """All kills, with the others at work; what each of them saw."""
    chance, began = random.Random(seed), time.perf_counter()
    small, right = decomposed(SEEDS["killed"]), known()
    after: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")  # a fork would inherit the pipes and this process's state
    with tempfile.TemporaryDirectory(prefix="lamina-kills-") as scratch:
        folder = Path(scratch) / "saved"
        lamina.save(small, folder)
        stop, rest, others = context.Event(), context.Event(), []
        for work in (read, read, write):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(folder, stop, rest, theirs))
            process.start()
            others.append((process, mine))
        try:
            time.sleep(5)  # until all have begun
            for number in range(kills):
                if number % 2:
                    rest.set()
                    time.sleep(0.03)  # until the other one's last save is through
                else:
                    rest.clear()
                killed_once(small, folder, chance.uniform(0.002, 0.03))
                after[_settled(folder, right)] += 1
        finally:
            stop.set()
            reports = [mine.recv() if mine.poll(60) else {"error: no report": 1} for _, mine in others]
            for process, _ in others:
                process.join(60)
        lost = loaded(folder, right)
        before = left_over(folder)
        lamina.save(small, folder)
        last = loaded(folder, right)
        afterwards = left_over(folder)
    readers = Counter(reports[0]) + Counter(reports[1])
    return {
        "name": "kills",
        "command": f"python benchmarks/faults/kills.py --kills {kills} --seed {seed}",
        "seed": seed,
        "kills": kills,
        "after a kill": dict(after),
        "at the end": lost,
        "after one more save": last,
        "readers": dict(readers),
        "other saver": dict(reports[2]),
        "left over": before,
        "left over after one more save": afterwards,
        "seconds": round(time.perf_counter() - began),
        "versions": versions(fingerprint()),
    }


def _settled(folder: Path, right: dict[str, dict[str, Any]]) -> str:
    """What the folder holds; what cannot be loaded three times in a row is lost, and not in somebody's hands."""
    for _ in range(3):
        found = loaded(folder, right)
        if not found.startswith("error"):
            return found
        time.sleep(0.05)
    return f"lost, {found}"


def bad(seen: dict[str, int]) -> dict[str, int]:
    return {what: n for what, n in seen.items() if what not in ("saved", *SEEDS)}


def faults(result: dict[str, Any]) -> dict[str, int]:
    """What must not be, and how often it was."""
    found = {f"{who}: {what}": n for who in ("after a kill", "readers", "other saver") for what, n in bad(result[who]).items()}
    found |= {f"{when}: {result[when]}": 1 for when in ("at the end", "after one more save") if result[when] not in SEEDS}
    return found


def markdown(result: dict[str, Any]) -> str:
    counted = {who: sum(result[who].values()) for who in ("after a kill", "readers", "other saver")}
    rows = [
        ["kills", f"{result['kills']}"],
        ["folder lost after a kill", f"{sum(bad(result['after a kill']).values())}"],
        ["loads by two readers", f"{counted['readers']:,}"],
        ["of which failed or held something else", f"{sum(bad(result['readers']).values())}"],
        ["saves by another process", f"{counted['other saver']:,}"],
        ["of which failed", f"{sum(bad(result['other saver']).values())}"],
        ["left over", "{files and folders} files and folders, {KiB} KiB".format(**result["left over"])],
        [
            "after one more save",
            "{files and folders} files and folders, {KiB} KiB".format(**result["left over after one more save"]),
        ],
    ]
    parts = [table([f"seed {result['seed']}, {result['seconds']} s", ""], rows)]
    if found := faults(result):
        parts.append(table(["must not be", "times"], [[what.replace("|", "\\|"), str(n)] for what, n in found.items()]))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    chosen = parser.parse_args()
    prepare()
    print(f"kills: seed {chosen.seed}, {chosen.kills} kills")
    result = campaign(chosen.kills, chosen.seed)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"kills-{chosen.seed}.json"
    path.write_text(json.dumps(result | {"faults": faults(result)}, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{markdown(result)}\n\nwritten to {path}")
    return int(bool(faults(result)))


if __name__ == "__main__":
    sys.exit(main())
