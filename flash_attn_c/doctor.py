"""python -m flash_attn_c doctor: what was found on this machine, and a self-check against the plain formula."""

import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

CHECK_SECONDS = 2.0


def main(arguments: list[str]) -> int:
    if arguments:
        print("doctor: takes no arguments", file=sys.stderr)
        return 2
    from . import _C, __version__

    rows: list[tuple[str, Any]] = [("flash_attn_c", __version__), ("python", f"{platform.python_version()} on {platform.machine()}")]
    rows += [("numpy", np.__version__), *_torch_rows()]
    for engine, facts in json.loads(_C.describe()).items():
        rows += [(f"{engine} {name}".replace("_", " "), value) for name, value in _flat(facts)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print()
    return _self_check()


def _torch_rows() -> Iterator[tuple[str, Any]]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        yield "torch", "not installed (NumPy arrays work without it)"
        return
    yield "torch", torch.__version__
    yield "torch threads", torch.get_num_threads()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"


def _flat(facts: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(facts, dict):
        yield prefix, facts
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", value


def _self_check() -> int:
    """Every check in turn, again and again until the time is up. Prints one line each with the worst error; 1 if any is wrong."""
    checks = list(_checks())
    worst = dict.fromkeys((name for name, _, _ in checks), 0.0)
    runs, started = 0, time.perf_counter()
    with _progress(len(checks)) as advance:
        while runs == 0 or time.perf_counter() - started < CHECK_SECONDS:
            for name, check, _ in checks:
                try:
                    error = check(runs)
                except Exception as failure:  # a failed check is a result here, not an end
                    print(f"{name}: {type(failure).__name__}: {failure}", file=sys.stderr)
                    error = float("inf")
                worst[name] = max(worst[name], error)
                if runs == 0:
                    advance()
            runs += 1
    width = max(len(name) for name in worst)
    good = True
    for name, _, limit in checks:
        fine = worst[name] <= limit
        good &= fine
        print(f"{name:<{width}}  {'ok' if fine else 'WRONG':<5}  largest error {worst[name]:.1e}, limit {limit:.0e}")
    print(f"\n{'everything works' if good else 'something is wrong'} ({runs} rounds in {time.perf_counter() - started:.1f} s)")
    return 0 if good else 1


class _progress:
    """A bar where tqdm is installed and somebody watches, else nothing."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        try:
            self._bar = importlib.import_module("tqdm").tqdm(total=total, desc="self-check", leave=False, disable=None)
        except ImportError:
            pass

    def __enter__(self) -> Callable[[], None]:
        return self._bar.update if self._bar is not None else lambda: None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _checks() -> Iterator[tuple[str, Callable[[int], float], float]]:
    """(name, check(seed) -> largest error, limit)."""
    for dtype, limit in ((np.float32, 1e-5), (np.float64, 1e-12)):
        yield f"cpu numpy {np.dtype(dtype).name} forward", _numpy_check(dtype), limit
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name, limit in (("float32", 1e-4), ("bfloat16", 5e-2), ("float16", 1e-2)):
            yield f"{device} torch {name} forward and backward", _torch_check(torch, device, getattr(torch, name)), limit


def _numpy_check(dtype: Any) -> Callable[[int], float]:
    from . import attention

    def check(seed: int) -> float:
        generator = np.random.default_rng(seed)
        q, k, v = (generator.standard_normal((2, 65, 3, 40)).astype(dtype) for _ in range(3))
        score = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) / 40**0.5
        score = np.where(np.tri(65, dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        expected = np.einsum("bhij,bjhd->bihd", weight / weight.sum(-1, keepdims=True), v)
        return float(np.abs(attention(q, k, v, causal=True) - expected).max())

    return check


def _torch_check(torch: Any, device: str, dtype: Any) -> Callable[[int], float]:
    from . import attention

    def check(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((2, 65, 4, 40), (2, 97, 2, 40), (2, 97, 2, 40))
        leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        q, k, v = exact[0].transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(2, 1) for t in exact[1:])
        visible = torch.ones(65, 97, dtype=torch.bool, device=device).tril(32)
        score = (q @ k.mT / 40**0.5).masked_fill(~visible, float("-inf"))
        expected = (score.softmax(-1) @ v).transpose(1, 2)
        out = attention(*leaves, causal=True)
        seed_gradient = torch.randn(out.shape, generator=generator).to(device, dtype)
        found = (out, *torch.autograd.grad(out, leaves, seed_gradient))
        wanted = (expected, *torch.autograd.grad(expected, exact, seed_gradient.double()))
        return max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))

    return check
