"""Exact attention by the letter of docs/semantics.md: unfused, one sequence at a time, in float64 or in any dtype asked for.

A call is a dict of the arguments of `flash_attn_c.attention` by name, plus `block_size` and `rng` (the seed and offset of
dropout). Whatever no query sees is cut away before it is touched, so that NaN planted there reaches neither values nor gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ABSENT = (
    "bias", "mask", "alibi_slopes", "sinks", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q",
    "max_seqlen_k", "window", "scale",
)  # fmt: skip
OFF = {"causal": False, "softcap": 0.0, "dropout_p": 0.0, "rng": (0, 0), "block_size": 0, "layout": "bshd", "deterministic": False}
DEFAULTS = {**dict.fromkeys(ABSENT), **OFF}
DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


@dataclass(frozen=True)
class Sequence:
    """One sequence: where its slots start, how long they are, and how much of each is used."""

    b: int
    q_start: int
    q_slot: int
    len_q: int
    k_start: int
    k_slot: int
    len_k: int


def is_packed(call: dict) -> bool:
    return call["cu_seqlens_q"] is not None


def batch_size(call: dict) -> int:
    return len(call["cu_seqlens_q"]) - 1 if is_packed(call) else call["q"].shape[0]


def block_size_of(call: dict) -> int:
    """As given; 0 asks for the power of two of at least 64 that fits both axes, else for the only multiple of 64 that does."""
    if call["block_size"]:
        return call["block_size"]
    slots = list(sequences(call))
    axes = []
    for side, count in (("q", call["block_mask"].shape[2]), ("k", call["block_mask"].shape[3])):
        bound = call[f"max_seqlen_{side}"]
        axes.append((bound if bound is not None else max((getattr(s, f"{side}_slot") for s in slots), default=0), count))
    fits = [size for size in range(64, max(length for length, _ in axes) + 128, 64) if all(-(-length // size) == n for length, n in axes)]
    return next((size for size in fits if size & (size - 1) == 0), fits[0])


def heads_axis(call: dict) -> int:
    return 1 if is_packed(call) or call["layout"] == "bhsd" else 2


def sequences(call: dict) -> Iterator[Sequence]:
    position = 2 if call["layout"] == "bhsd" else 1
    for b in range(batch_size(call)):
        where = {}
        for side, t in (("q", call["q"]), ("k", call["k"])):
            cu, used = call[f"cu_seqlens_{side}"], call[f"seqused_{side}"]
            start = int(cu[b]) if cu is not None else 0
            slot = int(cu[b + 1]) - start if cu is not None else t.shape[position]
            where[side] = (start, slot, int(used[b]) if used is not None else slot)
        yield Sequence(b, *where["q"], *where["k"])


def rows_of(call: dict, t: Tensor, b: int, start: int, length: int) -> Tensor:
    """A view (heads, length, dim) of positions start .. start + length of sequence b."""
    if is_packed(call):
        return t[start : start + length].transpose(0, 1)
    if call["layout"] == "bhsd":
        return t[b, :, start : start + length]
    return t[b, start : start + length].transpose(0, 1)


def lse_rows_of(call: dict, t: Tensor, b: int, start: int, length: int) -> Tensor:
    return t[:, start : start + length] if is_packed(call) else t[b, :, start : start + length]


def grid_of(t: Tensor, seq: Sequence, heads: int) -> Tensor:
    """The (heads, len_q, len_k) part of a tensor that broadcasts to (batch, heads, max_seqlen_q, max_seqlen_k), as a view."""
    t = t.reshape((1,) * (4 - t.ndim) + tuple(t.shape)) if t.ndim < 4 else t
    t = t[seq.b if t.shape[0] > 1 else 0]
    if t.shape[1] > 1:
        t = t[:, : seq.len_q]
    if t.shape[2] > 1:
        t = t[:, :, : seq.len_k]
    return t.expand(heads, seq.len_q, seq.len_k)


def visible_pairs(call: dict, seq: Sequence) -> Tensor:
    """Which (query row, key column) pairs exist: bool (heads_q, len_q, len_k)."""
    heads, device = call["q"].shape[heads_axis(call)], call["q"].device
    i = torch.arange(seq.len_q, device=device)[:, None]
    j = torch.arange(seq.len_k, device=device)[None, :]
    diagonal = i + (seq.len_k - seq.len_q)
    left, right = call["window"] or (None, None)
    keep = torch.ones(seq.len_q, seq.len_k, dtype=torch.bool, device=device)
    if call["causal"] in (True, "bottom_right"):
        keep &= j <= diagonal
    elif call["causal"] == "top_left":
        keep &= j <= i
    elif right is not None:
        keep &= j <= diagonal + right
    if left is not None:
        keep &= j >= diagonal - left
    keep = keep.expand(heads, -1, -1)
    if call["mask"] is not None:
        keep = keep & grid_of(call["mask"], seq, heads)
    if call["block_mask"] is not None:
        size, blocks = block_size_of(call), call["block_mask"]
        blocks = blocks[seq.b if blocks.shape[0] > 1 else 0]
        keep = keep & blocks[:, i // size, j // size]
    return keep


# The random words of dropout, as csrc/core/philox.h defines them.


def philox(key: tuple, counter: tuple) -> list[np.ndarray]:
    """Philox 4x32 with 10 rounds, on arrays of 32-bit words held in uint64."""
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = (np.uint64(int(k) & 0xFFFFFFFF) for k in key)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) & low for c in counter)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return [np.asarray(c) for c in (c0, c1, c2, c3)]


def dropout_words(seed: int, offset: int, b: int, heads: int, len_q: int, len_k: int) -> np.ndarray:
    """The 32-bit word of every (head, row, column) of sequence b."""
    mixed = philox((seed, seed >> 32), (offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF, 0x64726F70, 0))
    key = (int(mixed[0]), int(mixed[1]))
    h, i, j4 = np.ogrid[:heads, :len_q, : (len_k + 3) // 4]
    words = philox(key, (j4 + 0 * (h + i), i + 0 * (h + j4), h + 0 * (i + j4), b + 0 * (h + i + j4)))
    return np.stack(words, axis=-1).reshape(heads, len_q, 4 * j4.size)[:, :, :len_k]


def dropout_keep(p: float, rng: tuple[int, int], b: int, heads: int, len_q: int, len_k: int) -> Tensor:
    threshold = min(int(p * 2.0**32 + 0.5), 2**32 - 1)
    return torch.from_numpy(dropout_words(int(rng[0]), int(rng[1]), b, heads, len_q, len_k) >= threshold)


# The formula.


def one_sequence(call: dict, seq: Sequence, inputs: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out (heads_q, len_q, dim_v) and lse (heads_q, len_q) of one sequence."""
    q = rows_of(call, inputs["q"], seq.b, seq.q_start, seq.len_q)
    k = rows_of(call, inputs["k"], seq.b, seq.k_start, seq.len_k)
    v = rows_of(call, inputs["v"], seq.b, seq.k_start, seq.len_k)
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    pairs = visible_pairs(call, seq)
    row_sees = pairs.any(-1)
    key_seen = pairs.unflatten(0, (k.shape[0], group)).any(dim=2).any(dim=1)
    q = torch.where(row_sees[..., None], q, 0)
    k = torch.where(key_seen[..., None], k, 0).repeat_interleave(group, 0)
    v = torch.where(key_seen[..., None], v, 0).repeat_interleave(group, 0)

    scale = call["scale"] if call["scale"] is not None else q.shape[-1] ** -0.5
    score = torch.matmul(q * scale, k.transpose(1, 2))
    if call["softcap"] > 0:
        score = call["softcap"] * torch.tanh(score / call["softcap"])
    if inputs.get("bias") is not None:
        score = score + torch.where(pairs, grid_of(inputs["bias"], seq, heads), 0)
    if inputs.get("alibi_slopes") is not None:
        slopes = inputs["alibi_slopes"]
        slopes = slopes[seq.b] if slopes.ndim == 2 else slopes
        i = torch.arange(seq.len_q, device=q.device)[:, None]
        j = torch.arange(seq.len_k, device=q.device)[None, :]
        score = score - slopes[:, None, None] * (i + seq.len_k - seq.len_q - j).abs().to(dtype)
    score = score.masked_fill(~pairs, -torch.inf)

    sink = inputs.get("sinks")
    sink = sink[:, None].expand(heads, seq.len_q) if sink is not None else torch.full_like(row_sees, -torch.inf, dtype=dtype)
    top = torch.cat([score, sink[..., None]], dim=-1).detach().amax(-1)
    top = torch.where(top == -torch.inf, 0, top)
    weight = torch.exp(score - top[..., None])
    total = weight.sum(-1) + torch.exp(sink - top)
    nothing = total == 0
    total = torch.where(nothing, 1, total)
    weight = weight / total[..., None]
    if call["dropout_p"] > 0:
        keep = dropout_keep(call["dropout_p"], call["rng"], seq.b, heads, seq.len_q, seq.len_k).to(q.device)
        weight = torch.where(keep, weight / (1 - call["dropout_p"]), 0)
    out = torch.where(row_sees[..., None], torch.matmul(weight, v), 0)
    return out, torch.where(nothing, -torch.inf, top + torch.log(total))


