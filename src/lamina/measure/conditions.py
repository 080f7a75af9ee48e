"""The conditions of a timing: what of this machine, of torch's switches and of the network decides how long something takes."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LaminaError
from ..network.observe import autocast_on
from ..values import Setting, dtype_name
from .switches import switches

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def setting_of(model: nn.Module, mode: str, *, channels_last: bool) -> Setting:
    """The conditions under which a network would be timed now.

    Raises:
        LaminaError: It is on the meta device, where nothing takes time.
    """
    parameter = next(model.parameters(), torch.empty(0))
    device = parameter.device
    if device.type == "meta":
        raise LaminaError("the network is on the meta device, where nothing can be timed: call to_empty(device=...) on it")
    return Setting(
        device=device.type,
        device_name=_device_name(device),
        dtype=dtype_name(parameter.dtype),
        memory_format="channels_last" if channels_last else "contiguous",
        threads=torch.get_num_threads() if device.type == "cpu" else 1,  # elsewhere they decide nothing
        mode=mode,
        autocast=autocast_on(device.type),
        flush_denormals=_flushes_denormals(),
        versions=_versions(device),
        kernels=switches(device),
    )


@lru_cache
def cache_bytes(device: torch.device) -> int:
    """The size of a device's last cache; where it tells none, that of a large one."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [text for index in _CACHES.glob("index*/size") if (text := _read(index))] if device.type == "cpu" else []
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(text[:-1]) * units[text[-1]] for text in sizes if text[:-1].isdigit() and text[-1] in units), default=2**25)


def _read(path: Path) -> str:
    """What a file of the kernel says; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


@lru_cache
def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    # Where an accelerator has no name of its own it is part of the processor.
    return str(named(device)) if named else f"{device.type} of {_processor()}"


def _processor() -> str:
    """A processor by what tells generations apart: a name may be a hypervisor's, or be missing."""
    lines = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines())
    told: dict[str, str] = {}
    for name, _, value in lines:
        told.setdefault(name.strip().lower(), value.strip())  # of the first core
    name = told.get("model name") or _mac_processor() or platform.processor() or platform.machine()
    x86 = [told[key] for key in ("vendor_id", "cpu family", "model", "stepping") if key in told]
    arm = [told[key] for key in ("cpu implementer", "cpu part", "cpu variant", "cpu revision") if key in told]
    caches = [text for index in sorted(_CACHES.glob("index*/size")) if (text := _read(index))]
    parts = " ".join(filter(None, ["/".join(x86 or arm), "/".join(caches)]))
    return f"{name} [{parts}]" if parts else name


def _mac_processor() -> str:
    if platform.system() != "Darwin":
        return ""
    words = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _versions(device: torch.device) -> str:
    """Of torch, and of what its kernels on an accelerator come from."""
    parts = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        parts += [f"CUDA {torch.version.cuda or torch.version.hip}", f"cuDNN {cudnn.version()}"]
    return ", ".join(parts)


def _flushes_denormals() -> bool:
    # torch can set the flag but not tell it; a denormal times one does.
    return bool((torch.tensor([1e-310], dtype=torch.float64, device="cpu") * 1.0).item() == 0.0)
