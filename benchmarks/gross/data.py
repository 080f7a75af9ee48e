"""Images for the experiments of GroSS: 32×32 pixels, three channels, split into training, validation and test.

Without a folder Fashion-MNIST, padded from 28×28 and its grey repeated: 50,000 / 10,000 / 10,000. With a folder CIFAR-10 in its
official binary format, split as in arXiv 1912.00673: batches 1 to 4, batch 5, the test batch. Pixels stay bytes until a batch
is made of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))
import fashion

SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
SHIFT = 2


@dataclass(frozen=True, slots=True)
class Images:
    """Bytes ``(N, 1 or 3, 32, 32)``, labels ``(N,)``, and mean and deviation of the training pixels, by channel."""

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    deviation: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, number: int) -> Images:
        return Images(self.pixels[:number], self.labels[:number], self.mean, self.deviation)

    def inputs(self, pixels: Tensor) -> Tensor:
        """What a network is fed: ``(N, 3, 32, 32)``, standardised."""
        x = (pixels.float() / 255 - self.mean) / self.deviation
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class Splits:
    name: str
    training: Images
    validation: Images
    test: Images


class Batches:
    """Batches of flipped and shifted images, in another order every epoch; what does not fill a batch is left out."""

    def __init__(self, data: Images, batch: int, seed: int) -> None:
        self.data, self.batch = data, batch
        # lamina keeps the state of what bears this name in checkpoints.
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data), generator=self.generator)
        for chosen in order[: len(self) * self.batch].split(self.batch):
            pixels = augmented(self.data.pixels[chosen], self.generator)
            yield self.data.inputs(pixels), self.data.labels[chosen]


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images, and shift each by up to two pixels."""
    N, C, H, W = pixels.shape
    flip = torch.rand(N, generator=generator) < 0.5
    pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
    padded = F.pad(pixels, (SHIFT,) * 4)
    shift = torch.randint(0, 2 * SHIFT + 1, (N, 2), generator=generator)
    rows = (shift[:, 0, None] + torch.arange(H))[:, None, :, None]
    columns = (shift[:, 1, None] + torch.arange(W))[:, None, None, :]
    return padded[torch.arange(N)[:, None, None, None], torch.arange(C)[None, :, None, None], rows, columns]


def in_order(data: Images, batch: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """All images as they are, once."""
    for pixels, labels in zip(data.pixels.split(batch), data.labels.split(batch), strict=True):
        yield data.inputs(pixels), labels


def splits(cifar: Path | None = None) -> Splits:
    """Training, validation and test images."""
    if cifar is not None:
        training = [read_cifar(cifar / f"data_batch_{number}.bin") for number in range(1, 5)]
        pixels, labels = (torch.cat(parts) for parts in zip(*training, strict=True))
        return _standardised(
            "CIFAR-10", (pixels, labels), read_cifar(cifar / "data_batch_5.bin"), read_cifar(cifar / "test_batch.bin")
        )
    held_out = [_padded(part) for part in (fashion.tuning_images(), fashion.validation_images())]
    validation = tuple(torch.cat(parts) for parts in zip(*held_out, strict=True))
    return _standardised("Fashion-MNIST", _padded(fashion.base_images()), validation, _padded(fashion.test_images()))


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of a file of CIFAR-10's binary format: one byte of label, then 1,024 of red, green and blue each.

    Raises:
        ValueError: The file is no whole number of records, or a label is none of the ten classes; the message names it.
    """
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % RECORD:
        raise ValueError(f"{path} has {content.size:,} bytes, no whole number of records of {RECORD:,}; it may be cut short")
    records = torch.from_numpy(content).view(-1, RECORD)
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise ValueError(f"{path} has the label {int(labels.max())}; CIFAR-10's classes are 0 to 9")
    return records[:, 1:].reshape(-1, 3, SIDE, SIDE).contiguous(), labels


def _padded(images: fashion.Images) -> tuple[Tensor, Tensor]:
    margin = (SIDE - images.images.shape[-1]) // 2
    pixels = (images.images * 255).round().to(torch.uint8)
    return F.pad(pixels, (margin,) * 4), images.labels


def _standardised(name: str, *parts: tuple[Tensor, Tensor]) -> Splits:
    pixels = parts[0][0].double() / 255
    mean, deviation = (value.float().view(1, -1, 1, 1) for value in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    training, validation, test = (Images(*part, mean, deviation) for part in parts)
    return Splits(name, training, validation, test)
