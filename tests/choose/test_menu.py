"""Which forms are worth a measurement, and which options a choice."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from lamina import BlockTerm, Dense, LowRank
from lamina.choose.menu import Option, undominated, worth_measuring
from lamina.forms import Form


def forms(ranks: list[int]) -> list[Form]:
    return [LowRank(rank) for rank in ranks]


def test_of_forms_with_the_same_kernels_those_are_measured_that_no_other_beats_in_size_and_loss() -> None:
    a, b, c = BlockTerm(8, 8), BlockTerm(16, 4), BlockTerm(4, 32)
    sizes: dict[Form, int] = {a: 10, b: 12, c: 9, BlockTerm(8, None): 20}
    lost: dict[Form, float] = {a: 0.5, b: 0.6, c: 0.7, BlockTerm(8, None): 0.9}
    assert set(worth_measuring(sizes, lost, 20)) == {a, c, BlockTerm(8, None)}


@given(st.lists(st.integers(1, 200), min_size=1, unique=True), st.integers(2, 20))
def test_they_are_thinned_out_evenly_and_the_ends_stay(ranks: list[int], most: int) -> None:
    sizes: dict[Form, int] = {form: rank for form, rank in zip(forms(ranks), ranks, strict=True)}
    lost = {form: 1 / size for form, size in sizes.items()}
    found = worth_measuring(sizes, lost, most)
    assert len(found) == min(most, len(ranks)) == len(set(found))
    assert {LowRank(min(ranks)), LowRank(max(ranks))} <= set(found)


OPTIONS = st.lists(
    st.builds(
        Option,
        st.integers(1, 50).map(LowRank),
        st.sampled_from([0.1, 0.2, 0.3]),
        st.integers(1, 3),
        st.integers(1, 3),
        st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([1.0, 2.0, 3.0])),
    )
)


@settings(deadline=None)
@given(OPTIONS)
def test_what_goes_is_beaten_by_what_stays_and_the_first_option_always_stays(others: list[Option]) -> None:
    first = Option(Dense(), 0.0, 9, 9, (9.0, 9.0))
    kept = undominated([first, *others])
    assert kept[0] == first

    def beats(a: Option, b: Option) -> bool:
        return (
            a.loss <= b.loss
            and a.parameters <= b.parameters
            and a.macs <= b.macs
            and all(x <= y for x, y in zip(a.seconds, b.seconds, strict=True))
        )

    assert all(any(beats(option, other) for option in kept) for other in others)
    rest = kept[1:]
    assert not any(beats(a, b) for a in rest for b in rest if a is not b and a != b)
