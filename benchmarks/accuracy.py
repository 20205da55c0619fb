"""The worst error of the whole case list, as a multiple of the error of the unfused formula in the same dtype.

The promise (docs/semantics.md): at most 2 for out, 3 for each gradient. Errors below the floor count as the floor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from report import print_table, save_json
from timing import describe, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

FLOORS = {"float64": 1e-11}
FLOOR = 1e-5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the reduced list that the tests run on every CPU tier")


def ratios(case, device: str) -> dict[str, float]:
    """tensor -> error over the unfused error, for one case."""
    import binding
    import reference
    from cases import build

    dtype = getattr(torch, case.dtype)
    host = build(case)
    ref_out, _, ref = reference.attention_with_gradients(host, host["dout"], host["dlse"])
    pt_out, _, pt = reference.attention_with_gradients(host, host["dout"], host["dlse"], dtype)
    call = build(case, device)
    out, lse = binding.forward(call)
    got = binding.backward(call, out, lse)
    triples = {"out": (out, ref_out, pt_out), **{f"d{name}": (got[name], ref[name], pt[name]) for name in got}}
    floor = FLOORS.get(case.dtype, FLOOR)
    return {name: reference.worst_error(x.cpu(), r) / max(reference.worst_error(p, r), floor) for name, (x, r, p) in triples.items()}


def run(options: argparse.Namespace) -> None:
    from cases import CASES, DTYPES, SMOKE

    facts = machine(options.device)
    print(describe(facts))
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    cases = SMOKE if options.quick else CASES
    for case in tqdm(cases, desc="bench accuracy", unit="case"):
        for name, ratio in ratios(case, options.device).items():
            worst[case.dtype, name] = max(worst.get((case.dtype, name), (0.0, "")), (ratio, str(case)))
    names = list(dict.fromkeys(name for _, name in worst))
    print(f"\nWorst error over {len(cases)} cases, as a multiple of the unfused formula's:")
    print_table(["dtype", *names], [[dtype, *(worst.get((dtype, name), (None,))[0] for name in names)] for dtype in DTYPES])
    rows = [{"dtype": dtype, "tensor": name, "ratio": ratio, "case": case} for (dtype, name), (ratio, case) in worst.items()]
    path = save_json(options.out, "accuracy" if options.device == "cpu" else "accuracy_gpu", facts, rows, cases=len(cases))
    print("wrote", path)
