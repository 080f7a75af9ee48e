"""Peak memory of decomposing ResNet-50 in place, in bytes held by tensors.

    python benchmarks/memory.py --publish

Every tensor that PyTorch allocates on the CPU passes its profiler; the peak of what is allocated and not yet freed is counted
from there.
"""

from __future__ import annotations

import torch
from record import conditions, options, publish, table
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50

import lamina
from lamina.comparison import whole_setting
from lamina.values import Inference, Workload


def peak_over(work) -> int:
    """Most bytes allocated by ``work`` and not yet freed, over what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    chosen = options(__doc__)
    model = resnet50().eval()
    x = torch.randn(1, 3, 64, 64)
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # Factorised in float64: that is the precision worked in.
    largest = 8 * max(p.numel() for p in model.parameters())
    over = peak_over(lambda: lamina.decompose(model, plan, inplace=True, check=False))
    rows = [
        ["model", f"{size / 1e6:.1f} MB"],
        ["its largest layer, in float64", f"{largest / 1e6:.1f} MB"],
        ["peak while decomposing in place", f"{(size + over) / 1e6:.1f} MB = model + {over / largest:.2f} × the largest layer"],
    ]
    body = (
        conditions(whole_setting(model, Workload(x), Inference()))
        + "\n\n"
        + table(["ResNet-50, ratio 2", "bytes of tensors"], rows)
    )
    print(body)
    if chosen.publish:
        publish("memory", "Memory of decomposing in place", "python benchmarks/memory.py --publish", body)


if __name__ == "__main__":
    main()
