"""The AMX passes of the CPU engine on emulated instructions (tests/c/amx_emulated.h), so that any machine can run them. `forward` and
`backward` take the same calls as tests/binding.py. Tests import this; it holds none."""

from __future__ import annotations

import atexit
import ctypes as c
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

import binding
import gpu_model
from cuda_host import CSRC, ROOT, compiler

FOLDER = Path(tempfile.mkdtemp(prefix="amx_model_"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
available = shutil.which(compiler()) is not None
_library: c.CDLL | None = None


def build() -> c.CDLL:
    sources = [f for folder in ("core", "cpu") for f in sorted((CSRC / folder).glob("*.c")) if f.name != "dispatch.c"]
    sources.append(ROOT / "tests/c/amx_model.c")
    flags = ["-std=gnu11", "-O1", "-w", "-Wno-psabi", "-fPIC", "-D_GNU_SOURCE", f"-I{ROOT}", "-include", "tests/c/amx_emulated.h"]

    def compile_one(source: Path) -> str:
        made = FOLDER / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([compiler(), *flags, "-c", str(source), "-o", str(made)], check=True, cwd=ROOT)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = FOLDER / "libamx.so"
    subprocess.run([compiler(), "-shared", *objects, "-lm", "-ldl", "-lpthread", "-o", str(library)], check=True)
    return c.CDLL(str(library))


def run(call: dict, backward: bool) -> None:
    global _library
    _library = _library or build()
    error, r = gpu_model.Error(), gpu_model.request(binding.complete(call))
    if _library.amx_run(c.byref(r), int(backward), c.byref(error)):
        raise RuntimeError(error.message.decode())


def forward(call: dict, how: str = "") -> tuple[Tensor, Tensor]:
    call = binding.allocate(binding.complete(call), how)
    run(call, False)
    return call["out"], call["lse"]


def backward(call: dict, out: Tensor, lse: Tensor, how: str = "") -> dict[str, Tensor]:
    given = [name for name in ("q", "k", "v") if call.get(name) is not None]
    gradients = {name: binding.poison(tuple(call[name].shape), call[name], how=how) for name in given}
    run({**call, "out": out, "lse": lse, **{f"d{name}": t for name, t in gradients.items()}}, True)
    return gradients
