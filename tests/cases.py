"""The one list of cases that every engine, tier and device runs: CASES. A row says what is asked; `build` makes its tensors.

Rows of three kinds: shapes (lengths, dims, heads, layouts), every feature alone in every dtype, and every legal pair of features.
Everything that no query may see is NaN in the tensors that `build` returns.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

import reference

DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str = "float32"
    batch: int = 2
    seqlen_q: int = 113
    seqlen_k: int = 197
    heads_q: int = 2
    heads_k: int = 2
    dim_qk: int = 32
    dim_v: int = 0  # 0: dim_qk
    layout: str = "bshd"
    lengths: tuple[tuple[int, int], ...] = ()  # (query, key) length of each packed sequence; empty: dense
    seqused: str = ""  # which sides use only a part of their slots: "q", "k" or "qk"
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0
    bias: str = ""  # the axes it has, out of "bhmn"; the others are broadcast
    bias_dtype: str = ""  # "": that of q
    mask: str = ""  # likewise
    alibi: str = ""  # "h" or "bh"
    sinks: bool = False
    dropout: float = 0.0
    block: int = 0  # block size of a block mask
    block_axes: str = "bh"
    strided: str = ""  # "rows": views into larger buffers; "last": stride 2 in the last dim as well
    deterministic: bool = False
    dlse: bool = True
    smoke: bool = False  # also runs once for each CPU tier

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


# What a call can ask for, each as the fields of Case that say so. Two features are a legal pair when they do not say
# different things about one field, and no rule below forbids them.
FEATURES: dict[str, dict] = {
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (37, 11)},
    "window_left": {"window": (23, None)},
    "window_right": {"window": (None, 5)},
    "softcap": {"softcap": 2.5},
    "scale": {"scale": -0.31},
    "bias": {"bias": "bhmn"},
    "bias_keys": {"bias": "bn", "bias_dtype": "float32"},
    "mask": {"mask": "bhmn"},
    "mask_keys": {"mask": "bn"},
    "alibi": {"alibi": "h"},
    "alibi_batch": {"alibi": "bh"},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.17},
    "block_mask": {"block": 64},
    "gqa": {"heads_q": 6, "heads_k": 2},
    "mqa": {"heads_q": 3, "heads_k": 1},
    "dim_v": {"dim_qk": 24, "dim_v": 40},
    "packed": {"lengths": ((17, 40), (0, 13), (129, 70), (31, 0), (65, 161))},
    "seqused": {"seqused": "qk"},
    "bhsd": {"layout": "bhsd"},
    "strided": {"strided": "rows"},
    "strided_last": {"strided": "last"},
    "deterministic": {"deterministic": True},
}
FORBIDDEN = (("packed", "bhsd"),)  # packed tensors have one layout: (total, heads, dim)


def is_legal(*names: str) -> bool:
    if any(set(pair) <= set(names) for pair in FORBIDDEN):
        return False
    fields = list(itertools.chain.from_iterable(FEATURES[n] for n in names))
    return len(fields) == len(set(fields))


def combine(*names: str, dtype: str, smoke: bool = False) -> Case:
    fields = {}
    for n in names:
        fields.update(FEATURES[n])
    return Case("+".join(names), dtype=dtype, smoke=smoke, **fields)


def feature_cases() -> list[Case]:
    alone = [combine(name, dtype=dtype, smoke=dtype in ("float32", "bfloat16")) for name in FEATURES for dtype in DTYPES]
    pairs = [pair for pair in itertools.combinations(FEATURES, 2) if is_legal(*pair)]
    paired = [combine(*pair, dtype=DTYPES[n % 3]) for n, pair in enumerate(pairs)]
    triples = [triple for triple in itertools.combinations(FEATURES, 3) if is_legal(*triple)]
    tripled = [combine(*triple, dtype=DTYPES[n % 3]) for n, triple in enumerate(triples[::53])]
    return alone + paired + tripled + everything_at_once()


def everything_at_once() -> list[Case]:
    shape = {"heads_q": 4, "heads_k": 2, "dim_qk": 40, "dim_v": 24, "seqused": "qk", "strided": "rows", "deterministic": True}
    pairs = {"causal": True, "window": (90, None), "mask": "bn", "block": 64}
    score = {"softcap": 3.0, "scale": 0.3, "bias": "hmn", "alibi": "bh", "sinks": True, "dropout": 0.1}
    common = {**shape, **pairs, **score, "smoke": True}
    dense = [Case("everything", dtype=dtype, **common) for dtype in DTYPES]
    packed = [Case("everything+packed", dtype=dtype, **FEATURES["packed"], **common) for dtype in DTYPES]
    return dense + packed


LENGTHS = (
    (1, 1), (1, 2), (2, 1), (1, 63), (1, 300), (17, 17), (63, 64), (64, 63), (64, 64), (65, 65), (65, 128), (113, 259), (128, 128),
    (129, 127), (197, 64), (259, 113), (300, 1), (257, 257),
)  # fmt: skip


def shape_cases() -> list[Case]:
    rows = []
    for n, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        shape = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "dim_qk": (16, 64)[n % 2], "batch": 1}
        name = f"{seqlen_q}x{seqlen_k}"
        for m, dtype in enumerate(DTYPES):
            rows.append(Case(name, dtype=dtype, smoke=m == n % 4, dlse=n % 2 == 0, **shape))
            rows.append(Case(f"{name}-causal", dtype=dtype, causal=(True, "top_left")[(n + m) % 2], **shape))
    dims = (1, 2, 3, 7, 8, 9, 15, 24, 31, 40, 47, 48, 56, 63, 64, 65, 72, 80, 96, 97, 111, 128, 136, 160, 191, 192, 224, 255, 256)
    for n, dim in enumerate(dims):
        rows.append(Case(f"dim{dim}-causal", dtype=DTYPES[n % 4], seqlen_q=70, seqlen_k=83, dim_qk=dim, causal=True))
        rows.append(Case(f"dim{dim}", dtype=DTYPES[(n + 1) % 3], seqlen_q=70, seqlen_k=83, dim_qk=dim, smoke=n % 5 == 0, dlse=False))
    dim_pairs = ((64, 128), (128, 64), (192, 128), (1, 256), (256, 1), (40, 72), (5, 3), (96, 256))
    for (dim_qk, dim_v), dtype in itertools.product(dim_pairs, DTYPES):
        rows.append(Case(f"dim{dim_qk}_{dim_v}", dtype=dtype, seqlen_q=66, seqlen_k=91, dim_qk=dim_qk, dim_v=dim_v))
    head_counts = ((1, 1), (5, 5), (7, 1), (12, 4), (16, 2))
    for (heads_q, heads_k), dtype in itertools.product(head_counts, DTYPES):
        rows.append(Case(f"heads{heads_q}_{heads_k}", dtype=dtype, batch=3, seqlen_q=67, seqlen_k=79, heads_q=heads_q, heads_k=heads_k))
    for n, axes in enumerate(("bhmn", "hmn", "mn", "n", "bhm", "b", "h", "bn", "bm", "bmn")):
        rows.append(Case(f"bias_{axes}", dtype=DTYPES[n % 4], bias=axes, bias_dtype=("", "float32")[n % 4 in (1, 2)], heads_q=4))
        rows.append(Case(f"mask_{axes}", dtype=DTYPES[(n + 1) % 4], mask=axes, heads_q=4, causal=n % 2 == 1))
    for n, axes in enumerate(("bh", "b", "h", "")):
        rows.append(Case(f"block_{axes}", dtype=DTYPES[n], block=64 * (1 + n % 2), block_axes=axes, seqlen_q=259, seqlen_k=301))
    rows += [Case(f"scale_{scale}", scale=scale) for scale in (0.0, 1.0, -1.0, 4.0, 1e-188)]
    rows += [Case(f"window_{left}_{right}", window=(left, right), causal=c) for left, right, c in WINDOWS]
    rows.append(Case("packed_one", lengths=((70, 91),)))
    rows.append(Case("packed_empty", lengths=((0, 0), (0, 5), (5, 0))))
    rows.append(Case("packed_many", dtype="bfloat16", lengths=tuple((n % 7, n * 5 % 11) for n in range(40)), causal=True))
    rows += [Case(f"slots_{side}", dtype=d, seqused=side, causal=True) for side, d in zip(("q", "k", "qk"), DTYPES, strict=False)]
    return rows


WINDOWS = ((0, 0, False), (1, 0, False), (0, 7, False), (5, 5, True), (None, None, False), (63, 64, False), (500, 500, False),
           (64, None, "top_left"), (2**30, 3, False), (2**31 - 1, 2**31 - 1, False))  # fmt: skip

CASES: list[Case] = shape_cases() + feature_cases()
SMOKE: list[Case] = [case for case in CASES if case.smoke]


# From a row to tensors.


def embed(t: Tensor, how: str) -> Tensor:
    """A copy of t as a view into a larger buffer of NaN, so that a read or a write outside it shows."""
    if not how or t.numel() == 0:
        return t.clone()
    step = 2 if how == "last" else 1
    shape = [n + 2 for n in t.shape[:-1]] + [t.shape[-1] * step + 3]
    buffer = torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[tuple(slice(1, -1) for _ in t.shape[:-1])][..., 2 : 2 + t.shape[-1] * step : step]
    view.copy_(t)
    return view


def outside_is_untouched(view: Tensor) -> bool:
    """For a view made by `embed`: all of its buffer but the view is still NaN."""
    if view._base is None:
        return True
    buffer = view._base.clone()
    buffer.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(buffer.isnan().all())


def lengths_of(case: Case, device: str) -> dict:
    call = {}
    slots = {"q": [case.seqlen_q] * case.batch, "k": [case.seqlen_k] * case.batch}
    if case.lengths:
        slots = {"q": [m for m, _ in case.lengths], "k": [n for _, n in case.lengths]}
        for side, sizes in slots.items():
            ends = list(itertools.accumulate(sizes, initial=0))
            call[f"cu_seqlens_{side}"] = torch.tensor(ends, dtype=torch.int32, device=device)
            call[f"max_seqlen_{side}"] = max(sizes)
    for side in case.seqused:
        used = [size * (n % 4) // 3 if n % 4 < 3 else size for n, size in enumerate(slots[side], 2 if side == "q" else 1)]
        call[f"seqused_{side}"] = torch.tensor(used, dtype=torch.int32, device=device)
    return call


def build(case: Case, device: str = "cpu") -> dict:
    """The call of a case: every argument by name, with dout and dlse beside them."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    dtype = getattr(torch, case.dtype)
    statistic = torch.float64 if case.dtype == "float64" else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype, how: str = "") -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32)
        return embed(values.to(device=device, dtype=dtype), how)

    def grid_shape(axes: str) -> tuple[int, ...]:
        shape = tuple(size if axis in axes else 1 for axis, size in zip("bhmn", full, strict=True))
        return shape[3:] if axes == "n" else shape

    lengths = lengths_of(case, device)
    dim_v = case.dim_v or case.dim_qk
    heads = {"q": case.heads_q, "k": case.heads_k}
    if case.lengths:
        batch, longest = len(case.lengths), (lengths["max_seqlen_q"], lengths["max_seqlen_k"])
        total = {"q": sum(m for m, _ in case.lengths), "k": sum(n for _, n in case.lengths)}
        shapes = {side: (total[side], heads[side]) for side in "qk"}
        lse_shape = (case.heads_q, total["q"])
    else:
        batch, longest = case.batch, (case.seqlen_q, case.seqlen_k)
        shapes = {"q": (batch, case.seqlen_q, case.heads_q), "k": (batch, case.seqlen_k, case.heads_k)}
        if case.layout == "bhsd":
            shapes = {side: (b, h, s) for side, (b, s, h) in shapes.items()}
        lse_shape = (batch, case.heads_q, case.seqlen_q)
    full = (batch, case.heads_q, *longest)

    call = dict(reference.DEFAULTS, **lengths)
    call.update(
        q=normal(*shapes["q"], case.dim_qk, how=case.strided),
        k=normal(*shapes["k"], case.dim_qk, how=case.strided),
        v=normal(*shapes["k"], dim_v, how=case.strided),
        dout=normal(*shapes["q"], dim_v, how=case.strided),
        dlse=normal(*lse_shape, dtype=statistic) if case.dlse else None,
        causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap, layout=case.layout,
        dropout_p=case.dropout, rng=(0x1234567890ABCDEF, 3 * 2**33 + 5), deterministic=case.deterministic,
    )  # fmt: skip
    if case.bias:
        bias_dtype = getattr(torch, case.bias_dtype) if case.bias_dtype and case.dtype != "float64" else dtype
        call["bias"] = normal(*grid_shape(case.bias), dtype=bias_dtype, how=case.strided)
    if case.mask:
        mask = torch.rand(*grid_shape(case.mask), generator=generator) < 0.7
        if "m" in case.mask:
            mask[..., : mask.shape[-2] // 5, :] = False  # the first rows see nothing
        call["mask"] = mask.to(device)
    if case.alibi:
        shape = (batch, case.heads_q) if case.alibi == "bh" else (case.heads_q,)
        call["alibi_slopes"] = normal(*shape, dtype=statistic).abs() * 0.1
    if case.sinks:
        call["sinks"] = normal(case.heads_q)
    if case.block:
        blocks = [-(-n // case.block) for n in longest]
        shape = (batch if "b" in case.block_axes else 1, case.heads_q if "h" in case.block_axes else 1, *blocks)
        call["block_mask"] = (torch.rand(*shape, generator=generator) < 0.6).to(device)
        call["block_size"] = case.block
    plant_nan(call)
    return call


def plant_nan(call: dict) -> None:
    """Overwrites with NaN whatever must not matter: what no query sees, rows that see nothing, and everything past a used prefix."""
    nan, heads_k = float("nan"), call["k"].shape[reference.heads_axis(call)]
    matters = {name: torch.zeros(call[name].shape, dtype=torch.bool, device=call["q"].device) for name in ("q", "k")}
    lse_matters = torch.zeros_like(call["dlse"], dtype=torch.bool) if call["dlse"] is not None else None
    bias_matters = torch.zeros_like(call["bias"], dtype=torch.bool) if call["bias"] is not None else None
    for seq in reference.sequences(call):
        pairs = reference.visible_pairs(call, seq)
        seen = pairs.unflatten(0, (heads_k, -1)).any(dim=2).any(dim=1)
        reference.rows_of(call, matters["q"], seq.b, seq.q_start, seq.len_q)[:] = pairs.any(-1)[..., None]
        reference.rows_of(call, matters["k"], seq.b, seq.k_start, seq.len_k)[:] = seen[..., None]
        if lse_matters is not None:
            has_lse = pairs.any(-1) if call["sinks"] is None else torch.ones_like(pairs[..., 0] if seq.len_k else pairs.any(-1))
            reference.lse_rows_of(call, lse_matters, seq.b, seq.q_start, seq.len_q)[:] = has_lse
        if bias_matters is not None:
            mark_bias(bias_matters, seq, pairs)
    call["q"].masked_fill_(~matters["q"], nan)
    call["dout"].masked_fill_(~matters["q"][..., :1], nan)
    call["k"].masked_fill_(~matters["k"], nan)
    call["v"].masked_fill_(~matters["k"][..., :1], nan)
    if lse_matters is not None:
        call["dlse"].masked_fill_(~lse_matters, nan)
    if bias_matters is not None:
        call["bias"].masked_fill_(~bias_matters, nan)


def mark_bias(matters: Tensor, seq: reference.Sequence, pairs: Tensor) -> None:
    """Sets the entries of a broadcast bias that some visible pair of this sequence reads."""
    shape = (1,) * (4 - matters.ndim) + tuple(matters.shape)
    target = matters.view(shape)[seq.b if shape[0] > 1 else 0]
    for axis in range(3):
        if shape[axis + 1] == 1:
            pairs = pairs.any(axis, keepdim=True)
    target[:, : pairs.shape[1], : pairs.shape[2]] |= pairs
