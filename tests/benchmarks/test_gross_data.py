"""The loader of CIFAR-10's official binary format, on small files in that format; and the batches made of any images."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gross" / "data.py"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    path, specification = list(sys.path), importlib.util.spec_from_file_location("gross_data", FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["gross_data"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    sys.path[:] = path
    return module


def records(number: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, (number, 1), dtype=np.uint8)
    return np.concatenate([labels, rng.integers(0, 256, (number, 3072), dtype=np.uint8)], axis=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the official archive, seven images in each."""
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for seed, name in enumerate(names):
        records(7, seed).tofile(tmp_path / name)
    return tmp_path


def test_a_record_is_a_label_and_then_red_green_and_blue_row_by_row(data: ModuleType, tmp_path: Path):
    written = records(3)
    written.tofile(tmp_path / "batch.bin")
    pixels, labels = data.read_cifar(tmp_path / "batch.bin")
    assert labels.tolist() == written[:, 0].tolist()
    for channel in range(3):
        for row, column in ((0, 0), (0, 31), (17, 4), (31, 31)):
            expected = written[:, 1 + 1024 * channel + 32 * row + column]
            assert pixels[:, channel, row, column].tolist() == expected.tolist()


def test_batches_one_to_four_train_the_fifth_validates_and_the_test_batch_tests(data: ModuleType, folder: Path):
    found = data.splits(folder)
    assert [len(part) for part in (found.training, found.validation, found.test)] == [28, 7, 7]
    assert found.training.labels.tolist() == [int(label) for seed in range(4) for label in records(7, seed)[:, 0]]
    assert found.validation.labels.tolist() == records(7, 4)[:, 0].tolist()
    assert found.test.labels.tolist() == records(7, 5)[:, 0].tolist()


def test_training_pixels_are_standardised_by_channel(data: ModuleType, folder: Path):
    training = data.splits(folder).training
    x = training.inputs(training.pixels)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("content", [b"", records(2).tobytes()[:-1], bytes(3072)], ids=["empty", "cut short", "no label"])
def test_a_file_of_no_whole_number_of_records_is_refused_by_name(data: ModuleType, tmp_path: Path, content: bytes):
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_1\.bin.*records"):
        data.read_cifar(tmp_path / "data_batch_1.bin")


def test_a_label_that_is_no_class_is_refused(data: ModuleType, tmp_path: Path):
    written = records(2)
    written[1, 0] = 10
    written.tofile(tmp_path / "batch.bin")
    with pytest.raises(ValueError, match="label 10"):
        data.read_cifar(tmp_path / "batch.bin")


def test_augmentation_flips_and_shifts_and_loses_nothing_else(data: ModuleType):
    pixels = torch.randint(1, 256, (40, 3, 32, 32), dtype=torch.uint8)
    moved = data.augmented(pixels, torch.Generator().manual_seed(0))
    # The middle of every image is found again, as it was or mirrored, shifted by at most two pixels.
    seen = set()
    for before, after in zip(pixels, moved, strict=True):
        places = [
            (flip, y, x)
            for flip in (False, True)
            for y in range(5)
            for x in range(5)
            if torch.equal(
                after[:, 2:-2, 2:-2],
                torch.nn.functional.pad(before.flip(2) if flip else before, (2,) * 4)[:, y + 2 : y + 30, x + 2 : x + 30],
            )
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {flip for flip, _, _ in seen} == {False, True}
    assert len(seen) > 20


def test_batches_come_in_another_order_each_epoch_and_again_from_the_same_seed(data: ModuleType, folder: Path):
    training = data.splits(folder).training
    first, again = data.Batches(training, 4, seed=1), data.Batches(training, 4, seed=1)
    epochs = [torch.cat([labels for _, labels in batches]).tolist() for batches in (first, first, again)]
    assert len(first) == 7
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(training.labels.tolist())
