"""What a layer may be: the forms that group sizes, patterns or measured times offer it, or why it stays dense.

g   group size, the channels of a core that one group reads      w   width, the channels that the core reads and writes
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..choose.by_budget import MOST_FORMS
from ..choose.menu import evenly, worth_measuring
from ..choose.prices import Prices
from ..choose.survey import Survey
from ..errors import RankError, SearchError
from ..forms import BlockTerm, Dense, Form, candidates
from ..layers.build import needs_fit
from ..network.walk import Layer
from ..progress import Display
from ..values import Geometry


def grouped(layer: Geometry, size: int, width: int | None = None) -> BlockTerm:
    """The form of a layer at a group size, the core reading and writing ``width`` channels; by default the layer's inputs."""
    width = layer.in_channels if width is None else width
    return BlockTerm(width, width, width // size)


def checked_sizes(group_sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    """Group sizes in order, each once; refused where they are none, or do not nest."""
    if group_sizes is None:
        return None
    if isinstance(group_sizes, int) or not group_sizes:
        raise SearchError(f"group_sizes is {group_sizes!r}; give several whole numbers, such as (1, 4, 16, 32)")
    for size in group_sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise SearchError(f"group size {size!r} is not a positive whole number")
    sizes = tuple(sorted(set(group_sizes)))
    for small, large in pairwise(sizes):
        if large % small:
            raise RankError(f"group sizes {small} and {large} do not nest: each must divide the next, as 1, 4, 16, 32 do")
    return sizes


def offered_forms(
    layer: Layer, patterns: Mapping[str, Sequence[Form]], sizes: tuple[int, ...] | None, widths: float, dense: bool
) -> tuple[Form, ...] | str:
    """What a layer may be, or why it stays dense."""
    if why := in_no_series(layer):
        return why
    for pattern, forms in patterns.items():
        if fnmatch.fnmatchcase(layer.name, pattern):
            return _checked_forms(layer, forms)
    if sizes is None:
        return "it matches no pattern of forms="
    geometry = layer.geometry
    if geometry.pointwise:
        return "group sizes are for convolutions with a spatial kernel"
    narrow = min(geometry.in_channels, geometry.out_channels)
    # At full width a size must divide it; a narrower width is rounded to what divides.
    fitting = [size for size in sizes if (narrow % size == 0 if widths == 1 else size <= narrow * widths)]
    if len(fitting) < min(2, len(sizes)):
        return f"of the group sizes {', '.join(map(str, sizes))} too few divide its {narrow} channels"
    width = int(narrow * widths) // fitting[-1] * fitting[-1]
    grouped_forms = tuple(grouped(geometry, size, width) for size in fitting)
    return (*grouped_forms, Dense()) if dense else grouped_forms


def in_no_series(layer: Layer) -> str | None:
    """Why no series can stand for a layer; None where one can."""
    if layer.geometry.transposed:
        return "a transposed convolution is in no series"
    if layer.geometry.groups > 1:
        return "a convolution that has groups is in no series"
    return None


def worth_offering(
    survey: Survey, prices: Prices, names: Sequence[str], most: int, shown: Display
) -> dict[str, tuple[Form, ...]]:
    """For each layer, the forms that no other beats in time and loss, evenly from the slowest to the fastest; dense among them.

    They are those that a budget chooses among: ranks of both sides, whole sides, groups of a few sizes. Layers of one kind
    share the times, and each has losses of its own.

    Args:
        survey: The network.
        prices: What forms lose, and the table of times.
        names: The layers.
        most: How many forms a layer has at most.
        shown: Shows how far it is.
    """
    found: dict[str, tuple[Form, ...]] = {}
    for kind in shown.through(list(survey.kinds(names).values()), "timing layers"):
        groups = [form for form in candidates(survey.layers[kind[0]].geometry) if needs_fit(form)]
        forms = list(dict.fromkeys([Dense(), *worth_measuring(*prices.front(kind), MOST_FORMS), *groups]))
        for name in kind:
            times = survey.times(name, survey.seen.uses[name], prices.table)(forms)
            losses = prices.of(name, forms)
            front: list[Form] = []
            for form in sorted(forms, key=lambda f: (losses[f], times[f].median_s)):
                if not front or times[form].median_s < times[front[-1]].median_s:
                    front.append(form)
            found[name] = tuple(evenly(front, most))
    return found


def _checked_forms(layer: Layer, forms: Sequence[Form]) -> tuple[Form, ...]:
    if isinstance(forms, Form) or not all(isinstance(form, Form) for form in forms):
        raise SearchError(f"{layer.title}: its forms are {forms!r}; give a list of forms")
    if not forms:
        raise SearchError(f"{layer.title}: the space is empty: its list of forms is")
    for form in forms:
        try:
            form.check(layer.geometry)
        except RankError as error:
            raise RankError(f"{layer.title}: {error}") from error
    return tuple(dict.fromkeys(forms))
