"""NumPy arrays through the same entry: the same numbers as torch tensors on the CPU, with or without torch on the machine."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from flash_attn_c import attention

rng = np.random.default_rng(3)


def rand(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (3, 2)},
    "softcap": {"softcap": 2.0, "scale": 0.3},
    "bias": {"bias": rand(1, 4, 11, 13)},
    "mask": {"mask": rng.random((2, 1, 11, 13)) > 0.3},
    "alibi": {"alibi_slopes": rand(4)},
    "sinks": {"sinks": rand(4)},
    "seqused": {"seqused_k": np.array([13, 4], np.int32)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_same_bits_as_torch(options, dtype):
    q, k, v = rand(2, 11, 4, 8, dtype=dtype), rand(2, 13, 2, 8, dtype=dtype), rand(2, 13, 2, 6, dtype=dtype)
    options = {n: a.astype(dtype) if isinstance(a, np.ndarray) and n in ("bias", "sinks") else a for n, a in options.items()}
    out, lse = attention(q, k, v, **options, return_lse=True)
    as_torch = {n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in options.items()}
    expected = attention(*map(torch.from_numpy, (q, k, v)), **as_torch, return_lse=True)
    assert isinstance(out, np.ndarray) and out.dtype == dtype and out.shape == (2, 11, 4, 6)
    assert np.array_equal(out, expected[0].numpy()) and np.array_equal(lse, expected[1].numpy())


def test_packed_and_bhsd():
    q, k = rand(7, 2, 8), rand(9, 2, 8)
    cu_q, cu_k = np.array([0, 3, 7], np.int32), np.array([0, 5, 9], np.int32)
    out, lse = attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, return_lse=True)
    assert out.shape == (7, 2, 8) and lse.shape == (2, 7)
    first = attention(q[None, :3], k[None, :5], k[None, :5], causal=True)
    np.testing.assert_allclose(out[:3], first[0], rtol=1e-6, atol=1e-6)
    across = attention(*(t[None, :3].swapaxes(1, 2) for t in (q, k, k)), layout="bhsd")
    assert np.array_equal(across.swapaxes(1, 2), attention(q[None, :3], k[None, :3], k[None, :3]))


def test_views_and_read_only_inputs():
    q = rand(2, 12, 2, 16)
    view = q[:, ::2, :, ::-1]
    view.flags.writeable = False
    assert np.array_equal(attention(view, view, view), attention(*[np.ascontiguousarray(view)] * 3))


def test_dropout_repeats_with_the_seed_of_numpy():
    q = rand(1, 32, 2, 8)
    np.random.seed(5)
    first, second = (attention(q, q, q, dropout_p=0.5) for _ in range(2))
    np.random.seed(5)
    assert np.array_equal(attention(q, q, q, dropout_p=0.5), first) and not np.array_equal(first, second)


@pytest.mark.parametrize("name", ["k", "v", "bias", "mask", "cu_seqlens_q"])
def test_a_mixture_with_torch_is_refused_by_name(name):
    q = rand(2, 5, 2, 8)
    call = {"q": q, "k": q, "v": q, name: torch.zeros(2, 5, 2, 8)}
    with pytest.raises(TypeError, match=f"{name}: expected a NumPy array like q, got Tensor"):
        attention(**call)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.bool_, ">f4", "O"])
def test_other_element_types_are_refused(dtype):
    q = np.ones((1, 2, 1, 4)).astype(dtype)
    with pytest.raises(TypeError, match="q: "):
        attention(q, q, q)


def test_works_where_torch_cannot_be_imported():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, flash_attn_c
x = np.ones((1, 4, 2, 8), np.float32)
print(flash_attn_c.attention(x, x, x, causal=True).sum(), flash_attn_c.explain(x, x, x).engine)
try:
    flash_attn_c.flash_attn_func
except ImportError as error:
    print("refused")
"""
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.split() == ["64.0", "cpu", "refused"], done.stderr