def pad_rows(t: Tensor, length: int, value: float) -> Tensor:
    """t (heads, rows, ...) lengthened to `length` rows of `value`."""
    shape = (t.shape[0], length - t.shape[1], *t.shape[2:])
    return torch.cat([t, torch.full(shape, value, dtype=t.dtype, device=t.device)], dim=1)


def attention(call: dict, dtype: torch.dtype = torch.float64, inputs: dict | None = None) -> tuple[Tensor, Tensor]:
    """out and lse in `dtype`, laid out like the library's. `inputs` replaces the differentiable tensors of the call."""
    if inputs is None:
        inputs = {name: call[name].to(dtype) for name in DIFFERENTIABLE if call.get(name) is not None}
    outs, lses = [], []
    for seq in sequences(call):
        out, lse = one_sequence(call, seq, inputs, dtype)
        outs.append(pad_rows(out, seq.q_slot, 0.0))
        lses.append(pad_rows(lse, seq.q_slot, -torch.inf))
    q, dim_v, heads = call["q"], call["v"].shape[-1], call["q"].shape[heads_axis(call)]
    if is_packed(call):
        none = torch.zeros(heads, 0, dim_v, dtype=dtype, device=q.device)
        out = pad_rows(torch.cat([none, *outs], dim=1), q.shape[0], 0.0)
        lse = pad_rows(torch.cat([none[..., 0], *lses], dim=1), q.shape[0], -torch.inf)
        return out.transpose(0, 1), lse
    if not outs:
        position = 2 if call["layout"] == "bhsd" else 1
        return torch.zeros(*q.shape[:-1], dim_v, dtype=dtype), torch.zeros(0, heads, q.shape[position], dtype=dtype)
    out = torch.stack(outs)
    return (out if call["layout"] == "bhsd" else out.transpose(1, 2)), torch.stack(lses)


