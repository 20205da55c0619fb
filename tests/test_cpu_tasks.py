"""How the CPU engine cuts its work: ranges of keys that are combined, heads that share a tile, tall tiles, and sums that tasks share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import binding
import test_attention
from cases import FEATURES, Case, build

# Few rows over many keys, a few more, and one head with more rows than a tile: all have their keys split.
FEW = Case("few", batch=1, seqlen_q=1, seqlen_k=1300, heads_q=6, heads_k=2)
SOME = Case("some", batch=1, seqlen_q=9, seqlen_k=1111, heads_q=6, heads_k=2, dim_qk=33)
HEAD = Case("head", batch=1, seqlen_q=200, seqlen_k=1090, heads_q=1, heads_k=1)
PACKED = ((3, 1500), (0, 40), (2, 0), (1, 1100))
TALL = Case("tall", batch=2, seqlen_q=512, seqlen_k=170, heads_q=16, heads_k=8, dim_qk=16)  # several hundred rows in a tile


def with_feature(case: Case, feature: str) -> Case:
    fields = {"lengths": PACKED} if feature == "packed" else FEATURES[feature]
    return replace(case, name=f"{case.name}-{feature}", **fields)


SPLIT = [
    *(replace(case, dtype=dtype) for case in (FEW, SOME, HEAD) for dtype in ("float32", "bfloat16", "float16", "float64")),
    *(with_feature(case, feature) for case in (FEW, SOME) for feature in FEATURES),
    *(replace(FEW, name="few-strided", strided=how) for how in ("rows", "last")),
    *(replace(FEW, name="five", heads_q=10, dtype=dtype) for dtype in ("float32", "bfloat16", "float16", "float64")),
    *(replace(FEW, name="eight", heads_q=16, dim_qk=80, dim_v=48, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
]


def splits(case: Case) -> int:
    return json.loads(binding.raw_explain(build(case)))["splits"]


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_ranges_of_keys_are_combined(case: Case, accuracy: dict) -> None:
    assert splits(case) > 1
    test_attention.test_case(case, "cpu", accuracy)


@pytest.mark.parametrize("feature", ["", "causal", "top_left", "window", "bias", "dropout", "seqused"])
def test_tall_tiles(feature: str, accuracy: dict) -> None:
    case = with_feature(TALL, feature) if feature else TALL
    assert json.loads(binding.raw_explain(build(case)))["block_m"] > 128
    test_attention.test_case(case, "cpu", accuracy)


@pytest.mark.parametrize("feature", ["", "causal", "window", "window_left", "gqa", "block_mask", "packed"])
@pytest.mark.parametrize("case", [FEW, HEAD, replace(HEAD, seqlen_q=700, seqlen_k=700, dtype="bfloat16")], ids=str)
def test_results_do_not_depend_on_threads(case: Case, feature: str) -> None:
    call = build(with_feature(case, feature) if feature else case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            out, lse = binding.forward(call)
            results.append([out, lse, *binding.backward(call, out, lse).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_few_tasks_are_split_by_shape_alone() -> None:
    assert splits(FEW) == 5 and splits(replace(FEW, seqlen_k=32768)) == 128
    assert splits(replace(FEW, seqlen_k=500)) == 1
    assert splits(replace(HEAD, batch=40)) == 1
