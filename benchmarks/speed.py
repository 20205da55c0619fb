"""Rates of attention, forward and backward, beside what a user would call instead: `bench.py cpu`, `fwd` and `bwd`.

Every cell has the same number of tokens, so every cell takes the same memory and short sequences mean many of them.

A weaker tier meets torch on its own terms with FLASH_ATTN_C_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 in the environment, and
MKL_ENABLE_INSTRUCTIONS=AVX2 for the matrix products that torch takes from MKL.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from flash_attn_c import attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import decode
from report import draw_rates, geometric_mean, print_table, save_json
from timing import Matmul, attention_flops, describe, fastest_matmul, in_graph, interleaved_medians, machine

GRAPH_CALLS = 8  # of one graph with --graph

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return attention(q, k, v, causal=causal)


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def torch_backend(backend: SDPBackend):
    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return torch_sdpa(q, k, v, causal)

    return run


CPU_RIVALS = {"ours": ours, "torch": torch_sdpa}
GPU_RIVALS = {
    "ours": ours,
    "cuDNN": torch_backend(SDPBackend.CUDNN_ATTENTION),
    "FA2": torch_backend(SDPBackend.FLASH_ATTENTION),
    "efficient": torch_backend(SDPBackend.EFFICIENT_ATTENTION),
}


def candidates(rivals: dict, shape: tuple[int, ...], dtype: torch.dtype, device: str, causal: bool, backward: bool) -> dict:
    """rival -> a call to time. One that refuses these inputs is left out."""
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_(backward) for _ in range(3))
    calls = {}
    for name, run in rivals.items():
        try:
            out = run(q, k, v, causal)
            if backward:
                dout = torch.randn_like(out)  # with out's strides, as a model's next layer hands it back
                calls[name] = lambda out=out, dout=dout: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
                if device == "cuda":
                    calls[name]()  # some refuse only here
            else:
                calls[name] = lambda run=run: run(q, k, v, causal)
        except (RuntimeError, NotImplementedError) as refusal:
            if name == "ours":
                raise
            tqdm.write(f"{name} does not run this: {str(refusal).splitlines()[0][:90]}")
            calls.pop(name, None)
    return calls


def measure(cell: tuple, rivals: dict, matmul: Matmul, options: argparse.Namespace, unit: float) -> dict:
    """One row of results: the rate of every rival, and of a matrix product in the same rounds, in multiples of `unit` FLOP/s."""
    direction, dtype, dim, mask, seqlen = cell
    causal, backward = mask == "causal", direction == "backward"
    sequences = max(1, options.tokens // seqlen)
    heads = max(1, options.width // dim)
    calls = candidates(rivals, (sequences, seqlen, heads, dim), DTYPES[dtype], options.device, causal, backward)
    times = GRAPH_CALLS if options.graph else 1
    if options.graph:
        calls = {name: in_graph(call, times) for name, call in calls.items()}
    seconds = interleaved_medians({**calls, "matmul": matmul.call}, options.device, options.rounds)
    flops = dict.fromkeys(calls, times * attention_flops(sequences, heads, seqlen, dim, causal, backward)) | {"matmul": matmul.flops}
    rates = {name: flops[name] / s / unit for name, s in seconds.items()}
    rival = next((name for name in rivals if name != "ours" and name in rates), None)
    return dict(
        direction=direction, dtype=dtype, dim=dim, mask=mask, seqlen=seqlen, batch=sequences, heads=heads, **rates, rival=rival,
        ratio=rates["ours"] / rates[rival] if rival else None, matmul_share=rates["ours"] / rates["matmul"],
    )  # fmt: skip


def run(name: str, options: argparse.Namespace, rivals: dict, directions: list[str], unit: float, unit_name: str, matmul_size: int) -> None:
    torch.manual_seed(0)
    facts = machine(options.device)
    print(describe(facts))
    # A CPU without 16-bit products worth the name converts and multiplies in float32: then that is the limit.
    products = {dtype: fastest_matmul({DTYPES[dtype], torch.float32}, options.device, matmul_size) for dtype in options.dtypes}
    cells = list(itertools.product(directions, options.dtypes, options.dims, options.masks, options.seqlens))
    rows = [measure(cell, rivals, products[cell[1]], options, unit) for cell in tqdm(cells, desc=f"bench {name}", unit="cell")]

    columns = ["direction", "dtype", "dim", "mask", "seqlen", *rivals, "ratio", "matmul_share"]
    titles = [f"{c} {unit_name}" if c in rivals else {"matmul_share": "share of matmul"}.get(c, c) for c in columns]
    print_table(titles, [[row.get(c) for c in columns] for row in rows])
    print_means(rows)
    paths = [save_json(options.out, name, facts, rows, unit=unit_name)]
    paths.append(draw_rates(options.out, name, f"Attention on {describe(facts)}", rows, list(rivals), unit_name))
    print("wrote", *paths)


def print_means(rows: list[dict]) -> None:
    print("\nGeometric mean of the ratio over the first rival, its worst cell, and our best share of the matrix product:")
    groups = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for direction, mask in dict.fromkeys((row["direction"], row["mask"]) for row in rows):
            here = [row for row in rows if (row["dtype"], row["direction"], row["mask"]) == (dtype, direction, mask)]
            ratios = [row["ratio"] for row in here if row["ratio"]]
            if ratios:
                best = max(row["matmul_share"] for row in here)
                groups.append([dtype, direction, mask, geometric_mean(ratios), min(ratios), best])
    print_table(["dtype", "direction", "mask", "mean ratio", "worst ratio", "best share"], groups)


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    on_gpu = device == "cuda"
    parser.set_defaults(device=device, graph=False)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"] if on_gpu else list(DTYPES))
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256] if on_gpu else [64, 128])
    parser.add_argument("--masks", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[2**n for n in range(9, 15)] if on_gpu else [512, 2048])
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 8192, help="tokens of a cell: batch x seqlen")
    parser.add_argument("--width", type=int, default=2048 if on_gpu else 256, help="heads x head dim")
    parser.add_argument("--rounds", type=int, default=7 if on_gpu else 3)
    parser.add_argument("--quick", action="store_true", help="a few cells, few rounds")
    if not on_gpu:
        parser.add_argument("--full", action="store_true", help="lengths 512 to 8192: minutes, many where torch is slow")


def add_forward_options(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "cuda")
    parser.add_argument("--graph", action="store_true", help=f"{GRAPH_CALLS} calls as a CUDA graph, into fwd_graph.json")


def shorten(options: argparse.Namespace) -> None:
    if options.quick:
        options.seqlens, options.dims, options.rounds = options.seqlens[:2], options.dims[:1], 3


def cpu(options: argparse.Namespace) -> None:
    if options.full:
        options.seqlens = [2**n for n in range(9, 14)]
    shorten(options)
    run("cpu", options, CPU_RIVALS, ["forward", "backward"], 1e9, "GFLOP/s", 2048)
    decode.run(options, machine(options.device))


def gpu_forward(options: argparse.Namespace) -> None:
    shorten(options)
    run("fwd_graph" if options.graph else "fwd", options, GPU_RIVALS, ["forward"], 1e12, "TFLOP/s", 8192)


def gpu_backward(options: argparse.Namespace) -> None:
    shorten(options)
    run("bwd", options, GPU_RIVALS, ["backward"], 1e12, "TFLOP/s", 8192)
