"""Does scaling or rotating the factors of a layer for int8 gain anything?

    python benchmarks/gauge.py --threads 1 --publish

    h   what flows from one factor to the next, (…, r, *map)      s   a scale for each of its channels, (r,)
    A   the first factor's weight, (r, …)                         B   the next one's, (O, r / groups, …)

A / s and B s compute what A and B do. int8 has one scale for all of h, and one for each output channel of a weight: so A is as
fine as before, whatever s is, while a channel of h that is ten times smaller than the largest loses a digit, and so does a
column of B. Tried are the scales of SmoothQuant (arXiv 2211.10438), s = max|h|^α / max|B|^(1 − α), on the demo's network,
calibrated on 512 images, at ratio 4 and in groups of 8, quantised by ONNX Runtime and by NNCF on the same images. lamina
spreads scales evenly when it finds factors; that is the row "as found".

Q A and B Qᵀ compute it too, for any orthogonal Q (r, r) where neither factor has groups: a drawn one gives all channels of h
about the same size. That is the row "rotated".
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import ready
from lamina.layers.decomposed import DecomposedLayer
from lamina.values import Inference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
SHARES = (0.5, 0.7, 1.0)


def balance(model: nn.Module, runs: Iterable[Callable[[nn.Module], Any]], share: float) -> None:
    """Scale the factors of every decomposed layer of a network for int8, in place: it computes the same up to rounding.

    Args:
        model: The network, in eval mode.
        runs: Each runs it on an input that it will see.
        share: α.
    """
    stacks = [module for module in model.modules() if isinstance(module, DecomposedLayer)]
    largest: dict[nn.Module, Tensor] = {}
    handles = [
        factor.register_forward_hook(_noting(largest, axis=1 if stack.geometry.kernel else -1))
        for stack in stacks
        for factor in stack.factors()[:-1]
    ]
    try:
        with torch.no_grad():
            for run in runs:
                run(model)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for stack in stacks:
            for first, second in pairwise(stack.factors()):
                if first in largest:
                    _rescale(first, second, largest[first], share)


def rotate(model: nn.Module, seed: int = 0) -> None:
    """Turn what flows between the factors of every decomposed layer, in place: the network computes the same up to rounding.

    A pair of which one has groups stays as it is.

    Args:
        model: The network.
        seed: What the rotations are drawn from.
    """
    drawn = torch.Generator().manual_seed(seed)
    stacks = [module for module in model.modules() if isinstance(module, DecomposedLayer)]
    with torch.no_grad():
        for first, second in (pair for stack in stacks for pair in pairwise(stack.factors())):
            A, B = first.weight, second.weight
            if getattr(first, "groups", 1) > 1 or getattr(second, "groups", 1) > 1:
                continue
            Q = torch.linalg.qr(torch.randn(len(A), len(A), generator=drawn, dtype=torch.float64)).Q
            A.copy_(torch.einsum("qr,r...->q...", Q, A.double()))
            B.copy_(torch.einsum("qr,or...->oq...", Q, B.double()))


def _noting(largest: dict[nn.Module, Tensor], axis: int) -> Callable[..., None]:
    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        sides = [side for side in range(output.ndim) if side != axis % output.ndim]
        found = output.detach().abs().amax(sides)
        largest[module] = torch.maximum(largest[module], found) if module in largest else found

    return note


def _rescale(first: Any, second: Any, flows: Tensor, share: float) -> None:
    A, B = first.weight, second.weight
    groups = getattr(second, "groups", 1)
    # Of each input channel, over the output channels of its group.
    by_group = B.reshape(groups, len(B) // groups, B.shape[1], -1)
    reads = by_group.abs().amax((1, 3)).flatten()
    scale = flows.clamp_min(1e-12).pow(share) / reads.clamp_min(1e-12).pow(1 - share)
    scale = torch.where((flows > 0) & (reads > 0), scale, torch.ones_like(scale))
    scale /= scale.log().mean().exp()  # the sizes of both weights stay about as they were
    A /= scale.view(-1, *(1,) * (A.ndim - 1))
    by_group *= scale.view(groups, 1, B.shape[1], 1)
    B.copy_(by_group.reshape(B.shape))


def main() -> None:
    from demo import base_network
    from fashion import test_images, tuning_images
    from runtimes import in_runtime, served

    chosen = options(__doc__)
    model, test, unlabelled = base_network(), test_images(), tuning_images().images[:512]
    data, x = list(unlabelled.split(32)), test.images[:32]
    found = lamina.calibrate(model, data, outputs=lamina.Categorical())
    names = list(lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio()).layers)
    plan = lamina.make_plan(model, x, lamina.Ratio(4.0), rule=lamina.AtRatio(), data=found, skip=[names[0], names[-1]])
    grouped = plan
    for name, layer in plan.layers.items():
        O, I = layer.geometry.out_channels, layer.geometry.in_channels
        if layer.geometry.taps > 1 and O == I and I % 8 == 0:
            grouped = grouped.with_form(name, lamina.BlockTerm(I, O, I // 8))

    def accuracy(run: Callable[[Tensor], Tensor]) -> str:
        right = [int((run(a).argmax(1) == b).sum()) for a, b in zip(test.images.split(32), test.labels.split(32), strict=True)]
        return f"{sum(right) / len(test):.2%}"

    runs = [lambda net, batch=batch: net(batch) for batch in data]  # type: ignore[misc]
    gauges: dict[str, Callable[[nn.Module], None]] = {"as found": lambda network: None}
    networks: dict[str, tuple[nn.Module, dict[str, Callable[[nn.Module], None]]]] = {"dense": (model, gauges)}
    gauges = gauges | {f"α = {share:g}": partial(balance, runs=runs, share=share) for share in SHARES} | {"rotated": rotate}
    networks |= {
        what: (lamina.decompose(model, each, found), gauges) for what, each in (("ratio 4", plan), ("groups of 8", grouped))
    }
    rows = []
    for what, (network, named) in networks.items():
        for name, change in named.items():
            scaled = copy.deepcopy(network)
            change(scaled)
            row = [what, name]
            for runtime in (lamina.Eager(), lamina.OnnxRuntime(int8=data), lamina.OpenVINO(int8=data)):
                with ready([scaled], Inference()):
                    row.append(accuracy(served(in_runtime(runtime), scaled, x)))
            rows.append(row)
            print(row, flush=True)
    head = ["network", "factors", "float32, eager", "int8, ONNX Runtime", "int8, OpenVINO (NNCF)"]
    setting = lamina.compare(model, model, x, seconds=0.1).setting
    body = f"{table(head, rows)}\n\n{conditions(setting)}"
    print(body)
    if chosen.publish:
        publish(
            "gauge", "Scales and rotations between factors, for int8", "python benchmarks/gauge.py --threads 1 --publish", body
        )


if __name__ == "__main__":
    main()
