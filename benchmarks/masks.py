"""Forward rates where not every pair of query and key is visible, or sequences differ in length: `bench.py masks`.

FLOPs count the visible pairs alone, so a rate equal to that of full attention is what skipping the rest should reach. `share` is our rate
over our own rate without a mask, at the same head dim and in the same rounds.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
from flash_attn_c import attention
from torch import Tensor
from tqdm import tqdm

from report import print_table, save_json
from timing import describe, interleaved_medians, machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WINDOW, BLOCK, DENSITIES = 1024, 128, (0.5, 0.25, 0.1)
SHORTEST, LONGEST, TOKENS = 64, 8192, 65536


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def pairs_of_window(seqlen: int) -> int:
    return sum(min(row, WINDOW) + 1 for row in range(seqlen))


def packed_lengths() -> list[int]:
    """Lengths drawn log-uniformly until they fill TOKENS."""
    lengths: list[int] = []
    generator = torch.Generator().manual_seed(0)
    while (left := TOKENS - sum(lengths)) > 0:
        drawn = SHORTEST * (LONGEST / SHORTEST) ** torch.rand((), generator=generator).item()
        lengths.append(min(left, round(drawn)))
    return lengths


def packed(dim: int, heads: int, dtype: torch.dtype) -> tuple[partial, float]:
    lengths = packed_lengths()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    q, k, v = (normal(TOKENS, heads, dim, dtype=dtype) for _ in range(3))
    call = partial(attention, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths))
    return call, heads * sum(length**2 for length in lengths)


def cases(dim: int, options: argparse.Namespace) -> dict[str, tuple[partial, float]]:
    """name -> a call, and the pairs that it computes."""
    seqlen, heads, dtype = options.seqlen, max(1, options.width // dim), DTYPES[options.dtype]
    q, k, v = (normal(1, seqlen, heads, dim, dtype=dtype) for _ in range(3))
    shared = [t[:, :, : max(1, heads // 8)] for t in (k, v)]
    blocks = math.ceil(seqlen / BLOCK)
    found = {
        "full": (partial(attention, q, k, v), heads * seqlen**2),
        "causal": (partial(attention, q, k, v, causal=True), heads * seqlen * (seqlen + 1) / 2),
        f"window {WINDOW}": (partial(attention, q, k, v, causal=True, window=(WINDOW, None)), heads * pairs_of_window(seqlen)),
        "8 heads share keys": (partial(attention, q, *shared), heads * seqlen**2),
        f"packed {SHORTEST}-{LONGEST}": packed(dim, heads, dtype),
    }
    for density in DENSITIES:
        mask = torch.rand(1, 1, blocks, blocks, device="cuda") < density
        call = partial(attention, q, k, v, block_mask=mask)
        found[f"blocks {mask.float().mean().item():.2f}"] = (call, heads * mask.sum().item() * BLOCK**2)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--width", type=int, default=2048, help="heads x head dim")
    parser.add_argument("--rounds", type=int, default=7)


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    facts = machine("cuda")
    print(describe(facts))
    rows = []
    for dim in tqdm(options.dims, desc="bench masks", unit="dim"):
        found = cases(dim, options)
        seconds = interleaved_medians({name: call for name, (call, _) in found.items()}, "cuda", options.rounds)
        rates = {name: 4 * dim * pairs / seconds[name] / 1e12 for name, (_, pairs) in found.items()}
        rows += [dict(dim=dim, dtype=options.dtype, case=name, rate=rate, share=rate / rates["full"]) for name, rate in rates.items()]
    print_table(["dim", "case", "TFLOP/s", "share of full"], [[row[c] for c in ("dim", "case", "rate", "share")] for row in rows])
    print("wrote", save_json(options.out, "masks", facts, rows, unit="TFLOP/s"))
