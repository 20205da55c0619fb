"""scaled_dot_product_attention beside torch's own: results, gradients, strides, refusals; the patch; the offer to torch."""

from __future__ import annotations

import threading

import flash_attn_c
import pytest
import torch
import torch.nn.functional as F
from flash_attn_c import scaled_dot_product_attention, sdpa_patched, torch_impl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left


def rand(*shape, dtype=torch.float64, **kwargs):
    return torch.randn(*shape, dtype=dtype, **kwargs)


def torch_sdpa(*arguments, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


def bools(*shape):
    return torch.rand(shape) > 0.4


SHAPES = {
    "4d": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "2d": ((5, 8), (7, 8), (7, 6)),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "5d": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    "6d": ((1, 2, 3, 2, 5, 8), (2, 2, 3, 2, 7, 8), (1, 1, 3, 2, 7, 6)),
    "batch_broadcast": ((2, 4, 5, 8), (1, 4, 7, 8), (4, 7, 6)),
    "head_broadcast": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "query_broadcast": ((1, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "value_broadcast": ((2, 4, 5, 8), (2, 4, 7, 8), (7, 6)),
}
GQA = {
    "4d": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
    "3d": ((4, 5, 8), (2, 7, 8), (2, 7, 6)),
    "5d": ((3, 2, 4, 5, 8), (3, 2, 1, 7, 8), (3, 2, 1, 7, 6)),
    "unequal": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 6)),
    "batch_broadcast": ((2, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)),
    "same": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool": {"attn_mask": bools(5, 7)},
    "float": {"attn_mask": rand(5, 7)},
    "float_column": {"attn_mask": rand(1, 7)},
    "inf": {"attn_mask": torch.where(bools(5, 7), 0.0, -torch.inf).double()},
    "fp32": {"attn_mask": rand(5, 7, dtype=torch.float32)},
    "upper_left": {"attn_mask": causal_upper_left(5, 7)},
    "lower_right": {"attn_mask": causal_lower_right(5, 7)},
}


def compare(shapes, options, **more):
    leaves = [rand(shape).requires_grad_() for shape in shapes]
    mask = options.get("attn_mask")
    if type(mask) is torch.Tensor and mask.is_floating_point() and mask.isfinite().all():
        mask = mask.clone().requires_grad_()
        options = {**options, "attn_mask": mask}
    else:
        mask = None
    out = scaled_dot_product_attention(*leaves, **options, **more)
    expected = torch_sdpa(*leaves, **options, **more)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    wanted = leaves if mask is None else [*leaves, mask]
    seed = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, wanted, seed), torch.autograd.grad(expected, wanted, seed), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch(shapes, options):
    compare(shapes, options)


@pytest.mark.parametrize("shapes", GQA.values(), ids=GQA)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch_with_grouped_heads(shapes, options):
    if options.get("attn_mask") is OPTIONS["lower_right"]["attn_mask"]:
        pytest.skip("torch passes a CausalBias on without enable_gqa")
    compare(shapes, options, enable_gqa=True)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (2, 1, 5, 7), (1, 4, 1, 7), (4, 5, 1), (2, 1, 1, 7), (5, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_broadcast_shape(shape, kind):
    compare(SHAPES["4d"], {"attn_mask": bools(*shape) if kind == "bool" else rand(*shape)})


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 7), (3, 4, 5, 7), (3, 1, 5, 7), (4, 5, 7), (2, 1, 1, 1, 7)])
def test_masks_with_more_leading_dimensions(shape):
    compare(SHAPES["5d"], {"attn_mask": rand(*shape)})


