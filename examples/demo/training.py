"""What training and scoring the demo's networks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from fashion import Images
from torch import Tensor, nn


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to two pixels."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2))
    shift = torch.randint(0, 5, (len(images), 2), generator=generator)
    rows = shift[:, 0, None] + torch.arange(28)
    columns = shift[:, 1, None] + torch.arange(28)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images, batch: int = 100) -> float:
    """Share of the images whose largest score is their label's, in eval mode."""
    training = model.training
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(data.images.split(batch), data.labels.split(batch), strict=True)
    )
    model.train(training)
    return right / len(data)


class Augmented:
    """Batches of augmented images, in another order and with other flips and shifts every epoch.

    What does not fill a batch is left out.
    """

    def __init__(self, data: Images, batch: int = 64, seed: int = 0) -> None:
        self.data = data
        self.batch = batch
        # lamina.finetune keeps its state in checkpoints by this name.
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data), generator=self.generator)
        for chosen in order[: len(self) * self.batch].split(self.batch):
            yield augment(self.data.images[chosen], self.generator), self.data.labels[chosen]
