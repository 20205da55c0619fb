"""The kernel store without a GPU: keys, disk cache, shipped kernels, finding NVRTC. The driver is a fake, NVRTC and the files are real."""

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_host import TOY_HEADER, build_fake_driver, build_host, cuda_include, run_script

pytestmark = pytest.mark.skipif(cuda_include() is None, reason="no cuda.h on this machine (CUDA_HOME, nvcc and /usr/local/cuda looked at)")

GET = """
code, message, kernel = host.kernel(host.variant(WIDTH=1))
s = host.stats()
place = "shipped" if s.shipped else "disk" if s.disk else "compiled" if s.compiled else "none"
print(code, place, "|", host.lib.fa_store_take_note(), "|", message)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    other = tmp_path_factory.mktemp("other")
    return {
        "host": str(build_host(folder)),
        "changed": str(build_host(other, TOY_HEADER.replace("2 * i", "3 * i"))),
        "fake": str(build_fake_driver(folder)),
    }


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def store(libraries, cache):
    """Runs a script with `host` in a fresh process."""

    def run(script=GET, library="host", hint=True, **environment):
        environment = {"FLASH_ATTN_C_CACHE": str(cache), "FLASH_ATTN_C_NVRTC": None, **environment}
        opening = f"import cuda_host as h\nhost = h.Host({libraries[library]!r}, {libraries['fake']!r})\n"
        return run_script(opening + ("host.hint_nvrtc()\n" if hint else "") + script, **environment)

    return run


@pytest.fixture(scope="module", autouse=True)
def nvrtc(libraries):
    opening = f"import cuda_host as h\nhost = h.Host({libraries['host']!r})\nhost.hint_nvrtc()\n"
    out = run_script(opening + "print(host.compile(host.variant(WIDTH=1), 'sm_80')[:2])")
    if "NVRTC (libnvrtc.so) was not found" in out:
        pytest.skip("no libnvrtc on this machine (pip install nvidia-cuda-nvrtc)")


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 100_003])
def test_sha256(libraries, size):
    lib = ctypes.CDLL(libraries["host"])
    data = bytes(i * 7 % 251 for i in range(size))
    state = ctypes.create_string_buffer(256)

    class Digest(ctypes.Structure):
        _fields_ = [("bytes", ctypes.c_ubyte * 32)]

    lib.fa_sha256_end.restype = Digest
    lib.fa_sha256_start(state)
    for start in range(0, size, 37):
        lib.fa_sha256_feed(state, data[start : start + 37], ctypes.c_size_t(len(data[start : start + 37])))
    assert bytes(lib.fa_sha256_end(state).bytes) == hashlib.sha256(data).digest()


def test_second_process_reads_what_the_first_wrote(store, cache):
    assert store() == "0 compiled | None | \n"
    assert store() == "0 disk | None | \n"
    file = only_file(cache)
    assert file.name.startswith("toy-WIDTH=1-sm_90a-") and file.name.endswith(".cubin")
    assert cache.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600


def test_key_depends_on_text_constants_and_architecture(store, cache):
    names = set()
    for script in (
        "host.kernel(host.variant(WIDTH=1))",
        "host.kernel(host.variant(WIDTH=2))",
        "host.kernel(host.variant(WIDTH=1, LENGTH=1))",
    ):
        store(script)
    store("host.set('cc_major', 8); host.kernel(host.variant(WIDTH=1))")
    store("host.kernel(host.variant(WIDTH=1))", library="changed")
    names = sorted(file.name for file in cache.iterdir())
    assert len(names) == 5
    store("host.kernel(host.variant(WIDTH=1))\nhost.kernel(host.variant(WIDTH=2))")
    assert sorted(file.name for file in cache.iterdir()) == names


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "empty", "pipe", "link", "folder_of_old_format"])
def test_a_damaged_file_is_compiled_again(store, cache, tmp_path, damage):
    store()
    file = only_file(cache)
    good = file.read_bytes()
    file.unlink()
    if damage == "flip":
        file.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    elif damage == "cut":
        file.write_bytes(good[: len(good) // 2])
    elif damage == "header":
        file.write_bytes(good[:12] + b"\xff" * 40 + good[52:])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(good)
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder_of_old_format":
        file.write_bytes(good[:8] + b"\x63" + good[9:])
    assert store() == "0 compiled | None | \n"
    assert file.read_bytes()[96:] == good[96:] and not file.is_symlink()
    assert store() == "0 disk | None | \n"


def test_a_kernel_under_another_name_is_not_taken(store, cache):
    store()
    file = only_file(cache)
    store("host.kernel(host.variant(WIDTH=2))")
    (other,) = [f for f in cache.iterdir() if f != file]
    other.replace(file)
    assert store() == "0 compiled | None | \n"


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda folder: folder.mkdir(mode=0o755), ["other users may enter", "chmod 700"]),
        (lambda folder: folder.symlink_to(folder.parent), ["symbolic link"]),
        (lambda folder: folder.write_text("a file"), ["Not a directory"]),
        (lambda folder: (folder.mkdir(mode=0o700), os.chown(folder, 65534, 65534)), ["another user"]),
    ],
    ids=["open", "link", "file", "foreign"],
)
def test_a_folder_that_cannot_be_trusted_is_not_used(store, cache, prepare, words):
    if "another user" in words and os.geteuid() != 0:
        pytest.skip("needs root to give a folder away")
    prepare(cache)
    if not cache.is_symlink() and cache.is_dir() and "open" not in str(words):
        os.chmod(cache, 0o755 if "chmod 700" in words else 0o700)
    out = store(GET + "print(host.lib.fa_store_take_note())")
    assert out.startswith("0 compiled | ") and out.endswith("None\n")
    assert all(word in out for word in [*words, "FLASH_ATTN_C_CACHE", str(cache)])


def test_memory_only_by_choice_and_by_need(store, tmp_path):
    assert store(FLASH_ATTN_C_CACHE="off") == "0 compiled | None | \n"
    out = store(FLASH_ATTN_C_CACHE=None, XDG_CACHE_HOME=None, HOME="/proc")
    assert out.startswith("0 compiled | ") and "/proc/.cache/flash_attn_c" in out
    assert "HOME is not set" in store(FLASH_ATTN_C_CACHE=None, XDG_CACHE_HOME=None, HOME=None)


def test_where_the_cache_lies(store, tmp_path):
    store(FLASH_ATTN_C_CACHE=None, XDG_CACHE_HOME=str(tmp_path / "xdg"))
    store(FLASH_ATTN_C_CACHE=None, XDG_CACHE_HOME=None, HOME=str(tmp_path / "home"))
    assert only_file(tmp_path / "xdg/flash_attn_c") and only_file(tmp_path / "home/.cache/flash_attn_c")
    store(FLASH_ATTN_C_CACHE=str(tmp_path / "deep/down/here"))
    assert only_file(tmp_path / "deep/down/here")


def test_constants_of_a_benchmark_replace_those_of_the_plan(store):
    script = """
