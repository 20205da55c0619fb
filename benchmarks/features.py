"""Forward rates with a bias, a mask or dropout, and of few query rows against many keys, as in text generation: `bench.py features`.

Rivals are the backends of torch's scaled_dot_product_attention; one that refuses is left out. FLOPs count the causal half where there is
one. Few query rows are limited by memory: their rate counts every byte of the keys and values once, beside that of a copy, which counts
what it reads and what it writes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from flash_attn_c import attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from report import cell, print_table, save_json
from timing import attention_flops, describe, interleaved_medians, machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RIVALS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
DROPOUT, KEPT = 0.1, 0.9
# batch, heads_q, heads_k, seqlen_q, seqlen_k
SERVING = [
    (1, 32, 8, 1, 4096),
    (1, 32, 8, 1, 32768),
    (1, 32, 4, 1, 65536),
    (8, 32, 8, 1, 8192),
    (16, 32, 8, 1, 8192),
    (20, 32, 8, 1, 8192),
    (64, 32, 8, 1, 4096),
    (4, 32, 32, 1, 8192),
    (8, 32, 8, 8, 8192),
    (1, 1, 1, 128, 65536),
]
GRAPH_CALLS = 4
AT_LEAST = 0.015  # seconds a round
FEATURE_COLUMNS = ["dim", "seqlen", "feature", "ours", *RIVALS]
SERVING_COLUMNS = ["dim", "batch", "heads_q", "heads_k", "seqlen_q", "seqlen_k", "microseconds", "ours", *RIVALS, "copy", "copy_share"]


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def visible(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") < KEPT


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)


def ones_that_run(calls: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Without the rivals that refuse these inputs."""
    found = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch tells each reason of each backend; a dash in the table says it
                call()
        except RuntimeError:
            if name == "ours":
                raise
        else:
            found[name] = call
    return found


def feature_calls(dim: int, seqlen: int, options: argparse.Namespace) -> dict[str, tuple[dict, bool]]:
    """feature -> calls, and whether they are causal."""
    batch, heads, dtype = max(1, options.tokens // seqlen), max(1, options.width // dim), DTYPES[options.dtype]
    q, k, v = (normal(batch, seqlen, heads, dim, dtype=dtype) for _ in range(3))
    bias, bias_keys = normal(1, heads, seqlen, seqlen, dtype=dtype), normal(batch, 1, 1, seqlen, dtype=dtype)
    mask, mask_keys = visible(batch, 1, seqlen, seqlen), visible(batch, 1, 1, seqlen)
    asked = {
        "none": ({}, {}),
        "bias 1,h,s,s": ({"bias": bias}, {"attn_mask": bias}),
        "bias b,1,1,s": ({"bias": bias_keys}, {"attn_mask": bias_keys}),
        "mask b,1,s,s": ({"mask": mask}, {"attn_mask": mask}),
        "mask b,1,1,s": ({"mask": mask_keys}, {"attn_mask": mask_keys}),
        f"dropout {DROPOUT}": ({"dropout_p": DROPOUT}, {"dropout_p": DROPOUT}),
        f"causal, dropout {DROPOUT}": ({"dropout_p": DROPOUT, "causal": True}, {"dropout_p": DROPOUT, "is_causal": True}),
    }
    return {
        name: (
            {"ours": partial(attention, q, k, v, **ours)} | {r: partial(sdpa, backend, q, k, v, **theirs) for r, backend in RIVALS.items()},
            "causal" in name,
        )
        for name, (ours, theirs) in asked.items()
    }


def measure_features(dim: int, seqlen: int, options: argparse.Namespace) -> Iterator[dict]:
    for name, (calls, causal) in feature_calls(dim, seqlen, options).items():
        seconds = interleaved_medians(ones_that_run(calls), "cuda", options.rounds, AT_LEAST)
        flops = attention_flops(max(1, options.tokens // seqlen), max(1, options.width // dim), seqlen, dim, causal, False)
        rates = {rival: flops / s / 1e12 for rival, s in seconds.items()}
        yield dict(part="features", dtype=options.dtype, dim=dim, seqlen=seqlen, feature=name, **rates)


def graphed(call: Callable[[], Tensor]) -> Callable[[], None]:
    """GRAPH_CALLS of them in a graph, as a server replays them: these calls are shorter than what Python needs for one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def measure_serving(dim: int, shape: tuple[int, ...], options: argparse.Namespace) -> dict:
    batch, heads_q, heads_k, seqlen_q, seqlen_k = shape
    dtype = DTYPES[options.dtype]
    q = normal(batch, seqlen_q, heads_q, dim, dtype=dtype)
    k, v = (normal(batch, seqlen_k, heads_k, dim, dtype=dtype) for _ in range(2))
    source = torch.cat([k, v])
    target = torch.empty_like(source)
    calls = {"ours": partial(attention, q, k, v, causal=True)}
    if seqlen_q == 1:  # torch's causal mask starts at the top left
        calls |= {rival: partial(sdpa, backend, q, k, v, enable_gqa=heads_q != heads_k) for rival, backend in RIVALS.items()}
    calls = ones_that_run(calls) | {"copy": lambda: target.copy_(source)}
    seconds = interleaved_medians({name: graphed(call) for name, call in calls.items()}, "cuda", options.rounds, AT_LEAST)
    moved = source.numel() * source.element_size() * GRAPH_CALLS
    rates = {name: (2 if name == "copy" else 1) * moved / s / 1e9 for name, s in seconds.items()}
    sizes = dict(zip(("batch", "heads_q", "heads_k", "seqlen_q", "seqlen_k"), shape, strict=True))
    microseconds, share = seconds["ours"] / GRAPH_CALLS * 1e6, rates["ours"] / rates["copy"]
    return dict(part="serving", dtype=options.dtype, dim=dim, **sizes, microseconds=microseconds, **rates, copy_share=share)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seqlens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a cell: batch x seqlen")
    parser.add_argument("--width", type=int, default=2048, help="heads x head dim")
    parser.add_argument("--rounds", type=int, default=5)


def measured(options: argparse.Namespace) -> Iterator[dict]:
    for dim in options.dims:
        for seqlen in options.seqlens:
            yield from measure_features(dim, seqlen, options)
        for shape in SERVING:
            yield measure_serving(dim, shape, options)


def run(options: argparse.Namespace) -> None:
    """Every row is printed and saved as soon as it is known, so that a run that is cut short leaves what it has measured."""
    torch.manual_seed(0)
    facts = machine("cuda")
    print(describe(facts))
    rows: list[dict] = []
    for row in measured(options):
        rows.append(row)
        columns = FEATURE_COLUMNS if row["part"] == "features" else SERVING_COLUMNS
        print("  ".join(f"{column} {cell(row.get(column))}" for column in columns), flush=True)
        path = save_json(options.out, "features", facts, rows, units={"features": "TFLOP/s", "serving": "GB/s"})
    print("\nTFLOP/s:")
    print_table(FEATURE_COLUMNS, [[row.get(c) for c in FEATURE_COLUMNS] for row in rows if row["part"] == "features"])
    print("\nFew query rows, GB/s of keys and values:")
    print_table(SERVING_COLUMNS, [[row.get(c) for c in SERVING_COLUMNS] for row in rows if row["part"] == "serving"])
    print("wrote", path)
