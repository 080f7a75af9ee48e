"""Staircase: what one layer takes in each of its forms. A value, drawn by Matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ..figures import lines_figure
from ..forms import Dense, Form
from ..shown import Shown
from ..values import Geometry


@final
@dataclass(frozen=True, slots=True, repr=False)
class Staircase(Shown):
    """Times of one layer's forms on one input, each taken in turn with the dense layer.

    Attributes:
        geometry: The layer's.
        dense_s: The dense layer's seconds.
        shares: Form → its time as a share of that.
    """

    geometry: Geometry
    dense_s: float
    shares: Mapping[Form, float]

    def weights(self, form: Form) -> float:
        """The parameters of a form as a share of the dense layer's."""
        return form.parameters(self.geometry) / Dense().parameters(self.geometry)

    @property
    def kinds(self) -> dict[str, list[Form]]:
        """The forms by their kind, each kind from the smallest form to the largest."""
        kinds: dict[str, list[Form]] = {}
        for form in sorted(self.shares, key=lambda form: (self.weights(form), self.shares[form])):
            kinds.setdefault(form.kind, []).append(form)
        return dict(sorted(kinds.items()))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Time against weights, a line for each kind of form, as a Matplotlib figure.

        Args:
            path: Where it is written too, if anywhere.

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        lines = {
            kind: [(100 * self.weights(form), 100 * self.shares[form]) for form in forms] for kind, forms in self.kinds.items()
        }
        across, up = "weights, % of the dense layer's", "time, % of the dense layer's"
        return lines_figure(lines, across=across, up=up, level=("the dense layer", 100.0), path=path)

    def __str__(self) -> str:
        """What the layer is, and a line a form, from the smallest to the largest of each kind."""
        lines = [f"{self.geometry}: {self.dense_s * 1e3:.3g} ms dense, {len(self.shares)} forms"]
        for kind, forms in self.kinds.items():
            lines.append(kind)
            lines += [
                f"  {form!s:24}{self.weights(form):6.1%} of the weights {self.shares[form]:6.1%} of the time" for form in forms
            ]
        return "\n".join(lines)
