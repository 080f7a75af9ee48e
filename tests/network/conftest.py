"""Lets the tests of this folder import its helpers."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that what other folders of tests import by a name that is here too is theirs.
sys.path.append(str(Path(__file__).parent))
