"""Scales between factors change nothing but what int8 loses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.forms import BlockTerm, Form, LowRank, Separable
from lamina.layers.build import random
from lamina.layers.gauge import balance
from lamina.network.walk import walk

FORMS: dict[str, tuple[Callable[[], nn.Module], Form, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), LowRank(4), (5, 8)),
    "linear of tokens": (lambda: nn.Linear(8, 6), LowRank(4), (2, 3, 8)),
    "1×1": (lambda: nn.Conv2d(8, 6, 1), LowRank(4), (2, 8, 5, 5)),
    "Tucker-2": (lambda: nn.Conv2d(8, 6, 3), BlockTerm(4, 3), (2, 8, 6, 6)),
    "groups": (lambda: nn.Conv2d(8, 8, 3), BlockTerm(6, 4, 2), (2, 8, 6, 6)),
    "one side whole": (lambda: nn.Conv2d(8, 6, 3), BlockTerm(None, 3), (2, 8, 6, 6)),
    "separable": (lambda: nn.Conv2d(8, 6, 3), Separable(4), (2, 8, 6, 6)),
    "1d": (lambda: nn.Conv1d(8, 6, 3), BlockTerm(4, 3), (2, 8, 6)),
}


def uneven(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A stack of factors of which each channel between has another size, as spectra leave them."""
    torch.manual_seed(seed)
    make, form, shape = FORMS[name]
    layer = make()
    stack = random(walk(nn.Sequential(layer)).layers["0"].geometry, form, layer)
    with torch.no_grad():
        for factor in stack.factors()[:-1]:
            factor.weight *= 10.0 ** torch.randn(len(factor.weight), *(1,) * (factor.weight.ndim - 1))
    return nn.Sequential(stack).eval(), torch.randn(shape)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 99), share=st.floats(0.0, 1.0))
def test_it_computes_what_it_did(name: str, seed: int, share: float) -> None:
    model, x = uneven(name, seed)
    with torch.no_grad():
        before = model(x)
        balance(model, [lambda net: net(x)], share)
        after = model(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("name", FORMS)
def test_with_a_share_of_one_all_channels_between_factors_are_of_one_size(name: str) -> None:
    model, x = uneven(name, 3)
    balance(model, [lambda net: net(x)], 1.0)
    flows: list[Tensor] = []
    for factor in model[0].factors()[:-1]:
        factor.register_forward_hook(lambda module, args, out: flows.append(out))
    with torch.no_grad():
        model(x)
    axis = 1 if FORMS[name][2] != (2, 3, 8) else 2
    for flow in flows:
        largest = flow.abs().amax([side for side in range(flow.ndim) if side != axis])
        assert float(largest.max() / largest.min()) < 1.01


def test_channels_through_which_nothing_flows_stay_finite() -> None:
    model, x = uneven("Tucker-2", 0)
    with torch.no_grad():
        model[0].reduce.weight[0] = 0
        model[0].expand.weight[:, 1] = 0
        before = model(x)
        balance(model, [lambda net: net(x)])
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_no_hook_is_left_and_dense_layers_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), uneven("Tucker-2", 0)[0]).eval()
    dense = model[0].weight.detach().clone()
    balance(model, [lambda net: net(torch.randn(2, 3, 9, 9))])
    assert torch.equal(model[0].weight, dense)
    assert not any(module._forward_hooks for module in model.modules())