def test_rows_masked_everywhere_are_zero_with_zero_gradients():
    q, k, v = (rand(2, 3, 4, 8).requires_grad_() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    for attn_mask in (mask, torch.where(mask, 0.0, -torch.inf).double()):
        out = scaled_dot_product_attention(q, k, v, attn_mask)
        assert not out[:, :, 1].any() and out[:, :, 0].all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert not grads[0][:, :, 1].any() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_and_their_masks(dtype):
    q, k, v = (rand(2, 3, 6, 16, dtype=dtype) for _ in range(3))
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for mask in (None, bools(6, 6), rand(6, 6, dtype=dtype), rand(6, 6, dtype=torch.float32)):
        out = scaled_dot_product_attention(q, k, v, mask)
        exact = torch_sdpa(q.double(), k.double(), v.double(), mask if mask is None or mask.dtype == torch.bool else mask.double())
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


def test_strides_follow_those_of_the_query():
    base = rand(2, 5, 4, 8)
    for q in (base, base.transpose(1, 2), base.permute(2, 0, 1, 3)):
        assert scaled_dot_product_attention(q, q, q).stride() == F.scaled_dot_product_attention(q, q, q).stride()


def test_dropout_applies_whenever_it_is_asked_for():
    q, k, v = (rand(1, 2, 64, 8) for _ in range(3))
    torch.manual_seed(3)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
    many = torch.stack([scaled_dot_product_attention(q, k, v, dropout_p=0.3) for _ in range(400)]).mean(0)
    torch.testing.assert_close(many, scaled_dot_product_attention(q, k, v), atol=0.12, rtol=0)
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


def r(*shape):
    return torch.zeros(shape)


PLAIN = (r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 7, 8))
REFUSALS = [
    ((r(8), r(8), r(8)), {}, "query: expected at least 2 dimensions, got 1"),
    ((r(2, 4, 5, 8), r(2, 2, 7, 8), r(2, 2, 7, 8)), {}, "enable_gqa=True"),
    ((r(2, 4, 5, 8), r(2, 3, 7, 8), r(2, 3, 7, 8)), {"enable_gqa": True}, "key: heads 3 must divide query's, 4"),
    ((r(5, 8), r(7, 8), r(7, 8)), {"enable_gqa": True, "attn_mask": r(5, 7)}, "query: expected at least 3 dimensions"),
    ((r(2, 4, 5, 8), r(3, 4, 7, 8), r(3, 4, 7, 8)), {}, r"leading dimensions \(2, 4\), \(3, 4\), \(3, 4\) must broadcast"),
    ((r(2, 4, 5, 8), r(2, 4, 7, 8).double(), r(2, 4, 7, 8)), {}, "key: dtype torch.float64 must equal query's, torch.float32"),
    ((r(2, 4, 5, 8), r(2, 4, 7, 9), r(2, 4, 7, 8)), {}, "key: head dim 9 must equal query's, 8"),
    ((r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 6, 8)), {}, "value: seqlen 6 must equal key's, 7"),
    ((r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 7, 8).to("meta")), {}, "value: device meta must equal query's, cpu"),
    (PLAIN, {"attn_mask": r(5, 7), "is_causal": True}, "attn_mask: must be None when is_causal=True"),
    (PLAIN, {"attn_mask": causal_lower_right(5, 7), "is_causal": True}, "CausalBias must not come with is_causal"),
    (PLAIN, {"attn_mask": causal_lower_right(4, 7)}, r"bias of size \(4, 7\) must match the seqlens \(5, 7\)"),
    (PLAIN, {"attn_mask": r(5, 7).int()}, "attn_mask: dtype torch.int32"),
    (PLAIN, {"attn_mask": r(5, 7).double()}, "attn_mask: dtype torch.float64"),
    (PLAIN, {"attn_mask": r(5, 6)}, r"attn_mask: shape \(5, 6\) must broadcast to \(2, 4, 5, 7\)"),
    (PLAIN, {"attn_mask": r(3, 4, 5, 7)}, r"attn_mask: shape \(3, 4, 5, 7\)"),
    (PLAIN, {"dropout_p": 1.5}, r"dropout_p: 1.5 must be in \[0, 1\]"),
    (PLAIN, {"dropout_p": -0.5}, "dropout_p: -0.5"),
]


@pytest.mark.parametrize("tensors, options, words", REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_refusals_are_of_the_kind_that_torch_raises(tensors, options, words):
    with pytest.raises(RuntimeError, match=words) as caught:
        scaled_dot_product_attention(*tensors, **options)
    assert isinstance(caught.value, ValueError)


def test_what_is_no_tensor_is_a_type_error():
    for arguments in (([1.0], PLAIN[1], PLAIN[2]), (PLAIN[0], None, PLAIN[2]), (*PLAIN, "mask")):
        with pytest.raises(TypeError, match=r"^(query|key|attn_mask): expected a torch tensor"):
            scaled_dot_product_attention(*arguments)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    function = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    q, k, v = (rand(2, 4, 6, 8).requires_grad_() for _ in range(3))
    for options in ({}, {"is_causal": True}, {"attn_mask": rand(6, 6)}, {"attn_mask": bools(4, 6, 6)}):
        out, expected = (f(q, k, v, **options) for f in (function, scaled_dot_product_attention))
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(o.sum(), q)[0] for o in (out, expected)))


