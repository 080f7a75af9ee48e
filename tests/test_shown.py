"""Results show themselves in a line, and in a notebook as they print."""

from __future__ import annotations

import html

import pytest

import lamina
from lamina.shown import Shown

from .test_plan import a_plan


class Told(Shown):
    def __str__(self) -> str:
        return "first <line>\nsecond"


def test_a_result_is_a_line_with_its_kind_and_as_a_cell_all_that_it_prints() -> None:
    assert repr(Told()) == "<Told: first <line>>" and repr([Told()]) == "[<Told: first <line>>]"
    page = Told()._repr_html_()
    assert html.unescape(page[page.index(">") + 1 : page.rindex("<")]) == str(Told()) and "<line>" not in page


def test_a_long_headline_is_shortened() -> None:
    told = Told()
    told.__class__ = type("Told", (Told,), {"headline": lambda self: "word " * 100})
    assert len(repr(told)) < 120 and repr(told).endswith("…>")


def test_a_plan_says_what_was_asked_and_got() -> None:
    assert repr(a_plan()) == "<Plan: ratio 2, 3 of 4 layers decomposed, ×1.66>"
    assert "whole network" in a_plan()._repr_html_()


RESULTS = (
    *("Plan", "Comparison", "Front", "SearchResult", "Calibration", "TrainingRecord"),
    *("Sensitivities", "FasterResult", "Verification", "Exported", "Refinement"),
)


@pytest.mark.parametrize("kind", RESULTS)
def test_every_result_shows_itself_so(kind: str) -> None:
    shown = getattr(lamina, kind)
    assert shown.__repr__ is Shown.__repr__ and shown._repr_html_ is Shown._repr_html_
