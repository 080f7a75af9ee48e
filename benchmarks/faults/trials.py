"""Changed sources against their tests: what both kinds of mutants share.

All runs in a copy of the repository, so that no checkout is ever changed. One process imports what the tests need from outside
the repository and then forks for every trial: the child imports the changed package, runs the tests that reach the changed
lines, the fastest first, and ends with the first that fails. Which tests reach a line is seen once, on the unchanged sources.
"""

from __future__ import annotations

import ast
import compileall
import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "runs" / "faults"

MEMORY = 16 * 2**30
"""Address space of a trial: a mutant that asks for more fails, instead of the machine."""

BROKEN = 99
"""Exit status of a trial that could not run pytest."""

SECONDS = 10.0
"""What a test may take beyond ten times what it took unchanged."""


@dataclass(frozen=True)
class Change:
    """A file of the repository with another text."""

    file: str
    text: str
    lines: range
    """Those of the old text that are changed."""


@dataclass(frozen=True)
class Outcome:
    killed: bool
    by: str
    """The test that failed, or what else ended the trial; of a survivor how many tests it withstood."""
    seconds: float


@dataclass
class Unchanged:
    """What the tests do on the unchanged sources."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of each test that passes."""
    failing: list[str] = field(default_factory=list)
    """They can kill nothing."""
    reached: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """For each file and line, the numbers of the tests that run it; -1 where it runs on import."""
    modules: list[str] = field(default_factory=list)
    """All that is imported from outside the repository."""


