"""`torch.nn.functional.scaled_dot_product_attention` with the same contract, and a context manager that puts it in torch's place."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from .api import NO_TENSORS


class SdpaError(RuntimeError, ValueError):
    """A refusal of scaled_dot_product_attention: the RuntimeError that callers of torch's own function expect, and a ValueError."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As in torch: (..., heads, seqlen, dim) in and out, leading dimensions broadcast, is_causal aligned top left.

    attn_mask is bool (True attends), a float of query's dtype or float32 that is added, or an object of torch.nn.attention.bias. A row
    that is masked everywhere gives 0 with zero gradients.
    """
    causal: bool | str = "top_left" if is_causal else False
    leading: Any = None
    tensors: tuple = NO_TENSORS
    if attn_mask is not None or not _is_plain(query, key, value):
        _check_tensors(query, key, value)
        leading = _leading_shape(query, key, value, enable_gqa)
        if attn_mask is not None:
            full = (*leading, query.shape[-2], key.shape[-2])
            tensors, causal = _resolve_mask(attn_mask, causal, query, full)
        query, key, value = _to_4d(query, key, value, leading)
    if not 0.0 <= dropout_p <= 1.0:
        raise SdpaError(f"dropout_p: {dropout_p} must be in [0, 1]")
    # At probability 1 everything is dropped, which is out of range for the kernels: they scale by 1 / (1 - p).
    drop_all = dropout_p == 1.0
    options = (causal, None, scale, 0.0, 0.0 if drop_all else dropout_p, 0, None, None, "bhsd", False)
    try:
        out = autograd.attention(query, key, value, tensors, options, False)
    except (TypeError, ValueError):
        _check_tensors(query, key, value)  # the same refusal by the names that the caller knows
        raise
    if drop_all:
        out = out * 0.0
    return out if leading is None or len(leading) == 2 else out.reshape(*leading, *out.shape[-2:])


def _is_plain(query: Any, key: Any, value: Any) -> bool:
    """4 dimensions each, of which nothing broadcasts: what needs no second look before C checks it."""
    try:
        q, k, v = query.shape, key.shape, value.shape
    except AttributeError:
        return False
    if len(q) != 4:
        return False
    return q == k == v or (q[:2] == k[:2] and k[:3] == v[:3] and q[3] == k[3])


def _check_tensors(query: Any, key: Any, value: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise SdpaError(f"{name}: expected at least 2 dimensions, got {tensor.dim()}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype is not query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise SdpaError(f"{name}: dtype {tensor.dtype} must equal query's, {query.dtype}")
        if tensor.device != query.device:
            raise SdpaError(f"{name}: device {tensor.device} must equal query's, {query.device}")
    if key.shape[-1] != query.shape[-1]:
        raise SdpaError(f"key: head dim {key.shape[-1]} must equal query's, {query.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise SdpaError(f"value: seqlen {value.shape[-2]} must equal key's, {key.shape[-2]}")


def _resolve_mask(attn_mask: Any, causal: bool | str, query: Tensor, full: tuple[int, ...]) -> tuple[tuple, bool | str]:
    """Returns (tensors, causal): a mask of at most 4 dimensions, or a rule for an object of torch.nn.attention.bias."""
    if type(attn_mask).__name__ == "CausalBias" and type(attn_mask).__module__ == "torch.nn.attention.bias":
        if causal:
            raise SdpaError("attn_mask: a CausalBias must not come with is_causal=True")
        rows, columns = attn_mask.seq_len_q, attn_mask.seq_len_kv
        if rows == columns or attn_mask.variant.name == "UPPER_LEFT":
            return NO_TENSORS, "top_left"
        if (rows, columns) != full[-2:]:
            raise SdpaError(f"attn_mask: bias of size {(rows, columns)} must match the seqlens {full[-2:]}")
        return NO_TENSORS, "bottom_right"
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch tensor, got {type(attn_mask).__name__}")
    if causal:
        raise SdpaError("attn_mask: must be None when is_causal=True")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not torch.is_autocast_enabled(query.device.type):
        raise SdpaError(f"attn_mask: dtype {attn_mask.dtype} must be bool, float32 or query's, {query.dtype}")
    shape = attn_mask.shape
    if len(shape) > len(full) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(full), strict=False)):
        raise SdpaError(f"attn_mask: shape {tuple(shape)} must broadcast to {full}")
    if len(full) > 4 and len(shape) > 3:
        attn_mask = attn_mask.expand(*full[:-3], *shape[-3:]).flatten(0, -4)
    if attn_mask.dtype is torch.bool:
        return (None, attn_mask, *NO_TENSORS[2:]), causal
    return (attn_mask, *NO_TENSORS[1:]), causal


def _leading_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The dimensions before (seqlen, dim) of the result."""
    if not enable_gqa:
        try:
            return tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
        except RuntimeError:
            raise SdpaError(
                f"query, key, value: leading dimensions {tuple(query.shape[:-2])}, {tuple(key.shape[:-2])}, {tuple(value.shape[:-2])} "
                "must broadcast; pass enable_gqa=True for fewer key heads than query heads"
            ) from None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 3:
            raise SdpaError(f"{name}: expected at least 3 dimensions with enable_gqa=True, got {tensor.dim()}")
    heads = query.shape[-3]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[-3] == 0 or heads % tensor.shape[-3]:
            raise SdpaError(f"{name}: heads {tensor.shape[-3]} must divide query's, {heads}")
    try:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise SdpaError(
            f"query, key, value: batch dimensions {tuple(query.shape[:-3])}, {tuple(key.shape[:-3])}, {tuple(value.shape[:-3])} "
            "must broadcast"
        ) from None
    return (*batch, heads)


def _to_4d(query: Tensor, key: Tensor, value: Tensor, leading: tuple[int, ...]) -> list[Tensor]:
    """Broadcast views of (batch, heads, seqlen, dim); key and value keep a smaller number of heads where it divides."""
    key_heads, value_heads = (t.shape[-3] if t.dim() > 2 else 1 for t in (key, value))
    if key_heads != value_heads:
        key, value = (t.repeat_interleave(leading[-1] // t.shape[-3], -3) if t.dim() > 2 and t.shape[-3] > 1 else t for t in (key, value))
        key_heads = leading[-1]
    found = []
    for tensor, heads in ((query, leading[-1] if leading else 1), (key, key_heads), (value, key_heads)):
        tensor = tensor.expand(*leading[:-1], *((heads,) if leading else ()), *tensor.shape[-2:])
        while tensor.dim() < 4:
            tensor = tensor.unsqueeze(0)
        found.append(tensor.flatten(0, -4) if tensor.dim() > 4 else tensor)
    return found


_patch_lock = threading.Lock()
_patch_depth = 0
_replaced: Any = None


@contextlib.contextmanager
def sdpa_patched() -> Iterator[None]:
    """Inside, torch.nn.functional.scaled_dot_product_attention is this library's, in every thread. Nests; the last one out restores."""
    global _patch_depth, _replaced
    with _patch_lock:
        if _patch_depth == 0:
            _replaced = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = scaled_dot_product_attention
        _patch_depth += 1
    try:
        yield
    finally:
        with _patch_lock:
            _patch_depth -= 1
            # Somebody may have put in another function meanwhile; that one is theirs to take out.
            if _patch_depth == 0 and F.scaled_dot_product_attention is scaled_dot_product_attention:
                F.scaled_dot_product_attention = _replaced
