"""The library as one part of a process: forks, threads, thread counts, the GIL, subinterpreters, and nothing left behind by errors."""

import concurrent.futures
import gc
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import flash_attn_c
import numpy as np
import pytest
import torch
from flash_attn_c import _C

import binding

SECONDS = 30  # what hangs is ended after this


def inputs(seqlen=300, heads=4, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, seqlen, heads, dim, generator=generator) for _ in range(3)]


def run_with_gradients(q, k, v):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = flash_attn_c.attention(q, k, v, causal=True)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def python(code, **environment):
    """Runs code in a fresh interpreter; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(flash_attn_c.__file__).parents[1]), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("torch is blocked")
sys.meta_path.insert(0, NoTorch())
import json, os, numpy as np
from flash_attn_c import _C, attention
q = np.random.default_rng(0).standard_normal((2, 300, 4, 32), dtype="f4")
threads = lambda: len(os.listdir("/proc/self/task"))
"""

# ---- Threads ----


@pytest.fixture
def thread_count():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_thread_count(thread_count):
    results = []
    for count in (1, 2, 3):
        thread_count(count)
        results.append(run_with_gradients(*inputs()))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_torch_set_num_threads_is_honoured(thread_count):
    q, k, v = inputs()
    for count in (1, 2):
        thread_count(count)
        plan = flash_attn_c.explain(q, k, v)
        assert (plan.threads, plan.thread_source) == (count, "torch")


def cpu_nanoseconds():
    """CPU time so far of each thread of this process. Unlike wall time, other processes do not disturb it."""
    tasks = {}
    for task in pathlib.Path("/proc/self/task").iterdir():
        tasks[task.name] = int((task / "schedstat").read_text().split()[0])
    return tasks


def test_two_threads_share_the_work():
    if len(os.sched_getaffinity(0)) < 2 or torch.get_num_threads() < 2:
        pytest.skip("one CPU")
    q, k, v = inputs(seqlen=2000)
    before = cpu_nanoseconds()
    for _ in range(3):
        flash_attn_c.attention(q, k, v)
    gained = sorted(spent - before.get(task, 0) for task, spent in cpu_nanoseconds().items())
    assert gained[-2] > 0.3 * gained[-1], gained[-3:]


def test_several_python_threads_at_once():
    data = [inputs(seed=i) for i in range(4)]
    alone = [run_with_gradients(*d) for d in data]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for expected, got in zip(alone, pool.map(lambda d: run_with_gradients(*d), data), strict=True):
                assert_same(expected, got)


def test_the_gil_is_released():
    q, k, v = inputs(seqlen=2500)
    ticks, done = 0, threading.Event()

    def compute():
        flash_attn_c.attention(q, k, v)
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 5


def test_own_pool_without_torch():
    code = (
        WITHOUT_TORCH
        + """
attention(q, q, q)
cpu = json.loads(_C.describe())["cpu"]
print(cpu["thread_source"], cpu["threads"], threads())
"""
    )
    source, count, threads = python(code, FLASH_ATTN_C_NUM_THREADS="3", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    assert (source, count, threads) == ("own", "3", "3")


def test_own_pool_takes_the_count_of_openmp_or_of_the_affinity():
    code = WITHOUT_TORCH + 'print(json.loads(_C.describe())["cpu"]["threads"])'
    assert python(code, OMP_NUM_THREADS="5") == ["5"]
    assert python(code, OMP_NUM_THREADS="4,2") == ["4"]
    assert python("import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n" + code) == ["1"]


def test_own_pool_gives_the_same_bits():
    code = WITHOUT_TORCH + "import hashlib; print(hashlib.sha256(attention(q, q, q, causal=True)).hexdigest())"
    assert python(code, FLASH_ATTN_C_NUM_THREADS="1") == python(code, FLASH_ATTN_C_NUM_THREADS="4")


def test_torch_imported_later_is_noticed():
    code = """
import json, numpy as np
from flash_attn_c import _C, attention
source = lambda: json.loads(_C.describe())["cpu"]["thread_source"]
q = np.zeros((1, 8, 1, 8), "f4")
attention(q, q, q)
print(source())
import torch
attention(q, q, q)
print(source())
"""
    assert python(code) == ["own", "torch"]


# ---- Forks ----


def in_child(work):
    """Runs work in a forked child; returns its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def forward_only(q, k, v):
    """One call and nothing of torch's own, whose parallel loops hang in a forked child."""
    out = np.full_like(q, np.nan)
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]), np.nan, "f4")
    binding.raw_forward({"q": q, "k": k, "v": v, "causal": True, "out": out, "lse": lse})
    return out


def arrays(**shape):
    return [t.numpy() for t in inputs(**shape)]


