"""Does it pay to decompose convolutions that have groups already, each group on its own?

    python benchmarks/grouped.py --publish

A convolution in G groups of i → o channels becomes grouped 1×1 i→s, grouped k×k s→t, grouped 1×1 t→o, all in the same G groups:
a Tucker-2 of each group, exact at s = i, t = o; or one side stays whole. A grouped 1×1 becomes a pair of grouped 1×1s; a
depthwise k×k, which has no channels to cut, a k×1 and a 1×k. Forms are the largest of their kind at ratio 1.8 or above, which
for narrow groups is the nearest to 2; both ranks of a Tucker-2 also lie on multiples of 8, or powers of two below. Networks
with fresh weights, 8×3×224×224; each shape of a grouped layer that takes a fiftieth of its network's forward pass or more is
timed in eager PyTorch, contiguous and channels last, and between two depthwise 1×1s in ONNX Runtime, all forms beside the dense
layer, interleaved; up to 16 groups also apart, each as a stack of plain convolutions of its own. *Whole* is what the network
would gain if each layer took its fastest form, or stayed dense where none is faster: a bound, as nothing is said of what such
forms lose. Rows are kept in ``benchmarks/runs/grouped``, and it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, final

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import whole_setting
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.measure.shares import time_shares
from lamina.runtimes.runtime import Runtime
from lamina.values import Inference, Workload

KEPT = Path(__file__).parent / "runs" / "grouped"
BATCH, RATIO, COUNTS, PAYS, MOST_APART = 8, 1.8, 0.02, 1.15, 16
"""Images; of weights; the least share of a network's time; the least gain of a layer that is worth building for; groups."""


def alexnet() -> nn.Module:
    """As it was published, in two groups (Krizhevsky et al. 2012), without its normalisation."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2)

    features = [
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), pool()),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), pool()),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), pool()),
    ]
    head = [nn.Flatten(), nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*features, *head)


@final
class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet (Zhang et al. 2018, figure 2): grouped 1×1, shuffle, depthwise 3×3, grouped 1×1."""

    def __init__(self, I: int, O: int, groups: int, stride: int) -> None:
        super().__init__()
        self.stride, inner = stride, O // 4
        own = O - I if stride == 2 else O
        self.first = nn.Sequential(nn.Conv2d(I, inner, 1, groups=1 if I == 24 else groups, bias=False), nn.BatchNorm2d(inner))
        self.shuffle = nn.ChannelShuffle(groups)
        self.depthwise = nn.Sequential(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner))
        self.last = nn.Sequential(nn.Conv2d(inner, own, 1, groups=groups, bias=False), nn.BatchNorm2d(own))
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.depthwise(self.shuffle(self.first(x).relu())))
        return (torch.cat([self.pool(x), y], 1) if self.stride == 2 else x + y).relu()


