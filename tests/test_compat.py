"""The functions of the flash_attn package, and standing in for it."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import flash_attn_c
import pytest
import torch
from flash_attn_c import (
    bert_padding,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

import reference

ROOT = pathlib.Path(__file__).parent.parent


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def exact(q, k, v, **options):
    """(out, lse) by the reference, with the flash_attn names."""
    left, right = (None if bound < 0 else bound for bound in options.pop("window_size", (-1, -1)))
    names = {"softmax_scale": "scale"}
    call = {**reference.DEFAULTS, "q": q, "k": k, "v": v, "window": (left, right)}
    call.update({names.get(name, name): value for name, value in options.items()})
    leaves = {name: call[name] for name in reference.DIFFERENTIABLE if call[name] is not None}
    return reference.attention(call, torch.float64, leaves)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "left_window": {"window_size": (2, -1), "causal": True},
    "right_window": {"window_size": (-1, 0)},
    "score": {"softmax_scale": 0.2, "softcap": 1.5},
    "alibi": {"alibi_slopes": torch.rand(2, 4, dtype=torch.float64), "causal": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
CU_Q, CU_K = int32(0, 4, 4, 9), int32(0, 5, 6, 12)


def check(found, inputs, expected, expected_inputs):
    """Outputs and gradients; expected_inputs are the plain tensors that the packed `inputs` hold."""
    out, lse, probs = found
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1].masked_fill(expected[1] == -torch.inf, torch.inf))
    assert probs.numel() == 0
    finite = expected[1].isfinite()
    seeds = torch.randn_like(out), torch.randn_like(lse) * finite
    grads = torch.autograd.grad((out, lse), inputs, seeds, retain_graph=True)
    wanted = torch.autograd.grad(expected, expected_inputs, seeds, retain_graph=True)
    if len(grads) == 1:
        wanted = [torch.stack(wanted, -3)]
    elif len(grads) == 2:
        wanted = [wanted[0], torch.stack(wanted[1:], -3)]
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@each_option
def test_dense(options):
    q, k, v = (rand(2, s, h, 8).requires_grad_() for s, h in ((5, 4), (7, 2), (7, 2)))
    check(flash_attn_func(q, k, v, return_attn_probs=True, **options), (q, k, v), exact(q, k, v, **options), (q, k, v))
    assert torch.equal(flash_attn_func(q, k, v, **options), flash_attn_func(q, k, v, return_attn_probs=True, **options)[0])


@each_option
def test_dense_kvpacked(options):
    q, kv = rand(2, 5, 4, 8).requires_grad_(), rand(2, 7, 2, 2, 8).requires_grad_()
    k, v = (t.detach().clone().requires_grad_() for t in kv.unbind(2))
    check(flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options), (q, kv), exact(q, k, v, **options), (q, k, v))


@each_option
def test_dense_qkvpacked(options):
    qkv = rand(2, 6, 3, 4, 8).requires_grad_()
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(2))
    check(flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options), (qkv,), exact(q, k, v, **options), (q, k, v))


def varlen_options(options):
    slopes = options.get("alibi_slopes")
    return options if slopes is None else {**options, "alibi_slopes": slopes[0]}


@each_option
def test_varlen(options):
    options = varlen_options(options)
    q, k, v = (rand(t, h, 8).requires_grad_() for t, h in ((9, 4), (12, 2), (12, 2)))
    lengths = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    expected = exact(q, k, v, **lengths, **options)
    found = flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 6, return_attn_probs=True, **options)
    check(found, (q, k, v), expected, (q, k, v))


@each_option
def test_varlen_kvpacked(options):
    options = varlen_options(options)
    q, kv = rand(9, 4, 8).requires_grad_(), rand(12, 2, 2, 8).requires_grad_()
    k, v = (t.detach().clone().requires_grad_() for t in kv.unbind(1))
    expected = exact(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **options)
    check(flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 5, 6, return_attn_probs=True, **options), (q, kv), expected, (q, k, v))


@each_option
def test_varlen_qkvpacked(options):
    options = varlen_options(options)
    qkv = rand(12, 3, 4, 8).requires_grad_()
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(1))
    expected = exact(q, k, v, cu_seqlens_q=CU_K, cu_seqlens_k=CU_K, **options)
    check(flash_attn_varlen_qkvpacked_func(qkv, CU_K, 6, return_attn_probs=True, **options), (qkv,), expected, (q, k, v))


def test_positional_order():
    q = rand(1, 6, 2, 8)
    slopes = torch.rand(2, dtype=torch.float64)
    expected = flash_attn_func(q, q, q, softmax_scale=0.3, causal=True, window_size=(2, 0), softcap=2.0, alibi_slopes=slopes)
    assert torch.equal(flash_attn_func(q, q, q, 0.0, 0.3, True, (2, 0), 2.0, slopes, True, False), expected)
    qkv = torch.stack([q] * 3, 2)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True, (2, 0), 2.0, slopes, True), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], 0.0, 0.3, True, (2, 0), 2.0, slopes, True), expected)
    cu = int32(0, 6)
    packed = flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 6, 6, 0.0, 0.3, True, (2, 0), 2.0, slopes, True, False, None)
    torch.testing.assert_close(packed, expected[0])
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv[0], cu, 6, 0.0, 0.3, True, (2, 0), 2.0, slopes), packed)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q[0], qkv[0, :, 1:], cu, cu, 6, 6, 0.0, 0.3, True, (2, 0), 2.0, slopes), packed)


def test_windows_of_tensors_and_other_negative_bounds():
    q = rand(1, 6, 2, 8)
    assert torch.equal(
        flash_attn_func(q, q, q, window_size=(torch.tensor(2), torch.tensor(-1))), flash_attn_func(q, q, q, window_size=(2, -7))
    )
    assert torch.equal(flash_attn_func(q, q, q, window_size=[-1, -1]), flash_attn_func(q, q, q))
    with pytest.raises(ValueError, match="window_size: expected"):
        flash_attn_func(q, q, q, window_size=(1, 2, 3))


def test_lengths_as_tensors():
    q = rand(9, 2, 8)
    expected = flash_attn_varlen_func(q, q, q, CU_Q, CU_Q, 5, 5)
    assert torch.equal(flash_attn_varlen_func(q, q, q, CU_Q, CU_Q, torch.tensor(5), torch.tensor(5)), expected)


def test_gradient_of_a_packed_tensor_is_one_tensor_and_nothing_is_stacked(monkeypatch):
    qkv = rand(2, 6, 3, 2, 8).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    for name in ("cat", "stack"):
        monkeypatch.setattr(torch, name, None)
    (grad,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    assert grad.is_contiguous() and out.grad_fn.name().startswith("_PackedAttention")
    q, kv = rand(2, 6, 2, 8).requires_grad_(), rand(2, 6, 2, 2, 8).requires_grad_()
    flash_attn_kvpacked_func(q.detach(), kv).sum().backward()
    assert q.grad is None and kv.grad.shape == kv.shape


@pytest.mark.parametrize("path", ["autocast", "compile", "create_graph", "no_grad"])
def test_packed_tensors_off_the_direct_path(path):
    qkv = rand(2, 6, 3, 2, 8, dtype=torch.float32).requires_grad_()
    expected = flash_attn_qkvpacked_func(qkv, causal=True)
    (expected_grad,) = torch.autograd.grad(expected.sum(), qkv, create_graph=path == "create_graph")
    function = flash_attn_qkvpacked_func
    if path == "compile":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    tolerance = 2e-2 if path == "autocast" else 1e-6
    with torch.autocast("cpu", torch.bfloat16, enabled=path == "autocast"), torch.set_grad_enabled(path != "no_grad"):
        out = function(qkv, causal=True)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    if path != "no_grad":
        torch.testing.assert_close(torch.autograd.grad(out.sum(), qkv)[0], expected_grad, atol=2 * tolerance, rtol=2 * tolerance)


def test_attention_probabilities_with_dropout():
    q, k, v = (rand(1, s, 2, 8) for s in (5, 7, 7))
    torch.manual_seed(2)
    out, lse, probs = flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    assert probs.shape == (1, 2, 128, 128) and probs.dtype == q.dtype and probs.isfinite().all()
    score = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    inside = probs[:, :, :5, :7]
    torch.testing.assert_close(inside.abs(), torch.exp(score - score.amax(-1, keepdim=True)))
    kept = inside * ~inside.signbit() * 2
    weight = kept / torch.exp(lse - score.amax(-1))[..., None]
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", weight, v), out)
    qp, kp, vp = (t[0] for t in (q, k, v))
    _, _, packed = flash_attn_varlen_func(qp, kp, vp, int32(0, 5), int32(0, 7), 5, 7, dropout_p=0.5, return_attn_probs=True)
    assert packed.shape == (1, 2, 128, 128)


def test_refusals_by_name():
    q = rand(2, 5, 4, 8)
    for call, error, words in (
        (lambda: flash_attn_qkvpacked_func(q), ValueError, r"qkv: shape \(2, 5, 4, 8\) must be \(batch, seqlen, 3, heads, dim\)"),
        (lambda: flash_attn_kvpacked_func(q, rand(2, 5, 3, 4, 8)), ValueError, r"kv: shape .* must be \(batch, seqlen, 2, heads, dim\)"),
        (lambda: flash_attn_varlen_qkvpacked_func(q, CU_Q, 5), ValueError, r"qkv: shape .* must be \(total, 3, heads, dim\)"),
        (lambda: flash_attn_qkvpacked_func([1.0]), TypeError, "qkv: expected a torch tensor, got list"),
        (lambda: flash_attn_func(q, None, q), TypeError, "k: expected a torch tensor like q, got NoneType"),
        (lambda: flash_attn_func(q, q[..., :4], q), ValueError, "k: head dim 4 must equal that of q, 8"),
        (
            lambda: flash_attn_varlen_func(q[0], q[0], q[0], CU_Q, CU_K, 5, 6, block_table=int32(0)),
            NotImplementedError,
            "block_table: paged",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


# bert_padding


def test_unpad_and_pad():
    x = rand(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert rows.shape == (6, 2, 4) and cu_seqlens.tolist() == [0, 3, 3, 6] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int) and used.tolist() == [3, 0, 3] and used.dtype == torch.int32
    padded = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(padded, x * mask[..., None, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, mask[..., None, None].expand_as(x).double())
    assert torch.equal(bert_padding.index_first_axis(x.flatten(0, 1), indices), rows)


def test_unpad_with_slots_that_are_kept_but_not_used():
    x, mask, unused = rand(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (
        len(rows) == 5
        and indices.tolist() == [0, 1, 2, 4, 5]
        and cu_seqlens.tolist() == [0, 3, 5]
        and longest == 3
        and used.tolist() == [2, 1]
    )


# install_as


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, **kwargs)


def test_stands_in_for_the_package_as_libraries_probe_for_it():
    code = """
