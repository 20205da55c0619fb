"""The driver's interface as this library declares it, against NVIDIA's cuda.h, and driver.c against a driver with no GPU behind it."""

import subprocess

import pytest

from cuda_host import CSRC, build_fake_driver, build_host, compiler, cuda_include, run_script

pytestmark = pytest.mark.skipif(cuda_include() is None, reason="no cuda.h on this machine (CUDA_HOME, nvcc and /usr/local/cuda looked at)")

PREAMBLE = """
import cuda_host as h
host = h.Host({host!r}, {fake!r}{values})
host.hint_nvrtc()
"""

# ours, NVIDIA's
SAME_NUMBER = """
CU_OK CUDA_SUCCESS
CU_OUT_OF_MEMORY CUDA_ERROR_OUT_OF_MEMORY
CU_NO_DEVICE CUDA_ERROR_NO_DEVICE
CU_INVALID_IMAGE CUDA_ERROR_INVALID_IMAGE
CU_NO_BINARY CUDA_ERROR_NO_BINARY_FOR_GPU
CU_UNSUPPORTED_PTX CUDA_ERROR_UNSUPPORTED_PTX_VERSION
CU_ILLEGAL_ADDRESS CUDA_ERROR_ILLEGAL_ADDRESS
CU_LAUNCH_FAILED CUDA_ERROR_LAUNCH_FAILED
CU_ATTR_SM_COUNT CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
CU_ATTR_L2_BYTES CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
CU_ATTR_THREADS_PER_SM CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR
CU_ATTR_CC_MAJOR CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
CU_ATTR_CC_MINOR CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
CU_ATTR_SMEM_PER_SM CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
CU_ATTR_REGISTERS_PER_SM CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR
CU_ATTR_SMEM_PER_BLOCK_OPTIN CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
CU_FUNC_STATIC_SMEM CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
CU_FUNC_LOCAL_BYTES CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
CU_FUNC_REGISTERS CU_FUNC_ATTRIBUTE_NUM_REGS
CU_FUNC_MAX_DYNAMIC_SMEM CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CU_LAUNCH_CLUSTER CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
CU_LAUNCH_PROGRAMMATIC CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
CU_CAPTURE_RELAXED CU_STREAM_CAPTURE_MODE_RELAXED
CU_MAP_UINT8 CU_TENSOR_MAP_DATA_TYPE_UINT8
CU_MAP_FLOAT16 CU_TENSOR_MAP_DATA_TYPE_FLOAT16
CU_MAP_FLOAT32 CU_TENSOR_MAP_DATA_TYPE_FLOAT32
CU_MAP_FLOAT64 CU_TENSOR_MAP_DATA_TYPE_FLOAT64
CU_MAP_BFLOAT16 CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
FA_SWIZZLE_NONE CU_TENSOR_MAP_SWIZZLE_NONE
FA_SWIZZLE_32B CU_TENSOR_MAP_SWIZZLE_32B
FA_SWIZZLE_64B CU_TENSOR_MAP_SWIZZLE_64B
FA_SWIZZLE_128B CU_TENSOR_MAP_SWIZZLE_128B
FA_L2_NONE CU_TENSOR_MAP_L2_PROMOTION_NONE
FA_L2_64B CU_TENSOR_MAP_L2_PROMOTION_L2_64B
FA_L2_128B CU_TENSOR_MAP_L2_PROMOTION_L2_128B
FA_L2_256B CU_TENSOR_MAP_L2_PROMOTION_L2_256B
0 CU_TENSOR_MAP_INTERLEAVE_NONE
0 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
"""

