"""The NumPy front: forward only, on the CPU. It needs neither torch nor a second set of rules: the C entry checks everything."""

from typing import Any

import numpy as np

from . import _C

array_module = np
tensor_type = np.ndarray


def attention(q: Any, k: Any, v: Any, tensors: tuple, options: tuple, return_lse: bool) -> Any:
    check(q, k, v, tensors)
    rng_state = _random_state() if options[4] else None
    if not (q.ndim == k.ndim == v.ndim and q.ndim in (3, 4)):
        refuse(q, k, v, tensors, options)
    layout = options[8]
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    rows = q.shape[:-1]
    if q.ndim == 3:
        rows = (rows[1], rows[0])
    elif layout == "bshd":
        rows = (rows[0], rows[2], rows[1])
    lse = np.empty(rows, np.float64 if q.dtype == np.float64 else np.float32) if return_lse else None
    _C.forward(q, k, v, out, lse, *tensors, rng_state, None, *options, None)
    return (out, lse) if return_lse else out


def check(q: Any, k: Any, v: Any, tensors: tuple) -> None:
    names = ("bias", "mask", "alibi_slopes", "sinks", "block_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    for name, value in zip(("q", "k", "v", *names), (q, k, v, *tensors), strict=True):
        if value is not None and not isinstance(value, np.ndarray):
            raise TypeError(f"{name}: expected a NumPy array like q, got {type(value).__name__}")


def refuse(q: Any, k: Any, v: Any, tensors: tuple, options: tuple) -> None:
    """Shapes that leave no shape for the outputs: the validator says what is wrong with them."""
    _C.explain(q, k, v, None, None, *tensors, (0, 0), None, *options, False)
    raise TypeError(f"q: expected 4 dimensions, or 3 for packed sequences, got {q.ndim}")


def constant(array: Any) -> Any:
    return array


def cast(array: Any, dtype: Any) -> Any:
    return array.astype(dtype, copy=False)


def _random_state() -> tuple[int, int]:
    """From NumPy's global generator, so that numpy.random.seed repeats a run."""
    seed, offset = np.random.randint(0, 2**63 - 1, 2, dtype=np.int64)
    return int(seed), int(offset)
