"""Building and shipping: the wheel, life without torch, and the C library without Python."""

import glob
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what a release holds, so that building leaves no trace in the repository."""
    copy = tmp_path_factory.mktemp("tree") / "flash_attn_c"
    outputs = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for folder in ("csrc", "flash_attn_c", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=outputs)
    shutil.copytree(ROOT / "tests" / "c", copy / "tests" / "c")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out, ".", cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def c_sources(tree):
    run(sys.executable, "setup.py", "--quiet", "embed", cwd=tree)
    folders = ("core", "cpu", "cuda", "cuda/store")
    return [path for folder in folders for path in sorted(glob.glob(f"csrc/{folder}/*.c", root_dir=tree))] + ["build/embedded_sources.c"]


def compile_c(tree, sources, output, *flags):
    run("cc", "-std=gnu11", "-O1", "-g", "-I.", *flags, *sources, "-lm", "-lpthread", "-ldl", "-o", output, cwd=tree)


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded Python has no stable ABI")
def test_one_wheel_for_every_python(wheel):
    assert wheel.name.startswith("flash_attn_c-") and "-cp310-abi3-linux" in wheel.name, wheel.name


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 5e6, wheel.stat().st_size


def test_wheel_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"flash_attn_c/{path.name}" for path in (ROOT / "flash_attn_c").glob("*.py")}
    assert modules <= set(names)
    assert {"flash_attn_c/py.typed", "flash_attn_c/_C.pyi"} <= set(names)
    assert not [name for name in names if name.endswith((".c", ".h", ".cu")) or name.startswith("tests")]


def test_wheel_metadata(wheel, installed):
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: numpy"], "torch is never pulled in"
    version = [line for line in (ROOT / "flash_attn_c" / "__init__.py").read_text().splitlines() if line.startswith("__version__")]
    assert f'__version__ = "{wheel.name.split("-")[1]}"' in version[0]


def test_works_without_torch(installed, tmp_path):
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("torch is blocked")
sys.meta_path.insert(0, NoTorch())
sys.path.insert(0, sys.argv[1])
import numpy as np
import flash_attn_c
assert flash_attn_c.__file__.startswith(sys.argv[1])
q = np.random.default_rng(0).standard_normal((1, 40, 2, 16), dtype="f4")
out = flash_attn_c.attention(q, q, q)
s = np.exp(np.einsum("bihd,bjhd->bhij", q, q) / 4)
print(float(np.abs(out - np.einsum("bhij,bjhd->bihd", s / s.sum(-1, keepdims=True), q)).max()) < 1e-5)
"""
    assert run(sys.executable, "-c", code, installed, cwd=tmp_path).split() == ["True"]


def test_importing_does_not_import_torch(installed, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import flash_attn_c; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run(sys.executable, "-c", code, installed, cwd=tmp_path).split() == ["False", "False"]


def test_c_example(tree, c_sources, tmp_path):
    compile_c(tree, ["examples/attention.c", *c_sources], tmp_path / "attention")
    assert "largest error" in run(tmp_path / "attention", cwd=tmp_path)
    if shutil.which("valgrind"):
        strict = ("-q", "--leak-check=full", "--errors-for-leak-kinds=definite", "--error-exitcode=9")
        run("valgrind", *strict, tmp_path / "attention", cwd=tmp_path)


def test_c_core(tree, c_sources, tmp_path):
    tests = sorted(f"tests/c/{path.name}" for path in (tree / "tests" / "c").glob("*test*.c"))
    compile_c(tree, [*tests, *c_sources], tmp_path / "core_tests")
    assert run(tmp_path / "core_tests", cwd=tmp_path).rstrip().endswith(" 0 failed")


def test_c_header_is_also_cpp(tree, tmp_path):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    (tmp_path / "use.cpp").write_text('#include "csrc/flash_attn.h"\nint main() { fa_request r = {}; return r.q.dtype; }\n')
    flags = ("-std=c++11", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers", "-fsyntax-only", f"-I{tree}")
    run("c++", *flags, tmp_path / "use.cpp", cwd=tmp_path)


@pytest.mark.parametrize("file", ["engine.c", "tier.c", "cpuid.c", "forward.c", "backward.c", "amx_forward.c", "amx_backward.c"])
def test_a_compiler_without_amx_builds_the_rest(file: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to take for an older one")
    older = ["-U__GNUC__", "-D__GNUC__=10", "-fsyntax-only"]
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", *older, f"-I{ROOT / 'csrc'}", str(ROOT / "csrc/cpu" / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
