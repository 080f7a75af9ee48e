"""Where tensors lie, and which of them share bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.network.memory import Place, devices_of, overlapping, place, tensors_of, whole_place


def reached(tensor: Tensor) -> tuple[int, int]:
    """From the definition: the first and the last byte of all elements."""
    width, steps = tensor.element_size(), tensor.stride()
    starts = [
        tensor.data_ptr() + width * sum(i * step for i, step in zip(index, steps, strict=True))
        for index in np.ndindex(tuple(tensor.shape))
    ]
    return min(starts), max(starts) + width


BASE = torch.arange(24.0)
VIEWS: dict[str, Tensor] = {
    "contiguous": BASE.view(4, 6),
    "a part": BASE[5:9],
    "transposed": BASE.view(4, 6).T,
    "columns": BASE.view(4, 6)[:, 1:3],
    "every other": BASE[1::2],
    "expanded": BASE[3:4].expand(7),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "one number": BASE[7],
    "half precision": torch.zeros(3, 2, dtype=torch.float16)[:, :1],
    "complex": torch.zeros(3, 2, dtype=torch.complex64)[:, 1],
}


@pytest.mark.parametrize("tensor", VIEWS.values(), ids=VIEWS)
def test_a_place_is_from_the_first_to_the_last_byte_that_an_element_takes(tensor: Tensor) -> None:
    at = place(tensor)
    assert at is not None and (at.start, at.end) == reached(tensor) and at.device == tensor.device


@pytest.mark.parametrize("tensor", VIEWS.values(), ids=VIEWS)
def test_the_whole_place_is_that_of_the_storage(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    assert whole_place(tensor) == Place(tensor.device, storage.data_ptr(), storage.data_ptr() + storage.nbytes())


NOWHERE: dict[str, Tensor] = {
    "empty": torch.empty(0, 3),
    "an empty view of something": BASE[3:3],
    "meta": torch.empty(3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "lazy parameter": nn.UninitializedParameter(),
    "lazy buffer": nn.UninitializedBuffer(),
}


@pytest.mark.parametrize("tensor", NOWHERE.values(), ids=NOWHERE)
def test_what_has_no_bytes_of_its_own_lies_nowhere(tensor: Tensor) -> None:
    assert place(tensor) is None and whole_place(tensor) is None
    assert not list(overlapping([tensor, BASE]))


def test_neighbours_do_not_overlap() -> None:
    a, b = place(BASE[:4]), place(BASE[4:])
    assert a and b and not a.overlaps(b) and not b.overlaps(a)
    one_more = place(BASE[:5])
    assert one_more and one_more.overlaps(b) and b.overlaps(one_more)


def test_equal_addresses_on_two_devices_do_not_overlap() -> None:
    assert not Place(torch.device("cpu"), 64, 128).overlaps(Place(torch.device("cuda", 0), 64, 128))
    assert not Place(torch.device("cuda", 1), 64, 128).overlaps(Place(torch.device("cuda", 0), 64, 128))


def test_tensors_that_share_bytes_are_one_group_and_all_others_none() -> None:
    base, other = torch.zeros(10), torch.zeros(10)
    head, tail = base[:4], base[4:]
    groups = list(overlapping([tail, other, base, head]))
    assert [sorted(map(id, group)) for group in groups] == [sorted(map(id, [base, head, tail]))]


def test_tensors_are_grouped_by_way_of_a_third_one() -> None:
    base = torch.zeros(10)
    a, b, c = base[:4], base[3:8], base[7:]
    (group,) = overlapping([a, c, b])
    assert {id(t) for t in group} == {id(a), id(b), id(c)}
    assert not list(overlapping([a, c])), "without the third they are apart"


def test_a_short_tensor_within_a_long_one_does_not_end_the_group() -> None:
    base = torch.zeros(10)
    whole, short, late = base[:9], base[1:2], base[5:6]
    (group,) = overlapping([whole, short, late])
    assert len(group) == 3


def test_several_groups_are_found_in_one_go() -> None:
    one, two, alone = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    groups = list(overlapping([one, two, alone, one[:2], two[1:]]))
    assert sorted(len(group) for group in groups) == [2, 2]
    assert not any(t is alone for group in groups for t in group)


def test_the_same_tensor_twice_is_no_group() -> None:
    tensor = torch.zeros(4)
    assert not list(overlapping([tensor, tensor]))


def test_memory_of_numpy_is_memory() -> None:
    array = np.zeros(4, dtype=np.float32)
    (group,) = overlapping([torch.from_numpy(array), torch.from_numpy(array[2:])])
    assert len(group) == 2


def test_a_module_holds_its_parameters_its_buffers_and_its_plain_attributes() -> None:
    module = nn.BatchNorm1d(2)
    module.plain = torch.zeros(1)
    module.several = [torch.zeros(1)]
    module.child = nn.Linear(2, 2)
    module.bias = None
    held = {id(t) for t in tensors_of(module)}
    wanted = [module.weight, module.running_mean, module.running_var, module.num_batches_tracked, module.plain]
    assert held == {id(t) for t in wanted}


def test_what_holds_no_value_lies_nowhere_even_within_something() -> None:
    whole = torch.ones(3)
    assert place(whole[1:1]) is None and whole_place(whole[1:1]) is None
    assert list(overlapping([whole, whole[1:1]])) == []


def test_the_devices_of_networks_are_those_of_all_parameters_and_buffers_that_of_the_first_parameter_first() -> None:
    meta, here = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)
    norm = nn.BatchNorm1d(2, affine=False)
    assert devices_of(meta, here) == [torch.device("meta"), torch.device("cpu")] == devices_of(nn.Sequential(meta, norm))
    assert devices_of(nn.ReLU()) == devices_of() == []
