"""As a citizen of torch: the direct path and the custom ops agree, and compile, autocast, checkpointing, transforms and other modes work
or are refused by name."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from flash_attn_c import attention, autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

FORWARD_OP = torch.ops.flash_attn_c.fwd.default


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def inputs(dtype=torch.float64, dim_v=6):
    return [t.requires_grad_() for t in (rand(2, 5, 4, 8, dtype=dtype), rand(2, 7, 2, 8, dtype=dtype), rand(2, 7, 2, dim_v, dtype=dtype))]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left", "softcap": 1.5, "scale": 0.2},
    "window": {"window": (3, 1)},
    "bias": {"bias": rand(1, 4, 5, 7).requires_grad_(), "return_lse": True},
    "bias_broadcast": {"bias": rand(4, 1, 7).requires_grad_()},
    "mask": {"mask": torch.rand(2, 1, 5, 7) > 0.3},
    "alibi": {"alibi_slopes": torch.rand(4, dtype=torch.float64).requires_grad_()},
    "sinks": {"sinks": rand(4).requires_grad_(), "return_lse": True},
    "block_mask": {"block_mask": (torch.ones(1, 4, 1, 1, dtype=torch.bool), 64)},
    "seqused": {"seqused_q": int32(5, 2), "seqused_k": int32(7, 3)},
    "dropout": {"dropout_p": 0.4},
    "everything": {"causal": True, "bias": rand(2, 4, 5, 7).requires_grad_(), "mask": torch.rand(5, 7) > 0.3, "dropout_p": 0.2,
                   "sinks": rand(4).requires_grad_(), "return_lse": True},
}  # fmt: skip


def run(function, leaves, options):
    """Outputs and gradients, with the same random state each time."""
    torch.manual_seed(11)
    result = function(*leaves, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    wanted = [*leaves, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    seeds = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, seeds)]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# The options of the ops, none of them set.
OPTIONS = ("none", None, None, None, 0.0, 0.0, 0, None, None, "bshd", False)


def compiled(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


# The two paths


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_direct_path_and_ops_agree(options, layout, monkeypatch):
    leaves = inputs()
    if layout == "bhsd":
        leaves = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in leaves]
    call = functools.partial(attention, layout=layout)
    direct = run(call, leaves, options)
    monkeypatch.setattr(autograd, "is_direct", lambda *_: False)
    assert_same_bits(run(call, leaves, options), direct)


def test_plain_calls_do_not_meet_the_dispatcher(monkeypatch):
    monkeypatch.setattr(autograd, "_through_dispatcher", None)
    q, k, v = inputs()
    attention(q, k, v, causal=True).sum().backward()
    attention(torch.nn.Parameter(q.detach()), k, v)
    with torch.no_grad(), torch.inference_mode():
        attention(q, k, v)


def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    q, k, v = inputs()
    asked = []
    real = autograd.calls.backward
    monkeypatch.setattr(autograd.calls, "backward", lambda *a: (asked.append([g is not None for g in a[-1]]), real(*a))[1])
    attention(q, k.detach(), v, sinks=rand(4)).sum().backward()
    assert asked == [[True, False, True, False, False, False]] and k.grad is None
    assert not attention(*(t.detach() for t in (q, k, v))).requires_grad
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


def test_out_keeps_the_memory_order_of_q():
    base = rand(3, 2, 5, 8)
    for q in (base, base.transpose(1, 2), base.permute(2, 0, 1, 3), base[:, :, ::2], base[:1].expand(3, -1, -1, -1)):
        for dim_v in (8, 4, 12):
            v = rand(*q.shape[:-1], dim_v)
            out = attention(q, q, v)
            order = sorted(range(4), key=q.stride, reverse=True)
            assert 0 in q.stride() or out.permute(order).is_contiguous()
            expected = attention(*(t.contiguous() for t in (q, q, v)))
            assert torch.equal(out, expected)
            assert_same_bits(torch.ops.flash_attn_c.fwd(q, q, v, *(None,) * 10, *OPTIONS, False)[:1], [out])


def test_gradients_through_lse_and_through_only_one_output():
    q, k, v = inputs()
    out, lse = attention(q, k, v, return_lse=True)
    both = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), retain_graph=True)
    of_out = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    of_lse = torch.autograd.grad(lse.sum(), (q, k, v))
    for whole, a, b in zip(both, of_out, of_lse, strict=True):
        torch.testing.assert_close(whole, a + b)
    assert not of_lse[2].any()


def test_expanded_and_strided_gradients_coming_in():
    q, k, v = inputs()
    out = attention(q, k, v)
    ones = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, q, torch.ones(()).double().expand(out.shape), retain_graph=True)[0], ones)
    wide = torch.ones(*out.shape[:-1], 2 * out.shape[-1], dtype=out.dtype)
    assert torch.equal(torch.autograd.grad(out, q, wide[..., ::2])[0], ones)


def test_a_changed_input_is_noticed_in_the_backward_pass():
    q, k, v = inputs()
    out = attention(q * 1.0, scaled := k * 1.0, v)
    scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Random numbers


def test_dropout_follows_torch_manual_seed():
    q = rand(1, 32, 2, 8)
    torch.manual_seed(1)
    first, second = (attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(attention(q, q, q, dropout_p=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    attention(q, q, q)
    assert torch.equal(torch.get_rng_state(), state)


# Autocast, checkpointing, modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_torch(dtype):
    q, k, v = (t.float().detach().requires_grad_() for t in inputs(dim_v=8))
    bias = rand(4, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out, lse = attention(q, k.to(dtype), v, bias=bias, return_lse=True)
        reference = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2))
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert out.dtype == reference.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert_same_bits([compiled(attention)(q, k, v)], [attention(q, k, v)])


def save_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is FORWARD_OP else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "plain": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, save_attention)},
    "selective_list": {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, [FORWARD_OP])},
}


@pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_activation_checkpointing(how):
    def block(q, k, v):
        return attention(q * 2, k, v, dropout_p=0.3).square()

    leaves = inputs()
    found = []
    for function in (block, lambda *t: checkpoint(block, *t, **how)):
        torch.manual_seed(11)
        out = function(*leaves)
        out.sum().backward()
        found.append([out, *(t.grad for t in leaves)])
        for t in leaves:
            t.grad = None
    assert_same_bits(*found)


def test_selective_checkpointing_does_not_run_attention_twice(monkeypatch):
    count = []
    real = autograd.calls.forward
    monkeypatch.setattr(autograd.calls, "forward", lambda *a: (count.append(1), real(*a))[1])
    q, k, v = inputs()
    checkpoint(lambda q: attention(q * 2, k, v).square(), q, **CHECKPOINTS["selective"]).sum().backward()
    assert len(count) == 1
    checkpoint(lambda q: attention(q * 2, k, v).square(), q, **CHECKPOINTS["plain"]).sum().backward()
    assert len(count) == 3


def test_saved_tensor_hooks_see_what_is_saved():
    q, k, v = inputs()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t.clone())[1], lambda t: t):
        out = attention(q, k, v, causal=True)
    assert len(seen) == 5
    assert_same_bits(torch.autograd.grad(out.sum(), q), torch.autograd.grad(attention(q, k, v, causal=True).sum(), q))


def test_dispatch_and_function_modes_see_the_op():
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q, k, v = inputs()
    with Dispatch():
        attention(q, k, v).sum().backward()
    assert FORWARD_OP in seen and torch.ops.flash_attn_c.bwd.default in seen
    seen.clear()
    with Function():
        attention(q, k, v)
    assert torch.ops.flash_attn_c.fwd in seen or FORWARD_OP in seen


def test_modules_with_attention_copy_and_trace():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(rand(1, 4, 2, 8))

        def forward(self, x):
            return attention(self.weight * x, self.weight, self.weight)

    model = Model()
    x = rand(1, 4, 2, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
    assert torch.equal(traced(2 * x), model(2 * x))


def test_subclass_with_torch_function_is_respected():
    class Tagged(torch.Tensor):
        pass

    q = rand(1, 4, 2, 8)
    out = attention(q.as_subclass(Tagged), q, q)
    assert torch.equal(out.as_subclass(torch.Tensor), attention(q, q, q))


# Derivatives that are not ordinary


def test_second_derivative_is_refused_in_words_and_first_with_create_graph_works():
    q, k, v = inputs()
    for path in (attention, compiled(attention)):
        out = path(q, k, v, bias=None)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True) if path is attention else torch.autograd.grad(out.sum(), q)
        assert torch.equal(grad.detach(), torch.autograd.grad(attention(q, k, v).sum(), q)[0])
        if path is attention:
            with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
                grad.square().sum().backward()


def test_function_transforms():
    q, k, v = (t.detach() for t in inputs())
    sinks = rand(4)
    found = torch.func.grad(lambda q, s: attention(q, k, v, sinks=s, causal=True).square().sum(), argnums=(0, 1))(q, sinks)
    leaves = [q.clone().requires_grad_(), sinks.clone().requires_grad_()]
    attention(leaves[0], k, v, sinks=leaves[1], causal=True).square().sum().backward()
    assert_same_bits(found, [leaf.grad for leaf in leaves])
    with pytest.raises(NotImplementedError, match=r"torch\.vmap over attention is not implemented"):
        torch.func.vmap(lambda q: attention(q, k, v))(q[None])
    with pytest.raises(NotImplementedError, match=r"forward-mode differentiation \(jvp\) is not implemented"):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(attention(q, k, v), attention(q, k, v))
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="k: forward-mode"):
            attention(q, dual, dual)


# Refusals that only torch tensors can meet

PLAIN = rand(2, 5, 4, 8, dtype=torch.float32)
with FakeTensorMode() as _mode:
    FAKE = _mode.from_tensor(PLAIN)
ODD = {
    "sparse": (PLAIN.to_sparse(), "layout"),
    "csr": (PLAIN[0, 0].to_sparse_csr(), "layout"),
    "mkldnn": (PLAIN.to_mkldnn(), "layout"),
    "neg": (torch._neg_view(PLAIN), "negated view"),
    "complex": (PLAIN.to(torch.complex64), "dtype"),
    "conj": (PLAIN.to(torch.complex64).conj(), "dtype|conj"),
    "integer": (PLAIN.int(), "dtype"),
    "meta": (PLAIN.to("meta"), "meta"),
    "fake": (FAKE, "fake tensor"),
    "nested": (torch.nested.nested_tensor([PLAIN[0], PLAIN[1]], layout=torch.jagged), "nested tensor"),
    "numpy": (np.ones((2, 5, 4, 8), np.float32), "expected a"),
    "list": ([1.0], "expected a"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_odd_tensors_are_refused_by_name(name, kind):
    odd, words = ODD[kind]
    call = {"q": PLAIN, "k": PLAIN, "v": PLAIN, name: odd}
    name = "k" if name == "q" and kind == "numpy" else name  # with NumPy in front, the odd ones are the others
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=f"^{name}: .*({words})"):
        attention(**call)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"causal": 1}, TypeError, "causal"),
        ({"causal": "middle"}, ValueError, "causal: 'middle'"),
        ({"window": 3}, TypeError, "window"),
        ({"window": (1, 2, 3)}, ValueError, "window"),
        ({"window": (1.5, None)}, TypeError, "window"),
        ({"window": (-1, None)}, ValueError, "window"),
        ({"scale": "big"}, TypeError, "scale"),
        ({"softcap": None}, TypeError, "softcap"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"layout": "sbhd"}, ValueError, "layout: 'sbhd'"),
        ({"max_seqlen_q": 1.5}, TypeError, "max_seqlen_q"),
    ],
)
def test_both_paths_refuse_options_alike(options, error, words, monkeypatch):
    for _ in range(2):
        with pytest.raises(error, match=words):
            attention(PLAIN, PLAIN, PLAIN, **options)
        monkeypatch.setattr(autograd, "is_direct", lambda *_: False)
