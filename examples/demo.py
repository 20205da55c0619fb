"""Train the same small GPT with torch's attention and with ours, measure memory at rising lengths, and draw demo.png.

Each run is a process of its own, so that its peak memory is its own. Called by `make demo`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"ours": "tab:blue", "torch": "tab:orange", "unfused": "tab:red"}
NAMES = {"ours": "flash_attn_c", "torch": "torch SDPA", "unfused": "unfused formula"}


def run_example(script: str, *arguments: str) -> list | dict:
    """Run an example and return what it wrote as JSON. Its progress bar goes to this terminal, its summary is left out."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / script), *arguments, "--json", str(result)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{script} {' '.join(arguments)} failed with exit code {done.returncode}\n{done.stdout}")
        return json.loads(result.read_text())


def print_table(runs: dict[str, dict]) -> None:
    rows = [
        ("training loss, last tenth", "nats/char", "training_loss", "{:,.4f}", 1),
        ("validation loss", "nats/char", "validation_loss", "{:,.4f}", 1),
        ("speed", "tokens/s", "tokens_per_second", "{:,.0f}", 1),
        ("peak memory", "MiB", "peak_bytes", "{:,.0f}", 2**20),
    ]
    print(f"\n{'':<28}{'unit':<12}" + "".join(f"{NAMES[kind]:>16}" for kind in runs))
    for title, unit, field, form, divisor in rows:
        print(f"{title:<28}{unit:<12}" + "".join(f"{form.format(run[field] / divisor):>16}" for run in runs.values()))


def draw(runs: dict[str, dict], memory: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    styles = {"torch": dict(linewidth=3.5, alpha=0.5), "ours": dict(linewidth=1.2)}
    for kind, run in runs.items():
        tokens = [run["tokens_per_step"] * (n + 1) / 1000 for n in range(len(run["losses"]))]
        left.plot(tokens, run["losses"], color=COLOURS[kind], label=NAMES[kind], **styles[kind])
    left.set(xlabel="characters seen (thousands)", ylabel="training loss (nats per character)", title="Same seed, same batches")

    for kind in COLOURS:
        points = [(row["seqlen"], row["peak_bytes"] / 2**20) for row in memory if row["attention"] == kind]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", color=COLOURS[kind], label=NAMES[kind])
    seqlens = sorted({row["seqlen"] for row in memory})
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
    right.set(xlabel="sequence length (tokens)", ylabel="peak memory (MiB)", title="Forward and backward, 2 heads of 64, fp32, causal")
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", help="training steps of each run")
    parser.add_argument("--seqlens", nargs="+", help="sequence lengths of the memory curves")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    options = parser.parse_args()
    steps = ["--steps", options.steps] if options.steps else []
    seqlens = ["--seqlens", *options.seqlens] if options.seqlens else []

    runs = {kind: run_example("train_gpt.py", "--attention", kind, *steps) for kind in ("torch", "ours")}
    memory = [row for kind in COLOURS for row in run_example("peak_memory.py", "--attention", kind, *seqlens)]
    print_table(runs)
    difference = max(abs(a - b) for a, b in zip(runs["torch"]["losses"], runs["ours"]["losses"], strict=True))
    print(f"\nlargest difference between the two loss curves: {difference:.1e}")
    draw(runs, memory, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
