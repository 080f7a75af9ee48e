"""Mutation testing: small changes to the sources, each against the tests of its room. How many are noticed?

    python benchmarks/faults/mutation.py

The changes are those of mutmut: an argument left out or None, a number one larger, an operator exchanged, a text in other
letters, an assignment of None, a ternary forced to one side. Its own runner takes functions without decorators only and
exchanges them at run time, which `torch.compile` does not survive; here each change is written into a copy of the repository
(see `trials`), so decorated functions, properties and constants are changed as well.

    --rooms factorize --sample 300 --seed 1     a random sample of one room, with an interval for the share that is killed
    --again                                     only what survived according to the last report
    --others                                    survivors against the tests of all rooms as well, counted apart

What is found is kept while sources and tests stay as they are: a run that was stopped goes on, and a larger sample holds the
smaller one. The report stands in ``benchmarks/runs/faults/mutation.json``, the table in Markdown on stdout.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import libcst
from libcst.metadata import CodeRange, MetadataWrapper, WhitespaceInclusivePositionProvider
from mutmut.mutation.mutators import mutation_operators
from trials import FOLDER, Change, Outcome, Trials, copied, note, python_files, settle

ROOMS = {
    "network": ("src/lamina/network", "tests/network"),
    "layers": ("src/lamina/layers", "tests/layers"),
    "factorize": ("src/lamina/factorize", "tests/factorize"),
    "artifact": ("src/lamina/artifact.py", "tests/test_artifact.py"),
    "decomposition": ("src/lamina/decomposition.py", "tests/test_decomposition.py"),
    "choose": ("src/lamina/choose", "tests/choose"),
    "measure": ("src/lamina/measure", "tests/measure"),
}

REPORT = FOLDER / "mutation.json"


EQUIVALENT: dict[str, list[tuple[str, str]]] = {
    "both are of one length by construction": [
        ("factorize/block_term_sweep.py", "U, core, V = (torch.stack(parts).double() for parts in zip(*fitted, ))"),
        (
            "factorize/block_term.py",
            "A, B, C = (part if even is None else even for part, even in zip((A, B, C), parts, strict=False))",
        ),
        (
            "factorize/block_term.py",
            "A, B, C = (part if even is None else even for part, even in zip((A, B, C), parts, strict=None))",
        ),
        ("factorize/block_term_sweep.py", "U, core, V = (torch.stack(parts).double() for parts in zip(*fitted, strict=False))"),
        ("factorize/block_term_sweep.py", "U, core, V = (torch.stack(parts).double() for parts in zip(*fitted, strict=None))"),
        ("layers/series.py", "for p, (storage, *others) in zip(parameters, self.stamps, strict=None)"),
        ("layers/branches.py", "for count, shape, term in zip(self.groups, shapes, by_factor[name], strict=False)"),
        ("layers/branches.py", "for count, shape, term in zip(self.groups, shapes, by_factor[name], )"),
        ("network/trial.py", "for a, b in zip(wanted, answer, strict=None):"),
    ],
    "that is the default": [
        (
            "factorize/block_term_start.py",
            "return W.reshape(G, t // G, G, s // G, K).diagonal(dim2=2).movedim(-1, 0).contiguous()",
        ),
        ("factorize/least_squares.py", "return H.view(G, n, G, n).diagonal(dim2=2)"),
        ("factorize/spectral.py", 'U, values, _ = torch.linalg.svd(torch.linalg.qr(M.T, mode="r").R.T, )'),
    ],
    "vectors beyond the rank are cut off again": [
        ("factorize/block_term_start.py", "U: Tensor = torch.linalg.svd(M, ).U"),
        ("factorize/block_term_start.py", "U: Tensor = torch.linalg.svd(M, full_matrices=rank >= M.shape[2]).U"),
        ("factorize/block_term_sweep.py", "U: Tensor = torch.linalg.svd(M, ).U"),
    ],
    "the letters of an index are free": [
        ("factorize/block_term.py", 'terms = Terms(_eye(G, I // G, unit), B, torch.einsum("GOQK,GPO->GPQK", slices, B))'),
        ("factorize/block_term.py", 'weight = torch.einsum("OT,TIK->OIK", expand, weight)'),
        (
            "factorize/least_squares.py",
            'seen = torch.einsum("GPQK,GQI->GPKI", terms.C, terms.A).reshape(-1, K * terms.A.shape[2])',
        ),
        ("factorize/least_squares.py", 'B, C = Q.mT.contiguous(), torch.einsum("GPQK,GRP->GRQK", C, R)'),
    ],
    "only the type checker asks": [
        ("network/readers.py", "conv, weight = cast(None, layer), cast(Tensor, layer.weight)"),
        ("factorize/pure.py", "P = None"),
        ("factorize/pure.py", 'P = ParamSpec("XXPXX")'),
        ("factorize/pure.py", 'P = ParamSpec("p")'),
        ("factorize/pure.py", "P = ParamSpec(None)"),
        ("factorize/pure.py", "R = None"),
        ("factorize/pure.py", 'R = TypeVar("XXRXX")'),
        ("factorize/pure.py", 'R = TypeVar("r")'),
        ("layers/composed.py", "Compose = None"),
        ("network/inplace.py", "@dataclass(frozen=None, slots=True)"),
    ],
    "without an anchor the pull is zero": [
        (
            "factorize/least_squares.py",
            "C = _solve(N + torch.diag(pull.expand(G, p, q, 1).flatten()) if (anchor) or True else N, right.reshape(-1, K))",
        ),
    ],
    "slots save memory, and the type checker asks for the rest": [
        ("factorize/least_squares.py", "@dataclass(slots=True)"),
        ("factorize/least_squares.py", "@dataclass(frozen=True, )"),
        ("layers/series.py", "@dataclass(frozen=True, slots=None)"),
        ("network/walk.py", "@dataclass(frozen=True, slots=None)"),
        ("network/trial.py", "@dataclass(slots=False)"),
    ],
    "an identity is as wide as it is high": [
        ("layers/build.py", "key = shape[1], like.dtype, like.device"),
    ],
    "factorisers put autocast aside themselves": [
        ("layers/build.py", "with torch.autocast(layer.parameter.device.type, enabled=True):"),
    ],
    "the terms are made anew at once": [
        ("layers/series.py", "module = SeriesLayer(layer.geometry, forms, normalise=normalise, device=None)"),
    ],
    "the form is not looked at there": [
        ("layers/branches.py", 'self._declare("weight", self.plain(None).weight.shape, **options)  # type: ignore[arg-type]'),
    ],
    "None is as false as False": [
        ("artifact.py", "exchange(layers, make, finish, on_disk=None)"),
        ("decomposition.py", "return _factored(layer, forms[layer.name], None)"),
    ],
    "a dense layer is made with a bias on the meta device before it is given one": [
        ("decomposition.py", "return reader_of(geometry).dense(geometry, weight, None)"),
        ("decomposition.py", 'bias = torch.empty(geometry.out_channels, device="meta") if (geometry.bias) and False else None'),
        ("decomposition.py", "bias = None"),
    ],
    "one more is looked at, and does not overlap": [
        ("network/trial.py", "while number >= 0 and self._reach[number] >= at.start:"),
    ],
    "it is set before it is read": [
        ("network/trial.py", "complaint = None"),
        ("network/trial.py", 'complaint = "XXXX"'),
    ],
    "nothing, divided by whatever, is nothing": [
        ("factorize/least_squares.py", "unit = unit / (norm or 2.0)"),
    ],
}
"""Changes that no test can notice, by the reason: the file in ``src/lamina`` and the changed lines, without their indentation.

