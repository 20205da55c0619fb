"""What `explain` says of the CPU engine: a plan made from shapes alone, without computing anything."""

from __future__ import annotations

import json

import pytest
import torch
from flash_attn_c import _C, attention, explain

import binding
import reference
from cases import SMOKE, Case, build

FIELDS = {"engine", "kernel", "tier", "block_m", "block_n", "splits", "threads", "workspace_bytes", "deterministic", "notes"}


def plan_of(seqlen: int = 300, backward: bool = False, dtype: torch.dtype = torch.float32, heads: int = 2, **options):
    q = torch.empty(2, seqlen, heads, 64, dtype=dtype)
    return explain(q, q, q, backward=backward, **options)


@pytest.mark.parametrize("case", SMOKE, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_case_has_a_plan(case: Case, backward: bool) -> None:
    plan = json.loads(binding.raw_explain(build(case), backward))
    assert FIELDS <= set(plan)
    assert plan["engine"] == "cpu" and plan["tier"] == json.loads(_C.describe())["cpu"]["tier"]
    assert plan["workspace_bytes"] >= 0 and plan["block_m"] >= 1 and plan["block_n"] >= 1 and plan["splits"] >= 1


def test_explain_computes_nothing() -> None:
    """Lengths that would take hours are planned at once, from memory that is never read."""
    q = torch.empty(1, 1, 1, 64).expand(1, 2**29, 1, 64)
    assert explain(q, q, q).engine == "cpu"
    assert explain(q, q, q, backward=True).workspace_bytes > 0


def test_tiles_are_those_of_shapes_not_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        plans = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            fields = dict(plan_of(backward=True).fields)
            del fields["threads"]
            plans.append(fields)
    finally:
        torch.set_num_threads(threads)
    assert plans[0] == plans[1] == plans[2]


def test_block_masks_are_not_cut_by_tiles() -> None:
    """A tile lies in one block, so that a False block is neither loaded nor computed."""
    for size in (64, 128, 192):
        blocks = -(-300 // size)
        plan = plan_of(block_mask=(torch.ones(1, 1, blocks, blocks, dtype=torch.bool), size))
        assert size % plan.block_m == 0 and size % plan.block_n == 0


def test_workspace_is_linear_in_the_length() -> None:
    for options in ({}, {"causal": True}, {"bias": torch.zeros(1)}):
        small, large = (plan_of(n, backward=True, **options).workspace_bytes for n in (8192, 16384))
        assert 0 < small and large <= 2.1 * small


def test_backward_keeps_sums_of_dq_where_dq_cannot() -> None:
    """float32 results hold the sums themselves; 16-bit ones need a copy in float32."""
    rows, wide = 2 * 2 * 4096, 64 * 4
    assert plan_of(4096, backward=True).workspace_bytes < rows * wide
    assert plan_of(4096, backward=True, dtype=torch.bfloat16).workspace_bytes >= rows * wide


def test_arithmetic_is_named() -> None:
    """16-bit inputs are computed in float32, float64 in float64."""
    assert {plan_of(dtype=dtype).arithmetic for dtype in (torch.float16, torch.bfloat16, torch.float32)} == {"float32"}
    assert plan_of(dtype=torch.float64).arithmetic == "float64"


def test_plan_reads_well() -> None:
    plan = plan_of(causal=True)
    assert "engine" in str(plan) and plan.kernel in str(plan)
    with pytest.raises(AttributeError, match="no 'colour'"):
        _ = plan.colour


def test_what_is_refused_is_refused_here_too() -> None:
    """`explain` and `attention` share one validator: the same words for the same call."""
    q, k = torch.zeros(1, 5, 4, 16), torch.zeros(1, 5, 3, 16)
    said = []
    for function in (attention, explain):
        with pytest.raises(ValueError, match=r"^k: heads 3 must divide q: heads 4") as caught:
            function(q, k, k)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_outputs_are_optional() -> None:
    call = {**reference.DEFAULTS, **dict.fromkeys("qkv", torch.zeros(1, 5, 2, 16))}
    assert json.loads(binding.raw_explain(call)) == json.loads(binding.raw_explain(binding.allocate(call)))
