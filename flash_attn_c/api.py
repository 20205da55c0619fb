"""The public functions that take torch tensors and NumPy arrays alike: `attention`, `explain`, `merge`.

This file turns keyword arguments into the two tuples that the rest of the package passes on, in the order of the C entry:

    tensors = (bias, mask, alibi_slopes, sinks, block_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    options = (causal, window, scale, softcap, dropout_p, block_size, max_seqlen_q, max_seqlen_k, layout, deterministic)

and hands them to the front of q's type, which allocates the outputs and crosses into C. Arguments are checked there, in one place.
"""

import json
import sys
from typing import Any

# A type of q -> the module that computes on it. Filled as types are met, so that a call finds its front by one lookup.
FRONTS: dict[type, Any] = {}

NO_TENSORS: tuple[None, ...] = (None,) * 9


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    block_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    layout: str = "bshd",
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q k^T + ...) v, exactly, in memory that grows linearly with the sequence.

    q, k, v are (batch, seqlen, heads, dim), or (batch, heads, seqlen, dim) with layout="bhsd", or (total, heads, dim) with
    cu_seqlens_q and cu_seqlens_k. k and v may have fewer heads than q. Returns out, like q with the head dim of v, or (out, lse) with
    lse (batch, heads, seqlen) or (heads, total). Differentiable in q, k, v, bias, sinks and alibi_slopes, also through lse.

    - causal: True or "bottom_right" (the last query sees the last key), or "top_left". window: (left, right), None is unbounded.
    - bias is added to the scores; mask is bool, True attends. Both broadcast to (batch, heads, seqlen_q, seqlen_k).
    - block_mask: bool (1 or batch, 1 or heads, query blocks, key blocks), or a pair of it and the block size, a multiple of 64.
    - seqused_q, seqused_k: the used length of each sequence. max_seqlen_q, max_seqlen_k: upper bounds for packed sequences.
    - dropout_p: probability of dropping an entry of the softmax, drawn from the default generator of q's device.
    """
    if bias is mask is alibi_slopes is sinks is block_mask is None and cu_seqlens_q is cu_seqlens_k is seqused_q is seqused_k is None:
        tensors, block_size = NO_TENSORS, 0
    else:
        block_mask, block_size = _split_block_mask(block_mask)
        tensors = (bias, mask, alibi_slopes, sinks, block_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    options = (causal, window, scale, softcap, dropout_p, block_size, max_seqlen_q, max_seqlen_k, layout, deterministic)
    front = FRONTS.get(type(q)) or _find_front(q)
    return front.attention(q, k, v, tensors, options, return_lse)


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    block_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    layout: str = "bshd",
    deterministic: bool = False,
    return_lse: bool = False,
    backward: bool = False,
) -> "Plan":
    """What `attention` would do with the same arguments: engine, kernel, tiles, splits, workspace, and why nothing faster was taken.

    backward=True describes the backward pass. Nothing is computed.
    """
    block_mask, block_size = _split_block_mask(block_mask)
    tensors = (bias, mask, alibi_slopes, sinks, block_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    options = (causal, window, scale, softcap, dropout_p, block_size, max_seqlen_q, max_seqlen_k, layout, deterministic)
    front = FRONTS.get(type(q)) or _find_front(q)
    front.check(q, k, v, tensors)
    from . import _C

    # The plan does not depend on the random state, so any will do.
    return Plan(json.loads(_C.explain(q, k, v, None, None, *tensors, (0, 0), None, *options, backward)))


class Plan:
    """The answer of `explain`: fields as attributes, and a readable str()."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"this plan has no {name!r}; it has {', '.join(fields)}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.fields})

    def __str__(self) -> str:
        width = max((len(name) for name in self.fields), default=0)
        return "\n".join(f"{name:<{width}}  {_readable(value, width + 2)}" for name, value in self.fields.items())

    def __repr__(self) -> str:
        return f"Plan({self.fields!r})"


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, layout: str = "bshd") -> tuple[Any, Any]:
    """Combine two results of `attention` for the same queries over different keys into the result over all of them, exactly.

    Takes and returns (out, lse) as `attention` gives them. A row that saw no key (lse -inf) on one side takes the other side's value,
    on both sides stays 0. Differentiable in all four arguments.
    """
    front = FRONTS.get(type(out_a)) or _find_front(out_a, "out_a")
    _check_merge(front, out_a, lse_a, out_b, lse_b, layout)
    xp = front.array_module
    # Subtracting the larger lse only guards exp against overflow: the value does not depend on it, so it carries no gradient.
    top = xp.maximum(front.constant(lse_a), front.constant(lse_b))
    empty = top == float("-inf")
    top = xp.where(empty, xp.zeros_like(top), top)
    weight_a, weight_b = xp.exp(lse_a - top), xp.exp(lse_b - top)
    total = xp.where(empty, xp.ones_like(top), weight_a + weight_b)
    lse = xp.where(empty, xp.full_like(top, float("-inf")), top + xp.log(total))
    out = _per_row(weight_a / total, out_a, layout) * out_a + _per_row(weight_b / total, out_b, layout) * out_b
    return front.cast(out, out_a.dtype), lse


def _per_row(statistic: Any, out: Any, layout: str) -> Any:
    """(batch, heads, seqlen) or (heads, total) -> a factor for each row of out."""
    if out.ndim == 3:
        statistic = statistic.swapaxes(0, 1)
    elif layout == "bshd":
        statistic = statistic.swapaxes(1, 2)
    return statistic[..., None]


def _check_merge(front: Any, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: str) -> None:
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f"layout: {layout!r} must be 'bshd' or 'bhsd'")
    for name, value in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(value, front.tensor_type):
            raise TypeError(f"{name}: expected the same kind of tensor as out_a, got {type(value).__name__}")
    if out_a.ndim not in (3, 4):
        raise ValueError(f"out_a: expected 4 dimensions, or 3 for packed sequences, got {out_a.ndim}")
    if tuple(out_b.shape) != tuple(out_a.shape):
        raise ValueError(f"out_b: shape {tuple(out_b.shape)} must equal out_a's, {tuple(out_a.shape)}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b: dtype {out_b.dtype} must equal out_a's, {out_a.dtype}")
    rows = tuple(out_a.shape[:-1])
    if out_a.ndim == 3:
        rows = (rows[1], rows[0])
    elif layout == "bshd":
        rows = (rows[0], rows[2], rows[1])
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(lse.shape) != rows:
            raise ValueError(f"{name}: shape {tuple(lse.shape)} must be {rows} for out_a of shape {tuple(out_a.shape)}")


def _split_block_mask(block_mask: Any) -> tuple[Any, Any]:
    if not isinstance(block_mask, tuple):
        return block_mask, 0
    if len(block_mask) != 2:
        raise ValueError(f"block_mask: a tuple must be (tensor, block_size), got {len(block_mask)} entries")
    if block_mask[1] == 0:
        raise ValueError("block_mask: block size 0 must be a multiple of 64")
    return block_mask


def _find_front(q: Any, name: str = "q") -> Any:
    """The front for an object of a type not met before. torch is looked at only where somebody has imported it."""
    front: Any = None
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(q, torch.Tensor):
        from . import autograd as front
    elif numpy is not None and isinstance(q, numpy.ndarray):
        from . import numpy_front as front
    if front is None:
        raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(q).__name__}")
    FRONTS[type(q)] = front
    return front


def _readable(value: Any, indent: int) -> str:
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return f"\n{'':{indent}}".join(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)
