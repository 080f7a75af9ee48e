"""Running the example: which shapes reach a layer, and whether it computes what can be read off it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import ExampleError
from lamina.network.observe import ROUNDING, Observation, is_channels_last, observing, oddity
from lamina.network.running import run
from lamina.network.trial import observed
from lamina.network.walk import Layer, walk
from lamina.values import Use, Workload


def observe(model: nn.Module, layers: dict[str, Layer], workload: Workload) -> dict[str, Observation]:
    return observed(model, layers.values(), workload)[0]


def test_each_distinct_shape_is_seen_with_its_number_of_calls() -> None:
    # traps: one module called twice: latency counts per call
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.fc(x)[:1])
            return y

    model = Twice()
    seen = observe(model, walk(model).layers, Workload(torch.randn(3, 4)))
    assert seen["fc"].uses == {Use((3, 4), (3, 4)): 1, Use((1, 4), (1, 4)): 1}
    assert seen["idle"].uses == {} and seen["idle"].as_uses() == ()
    twice = observe(model, walk(model).layers, Workload(torch.randn(1, 4)))["fc"].as_uses(0.5)
    assert len(twice) == 1 and (twice[0].calls, twice[0].weight) == (2, 0.5)


def test_a_module_under_two_names_is_seen_once_with_both_calls() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    seen = observe(model, walk(model).layers, Workload(torch.randn(3, 4)))
    assert list(seen) == ["0"] and seen["0"].as_uses()[0].calls == 2


def test_an_input_given_by_keyword_is_seen() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    model = ByKeyword()
    assert observe(model, walk(model).layers, Workload({"x": torch.randn(3, 4)}))["fc"].uses == {Use((3, 4), (3, 2)): 1}


def test_samples_of_unequal_length_count_by_their_rows() -> None:
    """`nn.TransformerEncoder` makes a nested tensor of a padding mask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    model = nn.Sequential(nn.Linear(4, 6))
    assert observe(model, walk(model).layers, Workload(nested))["0"].uses == {Use((5, 4), (5, 6)): 1}


def test_the_layout_of_a_layers_input_is_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    layers = walk(model).layers
    x = torch.randn(2, 3, 5, 5)
    assert not observe(model, layers, Workload(x))["0"].channels_last
    assert observe(model, layers, Workload(x.contiguous(memory_format=torch.channels_last)))["0"].channels_last


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 5, 7, 4)], ids=str)
def test_channels_last_is_told_from_contiguous(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert not is_channels_last(x)
    assert is_channels_last(x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d))
    assert not is_channels_last(x.transpose(-1, -2))


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5)], ids=str)
def test_what_lies_both_ways_or_has_no_channels_is_not_channels_last(shape: tuple[int, ...]) -> None:
    assert not is_channels_last(torch.randn(shape))
    assert not is_channels_last(torch.randn(shape).transpose(0, 1))


def test_under_autocast_each_layer_is_seen_with_the_dtype_that_reaches_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        seen = observe(model, walk(model).layers, Workload(torch.randn(3, 4)))
    assert seen["0"].uses == {Use((3, 4), (3, 4), autocast="bfloat16"): 1}
    assert seen["1"].uses == {Use((3, 4), (3, 4), input_dtype="bfloat16", autocast="bfloat16"): 1}


