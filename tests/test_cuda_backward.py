"""The CUDA engine's backward pass: its plan, on devices that need not be here, and on a GPU what the list of cases does not reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import binding
import reference
from cases import Case, build
from plan_tool import BF16, DEVICES, F16, F32, F64, PlanTool
from reference import allowance, worst_error

SMEM = {gpu: DEVICES[gpu][1] for gpu in ("H200", "A100", "RTX 4090")}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> PlanTool:
    return PlanTool(tmp_path_factory.mktemp("plan"), backward=True)


def kernels(found: dict) -> list[str]:
    return [launch["kernel"] for launch in found["launches"]]


@pytest.mark.parametrize("target", SMEM)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_every_problem_has_kernels_within_the_shared_memory(plan, target: str, dtype: int) -> None:
    for dim in (1, 33, 64, 96, 128, 160, 192, 256):
        everything = {"softcap": 9, "alibi": 1, "bias": 1, "sinks": 1, "dropout_percent": 9}
        for more in ({}, {"dim_v": 257 - dim}, {"block": 64}, {"block": 192}, everything):
            found = plan(target, dtype=dtype, dim_qk=dim, **more)
            assert "error" not in found, found
            assert all(launch["smem_bytes"] <= SMEM[target] for launch in found["launches"])
            if "block" in more:
                assert more["block"] % found["block_m"] == 0 and more["block"] % found["block_n"] == 0


def test_a_warp_has_whole_fragments(plan) -> None:
    for device in SMEM:
        for dtype in (F32, BF16):
            for dim in (16, 64, 96, 128, 192, 256):
                for more in ({}, {"softcap": 9}, {"block": 64}):
                    for launch in plan(device, dtype=dtype, dim_qk=dim, **more)["launches"]:
                        c = launch["constants"]
                        if launch["kernel"] != "bwd_sm80":
                            continue
                        columns = min(c["WARPS"] // c["S_WARPS"], c["BLOCK_N"] // 16)
                        parts = [c["BLOCK_M"] // c["S_WARPS"], c["BLOCK_N"] // columns, c["BLOCK_N"] // c["KV_WARPS"],
                                 c["HEAD_DIM"] // (c["WARPS"] // c["KV_WARPS"]), c["BLOCK_M"] // c["DQ_WARPS"],
                                 c["HEAD_DIM"] // (c["WARPS"] // c["DQ_WARPS"]), c["DIM_V"] // (c["WARPS"] // c["KV_WARPS"])]  # fmt: skip
                        assert all(part >= 16 and part % 16 == 0 for part in parts), (device, dtype, dim, parts)


def test_dq_is_added_unless_it_must_be_reproducible(plan) -> None:
    for gpu, kernel in (("H200", "bwd_sm90"), ("A100", "bwd_sm80")):
        assert kernels(plan(gpu)) == ["bwd_prep", kernel, "bwd_finish"] and not plan(gpu)["deterministic"]
        found = plan(gpu, deterministic=1)
        assert kernels(found) == ["bwd_prep", kernel, "bwd_rows_sm80"] and found["deterministic"]
        assert any("kernel of its own" in note for note in found["notes"])
        assert kernels(plan(gpu, alibi=1))[:3] == ["bwd_prep", "bwd_sm80", "bwd_rows_sm80"]
        assert kernels(plan(gpu, dk=0, dv=0)) == ["bwd_prep", "bwd_rows_sm80"]
        assert kernels(plan(gpu, dq=0)) == ["bwd_prep", kernel]


@pytest.mark.parametrize(
    "words, reason",
    [
        ({"cc": 100}, "compute capability"),
        ({"smem": 99 * 1024}, "shared memory"),
        ({"dtype": F32}, "float16"),
        ({"block": 64}, "block_mask"),
        ({"shift": 2}, "aligned"),
        ({"softcap": 9}, "softcap"),
        ({"dropout_percent": 9}, "dropout"),
    ],
)
def test_the_hopper_kernel_runs_unless_there_is_a_reason(plan, words: dict, reason: str) -> None:
    assert "bwd_sm90" in kernels(plan()) and not plan()["notes"]
    found = plan(**words)
    assert "bwd_sm90" not in kernels(found) and any(note.startswith("bwd_sm90: ") and reason in note for note in found["notes"])


WIDE = ["bwd_prep", "bwd_keys_sm90", "bwd_rows_sm90"]


def test_wide_heads_have_hopper_kernels(plan) -> None:
    wide = ({"dim_qk": 136}, {"dim_qk": 256, "causal": 1}, {"dim_qk": 192, "dim_v": 128, "deterministic": 1}, {"dim_qk": 256, "block": 128})
    for words in wide:
        found = plan("H200", **words)
        assert kernels(found) == WIDE and found["deterministic"] and not found["notes"], words
    assert kernels(plan("H200", dim_qk=256, dq=0)) == WIDE[:2]
    assert kernels(plan("H200", dim_qk=256, dk=0, dv=0)) == [WIDE[0], WIDE[2]]
    refused = {
        "no dropout": {"dropout_percent": 9},
        "softcap": {"softcap": 9},
        "block_mask": {"block": 64},
        "float16": {"dtype": F32},
        "fewer keys": {"seqlen_k": 63},
    }
    for reason, words in refused.items():
        found = plan("H200", dim_qk=256, **words)
        assert found["kernel"] == "bwd_sm80" and any(reason in note for note in found["notes"]), words
    assert plan("A100", dim_qk=256)["kernel"] == "bwd_sm80" and not plan("A100", dim_qk=256)["notes"]


def test_workspace_is_linear(plan) -> None:
    sizes = [plan(seqlen_q=n)["workspace_bytes"] for n in (1024, 2048, 4096)]
    rows = 2 * 16 * 1024
    assert sizes[0] == rows * (4 + 4 + 128 * 4)
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]
    assert plan(deterministic=1)["workspace_bytes"] == rows * 8


def test_each_gradient_has_its_launch(plan) -> None:
    assert kernels(plan(bias=1, sinks=1))[-2:] == ["bwd_bias_sm80", "bwd_heads"]
    assert kernels(plan(dtype=F64, bias=1, alibi=1)) == ["bwd_prep", "bwd_f64", "bwd_f64", "bwd_f64", "bwd_heads"]
    assert kernels(plan("RTX 4090", dtype=F32, dim_qk=256))[1] == "bwd_f64"


def gradients_and_limits(case: Case) -> None:
    """The case on the GPU, within the accuracy rule; out and lse come from the reference."""
    host, call, dtype = build(case), build(case, "cuda"), getattr(torch, case.dtype)
    out, lse, ref = reference.attention_with_gradients(host, host["dout"], host["dlse"])
    _, _, pt = reference.attention_with_gradients(host, host["dout"], host["dlse"], dtype)
    made = binding.allocate(call)
    made["out"].copy_(out.to(dtype))
    made["lse"].copy_(lse.to(made["lse"].dtype))
    for name, x in binding.backward(call, made["out"], made["lse"]).items():
        assert worst_error(x.cpu(), ref[name]) <= allowance(f"d{name}", pt[name], ref[name], dtype), name


@gpu
@pytest.mark.parametrize("smem", SMEM.values())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_every_size_of_shared_memory(smem: int, dtype: str, dim: int, monkeypatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_C_SMEM", str(smem))
    for more in ({"causal": True}, {"softcap": 3.0, "heads_q": 4}):
        gradients_and_limits(Case(f"cap{smem}", dtype=dtype, seqlen_q=170, seqlen_k=210, dim_qk=dim, **more))


@gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bitwise_repeats(dim: int) -> None:
    for deterministic in (False, True):
        case = Case("again", dtype="bfloat16", seqlen_q=700, seqlen_k=900, heads_q=4, dim_qk=dim, deterministic=deterministic)
        call = build(case, "cuda")
        out, lse = binding.forward(call)
        first = binding.backward(call, out, lse)
        for _ in range(10):
            again = binding.backward(call, out, lse)
            stable = first if deterministic else ("k", "v")
            assert all(torch.equal(first[name], again[name]) for name in stable)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_row_does_not_see_does_not_reach_its_gradient(dtype: torch.dtype, value: float) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    for deterministic in (False, True):
        call = {name: normal(1, 300, 2, 64) for name in ("q", "k", "v", "dout")}
        call.update(causal=True, deterministic=deterministic)
        call = binding.complete(call)
        clean = binding.backward(call, *binding.forward(call))
        call["k"][:, 200:], call["v"][:, 200:] = value, value
        spoiled = binding.backward(call, *binding.forward(call))
        assert worst_error(spoiled["q"][:, :200].cpu(), clean["q"][:, :200].cpu()) <= 1e-2
        assert spoiled["q"][:, :200].isfinite().all() and not spoiled["q"][:, 200:].isfinite().all()
