"""Where lengths, sizes, strides and numbers end: zero sizes, huge sizes, views, and infinities."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from flash_attn_c import attention
from torch import Tensor

import binding
import reference
from cases import Case, build, embed

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def make(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def gradients_of(inputs: tuple[Tensor, ...], **options) -> list[Tensor]:
    out, lse = attention(*inputs, return_lse=True, **options)
    found = torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)])
    return [out, lse, *found]


# Nothing to do, or nothing to see.


def test_no_keys(device: str) -> None:
    out, lse, dq, dk, dv = gradients_of((make(device, 2, 5, 4, 16), make(device, 2, 0, 2, 16), make(device, 2, 0, 2, 8)))
    assert out.shape == (2, 5, 4, 8) and (out == 0).all()
    assert (lse == -torch.inf).all() and (dq == 0).all()
    assert dk.shape == (2, 0, 2, 16) and dv.shape == (2, 0, 2, 8)


def test_no_keys_with_a_sink(device: str) -> None:
    q, k, sinks = make(device, 2, 5, 4, 16), make(device, 2, 0, 4, 16), make(device, 4)
    out, lse = attention(q, k, k, sinks=sinks, return_lse=True)
    assert (out == 0).all() and torch.equal(lse, sinks[None, :, None].expand(2, 4, 5))
    (dsinks,) = torch.autograd.grad(lse.sum(), sinks)
    assert torch.equal(dsinks, torch.full_like(sinks, 10.0))


def test_no_queries(device: str) -> None:
    out, lse, dq, dk, dv = gradients_of((make(device, 2, 0, 4, 16), make(device, 2, 7, 2, 16), make(device, 2, 7, 2, 8)))
    assert out.shape == (2, 0, 4, 8) and lse.shape == (2, 4, 0) and dq.shape == (2, 0, 4, 16)
    assert (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_no_batch(device: str, layout: str) -> None:
    shapes = ((0, 5, 4, 16), (0, 7, 2, 16), (0, 7, 2, 8))
    shapes = shapes if layout == "bshd" else tuple((b, h, s, d) for b, s, h, d in shapes)
    out, lse, *found = gradients_of(tuple(make(device, *shape) for shape in shapes), layout=layout)
    assert out.numel() == lse.numel() == 0 and lse.shape == (0, 4, 5)
    assert [g.shape for g in found] == [torch.Size(s) for s in shapes]


def test_no_batch_sums_to_zero(device: str) -> None:
    """What is shared over an empty batch has gradient 0, not garbage."""
    call = {**reference.DEFAULTS, "q": torch.empty(0, 5, 4, 8, device=device), "causal": True}
    call.update(k=call["q"][:, :, :2], v=call["q"][:, :, :2], dout=call["q"], dlse=None)
    call.update(bias=torch.randn(4, 5, 5, device=device), alibi_slopes=torch.rand(4, device=device), sinks=torch.randn(4, device=device))
    found = binding.backward(call, *binding.forward(call))
    assert all((found[name] == 0).all() for name in ("bias", "alibi_slopes", "sinks"))


def test_no_sequences(device: str) -> None:
    """Packed tokens that belong to no sequence are padding."""
    none = torch.zeros(1, dtype=torch.int32, device=device)
    inputs = (make(device, 3, 2, 8), make(device, 4, 2, 8), make(device, 4, 2, 8))
    out, lse, *found = gradients_of(inputs, cu_seqlens_q=none, cu_seqlens_k=none)
    assert (out == 0).all() and (lse == -torch.inf).all() and all((g == 0).all() for g in found)


def test_tokens_after_the_last_sequence_are_padding(device: str) -> None:
    call = build(Case("slack", lengths=((17, 20), (70, 90)), causal=True, bias="bhmn", sinks=True), device)
    longer = {**call, "dlse": torch.nn.functional.pad(call["dlse"], (0, 9), value=float("nan"))}
    for name in ("q", "k", "v", "dout"):
        longer[name] = torch.cat([call[name], torch.full_like(call[name][:9], float("nan"))])
    out, lse = binding.forward(call)
    found = binding.backward(call, out, lse)
    out_longer, lse_longer = binding.forward(longer)
    found_longer = binding.backward(longer, out_longer, lse_longer)
    assert torch.equal(out_longer[:-9], out) and (out_longer[-9:] == 0).all()
    assert torch.equal(lse_longer[:, :-9], lse) and (lse_longer[:, -9:] == -torch.inf).all()
    for name in "qkv":
        assert torch.equal(found_longer[name][:-9], found[name]) and (found_longer[name][-9:] == 0).all()
    assert torch.equal(found_longer["bias"], found["bias"]) and torch.equal(found_longer["sinks"], found["sinks"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(device: str, dtype: torch.dtype) -> None:
    """More queries than keys under a causal mask: the first rows see no key, and leave no trace."""
    inputs = tuple(make(device, 2, n, 2, 16, dtype=dtype) for n in (150, 70, 70))
    out, lse, dq, *rest = gradients_of(inputs, causal=True)
    assert (out[:, :80] == 0).all() and (lse[:, :, :80] == -torch.inf).all() and (dq[:, :80] == 0).all()
    tail = gradients_of((inputs[0][:, 80:].detach().requires_grad_(), *inputs[1:]), causal=True)
    assert torch.allclose(out[:, 80:], tail[0], rtol=1e-3, atol=1e-3)
    for got, expected in zip(rest, tail[3:], strict=True):
        assert torch.allclose(got, expected, rtol=1e-2, atol=1e-2)


def test_mask_of_all_false(device: str) -> None:
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    out, lse, *found = gradients_of(tuple(make(device, 2, 70, 2, 16) for _ in range(3)), mask=mask)
    assert (out == 0).all() and (lse == -torch.inf).all() and all((g == 0).all() for g in found)


# Views.


def views(t: Tensor) -> dict[str, Tensor]:
    """The same values under other strides and offsets."""
    orders = ((3, 2, 1, 0), (2, 0, 1, 3), (1, 3, 0, 2))
    permuted = {f"order{order}": t.permute(order).contiguous().permute(inverse(order)) for order in orders}
    return {**permuted, "rows": embed(t, "rows"), "last": embed(t, "last")}


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_equal_their_copies_bitwise(device: str, dtype: torch.dtype) -> None:
    """On a GPU one of the two may run on a faster kernel or on larger tiles: then equal within rounding."""
    case = Case("views", dtype=str(dtype).split(".")[1], heads_q=4, heads_k=2, dim_qk=40, dim_v=24, causal=True, deterministic=True)
    call = build(case, device)
    rounding = 1e-2 if dtype.itemsize == 2 else 1e-5
    tolerance = dict.fromkeys(("rtol", "atol"), 0 if device == "cpu" else rounding)
    out, lse = binding.forward(call)
    found = binding.backward(call, out, lse)
    kinds = list(views(call["q"]))
    for n in range(len(kinds)):
        mixed = dict(call)
        for m, name in enumerate(("q", "k", "v", "dout")):
            mixed[name] = views(call[name])[kinds[(n + m) % len(kinds)]]
            assert torch.equal(mixed[name].nan_to_num(9.0), call[name].nan_to_num(9.0))
        got_out, got_lse = binding.forward(mixed, "rows")
        torch.testing.assert_close(got_out, out, **tolerance)
        torch.testing.assert_close(got_lse, lse, **tolerance)
        for name, gradient in binding.backward(mixed, got_out, got_lse, "last").items():
            torch.testing.assert_close(gradient, found[name], **tolerance)


def test_expanded_inputs_equal_their_copies_bitwise(device: str) -> None:
    q, k = torch.randn(1, 70, 1, 32, device=device).expand(3, 70, 4, 32), torch.randn(3, 1, 2, 32, device=device).expand(3, 90, 2, 32)
    bias = torch.randn(1, 1, 70, 1, device=device).expand(3, 4, 70, 90)
    slopes = torch.rand(1, 1, device=device).expand(3, 4)
    options = {"bias": bias, "alibi_slopes": slopes, "causal": True}
    copies = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in options.items()}
    assert torch.equal(attention(q, k, k, **options), attention(q.contiguous(), k.contiguous(), k.contiguous(), **copies))


def test_bias_views_equal_their_copies_bitwise(device: str) -> None:
    q = torch.randn(2, 70, 4, 16, device=device)
    bias = torch.randn(70, 4, 2, 70, device=device).permute(2, 1, 3, 0)
    mask = (torch.rand(70, 2, 70, device=device) < 0.8).permute(1, 2, 0)[:, None]
    viewed = attention(q, q, q, bias=bias, mask=mask)
    assert torch.equal(viewed, attention(q, q, q, bias=bias.contiguous(), mask=mask.contiguous()))


# Many and large.


@pytest.mark.parametrize("shape", [(1, 3, 70001, 4), (70001, 3, 1, 4)], ids=["heads", "batch"])
def test_more_than_65535(device: str, shape: tuple[int, ...]) -> None:
    inputs = tuple(make(device, *shape) for _ in range(3))
    got = gradients_of(inputs, causal=True)
    call = {**reference.DEFAULTS, **dict(zip("qkv", inputs, strict=True)), "causal": True}
    if shape[0] > 1:  # the reference goes one sequence at a time: give it heads instead
        call.update({name: t.transpose(0, 2) for name, t in zip("qkv", inputs, strict=True)})
    ones = torch.ones_like(call["q"])
    out, _, expected = reference.attention_with_gradients(call, ones, torch.ones(1, 70001, 3, device=device))
    for a, b in zip((got[0], *got[2:]), (out, *expected.values()), strict=True):
        b = b if b.shape == a.shape else b.transpose(0, 2)
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


def available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    return int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024 if meminfo.exists() else 0


@pytest.mark.skipif(available_bytes() < 8 * 2**30, reason="needs 8 GiB of free memory")
def test_more_than_2_to_the_31_elements() -> None:
    """Queries of 2^31 elements and more: rows sampled below, at and beyond 2^31 are right, the untouched rest is that of zeros."""
    rows, dim = 2**23 + 5, 256
    q = torch.zeros(1, rows, 1, dim, dtype=torch.float16)
    k, v = torch.randn(1, 3, 1, dim).half(), torch.randn(1, 3, 1, 1).half()
    sampled = [0, 1, rows // 2 - 1, rows // 2, 2**23 - 1, 2**23, 2**23 + 1, rows - 1]
    q[0, sampled] = torch.randn(len(sampled), 1, dim).half()
    out = attention(q, k, v)
    score = torch.einsum("mhd,nhd->hmn", q[0, sampled].double(), k[0].double()) * dim**-0.5
    expected = (score.softmax(-1) @ v[0].double().transpose(0, 1)).transpose(0, 1)
    assert torch.allclose(out[0, sampled].double(), expected, rtol=2e-3, atol=2e-3)
    rest = torch.tensor([5, rows // 3, 2**23 - 7, rows - 2])
    assert torch.allclose(out[0, rest].double(), v.double().mean(), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(available_bytes() < 8 * 2**30, reason="needs 8 GiB of free memory")
def test_strides_beyond_2_to_the_31() -> None:
    """Few rows, far apart: every offset is computed in 64 bits, for inputs, outputs and gradients."""
    apart = 2**30 + 3
    buffer = torch.zeros(2 * apart + 64, dtype=torch.float16)  # touched in a few pages only
    far = buffer.as_strided((1, 3, 1, 16), (0, apart, 0, 1))
    values = torch.randn(1, 3, 1, 16).half()
    far.copy_(values)
    call = {**reference.DEFAULTS, **dict.fromkeys("qkv", values), "dout": values, "dlse": None, "causal": True}
    out, lse = binding.forward(call)
    found = binding.backward(call, out, lse)
    distant = {**call, **dict.fromkeys(("q", "k", "v", "dout"), far)}
    far_out = buffer.as_strided((1, 3, 1, 16), (0, apart, 0, 1), 32)
    binding.raw_forward({**distant, "out": far_out, "lse": lse})
    assert torch.equal(far_out, out)
    for name in "qkv":
        target = buffer.as_strided((1, 3, 1, 16), (0, apart, 0, 1), 48)
        binding.raw_backward({**distant, "out": far_out, "lse": lse, f"d{name}": target})
        assert torch.equal(target, found[name])


# Numbers.


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_times_1000(device: str, dtype: torch.dtype) -> None:
    """Scores in the thousands: the softmax is all but one-hot, and nothing overflows."""
    inputs = tuple(make(device, 1, 90, 2, 64, dtype=dtype) for _ in range(3))
    got = gradients_of(inputs, scale=1000.0 / 8)
    assert all(t.isfinite().all() for t in got)
    call = {**reference.DEFAULTS, **dict(zip("qkv", inputs, strict=True)), "scale": 1000.0 / 8}
    out, lse = reference.attention(call)
    assert torch.allclose(got[1].double(), lse, rtol=1e-5)
    one_hot = (lse.unsqueeze(-1) - torch.einsum("bmhd,bnhd->bhmn", inputs[0].double(), inputs[1].double()) * 125).amin(-1) < 1e-3
    assert one_hot.any()
    clear = one_hot.transpose(1, 2)
    assert torch.allclose(got[0].double()[clear], out[clear], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_in_bias_is_a_mask(device: str, dtype: torch.dtype) -> None:
    q, k, v = (make(device, 2, 90, 2, 32, dtype=dtype) for _ in range(3))
    mask = torch.rand(2, 1, 90, 90, device=device) < 0.5
    mask[:, :, 7] = False
    bias = torch.zeros(2, 1, 90, 90, device=device, dtype=dtype).masked_fill(~mask, -torch.inf)
    for got, expected in zip(gradients_of((q, k, v), bias=bias), gradients_of((q, k, v), mask=mask), strict=True):
        assert torch.equal(got, expected)


def test_plus_infinity_in_bias_spoils_its_row_alone(device: str) -> None:
    q, k, v = (make(device, 1, 90, 2, 32) for _ in range(3))
    bias = torch.zeros(90, 90, device=device)
    clean = attention(q, k, v, bias=bias)
    bias[40, 11] = torch.inf
    out = attention(q, k, v, bias=bias)
    assert out[:, 40].isnan().all()
    others = [i for i in range(90) if i != 40]
    assert torch.equal(out[:, others], clean[:, others])


def test_large_values_in_low_precision(device: str) -> None:
    """fp16 inputs whose products exceed fp16: scores are kept in float32."""
    q, k, v = (make(device, 1, 70, 1, 64, dtype=torch.float16) * 200 for _ in range(3))
    assert attention(q, k, v).isfinite().all()


# Repeats.


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_bitwise_equal(device: str, dtype: torch.dtype) -> None:
    inputs = tuple(make(device, 2, 200, 4, 32, dtype=dtype) for _ in range(3))
    first = gradients_of(inputs, causal=True, deterministic=True)
    for _ in range(5):
        for a, b in zip(first, gradients_of(inputs, causal=True, deterministic=True), strict=True):
            assert torch.equal(a, b)


def test_results_do_not_depend_on_the_thread_count() -> None:
    inputs = tuple(make("cpu", 2, 200, 4, 32) for _ in range(3))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients_of(inputs, causal=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_caps_of_any_size(device: str, dtype: torch.dtype) -> None:
    """A cap far above every score changes nothing, one far below makes every score 0."""
    q, k, v = (torch.randn(1, 9, 2, 16, device=device).to(dtype) for _ in range(3))
    plain, even = attention(q, k, v, causal=True), attention(q, k, v, causal=True, scale=0.0)
    rounding = 2e-2 if dtype.itemsize == 2 else 2e-5
    for cap in (1e4, 1e6, 1e12, 1e37, 1e300):
        torch.testing.assert_close(attention(q, k, v, causal=True, softcap=cap), plain, rtol=rounding, atol=rounding)
    torch.testing.assert_close(attention(q, k, v, causal=True, softcap=1e-188), even, rtol=rounding, atol=rounding)
