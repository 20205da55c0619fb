"""Random shapes, dtypes, strides and options: the result is right, or the error names an argument. There is no third outcome."""

from __future__ import annotations

import re

import torch
from flash_attn_c import attention
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

import reference
from reference import allowance, worst_error

ARGUMENTS = ("q", "k", "v", "causal", "window", "scale", "softcap", "bias", "mask", "alibi_slopes", "sinks", "dropout_p", "block_mask",
             "block_size", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "layout",
             "deterministic")  # fmt: skip
REFUSALS = (TypeError, ValueError, NotImplementedError)
QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def names_an_argument(error: Exception) -> bool:
    return re.match(rf"({'|'.join(ARGUMENTS)})\b", str(error)) is not None


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@st.composite
def strided(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values of this shape in any order in memory, with gaps, at an offset, or with a dimension expanded."""
    order = draw(st.permutations(range(len(shape))))
    gap = draw(st.sampled_from([1, 1, 2, 3]))
    offset = draw(st.integers(0, 3))
    sizes = [shape[axis] for axis in order]
    t = normal((*sizes[:-1], sizes[-1] * gap + offset), dtype)[..., offset::gap]
    t = t.permute(sorted(range(len(shape)), key=order.__getitem__))
    axis = draw(st.integers(0, len(shape) - 1))
    if shape[axis] > 1 and draw(st.integers(0, 9)) == 0:
        t = t.narrow(axis, 0, 1).expand(shape)
    return t


@st.composite
def grids(draw, full: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to `full`."""
    shape = tuple(size if draw(st.booleans()) else 1 for size in full)
    return shape[draw(st.integers(0, 4)) :] if draw(st.booleans()) else shape


@st.composite
def lengths(draw, batch: int) -> list[int]:
    return draw(st.lists(st.integers(0, 70), min_size=batch, max_size=batch))


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def legal_calls(draw) -> dict:
    dtype = draw(st.sampled_from(DTYPES))
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    batch, group, heads_k = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim_qk, dim_v = draw(st.integers(1, 256)), draw(st.integers(1, 256))
    heads_q = heads_k * group
    call = dict(reference.DEFAULTS)
    if draw(st.booleans()):
        slots_q, slots_k = draw(lengths(batch)), draw(lengths(batch))
        shape_q, shape_k = (sum(slots_q), heads_q), (sum(slots_k), heads_k)
        longest = (max(slots_q, default=0), max(slots_k, default=0))
        for side, slots, bound in (("q", slots_q, longest[0]), ("k", slots_k, longest[1])):
            call[f"cu_seqlens_{side}"] = ints([sum(slots[:b]) for b in range(batch + 1)])
            call[f"max_seqlen_{side}"] = bound
    else:
        longest = (draw(st.integers(0, 140)), draw(st.integers(0, 140)))
        slots_q, slots_k = [longest[0]] * batch, [longest[1]] * batch
        call["layout"] = draw(st.sampled_from(["bshd", "bhsd"]))
        shape_q, shape_k = (batch, longest[0], heads_q), (batch, longest[1], heads_k)
        if call["layout"] == "bhsd":
            shape_q, shape_k = (batch, heads_q, longest[0]), (batch, heads_k, longest[1])
    full = (batch, heads_q, *longest)
    for side, slots in (("q", slots_q), ("k", slots_k)):
        if draw(st.integers(0, 3)) == 0:
            call[f"seqused_{side}"] = ints([draw(st.integers(0, size)) for size in slots])
    call["q"], call["k"] = draw(strided((*shape_q, dim_qk), dtype)), draw(strided((*shape_k, dim_qk), dtype))
    call["v"] = draw(strided((*shape_k, dim_v), dtype))
    call["causal"] = draw(st.sampled_from([False, True, "bottom_right", "top_left"]))
    bound = st.none() | st.integers(0, 150)
    call["window"] = draw(st.none() | st.tuples(bound, bound))
    call["scale"] = draw(st.none() | st.floats(-1, 1))
    call["softcap"] = draw(st.sampled_from([0.0, 0.0, 1.0, 20.0]))
    if draw(st.integers(0, 2)) == 0:
        call["bias"] = normal(draw(grids(full)), draw(st.sampled_from([dtype, statistic])) if dtype != torch.float64 else dtype)
    if draw(st.integers(0, 2)) == 0:
        call["mask"] = torch.rand(draw(grids(full))) < 0.7
    if draw(st.integers(0, 2)) == 0:
        call["alibi_slopes"] = torch.rand(draw(st.sampled_from([(heads_q,), (batch, heads_q)])), dtype=statistic)
    if draw(st.integers(0, 2)) == 0:
        call["sinks"] = normal((heads_q,), dtype)
    if draw(st.integers(0, 2)) == 0:
        size = draw(st.sampled_from([64, 128, 192]))
        blocks = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads_q])), -(-longest[0] // size), -(-longest[1] // size))
        call["block_mask"], call["block_size"] = torch.rand(blocks) < 0.6, size
    return call


def public_arguments(call: dict) -> dict:
    options = {name: value for name, value in call.items() if name not in ("rng", "block_size")}
    if isinstance(call["block_mask"], Tensor) and call["block_size"]:
        options["block_mask"] = (call["block_mask"], call["block_size"])
    return options


@QUICK
@given(legal_calls())
def test_a_legal_call_is_right(call: dict) -> None:
    dtype = call["q"].dtype
    out, lse = attention(**public_arguments(call), return_lse=True)
    ref, ref_lse = reference.attention(call)
    pt, _ = reference.attention(call, dtype)
    assert out.shape == ref.shape and out.dtype == dtype
    assert worst_error(out, ref) <= allowance("out", pt, ref, dtype)
    assert worst_error(lse, ref_lse) <= 1e-4


# Values that can never be right for the argument, whatever the rest of the call.
NAN, INF = float("nan"), float("inf")
NEVER = {
    "q": [None, 1.5, "q", [[1.0]], torch.zeros(3), torch.zeros(2, 2, 2, 2, 2)],
    "k": [None, 7, torch.zeros(1), torch.zeros(2, 2, 2, 2, 2)],
    "v": [None, "v", torch.zeros(1), torch.zeros(2, 2, 2, 2, 2)],
    "causal": ["left", 3.5, None],
    "window": [(-1, 0), (0, -1), (2**31, 0), (0.5, None), (1,), (1, 2, 3), "all", 4],
    "scale": [NAN, INF, -INF, "big"],
    "softcap": [-1.0, NAN, INF, None, "c"],
    "bias": [torch.zeros(1, 1, 1, 1, 1), torch.zeros(2, 141), torch.ones(1, dtype=torch.int64), 3.0],
    "mask": [torch.zeros(1, dtype=torch.float32), torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool), True],
    "alibi_slopes": [torch.zeros(100), torch.zeros(()), torch.zeros(1, dtype=torch.float16), 0.5],
    "sinks": [torch.zeros(100), torch.zeros(()), torch.zeros(1, dtype=torch.int32), 0.5],
    "dropout_p": [1.0, -0.1, 2, NAN, "half", None],
    "block_mask": [torch.ones(1, 1), torch.ones(1, 1, 99, 99, dtype=torch.bool), True],
    "cu_seqlens_q": [ints([]), ints([1, 2]), torch.zeros(2), torch.zeros(2, dtype=torch.int64), 5],
    "cu_seqlens_k": [ints([]), ints([1, 2]), torch.zeros(2), torch.zeros(2, dtype=torch.int64), 5],
    "seqused_q": [ints([-1]), ints([1] * 9), torch.zeros(1), 4],
    "seqused_k": [ints([-1]), ints([1] * 9), torch.zeros(1), 4],
    "max_seqlen_q": [-1, 2**40, 1.5, "max"],
    "max_seqlen_k": [-1, 2**40, 1.5, "max"],
    "layout": ["sbhd", None, 3],
}


@QUICK
@given(legal_calls(), st.data())
def test_an_illegal_value_is_refused_by_name(call: dict, data) -> None:
    name = data.draw(st.sampled_from(sorted(NEVER)))
    call[name] = data.draw(st.sampled_from(NEVER[name]))
    try:
        attention(**public_arguments(call))
    except REFUSALS as error:
        assert names_an_argument(error), f"{name}: {error}"
    else:
        raise AssertionError(f"{name}={call[name]!r} was accepted")


@QUICK
@given(legal_calls(), legal_calls(), st.data())
def test_two_calls_mixed_are_right_or_refused(call: dict, other: dict, data) -> None:
    """Arguments that are legal each, but not made for one another."""
    for name in data.draw(st.sets(st.sampled_from(sorted(call)), min_size=1, max_size=3)):
        call[name] = other[name]
    try:
        out = attention(**public_arguments(call))
    except REFUSALS as error:
        assert names_an_argument(error), error
        return
    ref = reference.attention(call)[0]
    pt = reference.attention(call, call["q"].dtype)[0]
    assert worst_error(out, ref) <= allowance("out", pt, ref, call["q"].dtype)