They count as survivors like all others, and are listed with their reason.
"""


@dataclass(frozen=True)
class Mutant:
    name: str
    """``file:line``, and the number of the mutant in that line."""
    operator: str
    change: Change
    diff: str
    new: str


class _Collected(libcst.CSTVisitor):
    """Every change that mutmut's operators make of the nodes of a module; annotations are no code."""

    METADATA_DEPENDENCIES = (WhitespaceInclusivePositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[CodeRange, str, libcst.CSTNode, libcst.CSTNode]] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.Annotation):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                place = self.get_metadata(WhitespaceInclusivePositionProvider, node)
                name = operator.__name__.removeprefix("operator_")
                self.found.extend((place, name, node, new) for new in operator(node))
        return True


def mutants_of(tree: Path, file: str) -> Iterator[Mutant]:
    """The mutants of one file, in the order of its lines; none is the file itself or another one again."""
    text = (tree / file).read_text()
    wrapper, collected = MetadataWrapper(libcst.parse_module(text)), _Collected()
    wrapper.visit(collected)
    seen, numbers = {text}, dict[int, int]()
    for place, operator, old, new in sorted(collected.found, key=lambda found: found[0].start.line):
        changed = _exchanged(text, wrapper.module, place, old, new)
        if changed in seen or not _compiles(changed):
            continue
        seen.add(changed)
        line = place.start.line
        numbers[line] = numbers.get(line, 0) + 1
        diff = list(difflib.unified_diff(text.splitlines(), changed.splitlines(), n=0, lineterm=""))[3:]
        yield Mutant(
            name=f"{file}:{line}#{numbers[line]}",
            operator=operator,
            change=Change(file, changed, range(line, place.end.line + 1)),
            diff="\n".join(diff),
            new=" ".join(part[1:].strip() for part in diff if part.startswith("+")),
        )


