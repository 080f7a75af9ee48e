"""Plain: a network of PyTorch's own modules, which runs where lamina is not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

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


class Conv(nn.Module):
    """A convolution, its norm and its activation, as Ultralytics' YOLO has them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y

    def forward_fuse(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv(x))
        return y


class Yolo(nn.Module):
    """One that folds its norms as YOLO's ``fuse`` does: into what stands in ``conv``, made anew from its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Conv(3, 8), Conv(8, 8), Conv(8, 8))
        with torch.no_grad():
            for norm in (each for each in self.modules() if isinstance(each, nn.BatchNorm2d)):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
                norm.weight.normal_()
                norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y

    @torch.no_grad()
    def fuse(self) -> Yolo:
        for part in self.modules():
            if isinstance(part, Conv) and hasattr(part, "bn"):
                part.conv = fuse_conv_and_bn(part.conv, part.bn)
                delattr(part, "bn")
                part.forward = part.forward_fuse  # type: ignore[method-assign]
        return self


def fuse_conv_and_bn(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    ).requires_grad_(False)  # fmt: skip
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    fused.weight.copy_(conv.weight * scale[:, None, None, None])
    fused.bias.copy_(norm.bias - scale * norm.running_mean)
    return fused


YOLO_FORMS = {"model.1.conv": BlockTerm(4, 4), "model.2.conv": Separable(6)}


def test_a_yolo_is_fused_and_then_planned(planned: Callable[..., lamina.Plan], tmp_path: Path) -> None:
    model = Yolo().eval()
    with torch.no_grad():
        before = model(X)
        torch.testing.assert_close(model.fuse()(X), before, rtol=1e-4, atol=1e-5)
    exact = lamina.decompose(model, planned(model, X, {"model.1.conv": BlockTerm(8, 8), "model.2.conv": BlockTerm(8, 8)}))
    small = lamina.decompose(model, planned(model, X, YOLO_FORMS))
    with torch.no_grad():
        torch.testing.assert_close(exact(X), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lamina.plain(small)(X), small(X))
        model.model[1].conv.weight.zero_()  # what stands in the copy's forward is the copy's own
        assert not torch.equal(small(X), model(X)) and bool(small.model[1].conv(X.new_ones(1, 8, 4, 4)).any())
    lamina.save(small, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(lamina.load(Yolo().eval().fuse(), tmp_path / "out")(X), small(X))


def test_of_a_fused_and_decomposed_yolo_an_onnx_file_is_written(planned: Callable[..., lamina.Plan], tmp_path: Path) -> None:
    import onnxruntime

    model = Yolo().eval()
    model.fuse()
    small = lamina.decompose(model, planned(model, X, YOLO_FORMS))
    for network_, name in ((small, "small.onnx"), (lamina.plain(small), "plain.onnx")):
        lamina.export(network_, X, tmp_path / name, dynamic_batch=True, seconds=0)
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        x = torch.randn(5, 3, 10, 10)
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(answer), small(x), rtol=1e-4, atol=1e-5)
        operators = [node.op_type for node in onnx_nodes(tmp_path / name)]
        assert operators.count("Conv") == 1 + 3 + 2 and "BatchNormalization" not in operators


def onnx_nodes(path: Path) -> list[Any]:
    import onnx

    return list(onnx.load(path).graph.node)


@pytest.mark.slow
def test_int8_by_pytorchs_own_quantiser_is_compiled(small: nn.Module) -> None:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(lamina.plain(small), (X,)).module(), quantizer)
    for _ in range(4):
        prepared(torch.randn(2, 3, 10, 10))
    everything = convert_pt2e(prepared)
    (answer,) = lamina.Compiled().prepare(everything, lamina.Workload(X)).answers()
    with torch.no_grad():
        expected = small(X)
        torch.testing.assert_close(torch.compile(everything)(X), answer, rtol=1e-2, atol=1e-2)
    assert 1e-6 < float((answer - expected).norm() / expected.norm()) < 0.1


def test_of_a_decomposed_yolo_the_last_factors_take_the_norms(planned: Callable[..., lamina.Plan]) -> None:
    model = Yolo().eval()
    small = lamina.decompose(model, planned(model, X, YOLO_FORMS))
    plain = lamina.plain(small)
    assert {type(part.conv) for part in copy.deepcopy(small).fuse().model} == {nn.Conv2d}  # the factors are lost
    with pytest.raises(AttributeError, match="in_channels"):
        copy.deepcopy(plain).fuse()
    for part in (each for each in plain.modules() if isinstance(each, Conv)):
        if isinstance(part.conv, nn.Sequential):
            part.conv[-1] = fuse_conv_bn_eval(part.conv[-1], part.bn)
        else:
            part.conv = fuse_conv_bn_eval(part.conv, part.bn)
        part.bn = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(plain(X), small(X), rtol=1e-4, atol=1e-5)


class Fused(Yolo):
    """One that folds its norms as newer ones do: into the very convolution, whose weight and bias are set."""

    @torch.no_grad()
    def fuse(self) -> Fused:
        for part in self.modules():
            if isinstance(part, Conv) and hasattr(part, "bn"):
                conv, bn = part.conv, part.bn
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
                )
                part.conv = conv.requires_grad_(False)
                delattr(part, "bn")
                part.forward = part.forward_fuse  # type: ignore[method-assign]
        return self


def test_a_decomposed_yolo_that_sets_the_weights_it_fuses_keeps_its_factors(
    planned: Callable[..., lamina.Plan], tmp_path: Path
) -> None:
    model = Fused().eval()
    small = lamina.decompose(model, planned(model, X, YOLO_FORMS))
    with torch.no_grad():
        before = small(X)
        fused = copy.deepcopy(small).fuse()
        torch.testing.assert_close(fused(X), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lamina.plain(fused)(X), fused(X))
        torch.testing.assert_close(lamina.merge(fused)(X), before, rtol=1e-4, atol=1e-5)
    assert [type(part.conv) for part in fused.model] == [type(part.conv) for part in small.model]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with pytest.raises(PlanError, match=r"they have .*\.bias: .* save before batch norms are fused"):
        lamina.save(fused, tmp_path / "out")


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