class Trials:
    """Tests of a copy of the repository, and how to try changes against them.

    What the tests do unchanged is kept in ``work``, with whatever else belongs to just these sources and tests.
    """

    def __init__(self, tree: Path, name: str, tests: Iterable[str]) -> None:
        self.tree, self.tests = tree, sorted(set(tests))
        self.work = Path(tempfile.gettempdir()) / f"lamina-{name}-{digest(tree, self.tests)[:16]}"
        kept = self.work / "unchanged.json"
        if not kept.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            note(f"running {len(self.tests)} files or folders of tests on the unchanged sources")
            status, _ = self._forked(lambda report: _run_unchanged(self, report), kept.with_suffix(".new"))
            if status:
                log = (self.work / "log").read_text(errors="replace")
                raise SystemExit(f"the tests do not run on the unchanged sources (status {status}):\n{log[-3000:]}")
            kept.with_suffix(".new").rename(kept)
        self.unchanged = Unchanged(**json.loads(kept.read_text()))
        if self.unchanged.failing:
            note(f"{len(self.unchanged.failing)} tests fail unchanged and are left out: {', '.join(self.unchanged.failing)}")
        for name in self.unchanged.modules:
            # What cannot be imported by itself is left to the trials.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        assert not any(name.partition(".")[0] == "lamina" for name in sys.modules), "the trials' own package must be new"

    def reaching(self, change: Change) -> list[str]:
        """The tests that run a changed line, or all where the line runs on import."""
        ids = list(self.unchanged.seconds)
        seen = self.unchanged.reached.get(change.file, {})
        numbers: set[int] = set()
        old = (self.tree / change.file).read_text()
        for lines in statements_at(old, change.lines):
            if lines is None:
                return ids
            for line in lines:
                numbers.update(seen.get(str(line), ()))
        return ids if -1 in numbers else [ids[number] for number in sorted(numbers)]

    def of(self, change: Change, among: tuple[str, ...] = ("",)) -> Outcome:
        """Whether the tests that reach a change notice it, of those in some files or folders."""
        began = time.monotonic()
        chosen = [test for test in self.reaching(change) if test.startswith(among)]
        if not chosen:
            return Outcome(False, "no test reaches it", 0.0)
        path = self.tree / change.file
        old = path.read_text()
        try:
            path.write_text(change.text)
            status, failed = self._forked(
                lambda report: _run_changed(self, chosen, report), self.work / f"failed-{os.getpid()}"
            )
        finally:
            path.write_text(old)
        took = time.monotonic() - began
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return Outcome(True, "time limit" if name == "SIGALRM" else name, took)
        if os.WEXITSTATUS(status) == BROKEN:
            raise SystemExit((self.work / "log").read_text(errors="replace")[-3000:])
        if os.WEXITSTATUS(status) == 0:
            return Outcome(False, f"{len(chosen)} tests", took)
        return Outcome(True, failed or "import", took)

    def _forked(self, run: Callable[[Path], int], report: Path) -> tuple[int, str]:
        """The wait status of a child that does the work, and what it wrote into its report."""
        report.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = BROKEN
            try:
                os.setsid()
                log = os.open(self.work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.chdir(self.tree)
                sys.path.insert(0, str(self.tree / "src"))
                os.environ["PYTHONPATH"] = str(self.tree / "src")
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                code = run(report)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        # What the tests started and did not end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return status, report.read_text() if report.exists() else ""

    def arguments(self, tests: list[str]) -> list[str]:
        """Pytest's: the same random numbers in every trial."""
        return ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-seed=0", *tests]


class _Watch:
    """A pytest plugin for the unchanged sources: times, outcomes, and which test runs which line."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.seconds, self.failing = coverage, dict[str, float](), set[str]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        began = time.monotonic()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.monotonic() - began
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failing.add(report.nodeid)


def _run_unchanged(trials: Trials, report: Path) -> int:
    import coverage

    watched = coverage.Coverage(data_file=None, config_file=False, include=[f"{trials.tree}/src/*"])
    watched.start()
    watch = _Watch(watched)
    _without_shrinking()
    code = pytest.main(trials.arguments(trials.tests), plugins=[watch])
    watched.stop()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    found = Unchanged(failing=sorted(watch.failing))
    found.seconds = {test: round(s, 4) for test, s in watch.seconds.items() if test not in watch.failing}
    numbers = {test: number for number, test in enumerate(found.seconds)} | {"": -1}
    data = watched.get_data()
    for file in data.measured_files():
        lines = data.contexts_by_lineno(file)
        relative = str(Path(file).relative_to(trials.tree))
        found.reached[relative] = {
            str(line): sorted(numbers[test] for test in tests if test in numbers) for line, tests in lines.items()
        }
    found.modules = [name for name, module in list(sys.modules.items()) if _from_outside(name, module, trials.tree)]
    report.write_text(json.dumps(vars(found)))
    return 0


def _from_outside(name: str, module: object, tree: Path) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    return isinstance(origin, str) and not origin.startswith(str(tree)) and name != "__main__"


class _Chosen:
    """A pytest plugin for a trial: the chosen tests, fastest first, each with a time limit, until one fails."""

    def __init__(self, seconds: dict[str, float], chosen: list[str], report: Path) -> None:
        self.seconds, self.chosen, self.report = seconds, set(chosen), report

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        there = {item.nodeid for item in items}
        # A change that makes other tests of them is tried against all.
        kept = [item for item in items if item.nodeid in self.chosen] if self.chosen <= there else list(items)
        items[:] = sorted(kept, key=lambda item: self.seconds.get(item.nodeid, SECONDS))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS + 10 * self.seconds.get(item.nodeid, SECONDS))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.report.write_text(report.nodeid)


def _run_changed(trials: Trials, chosen: list[str], report: Path) -> int:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    _without_shrinking()
    files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))
    plugin = _Chosen(trials.unchanged.seconds, chosen, report)
    return int(pytest.main(["-x", *trials.arguments(files)], plugins=[plugin]))


def _without_shrinking() -> None:
    """A falsified law kills as it is: to find the smallest example takes longer than all else."""
    from hypothesis import Phase, settings

    settings.register_profile("trials", database=None, deadline=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("trials")


def statements_at(text: str, lines: range) -> Iterator[range | None]:
    """For each line the lines of the smallest statement around it, of one with a body its head; None: it runs on import."""
    tree, written = ast.parse(text), text.splitlines()
    for line in lines:
        if written[line - 1].strip():
            yield _smallest(tree.body, line, inside=False)


def _smallest(body: list[Any], line: int, inside: bool) -> range | None:
    for statement in body:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        if not first <= line <= statement.end_lineno:
            continue
        deeper = inside or isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        parts = [part for name in ("body", "handlers", "orelse", "finalbody", "cases") for part in getattr(statement, name, ())]
        # An `except` or a `case` has no line of its own in Python's grammar, but a body.
        parts = [part for part in parts if hasattr(part, "lineno")] + [
            inner for part in parts if not hasattr(part, "lineno") for inner in part.body
        ]
        if any(part.lineno <= line <= part.end_lineno for part in parts):
            return _smallest(parts, line, deeper)
        last = min([part.lineno - 1 for part in parts if part.lineno > line] + [statement.end_lineno])
        return range(first, last + 1) if inside else None
    return None


def settle() -> None:
    """Starts this process again with one thread and with sets in the same order each time, unless it is so already."""
    wanted = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of what git knows or would take, as it stands in the checkout; byte code is checked by content, not by time."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    )
    with tempfile.TemporaryDirectory(prefix="lamina-copy-") as folder:
        tree = Path(folder)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        # A changed file may be as long as the old one and written in the same second.
        compileall.compile_dir(tree / "src", quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        yield tree


def digest(tree: Path, tests: Iterable[str]) -> str:
    """Of all that decides what a trial comes to: the package, the tests, and how they are run."""
    total = hashlib.sha256()
    for part in ("src", "tests/conftest.py", "pyproject.toml", "benchmarks/faults/trials.py", *tests):
        for path in python_files(tree / part):
            total.update(f"{path.relative_to(tree)}\0{path.read_text()}\0".encode())
    return total.hexdigest()


def python_files(path: Path) -> list[Path]:
    """A file, or all Python files of a folder."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