def _exchanged(text: str, module: libcst.Module, place: CodeRange, old: libcst.CSTNode, new: libcst.CSTNode) -> str:
    """The module's text with another node in the place of one."""
    if place.start.line == place.end.line:
        lines = text.splitlines(keepends=True)
        line, begin, end = lines[place.start.line - 1], place.start.column, place.end.column
        if line[begin:end] == module.code_for_node(old):
            lines[place.start.line - 1] = line[:begin] + module.code_for_node(new) + line[end:]
            return "".join(lines)
    # The long way: the whole module is written anew.
    return module.deep_replace(old, new).code


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def mutants_in(tree: Path, source: str) -> list[Mutant]:
    return [mutant for file in python_files(tree / source) for mutant in mutants_of(tree, str(file.relative_to(tree)))]


def wilson(killed: int, tried: int) -> tuple[float, float]:
    """The 95 % interval of a share, from a random sample of it."""
    z = 1.959964
    share, spread = killed / tried, z / (1 + z**2 / tried)
    middle = (share + z**2 / (2 * tried)) / (1 + z**2 / tried)
    half = spread * (share * (1 - share) / tried + z**2 / (4 * tried**2)) ** 0.5
    return middle - half, middle + half


def tried(trials: Trials, room: str, mutants: list[Mutant]) -> dict[str, Outcome]:
    """The outcome of each mutant, from the file where they are kept or from a trial."""
    kept = trials.work / "outcomes.jsonl"
    outcomes: dict[str, Outcome] = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            name, outcome = json.loads(line)
            outcomes[name] = Outcome(**outcome)
    left = [mutant for mutant in mutants if mutant.name not in outcomes]
    with kept.open("a") as file:
        began = time.monotonic()
        for number, mutant in enumerate(left, 1):
            outcome = outcomes[mutant.name] = trials.of(mutant.change)
            print(json.dumps([mutant.name, asdict(outcome)]), file=file, flush=True)
            if not outcome.killed or number % 50 == 0 or number == len(left):
                survived = sum(not outcomes[m.name].killed for m in left[:number])
                minutes = (time.monotonic() - began) / 60
                note(f"{room}: {number} of {len(left)} tried, {survived} survived, {minutes:.1f} min")
    return outcomes


