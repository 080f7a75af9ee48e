"""The networks of GroSS, arXiv 1912.00673, section 4, for 32×32 images of three channels and ten classes. Channels last.

As there, the first convolution of each stays dense when it becomes a supernet: group sizes do not divide three channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torchvision.models import resnet18


def four_layers() -> nn.Sequential:
    """Convolutions 3-32-32-64-64, each with ReLU and pooling, then 256-256-10: 5.1 M MACs."""
    layers: list[nn.Module] = []
    for before, after in pairwise([3, 32, 32, 64, 64]):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return _started(nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)))


def vgg_16() -> nn.Sequential:
    """VGG-16 with batch norms and a head of 512-512-10: 314 M MACs."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return _started(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)))


def resnet_18() -> nn.Module:
    """ResNet-18 for small images: a 3×3 stem that does not stride, pooling of 2: 140 M MACs."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.MaxPool2d(2)
    return _started(model)


def _started(model: nn.Module) -> nn.Module:
    """Start values of He et al., 2015."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)