names = []
for constants in {}, {"WIDTH": 3}, {"HEIGHT": 3}, {}:
    assert host.override(**constants) == (0, "")
    names.append(host.kernel(host.variant(WIDTH=1))[2].name.decode())
print(*names)
print(host.override(**{"X" * 32: 1})[1])
"""
    first, *others, refused = store(script).replace("\n", " ").split(" ", 4)
    wide, unknown, last = others
    assert "WIDTH=1" in first and "WIDTH=3" in wide and first == unknown == last
    assert "longer than 31 characters" in refused


def test_a_full_disk_is_said_once(store, libraries, cache):
    # A limit of zero on file size stands in for a full disk.
    out = store(
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" + GET
    )
    assert out.startswith("0 compiled | ") and "cannot be written" in out
    assert list(cache.iterdir()) == []


def test_processes_at_once(libraries, cache):
    script = (
        f"import cuda_host as h\nhost = h.Host({libraries['host']!r}, {libraries['fake']!r})\nhost.hint_nvrtc()\n"
        "print([host.kernel(host.variant(WIDTH=w))[0] for w in (1, 2, 3)])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "FLASH_ATTN_C_CACHE": str(cache)}
    running = [subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [p.communicate(timeout=120)[0] for p in running] == ["[0, 0, 0]\n"] * 4
    assert len(list(cache.iterdir())) == 3 and all(file.suffix == ".cubin" for file in cache.iterdir())


def test_the_least_used_go_first(libraries, cache):
    cache.mkdir()
    for age, name in enumerate(["new", "middle", "old"]):
        (cache / f"{name}.cubin").write_bytes(b"x" * 1000)
        os.utime(cache / f"{name}.cubin", (1e9 - age, 1e9 - age))
    (cache / ".1.2.part").write_bytes(b"x")
    os.utime(cache / ".1.2.part", (1e9, 1e9))
    (cache / ".3.4.part").write_bytes(b"being written")
    (cache / "unrelated").write_bytes(b"x" * 5000)
    fd = os.open(cache, os.O_RDONLY)
    ctypes.CDLL(libraries["host"]).fa_disk_trim(fd, ctypes.c_int64(2000))
    os.close(fd)
    assert sorted(file.name for file in cache.iterdir()) == [".3.4.part", "middle.cubin", "new.cubin", "unrelated"]


class TestShipped:
    @pytest.fixture
    def shipped(self, store, tmp_path):
        folder = tmp_path / "cubins"
        folder.mkdir()
        out = store(f"print(*host.ship(host.variant(WIDTH=1), 'sm_90a', {str(folder)!r}))")
        assert out.startswith("0  toy-WIDTH=1-sm_90a-")
        return folder

    def test_found_with_no_compiler_and_no_cache(self, store, shipped, cache):
        use = f"host.lib.fa_store_set_shipped({str(shipped).encode()!r})\n"
        assert store(use + GET, FLASH_ATTN_C_NVRTC="/nowhere") == "0 shipped | None | \n"
        assert not cache.exists()

    def test_of_another_source_is_not_taken(self, store, shipped):
        use = f"host.lib.fa_store_set_shipped({str(shipped).encode()!r})\n"
        assert store(use + GET, library="changed") == "0 compiled | None | \n"

    def test_too_new_for_the_driver_is_passed_over(self, store, shipped):
        use = f"host.lib.fa_store_set_shipped({str(shipped).encode()!r})\nhost.set('driver_version', 12080)\n"
        out = store(use + GET, FLASH_ATTN_C_NVRTC="/nowhere")
        assert out.startswith("4 none") and "FLASH_ATTN_C_NVRTC=/nowhere is no NVRTC library" in out

    def test_damaged_is_compiled_again_and_said(self, store, shipped):
        file = only_file(shipped)
        file.write_bytes(file.read_bytes()[:-1])
        out = store(f"host.lib.fa_store_set_shipped({str(shipped).encode()!r})\n" + GET)
        assert out.startswith("0 compiled | ") and "is damaged" in out

    def test_refused_arguments(self, store, tmp_path):
        assert "'sm_70' is none of sm_80" in store("print(*host.compile(host.variant(WIDTH=1), 'sm_70')[:2])")
        assert "No such file" in store(f"print(*host.ship(host.variant(WIDTH=1), 'sm_80', {str(tmp_path / 'absent')!r}))")


class TestNvrtc:
    COMPILE = "print(*host.compile(host.variant(WIDTH=1), 'sm_90a')[:2])\n"

    def find(self, store):
        script = (
            "class Info(h.c.Structure): _fields_ = [('version', h.c.c_int), ('bytes', h.c.c_int64), ('path', h.c.c_char * 512)]\n"
            "info = Info()\nprint(host.lib.fa_nvrtc_identify(0, h.c.byref(info), None), info.version, info.bytes, info.path.decode())\n"
            "print(any('libnvrtc' in line for line in open('/proc/self/maps')))\n"
        )
        line, loaded = store(script).splitlines()
        code, version, size, path = line.split(maxsplit=3)
        assert code == "0" and int(version) >= 12000
        return int(version), int(size), path, loaded == "True"

    def test_identified_without_loading(self, store):
        _, size, path, loaded = self.find(store)
        assert size == os.stat(path).st_size and not loaded

    def test_a_named_library_a_named_folder_and_a_wrong_name(self, store):
        path = self.find(store)[2]
        assert store(self.COMPILE, hint=False, FLASH_ATTN_C_NVRTC=path) == "0 \n"
        assert store(self.COMPILE, hint=False, FLASH_ATTN_C_NVRTC=os.path.dirname(path)) == "0 \n"
        assert "FLASH_ATTN_C_NVRTC=/etc/passwd is no NVRTC" in store(self.COMPILE, hint=False, FLASH_ATTN_C_NVRTC="/etc/passwd")

    def test_newer_than_the_driver_is_refused(self, store):
        version, _, path, _ = self.find(store)
        old = f"host.set('driver_version', {version - 1000})\n"
        out = store(old + GET, FLASH_ATTN_C_NVRTC=path)
        assert out.startswith("4 none") and ("that this driver serves" in out or "too old" in out)
        out = store(self.COMPILE + old + GET, FLASH_ATTN_C_NVRTC=path)
        assert "newer than the driver" in out or "too old" in out

    def test_a_failed_compilation_keeps_its_log(self, store):
        out = store("code, message, cubin, log = host.compile(host.variant('broken'), 'sm_80')\nprint(code, cubin, message, log)")
        assert out.startswith("4 b'' NVRTC") and out.count("no_such_name") >= 2

    def test_threads_compile_at_once(self, store):
        out = store("""
import threading
found = []
threads = [threading.Thread(target=lambda w=w: found.append(host.compile(host.variant(WIDTH=w), "sm_80")[0])) for w in range(6)]
for t in threads: t.start()
for t in threads: t.join()
print(found)
""")
        assert out == "[0, 0, 0, 0, 0, 0]\n"