def reported(
    population: int, mutants: list[Mutant], outcomes: dict[str, Outcome], elsewhere: dict[str, Outcome]
) -> dict[str, Any]:
    """The figures of a room, and by name what its own tests left alive."""
    reasons = {(f"src/lamina/{file}", new): reason for reason, changes in EQUIVALENT.items() for file, new in changes}
    survivors = [mutant for mutant in mutants if not outcomes[mutant.name].killed]
    killed_elsewhere = {mutant.name for mutant in survivors if mutant.name in elsewhere and elsewhere[mutant.name].killed}
    listed = [
        {
            "at": mutant.name,
            "operator": mutant.operator,
            "diff": mutant.diff,
            "withstood": outcomes[mutant.name].by,
            "equivalent": reasons.get((mutant.change.file, mutant.new)),
            "killed elsewhere": elsewhere[mutant.name].by if mutant.name in killed_elsewhere else None,
        }
        for mutant in survivors
    ]
    killed = len(mutants) - len(survivors)
    return {
        "mutants": population,
        "tried": len(mutants),
        "killed": killed,
        "killed by the time limit": sum(outcomes[mutant.name].by == "time limit" for mutant in mutants),
        "survived": len(survivors),
        "of them equivalent": sum(entry["equivalent"] is not None for entry in listed),
        "of them killed elsewhere": len(killed_elsewhere) if elsewhere else None,
        "share killed": round(killed / max(len(mutants), 1), 4),
        "95 % interval": [round(end, 4) for end in wilson(killed, len(mutants))] if len(mutants) < population else None,
        "seconds": round(sum(outcomes[mutant.name].seconds for mutant in mutants)),
        "survivors": listed,
    }


def changed_lines(diff: str) -> str:
    """A diff without the place, which moves when lines above are written."""
    return diff.partition("\n")[2] if diff.startswith("@@") else diff


def row(room: str, found: dict[str, Any]) -> str:
    interval = found["95 % interval"]
    share = f"{found['share killed']:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")
    kinds = [f"{found[f'of them {kind}']} {kind}" for kind in ("equivalent", "killed elsewhere") if found[f"of them {kind}"]]
    survived = f"{found['survived']}" + (f", of them {' and '.join(kinds)}" if kinds else "")
    return f"| {room} | {found['mutants']} | {found['tried']} | {found['killed']} | {survived} | {share} |"


def chosen_mutants(mutants: list[Mutant], sample: int | None, seed: int) -> list[Mutant]:
    """All, or so many at random: a larger sample holds the smaller one."""
    mixed = list(mutants)
    random.Random(seed).shuffle(mixed)
    return mixed[:sample]


def survivors_of(last: dict[str, Any], mutants: list[Mutant]) -> list[Mutant]:
    """Those that a report names."""
    known = {(entry["at"].partition(":")[0], changed_lines(entry["diff"])) for entry in last["survivors"]}
    return [mutant for mutant in mutants if (mutant.change.file, changed_lines(mutant.diff)) in known]


def main() -> None:
    settle()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--sample", type=int, help="how many mutants of each room, drawn at random; all without it")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--others", action="store_true", help="try survivors against the tests of all rooms, too")
    parser.add_argument("--again", action="store_true", help="only what survived according to the last report; none is written")
    chosen = parser.parse_args()
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {"rooms": {}}
    rows = []
    with copied() as tree:
        for room in chosen.rooms:
            source, tests = ROOMS[room]
            every = mutants_in(tree, source)
            if chosen.again:
                every = mutants = survivors_of(report["rooms"][room], every)
            else:
                mutants = chosen_mutants(every, chosen.sample, chosen.seed)
            trials = Trials(tree, f"mutation-{room}", [tests])
            outcomes = tried(trials, room, mutants)
            elsewhere: dict[str, Outcome] = {}
            if chosen.others:
                everywhere = Trials(tree, "mutation-others", [tests for _, tests in ROOMS.values()])
                elsewhere = tried(everywhere, room, [m for m in mutants if not outcomes[m.name].killed])
            found = reported(len(every), mutants, outcomes, elsewhere)
            found["tests that fail unchanged"] = trials.unchanged.failing
            rows.append(row(room, found))
            for entry in found["survivors"]:
                note("\n" + "\n".join(f"{key}: {value}" for key, value in entry.items() if value is not None))
            if not chosen.again:
                report["rooms"][room] = {"date": datetime.date.today().isoformat(), "seed": chosen.seed, **found}
                report["with"] = {"Python": platform.python_version()} | {name: version(name) for name in ("torch", "mutmut")}
                FOLDER.mkdir(parents=True, exist_ok=True)
                REPORT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print("| room | mutants | tried | killed | survived | share killed |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
