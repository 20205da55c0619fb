"""Refusals of what only a torch tensor can be, by the user's names. Read off the direct path: C refuses the same, in torch's own words."""

from typing import Any

import torch
from torch.autograd import forward_ad

NAMES = ("q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


def check(q: Any, k: Any, v: Any, tensors: tuple) -> None:
    """Refuses by name what is no tensor of numbers in memory, and what no kernel here understands."""
    for name, tensor in zip(NAMES, (q, k, v, *tensors), strict=True):
        if tensor is not None or name in ("q", "k", "v"):
            _check_tensor(name, tensor)
    _check_transform()


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch tensor like q, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise NotImplementedError(f"{name}: is a nested tensor; pass packed sequences with cu_seqlens_q and cu_seqlens_k")
    kinds = {cls.__name__ for cls in type(tensor).__mro__}
    if "DTensor" in kinds:
        raise NotImplementedError(f"{name}: is a DTensor; call on its local tensor, DTensor.to_local()")
    if tensor.is_quantized:
        raise TypeError(f"{name}: is quantized ({tensor.dtype}); dequantize it first")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout} must be torch.strided; use to_dense() first")
    if tensor.is_complex():
        raise TypeError(f"{name}: dtype {tensor.dtype} must be real")
    if tensor.is_neg():
        raise TypeError(f"{name}: is a negated view; use resolve_neg() first")
    if "FakeTensor" in kinds and not torch._C._len_torch_dispatch_stack():
        raise TypeError(f"{name}: is a fake tensor outside its FakeTensorMode; it has no data")
    if tensor.device.type == "meta" and "FakeTensor" not in kinds and "FunctionalTensor" not in kinds:
        raise TypeError(f"{name}: is on the meta device; it has no data")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name}: forward-mode differentiation (jvp) is not implemented; use reverse mode")


def _check_transform() -> None:
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None:
        return
    kind = interpreter.key()
    if kind == torch._C._functorch.TransformType.Vmap:
        raise NotImplementedError("flash_attn_c: torch.vmap over attention is not implemented; use the batch and head dimensions")
    if kind == torch._C._functorch.TransformType.Jvp:
        raise NotImplementedError("flash_attn_c: forward-mode differentiation (jvp) is not implemented; use reverse mode")
