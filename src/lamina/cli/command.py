"""What makes a function a command: its options, and how its result is printed."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, final, get_type_hints

import typer
from pydantic_core import to_json

from ..errors import LaminaError
from .colours import say

app = typer.Typer(
    help="Makes a trained PyTorch network faster by decomposing its layers, and proves the gain on this machine.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXAMPLE = "Example: "
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


@final
@dataclass(frozen=True, slots=True)
class Failure:
    """A result to be printed, and why the command has failed all the same."""

    result: Any
    why: str


@final
@dataclass(frozen=True, slots=True)
class Told:
    """A result, and how it prints in so many columns."""

    result: Any
    text: Callable[[int], str]


def columns() -> int:
    """As wide as the terminal; 80 where stdout is none."""
    return max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else 80


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"lamina {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; also after the command.")] = False,
) -> None:
    # `main` has read --debug by now; it stands here for the help.
    pass


def command(example: str, group: typer.Typer = app) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a command of its name, with ``--json``; what it returns is printed.

    A parameter that is a dataclass stands for all its fields, an option each. While the function works, stdout is stderr: what
    a user's network prints, and the progress bar, stay out of the result.

    Args:
        example: A use of it, which stands below its help. Those of all commands follow one another, and the tests run them.
        group: What it is a command of.
    """

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        options, call = _spread(function)

        @functools.wraps(function)
        def run(*, json: bool, **given: Any) -> None:
            with _stdout_as_stderr():
                result = call(**given)
            value = result.result if isinstance(result, Failure) else result
            value, told = (value.result, value.text) if isinstance(value, Told) else (value, None)
            if json:
                print(to_json(value, indent=1, inf_nan_mode="null").decode())
            else:
                say(told(columns()) if told else value)
            if isinstance(result, Failure):
                raise LaminaError(result.why)

        options.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Json))
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in options}
        group.command(name=function.__name__.strip("_"), epilog=f"{_EXAMPLE}{example}")(run)
        return function

    return named


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """What is printed meanwhile goes to stderr, also what compiled libraries print, as the solver of a budget does."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        libc.fflush(None)  # it has a buffer of its own
        os.dup2(kept, 1)
        os.close(kept)


def _spread(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], Callable[..., Any]]:
    """A function's options as typer is to see them, and a call that puts the dataclasses among them together again."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    groups.pop("return", None)
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        inner = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            options.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=inner[field.name]
                )
            )

    def call(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        return function(**given)

    return options, call
