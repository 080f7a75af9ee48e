"""The command line: thin doors to the library, one file a command.

A new command is a function in a file of its own, decorated with `command.command`, and that file's name in `_COMMANDS`. It
takes its options whole (`options.Conditions`; `options.destination` for what it writes), calls the library, and returns a
value, which is printed as text or, with ``--json``, as JSON.

Exit codes: 0 done, 1 the work failed, 2 wrong use, 130 interrupted. A failure is one line on stderr; ``--debug`` adds the
traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from ..errors import LaminaError
from .colours import say
from .command import app

_COMMANDS = (
    *("calibrate", "sensitivities", "staircase", "plan", "pareto", "show", "apply", "bench", "report", "refine", "finetune"),
    *("supernet", "train", "search", "extract"),
    *("verify", "export", "measure", "cache", "demo"),
)
"""The files that hold the commands, in the order of the help."""

_INTERRUPTED = 130

_GOES_ON = "; the times of layers taken so far are kept, and the same command goes on from there"
_KEPT = {"plan": _GOES_ON, "pareto": _GOES_ON, "sensitivities": _GOES_ON, "staircase": _GOES_ON, "measure": _GOES_ON}
"""What an interrupted command leaves behind, by its name."""

for _name in _COMMANDS:
    importlib.import_module(f".{_name}", __name__)
app.registered_commands.sort(key=lambda each: _COMMANDS.index(each.name or "demo"))  # some import others

# typer carries its own copy of click and of its errors exports only this one.
_WrongUse: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after ``lamina``; by default those of this process.

    Returns:
        The exit code.
    """
    _keep_stdout()
    words = list(sys.argv[1:] if argv is None else argv)
    # Taken out here, so that it may stand anywhere; what follows a lone -- is not ours.
    ours = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:ours]
    words = [word for word in words[:ours] if word != "--debug"] + words[ours:]
    with _plain_warnings():
        try:
            return _run(words)
        except _WrongUse as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "lamina"
            message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
            return _complain(f"{path}: {message}; see {path} --help", 2, debug)
        except LaminaError as error:
            return _complain(f"error: {error}", 1, debug)
        except (KeyboardInterrupt, typer.Abort):
            return _complain(f"interrupted{_KEPT.get(words[0], '') if words else ''}", _INTERRUPTED, debug)
        except BrokenPipeError:
            # Whoever read our output has gone. Python would complain once more when it flushes stdout on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            return _complain(f"error: {error}", 1, debug)
        except Exception as error:
            return _complain(f"unexpected: {type(error).__name__}: {error}; run again with --debug", 1, debug)


def _run(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no → shows ? and does not stop the work
    code = app(args=words, prog_name="lamina", standalone_mode=False)
    sys.stdout.flush()
    if code == _INTERRUPTED:  # typer makes this of it, and says nothing
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _keep_stdout() -> None:
    """Keep the process's stdout for what the commands print; what compiled code prints there, as HiGHS does, goes to stderr."""
    try:
        if sys.stdout.fileno() != 1:  # kept already, or somebody else's
            return
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):  # no such stream
        return
    old = sys.stdout
    sys.stdout = open(kept, "w", encoding=old.encoding, errors=old.errors, buffering=1 if old.line_buffering else -1)  # noqa: SIM115


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(" ".join(message.split("\n")), beside=True)
    return code


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show each warning in one line, without the place in the code."""

    def show(message: Warning | str, *_: Any) -> None:
        say(f"warning: {' '.join(str(message).split())}", beside=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
