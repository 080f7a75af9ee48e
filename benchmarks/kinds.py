"""The kinds of forms that a budget chooses among, and how to let it choose among one kind alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import lamina
from lamina.choose import by_budget, planner, prices
from lamina.forms import Form, candidates
from lamina.layers.build import needs_fit
from lamina.supernet import offer
from lamina.values import Geometry


def pairs_alone(form: Form) -> bool:
    """Both ranks, one group: Tucker-2."""
    return form == lamina.Dense() or (
        isinstance(form, lamina.BlockTerm) and bool(form.rank_in and form.rank_out) and form.groups == 1
    )


def whole_alone(form: Form) -> bool:
    """One side left whole."""
    return form == lamina.Dense() or (isinstance(form, lamina.BlockTerm) and not (form.rank_in and form.rank_out))


def groups_alone(form: Form) -> bool:
    """Block terms in groups."""
    return form == lamina.Dense() or needs_fit(form)


def all_kinds(form: Form) -> bool:
    """Any."""
    return True


KINDS: dict[str, Callable[[Form], bool]] = {
    "mixed": all_kinds,
    "both ranks (Tucker-2)": pairs_alone,
    "one side whole": whole_alone,
    "groups": groups_alone,
}


@contextmanager
def only(kind: Callable[[Form], bool]) -> Iterator[None]:
    """Let budgets and supernets offer forms of one kind alone, beside staying dense."""
    offered: Callable[[Geometry], tuple[Form, ...]] = lambda layer: tuple(filter(kind, candidates(layer)))  # noqa: E731
    with ExitStack() as patched:
        for room in (by_budget, prices, offer):
            patched.enter_context(mock.patch.object(room, "candidates", offered))
        # Else the answer that is remembered of all kinds would answer.
        patched.enter_context(mock.patch.object(planner, "_METHOD", f"{planner._METHOD}, {kind.__name__}"))
        yield
