"""Every refusal: what was passed, the exception it raises, and the words that name the argument, its value and the limit.

The last test matches this table against the messages in the validator's source, so that a new refusal needs a row here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_attn_c import attention
from torch import Tensor

import binding
import reference

CORE = Path(__file__).parent.parent / "csrc" / "core"
NAN = float("nan")


def dense() -> dict:
    """2 sequences of 5 queries and 7 keys, 4 heads over 2, dims 16 and 8."""
    call = dict(reference.DEFAULTS, q=torch.randn(2, 5, 4, 16), k=torch.randn(2, 7, 2, 16), v=torch.randn(2, 7, 2, 8))
    return with_outputs(call)


def packed() -> dict:
    """9 query tokens and 11 key tokens in 2 sequences."""
    call = dict(reference.DEFAULTS, q=torch.randn(9, 4, 16), k=torch.randn(11, 2, 16), v=torch.randn(11, 2, 8))
    return with_outputs({**call, "cu_seqlens_q": ints(0, 4, 9), "cu_seqlens_k": ints(0, 0, 11)})


def with_outputs(call: dict) -> dict:
    call = binding.allocate(call)
    call.update(dout=torch.randn_like(call["out"]), dlse=torch.zeros_like(call["lse"]))
    return {**call, **{f"d{name}": torch.full_like(call[name], NAN) for name in "qkv"}}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bools(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def read_only(*shape: int) -> np.ndarray:
    array = np.full(shape, np.nan, dtype=np.float32)
    array.flags.writeable = False
    return array


def misaligned(*shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    return np.zeros(4 * count + 1, dtype=np.uint8)[1:].view(np.float32).reshape(shape)


@dataclass
class Row:
    words: tuple[str, ...]  # what the message must say; the first is the argument
    change: dict[str, Any] = field(default_factory=dict)  # on top of the base call; a function gets the base value
    error: type[Exception] = ValueError
    base: Callable[[], dict] = dense
    run: Callable[[dict], Any] = binding.raw_forward

    def __str__(self) -> str:
        where = {binding.raw_forward: "forward", binding.raw_backward: "backward", binding.raw_explain: "explain"}
        return "-".join([where.get(self.run, "attention"), self.base.__name__, *map(str, self.change), *self.words[1:3]])

    def call(self) -> dict:
        call = self.base()
        for name, value in self.change.items():
            call[name] = value(call[name]) if callable(value) else value
        return call


def row(*words: str, error: type[Exception] = ValueError, base=dense, run=binding.raw_forward, **change: Any) -> Row:
    return Row(words, change, error, base, run)


def backward(*words: str, **keywords: Any) -> Row:
    return row(*words, run=binding.raw_backward, **keywords)


def public_call(call: dict) -> None:
    names = ("bias", "mask", "alibi_slopes", "sinks", "block_mask", "cu_seqlens_q", "seqused_k", "window", "scale", "layout", "dropout_p")
    attention(call["q"], call["k"], call["v"], **{name: call[name] for name in names})


def public(*words: str, error: type[Exception], **change: Any) -> Row:
    return row(*words, error=error, run=public_call, **change)


HUGE = 2**29 + 1  # one over the longest sequence
ROWS = [
    # q, k, v
    row("q", error=TypeError, q=None),
    row("k", error=TypeError, k=None),
    row("v", error=TypeError, v=None),
    row("q", error=TypeError, q="queries"),
    row("v", error=TypeError, v=3.5),
    row("q", "int64", "float16, bfloat16, float32 or float64", error=TypeError, q=Tensor.long),
    row("q", error=TypeError, q=lambda q: q.to(torch.complex64)),
    row("q", "unsupported dtype", "float16, bfloat16, float32 or float64", error=TypeError, q=lambda q: q.to(torch.uint8)),
    row("mask", "unsupported dtype", "bool", error=TypeError, mask=torch.zeros(5, 7, dtype=torch.uint8)),
    row("k", "float64", "float32", error=TypeError, k=Tensor.double),
    row("v", "bfloat16", "float32", error=TypeError, v=Tensor.bfloat16),
    row("q", "float8_e4m3fn", "not supported", error=NotImplementedError, **dict.fromkeys("qkv", lambda t: t.to(torch.float8_e4m3fn))),
    row("q", "3", "4", "(batch, seqlen, heads, dim)", q=lambda q: q[0]),
    row("k", "5", "4", k=lambda k: k[None]),
    row("v", "3", "4", "(batch, heads, seqlen, dim)", layout="bhsd", q=lambda t: t.transpose(1, 2), k=lambda t: t.transpose(1, 2),
        v=lambda v: v[0]),
    row("q", "4", "3", "(total, heads, dim)", base=packed, q=lambda q: q[None]),
    row("q", "0", "256", q=lambda q: q[..., :0]),
    row("q", "257", "256", q=torch.zeros(2, 5, 4, 257)),
    row("v", "257", "256", v=torch.zeros(2, 7, 2, 257)),
    row("v", "0", "256", v=lambda v: v[..., :0]),
    row("k", "head dim 15", "16", k=lambda k: k[..., 1:]),
    row("v", "heads 1", "2", v=lambda v: v[:, :, :1]),
    row("v", "seqlen 6", "7", v=lambda v: v[:, 1:]),
    row("v", "total length 10", "11", base=packed, v=lambda v: v[1:]),
    row("k", "batch 1", "2", k=lambda k: k[:1]),
    row("v", "batch 1", "2", v=lambda v: v[:1]),
    row("k", "heads 3", "heads 4", k=torch.zeros(2, 7, 3, 16), v=torch.zeros(2, 7, 3, 8)),
    row("k", "heads 8", "heads 4", k=torch.zeros(2, 7, 8, 16), v=torch.zeros(2, 7, 8, 8)),
    row("heads 0", k=lambda k: k[:, :, :0], v=lambda v: v[:, :, :0]),
    row("q", "heads 0", q=lambda q: q[:, :, :0]),
    row("k", "seqlen", str(HUGE), str(2**29), k=torch.zeros(2, 1, 2, 16).expand(2, HUGE, 2, 16),
        v=torch.zeros(2, 1, 2, 8).expand(2, HUGE, 2, 8)),
    row("q", "seqlen", str(HUGE), str(2**29), q=torch.zeros(2, 1, 4, 16).expand(2, HUGE, 4, 16)),
    row("q", "address", "element size of 4", q=misaligned(2, 5, 4, 16)),
    row("bias", "address", "element size of 4", bias=misaligned(5, 7)),
    public("k", "meta", error=TypeError, k=lambda k: k.to("meta")),
    public("q", "strided", error=TypeError, q=lambda q: q.to_sparse()),
    public("k", "strided", error=TypeError, k=lambda k: k.to_sparse()),
    public("q", error=TypeError, q=lambda q: torch.quantize_per_tensor(q, 0.1, 0, torch.qint8)),
    public("v", "negated", error=TypeError, v=lambda v: torch._neg_view(v)),
    public("q", error=TypeError, q=lambda q: torch.complex(q, q).conj()),
    public("k", error=TypeError, k=lambda k: k.numpy()),
    public("q", error=TypeError, q=[[1.0]]),
    # lengths
    row("cu_seqlens_k", "missing", base=packed, cu_seqlens_k=None),
    row("cu_seqlens_q", "missing", cu_seqlens_k=ints(0, 3, 7)),
    row("cu_seqlens_q", "int64", "int32", error=TypeError, base=packed, cu_seqlens_q=Tensor.long),
    row("cu_seqlens_k", "float32", "int32", error=TypeError, base=packed, cu_seqlens_k=Tensor.float),
    row("cu_seqlens_q", "2", "1", base=packed, cu_seqlens_q=lambda t: t[None]),
    row("cu_seqlens_q", "empty", base=packed, cu_seqlens_q=lambda t: t[:0]),
    row("cu_seqlens_k", "(4,)", "(3,)", base=packed, cu_seqlens_k=ints(0, 1, 2, 11)),
    row("cu_seqlens_q", "1", "start with 0", base=packed, cu_seqlens_q=ints(1, 4, 9)),
    row("cu_seqlens_k", "-2", "start with 0", base=packed, cu_seqlens_k=ints(-2, 4, 11)),
    row("cu_seqlens_q", "decreases", "5", "4", base=packed, cu_seqlens_q=ints(0, 5, 4)),
    row("cu_seqlens_k", "12", "11", base=packed, cu_seqlens_k=ints(0, 3, 12)),
    row("cu_seqlens_k", "sequence length", str(2**29), base=packed, cu_seqlens_k=ints(0, 0, HUGE),
        k=torch.zeros(1, 2, 16).expand(HUGE, 2, 16), v=torch.zeros(1, 2, 8).expand(HUGE, 2, 8)),
    row("max_seqlen_q", "4", "5", base=packed, max_seqlen_q=4),
    row("max_seqlen_k", "10", "11", base=packed, max_seqlen_k=10),
    row("max_seqlen_q", "-1", "0..", base=packed, max_seqlen_q=-1),
    row("max_seqlen_k", str(2**30), str(2**29), base=packed, max_seqlen_k=2**30),
    row("max_seqlen_q", error=TypeError, base=packed, max_seqlen_q=5.5),
    row("max_seqlen_k", error=TypeError, base=packed, max_seqlen_k="11"),
    row("max_seqlen_q", "5", "not packed", max_seqlen_q=5),
    row("max_seqlen_k", "7", "not packed", max_seqlen_k=7),
    row("seqused_q", "int64", "int32", error=TypeError, seqused_q=torch.tensor([5, 5])),
    row("seqused_q", "(3,)", "(2,)", seqused_q=ints(1, 2, 3)),
    row("seqused_k", "2", "1", seqused_k=ints(1, 2)[None]),
    row("seqused_q", "entry 1", "6", "5", seqused_q=ints(5, 6)),
    row("seqused_k", "entry 0", "-1", "7", seqused_k=ints(-1, 6)),
    row("seqused_k", "entry 0", "1", "0..0", base=packed, seqused_k=ints(1, 6)),
    # which pairs exist
    row("window", "left", "-1", window=(-1, None)),
    row("window", "right", "-7", window=(3, -7)),
    row("window", "left", str(2**31), str(2**31 - 1), window=(2**31, 0)),
    row("window", "right", str(2**40), window=(None, 2**40)),
    row("window", window=(2**70, 0)),
    row("window", error=TypeError, window=(1.5, 2)),
    row("window", error=TypeError, window="both"),
    row("window", error=TypeError, window=5),
    row("window", window=(1, 2, 3)),
    row("causal", "middle", causal="middle"),
    row("causal", error=TypeError, causal=2.5),
    row("layout", "sbhd", layout="sbhd"),
    row("layout", error=TypeError, layout=3),
    row("mask", "float32", "bool", error=TypeError, mask=torch.zeros(5, 7)),
    row("mask", "(7, 5)", "(2, 4, 5, 7)", mask=bools(7, 5)),
    row("mask", "(1, 2, 4, 5, 7)", mask=bools(1, 2, 4, 5, 7)),
    row("block_mask", "int32", "bool", error=TypeError, block_mask=ints(1).reshape(1, 1, 1, 1), block_size=64),
    row("block_mask", "2", "4", block_mask=bools(1, 1), block_size=64),
    row("block_mask", "2 x 1", "1 x 1", "64", block_mask=bools(1, 1, 2, 1), block_size=64),
    row("block_mask", "(3, 1, 1, 1)", "(2, 4, 1, 1)", block_mask=bools(3, 1, 1, 1), block_size=64),
    row("block_mask", "3 x 1", "seqlen_q 5", block_mask=bools(1, 1, 3, 1)),
    row("block_size", "96", "64", block_mask=bools(1, 1, 1, 1), block_size=96),
    row("block_size", "-64", "64", block_mask=bools(1, 1, 1, 1), block_size=-64),
    row("block_size", "64", "without", block_size=64),
    row("block_size", error=TypeError, block_mask=bools(1, 1, 1, 1), block_size=64.0),
    # scores
    row("scale", "nan", scale=NAN),
    row("scale", "inf", scale=float("inf")),
    row("scale", error=TypeError, scale="small"),
    row("softcap", "-1", softcap=-1.0),
    row("softcap", "nan", softcap=NAN),
    row("softcap", error=TypeError, softcap=None),
    row("bias", "(5, 8)", "(2, 4, 5, 7)", bias=torch.zeros(5, 8)),
    row("bias", "(3, 1, 1, 7)", bias=torch.zeros(3, 1, 1, 7)),
    row("bias", "float64", "float32", error=TypeError, bias=torch.zeros(5, 7, dtype=torch.float64)),
    row("bias", "bool", error=TypeError, bias=bools(5, 7)),
    row("bias", "float16", "bfloat16 or float32", error=TypeError, bias=torch.zeros(5, 7, dtype=torch.float16),
        **dict.fromkeys(("q", "k", "v", "out"), Tensor.bfloat16)),
    row("alibi_slopes", "(3,)", "(4,)", alibi_slopes=torch.zeros(3)),
    row("alibi_slopes", "(4, 2)", "(2, 4)", alibi_slopes=torch.zeros(4, 2)),
    row("alibi_slopes", "float16", "float32", error=TypeError, alibi_slopes=torch.zeros(4, dtype=torch.float16)),
    row("sinks", "(2,)", "(4,)", sinks=torch.zeros(2)),
    row("sinks", "float64", "float32", error=TypeError, sinks=torch.zeros(4, dtype=torch.float64)),
    # dropout
    row("dropout_p", "1", "[0, 1)", dropout_p=1.0),
    row("dropout_p", "-0.1", "[0, 1)", dropout_p=-0.1),
    row("dropout_p", "nan", "[0, 1)", dropout_p=NAN),
    row("dropout_p", error=TypeError, dropout_p="half"),
    row("rng_state", "int32", "int64", error=TypeError, dropout_p=0.5, rng=ints(1, 2)),
    row("rng_state", "(3,)", "(2,)", dropout_p=0.5, rng=torch.zeros(3, dtype=torch.int64)),
    row("rng_state", error=TypeError, dropout_p=0.5, rng="seed"),
    row("rng_state", error=TypeError, dropout_p=0.5, rng=(0.5, 1)),
    # outputs
    row("out", error=TypeError, out=None),
    row("out", "float64", "float32", error=TypeError, out=Tensor.double),
    row("out", "(2, 5, 4, 16)", "(2, 5, 4, 8)", out=torch.full((2, 5, 4, 16), NAN)),
    row("lse", "(2, 5, 4)", "(2, 4, 5)", lse=torch.full((2, 5, 4), NAN)),
    row("lse", "(4, 8)", "(4, 9)", base=packed, lse=torch.full((4, 8), NAN)),
    row("lse", "float64", "float32", error=TypeError, lse=Tensor.double),
    row("out", "read-only", out=read_only(2, 5, 4, 8)),
    row("lse", "read-only", lse=read_only(2, 4, 5)),
    row("out", "stride 0", "dimension 0", "2", out=torch.full((1, 5, 4, 8), NAN).expand(2, 5, 4, 8)),
    row("probs", "(2, 4, 5, 7)", "(2, 4, 128, 128)", probs=torch.full((2, 4, 5, 7), NAN)),
    row("probs", "float64", "float32", error=TypeError, probs=torch.full((2, 4, 128, 128), NAN, dtype=torch.float64)),
    # gradients
    backward("dout", error=TypeError, dout=None),
    backward("dout", "(2, 5, 4, 7)", "(2, 5, 4, 8)", dout=lambda t: t[..., 1:]),
    backward("dout", "float64", "float32", error=TypeError, dout=Tensor.double),
    backward("dlse", "(2, 4, 4)", "(2, 4, 5)", dlse=lambda t: t[..., 1:]),
    backward("dq", "(2, 5, 3, 16)", "(2, 5, 4, 16)", dq=lambda t: t[:, :, 1:]),
    backward("dk", "float16", "float32", error=TypeError, dk=Tensor.half),
    backward("dv", "read-only", dv=read_only(2, 7, 2, 8)),
    backward("dk", "stride 0", dk=torch.full((2, 7, 1, 16), NAN).expand(2, 7, 2, 16)),
    backward("dbias", "without bias", dbias=torch.full((5, 7), NAN)),
    backward("dbias", "(5, 1)", "(5, 7)", bias=torch.zeros(5, 7), dbias=torch.full((5, 1), NAN)),
    backward("dalibi_slopes", "(2, 4)", "(4,)", alibi_slopes=torch.zeros(4), dalibi_slopes=torch.full((2, 4), NAN)),
    backward("dsinks", "without sinks", dsinks=torch.full((4,), NAN)),
    backward("dsinks", "float64", error=TypeError, sinks=torch.zeros(4), dsinks=torch.full((4,), NAN, dtype=torch.float64)),
    backward("out", error=TypeError, out=None),
    backward("lse", error=TypeError, lse=None),
    backward("probs", "forward", probs=torch.full((2, 4, 128, 128), NAN)),
]  # fmt: skip

WRITTEN = ("out", "lse", "probs", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refusal(row: Row) -> None:
    call = row.call()
    with pytest.raises(row.error) as caught:
        row.run(call)
    assert type(caught.value) is row.error
    message = str(caught.value)
    for word in row.words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert "\n" not in message, "one line says it"
    for name in WRITTEN:
        value = call.get(name)
        if value is not None and row.run is not public_call:
            assert (np.isnan(value) if isinstance(value, np.ndarray) else value.isnan()).all(), f"{name} was written"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_two_devices() -> None:
    for name in ("k", "v", "out", "lse"):
        with pytest.raises(ValueError, match=rf"^{name}: .*cuda:0.*cpu"):
            binding.raw_forward({**dense(), name: dense()[name].cuda()})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_grids_need_bounds_on_a_device() -> None:
    """Lengths stay on the device, so a bias over them needs the bounds said."""
    call = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in packed().items()}
    with pytest.raises(ValueError, match=r"^bias: needs max_seqlen_q and max_seqlen_k"):
        binding.raw_forward({**call, "bias": torch.zeros(5, 11, device="cuda")})


def test_explain_refuses_alike() -> None:
    with pytest.raises(ValueError, match=r"window: left bound -1"):
        binding.raw_explain({**dense(), "out": None, "lse": None, "window": (-1, 0)})


# Messages of the validator that no Python caller can see, with the reason.
UNREACHABLE = {
    "layout: %d is neither FA_BSHD nor FA_BHSD": "the binding passes one of the two",
    "causal: %d is not one of the fa_causal values": "likewise",
    "%s: is neither on a CPU nor on a CUDA device": "needs a tensor of a third device",
    "%s: is on %s:%d, but q is on %s:%d; all tensors of a call must be on one device": "needs a GPU; tested above where there is one",
    "%s: needs max_seqlen_q and max_seqlen_k when the sequences are packed": "likewise",
}


def messages_in_source() -> set[str]:
    """The format of every fa_fail in the validator."""
    found = set()
    for name in ("problem.c", "options.c", "check.c"):
        text = re.sub(r"/\*.*?\*/", "", (CORE / name).read_text(), flags=re.DOTALL)
        for literal in re.findall(r'fa_fail\(\s*error,\s*\w+,\s*((?:"(?:[^"\\]|\\.)*"\s*)+)', text):
            found.add("".join(re.findall(r'"((?:[^"\\]|\\.)*)"', literal)))
        calls, literals = (len(re.findall(pattern, text)) for pattern in (r"fa_fail\(\s*error,", r'fa_fail\(\s*error,\s*\w+,\s*"'))
        assert calls == literals, f"{name}: a message is not a literal"
    return found


def as_pattern(message: str) -> re.Pattern:
    parts = re.split(r"%(?:lld|zu|[dgs])", message)
    return re.compile(".*".join(map(re.escape, parts)), re.DOTALL)


@pytest.mark.skipif(not CORE.is_dir(), reason="needs the C sources")
def test_every_refusal_in_the_validator_has_a_row() -> None:
    seen = []
    for row in ROWS:
        with pytest.raises(row.error) as caught:
            row.run(row.call())
        seen.append(str(caught.value))
    sources = messages_in_source()
    assert len(sources) >= 40
    missing = {message for message in sources if not any(as_pattern(message).fullmatch(text) for text in seen)}
    assert missing - set(UNREACHABLE) == set()
    assert set(UNREACHABLE) <= sources
