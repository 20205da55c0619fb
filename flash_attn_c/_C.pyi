"""The compiled module. Arguments are positional; tensors are torch tensors or NumPy arrays, None where absent.

The common arguments, in order:

    q, k, v, out, lse,
    bias, mask, alibi_slopes, sinks, block_mask,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    rng_state        an int64 tensor (seed, offset) on the device of q, or a tuple of two ints
    probs
    causal           False, True, "bottom_right" or "top_left"
    window           None or (left, right), each an int or None
    scale            None or a float
    softcap, dropout_p
    block_size       0: found from the shape of block_mask
    max_seqlen_q, max_seqlen_k, layout, deterministic

`alloc` is None on the CPU, else alloc(bytes, device_index) -> a tensor that owns that much device memory.
"""

from typing import Any

def forward(*common_then_alloc: Any) -> None:
    """Writes out, and lse and probs where given; on CUDA devices lse must be."""

def attention(q: Any, k: Any, v: Any, tensors: tuple | None, options: tuple, lse_too: bool, alloc: Any, /) -> Any:
    """forward() that makes its outputs: out, or (out, lse). tensors = (bias .. probs), None for none; options = causal .. deterministic."""

def constructors(empty_like: Any, empty_like_with_dim: Any, new_empty: Any, as_float32: dict[str, Any], /) -> None:
    """How attention() makes tensors: empty_like(q), empty_like_with_dim(q, dim), new_empty(q, *shape, **as_float32)."""

def backward(*common_then_gradients_then_alloc: Any) -> None:
    """gradients = dout, dlse, dq, dk, dv, dbias, dalibi_slopes, dsinks; reads the first two, writes the others where given."""

def explain(*common_then_backward: Any) -> str:
    """The plan as JSON; out and lse may be None."""

def describe() -> str:
    """What was found on this machine, as JSON."""

def compile_kernel(kernel: str, entry: str, constants: dict[str, int], arch: str, /) -> tuple[bytes, str]:
    """A kernel compiled for an architecture, with the compiler's log. Needs no GPU."""

def ship_kernel(kernel: str, entry: str, constants: dict[str, int], arch: str, directory: str, /) -> tuple[str, str]:
    """The same into a folder of shipped kernels: the file's name, with the compiler's log."""

def kernel_source(name: str | None = None, /) -> Any:
    """The text of an embedded kernel file (None where there is none), or all names."""

def override_constants(constants: dict[str, int], /) -> None:
    """Constants that kernels get from now on instead of the plan's, where they have one of that name; {} for none. For benchmarks."""

def shipped_folder(directory: str, /) -> None:
    """Says where shipped kernels lie."""
