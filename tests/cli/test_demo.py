"""`lamina demo`: the clone's script with its own options, or a line that says where to get it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lamina

SCRIPT = """
import beside
def main(argv):
    print(beside.word, argv)
    if "--help" in argv:
        raise SystemExit(0)
    return len(argv)
"""


@pytest.fixture
def clone(here: Path, monkeypatch: pytest.MonkeyPatch):
    """A clone in the current folder; the installed package carries no demo."""
    monkeypatch.setattr(lamina, "__file__", str(here / "site-packages" / "somewhere" / "lamina" / "__init__.py"))
    folder = here / "examples" / "demo"
    folder.mkdir(parents=True)
    (folder / "demo.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("word = 'ran'")
    yield folder
    sys.modules.pop("beside", None)


def test_the_script_gets_the_words_and_its_code_is_the_exit_code(run, clone: Path) -> None:
    before = list(sys.path)
    ran = run("demo", "--speedups", "1.5", "2")
    assert (ran.code, ran.out) == (3, "ran ['--speedups', '1.5', '2']\n")
    assert sys.path == before
    assert run("demo", "--help").code == 0


def test_a_package_without_a_clone_says_where_the_demo_runs(run, clone: Path) -> None:
    (clone / "demo.py").unlink()
    assert "clone lamina's repository" in run("demo").complaint(1)


def test_the_demo_of_this_clone_is_found() -> None:
    from lamina.cli.demo import find

    assert find(Path(lamina.__file__).parents[2]).name == "demo.py"
