"""The section "Measured" of README.md, made from the files in results/ alone, so that no figure is typed by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from report import geometric_mean

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- measured: begin, made by `bench.py readme` -->\n", "<!-- measured: end -->\n"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def where(facts: dict) -> str:
    machine = facts.get("gpu") or f"{facts['cores']} cores of an {facts['cpu']}, tier {facts['cpu_tier']}, {facts['threads']} threads"
    return f"{machine}, torch {facts['torch'].split('+')[0]}, {facts['date']}"


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def span(values: list[float]) -> str:
    return number(min(values)) if min(values) == max(values) else f"{number(min(values))} to {number(max(values))}"


def rates(result: dict, title: str) -> str:
    """One line a dtype and direction: our rates, and the ratio over the first rival as geometric mean with its worst cell."""
    rows, rival = result["rows"], next(row["rival"] for row in result["rows"] if row["rival"])
    lines = []
    for dtype, direction, mask in dict.fromkeys((row["dtype"], row["direction"], row["mask"]) for row in rows):
        here = [row for row in rows if (row["dtype"], row["direction"], row["mask"]) == (dtype, direction, mask)]
        ratios = [row["ratio"] for row in here if row["ratio"]]
        best = max(row["matmul_share"] for row in here)
        ours = span([row["ours"] for row in here])
        lines.append([f"{dtype} {direction}, {mask}", ours, f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", f"{best:.0%}"])
    sizes = f"head dims {listed(rows, 'dim')}, sequence lengths {listed(rows, 'seqlen')}"
    head = ["", f"ours, {result['unit']}", f"over {rival}: mean", "worst cell", "best share of matmul"]
    return f"**{title}**: {sizes}; {where(result['machine'])}.\n\n{markdown_table(head, lines)}\n"


def listed(rows: list[dict], field: str) -> str:
    values = sorted({row[field] for row in rows})
    return f"{values[0]:,} to {values[-1]:,}" if len(values) > 3 else ", ".join(f"{v:,}" for v in values)


def host(result: dict, title: str) -> str:
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))
    cost = {(row["call"], row["kind"]): row["microseconds"] for row in result["rows"]}
    names = list(dict.fromkeys(call for call, _ in cost))
    lines = [[name, *(f"{cost[name, kind]:.1f}" for kind in kinds)] for name in names]
    return f"**{title}**, microseconds on tiny tensors; {where(result['machine'])}.\n\n{markdown_table(['', *kinds], lines)}\n"


def one_query(result: dict, title: str) -> str:
    names = [name for name in ("ours", "torch", "copy", "read") if name in result["rows"][0]]
    columns = {name: f"{name}, GB/s" for name in names}
    lines = [
        [f"{row['dtype']}, head dim {row['dim']}, {row['seqlen']:,} keys", *(f"{row[c]:.3g}" for c in columns), f"{row['ratio']:.2f}"]
        for row in result["rows"]
    ]
    claim = f"one query, every byte of the keys and values counted once (a copy: read and written); {where(result['machine'])}"
    return f"**{title}**: {claim}.\n\n{markdown_table(['', *columns.values(), 'over torch'], lines)}\n"


def accuracy(result: dict, title: str) -> str:
    worst = {(row["dtype"], row["tensor"]): row["ratio"] for row in result["rows"]}
    names = list(dict.fromkeys(row["tensor"] for row in result["rows"]))
    dtypes = [dtype for dtype in ("float32", "bfloat16", "float16", "float64") if (dtype, "out") in worst]
    lines = [[dtype, *(f"{worst[dtype, name]:.2f}" if (dtype, name) in worst else "-" for name in names)] for dtype in dtypes]
    claim = f"worst of {result['cases']} cases, as a multiple of the error of the unfused formula in the same dtype"
    promise = "promised: 2 for out and 3 for gradients, plus an absolute 1e-5, which can show here as 1 more"
    return f"**{title}**: {claim} ({promise}).\n\n{markdown_table(['', *names], lines)}\n"


# result file -> how it is shown, and its title
SECTIONS = {
    "cpu": (rates, "Speed on a CPU"),
    "cpu_amx": (rates, "Speed on a CPU with AMX"),
    "decode": (one_query, "One query on a CPU"),
    "decode_amx": (one_query, "One query on a CPU with AMX"),
    "fwd": (rates, "Forward on a GPU"),
    "bwd": (rates, "Backward on a GPU"),
    "host": (host, "Cost of a call on a CPU"),
    "host_gpu": (host, "Cost of a call on a GPU"),
    "accuracy": (accuracy, "Error on a CPU"),
    "accuracy_gpu": (accuracy, "Error on a GPU"),
}


def measured(folder: Path) -> str:
    results = {name: folder / f"{name}.json" for name in SECTIONS}
    return "".join(
        show(json.loads(results[name].read_text(encoding="utf-8")), title)
        for name, (show, title) in SECTIONS.items()
        if results[name].exists()
    )


def run(options: argparse.Namespace) -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + measured(options.out) + END + after, encoding="utf-8")
    print("wrote", README.name)
