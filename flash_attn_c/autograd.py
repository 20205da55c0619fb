"""The torch front. A call on plain tensors in eager mode goes straight to C, through one autograd.Function where gradients are asked
for; every other call (torch.compile, fake tensors, dispatch modes, function transforms, tensor subclasses) goes through the custom
ops of ops.py, where torch can see it. Both paths save the same tensors and give the same numbers.
"""

import sys
from typing import Any

import torch
from torch.autograd import Function, forward_ad

from . import calls, checks, ops
from .api import FRONTS, NO_TENSORS
from .torch_impl import register_torch_impl

array_module = torch
tensor_type = torch.Tensor
check = checks.check

_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling  # cheaper to ask; other compilers come with a dispatch mode
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_is_deterministic = torch._C._get_deterministic_algorithms
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))


def attention(q: Any, k: Any, v: Any, tensors: tuple, options: tuple, return_lse: bool, return_probs: bool = False) -> Any:
    """tensors and options as in api.py. Returns out, (out, lse) with return_lse, or (out, lse, probs) with return_probs."""
    if _is_traced() or not is_direct(q, k, v, tensors):
        return _through_dispatcher(q, k, v, tensors, options, return_lse, return_probs)
    if _is_autocast_enabled():
        q, k, v = autocast(q, k, v)
    given: tuple | None = None
    if options[4] or return_probs or _is_deterministic():
        given, options = complete(q, k, tensors, options, return_probs)
    elif tensors is not NO_TENSORS:
        given = (*tensors, None, None)
    lse_too = return_lse or return_probs
    learns = q.requires_grad or k.requires_grad or v.requires_grad or (tensors is not NO_TENSORS and _needs_grad(tensors))
    if not learns or not _is_grad_enabled():
        result = calls.forward(q, k, v, given, options, lse_too)
    elif given is None:
        result = _apply(q, k, v, (None, options, lse_too))
    else:
        result = _apply(q, k, v, (given, options, lse_too), given[0], given[2], given[3])
    return (*result, given[10]) if given is not None and return_probs else result


def is_direct(q: Any, k: Any, v: Any, tensors: tuple) -> bool:
    """Whether only C needs to see this call: plain tensors, and nothing active that watches or rewrites operators. C refuses what is
    not strided, but it cannot see the bit that marks a lazily negated view."""
    if _dispatch_modes() or _function_modes() or _transforms_active() or _tracing_state() is not None or forward_ad._current_level >= 0:
        return False
    types = _PLAIN_TYPES
    if type(q) not in types or type(k) not in types or type(v) not in types or q.is_neg() or k.is_neg() or v.is_neg():
        return False
    if tensors is not NO_TENSORS:
        for tensor in tensors:
            if tensor is not None and (type(tensor) not in types or tensor.is_neg()):
                return False
    return True


def _needs_grad(tensors: tuple) -> bool:
    return any(t is not None and t.requires_grad for t in (tensors[0], tensors[2], tensors[3]))


def complete(q: Any, k: Any, tensors: tuple, options: tuple, return_probs: bool) -> tuple[tuple, tuple]:
    """Adds what a call draws or allocates: (rng_state, probs) behind the tensors; torch's own switch for determinism."""
    rng_state = random_state(q) if options[4] else None
    if _is_deterministic():
        options = (*options[:9], True)
    probs = calls.allocate_probs(q, k, tensors[5], options) if return_probs else None
    return (*tensors, rng_state, probs), options


def random_state(q: torch.Tensor) -> torch.Tensor:
    """(seed, offset) from the default generator of q's device, left on the device: repeatable, and new on every graph replay."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device)


def autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Under torch.autocast q, k, v take its dtype, as in torch's own attention; bias and the like keep theirs."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in (q, k, v))


class _Attention(Function):
    """call = (tensors, options, lse_too). tensors is None for none, and then bias, alibi_slopes and sinks are left out behind it: most
    calls have none, and every argument and saved tensor costs host time."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, call: tuple, *_learned: Any) -> Any:
        tensors, ctx.options, lse_too = call
        out, lse = calls.forward(q, k, v, tensors, ctx.options, True)
        if tensors is None:
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            ctx.save_for_backward(q, k, v, out, lse, *tensors[:10])
        if not lse_too:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> tuple:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = (*needs[:3], *(needs[4:] or (False, False, False)))
        if dout is None:
            dout = torch.zeros_like(out)
        grads = gradients(dout, dlse, (q, k, v, out, lse), tuple(tensors) or calls.NO_TENSORS[:10], ctx.options, wanted)
        return (*grads[:3], None, *grads[3:]) if tensors else (*grads[:3], None)


