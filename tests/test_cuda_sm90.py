"""The Hopper forward kernel where its persistent CTAs work through many tiles: on a model of a GPU with three SMs."""

from __future__ import annotations

import pytest
import torch

import binding
import gpu_model
import reference
from cases import Case, build

pytestmark = pytest.mark.skipif(not gpu_model.available, reason="no C++ compiler to build the kernels with")
HOPPER = (9, 0, 3, 232448)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def check(call: dict, how: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    call = binding.complete(call)
    dtype = call["q"].dtype
    gpu_model.set_device(*HOPPER)
    out, lse = gpu_model.forward(call, how)
    ref, ref_lse = reference.attention(call)
    pt, _ = reference.attention(call, dtype)
    assert reference.worst_error(out, ref) <= reference.allowance("out", pt, ref, dtype)
    assert reference.worst_error(lse, ref_lse) <= 1e-5 * max(1.0, float(ref_lse[ref_lse.isfinite()].abs().max()))
    return out, lse


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("rule", [{"causal": True}, {"window": (300, 10)}, {"window": (40, 0)}], ids=str)
def test_warpgroups_that_see_different_blocks(dim: int, rule: dict) -> None:
    """Some blocks of a tile are seen by one warpgroup and not by its neighbours."""
    check({"q": normal(2, 700, 2, dim), "k": normal(2, 600, 1, dim), "v": normal(2, 600, 1, dim), **rule})


@pytest.mark.parametrize("rule", [{}, {"causal": True}, {"window": (200, 50)}], ids=str)
@pytest.mark.parametrize("size", [128, 256])
def test_block_masks(size: int, rule: dict) -> None:
    q, k, v = normal(1, 700, 2, 128), normal(1, 900, 1, 128), normal(1, 900, 1, 128)
    seen = torch.rand(1, 2, -(-700 // size), -(-900 // size)) < 0.5
    seen[0, 0, 1] = False  # a tile with nothing to do
    check({"q": q, "k": k, "v": v, "block_mask": seen, "block_size": size, **rule})


def test_tokens_behind_the_last_sequence_are_padding() -> None:
    q, cu = normal(200, 2, 64), torch.tensor([0, 37, 37, 150], dtype=torch.int32)
    out, lse = check({"q": q, "k": q, "v": q, "cu_seqlens_q": cu, "cu_seqlens_k": cu})
    assert (out[150:] == 0).all() and (lse[:, 150:] == float("-inf")).all()


@pytest.mark.parametrize("dim", [64, 256])
def test_infinite_values_reach_the_rows_that_see_them(dim: int) -> None:
    q, k, v = (normal(1, 300, 1, dim) for _ in range(3))
    v[0, 290, 0, 3], v[0, 280, 0, 7], v[0, 270, 0, 11] = float("inf"), float("-inf"), float("nan")
    gpu_model.set_device(*HOPPER)
    out = gpu_model.forward(binding.complete({"q": q, "k": k, "v": v, "causal": True}))[0][0, :, 0]
    assert (out[290:, 3] == float("inf")).all() and (out[280:, 7] == float("-inf")).all() and out[270:, 11].isnan().all()
    assert out[:290, 3].isfinite().all() and out[:280, 7].isfinite().all() and out[:270, 11].isfinite().all()
    assert out[:, 12:].isfinite().all()


@pytest.mark.parametrize("dim, dtype", [(64, torch.float16), (128, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("growth", [8, 60, 1000])
def test_scores_that_grow_from_block_to_block(growth: int, dim: int, dtype: torch.dtype) -> None:
    """Keys come last to first: weights that go by earlier maxima are shrunk where they are large, computed again where infinite."""
    q, k, v = (torch.randn(1, n, 1, dim).to(dtype) for n in (300, 700, 700))
    k *= (1 + growth * torch.linspace(1, 0, 700) ** 4).to(dtype).view(1, -1, 1, 1)
    for rule in {}, {"causal": True}, {"window": (350, 10)}:
        check({"q": q, "k": k, "v": v, **rule})


BF16, GQA8 = {"dtype": "bfloat16"}, {"heads_q": 8, "heads_k": 1}
FEATURES = [
    Case("bias_by_element", dtype="float16", batch=1, seqlen_q=200, seqlen_k=300, dim_qk=64, bias="hmn", causal=True),
    Case("bias", dtype="float16", batch=3, seqlen_q=140, seqlen_k=296, dim_qk=64, bias="hmn", causal=True),
    Case("bias_of_keys", **BF16, seqlen_q=70, seqlen_k=200, dim_qk=128, bias="bn", softcap=3.0),
    Case("wide_bias", **BF16, batch=1, seqlen_q=70, seqlen_k=200, dim_qk=192, bias="bmn", window=(50, 20)),
    Case("mask_of_heads", dtype="float16", seqlen_q=140, seqlen_k=304, dim_qk=64, mask="bmn", alibi="h"),
    Case("mask_of_keys", **BF16, batch=1, seqlen_q=70, seqlen_k=208, dim_qk=256, mask="bn"),
    Case("bias_f32_and_mask", **BF16, seqlen_q=130, seqlen_k=150, dim_qk=128, bias="bn", bias_dtype="float32", mask="hmn", softcap=3.0),
    Case("mask", **BF16, batch=1, seqlen_q=70, seqlen_k=300, dim_qk=64, mask="bm", window=(90, 20)),
    Case("dropout", dtype="float16", seqlen_q=140, seqlen_k=270, dim_qk=64, dropout=0.3, causal=True),
    Case("dropout_of_packed", **BF16, dim_qk=128, dropout=0.1, lengths=((17, 40), (0, 13), (129, 300), (31, 0)), heads_q=4, sinks=True),
    Case("dropout_and_bias", **BF16, seqlen_q=65, seqlen_k=100, dim_qk=256, dropout=0.2, bias="bhmn", alibi="h"),
]
FEW_ROWS = [
    Case("one_row", **BF16, batch=1, heads_q=1, heads_k=1, seqlen_q=1, seqlen_k=900, dim_qk=128, sinks=True),
    Case("one_row_of_a_group", **BF16, batch=1, seqlen_q=1, seqlen_k=900, dim_qk=64, **GQA8, causal=True, sinks=True),
    Case("group_of_three", dtype="float16", batch=1, seqlen_q=5, seqlen_k=700, dim_qk=128, heads_q=6, heads_k=2, alibi="h", bias="hn"),
    Case("group_of_eight", **BF16, batch=1, seqlen_q=37, seqlen_k=400, dim_qk=128, **GQA8, window=(90, 9), dropout=0.2, mask="mn"),
    Case("group_with_bias", **BF16, batch=2, seqlen_q=9, seqlen_k=520, dim_qk=128, **GQA8, bias="hn"),
    Case("group_with_mask", **BF16, batch=1, seqlen_q=70, seqlen_k=512, dim_qk=64, heads_q=3, heads_k=1, mask="hmn", causal=True),
    Case("packed_group", **BF16, dim_qk=128, **GQA8, lengths=((3, 300), (0, 13), (50, 260), (2, 0)), causal=True, sinks=True),
    Case("used_part_of_a_group", **BF16, seqlen_q=20, seqlen_k=500, dim_qk=64, dim_v=128, **GQA8, seqused="qk"),
    Case("split_tiles", **BF16, batch=1, heads_q=2, heads_k=2, seqlen_q=150, seqlen_k=2000, dim_qk=64, causal=True),
]


@pytest.mark.parametrize("case", [*FEATURES, *FEW_ROWS], ids=str)
def test_features(case: Case) -> None:
    check(build(case), case.strided)


@pytest.mark.parametrize("group", [1, 8])
def test_infinite_values_in_one_part_of_the_keys(group: int) -> None:
    q, k, v = normal(1, 3, group, 64), normal(1, 2000, 1, 64), normal(1, 2000, 1, 64)
    v[0, 1999, 0, 3], v[0, 20, 0, 7], v[0, 1000, 0, 11] = float("inf"), float("-inf"), float("nan")
    gpu_model.set_device(*HOPPER)
    out = gpu_model.forward(binding.complete({"q": q, "k": k, "v": v, "causal": True}))[0][0]
    assert (out[:, :, 7] == float("-inf")).all() and out[:, :, 11].isnan().all() and out[:, :, 12:].isfinite().all()
    assert (out[2, :, 3] == float("inf")).all() and out[:2, :, 3].isfinite().all()