def shufflenet() -> nn.Module:
    """ShuffleNet 1× in three groups."""
    units: list[nn.Module] = []
    I = 24
    for O, repeats in ((240, 4), (480, 8), (960, 4)):
        units += [ShuffleUnit(I if at == 0 else O, O, 3, 2 if at == 0 else 1) for at in range(repeats)]
        I = O
    stem = [nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(960, 1000))


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        made: nn.Module = models.get_model(name, weights=None)
        return made

    return make


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "AlexNet, two groups": alexnet,
    "ResNeXt-50 32×4d": of_torchvision("resnext50_32x4d"),
    "ResNeXt-101 64×4d": of_torchvision("resnext101_64x4d"),
    "RegNetY-400MF": of_torchvision("regnet_y_400mf"),
    "RegNetX-400MF": of_torchvision("regnet_x_400mf"),
    "RegNetX-1.6GF": of_torchvision("regnet_x_1_6gf"),
    "RegNetX-3.2GF": of_torchvision("regnet_x_3_2gf"),
    "RegNetX-8GF": of_torchvision("regnet_x_8gf"),
    "RegNetX-16GF": of_torchvision("regnet_x_16gf"),
    "RegNetY-32GF": of_torchvision("regnet_y_32gf"),
    "ShuffleNet, three groups": shufflenet,
    "MobileNetV3-L": of_torchvision("mobilenet_v3_large"),
    "EfficientNet-B0": of_torchvision("efficientnet_b0"),
    "ConvNeXt-T": of_torchvision("convnext_tiny"),
}


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """A convolution in groups, and the map that it reads."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: int
    stride: int
    side: int

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of a group: i, o."""
        return self.in_channels // self.groups, self.out_channels // self.groups

    def __str__(self) -> str:
        i, o = self.widths
        k, stride = f"{self.kernel}×{self.kernel}", f" by {self.stride}" if self.stride > 1 else ""
        return f"{self.groups} × ({i}→{o}), {k}{stride}, on {self.side}×{self.side}"

    def conv(self, i: int, o: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Module:
        """A convolution in its groups, of so many channels each."""
        padding = kernel[0] // 2, kernel[1] // 2
        return nn.Conv2d(i * self.groups, o * self.groups, kernel, stride, padding, groups=self.groups, bias=False)

    def dense(self) -> nn.Module:
        """The layer itself."""
        return self.conv(*self.widths, (self.kernel,) * 2, (self.stride,) * 2)

    def forms(self) -> dict[str, nn.Module]:
        """Its decompositions at the ratio, by name: stacks of plain convolutions."""
        (i, o), k, s = self.widths, self.kernel, self.stride
        if k == 1:
            if (r := int(i * o / RATIO / (i + o))) == 0:
                return {}
            return {f"pair {r}": nn.Sequential(self.conv(i, r, (1, 1), (s, s)), self.conv(r, o, (1, 1), (1, 1)))}
        if i == o == 1:
            return {f"{k}×1, 1×{k}": nn.Sequential(self.conv(1, 1, (k, 1), (s, 1)), self.conv(1, 1, (1, k), (1, s)))}
        budget = i * o * k * k / RATIO
        whole_in, whole_out = int(budget / (i * k * k + o)), int(budget / (o * k * k + i))
        both = max(
            ((a, b) for a in range(1, i + 1) for b in range(1, o + 1) if i * a + a * b * k * k + b * o <= budget),
            key=lambda ranks: (min(ranks[0] / i, ranks[1] / o), sum(ranks)),
            default=None,
        )
        ranks: list[tuple[int | None, int | None]] = []
        if both:
            ranks += [both, (_aligned(both[0]), _aligned(both[1]))]
        ranks += [(None, whole_in or None), (whole_out or None, None)]
        return {
            f"{a or '–'}, {b or '–'}": self._tucker(a, b) for a, b in dict.fromkeys(ranks) if (a, b) != (None, None)
        }  # fmt: skip

    def apart(self) -> dict[str, nn.Module]:
        """The same with a stack of plain convolutions for each group, the map taken apart before and joined after them."""
        one = replace(self, in_channels=self.widths[0], out_channels=self.widths[1], groups=1)
        if self.groups > MOST_APART:
            return {}
        return {name: Apart(one.forms()[name] for _ in range(self.groups)) for name in one.forms()}

    def _tucker(self, a: int | None, b: int | None) -> nn.Module:
        (i, o), k, s = self.widths, self.kernel, self.stride
        core = self.conv(a or i, b or o, (k, k), (s, s))
        reduce = [self.conv(i, a, (1, 1), (1, 1))] if a else []
        expand = [self.conv(b, o, (1, 1), (1, 1))] if b else []
        return nn.Sequential(*reduce, core, *expand)


class Apart(nn.Module):
    """A stack for each group."""

    def __init__(self, stacks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([stack(part) for stack, part in zip(self.stacks, x.chunk(len(self.stacks), 1), strict=True)], 1)


def _aligned(rank: int) -> int:
    return rank // 8 * 8 if rank >= 8 else 2 ** (rank.bit_length() - 1)


def shapes_of(model: nn.Module, x: Tensor) -> dict[str, Shape]:
    """Each convolution in groups, with square kernel and map, as all of these networks have them."""
    found: dict[str, Shape] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(conv: Any, args: Any, output: Any) -> None:
            channels = conv.in_channels, conv.out_channels
            found[name] = Shape(*channels, conv.groups, conv.kernel_size[0], conv.stride[0], args[0].shape[-1])

        return see

    grouped = {name: conv for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and conv.groups > 1}
    handles = [conv.register_forward_hook(watch(name)) for name, conv in grouped.items()]
    with torch.inference_mode():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return found


def times(
    shape: Shape, forms: dict[str, nn.Module], runtime: Runtime, channels_last: bool, effort: Effort
) -> dict[str, list[float]]:
    """Seconds of the dense layer, "dense", and of its forms, round by round.

    In a runtime of graphs each stands between two depthwise 1×1s, whose own time is taken off: runtimes keep maps in blocks.
    """
    x = torch.randn(BATCH, shape.in_channels, shape.side, shape.side)
    layers = {"dense": shape.dense()} | forms
    if runtime.eager:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        layers = {name: layer.to(memory_format=layout) for name, layer in layers.items()}  # type: ignore[call-overload]
        runs = [runtime.prepare_layer(layer, x).run for layer in layers.values()]
        return dict(zip(layers, timed(runs, effort), strict=True))

    def neighbour(channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 1, groups=channels, bias=False)

    I, O = shape.in_channels, shape.out_channels
    placed = (nn.Sequential(neighbour(I), layer, neighbour(O)).eval() for layer in layers.values())
    runs = [runtime.prepare(each, Workload(x)).run for each in placed]
    side = -(-shape.side // shape.stride)
    for channels, each in ((I, shape.side), (O, side)):
        alone = nn.Sequential(neighbour(channels), neighbour(channels)).eval()
        runs.append(runtime.prepare(alone, Workload(torch.randn(BATCH, channels, each, each))).run)
    *own, first, second = timed(runs, effort)
    around = [mean(pair) for pair in zip(first, second, strict=True)]
    own = [[max(s - off, 0.05 * s) for s, off in zip(one, around, strict=True)] for one in own]
    return dict(zip(layers, own, strict=True))


def timed(runs: Sequence[Callable[[], Any]], effort: Effort) -> list[list[float]]:
    with torch.inference_mode():
        return interleave(runs, torch.device("cpu"), effort)


def best_of(found: dict[str, list[float]]) -> tuple[str, float, float, float]:
    """The form that gains most over the dense layer: its name, its gain, and the interval."""
    others = {name: ratio(found["dense"], own) for name, own in found.items() if name != "dense"}
    if not others:
        return "none", 0.0, 0.0, 0.0
    name = max(others, key=others.__getitem__)
    return name, others[name], *ratio_interval(found["dense"], found[name])


def first_look(name: str) -> dict[str, Any]:
    """One network: the shapes of its grouped layers, and the share of its time that each takes."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(BATCH, 3, 224, 224)
    shapes, shares = shapes_of(model, x), time_shares(model, [Workload(x)])
    rows = [
        {"shape": astuple(shape), "layers": sum(each == shape for each in shapes.values()), "gains": {}}
        | {"share": sum(shares[layer] for layer, each in shapes.items() if each == shape)}
        for shape in dict.fromkeys(shapes.values())
    ]
    return {"network": name, "rows": rows}


def look_at(found: dict[str, Any], label: str, seconds: float) -> None:
    """Add what the forms of each shape that counts gain in one place."""
    _, runtime, channels_last = next(place for place in PLACES if place[0] == label)
    for row in found["rows"]:
        shape = Shape(*row["shape"])
        forms = {} if row["share"] < COUNTS else shape.apart() if label == "groups apart" else shape.forms()
        if forms and label not in row["gains"]:
            taken = times(shape, forms, runtime, channels_last, Effort(seconds, 5, 40, precision=0.005))
            row["gains"][label] = {"ms": 1000 * median(taken["dense"]), "best": best_of(taken)}


PLACES: list[tuple[str, Runtime, bool]] = [
    ("contiguous", lamina.Eager(), False),
    ("groups apart", lamina.Eager(), False),
    ("channels last", lamina.Eager(), True),
    ("ONNX Runtime", lamina.OnnxRuntime(), False),
]


def whole_bound(rows: Sequence[dict[str, Any]], label: str) -> float:
    """What the network gains where each layer takes its fastest form, or stays dense."""
    saved = (row["share"] * (1 - 1 / max(row["gains"][label]["best"][1], 1.0)) for row in rows if label in row["gains"])
    return 1 / (1 - sum(saved))


def told(gain: dict[str, Any]) -> str:
    name, ratio, low, high = gain["best"]
    return f"{gain['ms']:.3g} ms; {name}: ×{ratio:.2f} ({low:.2f} to {high:.2f})"


def summary(found: dict[str, Any], labels: Sequence[str]) -> list[str]:
    rows = [row for row in found["rows"] if row["gains"]]
    pays = [row for row in rows if any(gain["best"][2] >= PAYS for gain in row["gains"].values())]
    kinds = dict.fromkeys((shape.kernel, shape.widths) for shape in (Shape(*row["shape"]) for row in found["rows"]))
    told = [f"{k}×{k} {i}→{o}" for k, (i, o) in sorted(kinds)]
    cells = [found["network"], ", ".join(told[:4]) + (", …" if len(told) > 4 else "")]
    cells += [f"{sum(row['share'] for row in found['rows']):.0%}", f"{len(pays)} of {len(rows)}"]
    looked = {label for row in rows for label in row["gains"]}
    return [*cells, *(f"×{whole_bound(rows, label):.2f}" if label in looked else "" for label in labels)]


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="*", default=[""], help="networks whose names begin so")
        parser.add_argument(
            "--place", nargs="*", default=[label for label, *_ in PLACES], help="places, by their names; none: what is kept"
        )

    chosen = options(__doc__ or "", more)
    KEPT.mkdir(parents=True, exist_ok=True)
    paths = {name: KEPT / f"{name.replace(' ', '_')}.json" for name in NETWORKS}
    for label in chosen.place:
        for name in (name for only in chosen.only for name in NETWORKS if name.startswith(only)):
            found = json.loads(paths[name].read_text()) if paths[name].exists() else first_look(name)
            look_at(found, label, chosen.seconds / 8)
            paths[name].write_text(json.dumps(found))
            print(label, *summary(found, chosen.place), sep=" | ", flush=True)
    every = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    looked = {label for each in every for row in each["rows"] for label in row["gains"]}
    labels = [label for label, *_ in PLACES if label in looked]
    head = ["network", "groups", "share of time", f"shapes that gain ×{PAYS} or more", *(f"whole, {label}" for label in labels)]
    body = table(head, [summary(each, labels) for each in every])
    detail = [
        [
            *(each["network"], str(Shape(*row["shape"])), str(row["layers"]), f"{row['share']:.1%}"),
            *(told(row["gains"][label]) if label in row["gains"] else "" for label in labels),
        ]
        for each in every
        for row in each["rows"]
        if row["gains"]
    ]
    body += "\n\n" + table(["network", "layer", "of these", "share of time", *labels], detail)
    model, x = nn.Conv2d(4, 4, 3), torch.randn(BATCH, 4, 8, 8)
    body += f"\n\n{conditions(whole_setting(model, Workload(x), Inference()))}"
    print(body)
    if chosen.publish:
        publish("grouped", "Convolutions that have groups already", "python benchmarks/grouped.py --publish", body)


if __name__ == "__main__":
    main()
