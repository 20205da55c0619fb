"""What each technique of the Hopper forward kernel is worth: the library's own call with one of them off at a time: `bench.py ablation`.

A technique is a constant of the kernel. All variants of a shape are timed in the same rounds, so ratios hold where absolute rates drift.
`worth` is the rate with everything over the rate without the technique.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from flash_attn_c import _C, attention, explain
from torch import Tensor
from tqdm import tqdm

from report import print_table, save_json
from timing import attention_flops, describe, interleaved_medians, machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALL = "everything"

# technique -> the constants of the kernel without it
WITHOUT = {
    "turns": {"PINGPONG": 0},
    "overlap": {"OVERLAP": 0},
    "lazy rescale": {"LAZY_RESCALE": 0},
    "queue": {"QUEUE": 0},
    "store by TMA": {"TMA_STORE": 0},
    "second stage of Q": {"Q_STAGES": 1, "TMA_STORE": 0},  # without it O has no way out by TMA either
}


def techniques_of(constants: dict[str, int], workspace_bytes: int) -> dict[str, dict[str, int]]:
    """Those of WITHOUT that a plan makes use of; the queue's counter is all that such a plan wants workspace for."""
    return {
        name: without
        for name, without in WITHOUT.items()
        if any(constants[constant] != value for constant, value in without.items()) and (name != "queue" or workspace_bytes > 0)
    }


def call_without(constants: dict[str, int], q: Tensor, k: Tensor, v: Tensor, causal: bool):
    def call() -> None:
        _C.override_constants(constants)
        attention(q, k, v, causal=causal)

    return call


def measure(dim: int, causal: bool, seqlen: int, options: argparse.Namespace) -> list[dict]:
    sequences, heads = max(1, options.tokens // seqlen), max(1, options.width // dim)
    q, k, v = (torch.randn(sequences, seqlen, heads, dim, device="cuda", dtype=DTYPES[options.dtype]) for _ in range(3))
    plan = explain(q, k, v, causal=causal)
    if plan.kernel != "fwd_sm90":
        raise SystemExit(f"bench.py ablation is about fwd_sm90; here {plan.kernel} would run")
    try:
        variants = {ALL: {}, **techniques_of(plan.constants, plan.workspace_bytes)}
        calls = {name: call_without(constants, q, k, v, causal) for name, constants in variants.items()}
        seconds = interleaved_medians(calls, "cuda", options.rounds, 0.02)
    finally:
        _C.override_constants({})
    flops = attention_flops(sequences, heads, seqlen, dim, causal, backward=False)
    shape = dict(dtype=options.dtype, dim=dim, mask="causal" if causal else "full", seqlen=seqlen)
    return [
        dict(shape, without=None if name == ALL else name, rate=flops / second / 1e12, worth=second / seconds[ALL])
        for name, second in seconds.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seqlens", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a cell: batch x seqlen")
    parser.add_argument("--width", type=int, default=2048, help="heads x head dim")
    parser.add_argument("--rounds", type=int, default=7)


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    facts = machine("cuda")
    print(describe(facts))
    cells = list(itertools.product(options.dims, (False, True), options.seqlens))
    rows = [row for cell in tqdm(cells, desc="bench ablation", unit="cell") for row in measure(*cell, options)]
    worth = {(row["dim"], row["mask"], row["without"], row["seqlen"]): row["worth"] for row in rows}
    rate = {(row["dim"], row["mask"], row["seqlen"]): row["rate"] for row in rows if row["without"] is None}
    lines = []
    for dim, mask in dict.fromkeys((row["dim"], row["mask"]) for row in rows):
        lines.append([dim, mask, "TFLOP/s with everything", *(round(rate[dim, mask, s]) for s in options.seqlens)])
        for name in WITHOUT:
            if any((dim, mask, name, s) in worth for s in options.seqlens):
                lines.append([dim, mask, name, *(worth.get((dim, mask, name, s)) for s in options.seqlens)])
    print_table(["dim", "mask", "worth of", *map(str, options.seqlens)], lines)
    print("wrote", save_json(options.out, "ablation", facts, rows, unit="TFLOP/s"))
