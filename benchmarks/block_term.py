"""Block term decomposition: the default against the sweep of GroSS, and the nested series of a ResNet-18.

    python benchmarks/block_term.py --publish

A 512×512×3×3 weight at group sizes 1 and 4 with spectra that fall off as those of trained weights do, and at 4 once more of
independent normal numbers. The sweep is stopped when its time is up; its error after each pass over all terms is
printed. Then all sixteen 3×3 convolutions of ResNet-18 (fresh weights: the times do not depend on them much) at {1, 4, 16, 32}.
"""

from __future__ import annotations

import contextlib
import time

import torch
from record import conditions, options, publish, table
from torch import Tensor
from torchvision.models import resnet18

from lamina.comparison import whole_setting
from lamina.factorize.block_term import BlockTerms, block_term
from lamina.factorize.block_term_sweep import block_term_sweep
from lamina.factorize.series import nested_series
from lamina.values import Inference, Workload

WIDTH = 512
SWEEP_SECONDS = 40.0
SIZES = (1, 4, 16, 32)


class TimeUpError(Exception):
    """Ends a sweep that would go on for too long."""


def fading(width: int) -> Tensor:
    """A weight whose channel spectra fall off with the square root, and whose middle tap is the strongest."""
    W = torch.randn(width, width, 3, 3)
    for mode in (0, 1):
        mixing = torch.randn(width, width) * torch.arange(1, width + 1) ** -0.5
        W = torch.tensordot(mixing, W, dims=([1], [mode])).movedim(0, mode)
    return W * torch.tensor([[0.5, 0.7, 0.5], [0.7, 1.5, 0.7], [0.5, 0.7, 0.5]])


def error(W: Tensor, fit: BlockTerms) -> float:
    return float((W.double() - fit.composed().double()).norm() / W.double().norm())


def swept(W: Tensor, groups: int) -> list[tuple[float, float]]:
    """Seconds and relative error after each pass of the sweep, as far as the time goes; at least one pass."""
    curve: list[tuple[float, float]] = []
    began = time.perf_counter()

    def watch(_: int, lost: float) -> None:
        curve.append((time.perf_counter() - began, lost))
        if curve[-1][0] > SWEEP_SECONDS:
            raise TimeUpError

    with contextlib.suppress(TimeUpError):
        block_term_sweep(W, WIDTH, WIDTH, groups, watch=watch)
    return curve


def solvers() -> tuple[list[list[str]], list[str]]:
    rows, curves = [], []
    normal = torch.randn(WIDTH, WIDTH, 3, 3)
    for name, W, size in (("fading", fading(WIDTH), 1), ("fading", fading(WIDTH), 4), ("normal", normal, 4)):
        groups = WIDTH // size
        began = time.perf_counter()
        fit = block_term(W, WIDTH, WIDTH, groups)
        took, ours = time.perf_counter() - began, error(W, fit)
        curve = swept(W, groups)
        # The least work with which the default is where the sweep ended.
        for sweeps in (2, 5, 10, 20, 50, 100):
            began = time.perf_counter()
            reached = error(W, block_term(W, WIDTH, WIDTH, groups, sweeps=sweeps))
            equal = time.perf_counter() - began
            if reached <= curve[-1][1]:
                break
        same = f"{equal:.1f} s: ×{curve[-1][0] / equal:.1f}" if reached <= curve[-1][1] else f"not reached ({reached:.4f})"
        rows.append(
            [
                f"{name}, g = {size}",
                f"{took:.1f} s",
                f"{ours:.4f}",
                f"{len(curve)}",
                f"{curve[-1][0]:.1f} s",
                f"{curve[-1][1]:.4f}",
                same,
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
        shown = sorted({1, 2, 3, 5, 10, 20, 50, 100, 200, 400, len(curve)} & set(range(1, len(curve) + 1)))
        curves.append(
            f"Sweep, {name}, g = {size}, error after pass: "
            + ", ".join(f"{at}: {curve[at - 1][1]:.4f} ({curve[at - 1][0]:.0f} s)" for at in shown)
        )
    return rows, curves


def network() -> tuple[list[list[str]], float]:
    rows, total = [], 0.0
    layers = {n: m for n, m in resnet18().named_modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)}
    assert len(layers) == 16
    for name, conv in layers.items():
        W = conv.weight.detach()
        width = conv.in_channels
        began = time.perf_counter()
        # As in the paper: both widths are the input's.
        series = nested_series(W, width, min(width, conv.out_channels), [width // size for size in SIZES])
        took = time.perf_counter() - began
        total += took
        errors = " ".join(f"{error(W, series.truncated(r)):.3f}" for r in range(1, len(SIZES) + 1))
        rows.append([name, "×".join(map(str, W.shape)), f"{took:.1f} s", errors])
        print(" | ".join(rows[-1]), flush=True)
    return rows, total


def main() -> None:
    chosen = options(__doc__)
    setting = whole_setting(torch.nn.Conv2d(4, 4, 3).eval(), Workload(torch.randn(1, 4, 8, 8)), Inference())
    first, curves = solvers()
    second, total = network()
    head = ["512×512×3×3", "default", "error", "passes", "sweep", "error", "default, to the sweep's error"]
    body = "\n\n".join(
        [
            conditions(setting) + f" The sweep has at most 400 passes and stops when a pass ends after {SWEEP_SECONDS:.0f} s.",
            table(head, first),
            *curves,
            table(["ResNet-18, nested series", "weight", "time", f"error at g = {', '.join(map(str, SIZES))}"], second),
            f"All sixteen: {total:.0f} s.",
        ]
    )
    print(body)
    if chosen.publish:
        publish("block_term", "Block term decomposition", "python benchmarks/block_term.py --publish", body)


if __name__ == "__main__":
    main()
