"""A whole state by the network's own code, held against what was given; all or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from holders import snapshot
from torch import Tensor, nn

from lamina import ArtifactError
from lamina.network.memory import place
from lamina.network.state import state_of, taken


class Halved(nn.Module):
    """Stores twice its values: a representation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(3))
        self.table = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "doubled"] = 2 * self.values.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        self.values.data.copy_(state_dict[prefix + "doubled"] / 2)
        _[2].clear()  # nothing is missing
        _[3].clear()


class Extra(nn.Module):
    """Keeps a tensor or something else by ``get_extra_state``."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def derived() -> nn.Module:
    """A table that follows from the weight, remade after loading."""
    model = nn.Linear(3, 3)
    model.table = model.weight.detach().exp()
    model.register_load_state_dict_post_hook(lambda module, _: setattr(module, "table", module.weight.detach().exp()))
    return model


def detached_by_hook() -> nn.Module:
    """What it saves are clones."""
    model = nn.Linear(3, 3)
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({prefix + "weight": state[prefix + "weight"].clone()})
    )
    return model


def renaming() -> nn.Module:
    """Saves under another name and finds it again."""
    model = nn.Linear(3, 3)
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({prefix + "w": state.pop(prefix + "weight")}) or None
    )
    model.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.update({prefix + "weight": state.pop(prefix + "w")}) or None
    )
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def odd_buffers() -> nn.Module:
    model = nn.BatchNorm1d(3)
    model.register_buffer("expanded", torch.randn(1, 3).expand(4, 3))
    model.register_buffer("conjugated", torch.randn(3, dtype=torch.complex64).conj())
    model.register_buffer("flags", torch.rand(5) > 0.5)
    model.register_buffer("coarse", torch.randn(3).half())
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("not_saved", torch.zeros(2), persistent=False)
    return model


def of_inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def views() -> nn.Module:
    """A buffer that is a part of a parameter, and two that overlap."""
    model = nn.Linear(3, 3)
    model.register_buffer("row", model.weight.detach()[1])
    whole = torch.randn(6)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[2:4])
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain layers": lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)),
    "a representation of its own": lambda: nn.Sequential(Halved(), nn.Linear(3, 3)),
    "a tensor as extra state": lambda: nn.Sequential(Extra(torch.randn(3)), nn.Linear(3, 3)),
    "a table derived by a hook": derived,
    "state that a hook cloned": detached_by_hook,
    "state that a hook renamed": renaming,
    "tied parameters": tied,
    "odd buffers": odd_buffers,
    "made in inference mode": of_inference,
    "views of one another": views,
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def given(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state of another network of the kind, as a file has it."""
    torch.manual_seed(5)
    return {name: value.detach().clone() for name, value in state_of(make()).items()}


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    with taken(model, state, "here"):
        pass


def everything(model: nn.Module) -> dict[str, bytes]:
    """All tensors of a network's modules, plain attributes too, by value."""
    return {
        f"{name}.{key}": value.detach().resolve_conj().numpy().tobytes()
        for name, module in model.named_modules()
        for table in (module._parameters, module._buffers, vars(module))
        for key, value in table.items()
        if isinstance(value, Tensor)
    }


@networks
def test_what_is_loaded_is_what_the_networks_own_code_makes_of_it(make: Callable[[], nn.Module]) -> None:
    state = given(make)
    torch.manual_seed(5)
    wanted = everything(make())
    torch.manual_seed(6)
    model = make()
    assert everything(model) != wanted
    load(model, state)
    assert everything(model) == wanted


@networks
def test_names_and_objects_stay_and_so_do_ties(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False) if not p.is_inference()]
    shapes = [(n, p.shape, p.stride()) for n, p in model.named_parameters()]
    load(model, given(make))
    if make is not of_inference:
        assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)] == before
    assert [(n, p.shape, p.stride()) for n, p in model.named_parameters()] == shapes


def test_tensors_that_view_one_another_do_so_afterwards() -> None:
    model = views()
    load(model, given(views))
    row, weight, whole, part = map(place, (model.row, model.weight, model.whole, model.part))
    assert row and weight and whole and part
    assert (row.start - weight.start, row.end - weight.start) == (12, 24) and (part.start - whole.start) == 8


def test_a_network_made_in_inference_mode_can_be_trained_after_loading() -> None:
    model = of_inference()
    load(model, given(of_inference))
    model(torch.randn(4, 3)).sum().backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None and not p.is_inference() for p in model.parameters())
    assert not any(b.is_inference() for b in model.buffers())


def test_what_was_frozen_when_made_in_inference_mode_stays_frozen() -> None:
    model = of_inference()
    with torch.inference_mode():
        model[0].weight.requires_grad_(False)
    load(model, given(of_inference))
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


# All or nothing.


def whole(model: nn.Module) -> Any:
    """What must be as before: objects, storages, values and attributes."""
    return snapshot(model) if not any(b.is_conj() for b in model.buffers()) else everything(model)


@networks
def test_an_error_in_the_context_brings_everything_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    before, values = whole(model), everything(model)
    with pytest.raises(KeyboardInterrupt), taken(model, given(make), "here"):
        assert everything(model) != values
        raise KeyboardInterrupt
    assert whole(model) == before and everything(model) == values


def test_attributes_that_the_networks_code_set_or_removed_are_brought_back() -> None:
    model = derived()
    table = model.table
    model.register_load_state_dict_post_hook(lambda module, _: setattr(module, "more", 1))
    model.register_load_state_dict_post_hook(lambda module, _: module.register_buffer("late", torch.zeros(1), persistent=False))
    with pytest.raises(ZeroDivisionError), taken(model, given(derived), "here"):
        raise ZeroDivisionError
    assert model.table is table and not hasattr(model, "more") and "late" not in model._buffers