def test_fork_after_threads_ran():
    q, k, v = arrays()
    expected = forward_only(q, k, v)

    def work():
        assert np.array_equal(forward_only(q, k, v), expected)
        cpu = json.loads(_C.describe())["cpu"]
        assert (cpu["thread_source"], cpu["threads"]) == ("own", torch.get_num_threads())

    assert in_child(work) == 0
    assert np.array_equal(forward_only(q, k, v), expected)


def test_fork_of_a_fork():
    q, k, v = arrays()
    expected = forward_only(q, k, v)

    def check():
        assert np.array_equal(forward_only(q, k, v), expected)

    def work():
        check()
        assert in_child(check) == 0

    assert in_child(work) == 0


def test_fork_without_torch():
    code = (
        WITHOUT_TORCH
        + """
expected = attention(q, q, q)
child = os.fork()
if child == 0:
    os._exit(not np.array_equal(attention(q, q, q), expected))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert python(code, FLASH_ATTN_C_NUM_THREADS="2") == ["0"]


def test_fork_while_another_thread_computes():
    q, k, v = arrays(seqlen=1000)
    small = arrays()
    expected = forward_only(*small)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            forward_only(q, k, v)

    def check():
        assert np.array_equal(forward_only(*small), expected)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            assert in_child(check) == 0
    finally:
        stop.set()
        thread.join()


class Attending(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.from_numpy(forward_only(*arrays(seed=i)))


def test_data_loader_workers():
    expected = [torch.from_numpy(forward_only(*arrays(seed=i))) for i in range(4)]
    loader = torch.utils.data.DataLoader(Attending(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
    assert_same(list(loader), expected)


# ---- Interpreters ----


def test_a_subinterpreter_is_refused():
    code = """
import sys
import flash_attn_c._C
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
name = interpreters.create()
try:
    error = interpreters.run_string(name, "import sys; sys.path[:] = %r\\nimport flash_attn_c._C" % sys.path)
except Exception as raised:
    error = raised
print("ImportError" in str(error) or "subinterpreter" in str(error))
"""
    assert python(code) == ["True"]


def test_import_twice_is_one_module():
    code = """
import sys
import flash_attn_c._C as first
del sys.modules["flash_attn_c._C"]
import flash_attn_c._C as second
print(first.describe() == second.describe())
"""
    assert python(code) == ["True"]


# ---- Nothing is left behind ----


def refused_calls():
    q, k, v = inputs(seqlen=8)
    array = np.zeros((2, 8, 4, 32), "f4")
    base = binding.allocate(binding.complete({"q": q, "k": k, "v": v}))
    changes = [
        {"layout": "sbhd"},
        {"window": (1, 2, 3)},
        {"dropout_p": 2.0},
        {"k": [1]},
        {"v": array.astype(">f4")},
        {"q": array, "k": array, "v": array[:, :, :3]},
        {"q": q.to_sparse()},
        {"causal": "no"},
        {"mask": array},
    ]
    return [base | change for change in changes]


def refuse(calls, times):
    for _ in range(times):
        for call in calls:
            try:
                binding.raw_forward(call)
            except (TypeError, ValueError):
                continue
            raise AssertionError("not refused")


def test_refusals_leave_no_memory():
    """Blocks of Python's allocator; some hundred settle in free lists now and then, a leak would be one or more a call, every time."""
    calls, times = refused_calls(), 300

    def growth():
        gc.collect()
        before = sys.getallocatedblocks()
        refuse(calls, times)
        gc.collect()
        return sys.getallocatedblocks() - before

    growths = [growth() for _ in range(4)]
    assert min(growths) < times / 2, growths


def test_refusals_leave_no_references():
    calls = refused_calls()
    objects = [value for call in calls for value in call.values() if isinstance(value, (torch.Tensor, np.ndarray))]
    constants = [None, True, False, torch.Tensor, np.ndarray]

    def counts():
        gc.collect()
        return [sys.getrefcount(item) for item in objects], [sys.getrefcount(item) for item in constants]

    refuse(calls, 3)
    before = counts()
    refuse(calls, 200)
    after = counts()
    assert after[0] == before[0]
    assert all(abs(a - b) < 100 for a, b in zip(after[1], before[1], strict=True)), (before[1], after[1])


def test_calls_leave_no_references():
    q, k, v = (t.numpy() for t in inputs(seqlen=8))
    out, lse = np.empty_like(q), np.empty((2, 4, 8), "f4")
    request = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    binding.raw_forward(request)
    before = [sys.getrefcount(t) for t in request.values()]
    for _ in range(300):
        binding.raw_forward(request)
        binding.raw_backward(request | {"dout": q, "dq": np.empty_like(q)})
        binding.raw_explain(request)
        _C.describe()
    assert [sys.getrefcount(t) for t in request.values()] == before
