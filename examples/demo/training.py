"""What training and scoring the demo's networks share."""

from __future__ import annotations

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
def accuracy(model: nn.Module, data: Images, batch: int = 500) -> float:
    """Share of the images whose largest score is their label's, in eval mode."""
    training = model.training
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(data.images.split(batch), data.labels.split(batch), strict=True)
    )
    model.train(training)
    return right / len(data)


def fine_tune(model: nn.Module, teacher: nn.Module, data: Images, *, epochs: int, rate: float = 0.01, seed: int = 0) -> None:
    """Train a decomposed network shortly: on the labels, and on the untouched network's answers (Hinton et al., 2015)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    batch = 64
    steps = len(data) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    teacher.eval()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            x, y = augment(data.images[chosen], generator), data.labels[chosen]
            with torch.inference_mode():
                wanted = teacher(x).softmax(1)
            scores = model(x)
            loss = 0.5 * F.cross_entropy(scores, y) + 0.5 * F.cross_entropy(scores, wanted.clone())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
