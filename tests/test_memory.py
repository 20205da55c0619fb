"""Memory of forward and backward grows linearly with the sequence; that of the unfused formula grows with its square.

Each measurement is a process of its own, without torch, so that its peak is that of the call and little else."""

from __future__ import annotations

import subprocess
import sys

import pytest

DIM = 32

FUSED = """
q, k, v, dout = (rng.standard_normal((1, n, 1, dim), dtype=np.float32) for _ in range(4))
out, dq, dk, dv = (np.empty_like(q) for _ in range(4))
lse = np.empty((1, 1, n), np.float32)
shared = (q, k, v, out, lse, *(None,) * 9, None, None, True, None, None, 0.0, 0.0, 0, None, None, "bshd", False)
def run():
    _C.forward(*shared, None)
    _C.backward(*shared, dout, None, dq, dk, dv, None, None, None, None)
"""
UNFUSED = """
q, k, v, dout = (rng.standard_normal((n, dim), dtype=np.float32) for _ in range(4))
def run():
    p = np.exp(q @ k.T * np.float32(dim ** -0.5))
    p /= p.sum(1, keepdims=True)
    out = p @ v
    dp = dout @ v.T
    ds = p * (dp - (dout * out).sum(1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ dout
"""
MEASURE = """
import re, sys
import numpy as np
import flash_attn_c
from flash_attn_c import _C
assert "torch" not in sys.modules
rng = np.random.default_rng(0)
dim = {dim}
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
n = 128
{body}
run()
n = {n}
{body}
before = peak()
run()
print(peak() - before)
"""


def extra_bytes(body: str, n: int) -> int:
    """How far the peak of the process rises above its inputs and outputs, after a small call has warmed everything up."""
    program = MEASURE.format(body=body, n=n, dim=DIM)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forward_and_backward_need_linear_memory() -> None:
    lengths = (4096, 8192, 16384)
    extra = [extra_bytes(FUSED, n) for n in lengths]
    tensor_bytes = [4 * n * DIM for n in lengths]
    # The outputs are touched for the first time in the call, so four tensors of growth are theirs.
    for size, one_tensor in zip(extra, tensor_bytes, strict=True):
        assert size < 16 * one_tensor + 4 * 2**20, f"{extra} bytes at lengths {lengths}"
    assert extra[2] - extra[1] <= 2.5 * max(extra[1] - extra[0], tensor_bytes[0]), f"{extra} bytes at lengths {lengths}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_unfused_formula_needs_quadratic_memory() -> None:
    """So the measurement sees what it is meant to see."""
    small, large = extra_bytes(UNFUSED, 2048), extra_bytes(UNFUSED, 4096)
    assert large > 3.5 * small > 3.5 * 4 * 2048**2
