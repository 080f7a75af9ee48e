"""Examples without their values: what is remembered comes back with its structure, shapes, types and ranges."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import hypothesis.strategies as st
import pydantic
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import lamina
from lamina import PlanError, Workload
from lamina.examples import ExampleShape, MappingShape, SequenceShape, TensorShape, example_from, example_shape

MODEL = nn.Linear(2, 2)


def recorded(*args: Any, **kwargs: Any) -> ExampleShape:
    """The shape of some arguments, as it comes out of a file."""
    workload = Workload(args)
    workload.kwargs.update(kwargs)
    shape = example_shape(workload)
    assert shape is not None
    return ExampleShape.model_validate_json(shape.model_dump_json(), strict=True)


def again(*args: Any) -> tuple[Any, ...]:
    """Some arguments as they are made anew."""
    return example_from(recorded(*args), MODEL).args


def made(**tensor: Any) -> torch.Tensor:
    """The tensor that a plan's words make."""
    result: torch.Tensor = example_from(ExampleShape(args=(TensorShape(**tensor),)), MODEL).args[0]
    return result


def outline(value: Any) -> Any:
    """A value with its types, and tensors by shape and dtype."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return type(value), [outline(item) for item in value]
    if isinstance(value, dict):
        return dict, {name: outline(item) for name, item in value.items()}
    return type(value), value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    yield from (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = draw(st.lists(st.integers(0, 120), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(draw(st.sampled_from(DTYPES)))


CONSTANTS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
)
TREES = st.recursive(
    CONSTANTS | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=12,
)


# ---- what comes back ----


@settings(max_examples=200, deadline=None)
@given(TREES, TREES)
def test_arguments_come_back_with_the_same_structure(one: Any, two: Any) -> None:
    workload = example_from(recorded(one, named=two), MODEL)
    assert outline(workload.args) == outline((one,))
    assert outline(workload.kwargs) == outline({"named": two})


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_values_lie_between_those_that_were_seen(tensor: torch.Tensor) -> None:
    (new,) = again(tensor)
    if tensor.numel() and not tensor.is_complex():
        seen, drawn = tensor.double(), new.double()
        assert seen.min() <= drawn.min() and drawn.max() <= seen.max()


def test_both_ends_of_a_range_of_whole_numbers_are_drawn() -> None:
    assert made(shape=(200,), dtype="int64", low=3, high=5).unique().tolist() == [3, 4, 5]
    assert made(shape=(200,), dtype="bool", low=0, high=1).unique().tolist() == [False, True]


def test_values_of_a_recorded_range_fill_it() -> None:
    values = made(shape=(2000,), dtype="float32", low=-3.0, high=7.0)
    assert values.min() < -2.9 and values.max() > 6.9
    assert values.mean().item() == pytest.approx(2.0, abs=0.3)  # 4.6 standard errors of a uniform sample's mean


def test_lengths_stay_lengths_and_a_packed_network_runs() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))

    Packed()(*again(torch.randn(2, 5, 4), torch.tensor([3, 5])))


def test_token_ids_stay_in_the_vocabulary() -> None:
    nn.Embedding(7, 3)(*again(torch.tensor([[2, 6, 0], [1, 1, 5]])))


EXTREMES = {
    "all of int64": (torch.tensor([-(2**63), 2**63 - 1]), (-(2**63), 2**63 - 1)),
    "the last of int64": (torch.tensor([2**63 - 1]), (2**63 - 1, 2**63 - 1)),
    "all of float64": (torch.tensor([-1.79e308, 1.79e308], dtype=torch.float64), (-1.79e308, 1.79e308)),
    "a single double": (torch.tensor([1 / 3], dtype=torch.float64), (1 / 3, 1 / 3)),
    "a single float": (torch.tensor([0.7]), (torch.tensor(0.7).item(),) * 2),
    "all of uint16": (torch.tensor([0, 65535], dtype=torch.uint16), (0, 65535)),
    "all of int8": (torch.tensor([-128, 127], dtype=torch.int8), (-128, 127)),
}


@pytest.mark.parametrize(("tensor", "ends"), EXTREMES.values(), ids=EXTREMES)
def test_the_widest_and_the_narrowest_range_come_back(tensor: torch.Tensor, ends: tuple[float, float]) -> None:
    entry = recorded(tensor.repeat(50)).args[0]
    assert isinstance(entry, TensorShape) and (entry.low, entry.high) == ends
    (new,) = again(tensor.repeat(2500))
    assert (len(set(new.tolist())) > 1) == (ends[0] < ends[1])
    assert all(ends[0] <= value <= ends[1] for value in new.tolist())


RANGELESS = {
    "empty": torch.empty(0, 3),
    "infinite": torch.tensor([0.0, float("-inf")]),
    "infinite above": torch.tensor([0.0, float("inf")]),
    "not a number": torch.tensor([1.0, float("nan")]),
    "complex": torch.ones(2, dtype=torch.complex64),
    "without values": torch.ones(2, device="meta"),
    "unsigned beyond signed": torch.tensor([1, 2**64 - 1], dtype=torch.uint64),
}


@pytest.mark.parametrize("tensor", RANGELESS.values(), ids=RANGELESS)
def test_a_range_that_is_not_known_is_not_recorded(tensor: torch.Tensor) -> None:
    assert recorded(tensor).args == (TensorShape(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch.")),)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_floating_point_without_a_range_is_normal(dtype: str) -> None:
    values = made(shape=(4000,), dtype=dtype)
    assert values.dtype == getattr(torch, dtype)
    parts = torch.view_as_real(values).double() if values.is_complex() else values.double()
    # A complex normal number shares its variance of 1 between its two parts.
    assert parts.std().item() == pytest.approx(math.sqrt(0.5) if values.is_complex() else 1.0, rel=0.06)
    assert abs(parts.mean().item()) < 0.08


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_long_dtype_is_filled_to_its_last_digit(dtype: torch.dtype) -> None:
    values = made(shape=(100,), dtype=str(dtype).removeprefix("torch."))
    short = torch.complex64 if dtype.is_complex else torch.float32
    assert (values != values.to(short).to(dtype)).sum() > 90


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "uint16"])
def test_whole_numbers_without_a_range_are_zeros(dtype: str) -> None:
    assert torch.equal(made(shape=(3, 2), dtype=dtype), torch.zeros(3, 2, dtype=getattr(torch, dtype)))


def test_an_example_of_an_older_plan_is_read() -> None:
    args = '[{"shape":[2,3],"dtype":"float32"},true,1,1.5,"a",null]'
    old = f'{{"args":{args},"kwargs":{{"x":{{"shape":[2],"dtype":"int64"}}}},"weight":0.5}}'
    workload = example_from(ExampleShape.model_validate_json(old, strict=True), MODEL)
    assert outline(workload.args) == outline((torch.empty(2, 3), True, 1, 1.5, "a", None))
    assert torch.equal(workload.kwargs["x"], torch.zeros(2, dtype=torch.int64)) and workload.weight == 0.5


# ---- how it is drawn ----


def test_an_example_is_the_same_at_each_call() -> None:
    shape = recorded(torch.randn(3, 4), torch.randint(9, (5,)))
    one, two = example_from(shape, MODEL), example_from(shape, MODEL)
    assert all(torch.equal(a, b) for a, b in zip(one.args, two.args, strict=True))


def test_an_example_is_drawn_from_the_seed_0() -> None:
    expected = torch.empty(5).normal_(generator=torch.Generator("cpu").manual_seed(0))
    assert torch.equal(made(shape=(5,), dtype="float32"), expected)


def test_two_tensors_of_one_shape_are_not_the_same() -> None:
    one, two = again(torch.randn(3, 4), torch.randn(3, 4))
    assert not torch.equal(one, two)


def test_the_users_random_state_is_neither_read_nor_changed() -> None:
    shape = recorded(torch.randn(3), torch.randint(9, (5,)))
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), example_from(shape, MODEL)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one.args[0], example_from(shape, MODEL).args[0])


def test_the_default_device_and_dtype_do_not_matter() -> None:
    x = torch.randn(3), torch.arange(5), torch.ones(2, dtype=torch.complex64)
    expected = again(*x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            there = again(*x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, there, strict=True))


def test_an_example_is_made_on_the_networks_device() -> None:
    shape = recorded([torch.randn(3), torch.arange(5)])
    assert {t.device.type for t in tensors_in(example_from(shape, nn.Linear(2, 2, device="meta")).args)} == {"meta"}
    assert {t.device.type for t in tensors_in(example_from(shape, nn.ReLU()).args)} == {"cpu"}


def test_a_weight_is_kept() -> None:
    shape = example_shape(Workload(torch.ones(2), 0.25))
    assert shape is not None and example_from(shape, MODEL).weight == 0.25


# ---- what cannot be recorded, and what makes no sense ----


class Colour(IntEnum):
    red = 1


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


def holding_itself() -> list[Any]:
    items: list[Any] = []
    items += [items, items]
    return items


def nested(depth: int) -> list[Any]:
    items: list[Any] = []
    for _ in range(depth):
        items = [items]
    return items


UNRECORDABLE = {
    "dataclass": Batch(torch.ones(2)),
    "set": {1, 2},
    "size": torch.Size([2]),
    "named tuple": namedtuple("Pair", "a b")(1, 2),
    "ordered dict": OrderedDict(a=1),
    "enumeration": Colour.red,
    "keys of numbers": {1: torch.ones(2)},
    "dtype": torch.float32,
    "sparse": torch.eye(3).to_sparse(),
    "nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "bits": torch.empty(2, dtype=torch.bits8),
    "infinity": float("inf"),
    "half a surrogate pair": "\ud800",
    "a key of half a surrogate pair": {"\ud800": 1},
    "5,000 digits": 10**5000,
    "itself": holding_itself(),
    "too deep": nested(100),
    "too large": torch.empty(2**31 + 1, device="meta"),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a list"])
@pytest.mark.parametrize("value", UNRECORDABLE.values(), ids=UNRECORDABLE)
def test_what_a_file_cannot_give_back_is_not_recorded(value: Any, inside: bool) -> None:
    assert example_shape(Workload(([value] if inside else value,))) is None


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_is_not_recorded() -> None:
    assert example_shape(Workload(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8))) is None


def test_nesting_that_a_detector_or_a_decoder_has_is_recorded() -> None:
    assert outline(again(nested(20))) == outline((nested(20),))


NONSENSE = {
    "no dtype": {"shape": (2,), "dtype": "float99"},
    "a function": {"shape": (2,), "dtype": "load"},
    "quantised": {"shape": (2,), "dtype": "quint8"},
    "bits": {"shape": (2,), "dtype": "bits8"},
    "packed": {"shape": (2,), "dtype": "float4_e2m1fn_x2"},
    "too large": {"shape": (2**40, 8), "dtype": "float32"},
    "too large for a float": {"shape": (2**62,) * 30, "dtype": "float32"},
    "too large for a number": {"shape": (0, 2**70), "dtype": "float32"},
    "beyond its dtype": {"shape": (2,), "dtype": "uint8", "low": -1, "high": 3},
    "beyond a short float": {"shape": (2,), "dtype": "float16", "low": 0, "high": 1e30},
    "beyond truth": {"shape": (2,), "dtype": "bool", "low": 0, "high": 2},
    "fractions of whole numbers": {"shape": (2,), "dtype": "int64", "low": 0.5, "high": 0.6},
    "a complex range": {"shape": (2,), "dtype": "complex64", "low": 0.0, "high": 1.0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tensor", NONSENSE.values(), ids=NONSENSE)
def test_an_example_that_makes_no_sense_is_refused_in_a_line(tensor: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"^the plan's example makes no sense: ") as caught:
        made(**tensor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"shape": (2, -3)}, {"low": 3, "high": 2}], ids=str)
def test_nonsense_that_was_put_past_the_checks_is_refused_too(change: dict[str, Any]) -> None:
    tensor = TensorShape(shape=(2, 3), dtype="int64").model_copy(update=change)
    with pytest.raises(PlanError, match="the plan's example makes no sense"):
        example_from(ExampleShape().model_copy(update={"args": (tensor,)}), MODEL)


def test_tensors_that_are_too_large_only_together_are_refused() -> None:
    each = TensorShape(shape=(3 * 2**27,), dtype="float64")
    shape = ExampleShape(args=(SequenceShape(kind="list", items=(each,) * 2),), kwargs={"x": MappingShape(items={"y": each})})
    with pytest.raises(PlanError, match=r"its tensors take more than 8\.59 G bytes"):
        example_from(shape, MODEL)


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": (-1,)},
        {"shape": (1.5,)},
        {"low": 1},
        {"high": 1},
        {"low": 2, "high": 1},
        {"low": float("-inf"), "high": 1.0},
        {"low": 0.0, "high": float("nan")},
    ],
    ids=str,
)
def test_a_tensor_of_a_plan_has_sides_and_an_ordered_range_or_none(tensor: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        TensorShape(**({"shape": (2,), "dtype": "int64"} | tensor))


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_an_example_weighs_something(weight: float) -> None:
    with pytest.raises(pydantic.ValidationError):
        ExampleShape(weight=weight)


@pytest.mark.parametrize("name", ["ExampleShape", "TensorShape"])
def test_plans_know_the_shapes_of_examples(name: str) -> None:
    assert getattr(lamina.plan, name) is getattr(lamina.examples, name)


# ---- detectors ----

DETECTORS = ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_runs_on_the_example_made_anew(name: str) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80)]
    targets = [{"boxes": torch.tensor([[1.0, 2.0, 30.0, 40.0]]), "labels": torch.tensor([1])} for _ in images]
    new = again(images, targets)
    assert outline(new) == outline((images, targets))
    with torch.no_grad():
        assert len(model(new[0])) == 2
