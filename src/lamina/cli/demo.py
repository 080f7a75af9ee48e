"""``lamina demo``: the main job on real input, from a clone of the repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import typer

import lamina

from ..errors import LaminaError
from .command import app

SCRIPT = Path("examples", "demo", "demo.py")


@app.command(
    # The script has options of its own, --help among them.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def demo(context: typer.Context) -> int:
    """Decompose a trained network, score and time it on real images; needs a clone of the repository."""
    script = find(Path(lamina.__file__).parents[2], Path.cwd())
    specification = importlib.util.spec_from_file_location("lamina_demo", script)
    if specification is None or specification.loader is None:
        raise LaminaError(f"{script} cannot be run")
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(script.parent))
    try:
        specification.loader.exec_module(module)
        return int(module.main(context.args))
    except SystemExit as stop:  # the script's own parser: its help, or wrong use
        return stop.code if isinstance(stop.code, int) else 2
    finally:
        sys.path.remove(str(script.parent))


def find(*folders: Path) -> Path:
    """The demo's script under the first of some folders that has it.

    Raises:
        LaminaError: None has; an installed package carries neither the script nor its data.
    """
    for folder in folders:
        if (folder / SCRIPT).is_file():
            return folder / SCRIPT
    raise LaminaError(f"there is no {SCRIPT} here: clone lamina's repository, which carries the data, and run make demo there")
