"""The values that the rooms hand each other."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from pydantic import TypeAdapter, ValidationError

from lamina import Cost, ExampleError, Geometry, Setting, Timing, Workload
from lamina.network import readers
from lamina.values import DIMENSIONS, Use, change, closest, quantity, workloads

SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 2, "inference", versions="torch 2")
CONV = Geometry("Conv2d", 512, 256, True, (3, 3), (2, 2), (1, 1), (1, 1))


def test_a_geometry_prints_as_it_is_said() -> None:
    assert str(CONV) == "Conv2d 256→512 3×3 stride 2"
    assert str(Geometry("Linear", 10, 64, False)) == "Linear 64→10"


def test_a_dense_layer_has_a_weight_for_each_pair_of_channels_and_tap_and_a_bias_for_each_output() -> None:
    assert CONV.parameters == 512 * 256 * 9 + 512
    assert dataclasses.replace(CONV, bias=False).parameters == 512 * 256 * 9


def test_a_one_by_one_convolution_is_pointwise_like_a_linear_layer() -> None:
    assert dataclasses.replace(CONV, kernel=(1, 1)).pointwise
    assert Geometry("Linear", 10, 64, False).pointwise
    assert not CONV.pointwise


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Layers of every type, all attributes drawn."""
    kind, sides = draw(st.sampled_from(list(DIMENSIONS.items())))

    def each(least: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(least, 2**10), min_size=sides, max_size=sides)))

    transposed = kind.startswith("ConvTranspose")
    padding = draw(st.sampled_from(["same", "valid"])) if sides and not transposed and draw(st.booleans()) else each(0)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    out, into = draw(st.integers(1, 2**14)), draw(st.integers(1, 2**14))
    more = each(0) if transposed else ()
    groups = draw(st.integers(1, 2**7)) if sides and not transposed else 1
    channels = tuple(-(-number // groups) * groups for number in (out, into))
    return Geometry(kind, *channels, draw(st.booleans()), each(1), each(1), padding, each(1), mode, more, groups)


FILED = TypeAdapter(Geometry)


@given(geometries())
def test_a_geometry_is_read_as_it_was_written(geometry: Geometry) -> None:
    assert FILED.validate_json(FILED.dump_json(geometry), strict=True) == geometry


@given(geometries(), st.sampled_from(["kernel", "stride", "padding", "dilation"]), st.integers(0, 5))
def test_a_geometry_whose_numbers_do_not_agree_with_its_type_is_not_read(geometry: Geometry, name: str, count: int) -> None:
    changed = dataclasses.replace(geometry, **{name: (1,) * count})
    if count == DIMENSIONS[geometry.type]:
        assert FILED.validate_json(FILED.dump_json(changed), strict=True) == changed
    else:
        with pytest.raises(ValidationError, match=f"{name} .* of a {geometry.type}"):
            FILED.validate_json(FILED.dump_json(changed), strict=True)


@pytest.mark.parametrize(
    ("kind", "channels", "groups"),
    [("Conv2d", (6, 4), 4), ("Conv2d", (4, 6), 4), ("ConvTranspose2d", (4, 4), 2), ("Linear", (4, 4), 2)],
)
def test_groups_that_no_layer_can_have_are_not_read(kind: str, channels: tuple[int, int], groups: int) -> None:
    sides = DIMENSIONS[kind]
    more = {"output_padding": (0,) * sides} if kind.startswith("ConvTranspose") else {}
    numbers = (3,) * sides, (1,) * sides, (0,) * sides, (1,) * sides
    one = Geometry(kind, *channels, True, *numbers, **more)
    assert FILED.validate_json(FILED.dump_json(one), strict=True) == one
    with pytest.raises(ValidationError, match=f"{groups} groups of a {kind}"):
        FILED.validate_json(FILED.dump_json(dataclasses.replace(one, groups=groups)), strict=True)


def test_a_layer_in_groups_has_the_weights_of_its_groups_and_says_so() -> None:
    layer = Geometry("Conv2d", 12, 8, True, (3, 3), (1, 1), (1, 1), (1, 1), groups=4)
    assert layer.widths == (2, 3) and layer.parameters == 4 * 2 * 3 * 9 + 12
    assert str(layer) == "Conv2d 8→12 3×3 in 4 groups"


def test_every_type_of_layer_that_can_be_read_from_a_network_can_be_read_from_a_file() -> None:
    assert set(readers._OF_KIND) == set(DIMENSIONS)


def test_a_value_made_in_python_is_not_asked_what_a_file_is() -> None:
    assert Geometry("Linear", 0, 4, False).parameters == 0
    assert Cost(-1, -1).macs == -1


def test_a_type_of_layer_that_files_do_not_know_is_told_when_it_is_planned() -> None:
    with pytest.raises(ValidationError, match="'Evil' is no type of layer that is known: Linear, "):
        FILED.validate_python(Geometry("Evil", 3, 4, False))


def test_positions_are_all_leading_dimensions_of_a_linear_layer() -> None:
    assert Use((4, 7, 64), (4, 7, 10)).positions(Geometry("Linear", 10, 64, False)) == (28, 28)
    assert Use((64,), (10,)).positions(Geometry("Linear", 10, 64, False)) == (1, 1)


def test_positions_are_batch_times_map_of_a_convolution() -> None:
    assert Use((4, 256, 8, 6), (4, 512, 4, 3)).positions(CONV) == (4 * 48, 4 * 12)


EXAMPLES = {
    "a tensor": (torch.zeros(2, 3), "2×3"),
    "a tuple": ((torch.zeros(2, 3), torch.zeros(4)), "2×3, 4"),
    "a mapping": ({"x": torch.zeros(2, 3), "flag": True}, "2×3"),
    "a scalar tensor": (torch.tensor(1.0), "scalar"),
    "no tensor": ((1, 2), "no tensor"),
}


@pytest.mark.parametrize(("example", "printed"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_workload_prints_the_shapes_it_feeds(example: object, printed: str) -> None:
    assert str(Workload(example)) == printed


def test_a_workload_passes_tuples_by_position_and_mappings_by_name() -> None:
    class Difference(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert Workload((one, two)).run(Difference()) == -1
    assert Workload({"b": one, "a": two}).run(Difference()) == 1


def test_weights_of_several_workloads_are_made_to_sum_to_one() -> None:
    x = torch.zeros(1)
    assert [w.weight for w in workloads([Workload(x, 3), Workload(x, 1)])] == [0.75, 0.25]
    assert [w.weight for w in workloads(x)] == [1]
    assert [w.weight for w in workloads(Workload(x, 7))] == [1]


@pytest.mark.parametrize("example", [[], [torch.zeros(1)], [Workload(torch.zeros(1)), 3]], ids=["empty", "tensors", "mixed"])
def test_a_list_of_anything_but_workloads_is_refused(example: object) -> None:
    with pytest.raises(ExampleError, match="Workload"):
        workloads(example)


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_workload_weighs_something(weight: float) -> None:
    with pytest.raises(ExampleError, match="positive"):
        Workload(torch.zeros(1), weight)


def test_a_timing_prints_its_median_spread_and_runs() -> None:
    assert str(Timing(0.00421, 0.00003, 25, SETTING)) == "4.21 ms ± 0.03 (25 runs)"


def test_a_cost_prints_its_time_only_where_there_is_one() -> None:
    assert str(Cost(2_360_000, 462_000_000)) == "2.36 M parameters, 462 M MACs"
    assert str(Cost(10, 20, Timing(0.001, 0.0, 3, SETTING))).endswith("1 ms ± 0 (3 runs)")


def test_settings_differ_where_any_condition_differs() -> None:
    for name, value in dataclasses.asdict(SETTING).items():
        other = value + 1 if isinstance(value, int) else f"{value}'"
        assert dataclasses.replace(SETTING, **{name: other}) != SETTING


def test_a_setting_prints_its_conditions_in_one_line() -> None:
    line = str(dataclasses.replace(SETTING, autocast="bfloat16"))
    assert "\n" not in line
    for word in ("a CPU", "2 threads", "float32", "contiguous", "inference", "autocast bfloat16", "torch 2"):
        assert word in line


@pytest.mark.parametrize(
    ("number", "printed"), [(0, "0"), (12, "12"), (1000, "1 k"), (25_557_032, "25.6 M"), (4.1e9, "4.1 G"), (-2500, "-2.5 k")]
)
def test_quantities_have_three_digits_and_a_prefix(number: float, printed: str) -> None:
    assert quantity(number) == printed


@pytest.mark.parametrize(
    ("before", "after", "printed"),
    [
        (330, 136, "330 → 136"),
        (25_557_032, 810_000, "25.6 → 0.81 M"),
        (330, 1200, "0.33 → 1.2 k"),
        (5e9, 5e9, "5 G"),
        (0, 0, "0"),
    ],
)
def test_a_change_has_one_unit_and_of_what_stays_one_number(before: float, after: float, printed: str) -> None:
    assert change(before, after) == printed


def test_a_misspelt_name_is_answered_with_the_nearest_known_ones() -> None:
    assert "layer1.conv1" in closest("layer1.cov1", ["layer1.conv1", "fc"])
    assert closest("zzz", ["layer1.conv1", "fc"]) == ""


VALUES = {
    "geometry": CONV,
    "use": Use((1,), (1,)),
    "setting": SETTING,
    "timing": Timing(1.0, 0.1, 3, SETTING),
    "cost": Cost(1, 2),
    "workload": Workload(1),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_cannot_be_changed(value: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)  # type: ignore[arg-type]