def test_autocast():
    q, k, v = (rand(2, 4, 6, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(q, k.bfloat16(), v, rand(6, 6, dtype=torch.float32)).dtype == torch.bfloat16


# The patch


def test_patch_replaces_nests_and_restores():
    original = F.scaled_dot_product_attention
    with sdpa_patched():
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
        with pytest.raises(KeyError), sdpa_patched():
            raise KeyError
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
    assert F.scaled_dot_product_attention is original


def test_patch_from_several_threads_restores_after_the_last():
    original = F.scaled_dot_product_attention
    barrier = threading.Barrier(2)
    seen = []

    def worker(first):
        with sdpa_patched():
            barrier.wait(10)
            if first:
                return
            barrier_out.wait(10)
            seen.append(F.scaled_dot_product_attention)

    barrier_out = threading.Barrier(2)
    threads = [threading.Thread(target=worker, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    threads[0].join(10)
    barrier_out.wait(10)
    threads[1].join(10)
    assert seen == [scaled_dot_product_attention] and F.scaled_dot_product_attention is original


def test_patch_leaves_alone_what_somebody_else_put_in():
    original = F.scaled_dot_product_attention
    try:
        with sdpa_patched():
            F.scaled_dot_product_attention = theirs = lambda *_: None
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = original


def test_a_module_of_torch_runs_on_it(monkeypatch):
    from flash_attn_c import autograd

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).double()
    x = rand(2, 5, 16)
    expected = layer(x)
    calls = []
    real = autograd.attention
    monkeypatch.setattr(autograd, "attention", lambda *a: (calls.append(1), real(*a))[1])
    with sdpa_patched():
        torch.testing.assert_close(layer(x), expected)
    assert calls


# The offer to torch

needs_registry = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this torch knows no providers"
)


@needs_registry
def test_offered_to_torch_but_not_activated():
    assert flash_attn_c.register_torch_impl()
    assert "flash_attn_c" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None


@needs_registry
@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_activation_and_its_end():
    before = torch._C._dispatch_dump("aten::_flash_attention_forward")
    torch.nn.attention.activate_flash_attention_impl("flash_attn_c")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "flash_attn_c"
        assert torch._C._dispatch_dump("aten::_flash_attention_forward") != before
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert torch._C._dispatch_dump("aten::_flash_attention_forward") == before


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_operators_of_the_offer(dropout_p):
    q, k, v = (rand(2, 3, 6, 8).requires_grad_() for _ in range(3))
    torch.manual_seed(4)
    out, lse, _, _, max_q, max_k, state, unused, _ = torch_impl.sdpa_forward(q, k, v, dropout_p, True, scale=0.4)
    torch.manual_seed(4)
    expected, expected_lse = flash_attn_c.attention(q, k, v, layout="bhsd", causal=True, scale=0.4, dropout_p=dropout_p, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and (max_q, max_k) == (6, 6)
    seed = torch.randn_like(out)
    found = torch_impl.sdpa_backward(seed, q, k, v, out, lse, None, None, 6, 6, dropout_p, True, state, unused, scale=0.4)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), seed), strict=True):
        assert torch.equal(a, b)


def test_packed_operators_of_the_offer():
    q, k = rand(7, 2, 8).requires_grad_(), rand(9, 2, 8).requires_grad_()
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 3, 7], [0, 5, 9]))
    out, lse, state, unused, _ = torch_impl.flash_forward(
        q, k, k, cu_q, cu_k, 4, 5, 0.0, False, False, window_size_left=2, window_size_right=-1
    )
    expected = flash_attn_c.attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, window=(2, None))
    assert torch.equal(out, expected)
    dq, dk, dv = torch_impl.flash_backward(
        torch.ones_like(out), q, k, k, out, lse, cu_q, cu_k, 4, 5, 0.0, False, state, unused, window_size_left=2, window_size_right=-1
    )
    grads = torch.autograd.grad(expected.sum(), (q, k))
    assert torch.equal(dq, grads[0])
    torch.testing.assert_close(dk + dv, grads[1])


def test_operators_of_the_offer_refuse_by_name():
    q = rand(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="return_debug_mask"):
        torch_impl.sdpa_forward(q, q, q, return_debug_mask=True)
    with pytest.raises(NotImplementedError, match="block_table"):
        torch_impl.flash_forward(q, q, q, None, None, 4, 4, 0.0, False, False, block_table=torch.zeros(1, 1))
