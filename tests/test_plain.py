"""Plain: a network of PyTorch's own modules, which runs where lamina is not."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lamina
from lamina.decomposition import plan_of
from lamina.errors import LaminaError, LayerError, PlanError
from lamina.forms import BlockTerm, LowRank, Separable

X = torch.randn(2, 3, 10, 10)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


FORMS = {"3": BlockTerm(4, 4, 2), "4": Separable(6), "5": LowRank(3), "8": LowRank(2)}


@pytest.fixture
def small(planned: Callable[..., lamina.Plan]) -> nn.Module:
    model = network()
    return lamina.decompose(model, planned(model, X, FORMS))


def test_it_computes_the_same_bits_and_has_no_lamina_in_it(small: nn.Module) -> None:
    before = {name: value.clone() for name, value in small.state_dict().items()}
    plain = lamina.plain(small)
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"torch"}
    assert not any("lamina" in name for module in plain.modules() for name in vars(module))
    with torch.no_grad():
        assert torch.equal(plain(X), small(X))
    assert list(plain.state_dict()) == list(before)  # under the same names
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert plan_of(small) is not None


def test_it_shares_nothing_with_the_network(small: nn.Module) -> None:
    plain = lamina.plain(small)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(bool(p.any()) for name, p in small.named_parameters() if "weight" in name)


def test_it_is_unpickled_and_run_where_lamina_is_not_installed(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "network.pkl").write_bytes(pickle.dumps(lamina.plain(small)))
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['lamina'] = None\n"
        "import pickle, torch\n"
        f"model = pickle.load(open({str(tmp_path / 'network.pkl')!r}, 'rb')); x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save(model(x).detach(), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), small(X))


def test_it_is_scripted_and_its_norms_are_fused_by_torch(planned: Callable[..., lamina.Plan]) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 8, 6, 6)
    small = lamina.decompose(model, planned(model, x, {"0": BlockTerm(4, 4)}))
    plain = lamina.plain(small)
    scripted = torch.jit.script(plain)
    fused = fuse_conv_bn_eval(plain[0].expand, plain[1])
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), small(x))
        torch.testing.assert_close(fused(plain[0].core(plain[0].reduce(x))), small(x))


def test_hooks_go_along(small: nn.Module) -> None:
    seen: list[str] = []
    small[3].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    plain = lamina.plain(small)
    seen.clear()
    plain(X)
    assert seen == ["Sequential"]


def test_a_network_that_reads_a_layers_weight_is_refused_by_name(planned: Callable[..., lamina.Plan]) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype))

    model, x = Reads().eval(), torch.randn(2, 8)
    small = lamina.decompose(model, planned(model, x, {"layer": LowRank(2)}))
    with pytest.raises(LayerError, match=r"does not run with plain layers: .*weight.*; it reads one of layer"):
        lamina.plain(small)


def test_a_network_that_looks_at_the_type_of_a_layer_is_refused(planned: Callable[..., lamina.Plan]) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return -self.layer(x) if isinstance(self.layer, nn.Sequential) else self.layer(x)

    model, x = Looks().eval(), torch.randn(2, 8)
    small = lamina.decompose(model, planned(model, x, {"layer": LowRank(2)}))
    with pytest.raises(LayerError, match="looks at the type of a layer"):
        lamina.plain(small)


def test_what_is_not_decomposed_is_plain_already() -> None:
    with pytest.raises(PlanError, match="nothing in this network is decomposed"):
        lamina.plain(network())
    with pytest.raises(LaminaError):
        lamina.plain(nn.Linear(2, 2))
