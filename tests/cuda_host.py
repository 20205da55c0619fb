"""The host side of the CUDA engine, built alone as a shared library and driven through ctypes, with a few toy kernels in place of the
real ones and, where a test asks for it, a fake driver. Tests import this; it holds none."""

from __future__ import annotations

import ctypes as c
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OK, ERR_TYPE, ERR_VALUE, ERR_UNSUPPORTED, ERR_RUNTIME, ERR_MEMORY = range(6)

TOY_KERNEL = r"""
#include "toy.h"
#include "../../core/portable.h"
#include "../../core/mask.h"
struct toy_args { int *out; int n; };
extern "C" __global__ void toy(const struct toy_args args) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.out[i] = toy_value(i) + fa_min(WIDTH, 1000);
}
"""
TOY_HEADER = r"""
#ifndef TOY_H
#define TOY_H
static __device__ int toy_value(int i) { return 2 * i; }
#endif
"""
BROKEN_KERNEL = 'extern "C" __global__ void broken(int *out) { out[0] = no_such_name; }\n'


def cuda_include() -> str | None:
    """The folder of cuda.h, when a toolkit is installed."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        roots.append(str(Path(os.path.realpath(nvcc)).parents[1]))
    for root in roots:
        if root and (Path(root) / "include" / "cuda.h").is_file():
            return str(Path(root) / "include")
    return None


def compiler() -> str:
    return os.environ.get("CC") or shutil.which("cc") or "gcc"


def build_host(folder: Path, toy_header: str = TOY_HEADER) -> Path:
    """The driver and the store in one library, with the toy kernels embedded."""
    sources = {
        "kernels/toy.cu": TOY_KERNEL,
        "kernels/broken.cu": BROKEN_KERNEL,
        "kernels/toy.h": toy_header,
        "core/portable.h": (CSRC / "core/portable.h").read_text(),
        "core/mask.h": (CSRC / "core/mask.h").read_text(),
    }
    rows = "".join(f"  {{{c_string(name)}, {c_string(text)}}},\n" for name, text in sources.items())
    embedded = folder / "embedded_sources.c"
    embedded.write_text('#include "cuda/store/sources.h"\nconst fa_embedded_source fa_embedded_sources[] = {\n' + rows + "  {0, 0},\n};\n")
    library = folder / "libhost.so"
    files = [CSRC / "core/error.c", CSRC / "cuda/driver.c", *sorted((CSRC / "cuda/store").glob("*.c")), embedded]
    command = [compiler(), "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}", "-o", library, *files]
    command.append("-Wl,-Bsymbolic")  # the model of a GPU may be loaded too, with functions of the same names for all to see
    subprocess.run([str(part) for part in [*command, "-lpthread", "-ldl"]], check=True)
    return library


def build_fake_driver(folder: Path) -> Path:
    """A libcuda.so.1 compiled against the toolkit's cuda.h. Loading it first makes the host library's dlopen find it."""
    library = folder / "libcuda.so.1"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{cuda_include()}"]
    subprocess.run([compiler(), *flags, "-o", str(library), str(ROOT / "tests/fake_cuda.c")], check=True)
    return library


def c_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", '\\n"\n"') + '"'


def run_script(script: str, **environment: str | None) -> str:
    """Runs a Python script in a process of its own, since a driver can be opened only once; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    for name, value in environment.items():
        env.pop(name, None) if value is None else env.update({name: value})
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Error(c.Structure):
    _fields_ = [("code", c.c_int), ("message", c.c_char * 512)]


class Limits(c.Structure):
    _fields_ = [
        (name, c.c_int)
        for name in ("ordinal cc_major cc_minor sm_count smem_per_block_optin smem_per_sm registers_per_sm threads_per_sm l2_bytes").split()
    ] + [("name", c.c_char * 64)]


class Kernel(c.Structure):
    _fields_ = [
        ("function", c.c_void_p),
        ("device", c.c_int),
        ("registers", c.c_int),
        ("local_bytes", c.c_int),
        ("static_smem_bytes", c.c_int),
        ("name", c.c_char * 400),
    ]


class LaunchShape(c.Structure):
    _fields_ = [
        ("grid", c.c_uint * 3),
        ("block", c.c_uint * 3),
        ("cluster", c.c_uint * 3),
        ("smem_bytes", c.c_uint),
        ("programmatic", c.c_int),
        ("stream", c.c_void_p),
    ]


class TensorMapShape(c.Structure):
    _fields_ = [
        ("dtype", c.c_int),
        ("rank", c.c_int),
        ("base", c.c_void_p),
        ("dims", c.c_uint64 * 5),
        ("stride_bytes", c.c_uint64 * 4),
        ("box", c.c_uint32 * 5),
        ("swizzle", c.c_int),
        ("l2_promotion", c.c_int),
    ]


class Constant(c.Structure):
    _fields_ = [("name", c.c_char_p), ("value", c.c_int)]


