"""The public surface: recorded signatures, what an import costs, explain, merge, the command line."""

from __future__ import annotations

import inspect
import json
import pathlib
import subprocess
import sys

import flash_attn_c
import numpy as np
import pytest
import torch

RECORD = pathlib.Path(__file__).with_name("api_signatures.json")
ROOT = RECORD.parent.parent


def rand(*shape, dtype=torch.float64, **kwargs):
    return torch.randn(*shape, dtype=dtype, **kwargs)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def signatures() -> dict[str, str]:
    found = {}
    for name in flash_attn_c.__all__:
        value = getattr(flash_attn_c, name)
        signature = inspect.signature(value)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        found[name] = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    return found


def test_public_signatures_are_the_recorded_ones():
    assert signatures() == json.loads(RECORD.read_text()), "if the change is meant: PYTHONPATH=. python tests/test_api.py record"


def test_every_public_name_is_listed_and_there():
    assert set(flash_attn_c.__all__) <= set(dir(flash_attn_c))
    with pytest.raises(AttributeError, match="no attribute 'attenshun'"):
        flash_attn_c.attenshun  # noqa: B018


def test_import_loads_neither_torch_nor_numpy():
    print_loaded = "import sys, flash_attn_c; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run_python(print_loaded) == "False False"


def test_numpy_call_does_not_load_torch():
    code = "import sys, numpy as np, flash_attn_c as f; x = np.ones((1, 2, 1, 4)); f.attention(x, x, x); print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_package_imported_before_torch_takes_torch_tensors():
    code = "import flash_attn_c as f, torch; x = torch.ones(1, 2, 1, 4); print(tuple(f.attention(x, x, x).shape))"
    assert run_python(code) == "(1, 2, 1, 4)"


@pytest.mark.parametrize("q", [None, [1.0], 3, "text"])
def test_what_is_no_tensor_is_refused_by_name(q):
    with pytest.raises(TypeError, match="q: expected a torch tensor or a NumPy array, got"):
        flash_attn_c.attention(q, q, q)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_explain_says_what_would_run(backward, as_numpy):
    q = rand(2, 5, 4, 8, dtype=torch.float32)
    q = q.numpy() if as_numpy else q
    plan = flash_attn_c.explain(q, q, q, causal=True, dropout_p=0.1, backward=backward)
    assert plan.engine == "cpu" and plan.engine in str(plan) and "engine" in dir(plan) and "Plan(" in repr(plan)
    with pytest.raises(AttributeError, match="no 'enjine'"):
        plan.enjine  # noqa: B018


def test_explain_refuses_what_attention_refuses():
    q = rand(2, 5, 4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="k: heads 3 must divide q: heads 4"):
        flash_attn_c.explain(q, q[:, :, :3], q[:, :, :3])


ODD_RANKS = [((5,),) * 3, ((2, 5, 4), (2, 5, 4, 8), (2, 5, 4, 8)), ((2, 5, 4, 8), (2, 5, 4, 8), ()), ((1, 1, 2, 5, 4),) * 3]


@pytest.mark.parametrize("shapes", ODD_RANKS)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_ranks_that_leave_no_output_shape_are_refused_by_name(shapes, kind):
    tensors = [rand(shape, dtype=torch.float32) for shape in shapes]
    tensors = [t.numpy() for t in tensors] if kind == "numpy" else tensors
    with pytest.raises((TypeError, ValueError), match=r"^(q|k|v): "):
        flash_attn_c.attention(*tensors)


def test_block_mask_with_and_without_its_size():
    q = rand(1, 200, 2, 8)
    blocks = torch.tensor([[True, False, True, True], [False, True, True, False], [True] * 4, [False, False, True, True]])[None, None]
    mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :200, :200]
    expected = flash_attn_c.attention(q, q, q, mask=mask)
    for block_mask in (blocks, (blocks, 64)):
        torch.testing.assert_close(flash_attn_c.attention(q, q, q, block_mask=block_mask), expected)
    for wrong, words in (((blocks, 0), "block size 0"), ((blocks, 63), "63"), ((blocks,), "1 entries"), ((blocks, "64"), "block_size")):
        with pytest.raises((TypeError, ValueError), match=words):
            flash_attn_c.attention(q, q, q, block_mask=wrong)


# merge


