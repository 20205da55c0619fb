"""The Hopper forward kernel where its persistent CTAs work through many tiles: on a model of a GPU with three SMs."""

from __future__ import annotations

import pytest
import torch

import binding
import gpu_model
import reference

pytestmark = pytest.mark.skipif(not gpu_model.available, reason="no C++ compiler to build the kernels with")
HOPPER = (9, 0, 3, 232448)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def check(call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    call = binding.complete(call)
    gpu_model.set_device(*HOPPER)
    out, lse = gpu_model.forward(call)
    ref, ref_lse = reference.attention(call)
    pt, _ = reference.attention(call, torch.bfloat16)
    assert reference.worst_error(out, ref) <= reference.allowance("out", pt, ref, torch.bfloat16)
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
