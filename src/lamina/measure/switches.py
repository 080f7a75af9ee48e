"""Torch's switches, the environment and the cores: what chooses kernels behind a network's back, as one text."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

_KERNELS = ("ONEDNN_", "DNNL_", "MKL_", "OMP_", "KMP_", "GOMP_", "ATEN_", "CUBLAS", "CUDNN_", "TORCH_CUDNN_", "NVIDIA_TF32_")
_ALLOCATORS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "TCMALLOC_", "MIMALLOC_", "JE_MALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_VARIABLES = _KERNELS + _ALLOCATORS
_COUNTED = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}  # the setting holds the number that comes of them

# What says something of torch itself or of other work than layers, and "m", the module behind each of torch's doors.
_OTHER = {
    "m",
    "op",
    "backend",
    "name",
    "available",
    "TYPE_CHECKING",
    "opt_einsum",
    "quantized",
    "python_native",
}

# Values that stand in no text: what a fresh torch has. A switch that is missing here is always shown.
_USUAL = {
    "autocast_cache": "True",
    "deterministic_algorithms": "False",
    "float32_matmul_precision": "highest",
    "cuda.cudnn_sdp_enabled": "True",
    "cuda.flash_sdp_enabled": "True",
    "cuda.fp16_bf16_reduction_math_sdp_allowed": "False",
    "cuda.math_sdp_enabled": "True",
    "cuda.matmul.allow_bf16_reduced_precision_reduction": "True",
    "cuda.matmul.allow_bf16_reduced_precision_reduction_split_k": "True",
    "cuda.matmul.allow_fp16_accumulation": "False",
    "cuda.matmul.allow_fp16_reduced_precision_reduction": "True",
    "cuda.matmul.allow_fp16_reduced_precision_reduction_split_k": "True",
    "cuda.matmul.allow_tf32": "False",
    "cuda.matmul.fp32_precision": "none",
    "cuda.matmul.prefer_cublaslt_grouped_gemm": "False",
    "cuda.mem_efficient_sdp_enabled": "True",
    "cuda.preferred_blas_library": "_BlasBackend.Cublas",
    "cudnn.allow_tf32": "True",
    "cudnn.benchmark": "False",
    "cudnn.benchmark_limit": "10",
    "cudnn.conv.fp32_precision": "tf32",
    "cudnn.depthwise_kernel": "auto",
    "cudnn.deterministic": "False",
    "cudnn.enabled": "True",
    "cudnn.fp32_precision": "none",
    "cudnn.rnn.fp32_precision": "tf32",
    "fp32_precision": "none",
    "mha.get_fastpath_enabled": "True",
    "miopen.immediate": "False",
    "mkldnn.allow_tf32": "False",
    "mkldnn.conv.fp32_precision": "none",
    "mkldnn.deterministic": "False",
    "mkldnn.enabled": "True",
    "mkldnn.fp32_precision": "none",
    "mkldnn.matmul.fp32_precision": "none",
    "mkldnn.rnn.fp32_precision": "none",
    "nnpack.enabled": "True",
}


def switches(device: torch.device) -> str:
    """Every switch that is not as in a fresh torch, such as ``cudnn.benchmark True, interop 1 of 8``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tell that there are newer ones
        found = {".".join(path): _value(holder, path[-1]) for path, holder in _walked(torch.backends, ())}
        found["float32_matmul_precision"] = _value(torch, "get_float32_matmul_precision")
        found["deterministic_algorithms"] = str(torch.are_deterministic_algorithms_enabled())
        # What is no property of a module of torch.backends, and no switch but a number.
        found["autocast_cache"] = str(torch.is_autocast_cache_enabled())
        found["cuda.preferred_blas_library"] = _value(torch.backends.cuda, "preferred_blas_library")
        found["cudnn.benchmark_limit"] = _value(torch.backends.cudnn, "benchmark_limit")
        found["nnpack.enabled"] = _value(torch._C, "_get_nnpack_enabled")
    unusual = [
        f"{name} {value}" for name, value in sorted(found.items()) if value not in ("", "None") and _USUAL.get(name) != value
    ]
    named = [name for name in os.environ if name.startswith(_VARIABLES) and name not in _COUNTED]
    unusual += [f"{name}={os.environ[name]}" for name in sorted(named)]
    return ", ".join(unusual + (_cores() if device.type == "cpu" else []))


def _cores() -> list[str]:
    """On how many of the machine's cores the process may run, and its second pool of threads, where not all."""
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    interop = torch.get_num_interop_threads()
    return [f"{name} {number} of {cores}" for name, number in (("cores", allowed), ("interop", interop)) if number != cores]


def _walked(holder: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path to each of the switches in a module of `torch.backends`, and what holds it."""
    for name in sorted(_names(holder) - _OTHER):
        try:
            value = getattr(holder, name)
        except Exception:  # one that cannot be read, as where the old and the new way to set it were mixed
            value = False
        module = value.__name__ if isinstance(value, ModuleType) else type(value).__module__
        if isinstance(value, bool | str) or _tells(name, value):
            yield (*path, name), holder
        elif module.startswith("torch.backends") and not callable(value) and len(path) < 4:
            yield from _walked(value, (*path, name))


def _names(holder: Any) -> set[str]:
    names = {*dir(holder), *dir(type(holder))}
    answering = getattr(type(holder), "__getattr__", None)
    if isinstance(answering, FunctionType):  # what a class answers without having it stands in the code that does so
        names |= {text for text in answering.__code__.co_consts if isinstance(text, str) and text.isidentifier()}
    return {name for name in names if not name.startswith("_")}


def _tells(name: str, value: Any) -> bool:
    """Whether it is a function that tells a switch and takes nothing: calling it changes nothing."""
    return isinstance(value, FunctionType) and name.endswith(("_enabled", "_allowed")) and value.__code__.co_argcount == 0


def _value(holder: Any, name: str) -> str:
    try:
        value = getattr(holder, name)
        return str(value() if isinstance(value, FunctionType | BuiltinFunctionType) else value)
    except AttributeError:
        return ""
    except Exception as error:
        return type(error).__name__
