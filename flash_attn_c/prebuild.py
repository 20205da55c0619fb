"""python -m flash_attn_c prebuild: compiles the GPU kernels that ship with the package, with no GPU, in parallel processes.

The list is one variant a line, `ARCHS KERNEL ENTRY NAME=VALUE ...`, where ARCHS is `*` or names joined by commas. What comes out is a
folder of cubins in the format of the disk cache, which a run looks into before it compiles anything, and index.json beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from . import _C

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
LIST_NAME = "store/prebuilt.txt"


class Variant(NamedTuple):
    kernel: str
    entry: str
    constants: tuple[tuple[str, int], ...]
    arch: str

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.constants), self.arch])


class Report(NamedTuple):
    """What ptxas said of a compiled kernel."""

    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    smem_bytes: int  # static
    warnings: tuple[str, ...]


def read_list(text: str, archs: Iterable[str] = ARCHS) -> list[Variant]:
    """The variants of a list for these architectures."""
    variants = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < 3 or not all(re.fullmatch(r"\w+=-?\d+", word) for word in words[3:]):
            raise ValueError(f"line {number}: expected ARCHS KERNEL ENTRY NAME=VALUE ..., got {line!r}")
        constants = tuple((name, int(value)) for name, value in (word.split("=") for word in words[3:]))
        wanted = set(ARCHS if words[0] == "*" else words[0].split(","))
        if unknown := wanted - set(ARCHS):
            raise ValueError(f"line {number}: unknown architecture {', '.join(sorted(unknown))}")
        variants += [Variant(words[1], words[2], constants, arch) for arch in archs if arch in wanted]
    return variants


def shipped_list(archs: Iterable[str] = ARCHS) -> list[Variant]:
    """The list that is part of the module."""
    return read_list(_C.kernel_source(LIST_NAME) or "", archs)


def read_log(log: str) -> Report:
    """Sums over the functions of a kernel, which is one where all is inlined."""

    def numbers(pattern: str) -> list[int]:
        return [int(found) for found in re.findall(pattern, log)]

    spills = sum(numbers(r"(\d+) bytes spill stores")) + sum(numbers(r"(\d+) bytes spill loads"))
    warnings = tuple(line.strip() for line in log.splitlines() if re.search(r"\bwarning\b|\bC75\d\d\b", line, re.IGNORECASE))
    return Report(
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        spill_bytes=spills,
        stack_bytes=max(numbers(r"(\d+) bytes stack frame"), default=0),
        smem_bytes=max(numbers(r"(\d+) bytes smem"), default=0),
        warnings=warnings,
    )


def _ship(variant: Variant, folder: str) -> tuple[str, str]:
    return _C.ship_kernel(variant.kernel, variant.entry, dict(variant.constants), variant.arch, folder)


def _compile(variant: Variant, _folder: str) -> tuple[str, str]:
    return "", _C.compile_kernel(variant.kernel, variant.entry, dict(variant.constants), variant.arch)[1]


def compile_all(variants: list[Variant], folder: str = "", jobs: int = 0) -> Iterator[tuple[Variant, str, Report | str]]:
    """Yields (variant, file name, report or the error's text) as they get done. Without a folder nothing is written."""
    work = _ship if folder else _compile
    # Processes, since NVRTC does part of its work under a lock; spawned, since a fork may not follow the use of CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs or os.cpu_count() or 1, max(1, len(variants))), mp_context=context) as pool:
        running = {pool.submit(work, variant, folder): variant for variant in variants}
        for done in as_completed(running):
            try:
                file, log = done.result()
            except RuntimeError as error:
                yield running[done], "", str(error)
            else:
                yield running[done], file, read_log(log)


Result = tuple[Variant, str, "Report | str"]


def _with_progress(results: Iterator[Result], total: int) -> Iterator[Result]:
    try:
        from tqdm import tqdm
    except ImportError:
        for count, result in enumerate(results, 1):
            print(f"\r{count} / {total} kernels", end="\n" if count == total else "", file=sys.stderr, flush=True)
            yield result
        return
    yield from tqdm(results, total=total, unit="kernel", desc="compiling")


def _default_archs() -> list[str]:
    """Those of this machine's GPUs; all where there is none."""
    found = {device.get("kernels") for device in json.loads(_C.describe())["cuda"].get("devices", [])}
    return [arch for arch in ARCHS if arch in found] or list(ARCHS)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_c prebuild",
        description="Compile the shipped GPU kernels; needs NVRTC, no GPU.",
    )
    folder = Path(__file__).parent / "cubins"
    parser.add_argument("--arch", help=f"comma-separated, of {', '.join(ARCHS)}; default: those of this machine's GPUs, or all")
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to (default: the package's own)")
    parser.add_argument("--list", type=Path, help="a file of variants in place of the shipped list")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    options.archs = options.arch.split(",") if options.arch else _default_archs()
    if unknown := set(options.archs) - set(ARCHS):
        parser.error(f"--arch: unknown {', '.join(sorted(unknown))}; known are {', '.join(ARCHS)}")
    return options


def _write_index(folder: Path, made: dict[str, tuple[Variant, Report]]) -> int:
    rows = []
    for file, (variant, report) in sorted(made.items()):
        row = {"file": file, "bytes": (folder / file).stat().st_size, "registers": report.registers}
        rows.append({**row, **variant._asdict(), "constants": dict(variant.constants)})
    (folder / "index.json").write_text(json.dumps({"nvrtc": json.loads(_C.describe())["cuda"]["nvrtc"], "kernels": rows}, indent=1) + "\n")
    return sum(row["bytes"] for row in rows)


def main(arguments: list[str]) -> int:
    options = _arguments(arguments)
    variants = read_list(options.list.read_text(), options.archs) if options.list else shipped_list(options.archs)
    if not variants:
        print("no kernel in the list for " + ", ".join(options.archs), file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    made: dict[str, tuple[Variant, Report]] = {}
    failed = 0
    for variant, file, report in _with_progress(compile_all(variants, str(options.out), options.jobs), len(variants)):
        if isinstance(report, str):
            failed += 1
            print(f"{variant}: {report}", file=sys.stderr)
            continue
        made[file] = variant, report
        if report.spill_bytes or report.warnings:
            print(f"{variant}: {report.spill_bytes} bytes spilled {' '.join(report.warnings)}", file=sys.stderr)
    size = _write_index(options.out, made)
    seconds = time.monotonic() - start
    print(f"{len(made)} kernels for {', '.join(options.archs)}: {size / 1e6:.1f} MB in {seconds:.0f} s, in {options.out}; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