# Function.apply without the handling of function transforms, which do not come here: half its host time.
_apply = super(Function, _Attention).apply


def gradients(dout: Any, dlse: Any, inputs: tuple, tensors: tuple, options: tuple, wanted: tuple) -> tuple:
    """inputs = (q, k, v, out, lse). Returns (dq, dk, dv, dbias, dalibi_slopes, dsinks), None where not wanted."""
    if backward_is_direct(dout, dlse, inputs, tensors):
        grads = calls.allocate_gradients((*inputs[:3], tensors[0], tensors[2], tensors[3]), wanted)
        calls.backward(dout, dlse, inputs, tensors, options, grads)
        return grads
    # With create_graph=True the pass becomes a node itself: allowed, as long as nobody differentiates through what comes back.
    backward = _Gradients.apply if _is_grad_enabled() else _Gradients.forward
    found = backward(dout, dlse, *inputs, *tensors, options, wanted)
    return tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))


def backward_is_direct(dout: Any, dlse: Any, inputs: tuple, tensors: tuple) -> bool:
    return not _is_grad_enabled() and is_direct(dout, inputs[0], inputs[1], (dlse, *inputs[2:], *tensors))


class _Gradients(Function):
    """The backward pass as a node of the graph, whose own derivative is refused in plain words."""

    @staticmethod
    def forward(*args: Any) -> tuple:
        dout, dlse, *tensors, options, wanted = args
        return ops.bwd(dout, dlse, tensors, options, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        ops.refuse_second_derivative()


class _Transformed(Function):
    """For torch.func.grad and vjp, which want forward and context apart. Inside, the call meets the next transform or the op."""

    @staticmethod
    def forward(*args: Any) -> tuple:
        q, k, v, *tensors, options = args
        out, lse, _ = ops.fwd(q, k, v, tuple(tensors), options, False)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple:
        needs = ctx.needs_input_grad
        dq, dk, dv, dbias, dalibi, dsinks = _Gradients.apply(dout, dlse, *ctx.saved_tensors, ctx.options, _wanted(needs))
        grads = (dq, dk, dv, dbias, None, dalibi, dsinks, *(None,) * (len(needs) - 7))
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _wanted(needs: tuple) -> tuple:
    """Which of (q, k, v, bias, alibi_slopes, sinks) want a gradient, from the flags of (q, k, v, bias, mask, alibi_slopes, sinks, ...)."""
    return (*needs[:4], *needs[5:7])


def _through_dispatcher(q: Any, k: Any, v: Any, tensors: tuple, options: tuple, return_lse: bool, return_probs: bool) -> Any:
    if not _is_compiling():
        checks.check(q, k, v, tensors)
    q, k, v = autocast(q, k, v)
    rng_state = random_state(q) if options[4] else None
    if not _is_compiling() and _is_deterministic():
        options = (*options[:9], True)
    tensors = (*tensors, rng_state)
    if not _is_compiling() and _transforms_active():
        if return_probs:
            raise NotImplementedError("return_attn_probs: is not implemented under torch.func transforms")
        out, lse = _Transformed.apply(q, k, v, *tensors, options)
        return (out, lse) if return_lse else out
    out, lse, probs = ops.fwd(q, k, v, tensors, options, return_probs)
    if return_probs:
        return out, lse, probs
    return (out, lse) if return_lse else out


def constant(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype)


FRONTS.update(dict.fromkeys(_PLAIN_TYPES, sys.modules[__name__]))  # so that torch.compile need not trace the search for a front
register_torch_impl()  # an offer: torch's own kernels stay in place until the user activates it
