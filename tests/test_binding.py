"""What the compiled module makes of Python objects, and what it links."""

import gc
import pathlib
import subprocess
import sys
import sysconfig
import weakref

import flash_attn_c
import numpy as np
import pytest
import torch
from flash_attn_c import _C
from torch._subclasses import FakeTensorMode

import binding

MODULE = pathlib.Path(_C.__file__)


def call(**changes):
    """A small legal forward call on torch tensors, with changes."""
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
    return {"q": q, "k": k, "v": v, "out": torch.empty(2, 5, 2, 8), "lse": torch.empty(2, 2, 5), **changes}


def numpy_call(**changes):
    return {name: t.numpy() for name, t in call().items()} | changes


def expected(request):
    q, k, v = (t if isinstance(t, torch.Tensor) else torch.from_numpy(t.copy()) for t in (request[name] for name in "qkv"))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def check(request):
    binding.raw_forward(request)
    torch.testing.assert_close(torch.as_tensor(np.asarray(request["out"])), expected(request))


# ---- What is accepted ----


def test_torch():
    check(call())


def test_numpy():
    check(numpy_call())


def test_torch_and_numpy_together():
    check(call(k=np.random.randn(2, 5, 2, 8).astype("f4"), out=np.empty((2, 5, 2, 8), "f4")))


def test_torch_views():
    check(call(q=torch.randn(8, 2, 5, 2).permute(1, 2, 3, 0), k=torch.randn(2, 5, 2, 17)[..., 1::2], v=torch.randn(8).expand(2, 5, 2, 8)))


def test_numpy_views():
    k = np.random.randn(2, 5, 2, 16).astype("f4")[..., ::-2]
    v = np.broadcast_to(np.random.randn(8).astype("f4"), (2, 5, 2, 8))
    check(numpy_call(q=np.random.randn(8, 2, 5, 2).astype("f4").transpose(1, 2, 3, 0), k=k, v=v))


def test_read_only_input():
    q = np.random.randn(2, 5, 2, 8).astype("f4")
    q.flags.writeable = False
    check(numpy_call(q=q))


def test_lse_may_be_absent():
    check(call(lse=None))


