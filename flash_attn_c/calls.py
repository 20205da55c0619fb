"""From torch tensors into C: the one place that allocates outputs and gradients, in eager mode and for fake tensors alike.

`tensors` here is the tuple of api.py with (rng_state, probs) behind it, as the C entry takes them.
"""

from typing import Any

import torch

from . import _C, checks

_empty_like, _float32, _float64 = torch.empty_like, torch.float32, torch.float64

NO_TENSORS: tuple[None, ...] = (None,) * 11


def forward(q: Any, k: Any, v: Any, tensors: tuple, options: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the forward pass now; returns (out, lse)."""
    causal, window, scale, softcap, dropout_p, block_size, max_q, max_k, layout, deterministic = options
    try:
        out, lse = allocate(q, k, v, layout)
    except (TypeError, ValueError, IndexError, NotImplementedError):
        explain_refusal(q, k, v, tensors, options)
        raise
    # fmt: off
    try:
        if tensors is NO_TENSORS:  # spelled out: unpacking it costs a tenth of the host time of a small call
            _C.forward(q, k, v, out, lse, None, None, None, None, None, None, None, None, None, None, None,
                       causal, window, scale, softcap, dropout_p, block_size, max_q, max_k, layout, deterministic,
                       None if q.is_cpu else workspace)
        else:
            _C.forward(q, k, v, out, lse, *tensors, *options, None if q.is_cpu else workspace)
    except TypeError:
        checks.check(q, k, v, tensors[:9])  # may know better words for what C could not read
        raise
    # fmt: on
    return out, lse


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
    alloc = None if inputs[0].is_cpu else workspace
    _C.backward(*inputs, *tensors[:10], None, *options, dout, dlse, *grads, alloc)


def allocate(q: Any, k: Any, v: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """out with the layout of q, and lse. Raises ValueError or IndexError where the shapes leave no answer."""
    if q.dim() == 4:
        batch, seqlen, heads, dim = q.shape
        rows: tuple = (batch, heads, seqlen) if layout == "bshd" else (batch, seqlen, heads)
    else:
        total, heads, dim = q.shape
        rows = (heads, total)
    dim_v = v.size(-1)
    out = _empty_like(q) if dim_v == dim else empty_like_with_dim(q, dim_v)
    dtype = q.dtype
    # new_empty is the cheapest constructor while it may keep the dtype, which shows on small tensors.
    lse = q.new_empty(*rows) if dtype is _float32 or dtype is _float64 else q.new_empty(rows, dtype=_float32)
    return out, lse


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


def explain_refusal(q: Any, k: Any, v: Any, tensors: tuple, options: tuple) -> None:
    """No outputs could be made: says why in the user's names, by the kind of tensor, then by the validator's rules."""
    checks.check(q, k, v, tensors[:9])
    _C.explain(q, k, v, None, None, *tensors[:9], (0, 0), None, *options, False)


def _up128(length: int) -> int:
    return (length + 127) // 128 * 128
