"""``python -m lamina``: the command line."""

from .cli import main

raise SystemExit(main())