def test_the_networks_own_code_may_fail_half_way() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].register_load_state_dict_pre_hook(lambda *_: [].pop())
    before = snapshot(model)
    with pytest.raises(ArtifactError, match=r"^here: the network does not take its state: pop from empty list$"):
        load(model, given(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    assert snapshot(model) == before


def test_what_the_networks_own_code_changes_is_found() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].register_load_state_dict_post_hook(lambda module, _: nn.init.constant_(module.bias, 7.0) is None or None)
    before = snapshot(model)
    with pytest.raises(ArtifactError, match=r"^here: 1\.bias is not what was loaded: the network's own code changed it$"):
        load(model, given(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    assert snapshot(model) == before


def test_a_tensor_that_the_networks_own_code_made_while_loading_is_found() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_load_state_dict_post_hook(lambda module, _: module.register_buffer("late", torch.zeros(1)))
    before = snapshot(model)
    with pytest.raises(ArtifactError, match=r"^here: 0\.late is not what was loaded"):
        load(model, given(lambda: nn.Sequential(nn.Linear(3, 3))))
    assert snapshot(model) == before


def test_a_module_that_takes_nothing_and_says_nothing_is_found() -> None:
    class Deaf(nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            pass

    model = Deaf(3, 3)
    with pytest.raises(ArtifactError, match=r"^here: weight is not what was loaded"):
        load(model, given(lambda: nn.Linear(3, 3)))


def test_two_values_for_one_tied_parameter_are_refused() -> None:
    """The last one would win."""
    model = tied()
    before = snapshot(model)
    with pytest.raises(ArtifactError, match=r"^here: 0\.weight is not what was loaded"):
        load(model, given(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    assert snapshot(model) == before


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.LayerNorm])
def test_nan_is_equal_to_the_same_nan(make: Callable[[int], nn.Module]) -> None:
    state = given(lambda: make(3))
    state["weight"][1] = float("nan")
    model = make(3)
    load(model, state)
    assert model.weight.isnan().tolist() == [False, True, False]


def test_zero_of_another_sign_is_loaded_as_it_is() -> None:
    model = nn.LayerNorm(2)
    load(model, {"weight": torch.tensor([-0.0, 0.0]), "bias": torch.zeros(2)})
    assert torch.signbit(model.weight).tolist() == [True, False]


# What does not fit.

MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda s: s.pop("bias"), "here: bias is missing"),
    "missing, with another near": (lambda s: s.update({"biass": s.pop("bias")}), "here: bias is missing; did you mean biass?"),
    "of another shape": (
        lambda s: s.update(weight=torch.zeros(3, 4)),
        "here: weight has shape (3, 4), this network wants (3, 3)",
    ),
    "of another dtype": (
        lambda s: s.update(weight=s["weight"].double()),
        "here: weight is torch.float64, this network's is torch.float32: convert the base model first",
    ),
    "left over": (lambda s: s.update(more=torch.zeros(1)), "here: more has no place in this network"),
}


@pytest.mark.parametrize(("spoil", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_changed(spoil: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    model = nn.Linear(3, 3)
    before, state = snapshot(model), given(lambda: nn.Linear(3, 3))
    spoil(state)
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load(model, state)
    assert snapshot(model) == before


def test_the_same_number_of_values_in_another_shape_does_not_fit() -> None:
    with pytest.raises(ArtifactError, match=r"has shape \(1, 3, 3\)"):
        load(nn.Linear(3, 3, bias=False), {"weight": torch.zeros(1, 3, 3)})


@pytest.mark.parametrize("extra", [{"a": 1}, [torch.zeros(1)], 3, None], ids=repr)
def test_a_state_that_is_no_tensor_is_refused_by_name(extra: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Extra(extra))
    with pytest.raises(
        ArtifactError, match=rf"^1\._extra_state: the network keeps a {type(extra).__name__} there; safetensors"
    ):
        state_of(model)


def test_the_state_that_is_given_is_only_read() -> None:
    state = given(renaming)
    names, values = list(state), {name: value.clone() for name, value in state.items()}
    load(renaming(), state)
    assert list(state) == names and all(torch.equal(state[name], values[name]) for name in names)


# Modules that were just made.


def test_fresh_modules_take_their_state_and_keep_their_storage() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    at = [p.data_ptr() for p in model.parameters()]
    state = given(lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))))
    with taken(model, state, "here", [model[1]]):
        pass
    moved = [p.data_ptr() != before for p, before in zip(model.parameters(), at, strict=True)]
    assert moved == [True, True, False, True]  # of a fresh module only its bias was the network's before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_all_but_the_fresh_modules_is_brought_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = snapshot(model[0])
    with pytest.raises(KeyError), taken(model, given(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), "", [model[1]]):
        raise KeyError
    assert snapshot(model[0]) == before


def test_whoever_reads_a_tensor_meanwhile_has_old_values_or_new_ones() -> None:
    """The old storage is never written into: a view of it goes on as it was."""
    model = nn.Linear(3, 3)
    view, before = model.weight.detach(), model.weight.detach().clone()
    load(model, given(lambda: nn.Linear(3, 3)))
    assert torch.equal(view, before) and not torch.equal(model.weight, before)


def test_tensors_that_share_memory_in_storages_of_their_own_are_loaded() -> None:
    # As NumPy's arrays give them: two storages that overlap, so that neither knows of the other.
    def made(start: float) -> nn.Module:
        values = np.arange(start, start + 8, dtype=np.float32)
        model = nn.Module()
        model.register_buffer("a", torch.from_numpy(values[:6]))
        model.register_buffer("b", torch.from_numpy(values[2:]))
        return model

    model, state = made(0), given(lambda: made(10))
    load(model, state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