SAME_LAYOUT = """
sizeof(cu_device) sizeof(CUdevice)
sizeof(cu_handle) sizeof(CUstream)
sizeof(cu_launch_config) sizeof(CUlaunchConfig)
offsetof(cu_launch_config,grid) offsetof(CUlaunchConfig,gridDimX)
offsetof(cu_launch_config,block) offsetof(CUlaunchConfig,blockDimX)
offsetof(cu_launch_config,smem_bytes) offsetof(CUlaunchConfig,sharedMemBytes)
offsetof(cu_launch_config,stream) offsetof(CUlaunchConfig,hStream)
offsetof(cu_launch_config,attributes) offsetof(CUlaunchConfig,attrs)
offsetof(cu_launch_config,attribute_count) offsetof(CUlaunchConfig,numAttrs)
sizeof(cu_launch_attribute) sizeof(CUlaunchAttribute)
offsetof(cu_launch_attribute,value) offsetof(CUlaunchAttribute,value)
sizeof(fa_tensor_map) sizeof(CUtensorMap)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    return str(build_host(folder)), str(build_fake_driver(folder))


@pytest.fixture
def driver(libraries, tmp_path):
    """Runs a script with `host` opened on the fake driver, which is steered by keyword values."""

    def run(script: str, **values: int) -> str:
        preamble = PREAMBLE.format(host=libraries[0], fake=libraries[1], values="".join(f", {n}={v}" for n, v in values.items()))
        return run_script(preamble + script, FLASH_ATTN_C_CACHE=str(tmp_path / "cache"))

    return run


def test_declarations_match_cuda_h(tmp_path):
    rows = [line.split() for line in (SAME_NUMBER + SAME_LAYOUT).split("\n") if line]
    asserts = "".join(f'_Static_assert((long)({ours}) == (long)({theirs}), "{ours}");\n' for ours, theirs in rows)
    source = tmp_path / "abi.c"
    source.write_text('#include <cuda.h>\n#include <stddef.h>\n#include "cuda/cuda_abi.h"\n#include "cuda/driver.h"\n' + asserts)
    command = [compiler(), "-std=gnu11", "-fsyntax-only", f"-I{cuda_include()}", f"-I{CSRC}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_limits_and_kernel_figures(driver):
    out = driver("""
code, message, limits = host.device(1)
print(limits.ordinal, limits.cc_major, limits.sm_count, limits.smem_per_block_optin, limits.l2_bytes >> 20, limits.name.decode())
code, message, kernel = host.kernel(host.variant(WIDTH=1, smem=200000), device=1)
print(kernel.name.decode(), kernel.device, kernel.registers, kernel.local_bytes, kernel.static_smem_bytes, host.get("dynamic_smem"))
""")
    assert out.splitlines() == ["1 9 132 232448 50 Fake GPU", "toy-WIDTH=1-sm_90a 1 168 8 1024 200000"]


def test_launch_hands_everything_on_and_leaves_the_context(driver):
    out = driver("""
kernel = host.kernel(host.variant(WIDTH=1, smem=1000), device=1)[2]
print(host.launch(kernel, (5, 1, 7), (64, 1, 2), (2, 1, 3), 1000, 1, 77, 42))
print(*[host.get(n) for n in "grid_x grid_z block_x block_z launch_smem stream argument cluster_x cluster_z programmatic".split()])
print(host.launch(kernel, (1, 1, 1), (32, 1, 1)))
print(*[host.get(n) for n in "cluster_x programmatic depth capture_mode func_load".split()], host.get("push") == host.get("pop"))
""")
    assert out.splitlines() == ["(0, '')", "5 7 64 2 1000 77 42 2 3 1", "(0, '')", "0 0 0 0 1 True"]


def test_second_call_finds_the_kernel_in_memory(driver):
    out = driver("""
variant = host.variant(WIDTH=1)
first, second = host.kernel(variant)[2], host.kernel(host.variant(WIDTH=1))[2]
print(h.c.addressof(first) == h.c.addressof(second), host.get("load"), host.get("retain"))
other, elsewhere = host.kernel(host.variant(WIDTH=2))[2], host.kernel(variant, device=1)[2]
print(host.get("load"), elsewhere.device, elsewhere.function - first.function)
""")
    assert out.splitlines() == ["True 1 1", "3 1 1"]


def test_load_is_allowed_while_a_stream_captures(driver):
    # The fake driver refuses a load outside relaxed mode, as a real one does under a capture in global mode.
    assert driver("print(host.kernel(host.variant(WIDTH=1))[0], host.get('exchange'), host.get('capture_mode'))") == "0 2 0\n"


def test_memset_and_tensor_map(driver):
    out = driver("""
host.device()
print(host.memset(0, 4096, 7, 64), hex(host.get("memset_value")), host.get("memset_count"))
print(host.memset(0, 4097, 7, 64), hex(host.get("memset_value")), host.get("memset_count"))
print(host.memset(0, 4096, 7, 0), host.get("memset8") + host.get("memset32"))
class Map(h.c.Structure):
    _fields_ = [("bytes", h.c.c_ubyte * 192)]