class Variant(c.Structure):
    _fields_ = [
        ("kernel", c.c_char_p),
        ("entry", c.c_char_p),
        ("constant_count", c.c_int),
        ("constants", c.POINTER(Constant)),
        ("dynamic_smem_bytes", c.c_int),
    ]


class Stats(c.Structure):
    _fields_ = [
        ("memory", c.c_int),
        ("shipped", c.c_int),
        ("disk", c.c_int),
        ("compiled", c.c_int),
        ("compile_seconds", c.c_double),
        ("load_seconds", c.c_double),
        ("cache", c.c_char * 512),
        ("shipped_from", c.c_char * 512),
        ("note", c.c_char * 512),
    ]


class Host:
    """The library of build_host in this process. Every method returns (code, message) or raises nothing."""

    def __init__(self, library: str, fake_driver: str | None = None, **fake_values: int):
        self.fake = c.CDLL(fake_driver, mode=c.RTLD_GLOBAL) if fake_driver else None
        if self.fake:
            self.fake.fake_get.restype = c.c_longlong
            self.fake.fake_set.argtypes = [c.c_char_p, c.c_longlong]
        self.kept: list = []  # what C keeps pointers to
        for name, value in fake_values.items():
            self.set(name, value)
        self.lib = c.CDLL(library)
        self.lib.fa_store_take_note.restype = c.c_char_p

    def set(self, name: str, value: int) -> None:
        key = c.create_string_buffer(name.encode())
        self.kept.append(key)
        self.fake.fake_set(key, value)

    def get(self, name: str) -> int:
        key = c.create_string_buffer(name.encode())
        self.kept.append(key)
        return self.fake.fake_get(key)

    def hint_nvrtc(self) -> None:
        for folder in sys.path:
            if folder.endswith(("site-packages", "dist-packages")):
                self.lib.fa_nvrtc_hint(folder.encode())

    def device(self, ordinal: int = 0):
        error, limits = Error(), c.POINTER(Limits)()
        code = self.lib.fa_driver_device(ordinal, c.byref(limits), c.byref(error))
        return code, error.message.decode(), limits.contents if code == OK else None

    def variant(self, kernel: str = "toy", smem: int = 0, entry: str | None = None, **constants: int) -> Variant:
        array = (Constant * max(1, len(constants)))(*[Constant(name.encode(), value) for name, value in constants.items()])
        variant = Variant(kernel.encode(), (entry or kernel).encode(), len(constants), array, smem)
        self.kept.append((array, variant))
        return variant

    def kernel(self, variant: Variant, device: int = 0):
        error, kernel = Error(), c.POINTER(Kernel)()
        code = self.lib.fa_store_get(device, c.byref(variant), c.byref(kernel), c.byref(error))
        return code, error.message.decode(), kernel.contents if code == OK else None

    def override(self, **constants: int):
        error, array = Error(), (Constant * max(1, len(constants)))(*[Constant(name.encode(), value) for name, value in constants.items()])
        return self.lib.fa_store_override(array, len(constants), c.byref(error)), error.message.decode()

    def compile(self, variant: Variant, target: str):
        error, cubin, size, log = Error(), c.c_void_p(), c.c_size_t(), c.c_char_p()
        code = self.lib.fa_store_compile(c.byref(variant), target.encode(), c.byref(cubin), c.byref(size), c.byref(log), c.byref(error))
        return code, error.message.decode(), c.string_at(cubin, size.value) if cubin else b"", (log.value or b"").decode()

    def ship(self, variant: Variant, target: str, folder: str):
        error, file, log = Error(), c.create_string_buffer(256), c.c_char_p()
        where = target.encode(), folder.encode(), file, c.c_size_t(256)
        code = self.lib.fa_store_ship(c.byref(variant), *where, c.byref(log), c.byref(error))
        return code, error.message.decode(), file.value.decode()

    def launch(self, kernel: Kernel, grid=(1, 1, 1), block=(32, 1, 1), cluster=(0, 0, 0), smem=0, programmatic=0, stream=0, argument=0):
        """`argument`: the kernel's only parameter, an int or a ctypes structure."""
        error, value = Error(), c.c_int(argument) if isinstance(argument, int) else argument
        shape = LaunchShape((c.c_uint * 3)(*grid), (c.c_uint * 3)(*block), (c.c_uint * 3)(*cluster), smem, programmatic, stream)
        arguments = (c.c_void_p * 1)(c.addressof(value))
        code = self.lib.fa_driver_launch(c.byref(kernel), c.byref(shape), arguments, c.byref(error))
        return code, error.message.decode()

    def memset(self, device: int, address: int, value: int, size: int, stream: int = 0):
        error = Error()
        self.lib.fa_driver_memset.argtypes = [c.c_int, c.c_void_p, c.c_ubyte, c.c_size_t, c.c_void_p, c.c_void_p]
        code = self.lib.fa_driver_memset(device, address, value, size, stream, c.byref(error))
        return code, error.message.decode()

    def stats(self) -> Stats:
        stats = Stats()
        self.lib.fa_store_read_stats(c.byref(stats))
        return stats
