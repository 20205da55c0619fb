"""The CUDA kernels' own source on a model of a GPU: what can be known of them with no GPU. A few cases in each dtype; a GPU runs the whole
list (test_attention.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import binding
import gpu_model
import reference
from cases import CASES, Case, build

pytestmark = pytest.mark.skipif(not gpu_model.available, reason="no C++ compiler to build the kernels with")

# Compute capability, SMs, shared memory of a block. The plans take Hopper's own kernels on 9.0 alone.
A100, H200, RTX_5090 = (8, 0, 108, 166912), (9, 0, 132, 232448), (12, 0, 170, 101376)
B200 = (10, 0, 148, 232448)
FEW_SMS = (9, 0, 3, 232448)  # so that each CTA takes several tiles
SHAPE = {"batch": 1, "seqlen_q": 75, "seqlen_k": 140}
PACKED = {"lengths": ((17, 40), (0, 13), (70, 129), (31, 0)), "causal": True}
SHAPES = {"heads_q": 4, "dim_qk": 40, "dim_v": 24, "seqused": "qk", "strided": "rows"}
PAIRS = {"causal": True, "window": (90, None), "mask": "bn", "block": 64}
SCORES = {"softcap": 3.0, "scale": 0.3, "bias": "hmn", "alibi": "bh", "sinks": True, "dropout": 0.1}
EVERYTHING = {**SHAPES, **PAIRS, **SCORES}
FORWARD = [
    *((A100, Case("causal", dtype=dtype, causal=True, **SHAPE)) for dtype in ("float32", "float16", "bfloat16", "float64")),
    *((A100, Case("everything", dtype=dtype, **SHAPE, **EVERYTHING)) for dtype in ("float32", "bfloat16", "float64")),
    (A100, Case("packed", dtype="bfloat16", **PACKED)),
    (A100, Case("dropout", dtype="float16", dropout=0.3, **SHAPE)),
    (A100, Case("one_row", dtype="bfloat16", batch=1, heads_q=1, heads_k=1, seqlen_q=1, seqlen_k=900, sinks=True)),  # splits and combines
    # Two and eight warps to combine a row.
    (A100, Case("rows_2500", dtype="bfloat16", batch=1, heads_q=1, heads_k=1, seqlen_q=5, seqlen_k=2500, sinks=True, seqused="k")),
    (A100, Case("row_12000", dtype="bfloat16", batch=1, heads_q=1, heads_k=1, seqlen_q=2, seqlen_k=12000, causal=True)),
    (A100, Case("dim256", dtype="float32", dim_qk=200, dim_v=256, **SHAPE)),
    # Tiles of eight warps.
    (A100, Case("dim128", dtype="float32", dim_qk=128, causal=True, **SHAPE)),
    (RTX_5090, Case("dim128", dtype="float32", dim_qk=128, dim_v=100, causal=True, **SHAPE)),
    (H200, Case("dim256", dtype="float32", dim_qk=256, causal=True, **SHAPE)),
    (A100, Case("softcap_dropout", dtype="float32", dim_qk=64, softcap=3.0, dropout=0.1, **SHAPE)),
    (A100, Case("dim256", dtype="bfloat16", dim_qk=256, causal=True, **SHAPE)),
    (RTX_5090, Case("causal", dtype="bfloat16", causal=True, **SHAPE)),
    (RTX_5090, Case("dim256", dtype="bfloat16", dim_qk=256, causal=True, **SHAPE)),
    (H200, Case("causal", dtype="bfloat16", dim_qk=64, causal=True, **SHAPE)),
    (H200, Case("packed", dtype="float16", dim_qk=64, **PACKED)),
    (H200, Case("block", dtype="bfloat16", dim_qk=64, batch=1, seqlen_q=70, seqlen_k=4500, block=128)),  # more than one word of the list
    (H200, Case("block_causal", dtype="bfloat16", dim_qk=128, seqlen_q=290, seqlen_k=400, causal=True, block=128)),
    (H200, Case("bias", dtype="bfloat16", dim_qk=64, batch=1, seqlen_q=75, seqlen_k=144, bias="hmn", softcap=3.0)),
    (H200, Case("mask", dtype="float16", dim_qk=64, batch=1, seqlen_q=75, seqlen_k=272, mask="bhn", alibi="h")),
    (H200, Case("softcap_gqa", dtype="bfloat16", dim_qk=128, heads_q=4, softcap=3.0, sinks=True, **SHAPE)),
]
BACKWARD = [
    (H200, Case("causal", dtype="float16", dim_qk=64, causal=True, **SHAPE)),
    (B200, Case("causal", dtype="bfloat16", dim_qk=256, causal=True, **SHAPE)),  # pairs of warps
    (H200, Case("causal", dtype="float16", dim_qk=256, causal=True, **SHAPE)),
    (H200, Case("plain", dtype="bfloat16", dim_qk=40, dim_v=200, sinks=True, **SHAPE)),
    (FEW_SMS, Case("gqa", dtype="bfloat16", dim_qk=256, causal="top_left", seqlen_q=200, seqlen_k=170, heads_q=4)),
    (FEW_SMS, Case("packed", dtype="bfloat16", dim_qk=192, dim_v=136, **PACKED)),
    (FEW_SMS, Case("window", dtype="bfloat16", dim_qk=192, seqlen_q=290, seqlen_k=275, window=(70, 9), heads_q=4, seqused="qk")),
    (FEW_SMS, Case("block", dtype="bfloat16", dim_qk=256, seqlen_q=290, seqlen_k=275, block=128)),
    (H200, Case("full", dtype="bfloat16", dim_qk=128, heads_q=4, **SHAPE)),
    (H200, Case("causal", dtype="bfloat16", dim_qk=128, causal=True, heads_q=4, **SHAPE)),
    (H200, Case("causal", dtype="bfloat16", dim_qk=96, dim_v=40, causal=True, deterministic=True, **SHAPE)),
    (H200, Case("top_left", dtype="float16", dim_qk=40, dim_v=128, causal="top_left", sinks=True, **SHAPE)),
    (H200, Case("packed", dtype="float16", dim_qk=128, **PACKED)),
    # Few keys to a query: nothing for the errors of weights to cancel with.
    *((H200, case) for case in CASES if str(case) == "1x2-causal-float16"),
    (H200, Case("two_keys", dtype="float16", dim_qk=256, batch=1, seqlen_q=1, seqlen_k=2)),
    (B200, Case("causal", dtype="float16", dim_qk=64, causal=True, **SHAPE)),  # a warp owns keys
    (B200, Case("causal", dtype="bfloat16", dim_qk=128, causal=True, heads_q=4, **SHAPE)),  # three stages
    (H200, Case("packed", dtype="bfloat16", dim_qk=64, dim_v=40, **PACKED)),
    (H200, Case("window", dtype="bfloat16", dim_qk=64, seqlen_q=290, seqlen_k=275, window=(70, 9), heads_q=4, seqused="qk")),
    (H200, Case("block", dtype="bfloat16", dim_qk=64, seqlen_q=290, seqlen_k=275, block=128)),
    (A100, Case("causal", dtype="bfloat16", dim_qk=96, causal=True, deterministic=True, **SHAPE)),
    (A100, Case("everything", dtype="bfloat16", **SHAPE, **EVERYTHING)),
    (A100, Case("packed", dtype="bfloat16", dim_qk=64, **PACKED)),
    (RTX_5090, Case("dim256", dtype="bfloat16", dim_qk=256, causal=True, **SHAPE)),
    (RTX_5090, Case("everything", dtype="float64", **SHAPE, **EVERYTHING)),
    (A100, Case("everything", dtype="float32", **SHAPE, **EVERYTHING)),
    (H200, Case("dim96", dtype="float32", dim_qk=96, causal=True, **SHAPE)),
    (H200, Case("dim256", dtype="float32", dim_qk=256, causal=True, **SHAPE)),
    # Tensor cores round sums toward zero: long ones in float32, and those of a slope, drift with it.
    (A100, Case("long_sums", dtype="float32", seqlen_q=300, seqlen_k=1)),
    (A100, Case("alibi", dtype="float32", alibi="h")),
]


def name_of(value: object) -> str:
    return f"sm_{value[0]}{value[1]}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("gpu, case", FORWARD, ids=name_of)
def test_forward(gpu: tuple[int, int, int, int], case: Case) -> None:
    call, dtype = build(case), getattr(torch, case.dtype)
    gpu_model.set_device(*gpu)
    out, lse = gpu_model.forward(call, case.strided)
    ref, ref_lse = reference.attention(call)
    pt, _ = reference.attention(call, dtype)
    assert reference.worst_error(out, ref) <= reference.allowance("out", pt, ref, dtype)
    assert reference.worst_error(lse, ref_lse) <= 1e-5 * max(1.0, float(ref_lse[ref_lse.isfinite()].abs().max()))


@pytest.mark.parametrize("gpu, case", BACKWARD, ids=name_of)
def test_backward(gpu: tuple[int, int, int, int], case: Case) -> None:
    call, dtype = build(case), getattr(torch, case.dtype)
    gpu_model.set_device(*gpu)
    out, lse, ref = reference.attention_with_gradients(call, call["dout"], call["dlse"])
    _, _, pt = reference.attention_with_gradients(call, call["dout"], call["dlse"], dtype)
    made = binding.allocate(call)
    made["out"].copy_(out.to(dtype))
    made["lse"].copy_(lse.to(made["lse"].dtype))
    for name, x in gpu_model.backward(call, made["out"], made["lse"], case.strided).items():
        assert reference.worst_error(x, ref[name]) <= reference.allowance(f"d{name}", pt[name], ref[name], dtype), name


def test_backward_of_large_scores_from_the_forward_pass() -> None:
    """Both passes round scores alike well enough for exp(score - lse): at 32 a relative error of 1e-6 would be one of 3e-5 there."""
    case = Case("scale_4.0", dtype="float32", scale=4.0)
    call = build(case)
    gpu_model.set_device(*A100)
    found = gpu_model.backward(call, *gpu_model.forward(call))
    _, _, ref = reference.attention_with_gradients(call, call["dout"], call["dlse"])
    _, _, pt = reference.attention_with_gradients(call, call["dout"], call["dlse"], torch.float32)
    for name in "qkv":
        assert reference.worst_error(found[name], ref[name]) <= reference.allowance(f"d{name}", pt[name], ref[name], torch.float32), name


def huge_but_hidden(call: dict) -> None:
    """The last keys, which nothing sees, hold large finite numbers."""
    call["mask"] = torch.ones(1, 1, 1, call["k"].shape[1], dtype=torch.bool)
    call["mask"][..., -7:] = False
    call["k"][:, -7:], call["v"][:, -7:] = 1e19, -1e36


def rows_of_all_sizes(call: dict) -> None:
    for name, lowest, highest in (("k", -30, 3), ("v", -60, 30), ("dout", -30, 30)):
        x = call[name]
        x *= torch.exp2(torch.randint(lowest, highest, (*x.shape[:-1], 1)).to(x.dtype))


def far_from_one(call: dict) -> None:
    for name, factor in (("q", 1e25), ("k", 1e-25), ("v", 1e-20), ("dout", 1e-12)):
        call[name] *= factor


@pytest.mark.parametrize("change", [huge_but_hidden, rows_of_all_sizes, far_from_one], ids=lambda f: f.__name__)
def test_float32_of_any_size(change: Callable[[dict], None]) -> None:
    """Operands are split into terms of 5 bits of exponent; a scale for each row makes up for that, whatever its neighbours hold."""
    torch.manual_seed(5)
    call = build(Case("causal", dtype="float32", causal=change is not huge_but_hidden, **SHAPE))
    change(call)
    gpu_model.set_device(*A100)
    out, lse = gpu_model.forward(call)
    found = {"out": out, **gpu_model.backward(call, out, lse)}
    ref_out, _, ref = reference.attention_with_gradients(call, call["dout"], call["dlse"])
    pt_out, _, pt = reference.attention_with_gradients(call, call["dout"], call["dlse"], torch.float32)
    for name, exact, unfused, times in [("out", ref_out, pt_out, 2), *((n, ref[n], pt[n], 3) for n in "qkv")]:
        error, allowed = (float((x.double() - exact).abs().max()) for x in (found[name], unfused))
        assert error <= times * allowed + 1e-6 * float(exact.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_no_sequence_have_no_gradient(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(n, 2, 8).to(dtype) for n in (3, 4, 4))
    none = torch.zeros(1, dtype=torch.int32)
    call = {
        **reference.DEFAULTS,
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": none,
        "cu_seqlens_k": none,
        "dout": torch.ones_like(q),
        "dlse": None,
    }
    gpu_model.set_device(*A100)
    out, lse = gpu_model.forward(call)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert all((g == 0).all() for g in gpu_model.backward(call, out, lse).values())


def test_a_lone_head_may_have_any_stride() -> None:
    """The keys are split; the stride from head to head is not used, and could not be told to the TMA."""
    q, k, v = (torch.randn(n, 64).bfloat16() for n in (70, 1500, 1500))
    call = {**reference.DEFAULTS} | {name: t.as_strided((1, len(t), 1, 64), (0, 64, 0, 1)) for name, t in (("q", q), ("k", k), ("v", v))}
    gpu_model.set_device(*H200)
    out, _ = gpu_model.forward(call)
    ref, _ = reference.attention(call)
    pt, _ = reference.attention(call, torch.bfloat16)
    assert reference.worst_error(out, ref) <= reference.allowance("out", pt, ref, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinite_values_reach_the_rows_that_see_them(dtype: torch.dtype) -> None:
    rows = 70
    q, k, v = (torch.randn(1, rows, 1, 32).to(dtype) for _ in range(3))
    gpu_model.set_device(*A100)
    v[0, rows - 6, 0, 3], v[0, rows - 10, 0, 7], v[0, rows - 21, 0, 11] = float("inf"), float("-inf"), float("nan")
    out, _ = gpu_model.forward({"q": q, "k": k, "v": v, "causal": True})
    out = out[0, :, 0]
    assert (out[-6:, 3] == float("inf")).all() and (out[-10:, 7] == float("-inf")).all() and out[-21:, 11].isnan().all()
    assert out[:-6, 3].isfinite().all() and out[:-10, 7].isfinite().all() and out[:-21, 11].isfinite().all()
    assert out[:, 12:].isfinite().all()


def almost(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the last bit of bfloat16."""
    return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-3)


