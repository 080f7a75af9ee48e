"""Runs a factor whose weight rests without keeping its input.

`torch.nn.ConvNd` saves its input for the backward pass even where its weight needs no gradient, and where only its bias does,
it computes the weight's gradient all the same. The gradient for the input takes the weight and the input's *shape* alone: this
is what the function here keeps. It holds no state and no parameters, so that state dicts do not know of it, and it steps aside
where a network is exported or traced, which then see the plain layer. `torch.nn.Linear` keeps no more than it must.

    x   input (N, I, *map)      W   weight (O, I / groups, *kernel)      b   bias (O,)      y   output
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WORTH_A_CALL = 2**27
"""Multiply-accumulates of a forward in float32: some three milliseconds with its backward, on one core."""
_WORTH_A_LAUNCH = 2**33
"""The same on an accelerator, which is as far ahead of a core."""

_Sides = tuple[int, ...]


def run_factor(factor: nn.Module, x: Tensor) -> Tensor:
    """``factor(x)``; a convolution whose weight rests keeps no input for the backward pass."""
    # In this order: what is asked first is cheap, and enough for a symbolic tracer's proxy, for a factor that another tool put
    # there (quantised, say, whose weight is no tensor), for a layer that trains and for inference.
    if (
        type(factor) not in _CONVOLUTIONS
        or type(x) is not Tensor
        or factor.weight.requires_grad
        or not torch.is_grad_enabled()
        or not (_same_function(factor, x) and _pays(factor, x))
    ):
        y: Tensor = factor(x)
        return y
    return frozen_convolution(factor, x)


def _same_function(factor: Any, x: Tensor) -> bool:
    """Whether `frozen_convolution` computes what the factor does here, and nobody looks at the factor's call."""
    if "forward" in vars(factor) or "_conv_forward" in vars(factor):  # replaced on the object
        return False
    if factor.padding_mode != "zeros" or _padding(factor) is None:
        return False
    # Whether a convolution takes a mixture of dtypes hangs on the kernels that the processor has: the plain layer's say.
    if factor.bias is not None and factor.bias.dtype != factor.weight.dtype:
        return False
    # A weight of another type (sharded, say) or an unbatched input: the plain layer knows them.
    if type(factor.weight) is not nn.Parameter or x.ndim != factor.weight.ndim:
        return False
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return False
    # Forward-mode differentiation and functorch's transforms want rules of their own, which the plain layer has.
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return not (
        factor._forward_hooks
        or factor._forward_pre_hooks
        or factor._backward_hooks
        or factor._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _pays(factor: Any, x: Tensor) -> bool:
    """Whether it is no slower (``benchmarks/frozen_convolution.py``).

    Where the bias trains, PyTorch computes the weight's gradient along with the bias's on a CPU, except for a 1×1 in float32,
    which it takes another way: ×1.1 to ×1.8 is gained whatever the size. Elsewhere both compute the same, and a call of Python
    costs 20 to 70 µs: layers for which this is more than some two hundredths are left as they are. What a layer keeps goes with
    its size, so those keep little. In a compiled network there is no such call.
    """
    bias_trains = factor.bias is not None and factor.bias.requires_grad
    if not (x.requires_grad or bias_trains):
        return False
    if torch.compiler.is_compiling():
        return True
    half = x.element_size() < 4
    if bias_trains and x.device.type == "cpu" and (half or max(factor.kernel_size) > 1):
        return True
    # As if every position of the map were an output: a stride makes the layer smaller than that, but not its input.
    macs: int = x.numel() // factor.in_channels * factor.weight.numel()
    return macs >= (_WORTH_A_CALL if x.device.type == "cpu" else _WORTH_A_LAUNCH) * (4 if half else 1)


def _padding(layer: Any) -> tuple[int, ...] | None:
    """The zeros on either side, one number a dimension; None where the two sides differ, as ``"same"`` may have it."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    zeros: tuple[int, ...] = layer.padding
    return zeros


def frozen_convolution(layer: Any, x: Tensor) -> Tensor:
    """The output of an `nn.ConvNd` whose weight is a constant; gradients reach its input and its bias.

    Args:
        layer: The convolution, with zeros as padding, alike on both sides.
        x: Its input, ``(N, I, *map)``.

    Returns:
        The layer's output, bit for bit. The gradient for the input has the built-in's bits too; that for the bias is summed in
        an order of its own. Gradients of gradients are right.
    """
    W, b = layer.weight, layer.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # What autocast does within a convolution, but seen by autograd: the backward pass then gets one dtype. It leaves
        # float64 alone.
        dtype = torch.get_autocast_dtype(device)
        x, W = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, W))
        b = b if b is None or b.dtype == torch.float64 else b.to(dtype)
    y: Tensor = _FrozenConvolution.apply(x, W, b, layer.stride, _padding(layer), layer.dilation, layer.groups)
    return y


# With a `setup_context` of its own, functorch would go through; but binding the arguments then takes longer than a small layer.
class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, stride: _Sides, padding: _Sides, dilation: _Sides, groups: int
    ) -> Tensor:
        ctx.save_for_backward(W)
        ctx.attributes = stride, padding, dilation, groups
        ctx.like = x.shape, x.stride(), x.dtype
        return torch.convolution(x, W, b, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (W,), (dy,) = ctx.saved_tensors, gradients
        dx = db = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.attributes
            shape, strides, dtype = ctx.like
            # Uninitialised: only its shape and its layout, by which a kernel is chosen, are looked at.
            x = torch.empty_strided(shape, strides, dtype=dtype, device=dy.device)
            dx = torch.ops.aten.convolution_backward.default(
                dy, x, W, None, stride, padding, dilation, False, (0,) * len(stride), groups, (True, False, False)
            )[0]
        if ctx.needs_input_grad[2]:
            db = dy.sum([0, *range(2, dy.ndim)])
        return dx, None, db, None, None, None, None
