"""From torch tensors into C: the one place that says how outputs and gradients are allocated, in eager mode and for fake tensors alike.

`tensors` here is the tuple of api.py with (rng_state, probs) behind it, as the C entry takes them.
"""

from typing import Any

import torch

from . import _C, checks

NO_TENSORS: tuple[None, ...] = (None,) * 11


def forward(q: Any, k: Any, v: Any, tensors: tuple | None, options: tuple, lse_too: bool = True) -> Any:
    """Runs the forward pass now; returns out or (out, lse). tensors may be None for none of them."""
    try:
        return _C.attention(q, k, v, tensors, options, lse_too, workspace)
    except TypeError:
        checks.check(q, k, v, (tensors or NO_TENSORS)[:9])  # may know better words for what C could not read
        raise


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    inputs: tuple,
    tensors: tuple,
    options: tuple,
    grads: tuple,
) -> None:
    """Runs the backward pass now. inputs = (q, k, v, out, lse); grads = (dq, dk, dv, dbias, dalibi_slopes, dsinks) are written,
    but for those that are None."""
    _C.backward(*inputs, *tensors[:10], None, *options, dout, dlse, *grads, workspace)


def allocate(q: Any, k: Any, v: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """out with the layout of q, and lse: what forward makes, for fake tensors."""
    if q.dim() == 4:
        batch, seqlen, heads, dim = q.shape
        rows: tuple = (batch, heads, seqlen) if layout == "bshd" else (batch, seqlen, heads)
    else:
        total, heads, dim = q.shape
        rows = (heads, total)
    dim_v = v.size(-1)
    out = torch.empty_like(q) if dim_v == dim else empty_like_with_dim(q, dim_v)
    return out, q.new_empty(rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def empty_like_with_dim(q: torch.Tensor, dim: int) -> torch.Tensor:
    """Dense, with the order of q's axes in memory but another last dimension, which comes innermost."""
    axes = sorted(range(q.ndim - 1), key=q.stride, reverse=True) + [q.ndim - 1]
    shape = (*q.shape[:-1], dim)
    inverse = sorted(range(q.ndim), key=axes.__getitem__)
    return q.new_empty([shape[axis] for axis in axes]).permute(inverse)


def allocate_gradients(inputs: tuple, wanted: tuple) -> tuple[torch.Tensor | None, ...]:
    """inputs = (q, k, v, bias, alibi_slopes, sinks); a gradient has the memory order of its input."""
    return tuple(torch.empty_like(tensor) if want else None for tensor, want in zip(inputs, wanted, strict=True))


def allocate_probs(q: Any, k: Any, cu_seqlens_q: Any, options: tuple) -> torch.Tensor:
    """For exp(score - row max): (batch, heads, seqlen_q, seqlen_k), both lengths rounded up to 128."""
    max_q, max_k, layout = options[6:9]
    if cu_seqlens_q is not None:
        return q.new_empty((cu_seqlens_q.shape[0] - 1, q.shape[1], _up128(max_q), _up128(max_k)))
    seqlen_axis = 2 if layout == "bhsd" else 1
    return q.new_empty((q.shape[0], q.shape[3 - seqlen_axis], _up128(q.shape[seqlen_axis]), _up128(k.shape[seqlen_axis])))


def workspace(size_bytes: int, device_index: int) -> torch.Tensor:
    """Scratch from torch's caching allocator: freed in stream order, and from the graph's pool while one is captured."""
    return torch.empty(size_bytes, dtype=torch.uint8, device=torch.device("cuda", device_index))


def _up128(length: int) -> int:
    return (length + 127) // 128 * 128


_C.constructors(torch.empty_like, empty_like_with_dim, torch.Tensor.new_empty, {"dtype": torch.float32})
