"""The driver and the kernel store on a real GPU, with a toy kernel: launches, capture, threads, the cost of each source of a kernel."""

import ctypes as c
import threading
import time

import pytest
import torch

from cuda_host import OK, Error, Host, TensorMapShape, build_host, run_script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class ToyArgs(c.Structure):
    _fields_ = [("out", c.c_void_p), ("n", c.c_int)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return str(build_host(tmp_path_factory.mktemp("gpu")))


@pytest.fixture(scope="module")
def host(library, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_ATTN_C_CACHE", str(tmp_path_factory.mktemp("cache") / "kernels"))
        opened = Host(library)
        opened.hint_nvrtc()
        yield opened


def load(host, width, device=0, smem=0):
    code, message, kernel = host.kernel(host.variant(WIDTH=width, smem=smem), device)
    assert code == OK, message
    return kernel


def launch(host, kernel, out, **shape):
    stream = torch.cuda.current_stream(out.device).cuda_stream
    args = ToyArgs(out.data_ptr(), out.numel())
    result = host.launch(kernel, (-(-out.numel() // 64), 1, 1), (64, 1, 1), stream=stream, argument=args, **shape)
    assert result == (OK, ""), result


def expected(out, width):
    return 2 * torch.arange(out.numel(), dtype=torch.int32, device=out.device) + width


SHAPES = {"plain": {}, "cluster": {"cluster": (2, 1, 1)}, "programmatic": {"programmatic": 1}, "shared memory": {"smem": 200_000}}


@pytest.mark.parametrize("name", SHAPES)
def test_launch(host, name):
    if torch.cuda.get_device_capability()[0] != 9 and name != "plain":
        pytest.skip("asks for what only compute capability 9.0 has")
    shape, width = SHAPES[name], 5 + list(SHAPES).index(name)
    out = torch.zeros(256, dtype=torch.int32, device="cuda")
    launch(host, load(host, width, smem=shape.get("smem", 0)), out, **shape)
    torch.testing.assert_close(out, expected(out, width), rtol=0, atol=0)


def test_limits(host):
    limits, properties = host.device()[2], torch.cuda.get_device_properties(0)
    assert (limits.cc_major, limits.cc_minor) == (properties.major, properties.minor)
    assert limits.sm_count == properties.multi_processor_count and limits.name.decode() == properties.name
    assert limits.smem_per_block_optin == properties.shared_memory_per_block_optin and limits.l2_bytes == properties.L2_cache_size


def test_first_use_of_a_kernel_under_capture_and_replay(host):
    out = torch.zeros(300, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert host.memset(0, out.data_ptr(), 0, out.numel() * 4, torch.cuda.current_stream().cuda_stream) == (OK, "")
        launch(host, load(host, 21), out)
    for _ in range(2):
        out.fill_(-1)
        graph.replay()
        torch.testing.assert_close(out, expected(out, 21), rtol=0, atol=0)


def test_a_thread_that_has_no_context(host):
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    args = ToyArgs(out.data_ptr(), out.numel())
    results = []
    thread = threading.Thread(target=lambda: results.append(host.launch(load(host, 31), (1, 1, 1), (64, 1, 1), argument=args)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert results == [(OK, "")]
    torch.testing.assert_close(out, expected(out, 31), rtol=0, atol=0)


def test_another_device_than_the_current_one(host):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    out = torch.zeros(64, dtype=torch.int32, device="cuda:1")
    with torch.cuda.device(0):
        launch(host, load(host, 41, device=1), out)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out, expected(out, 41), rtol=0, atol=0)


def test_too_much_shared_memory_is_refused_by_name(host):
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    code, message, _ = host.kernel(host.variant(WIDTH=51, smem=limit + 4))
    assert code != OK and str(limit) in message and "toy-WIDTH=51" in message


def test_a_bad_launch_names_the_kernel_and_leaves_the_device_usable(host):
    kernel = load(host, 61)
    code, message = host.launch(kernel, (1, 1, 1), (2048, 1, 1), argument=ToyArgs())
    assert code != OK and "toy-WIDTH=61" in message and "2048" in message and "CUDA_ERROR_INVALID_VALUE" in message
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    launch(host, kernel, out)
    torch.testing.assert_close(out, expected(out, 61), rtol=0, atol=0)


def test_tensor_map_of_a_strided_tensor(host):
    if host.device()[2].cc_major < 9:
        pytest.skip("tensor maps are for compute capability 9.0 on")
    raw, error = (c.c_ubyte * 192)(), Error()
    aligned = (c.addressof(raw) + 63) // 64 * 64
    q = torch.empty(2, 100, 3, 128, dtype=torch.bfloat16, device="cuda")
    dims, strides = (64, 100, 2, 3, 2), (3 * 128 * 2, 128, 128 * 2, 100 * 3 * 128 * 2)
    shape = TensorMapShape(4, 5, q.data_ptr(), dims, strides, (64, 128, 2, 1, 1), 3, 3)
    code = host.lib.fa_driver_tensor_map(0, c.byref(shape), c.c_void_p(aligned), c.byref(error))
    assert code == OK, error.message


def test_cost_of_each_source(library, tmp_path):
    """Compiled under a second; from the cache within 50 ms over a second call; in memory about a microsecond, ctypes included."""
    script = f"""
import time, torch, cuda_host as h
torch.zeros(1, device="cuda")
host = h.Host({library!r})
host.hint_nvrtc()
variant = host.variant(WIDTH=1)
times = []
for _ in range(3):
    start = time.perf_counter()
    assert host.kernel(variant)[0] == 0
    times.append(time.perf_counter() - start)
print(*times, host.stats().disk)
"""
    rows = [run_script(script, FLASH_ATTN_C_CACHE=str(tmp_path / "kernels")).split() for _ in range(2)]
    compiled, cached = [float(row[0]) for row in rows]
    print(f"compiled {compiled * 1e3:.1f} ms, cached {cached * 1e3:.1f} ms, in memory {float(rows[1][2]) * 1e6:.1f} us")
    assert [row[3] for row in rows] == ["0", "1"]
    assert compiled < 1 and cached - float(rows[1][1]) < 0.05


def test_cost_of_a_launch(host):
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    kernel = load(host, 71)
    stream = torch.cuda.current_stream().cuda_stream
    host.lib.fa_driver_launch.restype = c.c_int
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            host.launch(kernel, (1, 1, 1), (64, 1, 1), stream=stream, argument=ToyArgs(out.data_ptr(), 64))
        best = min(best, (time.perf_counter() - start) / 100)
    torch.cuda.synchronize()
    print(f"launch {best * 1e6:.1f} us, ctypes included")
    assert best < 100e-6


def test_a_forked_child_is_refused(library, tmp_path):
    out = run_script(
        f"""
import os, cuda_host as h
host = h.Host({library!r})
assert host.device()[0] == 0
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, host.device()[1].encode())
    os._exit(0)
os.wait()
print(os.read(read, 1000).decode())
""",
        FLASH_ATTN_C_CACHE=str(tmp_path / "kernels"),
    )
    assert "'spawn'" in out