def halves(layout: str, **options):
    """out and lse over all keys, and over two parts of them."""
    axis = {"bshd": 1, "bhsd": 2, "packed": 0}[layout]
    q, k, v = (rand(6, 2, 8), rand(9, 2, 8), rand(9, 2, 8)) if layout == "packed" else (rand(2, 6, 6, 8) for _ in range(3))

    def attend(k, v):
        if layout != "packed":
            return flash_attn_c.attention(q, k, v, layout=layout, return_lse=True)
        cu_q, cu_k = (torch.tensor([0, t.shape[0]], dtype=torch.int32) for t in (q, k))
        return flash_attn_c.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)

    parts = zip(k.split([4, k.shape[axis] - 4], axis), v.split([4, v.shape[axis] - 4], axis), strict=True)
    return attend(k, v), *(attend(*part) for part in parts)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed"])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_merge_is_attention_over_all_keys(layout, kind):
    whole, a, b = halves(layout)
    if kind == "numpy":
        whole, a, b = ([t.numpy() for t in pair] for pair in (whole, a, b))
    out, lse = flash_attn_c.merge(*a, *b, layout="bhsd" if layout == "bhsd" else "bshd")
    np.testing.assert_allclose(out, whole[0], atol=1e-13)
    np.testing.assert_allclose(lse, whole[1], atol=1e-13)
    assert type(out) is type(whole[0]) and out.dtype == whole[0].dtype and lse.dtype == whole[1].dtype


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_merge_of_rows_that_saw_nothing(kind):
    _, (out_a, lse_a), (out_b, lse_b) = halves("bshd")
    out_a[:, 1:3], lse_a[..., 1:3] = 0, -torch.inf
    out_b[:, 2:4], lse_b[..., 2:4] = 0, -torch.inf
    arguments = [t.numpy() if kind == "numpy" else t for t in (out_a, lse_a, out_b, lse_b)]
    with np.errstate(all="raise"):
        out, lse = (torch.as_tensor(t) for t in flash_attn_c.merge(*arguments))
    assert torch.equal(out[:, 1], out_b[:, 1]) and torch.equal(lse[..., 1], lse_b[..., 1])
    assert torch.equal(out[:, 3], out_a[:, 3]) and torch.equal(lse[..., 3], lse_a[..., 3])
    assert not out[:, 2].any() and (lse[..., 2] == -torch.inf).all()


def test_merge_is_differentiable_also_where_nothing_was_seen():
    inputs = [t.requires_grad_() for t in (rand(1, 3, 2, 4), rand(1, 2, 3), rand(1, 3, 2, 4), rand(1, 2, 3))]
    assert torch.autograd.gradcheck(flash_attn_c.merge, inputs)
    with torch.no_grad():
        inputs[1][..., :2] = -torch.inf
        inputs[3][..., 1:2] = -torch.inf
    out, lse = flash_attn_c.merge(*inputs)
    grads = torch.autograd.grad(out.sum() + lse[..., 2:].sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, 1].any() and not grads[1][..., 1].any()


def test_merge_in_16_bits_keeps_the_dtype_of_out():
    q = rand(1, 8, 2, 16, dtype=torch.bfloat16)
    whole, _ = flash_attn_c.attention(q, q, q, return_lse=True)
    parts = [flash_attn_c.attention(q, k, k, return_lse=True) for k in q.split(4, 1)]
    out, lse = flash_attn_c.merge(*parts[0], *parts[1])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, whole, atol=2e-2, rtol=2e-2)


def test_merge_refuses_by_name():
    out, lse = rand(2, 6, 3, 8), rand(2, 3, 6)
    for arguments, words in (
        ((out, lse, out[:1], lse), "out_b: shape"),
        ((out, lse, out.float(), lse), "out_b: dtype"),
        ((out, lse[..., :1], out, lse), "lse_a: shape"),
        ((out, lse, out, lse.transpose(1, 2)), "lse_b: shape"),
        ((out, lse, out, None), "lse_b: expected"),
        ((out, lse.numpy(), out, lse), "lse_a: expected"),
        ((None, lse, out, lse), "out_a: expected"),
        ((out[0, 0], lse, out[0, 0], lse), "out_a: expected 4 dimensions"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            flash_attn_c.merge(*arguments)
    with pytest.raises(ValueError, match="layout: 'sbhd'"):
        flash_attn_c.merge(out, lse, out, lse, layout="sbhd")


# The command line


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "flash_attn_c", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_doctor_prints_what_it_found_and_checks_itself():
    done = command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("cpu tier", "cpu threads", "torch", "cuda", "everything works"):
        assert words in done.stdout
    assert "WRONG" not in done.stdout


def test_doctor_reports_a_wrong_result(monkeypatch, capsys):
    from flash_attn_c import doctor

    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "_checks", lambda: iter([("good", lambda seed: 0.0, 1e-5), ("bad", lambda seed: 1.0, 1e-5)]))
    assert doctor.main([]) == 1
    assert "bad   WRONG" in capsys.readouterr().out


def test_command_line_without_a_command_and_with_an_unknown_one():
    assert command().returncode == 0 and "doctor" in command("--help").stdout
    assert command("docter").returncode == 2


if __name__ == "__main__" and sys.argv[1:] == ["record"]:
    RECORD.write_text(json.dumps(signatures(), indent=1) + "\n")