raw, error = Map(), h.Error()
aligned = (h.c.addressof(raw) + 63) // 64 * 64
shape = h.TensorMapShape(4, 3, 1 << 20, (64, 100, 2), (128, 12800), (64, 128, 1), 3, 3)
print(host.lib.fa_driver_tensor_map(0, h.c.byref(shape), h.c.c_void_p(aligned), h.c.byref(error)))
print(host.get("map_type"), host.get("map_swizzle_128"), host.get("map_promote_256"))
shape.base += 8
print(host.lib.fa_driver_tensor_map(0, h.c.byref(shape), h.c.c_void_p(aligned), h.c.byref(error)), error.message.decode())
""")
    lines = out.splitlines()
    assert lines[:5] == ["(0, '') 0x7070707 16", "(0, '') 0x7 64", "(0, '') 2", "0", "1 1 1"]
    assert lines[5].startswith("4 tensor map of rank 3 at 0x100008, box 64 x 128 x 1")


@pytest.mark.parametrize(
    "values, script, words",
    [
        ({"devices": 0}, "host.device()", ["no GPU", "CUDA_VISIBLE_DEVICES"]),
        ({}, "host.device(5)", ["device 5", "2 devices"]),
        ({"driver_version": 11080}, "host.device()", ["too old", "12.0", "525"]),
        ({"cc_major": 7, "cc_minor": 5}, "host.kernel(host.variant(WIDTH=1))", ["Fake GPU", "7.5", "8.x"]),
        ({"cc_major": 9, "cc_minor": 1}, "host.kernel(host.variant(WIDTH=1))", ["9.1"]),
        ({}, "host.kernel(host.variant(WIDTH=1, smem=240000))", ["toy-WIDTH=1-sm_90a", "241024 bytes", "232448", "Fake GPU"]),
        ({}, "host.kernel(host.variant(WIDTH=1, entry='missing'))", ["missing", "toy.missing-WIDTH=1-sm_90a"]),
        ({}, "host.kernel(host.variant('absent'))", ["no kernel file absent.cu"]),
        ({}, "host.kernel(host.variant('broken'))", ["broken-sm_90a", "no_such_name"]),
        ({"refuse_code": 1}, "host.kernel(host.variant(WIDTH=1))", ["toy-WIDTH=1-sm_90a", "CUDA_ERROR_INVALID_IMAGE", "update the driver"]),
        (
            {"fail_launch": 700},
            "host.launch(host.kernel(host.variant(WIDTH=1))[2], (3, 1, 1), (64, 1, 1))",
            ["launch of toy-WIDTH=1-sm_90a", "grid 3 x 1 x 1", "block 64", "700", "CUDA_LAUNCH_BLOCKING"],
        ),
    ],
)
def test_what_can_go_wrong_says_what_to_do(driver, values, script, words):
    out = driver(f"print(*{script}[:2])", **values)
    assert out[0] in "34" and all(word in out for word in words), out


def test_without_a_driver(libraries):
    out = run_script(PREAMBLE.format(host=libraries[0], fake=None, values="") + "print(*host.device()[:2])", LD_LIBRARY_PATH=None)
    if out.startswith("0"):
        pytest.skip("this machine has a driver and a GPU")
    assert out.startswith("4 no NVIDIA driver on this machine") or "no GPU" in out


def test_a_forked_child_is_refused(driver):
    out = driver("""
import os
kernel = host.kernel(host.variant(WIDTH=1))[2]
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, repr((host.device()[:2], host.kernel(host.variant(WIDTH=1))[:2], host.kernel(host.variant(WIDTH=9))[:2])).encode())
    os._exit(0)
os.wait()
print(os.read(read, 4000).decode())
print(host.launch(kernel)[0])
""")
    assert out.count("'spawn'") == 3 and out.endswith("\n0\n")


def test_a_child_forked_before_the_first_use_may_use_it(driver):
    out = driver("""
import os
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, repr(host.kernel(host.variant(WIDTH=1))[:2]).encode())
    os._exit(0)
os.wait()
print(os.read(read, 4000).decode())
""")
    assert out == "(0, '')\n"


ARCHITECTURES = [
    ((8, 0), "sm_80"),
    ((8, 6), "sm_86"),
    ((8, 7), "sm_86"),
    ((8, 9), "sm_89"),
    ((9, 0), "sm_90a"),
    ((10, 3), "sm_100"),
    ((12, 1), "sm_120"),
]


@pytest.mark.parametrize("capability, target", ARCHITECTURES)
def test_every_architecture_has_its_target(driver, capability, target):
    out = driver("print(host.kernel(host.variant(WIDTH=1))[2].name.decode())", cc_major=capability[0], cc_minor=capability[1])
    assert out == f"toy-WIDTH=1-{target}\n"


def test_threads_share_one_kernel(driver):
    out = driver("""
import threading
found = []
threads = [threading.Thread(target=lambda: found.append(h.c.addressof(host.kernel(host.variant(WIDTH=1))[2]))) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(len(found), len(set(found)), host.get("load"), host.stats().compiled)
""")
    assert out == "8 1 1 1\n"