def test_a_layer_called_with_two_dtypes_has_two_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                inside: Tensor = self.fc(self.fc(x))
            outside: Tensor = self.fc(inside.float())
            return outside

    model = Twice()
    uses = observe(model, walk(model).layers, Workload(torch.randn(3, 4)))["fc"].as_uses()
    assert {(use.input_dtype, use.autocast, use.calls) for use in uses} == {
        (None, "bfloat16", 1),
        ("bfloat16", "bfloat16", 1),
        (None, "off", 1),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_network_without_autocast_feeds_its_layers_in_the_dtype_of_their_weights(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    seen = observe(model, walk(model).layers, Workload(torch.randn(3, 4, dtype=dtype)))
    assert {use for each in seen.values() for use in each.uses} == {Use((3, 4), (3, 4))}


def test_an_integer_input_reaches_a_layer_as_what_its_network_makes_of_it() -> None:
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    seen = observe(layer, walk(layer).layers, Workload(torch.ones(2, 3, dtype=torch.long)))
    assert seen[""].uses == {Use((2, 3), (2, 3)): 1}


def test_no_hook_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    for x in (torch.randn(2, 3), torch.randn(2, 5)):
        with contextlib.suppress(ExampleError):
            observe(model, walk(model).layers, Workload(x))
    assert not model[0]._forward_hooks and not model[0]._forward_hooks_with_kwargs


def test_an_example_that_does_not_fit_is_named_with_the_networks_complaint() -> None:
    with pytest.raises(ExampleError, match=r"does not run on the example \(2×5\): RuntimeError: mat1 and mat2") as caught:
        run(nn.Linear(3, 3), Workload(torch.randn(2, 5)))
    assert "\n" not in str(caught.value)


class Two(nn.Module):
    def forward(self, tokens: Tensor, scale: Tensor, *, mask: Tensor) -> Tensor:
        return tokens * scale * mask


WANTING = {
    "by position": (torch.ones(2, 5), r"missing 1 .*'scale'; not given: scale, mask \(a tuple .*, a mapping by name\)$"),
    "by name": ({"scale": torch.ones(2, 5), "mask": torch.ones(2, 5)}, r"missing 1 .*'tokens'; not given: tokens \("),
    "by name alone": ((torch.ones(2, 5), torch.ones(2, 5)), r"missing 1 .*'mask'; not given: mask \("),
}


@pytest.mark.parametrize(("example", "message"), WANTING.values(), ids=WANTING)
def test_of_a_forward_that_lacks_arguments_it_is_said_which(example: Any, message: str) -> None:
    with pytest.raises(ExampleError, match=message) as caught:
        run(Two(), Workload(example))
    assert "\n" not in str(caught.value)


def test_a_plan_of_a_network_that_lacks_arguments_says_which() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    model = transformers.T5Model(transformers.T5Config(**sizes)).eval()
    with pytest.raises(ExampleError, match=r"; not given: attention_mask, decoder_input_ids, .*\(a tuple") as caught:
        lamina.make_plan(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, lamina.Ratio(2), rule=lamina.AtRatio())
    assert "\n" not in str(caught.value)


def test_of_a_shape_that_does_not_fit_nothing_is_said_to_be_missing() -> None:
    with pytest.raises(ExampleError) as caught:
        run(nn.Bilinear(3, 3, 3), Workload((torch.ones(2, 3), torch.ones(2, 4))))
    assert "not given" not in str(caught.value)


def test_the_layout_is_that_of_the_last_call() -> None:
    seen, x = Observation(), torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for inputs, wanted in ((last, True), (x, False), (last, True)):
        seen.record(inputs, inputs, torch.float32)
        assert seen.channels_last is wanted


def test_only_the_first_call_of_its_shapes_is_a_first_one() -> None:
    seen, x, y = Observation(), torch.randn(2, 3), torch.randn(3, 3)
    assert [seen.record(*pair, torch.float32) for pair in ((x, x), (x, y), (x, x), (y, x), (y, x))] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert list(seen.uses.values()) == [2, 1, 2]


def test_uses_stand_in_the_order_of_their_frequency() -> None:
    seen, x = Observation(), torch.randn(4, 3)
    for rows in (1, 2, 2, 3, 3, 3, 4):
        seen.record(x[:rows], x[:rows], torch.float32)
    uses = seen.as_uses(0.25)
    assert [(use.input_shape[0], use.calls, use.weight) for use in uses] == [
        (3, 3, 0.25),
        (2, 2, 0.25),
        (1, 1, 0.25),
        (4, 1, 0.25),
    ]


def test_the_handle_ends_the_observation() -> None:
    model, seen = nn.Linear(3, 3), Observation()
    handle = observing(walk(model).layers[""], seen)
    model(torch.randn(2, 3))
    handle.remove()
    model(torch.randn(2, 3))
    assert list(seen.uses.values()) == [1]


def test_calls_without_a_tensor_are_no_uses() -> None:
    model, seen = nn.Linear(3, 3), Observation()
    model.register_forward_pre_hook(lambda module, args: (torch.randn(2, 3),))
    observing(walk(model).layers[""], seen)
    model("words")
    assert list(seen.uses) == [Use((2, 3), (2, 3))], "what reaches the layer counts"


# What a layer computes.


def apart(model: nn.Module, *inputs: Tensor) -> str | None:
    """What is odd about a network's last layer."""
    layers = walk(model).layers
    seen = Observation()
    observing(layers[list(layers)[-1]], seen)
    for x in inputs:
        model(x)
    assert seen.uses
    return oddity(seen)


PLAIN: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(5, 2, 6)),
    "half precision": (lambda: nn.Linear(64, 64).half(), lambda: torch.randn(5, 64).half()),
    "bfloat16": (lambda: nn.Conv2d(16, 16, 3).bfloat16(), lambda: torch.randn(2, 16, 9, 9).bfloat16()),
    "float64": (lambda: nn.Linear(6, 4).double(), lambda: torch.randn(5, 6).double()),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, 2, 1, 2), lambda: torch.randn(2, 6, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 6, 9, 8)),
    "conv2d, channels last": (
        lambda: nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 6, 9, 8).contiguous(memory_format=torch.channels_last),
    ),
    "conv3d, same": (lambda: nn.Conv3d(2, 4, 3, padding="same", padding_mode="reflect"), lambda: torch.randn(1, 2, 5, 5, 5)),
    "one sample without a batch": (lambda: nn.Conv2d(6, 4, 3), lambda: torch.randn(6, 9, 8)),
    "nothing": (lambda: nn.Linear(6, 4), lambda: torch.randn(0, 6)),
    "NaN": (lambda: nn.Linear(6, 4), lambda: torch.full((2, 6), float("nan"))),
    "infinite": (lambda: nn.Linear(6, 4), lambda: torch.full((2, 6), float("inf"))),
    "zeros": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.zeros(2, 6)),
    "tiny": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.full((2, 6), 1e-38)),
    "meta": (lambda: nn.Linear(6, 4, device="meta"), lambda: torch.randn(2, 6, device="meta")),
}


