"""A convolution whose weight rests: PyTorch's own against the one that does not keep its input.

    python benchmarks/frozen_convolution.py --publish

Forward and backward of one factor in the middle of a network: its input needs a gradient, its weight does not, its bias does
where it has one. Widths are those of ResNet-50's factors at ratio 2, at a batch of 8 and 160×160.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

from lamina.layers.frozen import frozen_convolution
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.measure.conditions import setting_of

SHAPES = {  # kernel, channels in and out, side of the map
    "1×1 64→256, 40×40": (1, 64, 256, 40),
    "1×1 335→512, 5×5": (1, 335, 512, 5),
    "1×1 16→16, 4×4": (1, 16, 16, 4),
    "3×3 38→38, 40×40": (3, 38, 38, 40),
    "3×3 155→155, 10×10": (3, 155, 155, 10),
    "3×3 16→16, 4×4": (3, 16, 16, 4),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def step(run: Callable[[Tensor], Tensor], layer: nn.Conv2d, x: Tensor) -> Callable[[], object]:
    wanted = [x] if layer.bias is None else [x, layer.bias]
    gradient = torch.randn_like(run(x))
    return lambda: torch.autograd.grad(run(x), wanted, gradient)


def main() -> None:
    chosen = options(__doc__)
    rows = []
    for name, (kernel, narrow, wide, side) in SHAPES.items():
        for layout, memory_format in LAYOUTS.items():
            for dtype in (torch.float32, torch.bfloat16):
                cells = []
                for bias in (False, True):
                    layer = nn.Conv2d(narrow, wide, kernel, padding=kernel // 2, bias=bias).to(
                        dtype=dtype, memory_format=memory_format
                    )
                    layer.weight.requires_grad_(False)
                    x = torch.randn(8, narrow, side, side).to(dtype=dtype, memory_format=memory_format).requires_grad_()
                    steps = [step(layer, layer, x), step(lambda x, layer=layer: frozen_convolution(layer, x), layer, x)]
                    own, ours = interleave(steps, x.device, Effort(chosen.seconds / 8, 15, 2000))
                    low, high = ratio_interval(own, ours)
                    gain = f"×{ratio(own, ours):.2f} ({low:.2f} to {high:.2f})"
                    cells.append(f"{median(own) * 1e3:.3g} → {median(ours) * 1e3:.3g} ms, {gain}")
                rows.append([name, layout, str(dtype).removeprefix("torch."), *cells])
                print(*rows[-1], sep=" | ", flush=True)
    body = "\n\n".join(
        [
            conditions(setting_of(nn.Linear(1, 1), "training", channels_last=False)) + " Dtype and layout as in the table.",
            table(["factor", "layout", "dtype", "without bias", "with a bias that trains"], rows),
        ]
    )
    print(body)
    if chosen.publish:
        publish(
            "frozen_convolution", "A convolution whose weight rests", "python benchmarks/frozen_convolution.py --publish", body
        )


if __name__ == "__main__":
    main()
