"""The custom ops `flash_attn_c::fwd` and `flash_attn_c::bwd`: what torch.compile, fake tensors, checkpointing policies and other
dispatch modes see. Eager calls on plain tensors go past them (autograd.py).

Every op has the same arguments on every path, allocates all it returns, and aliases nothing. Its fake kernel allocates by the same
function as the real one, so that strides agree.
"""

import operator
from typing import Any

import torch

from . import calls

_TENSORS = (
    "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? block_mask, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? rng_state"
)
_OPTIONS = (
    "str causal, SymInt? window_left, SymInt? window_right, float? scale, float softcap, float dropout_p, int block_size, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, str layout, bool deterministic"
)
_OPTION_COUNT = 11

# Kernels take any strides, but the strides of the results follow those of q: a compiler must not change them in between.
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))

torch.library.define(
    "flash_attn_c::fwd",
    f"(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_OPTIONS}, bool return_probs) -> (Tensor out, Tensor lse, Tensor probs)",
    tags=_TAGS,
)
torch.library.define(
    "flash_attn_c::bwd",
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TENSORS}, {_OPTIONS}, bool[6] wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    tags=_TAGS,
)


def fwd(q: Any, k: Any, v: Any, tensors: tuple, options: tuple, return_probs: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through the dispatcher. tensors end with rng_state; options are those of api.py."""
    return torch.ops.flash_attn_c.fwd(q, k, v, *tensors, *to_schema(options), return_probs)


def bwd(dout: Any, dlse: Any, tensors: list, options: tuple, wanted: tuple) -> tuple[torch.Tensor, ...]:
    """tensors = (q, k, v, out, lse) and what fwd takes behind v. A gradient that is not wanted comes back empty."""
    return torch.ops.flash_attn_c.bwd(dout, dlse, *tensors, *to_schema(options), wanted)


def to_schema(options: tuple) -> tuple:
    """The user's options in the types that the schema has; says what does not fit in the words of the C entry."""
    causal, window, scale, softcap, dropout_p, block_size, max_q, max_k, layout, deterministic = options
    left, right = _window(window)
    return (
        _causal(causal),
        left,
        right,
        None if scale is None else _number("scale", scale),
        _number("softcap", softcap),
        _number("dropout_p", dropout_p),
        _integer("block_size", block_size),
        _integer("max_seqlen_q", max_q),
        _integer("max_seqlen_k", max_k),
        _layout(layout),
        bool(deterministic),
    )


def from_schema(options: tuple) -> tuple:
    """Back to the options of api.py."""
    causal, left, right, *rest = options
    return (causal != "none" and causal, (left, right), *rest)


def _causal(causal: Any) -> str:
    if causal is True or causal is False:
        return "bottom_right" if causal else "none"
    if not isinstance(causal, str):
        raise TypeError(f"causal: expected a bool or a string, got {type(causal).__name__}")
    if causal not in ("bottom_right", "top_left"):
        raise ValueError(f"causal: {causal!r} must be True, False, 'bottom_right' or 'top_left'")
    return causal


def _window(window: Any) -> tuple:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window: expected None or (left, right), got {type(window).__name__}")
    if len(window) != 2:
        raise ValueError(f"window: expected (left, right), got {len(window)} entries")
    return _integer("window", window[0]), _integer("window", window[1])


def _integer(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _layout(layout: Any) -> str:
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f"layout: {layout!r} must be 'bshd' or 'bhsd'")
    return layout


@torch.library.impl("flash_attn_c::fwd", ("cpu", "cuda"))
def _fwd_real(q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors, options, return_probs = rest[:10], from_schema(rest[10:-1]), rest[-1]
    probs = calls.allocate_probs(q, k, tensors[5], options) if return_probs else None
    out, lse = calls.forward(q, k, v, (*tensors, probs), options)
    return out, lse, q.new_empty(0) if probs is None else probs


@torch.library.register_fake("flash_attn_c::fwd")
def _fwd_fake(q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options, return_probs = from_schema(rest[10:-1]), rest[-1]
    if not q.ndim == k.ndim == v.ndim or q.ndim not in (3, 4):
        raise TypeError(f"q, k, v: expected 4 dimensions each, or 3 for packed sequences, got {q.ndim}, {k.ndim}, {v.ndim}")
    out, lse = calls.allocate(q, k, v, options[8])
    return out, lse, calls.allocate_probs(q, k, rest[5], options) if return_probs else q.new_empty(0)


@torch.library.impl("flash_attn_c::bwd", ("cpu", "cuda"))
def _bwd_real(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    tensors, options, wanted = rest[:10], from_schema(rest[10:-1]), rest[-1]
    grads = calls.allocate_gradients((q, k, v, tensors[0], tensors[2], tensors[3]), wanted)
    calls.backward(dout, dlse, (q, k, v, out, lse), tensors, options, grads)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("flash_attn_c::bwd")
def _bwd_fake(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    grads = calls.allocate_gradients((q, k, v, rest[0], rest[2], rest[3]), rest[-1])
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    out, lse, probs = output
    ctx.save_for_backward(*inputs[:13], out, lse)
    ctx.options = inputs[13:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(probs)


def _fwd_backward(ctx: Any, dout: Any, dlse: Any, _dprobs: Any) -> tuple:
    q, k, v, *tensors, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[3], needs[5], needs[6]]
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.flash_attn_c.bwd(dout, dlse, q, k, v, out, lse, *tensors, *ctx.options, wanted)
    dq, dk, dv, dbias, dalibi, dsinks = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return (dq, dk, dv, dbias, None, dalibi, dsinks, *(None,) * (6 + _OPTION_COUNT + 1))


def refuse_second_derivative(*_: Any) -> None:
    raise NotImplementedError("flash_attn_c: second derivatives are not implemented; differentiate attention once (create_graph=False)")


torch.library.register_autograd("flash_attn_c::fwd", _fwd_backward, setup_context=_setup_context)
torch.library.register_autograd("flash_attn_c::bwd", refuse_second_derivative)
