"""The CUDA engine's forward pass where the list of cases does not reach: splits, slack, graphs, many heads, infinities, forced limits. All
of it with the kernels that the plan chooses, and on Hopper once more with those for every GPU."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_c import attention
from torch import Tensor

import binding
import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SMALL_SMEM = 99 * 1024  # of a block on sm_86, sm_89, sm_120; no tile of the Hopper kernel fits
HALF = [torch.float16, torch.bfloat16]
ALL = [*HALF, torch.float32, torch.float64]


@pytest.fixture(autouse=True, params=["chosen", "portable"])
def family(request, monkeypatch) -> str:
    if request.param == "portable":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the kernels for every GPU are the chosen ones here")
        monkeypatch.setenv("FLASH_ATTN_C_SMEM", str(SMALL_SMEM))
    return request.param


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def forward(call: dict) -> tuple[Tensor, Tensor]:
    return binding.forward(binding.complete(call))


def check(call: dict, out: Tensor, lse: Tensor) -> None:
    host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in binding.complete(call).items()}
    ref, ref_lse = reference.attention(host)
    pt, _ = reference.attention(host, call["q"].dtype)
    assert reference.worst_error(out.cpu(), ref) <= reference.allowance("out", pt, ref, call["q"].dtype)
    assert reference.worst_error(lse.cpu(), ref_lse) <= 1e-5 * max(1.0, float(ref_lse[ref_lse.isfinite()].abs().max()))


def plan(call: dict) -> dict:
    return json.loads(binding.raw_explain(call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": (700, None), "sinks": True}, {"softcap": 4.0}], ids=str
)
def test_split_keys_combine_exactly(dtype: torch.dtype, options: dict) -> None:
    call = {
        "q": normal(2, 5, 4, 64, dtype=dtype),
        "k": normal(2, 4001, 2, 64, dtype=dtype),
        "v": normal(2, 4001, 2, 40, dtype=dtype),
        **options,
    }
    if "sinks" in options:
        call["sinks"] = normal(4, dtype=dtype)
    assert plan(call)["splits"] > 1
    check(call, *forward(call))


def test_split_with_empty_and_short_sequences() -> None:
    """Rows that see nothing in some splits, or in any."""
    lengths = {"seqused_k": torch.tensor([0, 9, 3000], dtype=torch.int32, device="cuda")}
    call = {"q": normal(3, 2, 2, 64), "k": normal(3, 3000, 2, 64), "v": normal(3, 3000, 2, 64), **lengths}
    assert plan(call)["splits"] > 1
    check(call, *forward(call))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("splits", [False, True])
def test_infinite_values_reach_the_rows_that_see_them(dtype: torch.dtype, splits: bool) -> None:
    rows = 70
    q, k, v = normal(1, rows, 1, 32, dtype=dtype), normal(1, 2000 if splits else rows, 1, 32, dtype=dtype), None
    v = normal(*k.shape, dtype=dtype)
    last = k.shape[1] - 1
    v[0, last - 5, 0, 3], v[0, last - 9, 0, 7], v[0, last - 20, 0, 11] = float("inf"), float("-inf"), float("nan")
    v[0, last - 4, 0, 13], v[0, last - 2, 0, 13] = float("inf"), float("-inf")
    out = attention(q, k, v, causal=True)[0, :, 0]
    expected = {3: (5, float("inf")), 7: (9, float("-inf")), 11: (20, float("nan"))}
    for column, (back, value) in expected.items():
        seen = torch.full((back + 1,), value, dtype=dtype, device="cuda")
        assert torch.equal(out[-back - 1 :, column].nan_to_num(99, 98, 97), seen.nan_to_num(99, 98, 97))
        assert out[: -back - 1, column].isfinite().all()
    assert out[-3:, 13].isnan().all() and (out[-5:-3, 13] == float("inf")).all() and out[:-5, 13].isfinite().all()
    others = [c for c in range(32) if c not in (3, 7, 11, 13)]
    assert out[:, others].isfinite().all()


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_probs_and_dropout_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    call = {"q": torch.randn(2, 70, 2, 32), "k": torch.randn(2, 90, 1, 32), "v": torch.randn(2, 90, 1, 32)}
    found = []
    for device in ("cpu", "cuda"):
        moved = {name: t.to(dtype).to(device) for name, t in call.items()}
        moved = binding.allocate(binding.complete({**moved, "causal": True, "dropout_p": 0.3, "rng": (5, 9)}))
        moved["probs"] = torch.full((2, 2, 128, 128), float("nan"), dtype=dtype, device=device)
        binding.raw_forward(moved)
        found.append(moved["probs"].cpu())
    assert torch.equal(found[0].signbit(), found[1].signbit())
    torch.testing.assert_close(*found)


def test_tokens_behind_the_last_sequence_are_padding() -> None:
    q = normal(200, 2, 64)
    cu = torch.tensor([0, 37, 37, 150], dtype=torch.int32, device="cuda")
    call = {"q": q, "k": q, "v": q, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    out, lse = forward(call)
    assert (out[150:] == 0).all() and (lse[:, 150:] == float("-inf")).all()
    check(call, out, lse)


def test_lengths_beyond_the_memory_are_cut() -> None:
    """What the device says cannot be checked by the host, and must not lead outside the tensors."""
    q = normal(64, 1, 32)
    cu = torch.tensor([0, 1 << 20], dtype=torch.int32, device="cuda")
    right = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    found = [attention(q, q, q, cu_seqlens_q=c, cu_seqlens_k=c, max_seqlen_q=64, max_seqlen_k=64) for c in (cu, right)]
    assert torch.equal(*found)


def test_graph_replay_reads_new_lengths_and_random_state() -> None:
    q = normal(300, 2, 64)
    cu, state = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda"), torch.tensor([1, 2], device="cuda")
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 300, "max_seqlen_k": 300}
    call = binding.allocate(binding.complete({"q": q, "k": q, "v": q, **lengths, "causal": True, "dropout_p": 0.5, "rng": state}))
    binding.raw_forward(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        binding.raw_forward(call)
    cu.copy_(torch.tensor([0, 37, 250]))
    state.copy_(torch.tensor([3, 4]))
    graph.replay()
    replayed = call["out"].clone()
    binding.raw_forward(call)
    assert torch.equal(replayed, call["out"]) and (replayed[250:] == 0).all()


def test_more_heads_than_a_grid_axis_has() -> None:
    q = normal(1, 3, 70000, 16)
    out = attention(q, q, q)
    some = q[:, :, -1:].contiguous()
    assert torch.equal(out[:, :, -1:], attention(some, some, some))


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_repeats_and_views_are_bitwise_equal(dtype: torch.dtype) -> None:
    q = normal(2, 300, 3, 96, dtype=dtype)
    first = attention(q, q, q, causal=True)
    assert all(torch.equal(first, attention(q, q, q, causal=True)) for _ in range(5))
    wide = torch.zeros(2, 300, 3, 2 * 96 + 1, dtype=dtype, device="cuda")
    view = wide[..., 1::2]
    view.copy_(q)
    call, other = ({"q": t, "k": t, "v": t, "causal": True} for t in (q, view))
    chosen = [(found["kernel"], found["block_m"], found["block_n"]) for found in map(plan, (call, other))]
    if chosen[0] == chosen[1]:
        assert torch.equal(first, attention(view, view, view, causal=True))
    else:  # this view takes another kernel or tile, which adds in another order
        check(other, *forward(other))


def test_side_stream_waits_for_nobody_and_computes_the_same() -> None:
    q = normal(2, 500, 4, 64)
    expected = attention(q, q, q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = attention(q, q, q)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_variants_for_small_shared_memories(monkeypatch, dtype: torch.dtype, dim: int) -> None:
    monkeypatch.setenv("FLASH_ATTN_C_SMEM", str(SMALL_SMEM))
    call = {"q": normal(1, 200, 2, dim, dtype=dtype), "k": normal(1, 300, 2, dim, dtype=dtype), "v": normal(1, 300, 2, dim, dtype=dtype)}
    assert plan(call)["smem_bytes"] <= SMALL_SMEM
    check(call, *forward(call))


def test_too_little_shared_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_C_SMEM", "16384")
    q = normal(1, 8, 1, 128)
    with pytest.raises(NotImplementedError, match="16384 bytes of shared memory"):
        attention(q, q, q)
