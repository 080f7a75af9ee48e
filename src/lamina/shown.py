"""How results show themselves where nobody prints them: a line in a debugger or a list, all of it in a notebook."""

from __future__ import annotations

import html
import textwrap

_LONGEST = 100


class Shown:
    """A result that prints. Its ``repr`` is one line; a notebook shows what it prints."""

    __slots__ = ()

    def headline(self) -> str:
        """What is most worth knowing of it, in a line: the first that it prints."""
        return str(self).split("\n", 1)[0]

    def __repr__(self) -> str:
        """``<Comparison: ×1.50 (95 % between 1.49 and 1.51): …>``."""
        return f"<{type(self).__name__}: {textwrap.shorten(self.headline(), _LONGEST, placeholder=' …')}>"

    def _repr_html_(self) -> str:
        """As it prints, in letters of one width."""
        return f'<pre style="white-space: pre-wrap; line-height: 1.3">{html.escape(str(self))}</pre>'
