"""Fashion-MNIST for the demo: which images, and where they are found.

The repository carries the 10,000 test images and the last 10,000 training images in ``data/``: the first 5,000 of these
calibrate and fine-tune, the other 5,000 validate. The network in ``weights/`` was trained on the first 50,000 training images
and has seen none of them.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CARRIED = HERE / "data"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAINED_ON = 50_000


@dataclass(frozen=True, slots=True)
class Images:
    """Images ``(N, 1, 28, 28)`` in [0, 1], float32, and labels ``(N,)``, int64."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, part: slice) -> Images:
        return Images(self.images[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: Path) -> np.ndarray:
    """Read one gzip-compressed IDX file of bytes.

    Raises:
        ValueError: The file is not a whole IDX file of unsigned bytes; the message names it.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
        zero, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (EOFError, gzip.BadGzipFile, struct.error) as error:
        raise ValueError(f"{path} is not a whole gzip-compressed IDX file: {error}") from error
    body = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if zero != 0 or kind != 0x08 or body.size != int(np.prod(shape)):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes, or it is cut short")
    return body.reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes as a gzip-compressed IDX file; the same array gives the same bytes."""
    head = struct.pack(">HBB", 0, 0x08, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + np.ascontiguousarray(array, np.uint8).tobytes(), 9, mtime=0))


def read_images(images: Path, labels: Path) -> Images:
    """Read an image file and its label file."""
    pixels = torch.from_numpy(read_idx(images).astype(np.float32) / 255).unsqueeze(1)
    return Images(pixels, torch.from_numpy(read_idx(labels).astype(np.int64)))


def test_images() -> Images:
    """The 10,000 test images, from the repository."""
    return read_images(CARRIED / "t10k-images-idx3-ubyte.gz", CARRIED / "t10k-labels-idx1-ubyte.gz")


def tuning_images() -> Images:
    """The first 5,000 of the last 10,000 training images: to calibrate and fine-tune."""
    return _last_10k()[:5_000]


def validation_images() -> Images:
    """The other 5,000 of the last 10,000 training images."""
    return _last_10k()[5_000:]


def base_images(folder: Path | None = None) -> Images:
    """The first 50,000 training images, on which the base network is trained.

    Found in the folder named, else in Debian's package ``dataset-fashion-mnist``, else through torchvision's download.

    Raises:
        FileNotFoundError: None of the three has the training set.
    """
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    places = [folder] if folder else [DEBIAN]
    for place in places:
        if all((place / name).is_file() for name in names):
            return read_images(place / names[0], place / names[1])[:TRAINED_ON]
    if folder:
        raise FileNotFoundError(f"{folder} does not hold {names[0]} and {names[1]}")
    try:
        from torchvision.datasets import FashionMNIST

        found = FashionMNIST(str(HERE / "downloads"), train=True, download=True)
    except (ImportError, RuntimeError, OSError) as error:
        raise FileNotFoundError(
            "the Fashion-MNIST training set is not here: name a folder with --data, install Debian's dataset-fashion-mnist, "
            f"or let torchvision download it (it said: {error})"
        ) from error
    return Images(found.data.unsqueeze(1).float() / 255, found.targets)[:TRAINED_ON]


def _last_10k() -> Images:
    return read_images(CARRIED / "train-last10k-images-idx3-ubyte.gz", CARRIED / "train-last10k-labels-idx1-ubyte.gz")
