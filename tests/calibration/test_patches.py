"""Moments of patches and channels equal those of `unfold`, borders included, whatever the way in which they are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.calibration.gram import Gram, Scatter
from lamina.calibration.patches import Patches
from lamina.network.walk import walk

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def patches_of(layer: nn.Module, x: Tensor) -> Tensor:
    """``(rows, I K)`` by the layer's own answer: a layer whose weight is the identity answers its patches."""
    I, kernel = layer.in_channels, layer.weight.shape[2:]
    n = I * kernel.numel()
    more = {"output_padding": layer.output_padding} if layer.transposed else {"padding_mode": layer.padding_mode}
    twin = type(layer)(
        I, n, tuple(kernel), stride=layer.stride, padding=layer.padding, dilation=layer.dilation, bias=False, **more
    ).double()
    with torch.no_grad():
        W = torch.eye(n).view(n, I, *kernel)
        twin.weight.copy_(W.transpose(0, 1) if layer.transposed else W)
        return twin(x).transpose(0, 1).flatten(1).T


def geometry_of(layer: nn.Module) -> Any:
    return walk(layer).layers[""].geometry


def found_by(layer: nn.Module, x: Tensor, what: str, **options: Any) -> tuple[Tensor, Tensor, int]:
    """Sums in the order of ``W.flatten(1)``. What the scatter took in is the sum's product with its columns."""
    geometry = geometry_of(layer)
    I, K = geometry.in_channels, geometry.taps if what == "add_patches" else 1
    gram, total = Gram(I * K), torch.zeros(I * K, dtype=torch.float64)
    patches = Patches(geometry, **options)
    scatter = Scatter(I * K, torch.device("cpu"))
    rows = getattr(patches, what)([gram], total, x, scatter)
    tolerances = {} if x.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(scatter.batch, gram.dense() @ scatter.Z, **tolerances)
    S = gram.dense().view(K, I, K, I).permute(1, 0, 3, 2).reshape(I * K, I * K)
    return S, total.view(K, I).T.flatten(), rows


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    sides = draw(st.integers(1, 3))
    few = st.integers(1, 3)
    kernel = tuple(draw(few) for _ in range(sides))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(sides))
    stride = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(sides))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = tuple(draw(st.integers(0, 2)) for _ in range(sides))
    if set(stride) == {1} and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    shape = tuple(draw(st.integers(1 + d * (k - 1), 7)) for k, d in zip(kernel, dilation, strict=True))
    shape = tuple(max(s, 3) for s in shape)  # reflection by two needs three
    I = draw(few)
    if draw(st.integers(0, 2)):
        layer = LAYERS[sides](I, 2, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode)
    else:
        padding = tuple(draw(st.integers(0, min(2, d * (k - 1)))) for k, d in zip(kernel, dilation, strict=True))
        more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        layer = TRANSPOSED[sides](I, 2, kernel, stride=stride, padding=padding, dilation=dilation, output_padding=more)
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(few), I, *shape, dtype=torch.float64)
    if sides > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if sides == 2 else torch.channels_last_3d)
    return layer, x


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@given(case=cases(), workspace=st.sampled_from([1, 500, 2**26]))
@settings(max_examples=200, deadline=None)
def test_both_moments_are_those_of_the_patches_that_the_layer_sees(case: tuple[nn.Module, Tensor], workspace: int) -> None:
    layer, x = case
    rows = patches_of(layer, x)
    K = layer.weight[0, 0].numel()
    S, total, count = found_by(layer, x, "add_patches", workspace=workspace)
    torch.testing.assert_close(S, rows.T @ rows)
    torch.testing.assert_close(total, rows.sum(0))
    assert count == len(rows)
    y = torch.randn(len(x), 2, *layer(x.float()).shape[2:], dtype=x.dtype)
    outputs = y.transpose(0, 1).flatten(1)
    torch.testing.assert_close(Patches(geometry_of(layer)).with_outputs(x, y), outputs @ rows)
    by_tap = rows.view(len(rows), -1, K)
    S, total, count = found_by(layer, x, "add_channels", workspace=workspace)
    torch.testing.assert_close(S, torch.einsum("nik,njk->ij", by_tap, by_tap) / K)
    torch.testing.assert_close(total, by_tap.mean(2).sum(0))
    assert count == len(rows)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize(
    ("kernel", "dilation", "padding"), [(3, 1, 1), (3, 2, 2), (5, 1, 0), ((1, 3), 1, "same"), (2, 1, "same")]
)
def test_correlations_and_columns_are_the_same(kernel, dilation, padding, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(3, 2, kernel, padding=padding, dilation=dilation)
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    monkeypatch.setattr(Patches, "_correlations_pay", lambda *_: pays)
    rows = patches_of(layer, x)
    for workspace in (1, 2**26):
        S, _, _ = found_by(layer, x, "add_patches", workspace=workspace)
        torch.testing.assert_close(S, rows.T @ rows)


def test_a_three_by_three_takes_thirteen_products_on_a_large_map_and_columns_on_a_small_one() -> None:
    patches = Patches(geometry_of(nn.Conv2d(4, 4, 3, padding=1)))
    assert len(patches._offsets()) == 13
    assert patches._correlations_pay(torch.zeros(2, 42, 42, 4), (40, 40))
    assert not patches._correlations_pay(torch.zeros(2, 7, 7, 4), (5, 5))
    strided = Patches(geometry_of(nn.Conv2d(4, 4, 3, padding=1, stride=2)))
    assert not strided._correlations_pay(torch.zeros(2, 42, 42, 4), (20, 20))


def test_float32_patches_equal_unfold_to_float32_rounding() -> None:
    x = torch.rand(4, 8, 40, 40)  # of one sign, as inputs behind a ReLU are
    layer = nn.Conv2d(8, 2, 3, padding=1)
    rows = F.unfold(x.double(), 3, padding=1).transpose(0, 1).flatten(1)
    S, _, _ = found_by(layer, x, "add_patches")
    wanted = rows @ rows.T
    size = wanted.diagonal().sqrt()
    assert ((S - wanted) / (size[:, None] * size)).abs().max() < 8 * torch.finfo(torch.float32).eps


def test_offsets_are_those_of_every_pair_of_taps_and_none_comes_first() -> None:
    patches = Patches(geometry_of(nn.Conv2d(1, 1, (3, 2), dilation=(2, 1))))
    offsets = patches._offsets()
    taps = patches.taps
    assert offsets[0] == (0, 0) and len(set(offsets)) == len(offsets)
    assert set(offsets) == {(b[0] - a[0], b[1] - a[1]) for n, a in enumerate(taps) for b in taps[n:]}
