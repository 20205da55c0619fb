"""Every shipped kernel compiles with no GPU, for every architecture, with no spill but the known ones and no serialised pipeline, and
takes the registers and the shared memory that the head of its file tells.

`make wheel` compiles all of the list; here it is every kernel with every value of every constant on sm_80 and sm_90a, and every kernel
once elsewhere.
"""

import json
import re
from collections import defaultdict

import pytest
from flash_attn_c import _C, prebuild

import list_kernels
from cuda_host import cuda_include
from plan_tool import PlanTool

# Kernels that the list leaves out, and why.
UNLISTED = {"probs": "for debugging; compiled at first use"}

# Spills that are known and bounded, in bytes, by kernel and DTYPE; every other kernel has none. Smaller tiles, or loops that are unrolled
# less, have none either, and were measured to be slower.
KNOWN_SPILLS = {
    ("fwd_sm80", 1): 1420,  # at dim 256
    ("fwd_sm80", 3): 100,
    ("fwd_sm80", 4): 100,
    ("bwd_sm80", 1): 16,
    ("bwd_sm80", 3): 16,
    ("bwd_sm80", 4): 16,
    ("bwd_sm90", 3): 300,
    ("bwd_sm90", 4): 300,
    # The producer warp's, whose 24 registers leave the consumers the rest.
    ("bwd_rows_sm90", 3): 300,
    ("bwd_rows_sm90", 4): 300,
}


def known_spills(variant):
    return KNOWN_SPILLS.get((variant.kernel, dict(variant.constants).get("DTYPE")), 0)


def kernel_names():
    return sorted(name.removeprefix("kernels/").removesuffix(".cu") for name in _C.kernel_source() if name.endswith(".cu"))


