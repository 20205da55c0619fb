"""The CUDA engine's plans, forward and backward, of problems on devices that need not be here: they are pure functions. Tests import
this; it holds none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cuda_host import CSRC, ROOT, compiler

F32, F64, F16, BF16 = 1, 2, 3, 4
DEVICES = {  # SMs, shared memory of a block, compute capability
    "A100": (108, 166912, 80),
    "A40": (84, 101376, 86),
    "RTX 4090": (128, 101376, 89),
    "H200": (132, 232448, 90),
    "B200": (148, 232448, 100),
    "RTX 5090": (170, 101376, 120),
}


class PlanTool:
    """plan(gpu, name=number, ...) -> what `explain` says, or {"error": ..., "code": ...}."""

    def __init__(self, folder: Path, backward: bool = False):
        self.program = folder / ("plan_cuda_bwd" if backward else "plan_cuda")
        main = ROOT / "tests/c" / f"{self.program.name}.c"
        sources = [
            main,
            *sorted((CSRC / "cuda").glob("plan*.c")),
            *(CSRC / "core" / f"{n}.c" for n in ("problem", "check", "error", "options")),
        ]
        flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
        subprocess.run([compiler(), *flags, "-o", str(self.program), *map(str, sources), "-lm"], check=True)

    def __call__(self, gpu: str = "H200", **words: int) -> dict:
        sm_count, smem, cc = DEVICES[gpu]
        words = {"sm_count": sm_count, "smem": smem, "cc": cc, **words}
        command = [self.program, *(f"{name}={value}" for name, value in words.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stdout, "code": done.returncode}
