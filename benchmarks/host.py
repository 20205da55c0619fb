"""What one call costs before any work: attention on tensors so small that nothing but the call itself is left."""

from __future__ import annotations

import argparse

import flash_attn_c
import torch
import torch.nn.functional as F
from tqdm import tqdm

from report import print_table, save_json
from timing import describe, interleaved_medians, machine

SHAPE = (1, 4, 1, 8)  # batch, seqlen, heads, dim


def calls(device: str, grad: bool, backward: bool) -> dict:
    """name -> one call; with `backward`, of a forward and a backward pass."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(SHAPE, device=device, dtype=dtype, requires_grad=grad) for _ in range(3))
    qt, kt, vt = (t.detach().transpose(1, 2).contiguous().requires_grad_(grad) for t in (q, k, v))
    forwards = {
        "attention": (lambda: flash_attn_c.attention(q, k, v), (q, k, v)),
        "flash_attn_func": (lambda: flash_attn_c.flash_attn_func(q, k, v), (q, k, v)),
        "scaled_dot_product_attention": (lambda: flash_attn_c.scaled_dot_product_attention(qt, kt, vt), (qt, kt, vt)),
        "torch's own": (lambda: F.scaled_dot_product_attention(qt, kt, vt), (qt, kt, vt)),
    }
    if not backward:
        return {name: call for name, (call, _) in forwards.items()}
    ones = {name: torch.ones_like(call()) for name, (call, _) in forwards.items()}
    return {name: lambda c=c, i=i, d=ones[name]: torch.autograd.grad(c(), i, d) for name, (c, i) in forwards.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=21)


def run(options: argparse.Namespace) -> None:
    facts = machine(options.device)
    print(describe(facts))
    kinds = {"no grad": (False, False), "with grad": (True, False), "with grad, and backward": (True, True)}
    rows = []
    for kind, (grad, backward) in tqdm(kinds.items(), desc="bench host", unit="kind"):
        # The time to hand a call over, not to finish it. On a GPU at most some hundred calls: as many launches as its queue holds.
        clock, at_least = ("launch", 0.002) if options.device == "cuda" else ("cpu", 0.01)
        seconds = interleaved_medians(calls(options.device, grad, backward), clock, options.rounds, at_least)
        rows += [{"call": name, "kind": kind, "microseconds": 1e6 * s} for name, s in seconds.items()]
    names = list(dict.fromkeys(row["call"] for row in rows))
    table = {(row["call"], row["kind"]): row["microseconds"] for row in rows}
    print(f"\nMicroseconds a call, median of {options.rounds} rounds, tensors of {SHAPE}:")
    print_table(["call", *kinds], [[name, *(table[name, kind] for kind in kinds)] for name in names])
    path = save_json(options.out, "host" if options.device == "cpu" else "host_gpu", facts, rows)
    print("wrote", path)
