"""Equal for networks of one structure, whatever their values; different for any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lamina.network.fingerprint import fingerprint


def base() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "other weights": lambda _: base(),
    "another dtype": lambda model: model.double(),
    "another device": lambda model: model.to("meta"),
    "another layout": lambda model: model.to(memory_format=torch.channels_last),
    "another mode": lambda model: model.eval(),
    "frozen": lambda model: model.requires_grad_(False),
}
OTHER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a layer more": lambda model: model.append(nn.Linear(2, 2)),  # type: ignore[attr-defined]
    "another type": lambda model: model.__setitem__(2, nn.Identity()) or model,  # type: ignore[operator]
    "another shape": lambda model: model.__setitem__(3, nn.Linear(16, 3)) or model,  # type: ignore[operator]
    "no bias": lambda model: model.__setitem__(3, nn.Linear(16, 2, bias=False)) or model,  # type: ignore[operator]
    "another number of channels": lambda model: model.__setitem__(3, nn.Linear(2, 16)) or model,  # type: ignore[operator]
    "a type of the same shapes": lambda model: model.__setitem__(1, nn.GroupNorm(2, 4)) or model,  # type: ignore[operator]
    "another order": lambda model: nn.Sequential(model[0], model[2], model[1], model[3]),  # type: ignore[index]
    "a buffer more": lambda model: model.register_buffer("scale", torch.ones(1)) or model,  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_values_do_not_matter(change: Callable[[nn.Module], nn.Module]) -> None:
    assert fingerprint(change(base())) == fingerprint(base())


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_structure_does(change: Callable[[nn.Module], nn.Module]) -> None:
    assert fingerprint(change(base())) != fingerprint(base())


def test_what_a_network_remembers_of_its_last_input_is_not_its_structure() -> None:
    """Buffers that are not saved are caches: masks and position tables that grow with the input."""
    used = base()
    used.register_buffer("mask", torch.zeros(7, 7), persistent=False)
    assert fingerprint(used) == fingerprint(base())


def test_a_lazy_network_has_one_before_and_another_after_its_first_run() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4))
    before = fingerprint(lazy)
    lazy(torch.randn(2, 3))
    assert fingerprint(lazy) != before


def pair(**names: nn.Module) -> nn.Module:
    return nn.ModuleDict(names)


def alike() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)


def test_names_count() -> None:
    a, b = alike()
    assert fingerprint(pair(a=a, b=b)) != fingerprint(pair(a=a, c=b))


def test_a_module_under_two_names_is_another_structure_than_two_modules() -> None:
    a, b = alike()
    networks = (pair(a=a, b=b), pair(a=a, b=a), pair(a=a), pair(b=a))
    assert len({fingerprint(model) for model in networks}) == 4


def tied_by_identity() -> nn.Module:
    a, b = alike()
    b.weight = a.weight
    return pair(a=a, b=b)


def tied_by_storage() -> nn.Module:
    a, b = alike()
    b.weight = nn.Parameter(a.weight.detach())
    return pair(a=a, b=b)


def tied_in_part() -> nn.Module:
    whole = torch.randn(6, 4)
    a, b = alike()
    a.weight, b.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
    return pair(a=a, b=b)


def tied_to_a_buffer() -> nn.Module:
    a, b = alike()
    model = pair(a=a, b=b)
    model.register_buffer("weight", a.weight.detach())
    return model


def with_a_buffer() -> nn.Module:
    model = pair(**dict(zip("ab", alike(), strict=True)))
    model.register_buffer("weight", torch.zeros(4, 4))
    return model


@pytest.mark.parametrize("tied", [tied_by_identity, tied_by_storage, tied_in_part])
def test_what_shares_memory_is_another_structure_than_what_does_not(tied: Callable[[], nn.Module]) -> None:
    """Names and shapes are the same; loaded one onto the other, the last value would win."""
    assert fingerprint(tied()) != fingerprint(pair(**dict(zip("ab", alike(), strict=True))))
    assert fingerprint(tied()) == fingerprint(tied())
    assert fingerprint(tied_to_a_buffer()) != fingerprint(with_a_buffer())


def test_which_ones_share_memory_counts() -> None:
    def three(one: int, other: int) -> nn.Module:
        layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
        layers[other].weight = layers[one].weight
        return nn.Sequential(*layers)

    assert len({fingerprint(three(*ends)) for ends in ((0, 1), (0, 2), (1, 2))}) == 3


def test_a_network_without_values_has_its_ties_too() -> None:
    with torch.device("meta"):
        empty = tied_by_identity()
    assert fingerprint(empty) == fingerprint(tied_by_identity())


def test_a_tie_counts_however_it_is_held() -> None:
    """By one tensor or by two on the same bytes: loading writes into both alike."""
    assert fingerprint(tied_by_identity()) == fingerprint(tied_by_storage())


def test_the_order_in_which_ties_lie_in_memory_does_not_count() -> None:
    def two(first: bool) -> nn.Module:
        layers = [nn.Linear(4, 4, bias=False) for _ in range(4)]
        whole = torch.randn(8, 4)
        for number, rows in enumerate((whole[:4], whole[4:]) if first else (whole[4:], whole[:4])):
            layers[number].weight, layers[number + 2].weight = nn.Parameter(rows), nn.Parameter(rows)
        return nn.Sequential(*layers)

    assert fingerprint(two(True)) == fingerprint(two(False))


def test_what_is_not_saved_is_left_out_of_ties_too() -> None:
    model = nn.Linear(4, 4, bias=False)
    before = fingerprint(model)
    model.register_buffer("table", model.weight.detach(), persistent=False)
    assert fingerprint(model) == before
    model.register_buffer("saved", model.weight.detach())
    assert fingerprint(model) != before


def test_others_may_be_read_in_the_place_of_modules() -> None:
    """As if they had been exchanged, under all their names."""
    old, new = nn.Linear(16, 2), nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 2))
    model = nn.ModuleDict({"a": nn.Sequential(old, nn.ReLU()), "b": old})
    wanted = nn.ModuleDict({"a": nn.Sequential(new, nn.ReLU()), "b": new})
    before = fingerprint(model)
    assert fingerprint(model, {old: new}) == fingerprint(wanted) != before
    assert fingerprint(wanted, {new: old}) == before == fingerprint(model, {})


def test_the_root_may_be_exchanged_too() -> None:
    old, new = nn.Linear(4, 2), nn.Linear(4, 3)
    assert fingerprint(old, {old: new}) == fingerprint(new)


def test_no_module_in_a_place_is_as_if_there_were_no_place() -> None:
    model, other = base(), base()
    other.register_module("nothing", None)
    assert fingerprint(other) == fingerprint(model)


def test_a_parameter_that_is_none_is_none() -> None:
    model = nn.BatchNorm1d(4, affine=False)
    assert fingerprint(model) != fingerprint(nn.BatchNorm1d(4))


def test_a_fingerprint_is_the_same_tomorrow() -> None:
    """Saved plans hold it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    assert fingerprint(model) == "b0fd2e3615ee0f8217ae49ad7dcde22881d00e615b788c2e4e5760907a75a2e6"
    assert fingerprint(nn.LazyLinear(4)) == "ed5c9613c61acf1ffac76c2972782daa5d3a763fd454d28c782e06e26bcc778e"


def test_where_a_module_stands_counts() -> None:
    inside = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Identity()))
    beside = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Identity())
    assert fingerprint(inside) != fingerprint(beside)
