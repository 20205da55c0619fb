"""Analytic against numerical derivatives in float64, for every differentiable input, through out and lse, feature by feature."""

from __future__ import annotations

import pytest
import torch
from flash_attn_c import attention, merge
from torch.autograd import gradcheck

DOUBLE = torch.float64


def random(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, device=device, requires_grad=True)


def ints(*values: int, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 1.5},
    "negative_scale": {"scale": -0.7},
    "zero_scale": {"scale": 0.0},
    "deterministic": {"deterministic": True},
    "dropout": {"dropout_p": 0.3},
    "causal+softcap+dropout": {"causal": True, "softcap": 1.5, "dropout_p": 0.2},
}
EXTRAS = {
    "none": {},
    "bias": {"bias": (2, 4, 5, 6)},
    "bias_keys": {"bias": (1, 1, 1, 6)},
    "bias_heads": {"bias": (4, 1, 6)},
    "alibi": {"alibi_slopes": (4,)},
    "alibi_batch": {"alibi_slopes": (2, 4)},
    "sinks": {"sinks": (4,)},
    "all": {"bias": (4, 5, 6), "alibi_slopes": (4,), "sinks": (4,)},
}


def check(device: str, options: dict, extras: dict, shapes=((2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2))) -> None:
    names = ("q", "k", "v", *extras)
    leaves = tuple(random(*shape, device=device) for shape in (*shapes, *extras.values()))

    def run(*tensors: torch.Tensor):
        torch.manual_seed(5)
        out, lse = attention(**dict(zip(names, tensors, strict=True)), **options, return_lse=True)
        return out, torch.where(lse.isinf(), 0, lse)

    assert gradcheck(run, leaves, nondet_tol=0.0 if options.get("deterministic") else 1e-13)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("extra", ["none", "all"])
def test_feature(device: str, feature: str, extra: str) -> None:
    check(device, FEATURES[feature], EXTRAS[extra])


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_input(device: str, extra: str) -> None:
    check(device, {"causal": True}, EXTRAS[extra])


def test_mask(device: str) -> None:
    mask = torch.rand(2, 1, 5, 6, device=device) < 0.6
    mask[0, 0, 2] = False
    check(device, {"mask": mask}, EXTRAS["all"])


def test_block_mask(device: str) -> None:
    blocks = torch.tensor([[[[True, False], [False, False]]]], device=device)
    shapes = ((1, 65, 1, 1), (1, 66, 1, 1), (1, 66, 1, 1))
    check(device, {"block_mask": (blocks, 64)}, {}, shapes)


def test_layout(device: str) -> None:
    check(device, {"layout": "bhsd", "causal": True}, EXTRAS["none"], ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)))


def test_used_lengths(device: str) -> None:
    used = {"seqused_q": ints(3, 5, device=device), "seqused_k": ints(6, 0, device=device)}
    check(device, {**used, "causal": True}, EXTRAS["all"])


def test_packed(device: str) -> None:
    lengths = {"cu_seqlens_q": ints(0, 2, 2, 7, device=device), "cu_seqlens_k": ints(0, 3, 5, 9, device=device)}
    options = {**lengths, "max_seqlen_q": 5, "max_seqlen_k": 4, "causal": True}
    extras = {"bias": (3, 1, 5, 4), "alibi_slopes": (3, 4), "sinks": (4,)}
    check(device, options, extras, ((7, 4, 3), (9, 2, 3), (9, 2, 2)))


def test_merge(device: str) -> None:
    """Two halves of the keys put together are the whole, in value and in every derivative."""
    q, k, v = random(1, 4, 2, 3, device=device), random(1, 7, 2, 3, device=device), random(1, 7, 2, 3, device=device)

    def halves(q, k, v):
        return merge(*attention(q, k[:, :3], v[:, :3], return_lse=True), *attention(q, k[:, 3:], v[:, 3:], return_lse=True))

    whole = attention(q, k, v, return_lse=True)
    for got, expected in zip(halves(q, k, v), whole, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)
    assert gradcheck(halves, (q, k, v), nondet_tol=1e-13)


def test_merge_with_a_side_that_saw_nothing(device: str) -> None:
    q, k, v = random(1, 4, 2, 3, device=device), random(1, 7, 2, 3, device=device), random(1, 7, 2, 3, device=device)
    seen = attention(q, k, v, return_lse=True)
    unseen = attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert torch.equal(merge(*seen, *unseen)[0], seen[0]) and torch.equal(merge(*unseen, *seen)[1], seen[1])
    out, lse = merge(*unseen, *unseen)
    assert (out == 0).all() and (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(merge(*seen, *unseen)[0].sum(), (q, k, v)):
        assert gradient.isfinite().all()
