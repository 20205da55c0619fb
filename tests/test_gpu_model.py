"""The CUDA kernels' own source on a model of a GPU: what can be known of them with no GPU. A few cases in each dtype; a GPU runs the whole
list (test_attention.py)."""

from __future__ import annotations

import pytest
import torch

import gpu_model
import reference
from cases import Case, build

pytestmark = pytest.mark.skipif(not gpu_model.available, reason="no C++ compiler to build the kernels with")

H200, RTX_5090 = (9, 0, 132, 232448), (12, 0, 170, 101376)
SHAPE = {"batch": 1, "seqlen_q": 75, "seqlen_k": 140}
PACKED = {"lengths": ((17, 40), (0, 13), (70, 129), (31, 0)), "causal": True}
SHAPES = {"heads_q": 4, "dim_qk": 40, "dim_v": 24, "seqused": "qk", "strided": "rows"}
PAIRS = {"causal": True, "window": (90, None), "mask": "bn", "block": 64}
SCORES = {"softcap": 3.0, "scale": 0.3, "bias": "hmn", "alibi": "bh", "sinks": True, "dropout": 0.1}
EVERYTHING = {**SHAPES, **PAIRS, **SCORES}
CASES = [
    *(Case("causal", dtype=dtype, causal=True, **SHAPE) for dtype in ("float32", "float16", "bfloat16", "float64")),
    *(Case("everything", dtype=dtype, **SHAPE, **EVERYTHING) for dtype in ("float32", "bfloat16", "float64")),
    Case("packed", dtype="bfloat16", **PACKED),
    Case("dropout", dtype="float16", dropout=0.3, **SHAPE),
    Case("one_row", dtype="bfloat16", batch=1, heads_q=1, heads_k=1, seqlen_q=1, seqlen_k=900, sinks=True),  # splits and combines
    Case("dim256", dtype="float32", dim_qk=200, dim_v=256, **SHAPE),
    Case("dim256", dtype="bfloat16", dim_qk=256, causal=True, **SHAPE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gpu", [H200, RTX_5090], ids=["sm_90", "sm_120"])
def test_forward(case: Case, gpu: tuple[int, int, int, int]) -> None:
    call, dtype = build(case), getattr(torch, case.dtype)
    gpu_model.set_device(8, *gpu[1:]) if gpu == H200 else gpu_model.set_device(*gpu)  # the family for every GPU, not Hopper's own
    out, lse = gpu_model.forward(call, case.strided)
    ref, ref_lse = reference.attention(call)
    pt, _ = reference.attention(call, dtype)
    assert reference.worst_error(out, ref) <= reference.allowance("out", pt, ref, dtype)
    assert reference.worst_error(lse, ref_lse) <= 1e-5 * max(1.0, float(ref_lse[ref_lse.isfinite()].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinite_values_reach_the_rows_that_see_them(dtype: torch.dtype) -> None:
    rows = 70
    q, k, v = (torch.randn(1, rows, 1, 32).to(dtype) for _ in range(3))
    v[0, rows - 6, 0, 3], v[0, rows - 10, 0, 7], v[0, rows - 21, 0, 11] = float("inf"), float("-inf"), float("nan")
    out, _ = gpu_model.forward({"q": q, "k": k, "v": v, "causal": True})
    out = out[0, :, 0]
    assert (out[-6:, 3] == float("inf")).all() and (out[-10:, 7] == float("-inf")).all() and out[-21:, 11].isnan().all()
    assert out[:-6, 3].isfinite().all() and out[:-10, 7].isfinite().all() and out[:-21, 11].isfinite().all()
    assert out[:, 12:].isfinite().all()
