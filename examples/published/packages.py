"""Where a package lies that carries published weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def folder_of(package: str) -> Path:
    """Its folder; ends the program where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: see the head of {Path(sys.argv[0]).name}")
    return Path(found.submodule_search_locations[0])
