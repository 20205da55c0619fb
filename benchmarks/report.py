"""What comes out of a benchmark: an aligned table, a JSON file, a picture."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def print_table(columns: list[str], rows: list[list]) -> None:
    """Text to the left, numbers to the right, floats to three significant digits."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(line[n]) for line in [columns, *cells]) for n in range(len(columns))]
    right = [all(not isinstance(row[n], str) for row in rows) for n in range(len(columns))]
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("  ".join(f"{text:>{w}}" if r else f"{text:<{w}}" for text, w, r in zip(line, widths, right, strict=True)).rstrip())


def cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_json(folder: Path, name: str, machine: dict, rows: list[dict], **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    head = json.dumps({"machine": machine, **more}, indent=2)
    path.write_text(f'{head[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    return path


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def draw_rates(folder: Path, name: str, title: str, rows: list[dict], rivals: list[str], unit: str) -> Path:
    """A grid of panels: dtypes down, directions and dims across; in each the rate of every rival over the sequence length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    across = list(dict.fromkeys((row["direction"], row["dim"]) for row in rows))
    size = (3.7 * len(across) + 0.6, 3.0 * len(dtypes) + 1.3)
    figure, panels = plt.subplots(len(dtypes), len(across), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained")
    for line, dtype in zip(panels, dtypes, strict=True):
        line[0].set_ylabel(f"{dtype}\n{unit}")
        for panel, (direction, dim) in zip(line, across, strict=True):
            here = [row for row in rows if (row["dtype"], row["direction"], row["dim"]) == (dtype, direction, dim)]
            draw_panel(panel, here, rivals)
            panel.set_title(f"{direction}, head dim {dim}", fontsize=10)
        rates = [row[name] for row in rows for name in [*rivals, "matmul"] if row["dtype"] == dtype and row.get(name)]
        line[0].set_ylim(0, 1.08 * max(rates))
    for panel in panels[-1]:
        panel.set_xlabel("sequence length (tokens)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(across)))
    figure.suptitle(title, fontsize=11)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def draw_panel(panel, rows: list[dict], rivals: list[str]) -> None:
    for rival, colour in zip(rivals, COLOURS, strict=False):
        for mask, style in (("full", "-"), ("causal", "--")):
            points = [(row["seqlen"], row[rival]) for row in rows if row["mask"] == mask and row.get(rival)]
            if points:
                panel.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=f"{rival}, {mask}")
    limit = statistics.median(row["matmul"] for row in rows)
    panel.axhline(limit, color="grey", linewidth=1, linestyle=":", label="matrix product")
    panel.set_xscale("log", base=2)
    seqlens = sorted({row["seqlen"] for row in rows})
    panel.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
    panel.grid(True, alpha=0.3)
