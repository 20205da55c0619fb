"""Dropout: which entries go is a function of (seed, offset, batch, head, row, column) alone, the same forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flash_attn_c import attention
from torch import Tensor

import binding
import reference
from reference import dropout_keep, philox

RNG = (0xDEADBEEF12345678, 2**40 + 17)


def call_of(device: str, dtype=torch.float32, p: float = 0.3, rng=RNG, shape=(2, 37, 150, 4, 2), dim: int = 16, **options) -> dict:
    batch, seqlen_q, seqlen_k, heads_q, heads_k = shape
    q = torch.randn(batch, seqlen_q, heads_q, dim, device=device).to(dtype)
    k = torch.randn(batch, seqlen_k, heads_k, dim, device=device).to(dtype)
    return {**reference.DEFAULTS, "q": q, "k": k, "v": k, "dropout_p": p, "rng": rng, **options}


def kept_entries(call: dict) -> Tensor:
    """What the engine keeps, (batch, heads, len_q, len_k), read off with values that are columns of the identity matrix, 256 at a time."""
    batch, seqlen_k, heads_k, _ = call["k"].shape
    kept = []
    for start in range(0, seqlen_k, 256):
        width = min(256, seqlen_k - start)
        v = torch.zeros(seqlen_k, width, dtype=call["q"].dtype, device=call["q"].device)
        v[start : start + width] = torch.eye(width)
        v = v[None, :, None].expand(batch, seqlen_k, heads_k, width)
        out, _ = binding.forward({**call, "v": v})
        kept.append(out.transpose(1, 2) != 0)
    return torch.cat(kept, dim=-1).cpu()


def expected_entries(call: dict) -> Tensor:
    heads, seqlen_q = call["q"].shape[2], call["q"].shape[1]
    return torch.stack([dropout_keep(call["dropout_p"], RNG, b, heads, seqlen_q, call["k"].shape[1]) for b in range(call["q"].shape[0])])


def test_philox_known_answers() -> None:
    """From the published test vectors of Philox 4x32-10."""
    ones = 0xFFFFFFFF
    assert [int(w) for w in philox((0, 0), (0, 0, 0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox((ones, ones), (ones,) * 4)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_mask_is_the_documented_function(device: str, dtype: torch.dtype, p: float) -> None:
    call = call_of(device, dtype, p)
    assert torch.equal(kept_entries(call), expected_entries(call))


def test_mask_over_many_tiles(device: str) -> None:
    call = call_of(device, shape=(1, 300, 700, 2, 1), dim=8)
    assert torch.equal(kept_entries(call), expected_entries(call))


def test_mask_under_causal_is_the_same_where_visible(device: str) -> None:
    call = call_of(device, shape=(1, 140, 140, 2, 2), causal=True)
    assert torch.equal(kept_entries(call), expected_entries(call) & torch.ones(140, 140, dtype=torch.bool).tril())


def test_rng_state_may_be_a_tensor(device: str) -> None:
    call = call_of(device)
    state = torch.tensor([RNG[0] - 2**64, RNG[1]], dtype=torch.int64, device=device)  # the same bits, signed
    assert torch.equal(binding.forward(call)[0], binding.forward({**call, "rng": state})[0])


def test_every_bit_of_seed_and_offset_counts() -> None:
    base = call_of("cpu", p=0.5)
    masks = {kept_entries(base).numpy().tobytes()}
    for bit in (0, 31, 32, 62):
        masks.add(kept_entries({**base, "rng": (RNG[0] ^ (1 << bit), RNG[1])}).numpy().tobytes())
        masks.add(kept_entries({**base, "rng": (RNG[0], RNG[1] ^ (1 << bit))}).numpy().tobytes())
    assert len(masks) == 9


def test_statistics() -> None:
    """Of the function that the engines are held to: rate, and no correlation along rows, columns, heads, batch or offset."""
    p, n = 0.25, 512
    keep = np.stack([dropout_keep(p, (7, offset), b, 2, n, n).numpy() for b in range(2) for offset in range(2)]).astype(np.float64)
    count = keep.size
    assert abs(keep.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    centred = keep - (1 - p)
    for axis in range(4):
        shifted = (centred * np.roll(centred, 1, axis)).mean() / (p * (1 - p))
        assert abs(shifted) < 6 / count**0.5, axis


def test_backward_uses_the_mask_of_forward(device: str) -> None:
    """out is linear in v, so <out, dout> = <v, dv> for any v: only with one mask on both sides."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        call = call_of(device, dtype, p=0.4, causal=True)
        call["v"] = torch.randn_like(call["k"])
        call["dout"] = torch.randn_like(call["q"])
        out, lse = binding.forward(call)
        dv = binding.backward(call, out, lse)["v"]
        left, right = float((out * call["dout"]).double().sum()), float((call["v"] * dv).double().sum())
        assert abs(left - right) <= tolerance * float((out * call["dout"]).abs().sum())


