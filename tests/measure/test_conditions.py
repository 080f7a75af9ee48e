"""The conditions of a timing: every one that decides it stands in the setting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina import LaminaError
from lamina.measure import conditions
from lamina.measure.conditions import setting_of
from lamina.values import Probe


def test_on_the_meta_device_nothing_is_timed() -> None:
    with pytest.raises(LaminaError, match=r"meta device.*to_empty"):
        setting_of(nn.Linear(2, 2, device="meta"), "inference", channels_last=False)


def test_a_setting_names_the_conditions() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    found = setting_of(model, "training", channels_last=True)
    assert (found.device, found.dtype, found.memory_format, found.mode) == ("cpu", "bfloat16", "channels_last", "training")
    assert found.threads == torch.get_num_threads()
    assert torch.__version__ in found.versions
    assert found.device_name
    assert found.autocast == "off"
    assert found.runtime == "eager"


def test_a_setting_knows_whether_autocast_is_on() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert setting_of(nn.Linear(2, 2), "inference", channels_last=False).autocast == "bfloat16"


def test_a_setting_knows_whether_denormals_are_flushed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert setting_of(nn.Linear(2, 2), "inference", channels_last=False).flush_denormals
    finally:
        torch.set_flush_denormal(False)
    assert not setting_of(nn.Linear(2, 2), "inference", channels_last=False).flush_denormals


def test_a_setting_follows_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = setting_of(nn.Linear(2, 2), "inference", channels_last=False)
        torch.set_num_threads(2)
        assert setting_of(nn.Linear(2, 2), "inference", channels_last=False) != one
    finally:
        torch.set_num_threads(threads)


def test_a_network_without_parameters_has_a_setting() -> None:
    assert setting_of(nn.ReLU(), "inference", channels_last=False).device == "cpu"


PROBE = conditions.probe  # before the tests' own, steady one takes its place


def test_a_probe_takes_time_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PROBE(torch.device("cpu"))
    assert found.product_s > 0 and found.convolution_s > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_probes_agree_within_a_quarter_of_each_part() -> None:
    one = Probe(1.0, 2.0)
    assert all(one.agrees(other) and other.agrees(one) for other in (one, Probe(1.25, 2.0), Probe(1.0, 1.6)))
    assert not any(one.agrees(other) or other.agrees(one) for other in (Probe(1.26, 2.0), Probe(1.0, 1.59), Probe(0.5, 1.0)))
