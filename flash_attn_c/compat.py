"""The training functions of the `flash_attn` package: same names, argument order, defaults and return values.

Where that package's rules differ from `attention`: a negative window bound is no bound, causal is aligned bottom right, and the lse of
a row that sees no key is +inf. Packed tensors are read as views, and their gradient is written into one packed tensor.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd, calls
from .api import NO_TENSORS


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q (batch, seqlen_q, heads, dim), k and v (batch, seqlen_k, heads_k, dim) -> out, or (out, softmax_lse, S_dmask)."""
    options = _options(causal, window_size, softmax_scale, softcap, dropout_p, None, None, deterministic)
    return _attention(q, k, v, _tensors(alibi_slopes), options, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """kv (batch, seqlen_k, 2, heads_k, dim)."""
    options = _options(causal, window_size, softmax_scale, softcap, dropout_p, None, None, deterministic)
    return _packed_attention("kv", q, kv, 5, _tensors(alibi_slopes), options, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (batch, seqlen, 3, heads, dim)."""
    options = _options(causal, window_size, softmax_scale, softcap, dropout_p, None, None, deterministic)
    return _packed_attention("qkv", None, qkv, 5, _tensors(alibi_slopes), options, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """q (total_q, heads, dim), k and v (total_k, heads_k, dim), cu_seqlens int32 (batch + 1)."""
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys and values are not implemented; pass contiguous k and v")
    options = _options(causal, window_size, softmax_scale, softcap, dropout_p, max_seqlen_q, max_seqlen_k, deterministic)
    return _attention(q, k, v, _tensors(alibi_slopes, cu_seqlens_q, cu_seqlens_k), options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q (total_q, heads, dim), kv (total_k, 2, heads_k, dim)."""
    options = _options(causal, window_size, softmax_scale, softcap, dropout_p, max_seqlen_q, max_seqlen_k, deterministic)
    return _packed_attention("kv", q, kv, 4, _tensors(alibi_slopes, cu_seqlens_q, cu_seqlens_k), options, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv (total, 3, heads, dim)."""
    options = _options(causal, window_size, softmax_scale, softcap, dropout_p, max_seqlen, max_seqlen, deterministic)
    return _packed_attention("qkv", None, qkv, 4, _tensors(alibi_slopes, cu_seqlens, cu_seqlens), options, return_attn_probs)


def _tensors(alibi_slopes: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None) -> tuple:
    if alibi_slopes is cu_seqlens_q is cu_seqlens_k is None:
        return NO_TENSORS
    return (None, None, alibi_slopes, None, None, cu_seqlens_q, cu_seqlens_k, None, None)


def _options(causal: Any, window_size: Any, scale: Any, softcap: Any, dropout_p: Any, max_q: Any, max_k: Any, deterministic: Any) -> tuple:
    if window_size != (-1, -1):
        if len(window_size) != 2:
            raise ValueError(f"window_size: expected (left, right), got {len(window_size)} entries")
        window_size = tuple(None if bound < 0 else bound for bound in map(_plain_int, window_size))
    else:
        window_size = None
    max_q, max_k = _plain_int(max_q), _plain_int(max_k)
    return (bool(causal), window_size, scale, softcap, dropout_p, 0, max_q, max_k, "bshd", bool(deterministic))


def _plain_int(value: Any) -> Any:
    """Bounds and lengths may come as 0-d tensors."""
    return int(value) if isinstance(value, Tensor) else value


def _attention(q: Any, k: Any, v: Any, tensors: tuple, options: tuple, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return autograd.attention(q, k, v, tensors, options, False)
    probs = None
    if options[4]:
        out, lse, probs = autograd.attention(q, k, v, tensors, options, True, return_probs=True)
    else:
        out, lse = autograd.attention(q, k, v, tensors, options, True)
    return _with_probs(out, lse, probs)


def _packed_attention(name: str, q: Any, packed: Any, ndim: int, tensors: tuple, options: tuple, return_attn_probs: bool) -> Any:
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(packed).__name__}")
    if packed.dim() != ndim or packed.shape[-3] != len(name):
        shape = ("batch, seqlen" if ndim == 5 else "total") + f", {len(name)}, heads, dim"
        raise ValueError(f"{name}: shape {tuple(packed.shape)} must be ({shape})")
    if not _PackedAttention.applies(q, packed, tensors, return_attn_probs and bool(options[4])):
        q, k, v = _split(q, packed)
        return _attention(q, k, v, tensors, options, return_attn_probs)
    tensors, options = autograd.complete(packed, packed, tensors, options, False)
    out, lse = _PackedAttention.apply(q, packed, tensors[2], tensors, options)
    return _with_probs(out, lse, None) if return_attn_probs else out


def _split(q: Any, packed: Tensor) -> tuple:
    views = packed.unbind(-3)
    return views if q is None else (q, *views)


def _with_probs(out: Tensor, lse: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.where(lse == float("-inf"), float("inf"), lse)
    return out, lse, out.new_empty(0) if probs is None else probs


class _PackedAttention(torch.autograd.Function):
    """Attention on views of a packed tensor, whose gradient is allocated once and written in place of a concatenation."""

    @staticmethod
    def applies(q: Any, packed: Tensor, tensors: tuple, probs: bool) -> bool:
        """In eager mode on plain tensors that want a gradient. Elsewhere plain views do, and autograd stacks their gradients."""
        if torch.compiler.is_compiling() or probs or torch.is_autocast_enabled(packed.device.type):
            return False
        wants = packed.requires_grad and torch.is_grad_enabled()
        return wants and autograd.is_direct(packed if q is None else q, packed, packed, tensors)

    @staticmethod
    def forward(ctx: Any, q: Any, packed: Tensor, alibi_slopes: Any, tensors: tuple, options: tuple) -> tuple[Tensor, Tensor]:
        views = _split(q, packed)
        out, lse = calls.forward(views[0], views[1], views[2], tensors, options)
        ctx.save_for_backward(q, packed, out, lse, *tensors[:10])
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple:
        q, packed, out, lse, *tensors = ctx.saved_tensors
        needs_q, _, needs_alibi = ctx.needs_input_grad[:3]
        inputs = (*_split(q, packed), out, lse)
        dout = torch.zeros_like(out) if dout is None else dout
        if not autograd.backward_is_direct(dout, dlse, inputs, tuple(tensors)):
            wanted = (q is None or needs_q, True, True, False, needs_alibi, False)
            dq, dk, dv, _, dalibi, _ = autograd.gradients(dout, dlse, inputs, tuple(tensors), ctx.options, wanted)
            return dq if q is not None else None, torch.stack([dq, dk, dv] if q is None else [dk, dv], -3), dalibi, None, None
        dpacked = torch.empty_like(packed)
        *of_query, dk, dv = dpacked.unbind(-3)
        dq = of_query[0] if q is None else torch.empty_like(q) if needs_q else None
        dalibi = torch.empty_like(tensors[2]) if needs_alibi else None
        calls.backward(dout, dlse, inputs, tuple(tensors), ctx.options, (dq, dk, dv, None, dalibi, None))
        return dq if q is not None else None, dpacked, dalibi, None, None
