"""The custom ops: checked by torch's own opcheck, faked with the strides of real results, compiled without a break."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from flash_attn_c import attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from test_torch import FEATURES, FORWARD_OP, OPTIONS, assert_same_bits, compiled, inputs, int32, rand, run


def op_arguments(kind: str):
    q, k, v = (t.detach() for t in inputs(torch.float32))
    tensors, options = [None] * 10, list(OPTIONS)
    if kind == "permuted":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif kind == "expanded":
        k, v = (t[:1].expand(2, -1, -1, -1) for t in (k, v))
    elif kind == "sliced":
        q, k, v = rand(2, 5, 4, 16, dtype=torch.float32)[..., ::2], k[:, 1:], v[:, 1:]
    elif kind == "empty":
        k, v = k[:, :0], v[:, :0]
    elif kind == "no_batch":
        q, k, v = q[:0], k[:0], v[:0]
    elif kind == "packed":
        q, k, v = rand(9, 4, 8, dtype=torch.float32), rand(12, 2, 8, dtype=torch.float32), rand(12, 2, 6, dtype=torch.float32)
        tensors[5:7] = int32(0, 4, 9), int32(0, 5, 12)
        options[0], options[7:9] = "bottom_right", (5, 7)
    elif kind == "bias":
        tensors[0], tensors[2], tensors[3] = (rand(*s, dtype=torch.float32) for s in ((1, 4, 5, 7), (4,), (4,)))
    elif kind == "dropout":
        tensors[9], options[5], options[9] = torch.tensor([1, 2]), 0.5, "bhsd"
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return q, k, v, tensors, options


KINDS = ["plain", "permuted", "expanded", "sliced", "empty", "no_batch", "packed", "bias", "dropout"]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_forward_op(kind):
    q, k, v, tensors, options = op_arguments(kind)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    for i in (0, 2, 3):
        tensors[i] = tensors[i] if tensors[i] is None else tensors[i].requires_grad_()
    opcheck(torch.ops.flash_attn_c.fwd.default, (*leaves, *tensors, *options, kind == "dropout"))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_backward_op(kind):
    q, k, v, tensors, options = op_arguments(kind)
    out, lse, _ = torch.ops.flash_attn_c.fwd(q, k, v, *tensors, *options, False)
    wanted = [True, kind != "sliced", True, *(tensors[i] is not None for i in (0, 2, 3))]
    arguments = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *tensors, *options, wanted)
    opcheck(torch.ops.flash_attn_c.bwd.default, arguments)


def test_fake_tensors_get_the_strides_of_real_ones():
    for kind in KINDS:
        q, k, v, tensors, options = op_arguments(kind)
        real = torch.ops.flash_attn_c.fwd(q, k, v, *tensors, *options, False)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if t is not None else None for t in (q, k, v, *tensors)]
            fake = torch.ops.flash_attn_c.fwd(*fakes, *options, False)
        assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real], kind


# torch.compile


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_compiled_equals_eager(options):
    leaves = inputs()
    assert_same_bits(run(compiled(attention), leaves, options), run(attention, leaves, options))


def test_inductor_compiles_a_block_around_attention():
    weight = torch.nn.Parameter(rand(24, 8, dtype=torch.float32))

    def block(x):
        q, k, v = (x @ weight.T).unflatten(-1, (3, 2, 4)).unbind(-3)
        return (attention(q, k, v, causal=True).flatten(-2) * 2 + x).relu()

    x = rand(2, 6, 8, dtype=torch.float32).requires_grad_()
    torch._dynamo.reset()
    found = run(torch.compile(block, fullgraph=True), [x], {})
    for a, b in zip(found, run(block, [x], {}), strict=True):
        torch.testing.assert_close(a, b)


def test_many_mixtures_of_lengths_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def packed(q, k, cu_q, cu_k, max_q, max_k):
        return attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, causal=True).sum()

    torch._dynamo.reset()
    function = torch.compile(packed, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for lengths in ([3, 4], [5, 6, 7], [2, 9, 1, 3, 8], [11, 12]):
        cu = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        q, k = (rand(sum(lengths), heads, 8).requires_grad_() for heads in (4, 2))
        call = (q, k, cu, cu.clone(), max(lengths), max(lengths) + 1)
        found, expected = function(*call), packed(*call)
        torch.testing.assert_close(found, expected)
        assert_same_bits(torch.autograd.grad(found, (q, k)), torch.autograd.grad(expected, (q, k)))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, compilations


def test_export_keeps_the_op():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, window=(2, 0))

    leaves = tuple(t.detach() for t in inputs())
    program = torch.export.export(Model(), leaves)
    assert any(node.target is FORWARD_OP for node in program.graph.nodes)
    assert torch.equal(program.module()(*leaves), Model()(*leaves))
