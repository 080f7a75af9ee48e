"""The dense weight of a layer that has none: a tensor that is composed of factors only when an operation needs its values.

Code that looks at ``layer.weight.dtype`` or ``.shape`` pays nothing. An operation that uses the weight gets it composed, with
gradients for the factors. Writing into it could only be lost, so it raises. PyTorch's fast paths leave every tensor alone that
has a ``__torch_function__``, and so decomposed layers to their factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_unflatten

from ..errors import LayerError

Compose = Callable[[], Tensor]

# What is answered without values. Whatever is missing here is answered too, and only costs more.
_PROPERTIES = "shape dtype device ndim layout requires_grad is_leaf grad grad_fn itemsize nbytes is_nested is_sparse is_cuda"
_METHODS = "size dim numel nelement stride storage_offset element_size is_floating_point is_complex is_contiguous __len__"
_FREE: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in f"{_PROPERTIES} is_cpu is_meta is_quantized".split()),
    *(getattr(Tensor, name) for name in f"{_METHODS} get_device".split()),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor),
}


def weight_of(compose: Compose, shape: Sequence[int], factors: Sequence[Tensor]) -> Tensor:
    """The weight that ``compose`` makes, contiguous, of the factors' dtype and device.

    Where PyTorch records what is computed (compilation, tracing, function transforms) it is composed at once: there an unused
    one is left out by the recorder itself.
    """
    if is_recorded():
        return compose()
    strides = tuple(accumulate(reversed((*shape[1:], 1)), mul))[::-1]
    return _lazy(compose, _Layout(tuple(shape), strides, factors[0].dtype), factors)


def is_recorded() -> bool:
    """Whether PyTorch records what is computed, for a compilation, a trace or a function transform."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    return torch.compiler.is_compiling() or is_tracing() or transformed  # type: ignore[no-untyped-call]


class _Layout(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _lazy(compose: Compose, like: _Layout, factors: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
        weight: Tensor = _Linked.apply(compose, like, *factors)
        return weight
    return ComposedWeight(compose, like, tuple(factors))


@final
class ComposedWeight(Tensor):
    """See the module's docstring. It holds no values and is read-only."""

    @staticmethod
    def __new__(cls: type[ComposedWeight], compose: Compose, like: _Layout, factors: tuple[Tensor, ...]) -> ComposedWeight:
        """A tensor of that size, strides and dtype, on the factors' device."""
        new: ComposedWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.strides, dtype=like.dtype, device=factors[0].device
        )
        vars(new).update(compose=compose, factors=factors)
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what needs no values; otherwise compose, and see to it that nothing is written."""
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _is_first(args) and _changes(func):
            raise _read_only(func)
        composed: dict[int, Tensor] = {}
        given, named = _valued((args, kwargs), composed)
        before = [_marks(value) for value in composed.values()]
        result = func(*given, **named)
        if [_marks(value) for value in composed.values()] != before:
            raise _read_only(func)
        if isinstance(result, np.ndarray):
            result.setflags(write=False)
            return result
        leaves, structure = tree_flatten(result)
        storages = {value.untyped_storage()._cdata for value in composed.values()}
        for number, leaf in enumerate(leaves):
            if type(leaf) is Tensor and leaf.layout == torch.strided and leaf.untyped_storage()._cdata in storages:
                leaves[number] = _view(leaf, number, func, args, kwargs)
        return tree_unflatten(leaves, structure)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compose for code in C++ that was handed the tensor itself."""
        if func._schema.is_mutable:
            raise _read_only(func)
        given, named = _valued((args, kwargs or {}), {})
        return func(*given, **named)


def _is_first(args: Any) -> bool:
    """Whether a composed weight is, or is among, what an operation is called on."""
    return any(type(item) is ComposedWeight for item in tree_iter(args[:1]))


def _changes(func: Any) -> bool:
    """Whether an operation changes what it is called on; ``.data`` is there for that alone."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__set__" or func == Tensor.data.__get__  # type: ignore[attr-defined]


def _valued(arguments: Any, composed: dict[int, Tensor]) -> Any:
    """Arguments with every composed weight composed, each once."""

    def value(item: Any) -> Any:
        if type(item) is not ComposedWeight:
            return item
        if id(item) not in composed:
            composed[id(item)] = _plainly(vars(item)["compose"], vars(item)["factors"])
        return composed[id(item)]

    return tree_map(value, arguments)


def _view(leaf: Tensor, number: int, func: Any, args: Any, kwargs: Any) -> Tensor:
    """A view of a composed weight, as lazy and as read-only as the weight itself."""

    def again() -> Tensor:
        given, named = _valued((args, kwargs), {})
        view: Tensor = tree_flatten(func(*given, **named))[0][number]
        return view

    like = _Layout(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype)
    factors = [f for item in tree_iter((args, kwargs)) if type(item) is ComposedWeight for f in vars(item)["factors"]]
    with torch.set_grad_enabled(torch.is_grad_enabled() and leaf.requires_grad):
        return _lazy(again, like, factors)


@final
class _Linked(torch.autograd.Function):
    """Ties a weight that has no values to its factors, for code that hands it to an autograd function of its own."""

    @staticmethod
    def forward(ctx: Any, compose: Compose, like: _Layout, *factors: Tensor) -> Tensor:
        ctx.compose = compose
        ctx.save_for_backward(*factors)
        return ComposedWeight(compose, like, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factors = ctx.saved_tensors  # raises where one was changed since
        with torch.enable_grad():
            wanted = [factor for factor in factors if factor.requires_grad]
            found = iter(torch.autograd.grad(_plainly(ctx.compose, factors), wanted, gradient))
        return None, None, *(next(found) if factor.requires_grad else None for factor in factors)


def _plainly(compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """Composed in the factors' own precision, as an ordinary tensor, which counts its changes and shares none with a factor."""
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        weight = compose()
        # A form may have a factor that is the dense weight itself: a write would be seen only when it has reached that one.
        own = weight.untyped_storage()._cdata not in {factor.untyped_storage()._cdata for factor in factors}
        return weight if own else weight.clone()


def _marks(tensor: Tensor) -> tuple[Any, ...]:
    """What a write, or a wish for gradients, leaves on a tensor."""
    return tensor._version, tensor.requires_grad, tensor.retains_grad, bool(tensor._backward_hooks)


def _read_only(func: Any) -> LayerError:
    name = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", name)
    return LayerError(
        f"{owner if name in ('__get__', '__set__') else name} on a decomposed layer's weight would be lost: it is composed "
        "of factors and cannot be written into; write into the factors, or bring dense layers back with lamina.merge"
    )