if not kernel_names():
    pytest.skip("this build holds no kernels", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def nvrtc():
    found = json.loads(_C.describe())["cuda"]
    if not found["nvrtc"]:
        pytest.skip(found["nvrtc_error"])
    return found["nvrtc"]


def features(variant):
    """What a test of this variant covers."""
    return {(variant.kernel, variant.entry), *((variant.kernel, name, value) for name, value in variant.constants)}


def cover(variants, wanted=features):
    """Few variants that show every feature, the one with most new features first."""
    chosen, missing = [], set().union(*map(wanted, variants)) if variants else set()
    while missing:
        best = max(variants, key=lambda variant: len(wanted(variant) & missing))
        chosen.append(best)
        missing -= wanted(best)
    return chosen


def chosen_for(arch):
    variants = prebuild.shipped_list([arch])
    if arch in ("sm_80", "sm_90a"):
        return cover(variants)
    return cover(variants, lambda variant: {(variant.kernel, variant.entry)})


def test_the_list_names_every_kernel_once():
    variants = prebuild.shipped_list()
    assert sorted({variant.kernel for variant in variants}) == [name for name in kernel_names() if name not in UNLISTED]
    assert len(set(variants)) == len(variants)
    names = defaultdict(set)
    for variant in variants:
        names[variant.kernel, variant.entry].add(tuple(name for name, _ in variant.constants))
    assert all(len(orders) == 1 for orders in names.values()), "constants of one kernel come in one order"


@pytest.mark.skipif(cuda_include() is None, reason="no cuda.h on this machine, which the fake driver is built with")
def test_the_list_is_what_the_engine_asks_for(tmp_path):
    # `python tests/list_kernels.py` writes it anew.
    assert list_kernels.LIST.read_text() == list_kernels.list_text(tmp_path)


@pytest.mark.parametrize("arch", prebuild.ARCHS)
def test_variants_compile_without_spills(arch):
    wanted = chosen_for(arch)
    assert wanted, f"the list has no kernel for {arch}"
    faults = []
    for variant, _, report in prebuild.compile_all(wanted):
        if isinstance(report, str):
            faults.append(f"{variant}: {report}")
        elif report.spill_bytes > known_spills(variant) or report.warnings or not report.registers:
            faults.append(f"{variant}: {report.registers} registers, {report.spill_bytes} bytes spilled {' '.join(report.warnings)}")
    assert not faults, "\n".join(faults)


# A line of the table at the head of a kernel file: " *   sm_80   HEAD_DIM=64   250 registers   49152 bytes".
HEADER_LINE = re.compile(r"^ \*   (sm_\w+) +((?:\w+=\d+ +)+)(\d+) registers +(\d+) bytes$", re.MULTILINE)
HEADER_NVRTC = "NVRTC 13.0"  # with another compiler registers differ
# What a variant is where its line does not say.
MAIN_VARIANT = {"DTYPE": 4, "ALIGNED": 1, "SCORE": 0, "DROPOUT": 0, "BLOCK_MASK": 0, "ADD_DQ": 1, "MASKING": 0, "VARLEN": 0}
GPU_OF = {"sm_80": "A100", "sm_86": "A40", "sm_89": "RTX 4090", "sm_90a": "H200", "sm_100": "B200", "sm_120": "RTX 5090"}


def header_lines():
    for name in kernel_names():
        for arch, words, registers, smem in HEADER_LINE.findall(_C.kernel_source(f"kernels/{name}.cu")):
            constants = {key: int(value) for key, value in (word.split("=") for word in words.split())}
            yield name, arch, constants, int(registers), int(smem)


@pytest.fixture(scope="module")
def smem_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    forward, backward = PlanTool(folder), PlanTool(folder, backward=True)

    def smem_of(kernel: str, arch: str, constants: dict) -> int:
        dims = {"dim_qk": constants["HEAD_DIM"], "dim_v": constants.get("DIM_V", constants["HEAD_DIM"])}
        if kernel.startswith("fwd"):
            plan = forward(GPU_OF[arch], **dims)
            assert plan["kernel"] == kernel
            return plan["smem_bytes"]
        return next(launch["smem_bytes"] for launch in backward(GPU_OF[arch], **dims)["launches"] if launch["kernel"] == kernel)

    return smem_of


def test_the_head_of_a_kernel_file_tells_what_it_takes(nvrtc, smem_of):
    lines = list(header_lines())
    assert {"fwd_sm80", "bwd_sm80"} <= {name for name, *_ in lines}
    wanted = {}
    for name, arch, constants, registers, smem in lines:
        assert smem_of(name, arch, constants) == smem, (name, arch, constants)
        exact = {**MAIN_VARIANT, "DIM_V": constants["HEAD_DIM"], **constants}
        fitting = [v for v in prebuild.shipped_list([arch]) if v.kernel == name and all(exact.get(k, n) == n for k, n in v.constants)]
        assert len(fitting) == 1, (name, arch, constants, fitting)
        wanted[fitting[0]] = registers
    if not nvrtc.startswith(HEADER_NVRTC.removeprefix("NVRTC ")):
        pytest.skip(f"the registers are those of {HEADER_NVRTC}")
    found = {variant: report.registers for variant, _, report in prebuild.compile_all(list(wanted))}
    assert found == wanted


class TestPrebuild:
    @pytest.fixture
    def small_list(self, tmp_path):
        variant = min(prebuild.shipped_list(["sm_80"]), key=lambda variant: len(_C.kernel_source(f"kernels/{variant.kernel}.cu")))
        path = tmp_path / "list.txt"
        constants = " ".join(f"{name}={value}" for name, value in variant.constants)
        path.write_text(f"# one kernel, two architectures\nsm_80,sm_90a {variant.kernel} {variant.entry} {constants}\n")
        return path

    def test_writes_cubins_and_an_index(self, small_list, tmp_path, capsys):
        out = tmp_path / "cubins"
        assert prebuild.main(["--arch", "sm_80,sm_90a", "--list", str(small_list), "--out", str(out), "--jobs", "2"]) == 0
        index = json.loads((out / "index.json").read_text())
        assert [row["arch"] for row in index["kernels"]] == ["sm_80", "sm_90a"] and index["nvrtc"]
        assert {row["file"] for row in index["kernels"]} == {path.name for path in out.glob("*.cubin")}
        assert "2 kernels for sm_80, sm_90a" in capsys.readouterr().out

    def test_a_kernel_that_fails_is_reported(self, tmp_path, capsys):
        path = tmp_path / "list.txt"
        path.write_text("sm_80 absent absent\n")
        assert prebuild.main(["--arch", "sm_80", "--list", str(path), "--out", str(tmp_path / "cubins")]) == 1
        assert "no kernel file absent.cu" in capsys.readouterr().err

    def test_unknown_architecture(self, capsys):
        with pytest.raises(SystemExit):
            prebuild.main(["--arch", "sm_75"])
        assert "unknown sm_75" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, words", [("* fwd", "line 1"), ("sm_70 fwd fwd", "unknown architecture sm_70"), ("* fwd fwd DIM", "NAME=VALUE")]
)
def test_a_bad_line_of_the_list(line, words):
    with pytest.raises(ValueError, match=words):
        prebuild.read_list(line)


def test_reading_the_log():
    report = prebuild.read_log(
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "ptxas info    : Function properties for fwd\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem, 8 bytes cumulative stack size, 352 bytes cmem[0]\n"
    )
    assert report[:4] == (168, 28, 8, 1024) and len(report.warnings) == 1 and "C7510" in report.warnings[0]


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("absent", "absent", {}, "sm_80"), RuntimeError, "no kernel file absent.cu"),
        (("absent", "absent", {}, "sm_75"), ValueError, "sm_75"),
        (("absent", "absent", {"A": "1"}, "sm_80"), TypeError, "int"),
        (("absent", "absent", {"A": 1 << 40}, "sm_80"), ValueError, "no C int"),
        (("absent", "absent", [], "sm_80"), TypeError, "constants"),
        ((1, "absent", {}, "sm_80"), TypeError, "kernel"),
        (("absent",), TypeError, "4 arguments"),
    ],
)
def test_compile_kernel_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        _C.compile_kernel(*arguments)