def attention_with_gradients(call: dict, dout: Tensor, dlse: Tensor | None, dtype: torch.dtype = torch.float64):
    """out, lse, and the gradient of every differentiable tensor of the call, by name."""
    leaves = {n: call[n].detach().to(dtype).clone().requires_grad_() for n in DIFFERENTIABLE if call.get(n) is not None}
    out, lse = attention(call, dtype, leaves)
    ends, seeds = [out], [dout.to(dtype)]
    if dlse is not None:
        ends, seeds = [out, lse], [dout.to(dtype), dlse.to(dtype)]
    live = [(end, seed) for end, seed in zip(ends, seeds, strict=True) if end.requires_grad]
    found = [None] * len(leaves)
    if live:
        found = torch.autograd.grad([e for e, _ in live], list(leaves.values()), [s for _, s in live], allow_unused=True)
    gradients = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}
    return out.detach(), lse.detach(), gradients


# The accuracy rule.


def worst_error(x: Tensor, ref: Tensor) -> float:
    """max|x - ref|, with infinities and NaN required in the same places."""
    x, ref = x.detach().to(torch.float64), ref.detach().to(torch.float64)
    same = (x == ref) | (x.isnan() & ref.isnan())
    difference = torch.where(same, torch.zeros_like(ref), (x - ref).abs())
    return float(torch.nan_to_num(difference, nan=torch.inf).max()) if difference.numel() else 0.0


def allowance(name: str, pt: Tensor, ref: Tensor, dtype: torch.dtype) -> float:
    """How far `name` may be from ref: twice the error of the unfused run, three times for a gradient, and a little."""
    factor, slack = (2.0 if name == "out" else 3.0), (1e-11 if dtype == torch.float64 else 1e-5)
    return factor * worst_error(pt, ref) + slack
