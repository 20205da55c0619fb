"""Several GPUs in one process: tensors decide where a call runs, whatever device is current."""

from __future__ import annotations

import threading

import pytest
import torch
from flash_attn_c import attention
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")

KINDS = [(torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64), (torch.float64, 32)]


def inputs(device: str, dtype: torch.dtype, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)  # of this call's own: threads draw at the same time
    return [torch.randn(2, 300, 4, dim, dtype=torch.float64, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def results(device: str, dtype: torch.dtype, dim: int, **options) -> list[Tensor]:
    q, k, v = inputs(device, dtype, dim)
    out = attention(q, k, v, deterministic=True, **options)
    return [t.cpu() for t in (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))]


@pytest.mark.parametrize(("dtype", "dim"), KINDS, ids=str)
@pytest.mark.parametrize("current", [0, 1])
def test_a_device_that_is_not_current(dtype: torch.dtype, dim: int, current: int) -> None:
    with torch.cuda.device(current):
        first, second = (results(f"cuda:{i}", dtype, dim, causal=True) for i in (0, 1))
        assert torch.cuda.current_device() == current
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_packed_sequences_on_the_other_device() -> None:
    def run(device: str) -> Tensor:
        q, k, v = (t.detach().flatten(0, 1) for t in inputs(device, torch.bfloat16, 64))
        cu = torch.tensor([0, 100, 130, 600], dtype=torch.int32, device=device)
        return attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=470, max_seqlen_k=470).cpu()

    assert torch.equal(run("cuda:0"), run("cuda:1"))


def test_threads_on_both_devices_at_once() -> None:
    expected = {kind: results("cuda:0", *kind) for kind in KINDS}
    wrong: list[str] = []

    def work(device: str) -> None:
        torch.cuda.set_device(device)
        for _ in range(5):
            for kind, wanted in expected.items():
                if not all(torch.equal(a, b) for a, b in zip(results(device, *kind), wanted, strict=True)):
                    wrong.append(f"{device} {kind}")

    threads = [threading.Thread(target=work, args=(f"cuda:{i % 2}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_graph_on_the_other_device() -> None:
    with torch.cuda.device(1):
        q, k, v = (t.detach() for t in inputs("cuda:1", torch.bfloat16, 64))
        attention(q, k, v, causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # torch's own default would stay on this device in later tests
            out = attention(q, k, v, causal=True)
    q.copy_(q.flip(1))
    graph.replay()
    torch.cuda.synchronize(1)
    assert torch.equal(out, attention(q, k, v, causal=True))


def test_tensors_of_two_devices_are_refused() -> None:
    q, k, v = (t.detach() for t in inputs("cuda:0", torch.bfloat16, 64))
    with pytest.raises(ValueError, match=r"k: is on cuda:1, but q is on cuda:0"):
        attention(q, k.to("cuda:1"), v)
