"""The CUDA engine on a model of a GPU: its host code and the kernels' own source, run on the CPU (tests/gpu_model). `forward` and
`backward` take the same calls as tests/binding.py. Tests import this; it holds none.

What is compiled stays in build/gpu_model, in a folder named by a digest of all that goes into it."""

from __future__ import annotations

import ctypes as c
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

import binding
import reference
from cuda_host import CSRC, ROOT, compiler

DTYPES = {torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4, torch.int32: 5, torch.int64: 6, torch.bool: 7}
UNBOUNDED = -(2**63)
CACHE = ROOT / "build/gpu_model"


class Tensor_(c.Structure):
    _fields_ = [("data", c.c_void_p), ("dtype", c.c_int), ("device", c.c_int), ("device_index", c.c_int32), ("ndim", c.c_int32),
                ("read_only", c.c_int32), ("shape", c.c_int64 * 5), ("stride", c.c_int64 * 5)]  # fmt: skip


class Visibility(c.Structure):
    _fields_ = [("causal", c.c_int), ("has_window", c.c_int32), ("left", c.c_int64), ("right", c.c_int64), ("mask", Tensor_),
                ("block_mask", Tensor_), ("block_size", c.c_int64)]  # fmt: skip


class Score(c.Structure):
    _fields_ = [("has_scale", c.c_int32), ("scale", c.c_double), ("softcap", c.c_double), ("bias", Tensor_), ("alibi_slopes", Tensor_),
                ("sinks", Tensor_)]  # fmt: skip


class Lengths(c.Structure):
    _fields_ = [("cu_seqlens_q", Tensor_), ("cu_seqlens_k", Tensor_), ("seqused_q", Tensor_), ("seqused_k", Tensor_),
                ("has_max_q", c.c_int32), ("has_max_k", c.c_int32), ("max_seqlen_q", c.c_int64), ("max_seqlen_k", c.c_int64)]  # fmt: skip


class Dropout(c.Structure):
    _fields_ = [("p", c.c_double), ("seed", c.c_uint64), ("offset", c.c_uint64), ("state", Tensor_)]


GRADIENTS = ("dout", "dlse", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks")


class Gradients(c.Structure):
    _fields_ = [(name, Tensor_) for name in GRADIENTS]


class Request(c.Structure):
    _fields_ = [("layout", c.c_int), *((name, Tensor_) for name in ("q", "k", "v", "out", "lse", "probs")),
                ("visibility", Visibility), ("score", Score), ("lengths", Lengths), ("dropout", Dropout), ("deterministic", c.c_int32),
                ("grad", Gradients)]  # fmt: skip


class Error(c.Structure):
    _fields_ = [("code", c.c_int), ("message", c.c_char * 512)]


def tensor(t: Tensor | None) -> Tensor_:
    if t is None:
        return Tensor_()
    pad = [0] * (5 - t.ndim)
    return Tensor_(t.data_ptr(), DTYPES[t.dtype], 0, 0, t.ndim, 0, (c.c_int64 * 5)(*t.shape, *pad), (c.c_int64 * 5)(*t.stride(), *pad))


def request(call: dict) -> Request:
    r = Request(layout=int(call["layout"] == "bhsd"), deterministic=int(call["deterministic"]))
    for name in ("q", "k", "v", "out", "lse", "probs"):
        setattr(r, name, tensor(call[name]))
    left, right = call["window"] or (None, None)
    causal = {False: 0, True: 1, "bottom_right": 1, "top_left": 2}[call["causal"]]
    bounds = [UNBOUNDED if bound is None else bound for bound in (left, right)]
    r.visibility = Visibility(
        causal, int(call["window"] is not None), *bounds, tensor(call["mask"]), tensor(call["block_mask"]), call["block_size"]
    )
    has_scale = call["scale"] is not None
    scores = (tensor(call[name]) for name in ("bias", "alibi_slopes", "sinks"))
    r.score = Score(int(has_scale), call["scale"] if has_scale else 0.0, call["softcap"], *scores)
    lengths = (tensor(call[name]) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"))
    most = [call["max_seqlen_q"], call["max_seqlen_k"]]
    r.lengths = Lengths(*lengths, *(int(m is not None) for m in most), *(m or 0 for m in most))
    seed, offset = (int(word) for word in call["rng"])
    r.dropout = Dropout(call["dropout_p"], seed % 2**64, offset % 2**64, Tensor_())
    r.grad = Gradients(*(tensor(call[name]) for name in GRADIENTS))
    return r


def digest() -> str:
    """Of the sources that a kernel or the library is made from; a variant's name tells its constants."""
    folders = (CSRC / "core", CSRC / "cuda", ROOT / "tests/gpu_model")
    files = [Path(__file__), *sorted(path for folder in folders for path in folder.rglob("*.*") if path.is_file())]
    whole = hashlib.sha256(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    for path in files:
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def build() -> c.CDLL:
    folder = CACHE / digest()
    for old in CACHE.glob("*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MODEL_FOLDER"], os.environ["MODEL_SOURCES"] = str(folder), str(ROOT)
    library = folder / "libmodel.so"
    if not library.exists():
        skipped = {"driver.c", "describe.c"}
        sources = [f for f in sorted((CSRC / "cuda").glob("*.c")) if f.name not in skipped]
        sources += [f for f in sorted((CSRC / "core").glob("*.c")) if f.name != "dispatch.c"]
        made = library.with_suffix(f".{os.getpid()}")
        # Threads are stacks here, and the checks of a fortified longjmp forbid a jump from one to another.
        flags = ["-std=gnu11", "-O2", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC", f"-I{CSRC}", "-o", str(made)]
        subprocess.run([compiler(), *flags, *map(str, sources), str(ROOT / "tests/gpu_model/model.c"), "-lm", "-ldl"], check=True)
        made.rename(library)
    return c.CDLL(str(library), mode=c.RTLD_GLOBAL)


available = shutil.which("g++") is not None
_library: c.CDLL | None = None


def run(call: dict, backward: bool) -> None:
    global _library
    _library = _library or build()
    error, r = Error(), request(binding.complete(call))
    if _library.model_run(c.byref(r), int(backward), c.byref(error)):
        raise RuntimeError(error.message.decode())


def set_device(cc_major: int, cc_minor: int, sm_count: int, smem: int) -> None:
    global _library
    _library = _library or build()
    _library.model_set_device(cc_major, cc_minor, sm_count, smem)


def forward(call: dict, how: str = "") -> tuple[Tensor, Tensor]:
    call = binding.allocate(binding.complete(call), how)
    run(call, False)
    return call["out"], call["lse"]


def backward(call: dict, out: Tensor, lse: Tensor, how: str = "") -> dict[str, Tensor]:
    given = [name for name in reference.DIFFERENTIABLE if call.get(name) is not None]
    gradients = {name: binding.poison(tuple(call[name].shape), call[name], how=how) for name in given}
    run({**call, "out": out, "lse": lse, **{f"d{name}": t for name, t in gradients.items()}}, True)
    return gradients