def test_lse_is_that_without_dropout(device: str) -> None:
    """But for its last bits on a GPU: without dropout there may be other tiles."""
    call = call_of(device)
    with_dropout, without = binding.forward(call)[1], binding.forward({**call, "dropout_p": 0.0})[1]
    assert torch.allclose(with_dropout, without, rtol=0, atol=0 if device == "cpu" else 1e-6 * float(without.abs().max()))


def test_p_near_the_ends(device: str) -> None:
    call = call_of(device, torch.float64)
    plain, _ = binding.forward({**call, "dropout_p": 0.0})
    assert torch.allclose(binding.forward({**call, "dropout_p": 1e-11})[0], plain, rtol=1e-10)
    tiny = 2.0**-32  # the finest step there is: one word in 2^32
    assert torch.allclose(binding.forward({**call, "dropout_p": tiny})[0], plain, rtol=1e-8)
    nearly_all = {**call, "dropout_p": 1 - 2.0**-20}
    assert torch.equal(kept_entries(nearly_all), expected_entries(nearly_all))
    out, lse = binding.forward({**call, "dropout_p": 1 - 2.0**-53})
    assert out.isfinite().all() and lse.isfinite().all()


def test_default_generator_rules(device: str) -> None:
    """torch.manual_seed repeats a run, the next call draws anew, and no dropout draws nothing."""
    q = torch.randn(1, 40, 2, 16, device=device)

    def run(p: float = 0.5) -> Tensor:
        return attention(q, q, q, dropout_p=p)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    run(0.0)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    assert not torch.equal(first, second)


def test_autograd_uses_the_mask_of_its_forward(device: str) -> None:
    """Other draws between forward and backward change nothing."""
    q, k, v = (torch.randn(2, 50, 2, 16, device=device, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, dropout_p=0.5)
    torch.rand(1000, device=device)
    attention(q, k, v, dropout_p=0.5)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.allclose((out * dout).sum(), (v * dv).sum(), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probs(device: str, dtype: torch.dtype) -> None:
    """exp(score - row max), unnormalised, with the sign bit set where dropped, finite over the whole padded matrix."""
    call = call_of(device, dtype, causal=True, shape=(2, 70, 150, 4, 2))
    probs = torch.full((2, 4, 128, 256), float("nan"), dtype=dtype, device=device)
    binding.raw_forward({**binding.allocate(call), "probs": probs})
    assert probs.isfinite().all()
    probs = probs.cpu()[:, :, :70, :150]
    score = torch.einsum("bmhd,bnhd->bhmn", call["q"].double(), call["k"].repeat_interleave(2, 2).double()).cpu() * 16**-0.5
    visible = torch.ones(70, 150, dtype=torch.bool).tril(80)
    score = score.masked_fill(~visible, -torch.inf)
    expected = torch.exp(score - score.amax(-1, keepdim=True))
    assert torch.allclose(probs.abs().double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)
    seen = (expected > 1e-4) & visible
    assert torch.equal(torch.signbit(probs)[seen], ~expected_entries(call)[seen])
