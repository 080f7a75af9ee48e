"""Draws cases by the thousand, judges each, shrinks what is wrong to something small, and writes down what came out.

Cases come from Hypothesis, each chunk of them from a seed of its own. A chunk that is finished stands in a file and is not run
again while the code is the same, so that a campaign that was stopped goes on where it was. Within a chunk, Hypothesis first
draws all cases; then, for each law that was broken, it draws them again and shrinks, until every broken case holds all that one
of the shrunk ones is made of.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, Verbosity, assume, given, settings
from hypothesis.errors import HypothesisException
from judging import FAULTS, HOME, KINDS, Case, Ended, Invalid, Outcome, first_line, where

import lamina

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import table

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "faults"
SECONDS_A_CASE = 120


@dataclass(frozen=True)
class Fault:
    """A shrunk case, and what is wrong with it."""

    kind: str
    law: str
    detail: str
    case: str
    traits: tuple[str, ...]

    def explains(self, outcome: Outcome, traits: frozenset[str]) -> bool:
        return (self.kind, self.law) == (outcome.kind, outcome.law) and traits >= set(self.traits)


@dataclass
class Chunk:
    """What came of one chunk of cases."""

    number: int
    cases: int
    code: str
    invalid: int = 0
    seconds: float = 0.0
    outcomes: list[list[Any]] = field(default_factory=list)
    """Kind, law, and how many."""
    traits: list[list[Any]] = field(default_factory=list)
    """Trait, kind, and how many."""
    faults: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Campaign:
    """What is drawn, and how it is judged.

    Attributes:
        name: Of the files.
        description: Its first line is the help on the command line.
        cases: The strategy that draws them.
        judge: What a case comes to; may raise `Ended` and `Invalid`.
        traits: What is odd about a case, in words.
        known: Names that a pasted case uses.
        per_chunk: Cases a chunk.
        first: Cases that are judged before any is drawn.
    """

    name: str
    description: str
    cases: st.SearchStrategy[Any]
    judge: Callable[[Any], Outcome]
    traits: Callable[[Any], frozenset[str]]
    known: dict[str, Any]
    per_chunk: int
    first: Sequence[Case] = ()

    def run(self) -> int:
        """The whole of it from the command line; the exit code is 1 where something is silently wrong or raises a raw error."""
        parser = argparse.ArgumentParser(description=self.description.splitlines()[0])
        parser.add_argument("--examples", type=int, default=self.per_chunk, help="how many cases are drawn")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--case", help="judge this one case, as a table prints it, and nothing else")
        parser.add_argument("--no-shrink", action="store_true", help="print broken cases as they were drawn")
        parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
        chosen = parser.parse_args()
        prepare()
        if chosen.case:
            outcome = self.judged(eval(chosen.case, self.known))
            print(f"{KINDS.get(outcome.kind, outcome.kind)}: {outcome.law}\n{outcome.detail}")
            return int(outcome.kind in FAULTS)
        return self._chunks(chosen)

    def _chunks(self, chosen: argparse.Namespace) -> int:
        chosen.out.mkdir(parents=True, exist_ok=True)
        path = chosen.out / f"{self.name}-{chosen.seed}.chunks.jsonl"
        code = fingerprint()
        sizes = [min(self.per_chunk, chosen.examples - at) for at in range(0, chosen.examples, self.per_chunk)]
        done = {c.number: c for c in _read(path) if c.code == code}
        if path.exists() and not done:
            path.unlink()  # of other code: nothing of it is used again
        print(f"{self.name}: seed {chosen.seed}, {chosen.examples} cases in {len(sizes)} chunks, lamina {code} in {HOME}")
        numbered = list(enumerate(sizes)) if not self.first else [(-1, len(self.first)), *enumerate(sizes)]
        known: list[Fault] = []
        chunks: list[Chunk] = []
        for number, size in numbered:
            chunk = done.get(number)
            if chunk is None or chunk.cases != size:
                chunk = self._chunk(number, size, chosen, code, known)
                with path.open("a") as file:
                    file.write(json.dumps(asdict(chunk), ensure_ascii=False) + "\n")
                print(f"chunk {number}: {_counted(chunk)}, {chunk.seconds:.0f} s", flush=True)
            chunks.append(chunk)
            known += [_fault(entry) for entry in chunk.faults if _fault(entry) not in known]
        return self._summary(chosen, code, chunks, known)

    def judged(self, case: Case) -> Outcome:
        """What a case comes to, whatever it raises, and also if it never returns."""
        try:
            with _alarm():
                return self.judge(case)
        except Ended as ended:
            return ended.outcome
        except Invalid as error:
            return Outcome("invalid", str(error))
        except Exception as error:
            return Outcome("raw", f"{type(error).__name__}", f"{first_line(str(error))} @ {where(error)}")

    def _chunk(self, number: int, size: int, chosen: argparse.Namespace, code: str, known: list[Fault]) -> Chunk:
        chunk, began = Chunk(number, size, code), time.perf_counter()
        seen: dict[Case, Outcome] = {}
        current = chosen.out / f"{self.name}-{chosen.seed}.current"

        def look(case: Case) -> Outcome:
            if case not in seen:
                current.write_text(f"{case!r}\n")  # what is found here after a crash is what crashed
                seen[case] = self.judged(case)
            return seen[case]

        def count(case: Case) -> None:
            assume(case not in seen)  # another way to draw the same case is no other case
            assume(look(case).kind != "invalid")

        if number < 0:
            for case in self.first:
                look(case)
        else:
            _explore(self.cases, chosen.seed * 100_003 + number, size, (Phase.generate,), count)
        drawn = dict(seen)
        faults: list[Fault] = []

        def explained(case: Case, outcome: Outcome) -> bool:
            return any(fault.explains(outcome, self.traits(case)) for fault in (*known, *faults))

        for case, outcome in drawn.items():
            if outcome.kind not in (*FAULTS, "needless", "alarm", "warned") or explained(case, outcome):
                continue
            small, what = case, outcome
            if number >= 0 and not chosen.no_shrink:
                small, what = self._shrunk(chosen.seed * 100_003 + number, size, outcome, look, explained) or (case, outcome)
            faults.append(Fault(what.kind, what.law, what.detail, repr(small), tuple(sorted(self.traits(small)))))
            print(f"  {what.kind}: {what.law}\n    {what.detail}\n    {small!r}", flush=True)
        current.unlink(missing_ok=True)
        valid = {case: outcome for case, outcome in drawn.items() if outcome.kind != "invalid"}
        chunk.invalid = len(drawn) - len(valid)
        chunk.outcomes = [[*key, n] for key, n in Counter((o.kind, o.law) for o in valid.values()).items()]
        pairs = Counter((trait, o.kind) for case, o in valid.items() for trait in self.traits(case) or {"nothing odd"})
        chunk.traits = [[*key, n] for key, n in pairs.items()]
        chunk.faults = [asdict(fault) for fault in faults]
        chunk.seconds = round(time.perf_counter() - began, 1)
        return chunk

    def _shrunk(
        self,
        number: int,
        size: int,
        like: Outcome,
        look: Callable[[Case], Outcome],
        explained: Callable[[Case, Outcome], bool],
    ) -> tuple[Case, Outcome] | None:
        """The smallest case found that breaks the same law for a reason not yet known."""
        last: list[tuple[Case, Outcome]] = []
        passed: set[Case] = set()

        def breaks(case: Case) -> None:
            assume(last or case not in passed)  # as they were drawn before; a case that shrinking tries may come twice
            passed.add(case)
            outcome = look(case)
            assume(outcome.kind != "invalid")
            if (outcome.kind, outcome.law) == (like.kind, like.law) and not explained(case, outcome):
                last.append((case, outcome))
                raise AssertionError

        with contextlib.suppress(AssertionError, HypothesisException, ExceptionGroup):
            _explore(self.cases, number, size, (Phase.generate, Phase.shrink), breaks)
        # Hypothesis ends with the smallest one once more.
        return last[-1] if last else None

    def _summary(self, chosen: argparse.Namespace, code: str, chunks: list[Chunk], known: list[Fault]) -> int:
        kinds: Counter[str] = Counter()
        laws: Counter[tuple[str, str]] = Counter()
        traits: dict[str, Counter[str]] = {}
        for chunk in chunks:
            for kind, law, n in chunk.outcomes:
                kinds[kind] += n
                laws[kind, law] += n
            for trait, kind, n in chunk.traits:
                traits.setdefault(trait, Counter())[kind] += n
        total = sum(kinds.values())
        result = {
            "name": self.name,
            "command": f"python benchmarks/faults/{self.name}.py --examples {chosen.examples} --seed {chosen.seed}",
            "seed": chosen.seed,
            "judged": total,
            "drawn": chosen.examples,
            "dense network itself does not run": sum(chunk.invalid for chunk in chunks),
            "outcomes": {kind: kinds[kind] for kind in KINDS},
            "refused": {law: n for (kind, law), n in laws.most_common() if kind == "refused"},
            "broken": {f"{kind}: {law}": n for (kind, law), n in laws.most_common() if kind not in ("right", "refused")},
            "faults": [asdict(fault) for fault in known],
            "traits": {trait: dict(counted) for trait, counted in sorted(traits.items())},
            "seconds": round(sum(chunk.seconds for chunk in chunks)),
            "versions": versions(code),
        }
        path = chosen.out / f"{self.name}-{chosen.seed}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"\n{self.markdown(result)}\n\nwritten to {path}")
        return int(any(kinds[kind] for kind in FAULTS))

    def markdown(self, result: dict[str, Any]) -> str:
        """The summary for a page."""
        total = max(1, result["judged"])
        rows = [[KINDS[kind], f"{n:,}", f"{100 * n / total:.1f} %"] for kind, n in result["outcomes"].items()]
        parts = [table([f"{result['judged']:,} cases, seed {result['seed']}, {result['seconds']} s", "cases", "share"], rows)]
        if result["refused"]:
            parts.append(
                table(["refused, in the first words", "cases"], [[_cell(k), str(n)] for k, n in result["refused"].items()])
            )
        if result["broken"]:
            parts.append(table(["broken", "cases"], [[_cell(k), str(n)] for k, n in result["broken"].items()]))
        if result["faults"]:
            rows = [[f["kind"], _cell(f["law"]), _cell(f["detail"][:160]), f"`{_cell(f['case'])}`"] for f in result["faults"]]
            parts.append(table(["", "law", "seen", "smallest case"], rows))
        return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _counted(chunk: Chunk) -> str:
    kinds: Counter[str] = Counter()
    for kind, _, n in chunk.outcomes:
        kinds[kind] += n
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def _fault(entry: dict[str, Any]) -> Fault:
    return Fault(**entry | {"traits": tuple(entry["traits"])})


def _read(path: Path) -> list[Chunk]:
    return [Chunk(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _explore(
    cases: st.SearchStrategy[Any], seed: int, examples: int, phases: Sequence[Phase], visit: Callable[[Any], None]
) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        phases=phases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )
    @given(cases)
    def each(case: Any) -> None:
        visit(case)

    each()


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"this case takes more than {SECONDS_A_CASE} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def prepare() -> None:
    """One thread, and nothing on the screen but our own."""
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)  # it speaks of every recompilation


def fingerprint() -> str:
    """Of lamina's code and the campaign's: results of other code are not used again."""
    total = hashlib.sha256()
    here = Path(__file__).resolve().parent
    used = [Path(m.__file__).resolve() for m in [*sys.modules.values()] if getattr(m, "__file__", None)]
    for path in [*sorted(HOME.rglob("*.py")), *sorted(path for path in used if path.parent == here)]:
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def versions(code: str) -> dict[str, str]:
    return {
        "lamina": f"{lamina.__version__}, code {code}",
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
