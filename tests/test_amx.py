"""The AMX passes of the CPU engine, on emulated instructions: what can be known of them on any machine. A machine with AMX runs the whole
list of cases on the instructions themselves (test_attention.py)."""

from __future__ import annotations

import pytest
import torch

import amx_model
import reference
from cases import Case, build

pytestmark = pytest.mark.skipif(not amx_model.available, reason="no C compiler to build the passes with")

SHAPE = {"batch": 1, "seqlen_q": 150, "seqlen_k": 333, "heads_q": 2, "heads_k": 1}
PACKED = {"lengths": ((17, 40), (0, 13), (70, 129), (31, 0), (129, 65)), "causal": True}
SHAPES = {"heads_q": 4, "dim_qk": 40, "dim_v": 24, "seqused": "qk", "strided": "rows"}
PAIRS = {"causal": True, "window": (90, None), "mask": "bn", "block": 64}
SCORES = {"softcap": 3.0, "scale": 0.3, "bias": "hmn", "alibi": "bh", "sinks": True, "dropout": 0.1}
ROWS = {
    "full": SHAPE,
    "causal": {**SHAPE, "causal": True, "dim_qk": 64},
    "top_left": {**SHAPE, "causal": "top_left", "dim_qk": 128},
    "window": {"window": (37, 11), "heads_q": 6, "heads_k": 2},
    "long_window": {**SHAPE, "seqlen_q": 700, "seqlen_k": 900, "window": (300, 100), "heads_q": 1},  # tiles before, inside and behind
    "long_causal": {**SHAPE, "seqlen_q": 600, "seqlen_k": 631, "causal": True, "heads_q": 1},  # blocks of keys and of queries
    "negative_scale": {**SHAPE, "scale": -0.31, "causal": True},
    "no_scale": {**SHAPE, "scale": 0.0, "causal": True},
    "large_scale": {**SHAPE, "scale": 9.0},  # the running maximum moves
    "large_scale_causal": {**SHAPE, "scale": -9.0, "causal": True, "sinks": True},
    "wide": {**SHAPE, "dim_qk": 256, "dim_v": 192},
    "narrow": {**SHAPE, "dim_qk": 8, "dim_v": 200},
    "mask": {"mask": "bhmn", "causal": True},
    "softcap": {**SHAPE, "softcap": 2.5, "dim_qk": 64},
    "dropout": {**SHAPE, "dropout": 0.3, "causal": True},
    "block_mask": {**SHAPE, "seqlen_q": 300, "block": 64},
    "sinks": {**SHAPE, "sinks": True, "causal": True},
    "many_heads": {"batch": 3, "seqlen_q": 70, "seqlen_k": 150, "heads_q": 12, "heads_k": 12, "causal": True},  # a task is a head
    "many_groups": {"batch": 17, "seqlen_q": 50, "seqlen_k": 90, "heads_q": 4, "heads_k": 2, "seqused": "qk"},
    "packed": PACKED,
    "everything": {**SHAPES, **PAIRS, **SCORES},
    "everything_packed": {**SHAPES, **PAIRS, **SCORES, **PACKED},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ROWS)
def test_case(name: str, dtype: str) -> None:
    case, kind = Case(name, dtype=dtype, **ROWS[name]), getattr(torch, dtype)
    call = build(case)
    ref, ref_lse, ref_gradients = reference.attention_with_gradients(call, call["dout"], call["dlse"])
    pt, _, pt_gradients = reference.attention_with_gradients(call, call["dout"], call["dlse"], kind)
    out, lse = amx_model.forward(call, case.strided)
    assert reference.worst_error(out, ref) <= reference.allowance("out", pt, ref, kind)
    assert reference.worst_error(lse, ref_lse) <= 1e-5 * max(1.0, float(ref_lse[ref_lse.isfinite()].abs().max()))
    for side, gradient in amx_model.backward(call, out, lse, case.strided).items():
        allowed = reference.allowance(f"d{side}", pt_gradients[side], ref_gradients[side], kind)
        assert reference.worst_error(gradient, ref_gradients[side]) <= allowed, side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_poison_reaches_only_the_rows_that_see_it(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        torch.manual_seed(3)
        q, k, v, dout = (torch.randn(1, 130, 2, 32).to(dtype) for _ in range(4))
        call = {"q": q, "k": k, "v": v, "causal": True}
        clean, clean_lse = amx_model.forward(call)
        gradients = amx_model.backward({**call, "dout": dout}, clean, clean_lse)
        v[:, -1], k[:, -1], dout[:, 0] = value, value, value
        out, lse = amx_model.forward(call)
        assert torch.equal(out[:, :-1], clean[:, :-1]) and torch.equal(lse[..., :-1], clean_lse[..., :-1])
        assert not out[:, -1].isfinite().any()
        poisoned = amx_model.backward({**call, "dout": dout}, clean, clean_lse)
        assert poisoned["q"][:, 1:-1].isfinite().all()
        assert torch.allclose(poisoned["q"][:, 1:-1].float(), gradients["q"][:, 1:-1].float(), atol=2e-2)
        assert not poisoned["v"][:, 0].isfinite().any() and poisoned["v"][:, 1:-1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_future_key_changes_no_bit(dtype: torch.dtype) -> None:
    """Rows under a causal mask are bitwise those of the shorter problem, whatever follows."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 200, 1, 64).to(dtype) for _ in range(3))
    out, lse = amx_model.forward({"q": q, "k": k, "v": v, "causal": True})
    k[:, 150:], v[:, 150:] = 100, -7
    changed, changed_lse = amx_model.forward({"q": q, "k": k, "v": v, "causal": True})
    assert torch.equal(out[:, :128], changed[:, :128]) and torch.equal(lse[..., :128], changed_lse[..., :128])


def test_results_do_not_depend_on_threads() -> None:
    case = Case("threads", dtype="bfloat16", batch=2, seqlen_q=300, seqlen_k=700, heads_q=4, heads_k=2, dim_qk=64, causal=True)
    call, before, found = build(case), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, lse = amx_model.forward(call)
            found.append((out, lse, *amx_model.backward(call, out, lse).values()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
