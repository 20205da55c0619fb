"""Forward and backward over the whole list of cases, against float64, within the accuracy rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_attn_c import _C, attention

import binding
import reference
from cases import CASES, Case, build
from reference import DIFFERENTIABLE, allowance, worst_error


def check(accuracy: dict, case: Case, name: str, got: torch.Tensor, ref: torch.Tensor, pt: torch.Tensor) -> None:
    got, dtype = got.cpu(), getattr(torch, case.dtype)
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    error, allowed = worst_error(got, ref), allowance(name, pt, ref, dtype)
    floor = max(worst_error(pt, ref), 1e-11 if dtype == torch.float64 else 1e-5)
    accuracy[name, case.dtype] = max(accuracy[name, case.dtype], (error / floor, str(case)))
    assert error <= allowed, f"{name}: max|x - ref| = {error:.3g}, allowed {allowed:.3g}"


def check_lse(case: Case, got: torch.Tensor, ref: torch.Tensor) -> None:
    """Statistics are kept in float32 at least, whatever the inputs: close to float64 relative to their own size."""
    assert got.dtype == (torch.float64 if case.dtype == "float64" else torch.float32)
    unit = 1e-12 if case.dtype == "float64" else 1e-5
    got, ref = got.cpu().double(), ref.double()
    assert worst_error(got, ref) <= unit * max(1.0, float(ref[ref.isfinite()].abs().amax()) if ref.isfinite().any() else 1.0)


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=[pytest.mark.smoke] if c.smoke else []) for c in CASES])
def test_case(case: Case, device: str, accuracy: dict) -> None:
    host = build(case)
    call = build(case, device)
    ref_out, ref_lse, ref_gradients = reference.attention_with_gradients(host, host["dout"], host["dlse"])
    pt_out, _, pt_gradients = reference.attention_with_gradients(host, host["dout"], host["dlse"], getattr(torch, case.dtype))

    out, lse = binding.forward(call, case.strided)
    check(accuracy, case, "out", out, ref_out, pt_out)
    check_lse(case, lse, ref_lse)
    gradients = binding.backward(call, out, lse, case.strided)
    assert gradients.keys() == ref_gradients.keys()
    for name, gradient in gradients.items():
        check(accuracy, case, f"d{name}", gradient, ref_gradients[name], pt_gradients[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_head_dim(device: str, accuracy: dict, dtype: str) -> None:
    for dim in range(1, 257):
        dim_v = dim if dim % 3 else 257 - dim
        case = Case(f"dim{dim}_{dim_v}", dtype=dtype, batch=1, seqlen_q=7, seqlen_k=9, heads_q=2, heads_k=1, dim_qk=dim, dim_v=dim_v)
        test_case(case, device, accuracy)


@pytest.mark.parametrize("alibi", ["", "h"])
def test_each_gradient_alone_equals_all_together(device: str, alibi: str) -> None:
    """A gradient that is not asked for changes nothing about the others, but for those per head, whose sums may ask for a finer pass."""
    call = build(Case("alone", bias="hmn", alibi=alibi, sinks=bool(alibi), causal=True, deterministic=True), device)
    out, lse = binding.forward(call)
    together = binding.backward(call, out, lse)
    for name in together:
        alone = binding.backward(call, out, lse, wanted=(name,))
        assert worst_error(alone[name], together[name]) <= (2e-6 if alibi else 0), name
    assert binding.backward(call, out, lse, wanted=()) == {}


PUBLIC = ("causal", "top_left", "window", "softcap", "scale", "bias", "mask", "alibi", "sinks", "gqa", "dim_v", "packed", "seqused", "bhsd",
          "deterministic")  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name in PUBLIC and c.dtype in ("float32", "bfloat16")], ids=str)
def test_public_function_is_the_raw_call(case: Case, device: str) -> None:
    """`attention` and its autograd hand the same numbers through, bit for bit."""
    call = {**build(case, device), "deterministic": True}  # else a GPU may add up dq in any order
    out, lse = binding.forward(call)
    gradients = binding.backward(call, out, lse)
    leaves = {n: call[n].clone().requires_grad_() for n in DIFFERENTIABLE if call[n] is not None}
    options = {n: v for n, v in call.items() if n not in ("dout", "dlse", "rng", "block_size", "q", "k", "v") and v is not None}
    inputs = {**options, **leaves}
    got_out, got_lse = attention(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), return_lse=True, **inputs)
    assert torch.equal(got_out, out) and torch.equal(got_lse, lse)
    assert got_out.dtype == call["q"].dtype
    got = torch.autograd.grad([got_out, got_lse], list(leaves.values()), [call["dout"], call["dlse"]])
    for name, gradient in zip(leaves, got, strict=True):
        assert torch.equal(gradient, gradients[name]), name


def test_poisoned_last_key_reaches_only_its_row(device: str) -> None:
    """A visible NaN may spoil the rows that see it and no other, though it shares every tile with them. A GPU may compute the others again,
    in another order."""
    for value in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            q, k, v = (torch.randn(1, 130, 2, 32, device=device).to(dtype) for _ in range(3))
            clean, _ = attention(q, k, v, causal=True, return_lse=True)
            v[:, -1], k[:, -1] = value, value
            out, lse = attention(q, k, v, causal=True, return_lse=True)
            tolerance = 0 if device == "cpu" else 1e-2 if dtype.itemsize == 2 else 1e-5
            torch.testing.assert_close(out[:, :-1], clean[:, :-1], rtol=tolerance, atol=tolerance)
            assert not out[:, -1].isfinite().any()
            assert lse[:, :, :-1].isfinite().all()


def test_poisoned_gradient_row_stays_in_its_sums(device: str) -> None:
    """NaN in the first row's dout reaches the one key that row sees, and no other key's gradient."""
    q, k, v = (torch.randn(1, 130, 2, 32, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 130, 2, 32, device=device)
    dout[:, 0] = float("nan")
    dq, dk, dv = torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), dout)
    assert dq[:, 1:].isfinite().all() and dk[:, 1:].isfinite().all() and dv[:, 1:].isfinite().all()
    assert dv[:, 0].isnan().all()


def other_tiers() -> list[str]:
    cpu = json.loads(_C.describe())["cpu"]
    return [tier for tier in cpu["tiers"] if tier != cpu["tier"]]


@pytest.mark.skipif("FLASH_ATTN_C_CPU" in os.environ, reason="a tier is already forced")
@pytest.mark.parametrize("tier", other_tiers())
def test_other_tiers_of_this_machine(tier: str) -> None:
    """The tier is chosen once a process, so each of the others runs the reduced list in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "smoke", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "FLASH_ATTN_C_CPU": tier, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.smoke
def test_forced_tier_is_used() -> None:
    forced = os.environ.get("FLASH_ATTN_C_CPU")
    cpu = json.loads(_C.describe())["cpu"]
    assert cpu["tier"] in cpu["tiers"]
    assert forced is None or cpu["tier"] == forced
