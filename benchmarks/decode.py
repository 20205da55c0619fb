"""One query against a long cache of keys, as in text generation: the speed of memory decides. Part of `bench.py cpu`."""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from flash_attn_c import attention
from torch import Tensor
from tqdm import tqdm

from report import print_table, save_json
from timing import interleaved_medians

HEADS_Q, HEADS_K = 32, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)


def measure(dtype: str, dim: int, seqlen: int, rounds: int) -> dict:
    """Rates count every byte of the cache once, as a sum of it reads them; those of a copy count what it reads and what it writes."""
    q = torch.randn(1, 1, HEADS_Q, dim).to(DTYPES[dtype])
    k, v = (torch.randn(1, seqlen, HEADS_K, dim).to(DTYPES[dtype]) for _ in range(2))
    source = torch.cat([k, v])
    target, words = torch.empty_like(source), source.view(torch.int32)
    calls = {
        "ours": lambda: attention(q, k, v),
        "torch": lambda: torch_sdpa(q, k, v),
        "copy": lambda: target.copy_(source),
        "read": words.max,
    }
    with torch.no_grad():
        seconds = interleaved_medians(calls, "cpu", rounds)
    moved = source.numel() * source.element_size()
    rates = {name: (2 if name == "copy" else 1) * moved / s / 1e9 for name, s in seconds.items()}
    ratio = seconds["torch"] / seconds["ours"]
    return dict(dtype=dtype, dim=dim, seqlen=seqlen, microseconds=seconds["ours"] * 1e6, **rates, rival="torch", ratio=ratio,
                copy_share=rates["ours"] / rates["copy"], read_share=rates["ours"] / rates["read"])  # fmt: skip


def run(options: argparse.Namespace, facts: dict) -> None:
    lengths = [4096, 32768] if options.quick or not options.full else [4096, 8192, 16384, 32768]
    cells = list(itertools.product(options.dtypes, options.dims, lengths))
    rows = [measure(*cell, options.rounds) for cell in tqdm(cells, desc="bench cpu, one query", unit="cell")]
    rates = ["ours", "torch", "copy", "read"]
    columns = ["dtype", "dim", "seqlen", "microseconds", *rates, "ratio", "copy_share", "read_share"]
    titles = [f"{c} GB/s" if c in rates else c.replace("_share", " share") for c in columns]
    print(f"\nOne query, {HEADS_Q} query heads on {HEADS_K} key heads:")
    print_table(titles, [[row[c] for c in columns] for row in rows])
    print("wrote", save_json(options.out, "decode", facts, rows, unit="GB/s"))
