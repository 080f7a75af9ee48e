"""The pool of weights that are timed: its memory is bounded, and no sample finds its weights warmer than another."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from lamina.measure import pool as room
from lamina.measure.clock import Effort, interleave
from lamina.measure.pool import Pool, moving, pool_of

CPU = torch.device("cpu")


def reserved(numbers: int) -> Pool:
    pool = Pool(CPU, torch.float32)
    pool.reserve(numbers)
    return pool


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "cache_bytes", lambda device: 4000)


LIKES = {
    "matrix": torch.empty(6, 9),
    "transposed": torch.empty(9, 6).T,
    "channels last": torch.empty(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
def test_a_weight_has_the_shape_and_the_strides_asked_for_and_no_memory_of_its_own(like: torch.Tensor, small_cache) -> None:
    pool = reserved(200)
    one, two = pool.view(like), pool.view(like)
    assert one.shape == like.shape and one.stride() == like.stride()
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def test_weights_are_ordinary_numbers_and_no_two_of_one_form_are_the_same(small_cache) -> None:
    pool = reserved(50_000)
    one, two = pool.view(torch.empty(100, 200)), pool.view(torch.empty(200, 100))
    assert one.std() == pytest.approx(1 / 32, rel=0.05) and abs(one.mean()) < 1e-3
    assert not torch.equal(one.flatten(), two.flatten())


@pytest.mark.parametrize("sizes", [[7], [900, 3], [400] * 9, [1000, 1, 1000]])
def test_between_two_runs_that_read_one_place_more_than_the_cache_holds_is_read(sizes: list[int], small_cache) -> None:
    pool, read = reserved(max(sizes)), []
    weights = [[nn.Parameter(pool.view(torch.empty(size)), requires_grad=False)] for size in sizes]

    def run_of(weight: nn.Parameter) -> None:
        read.append((weight.storage_offset(), weight.storage_offset() + weight.numel()))

    runs, moves = [lambda w=w: run_of(w) for (w,) in weights], [moving(pool, each) for each in weights]
    interleave(runs, CPU, Effort(0.0, 50, 50, precision=0, sample=20e-6), moves)  # of which a sample is several calls
    assert len(read) > 200
    line = 64 // 4
    passed, last = 0, {}  # numbers that came into the cache so far, in lines, and when each of them did
    for start, end in read:
        assert start % line == 0  # as an allocator has it
        end = -(-end // line) * line
        assert all(passed - last[place] >= 1000 for place in range(start, end) if place in last)
        passed += end - start
        last |= dict.fromkeys(range(start, end), passed)


def test_a_pool_is_shared_by_layers_of_one_dtype_and_ends_with_its_last_holder() -> None:
    weight = torch.empty(1)
    pool = pool_of(weight)
    assert pool_of(torch.empty(3)) is pool and pool_of(weight.double()) is not pool
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None


MEASURE = """
import resource
import torch
from torch import nn
from lamina import Dense, Inference, LowRank, Training
from lamina.measure import pool
from lamina.measure.clock import Effort
from lamina.measure.conditions import setting_of
from lamina.measure.layer_times import measure_forms
from lamina.network.walk import walk
from lamina.values import Use

pool.cache_bytes = lambda device: 2**23
torch.set_num_threads(1)
layer = walk(nn.Linear(2048, 2048)).layers[""]
setting = setting_of(layer.module, "inference", channels_last=False)

def measure(forms, mode):
    use = Use((512, 2048), (512, 2048))
    measure_forms(layer, forms, use, False, mode, setting, Effort(0.0, 1, 1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for mode in (Inference(), Training()):
    before = measure([Dense(), LowRank(512)], mode)
    print(measure([Dense(), *(LowRank(rank) for rank in range(448, 512))], mode) - before)
"""


def test_many_forms_take_no_more_memory_than_few() -> None:
    # 64 forms of 15 MB each, and in training as many gradients of their outputs, 4 MB each.
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert all(int(grown) < 40 for grown in ran.stdout.split()), ran.stdout