@pytest.mark.parametrize(("make", "inputs"), PLAIN.values(), ids=PLAIN)
def test_a_layer_that_nobody_touched_is_not_odd(make: Any, inputs: Any) -> None:
    assert apart(make(), inputs()) is None


def test_a_layer_is_not_odd_for_the_hooks_that_change_what_goes_in_or_comes_out() -> None:
    model = nn.Linear(3, 3)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: 2 * output)
    model.register_forward_hook(lambda module, args, output: output[:1], prepend=True)
    assert apart(model, torch.randn(2, 3)) is None


def test_a_layer_whose_output_is_written_into_later_is_not_odd() -> None:
    assert apart(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(2, 3)) is None


def test_a_layer_under_autocast_answers_in_the_type_of_a_plain_one() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(nn.Linear(64, 64), torch.randn(8, 64)) is None


def seamless() -> nn.Module:
    """Replaced behind the back of its type: another forward that is not found on the object."""
    layer = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    layer._reversed_padding_repeated_twice = [1, 1, 0, 0]
    return layer


def padded_afterwards() -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    layer.padding = (2, 2)
    return layer


def mode_afterwards() -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    layer.padding_mode = "reflect"
    layer._reversed_padding_repeated_twice = [0, 0, 1, 1]
    return layer


def changed_by_a_hook(change: Any) -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    layer.register_forward_pre_hook(lambda module, _: change(module))
    return layer


ODD: dict[str, Any] = {
    "padding of other sides": seamless,
    "padding changed after it was made": padded_afterwards,
    "padding mode changed after it was made": mode_afterwards,
    "another weight": lambda: changed_by_a_hook(lambda m: setattr(m, "weight", nn.Parameter(1.01 * m.weight.detach()))),
    "another bias": lambda: changed_by_a_hook(lambda m: setattr(m, "bias", nn.Parameter(m.bias.detach() + 0.01))),
    "another stride": lambda: changed_by_a_hook(lambda m: setattr(m, "stride", (2, 2))),
    "no bias": lambda: changed_by_a_hook(lambda m: setattr(m, "bias", None)),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_a_layer_that_does_not_compute_what_can_be_read_off_it_is_odd(make: Any) -> None:
    found = apart(make(), torch.randn(2, 3, 6, 7))
    assert found == "it does not compute what its weight, bias and attributes say: it was patched, or changed after it was made"


def test_one_odd_call_among_many_is_enough() -> None:
    layer = changed_by_a_hook(lambda m: setattr(m, "bias", nn.Parameter(m.bias.detach() + 1)))
    plain, seen = walk(layer).layers[""], Observation()
    observing(plain, seen)
    layer(torch.randn(1, 3, 4, 4))
    layer._forward_pre_hooks.clear()
    layer.bias = plain.rebuilt().bias
    assert oddity(seen)
    layer(torch.randn(2, 3, 4, 4))
    assert oddity(seen)


def test_nan_where_a_plain_layer_has_a_number_is_odd() -> None:
    layer = changed_by_a_hook(lambda m: setattr(m, "bias", nn.Parameter(torch.full((3,), float("nan")))))
    assert apart(layer, torch.randn(1, 3, 4, 4))


def test_more_than_rounding_is_odd_and_rounding_is_not() -> None:
    assert oddity(Observation(apart=ROUNDING)) is None and oddity(Observation(apart=ROUNDING * 1.01))
    assert oddity(Observation(apart=float("inf"))) and oddity(Observation()) is None


def test_a_bias_that_is_a_hundred_roundings_off_is_seen() -> None:
    layer = nn.Linear(4, 4)
    nn.init.ones_(layer.bias)
    nn.init.zeros_(layer.weight)
    layer.register_forward_pre_hook(
        lambda m, _: setattr(m, "bias", nn.Parameter(torch.ones(4) + 100 * torch.finfo(torch.float32).eps))
    )
    assert apart(layer, torch.randn(2, 4))


def test_a_call_without_an_input_is_not_counted() -> None:
    layer, seen = nn.Linear(4, 4), Observation()
    (found,) = walk(nn.Sequential(layer)).layers.values()
    handle = observing(found, seen)
    layer.forward = lambda *args, **kwargs: torch.ones(4)
    layer()
    layer(None)
    layer(input=None)
    assert not seen.uses
    layer(torch.ones(4))
    assert seen.uses == {Use((4,), (4,)): 1}
    handle.remove()


def test_a_layer_that_was_never_called_is_not_odd() -> None:
    assert Observation().apart == 0 and oddity(Observation()) is None
