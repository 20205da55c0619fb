"""This library as a provider of torch's own flash attention, on CUDA tensors:

    torch.nn.attention.activate_flash_attention_impl("flash_attn_c")

puts the functions below in place of the aten operators that torch's scaled_dot_product_attention and varlen attention call; nothing
changes before. They have the signatures of those operators.
"""

from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from . import calls

NAME = "flash_attn_c"


def register_torch_impl() -> bool:
    """Offer this library to torch.nn.attention under the name "flash_attn_c". False where this torch knows no providers."""
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        return False
    register(NAME, register_fn=_activate)
    return True


class _Handle:
    """Keeps the operators replaced until removed."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None


def _activate() -> _Handle:
    library = torch.library.Library("aten", "IMPL")
    for name, function in OVERRIDES.items():
        library.impl(name, function, "CUDA")
    return _Handle(library)


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple:
    """Dense (batch, heads, seqlen, dim). Causal is aligned bottom right here; torch asks for it only where that equals top left."""
    _refuse(return_debug_mask=return_debug_mask)
    rng_state, unused = _rng_state(query, dropout_p)
    options = _options(is_causal, None, None, scale, dropout_p, None, None, "bhsd")
    out, lse = calls.forward(query, key, value, _tensors(rng_state), options)
    state = rng_state.view(torch.uint64)
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(is_causal, None, None, scale, dropout_p, None, None, "bhsd")
    return _backward(grad_out, query, key, value, out, logsumexp, _tensors(philox_seed.view(torch.int64)), options)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple:
    """(batch, seqlen, heads, dim), or (total, heads, dim) with cum_seq_q and cum_seq_k. num_splits is a hint, which is not needed."""
    _refuse(return_debug_mask=return_debug_mask, block_table=block_table)
    rng_state, unused = _rng_state(query, dropout_p)
    max_q, max_k = (None, None) if cum_seq_q is None else (max_q, max_k)  # type: ignore[assignment]
    options = _options(is_causal, window_size_left, window_size_right, scale, dropout_p, max_q, max_k, "bshd")
    tensors = _tensors(rng_state, alibi_slopes, cum_seq_q, cum_seq_k, seqused_k)
    out, lse = calls.forward(query, key, value, tensors, options)
    return out, lse, rng_state.view(torch.uint64), unused, query.new_empty(0)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    max_q, max_k = (None, None) if cum_seq_q is None else (max_q, max_k)  # type: ignore[assignment]
    options = _options(is_causal, window_size_left, window_size_right, scale, dropout_p, max_q, max_k, "bshd")
    tensors = _tensors(rng_state.view(torch.int64), None, cum_seq_q, cum_seq_k)
    return _backward(grad_out, query, key, value, out, logsumexp, tensors, options)


OVERRIDES = {
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
}


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tensors: tuple, options: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    calls.backward(grad_out, None, (query, key, value, out, lse), tensors, options, (*grads, None, None, None))
    return grads


def _refuse(*, return_debug_mask: bool = False, block_table: Any = None) -> None:
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask: flash_attn_c offers it as return_attn_probs of flash_attn_func only")
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys and values are not implemented; pass contiguous key and value")


def _rng_state(query: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """(seed, offset), and the second tensor that torch's operators return beside it, which this library does not need."""
    if dropout_p:
        state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=query.device)
    else:
        state = torch.zeros(2, dtype=torch.int64, device=query.device)
    return state, torch.empty((), dtype=torch.uint64, device=query.device)


def _tensors(rng_state: Any, alibi_slopes: Any = None, cu_q: Any = None, cu_k: Any = None, seqused_k: Any = None) -> tuple:
    return (None, None, alibi_slopes, None, None, cu_q, cu_k, None, seqused_k, rng_state, None)


def _options(causal: bool, left: Any, right: Any, scale: Any, dropout_p: float, max_q: Any, max_k: Any, layout: str) -> tuple:
    window = tuple(None if bound is None or bound < 0 else bound for bound in (left, right))
    return (causal, window, scale, 0.0, dropout_p, 0, max_q, max_k, layout, torch.are_deterministic_algorithms_enabled())
