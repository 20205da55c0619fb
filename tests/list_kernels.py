"""Writes csrc/cuda/store/prebuilt.txt, the list of kernels that ship compiled: those that the engine itself asks for, on a model of each
architecture, for the shapes in list_kernels.c. Run it after a change of tiles or constants; a test compares."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_host import CSRC, ROOT, build_fake_driver, compiler

LIST = CSRC / "cuda/store/prebuilt.txt"
HEADER = "# Kernels that ship compiled, one variant a line: ARCHITECTURES KERNEL ENTRY NAME=VALUE ... Written by tests/list_kernels.py.\n"

# cc_major, cc_minor, shared memory a block in bytes, SMs
DEVICES = {
    "sm_80": (8, 0, 166912, 108),
    "sm_86": (8, 6, 101376, 84),
    "sm_89": (8, 9, 101376, 128),
    "sm_90a": (9, 0, 232448, 132),
    "sm_100": (10, 0, 232448, 148),
    "sm_120": (12, 0, 101376, 170),
}


def build(folder: Path) -> tuple[Path, Path, Path]:
    """The program, the fake driver and the fake NVRTC."""
    subprocess.run([sys.executable, "setup.py", "-q", "embed"], cwd=ROOT, check=True)
    sources = [path for part in ("core", "cpu", "cuda", "cuda/store") for path in sorted((CSRC / part).glob("*.c"))]
    program, nvrtc = folder / "list_kernels", folder / "libnvrtc.so.13"
    command = [compiler(), "-O1", "-std=gnu11", f"-I{CSRC}", f"-I{ROOT}", "-o", program, ROOT / "tests/list_kernels.c", *sources]
    command += [ROOT / "build/embedded_sources.c", "-lm", "-lpthread", "-ldl"]
    subprocess.run([str(part) for part in command], check=True)
    subprocess.run([compiler(), "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", str(nvrtc), str(ROOT / "tests/fake_nvrtc.c")], check=True)
    return program, build_fake_driver(folder), nvrtc


def kernels_asked_for(folder: Path) -> dict[str, list[str]]:
    """ "KERNEL ENTRY NAME=VALUE ..." -> the architectures that want it."""
    program, driver, nvrtc = build(folder)
    wanted: dict[str, list[str]] = {}
    for arch, model in DEVICES.items():
        noted = folder / f"{arch}.txt"
        noted.touch()
        env = {**os.environ, "FLASH_ATTN_C_CACHE": "off", "FLASH_ATTN_C_NVRTC": str(nvrtc), "FAKE_NVRTC_LIST": str(noted)}
        done = subprocess.run([str(program), str(driver), *map(str, model)], env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{arch}: {done.stderr}")
        for line in sorted(noted.read_text().splitlines()):
            target, variant = line.split(" ", 1)
            assert target == arch
            wanted.setdefault(variant, []).append(arch)
    return wanted


def list_text(folder: Path) -> str:
    rows = (f"{','.join(archs)} {variant}\n" for variant, archs in sorted(kernels_asked_for(folder).items()))
    return HEADER + "".join(rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        text = list_text(Path(scratch))
    LIST.write_text(text)
    print(f"{LIST.relative_to(ROOT)}: {len(text.splitlines()) - 1} kernels")
