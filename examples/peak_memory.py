"""Peak memory of one forward and backward pass of attention at rising sequence lengths: ours, torch's, and the unfused formula.

    python examples/peak_memory.py --attention unfused --seqlens 1024 2048 4096

One process measures one kind of attention: on a CPU the peak of a process never falls, so lengths are taken in rising order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train_gpt import attend_with_ours, attend_with_torch, peak_bytes, resident_bytes

HEADS, DIM = 2, 64
SEQLENS = (1024, 2048, 4096, 8192, 16384)
UNFUSED_LIMIT = 8192  # of the formula that stores the scores: 4 bytes x heads x seqlen^2, several times over


def attend_unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


ATTENTION = {"ours": attend_with_ours, "torch": attend_with_torch, "unfused": attend_unfused}


def run_once(attend, seqlen: int, device: str) -> None:
    q, k, v = (torch.randn(1, seqlen, HEADS, DIM, device=device, requires_grad=True) for _ in range(3))
    attend(q, k, v).sum().backward()


def measure(kind: str, seqlens: list[int], device: str) -> list[dict]:
    attend = ATTENTION[kind]
    run_once(attend, 16, device)  # thread stacks and libraries are no part of the question
    before = resident_bytes() if device == "cpu" else 0
    rows = []
    for seqlen in tqdm(seqlens, desc=f"memory of {kind:<8}", unit="seqlen"):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run_once(attend, seqlen, device)
        rows.append({"attention": kind, "seqlen": seqlen, "peak_bytes": peak_bytes(device) - before})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", choices=sorted(ATTENTION), default="ours")
    parser.add_argument("--seqlens", type=int, nargs="+", help=f"default: {SEQLENS}, unfused up to {UNFUSED_LIMIT}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    longest = UNFUSED_LIMIT if options.attention == "unfused" else max(SEQLENS)
    rows = measure(options.attention, sorted(options.seqlens or [s for s in SEQLENS if s <= longest]), options.device)
    if options.json:
        options.json.write_text(json.dumps(rows))
    for row in rows:
        print(f"attention = {row['attention']}, seqlen {row['seqlen']:6d}: {row['peak_bytes'] / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
