"""Fake tensors (shapes without storage), with a short cut for the operators that models run most.

FakeTensorMode spends up to a millisecond on an operator, because it also handles symbolic shapes, constants and
operators without a meta kernel. Operators that need none of this run their meta kernel only, with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")


def _operators(names: str) -> frozenset[Any]:
    """The operators of aten with these names, such as `mul.Tensor`; those that this PyTorch lacks are left out."""
    pairs = (name.split(".") for name in names.split())
    found = (getattr(getattr(torch.ops.aten, name, None), overload, None) for name, overload in pairs)
    return frozenset(operator for operator in found if operator is not None)


# Operators that make a tensor from numbers.
FACTORIES = _operators(
    "arange.default arange.start arange.start_step empty.memory_format empty_strided.default full.default ones.default "
    "scalar_tensor.default zeros.default"
)

# Operators that only change the values of their first argument.
FILLS = _operators("fill_.Scalar fill_.Tensor normal_.default uniform_.default zero_.default")

# Operators whose meta kernel computes the sizes and strides of the result from those of the arguments.
KERNELS = _operators(
    "_log_softmax.default _log_softmax_backward_data.default _scaled_dot_product_flash_attention_for_cpu.default "
    "_scaled_dot_product_flash_attention_for_cpu_backward.default _softmax.default _softmax_backward_data.default "
    "_unsafe_view.default add.Scalar add.Tensor add_.Tensor addmm.default alias.default bitwise_and.Tensor bmm.default "
    "cat.default clone.default cos.default detach.default div.Scalar div.Tensor embedding.default "
    "embedding_dense_backward.default empty_like.default eq.Tensor exp.default expand.default gelu.default "
    "gelu_backward.default index.Tensor le.Tensor lt.Tensor mean.dim mm.default mul.Scalar mul.Tensor mul_.Tensor "
    "neg.default new_empty.default new_ones.default new_zeros.default ones_like.default "
    "permute.default pow.Tensor_Scalar relu.default rsqrt.default select.int sigmoid.default silu.default "
    "silu_backward.default sin.default slice.Tensor slice_backward.default softplus.default split.Tensor sub.Tensor "
    "sum.dim_IntList t.default tanh.default tanh_backward.default threshold_backward.default transpose.int "
    "unsqueeze.default view.default where.self zeros_like.default"
)


@contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Within this context, new tensors have no storage.

    PyTorch logs each operator that fake tensors do not support before it raises. That log is silenced, because the
    exception is handled by the caller.

    Args:
        mode: the mode of tensors from an earlier context that are used in this one.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    mode = mode or FakeTensorMode()
    try:
        with mode, MetaKernels(mode):
            yield
    finally:
        logger.setLevel(level)


class MetaKernels(TorchDispatchMode):
    """Run the operators above directly on meta tensors, and leave all others to FakeTensorMode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that skips it slows every operator

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator in FACTORIES:
            if kwargs.get("device") in (None, CPU) and not kwargs.get("pin_memory"):
                return self._run(operator, args, {**kwargs, "device": META})
        elif operator in FILLS:
            if all(map(_is_plain, tensors_in(args))):
                return args[0]
        elif operator in KERNELS and kwargs.get("device") is None and all(map(_is_plain, tensors_in(args))):
            return self._run(operator, args, kwargs)
        return operator(*args, **kwargs)

    def _run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator's meta kernel, as fake tensors on the CPU."""
        with in_kernel_invocation_manager(self.mode):
            out = operator(*args, **kwargs)
        return self._fake(out) if isinstance(out, Tensor) else type(out)(map(self._fake, out))

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value  # a number, or an argument that was changed in place
        return FakeTensor(self.mode, value, CPU)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a fake one on the CPU whose values are not known."""
    return type(tensor) is FakeTensor and tensor.constant is None and tensor.fake_device == CPU


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which are at most lists of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
