"""The conditions of a timing: every one that decides it stands in the setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lamina import LaminaError, Setting
from lamina.measure import conditions, switches
from lamina.measure.conditions import setting_of


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


def here() -> Setting:
    return setting_of(nn.Linear(2, 2), "inference", channels_last=False)


CHANGES = [
    "torch.backends.mkldnn.enabled = False",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "torch.backends.cudnn.benchmark = True",
    "torch.backends.cudnn.deterministic = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
    "torch.backends.cuda.enable_flash_sdp(False)",
    "torch.backends.mha.set_fastpath_enabled(False)",
    "torch.backends.cuda.preferred_blas_library('cublaslt')",
    "torch.backends.cudnn.benchmark_limit = 3",
    "torch.backends.nnpack.set_flags(False)",
    "torch.set_autocast_cache_enabled(False)",
    "torch.set_float32_matmul_precision('medium')",
    "torch.use_deterministic_algorithms(True)",
    "torch.set_num_interop_threads(7)",
    "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); torch.set_num_threads(1)",
]


@pytest.fixture(scope="module")
def fresh() -> str:
    return elsewhere("").kernels


@pytest.mark.parametrize("change", CHANGES)
def test_every_switch_that_changes_kernels_is_part_of_the_setting(change: str, fresh: str) -> None:
    if "affinity" in change and len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) == 1:
        pytest.skip("there is one core")
    assert elsewhere(change).kernels != fresh  # in another process: not every switch can be put back as it was


def test_a_fresh_torch_has_nothing_to_tell_of_its_switches(fresh: str) -> None:
    of_the_machine = ("cores ", "interop ", *switches._VARIABLES)
    assert all(not part or part.startswith(of_the_machine) for part in fresh.split(", "))


@pytest.mark.parametrize(
    "name",
    ["ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "KMP_AFFINITY", "NVIDIA_TF32_OVERRIDE", "MALLOC_TRIM_THRESHOLD_"],
)
def test_a_variable_that_changes_kernels_is_part_of_the_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = here()
    monkeypatch.setenv(name, "x")
    assert here() != before and f"{name}=x" in str(here())


def test_what_follows_from_variables_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    before = here()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert here() == before


def test_reading_the_switches_changes_none() -> None:
    assert here() == here()
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


def elsewhere(change: str) -> Setting:
    """The setting in a new process after a change there."""
    code = f"""
import dataclasses, json, os, torch
from torch import nn
from lamina.measure.conditions import setting_of
{change}
print(json.dumps(dataclasses.asdict(setting_of(nn.Linear(2, 2), "inference", channels_last=False))))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return Setting(**json.loads(ran.stdout))


CPUINFO = {
    "x86": (
        "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t: 2\nmodel name\t: AMD EPYC\nstepping\t: 1\n\nmodel\t: 9\n",
        "AMD EPYC [AuthenticAMD/26/2/1 48K/32768K]",
    ),
    "arm": (
        "processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n",
        "[0x41/0xd40/0x1/1 48K/32768K]",
    ),
    "none": ("", "[48K/32768K]"),
}


@pytest.mark.parametrize(("text", "expected"), CPUINFO.values(), ids=CPUINFO)
def test_a_processor_is_told_apart_by_its_model_and_its_caches(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, size in enumerate(("48K", "32768K")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(conditions, "_CACHES", tmp_path)
    monkeypatch.setattr(conditions, "_read", lambda path: text if path.name == "cpuinfo" else path.read_text().strip())
    assert conditions._processor().endswith(expected)
    conditions.cache_bytes.cache_clear()
    assert conditions.cache_bytes(torch.device("cpu")) == 2**25
    conditions.cache_bytes.cache_clear()


def test_a_setting_is_one_line_and_names_threads_only_where_they_count() -> None:
    setting = Setting("cpu", "a CPU", "float32", "contiguous", 4, "inference", versions="torch 2")
    assert str(setting) == "cpu (a CPU), 4 threads, float32, contiguous, inference, eager, torch 2"
    told = replace(setting, device="cuda", kernels="cudnn.benchmark True", autocast="bfloat16", freezing="first")
    assert str(told) == (
        "cuda (a CPU), float32, autocast bfloat16, contiguous, inference, first, eager, torch 2, cudnn.benchmark True"
    )


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_on_an_accelerator_the_number_of_threads_and_cores_tells_no_times_apart(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network on an accelerator that is not there."""
    parameter = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    model: Any = SimpleNamespace(parameters=lambda: iter([parameter]))
    for name in ("_device_name", "_versions"):
        monkeypatch.setattr(conditions, name, lambda device: "as ever")
    found = set()
    for threads in (1, 7):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            patch.setattr(torch, "get_num_interop_threads", lambda threads=threads: threads)
            patch.setattr(os, "sched_getaffinity", lambda _, threads=threads: set(range(threads)), raising=False)
            found.add(setting_of(model, "inference", channels_last=False))
    assert len(found) == 1 and found.pop().device == device
