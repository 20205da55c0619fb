"""The 36 rows that the Hopper forward kernel is judged by, beside cuDNN in one process: python benchmarks/fwd_gpu.py [--help]

The best peer of a row is cuDNN times a factor that was measured once on an H200, over cuDNN, FlashAttention-2 and FlashAttention-3:
absolute rates drift from machine to machine, ratios within a run do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import speed
from report import draw_rates, geometric_mean, print_table, save_json
from timing import attention_flops, describe, interleaved_medians, machine

TOKENS, WIDTH = 16384, 2048  # batch x seqlen, heads x dim
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)

# (dim, mask) -> best peer over cuDNN at each of SEQLENS
BEST_PEER = {
    (64, "full"): (1.00, 1.00, 1.03, 1.08, 1.21, 1.11),
    (64, "causal"): (1.00, 1.00, 1.01, 1.11, 1.15, 1.23),
    (128, "full"): (1.00, 1.03, 1.00, 1.10, 1.12, 1.14),
    (128, "causal"): (1.00, 1.11, 1.17, 1.28, 1.27, 1.12),
    (256, "full"): (1.00, 1.02, 1.08, 1.17, 1.07, 1.12),
    (256, "causal"): (1.00, 1.05, 1.09, 1.16, 1.24, 1.27),
}
RIVALS = {name: speed.GPU_RIVALS[name] for name in ("ours", "cuDNN")}
COLUMNS = ("dim", "mask", "seqlen", "ours", "cuDNN", "over cuDNN", "over best peer")


def measure_row(dim: int, mask: str, seqlen: int, best_peer: float, options: argparse.Namespace) -> dict:
    batch, heads, causal = TOKENS // seqlen, WIDTH // dim, mask == "causal"
    calls = speed.candidates(RIVALS, (batch, seqlen, heads, dim), speed.DTYPES[options.dtype], "cuda", causal, False)
    seconds = interleaved_medians(calls, "cuda", options.rounds)
    flops = attention_flops(batch, heads, seqlen, dim, causal, False)
    row = dict(direction="forward", dtype=options.dtype, dim=dim, mask=mask, seqlen=seqlen, batch=batch, heads=heads)
    ratio = seconds["cuDNN"] / seconds["ours"]
    return {**row, **{name: flops / s / 1e12 for name, s in seconds.items()}, "over cuDNN": ratio, "over best peer": ratio / best_peer}


def print_means(rows: list[dict]) -> None:
    for column in ("over cuDNN", "over best peer"):
        values = [row[column] for row in rows]
        reached = sum(value >= 1 for value in values)
        mean = geometric_mean(values)
        print(f"{column}: geometric mean {mean:.3f}, worst {min(values):.2f}, at least 1 in {reached} of {len(values)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON and the picture")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("fwd_gpu.py needs a GPU that torch can see")
    torch.manual_seed(0)
    facts = machine("cuda")
    print(describe(facts))
    cells = [(*group, *cell) for group, factors in BEST_PEER.items() for cell in zip(SEQLENS, factors, strict=True)]
    rows = [measure_row(*cell, options) for cell in tqdm(cells, desc="forward", unit="row")]
    print_table(list(COLUMNS), [[row[column] for column in COLUMNS] for row in rows])
    print_means(rows)
    print("wrote", save_json(options.out, "fwd_sm90", facts, rows, unit="TFLOP/s"))
    print("wrote", draw_rates(options.out, "fwd_sm90", f"Forward on {describe(facts)}", rows, list(RIVALS), "TFLOP/s"))


if __name__ == "__main__":
    main()
