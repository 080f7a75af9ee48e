"""Puts what the campaigns and the mutants came to into docs/results.

    python benchmarks/faults/page.py --publish

It only reads what the other scripts of this folder wrote into ``benchmarks/runs/faults``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from campaign import FOLDER
from judging import FAULTS, KINDS
from mutation import row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import publish, table


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def campaigns() -> str:
    """What became of generated layers and networks, side by side."""
    results = [read("layers-0"), read("networks-0")]
    rows = [["judged", *(f"{result['judged']:,}" for result in results)]]
    rows += [[KINDS[kind], *(f"{result['outcomes'][kind]:,}" for result in results)] for kind in KINDS]
    rows.append(["the dense network does not run either", *(f"{r['dense network itself does not run']:,}" for r in results)])
    faults = sum(result["outcomes"][kind] for result in results for kind in FAULTS)
    notes = [
        f"{faults} of them must not be." if faults else "Nothing is silently wrong, and no error is raw or without a name."
    ]
    for result in results:
        seen = f"{result['versions']['lamina']}; torch {result['versions']['torch']}; {result['seconds']} s"
        notes.append(f"{result['name']}: `{result['command']}`; {seen}.")
        broken = {what: n for what, n in result["broken"].items() if n}
        notes += [f"{n} times {what}." for what, n in broken.items()]
    return table(["", *(result["name"] for result in results)], rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def kills() -> str:
    result = read("kills-0")
    lost = sum(n for what, n in result["after a kill"].items() if what.startswith(("lost", "error")))
    rows = [
        ["kills while saving", f"{result['kills']}"],
        ["a network lost", f"{lost}"],
        ["loads by two readers meanwhile", f"{sum(result['readers'].values()):,}"],
        ["saves by another process meanwhile", f"{sum(result['other saver'].values()):,}"],
        ["anything else that must not be", f"{sum(result['faults'].values())}"],
        ["left over after one more save", "{files and folders} files".format(**result["left over after one more save"])],
    ]
    return table([f"`{result['command']}`", ""], rows)


def mutants() -> str:
    hand, rooms = read("mutants"), read("mutation")["rooms"]
    text = (
        f"Of {len(hand['mutants'])} mutants chosen by hand (`python benchmarks/faults/mutants.py`) {hand['killed']} are killed."
    )
    alive = [f"{name}, {found['outcome']}" for name, found in hand["mutants"].items() if found["outcome"] != "killed"]
    if alive:
        text += f" Not so: {'; '.join(alive)}."
    head = ["room", "mutants", "tried", "killed", "survived", "share killed"]
    body = [[cell.strip() for cell in row(room, found).strip("|").split("|")] for room, found in rooms.items()]
    return (
        f"{text}\n\nOf mutmut's mutants (`python benchmarks/faults/mutation.py`, survivors by name in "
        f"`benchmarks/runs/faults/mutation.json`):\n\n{table(head, body)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write the tables into docs/results")
    chosen = parser.parse_args()
    body = "\n\n".join([campaigns(), kills(), mutants()])
    print(body)
    if chosen.publish:
        publish("faults", "Campaigns against what is silently wrong", "python benchmarks/faults/page.py --publish", body)


if __name__ == "__main__":
    main()
