"""The library's raw entry points called with outputs that are allocated here, filled with NaN, and checked for stray writes."""

from __future__ import annotations

import torch
from flash_attn_c import _C
from torch import Tensor

import reference
from cases import embed, outside_is_untouched

SHARED = (
    "q", "k", "v", "out", "lse", "bias", "mask", "alibi_slopes", "sinks", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_q",
    "seqused_k", "rng", "probs", "causal", "window", "scale", "softcap", "dropout_p", "block_size", "max_seqlen_q", "max_seqlen_k",
    "layout", "deterministic",
)  # fmt: skip
GRADIENTS = ("dout", "dlse", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks")


def complete(call: dict) -> dict:
    return {**reference.DEFAULTS, "out": None, "lse": None, "probs": None, **dict.fromkeys(GRADIENTS), **call}


def workspace(call: dict):
    """What gives the CUDA engine its scratch memory; the CPU engine needs none."""
    if not isinstance(call["q"], Tensor) or call["q"].device.type == "cpu":
        return None
    return lambda size, index: torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}")


def raw_forward(call: dict) -> None:
    call = complete(call)
    _C.forward(*(call[name] for name in SHARED), workspace(call))


def raw_backward(call: dict) -> None:
    call = complete(call)
    _C.backward(*(call[name] for name in SHARED + GRADIENTS), workspace(call))


def raw_explain(call: dict, backward: bool = False) -> str:
    call = complete(call)
    return _C.explain(*(call[name] for name in SHARED), backward)


def poison(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None, how: str = "") -> Tensor:
    return embed(torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device), how)


def allocate(call: dict, how: str = "") -> dict:
    """The whole call with poisoned out and lse."""
    call = complete(call)
    q = call["q"]
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = reference.heads_axis(call)
    if reference.is_packed(call):
        lse_shape = (q.shape[1], q.shape[0])
    else:
        lse_shape = (q.shape[0], q.shape[heads], q.shape[3 - heads])
    out = poison((*q.shape[:-1], call["v"].shape[-1]), q, how=how)
    return {**call, "out": out, "lse": poison(lse_shape, q, statistic, how)}


def forward(call: dict, how: str = "") -> tuple[Tensor, Tensor]:
    call = allocate(call, how)
    raw_forward(call)
    assert outside_is_untouched(call["out"]), "out: wrote outside the view"
    assert outside_is_untouched(call["lse"]), "lse: wrote outside the view"
    return call["out"], call["lse"]


def backward(call: dict, out: Tensor, lse: Tensor, how: str = "", wanted: tuple[str, ...] = reference.DIFFERENTIABLE) -> dict[str, Tensor]:
    """The gradients that are wanted and that the call has, by the name of their tensor."""
    given = [name for name in wanted if call.get(name) is not None]
    gradients = {name: poison(tuple(call[name].shape), call[name], how=how) for name in given}
    raw_backward({**call, "out": out, "lse": lse, **{f"d{name}": t for name, t in gradients.items()}})
    for name, t in gradients.items():
        assert outside_is_untouched(t), f"d{name}: wrote outside the view"
    return gradients
