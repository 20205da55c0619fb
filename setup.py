"""Builds the extension flash_attn_c._C with a C compiler and nothing else; everything static about the package is in pyproject.toml.

The kernel files go into the module as text. `python setup.py embed` writes that text as build/embedded_sources.c alone, for programs that
compile csrc/ without Python.
"""

import glob
import os
import sysconfig
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

EMBEDDED = os.path.join("build", "embedded_sources.c")
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded interpreters have no stable ABI yet


def host_sources() -> list[str]:
    folders = ("core", "cpu", "cuda", "cuda/store", "python")
    return sorted(path for folder in folders for path in glob.glob(f"csrc/{folder}/*.c"))


def kernel_files() -> list[str]:
    """Kernels and every header they may include, by path below csrc/ (below csrc/cuda/ for kernels)."""
    kernels = glob.glob("csrc/cuda/kernels/*.cu") + glob.glob("csrc/cuda/kernels/*.h")
    shipped = glob.glob("csrc/cuda/store/prebuilt.txt")  # the list that `prebuild` compiles
    return sorted(kernels) + [f"csrc/core/{name}.h" for name in ("mask", "philox", "portable")] + shipped


def c_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t").replace("??", '?""?')
    return "\n".join(f'    "{line}\\n"' for line in escaped.splitlines()) or '    ""'


def write_embedded_sources() -> None:
    rows = []
    for path in kernel_files():
        with open(path, encoding="utf-8") as file:
            name = path.removeprefix("csrc/").removeprefix("cuda/")
            rows.append(f'  {{"{name}",\n{c_string(file.read())}}},\n')
    text = '#include "csrc/cuda/store/sources.h"\n\nconst fa_embedded_source fa_embedded_sources[] = {\n'
    text += "".join(rows) + "  {0, 0},\n};\n"
    os.makedirs(os.path.dirname(EMBEDDED), exist_ok=True)
    with open(EMBEDDED, "w", encoding="utf-8") as file:
        file.write(text)


class Embed(Command):
    description = f"write the kernel files into {EMBEDDED}"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        write_embedded_sources()


class BuildExt(build_ext):
    def run(self) -> None:
        write_embedded_sources()
        super().run()


extension = Extension(
    "flash_attn_c._C",
    sources=[*host_sources(), EMBEDDED],
    depends=[*glob.glob("csrc/**/*.h", recursive=True), *glob.glob("csrc/**/*.def", recursive=True), *kernel_files()],
    include_dirs=["."],
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if LIMITED_API else [],
    extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-g0", "-fno-trapping-math", "-fno-math-errno", "-Wall", "-Wextra"],
    libraries=["m", "pthread", "dl"],
    py_limited_api=LIMITED_API,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt, "embed": Embed},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