@pytest.mark.parametrize("lse_too", [False, True])
@pytest.mark.parametrize("dim_v", [8, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_attention_makes_its_outputs(dtype, dim_v, lse_too):
    q, k, v = (torch.randn(2, 5, 2, dim).to(dtype).transpose(0, 1) for dim in (8, 8, dim_v))
    options = (False, None, None, 0.0, 0.0, 0, None, None, "bshd", False)
    result = _C.attention(q, k, v, None, options, lse_too, None)
    out, lse = result if lse_too else (result, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    request = call(q=q, k=k, v=v, out=torch.empty(5, 2, 2, dim_v, dtype=dtype), lse=torch.empty(5, 2, 2, dtype=wide))
    binding.raw_forward(request)
    assert torch.equal(out, request["out"])
    assert out.transpose(0, 1).is_contiguous(), "the order of q's axes in memory"
    assert lse is None or torch.equal(lse, request["lse"])


def test_parameters_and_tensors_that_require_grad():
    check(call(q=torch.nn.Parameter(torch.randn(2, 5, 2, 8)).detach(), k=torch.randn(2, 5, 2, 8)))
    request = call(q=torch.nn.Parameter(torch.randn(2, 5, 2, 8)))
    binding.raw_forward(request)
    assert torch.isfinite(request["out"]).all()


class OldProducer:
    """A tensor of before DLPack 1.0: an unversioned capsule, no max_version."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class NewProducer(OldProducer):
    """Any library with the current protocol but no exchange table."""

    def __dlpack__(self, stream=None, max_version=None):
        return self.array.__dlpack__(max_version=max_version)


@pytest.mark.parametrize("producer", [OldProducer, NewProducer])
def test_other_libraries(producer):
    q = np.random.randn(2, 5, 2, 8).astype("f4")
    request = numpy_call(q=producer(q))
    binding.raw_forward(request)
    torch.testing.assert_close(torch.from_numpy(request["out"]), expected(request | {"q": q}))


@pytest.mark.parametrize("producer", [OldProducer, NewProducer, np.asarray])
def test_capsules_are_given_back(producer):
    class Array(np.ndarray):
        pass

    q = np.random.randn(2, 5, 2, 8).astype("f4").view(Array)
    alive = weakref.ref(q)
    binding.raw_forward(numpy_call(q=producer(q)))
    with pytest.raises(ValueError, match="layout"):
        binding.raw_forward(numpy_call(q=producer(q), layout="sbhd"))
    with pytest.raises(ValueError, match="dropout_p"):
        binding.raw_forward(numpy_call(q=producer(q), dropout_p=2.0))
    before = sys.getrefcount(q)
    binding.raw_forward(numpy_call(q=producer(q)))
    assert sys.getrefcount(q) == before
    del q
    gc.collect()
    assert alive() is None


def test_more_types_than_the_cache_holds():
    for i in range(20):
        kind = type(f"Tensor{i}", (torch.Tensor,), {})
        check(call(q=torch.randn(2, 5, 2, 8).as_subclass(kind)))


@pytest.mark.parametrize(
    "changes",
    [
        {"window": [np.int64(1), torch.tensor(2)]},
        {"window": torch.Size([1, 2])},
        {"window": (None, 3)},
        {"scale": np.float32(0.5)},
        {"scale": torch.tensor(0.5)},
        {"scale": 1},
        {"causal": np.bool_(True)},
        {"causal": "top_left"},
        {"causal": "bottom_right"},
        {"deterministic": np.bool_(False)},
        {"dropout_p": 0},
        {"rng": (1, 2)},
        {"rng": (2**64 - 1, -1), "dropout_p": 0.5},
    ],
    ids=str,
)
def test_options_that_are_fine(changes):
    binding.raw_forward(call(**changes))


# ---- What is refused ----


def fake(t):
    with FakeTensorMode():
        return torch.empty(t.shape)


def misaligned(t):
    return torch.frombuffer(bytearray(4 * t.numel() + 1), dtype=torch.uint8)[1:].numpy().view("f4").reshape(t.shape)


REFUSED_TENSORS = [
    (lambda t: t.tolist(), TypeError, "expected a torch tensor or a NumPy array, got list"),
    (lambda t: 3.5, TypeError, "got float"),
    (lambda t: "q", TypeError, "got str"),
    (lambda t: torch.Tensor, TypeError, "got "),
    (lambda t: np.ndarray, TypeError, "got type"),
    (lambda t: np.float32(1), TypeError, "got float32"),
    (lambda t: memoryview(b"1234"), TypeError, "got memoryview"),
    (lambda t: t.to_sparse(), TypeError, ""),
    (lambda t: t.to("meta"), TypeError, ""),
    (fake, TypeError, ""),
    (lambda t: t.to(torch.complex64), TypeError, "dtype"),
    (lambda t: t.to(torch.int64), TypeError, "dtype int64"),
    (lambda t: t.bool(), TypeError, "dtype bool"),
    (lambda t: t.to(torch.uint8), TypeError, "dtype"),
    (lambda t: t[None, None], TypeError, "has 6 dimensions"),
    (lambda t: t.numpy().astype(">f4"), TypeError, "byte order"),
    (lambda t: np.array([None]), TypeError, ""),
    (lambda t: t.numpy().astype("U3"), TypeError, ""),
    (misaligned, ValueError, "multiple of its element size of 4 bytes"),
    (lambda t: t.to(torch.float8_e4m3fn), NotImplementedError, "float8_e4m3fn"),
]


@pytest.mark.parametrize("name", ["q", "v"])
@pytest.mark.parametrize(("make", "error", "words"), REFUSED_TENSORS, ids=range(len(REFUSED_TENSORS)))
def test_refused_tensors(name, make, error, words):
    request = call(out=torch.full((2, 5, 2, 8), 7.0))
    with pytest.raises(error, match=rf"^{name}: .*{words}"):
        binding.raw_forward(request | {name: make(request[name])})
    assert (request["out"] == 7).all()


@pytest.mark.parametrize("view", [lambda t: torch._neg_view(t), lambda t: torch.complex(t, t).conj().imag], ids=["neg", "conj"])
def test_lazily_negated_tensors_are_refused_by_the_front(view):
    request = call()
    with pytest.raises((TypeError, NotImplementedError), match=r"^k: "):
        flash_attn_c.attention(request["q"], view(request["k"]), request["v"])


def test_the_producer_is_quoted():
    class Broken:
        def __dlpack__(self, stream=None, max_version=None):
            raise BufferError("no such memory\nline 1 of a backtrace")

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(TypeError, match=r"^k: .*no such memory$") as caught:
        binding.raw_forward(call(k=Broken()))
    assert isinstance(caught.value.__cause__, BufferError)


def test_interrupts_pass():
    class Interrupted:
        def __dlpack__(self, stream=None, max_version=None):
            raise KeyboardInterrupt

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(KeyboardInterrupt):
        binding.raw_forward(call(k=Interrupted()))


def test_a_used_capsule_is_refused():
    class Once:
        capsule = np.zeros((2, 5, 2, 8), "f4").__dlpack__()

        def __dlpack__(self, stream=None, max_version=None):
            return self.capsule

        def __dlpack_device__(self):
            return (1, 0)

    binding.raw_forward(call(k=Once()))
    with pytest.raises(TypeError, match=r"^k: .*no fresh DLPack capsule"):
        binding.raw_forward(call(k=Once()))


def test_a_foreign_device_is_refused():
    class Elsewhere(NewProducer):
        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(NotImplementedError, match=r"^q: .*exchange table"):
        binding.raw_forward(call(q=Elsewhere(np.zeros((2, 5, 2, 8), "f4"))))


@pytest.mark.parametrize("name", ["out", "lse"])
def test_read_only_output(name):
    request = numpy_call()
    request[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"^{name}: .*read-only"):
        binding.raw_forward(request)


REFUSED_OPTIONS = [
    ({"causal": "foo"}, ValueError, "causal: 'foo' must be True, False, 'bottom_right' or 'top_left'"),
    ({"causal": None}, TypeError, "causal: expected .*, got NoneType"),
    ({"causal": 1}, TypeError, "causal: expected .*, got int"),
    ({"window": 3}, TypeError, "window: .*got int"),
    ({"window": "12"}, TypeError, "window: .*got str"),
    ({"window": (1, 2, 3)}, ValueError, "window: has 3 entries"),
    ({"window": (1, 2.0)}, TypeError, "window: .*got float"),
    ({"window": (True, 1)}, TypeError, "window: .*got bool"),
    ({"window": (torch.tensor(1.0), 1)}, TypeError, "window: .*got Tensor"),
    ({"window": {1, 2}}, TypeError, "window: .*got set"),
    ({"window": (2**64, 0)}, ValueError, "window: 18446744073709551616 does not fit"),
    ({"window": (-(2**63), 0)}, ValueError, "window: -9223372036854775808 does not fit"),
    ({"window": (-1, 0)}, ValueError, "window: left bound -1"),
    ({"scale": "1"}, TypeError, "scale: .*got str"),
    ({"scale": True}, TypeError, "scale: .*got bool"),
    ({"scale": 1j}, TypeError, "scale: .*got complex"),
    ({"scale": float("nan")}, ValueError, "scale: "),
    ({"scale": 10**400}, ValueError, "scale: .* too large"),
    ({"softcap": None}, TypeError, "softcap: .*got NoneType"),
    ({"dropout_p": "half"}, TypeError, "dropout_p: .*got str"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: 1 "),
    ({"block_size": 64.0}, TypeError, "block_size: .*got float"),
    ({"max_seqlen_q": 2.5}, TypeError, "max_seqlen_q: .*got float"),
    ({"max_seqlen_k": "5"}, TypeError, "max_seqlen_k: .*got str"),
    ({"layout": 4}, TypeError, "layout: .*got int"),
    ({"layout": "sbhd"}, ValueError, "layout: 'sbhd' must be 'bshd' or 'bhsd'"),
    ({"deterministic": 1}, TypeError, "deterministic: .*got int"),
    ({"deterministic": None}, TypeError, "deterministic: .*got NoneType"),
    ({"rng": (1, 2, 3)}, ValueError, "rng_state: has 3 entries"),
    ({"rng": (1, 2.0)}, TypeError, "rng_state: "),
    ({"rng": [1, 2]}, TypeError, "rng_state: .*got list"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED_OPTIONS, ids=lambda value: str(value)[:40])
def test_refused_options(changes, error, words):
    request = call(out=torch.full((2, 5, 2, 8), 7.0))
    with pytest.raises(error, match="^" + words):
        binding.raw_forward(request | changes)
    assert (request["out"] == 7).all()


@pytest.mark.parametrize("function", [_C.forward, _C.attention, _C.constructors, _C.backward, _C.explain])
def test_a_wrong_number_of_arguments(function):
    with pytest.raises(TypeError, match="positional arguments, got 2"):
        function(1, 2)


@pytest.mark.parametrize(
    ("tensors", "options", "words"), [(None, (), "options: .* tuple of 10"), ((None,), (None,) * 10, "tensors: .* tuple of 11")]
)
def test_tuples_of_the_wrong_length(tensors, options, words):
    request = call()
    with pytest.raises(TypeError, match=words):
        _C.attention(request["q"], request["k"], request["v"], tensors, options, False, None)


def test_signatures_are_documented():
    for function in (_C.forward, _C.attention, _C.constructors, _C.backward, _C.explain, _C.describe):
        assert function.__text_signature__ and function.__doc__


# ---- The file itself ----


def test_no_foreign_symbols():
    symbols = subprocess.run(["nm", "-D", MODULE], capture_output=True, text=True, check=True).stdout.lower()
    for word in ("torch", "c10", "cudart", "gomp", "omp_", "nvrtc", "_zn"):
        assert word not in symbols, word
    names = [line.split() for line in symbols.splitlines()]
    assert [parts[-1] for parts in names if parts[-2] in "tdb"] == ["pyinit__c"], "the module shows its entry and nothing else"


def test_libraries_needed():
    header = subprocess.run(["readelf", "-d", MODULE], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split("]")[0].split(".so")[0] for line in header.splitlines() if "NEEDED" in line}
    assert needed <= {"libm", "libc", "libpthread", "libdl", "ld-linux-x86-64", "ld-linux-aarch64"}, needed


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded Python has no stable ABI")
def test_stable_abi():
    assert MODULE.name.endswith(".abi3.so")