# Hopper's kernels take other products where a tile holds such data, so a last bit may differ.
@pytest.mark.parametrize(
    "gpu, dim, deterministic, equal",
    [
        (A100, 64, False, torch.equal),
        (A100, 64, True, torch.equal),
        (H200, 64, False, almost),
        (H200, 128, False, almost),
        (H200, 256, False, almost),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_row_does_not_see_does_not_reach_its_gradients(
    value: float, gpu: tuple[int, ...], dim: int, deterministic: bool, equal: Callable[[torch.Tensor, torch.Tensor], bool]
) -> None:
    gpu_model.set_device(*A100)  # one forward for all: that of 9.0 takes other steps where a tile holds such data
    call = {name: torch.randn(1, 150, 1, dim).to(torch.bfloat16) for name in ("q", "k", "v", "dout")}
    call = binding.complete({**call, "causal": True, "deterministic": deterministic})
    out, lse = gpu_model.forward(call)
    blind = {**call, "k": call["k"].clone(), "v": call["v"].clone()}
    blind["k"][:, 100:], blind["v"][:, 100:] = value, value
    blind_out, blind_lse = gpu_model.forward(blind)

    gpu_model.set_device(*gpu)
    clean = gpu_model.backward(call, out, lse)
    dout = call["dout"].clone()
    dout[0, 70, 0, 5] = value
    spoiled = gpu_model.backward({**call, "dout": dout}, out, lse)
    assert not spoiled["q"][:, 70].isfinite().any() and equal(spoiled["q"][:, :70], clean["q"][:, :70])
    assert not spoiled["v"][:, :71, :, 5].isfinite().any() and spoiled["v"][:, :, :, :5].isfinite().all()
    assert equal(spoiled["v"][:, 71:], clean["v"][:, 71:]) and equal(spoiled["k"][:, 71:], clean["k"][:, 71:])

    spoiled = gpu_model.backward(blind, blind_out, blind_lse)
    assert equal(spoiled["q"][:, :100], clean["q"][:, :100]) and not spoiled["q"][:, 100:].isfinite().any()