import importlib.metadata, importlib.util, sys
import flash_attn_c
assert importlib.util.find_spec("flash_attn") is None
flash_attn_c.install_as("flash_attn")
flash_attn_c.install_as("flash_attn")

assert importlib.util.find_spec("flash_attn") is not None
assert importlib.util.find_spec("flash_attn.bert_padding") is not None
assert importlib.util.find_spec("flash_attn.losses") is None
assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == "2.8.3"
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
assert importlib.metadata.metadata("flash-attn")["Name"] == "flash-attn"
try:
    importlib.metadata.version("flash_attn_3")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError

import flash_attn, flash_attn.flash_attn_interface
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func
assert flash_attn.__version__ == "2.8.3" and flash_attn.__spec__.name == "flash_attn"
assert flash_attn_func is flash_attn_c.flash_attn_func is flash_attn.flash_attn_interface.flash_attn_func
assert importlib.reload(flash_attn).flash_attn_func is flash_attn_func
print("fine")
"""
    done = run_python(code)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_real_package_is_left_alone_unless_forced(tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True\n")
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
import flash_attn_c
try:
    flash_attn_c.install_as("flash_attn")
except RuntimeError as error:
    assert "force=True" in str(error)
import flash_attn
assert flash_attn.real
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    flash_attn_c.install_as("flash_attn", force=True)
assert any("takes the place" in str(w.message) for w in caught)
import flash_attn
assert flash_attn.flash_attn_func is flash_attn_c.flash_attn_func and not hasattr(flash_attn, "real")
print("fine")
"""
    done = run_python(code)
    assert done.stdout.strip() == "fine", done.stderr


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="name: 'xformers' must be 'flash_attn'"):
        flash_attn_c.install_as("xformers")
