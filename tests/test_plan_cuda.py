"""The CUDA engine's forward plan, for devices that need not be here: it is a pure function of problem and limits."""

from __future__ import annotations

import pytest

from plan_tool import BF16, DEVICES, F16, F32, F64, PlanTool

PORTABLE = {"cc": 80}  # on any device: the kernels for every GPU


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> PlanTool:
    return PlanTool(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_every_problem_has_a_kernel_within_the_shared_memory(plan, gpu: str, dtype: int) -> None:
    for dim in (1, 8, 33, 64, 96, 128, 129, 192, 256):
        for more in ({}, {"dim_v": 257 - dim}, {"block": 64}, {"block": 192}, {"softcap": 30}, {"dropout_percent": 10}, {"packed": 1}):
            found = plan(gpu, dtype=dtype, dim_qk=dim, **more)
            assert "error" not in found, found
            hopper = gpu == "H200" and dtype in (F16, BF16) and dim % 8 == more.get("dim_v", 0) % 8 == 0
            hopper = hopper and "block" not in more
            family = "fwd_f64" if dtype == F64 else "fwd_sm90" if hopper else "fwd_sm80"
            assert found["engine"] == "cuda" and found["kernel"] == family, more
            assert hopper != any(note.startswith("fwd_sm90: ") for note in found["notes"]), "why the faster kernel does not run"
            assert found["smem_bytes"] <= DEVICES[gpu][1]
            if "block" in more and dtype != F64:
                assert more["block"] % found["block_m"] == 0 and more["block"] % found["block_n"] == 0


def test_shared_memory_is_what_the_tiles_take(plan) -> None:
    for dtype, size in ((F32, 4), (BF16, 2)):
        for dim in (32, 64, 96, 128, 160, 192, 224, 256):
            found = plan(dtype=dtype, dim_qk=dim, **PORTABLE)
            columns, stages = found["constants"]["DIM_V"], found["constants"]["STAGES"]
            assert columns == dim or (dtype, columns) == (F32, 128)
            tiles = (found["block_m"] * dim + stages * found["block_n"] * (dim + columns)) * size
            tiles += (found["block_m"] + 2 * stages * found["block_n"]) * 4 if dtype == F32 else 0  # a scale for each row
            assert found["smem_bytes"] == max(tiles, found["block_m"] * (columns + 8) * 4)


def test_constants_follow_the_problem(plan) -> None:
    def constants(**words: int) -> dict:
        return plan(**PORTABLE, **words)["constants"]

    plain = constants()
    assert (plain["HEAD_DIM"], plain["DIM_V"], plain["DTYPE"]) == (128, 128, BF16)
    assert (plain["ALIGNED"], plain["SCORE"], plain["DROPOUT"]) == (1, 0, 0)
    assert constants(dim_qk=100)["HEAD_DIM"] == 128 and constants(dim_qk=100)["ALIGNED"] == 0
    assert constants(dim_qk=72, dim_v=40)["DIM_V"] == 64
    assert constants(shift=2)["ALIGNED"] == 0 and "element by element" in " ".join(plan(shift=2)["notes"])
    assert constants(softcap=20)["SCORE"] == 1
    assert constants(dropout_percent=5)["DROPOUT"] == 1
    assert constants(causal=1) == plain, "a causal mask needs no variant of its own"


@pytest.mark.parametrize(
    "words, reason",
    [
        ({"cc": 80}, "compute capability"),
        ({"smem": 99 * 1024}, "shared memory"),
        ({"dtype": F32}, "float16"),
        ({"block": 64}, "block_mask"),
        ({"shift": 2}, "aligned"),
        ({"batch": 1, "heads_q": 1, "seqlen_q": 128, "seqlen_k": 65536, "block": 128}, "split"),
    ],
)
def test_the_hopper_kernel_runs_unless_there_is_a_reason(plan, words: dict, reason: str) -> None:
    assert plan()["kernel"] == "fwd_sm90" and not plan()["notes"]
    found = plan(**words)
    assert found["kernel"] == "fwd_sm80" and any(note.startswith("fwd_sm90: ") and reason in note for note in found["notes"])


@pytest.mark.parametrize("gpu", DEVICES)
def test_a_lone_head_is_split_until_the_gpu_is_full(plan, gpu: str) -> None:
    found = plan(gpu, batch=1, heads_q=1, seqlen_q=128, seqlen_k=65536)
    sms = DEVICES[gpu][0]
    fewest, most = (0.5 * sms, sms) if found["kernel"] == "fwd_sm90" else (sms + 1, 2 * sms)  # persistent: one CTA an SM
    assert fewest <= found["ctas"] <= most and found["splits"] == found["ctas"]
    assert found["workspace_bytes"] >= found["splits"] * 128 * (128 + 1) * 4
    assert any("split" in note for note in found["notes"])


def test_hopper_takes_256_rows_where_192_leave_a_warpgroup_idle(plan):
    many = {"batch": 32, "heads_q": 32, "heads_k": 32, "dim_qk": 64, "dim_v": 64, "dtype": BF16}
    rows = {n: [plan("H200", seqlen_q=n, seqlen_k=n, causal=c, **many)["block_m"] for c in (0, 1)] for n in (512, 1024, 2048, 4096)}
    assert rows == {512: [256, 256], 1024: [256, 256], 2048: [192, 256], 4096: [192, 192]}
    few = {**many, "batch": 1, "heads_q": 8, "heads_k": 8}  # 16 tiles of 256 rows for 132 SMs
    assert plan("H200", seqlen_q=512, seqlen_k=512, **few)["block_m"] == 192


def test_hopper_takes_longer_blocks_for_more_keys(plan):
    shape = {"batch": 8, "heads_q": 16, "heads_k": 16, "dtype": BF16}
    blocks = {n: [plan("H200", seqlen_q=n, seqlen_k=n, causal=c, **shape)["block_n"] for c in (0, 1)] for n in (1024, 2048, 8192)}
    assert blocks == {1024: [128, 128], 2048: [160, 128], 8192: [176, 128]}


SERVING = {"batch": 4, "heads_q": 32, "heads_k": 8, "seqlen_q": 1, "seqlen_k": 8192, "causal": 1}


def test_few_rows_of_a_group_share_a_tile_on_hopper(plan) -> None:
    found = plan(**SERVING)
    assert found["constants"]["FEW_ROWS"] == 1 and found["splits"] == 4 and found["ctas"] == 4 * 8 * 4
    assert found["constants"]["MASKING"] == 0, "a lone last query sees every key"
    assert any("share a tile" in note for note in found["notes"])
    assert plan(**{**SERVING, "seqlen_q": 2})["constants"]["MASKING"] == 1
    assert plan(**{**SERVING, "batch": 20})["splits"] > 1, "one wave and a fifth: three waves of a third of the keys end earlier"
    for words in ({"heads_k": 32}, {"seqlen_q": 8192}, {"heads_q": 32 * 100, "heads_k": 32}):
        assert not any("share a tile" in note for note in plan(**{**SERVING, **words})["notes"]), words


def test_the_queue_has_a_place_of_its_own_behind_the_parts(plan) -> None:
    shape = {"batch": 1, "heads_q": 1, "seqlen_q": 128 * 100, "seqlen_k": 128 * 400}
    found, even = plan(**shape, causal=1), plan(**shape)
    assert found["splits"] > 1 and found["ctas"] == 132
    assert found["workspace_bytes"] == found["splits"] * shape["seqlen_q"] * (128 + 1) * 4 + 256
    assert even["workspace_bytes"] % 256 == 0


def test_no_split_where_it_would_not_help(plan) -> None:
    for words in (
        {},
        {"batch": 1, "heads_q": 1, "seqlen_q": 1, "seqlen_k": 64},
        {"packed": 1, "batch": 1, "heads_q": 1, "seqlen_q": 8},
        {"dtype": F64},
    ):
        found = plan(**PORTABLE, **words)
        assert found["splits"] == 1 and found["workspace_bytes"] == 0, words


def test_the_grid_has_a_place_for_every_tile(plan) -> None:
    found = plan(batch=30, heads_q=5, seqlen_q=1000, **PORTABLE)
    assert found["ctas"] == 150 * -(-1000 // found["block_m"])
    assert plan(batch=0)["ctas"] == 0 and plan(seqlen_q=0, seqlen_k=5)["ctas"] == 0
    packed = plan(packed=1, batch=7, heads_q=2, seqlen_q=100, seqlen_k=100, **PORTABLE)
    assert packed["ctas"] >= 2 * 7 * -(-100 // packed["block_m"])
    bounded = plan(packed=2, batch=100, heads_q=2, seqlen_q=1, seqlen_k=100, **PORTABLE)
    assert bounded["ctas"] <= 2 * (100 + 100 // bounded["block_m"] + 1)


def test_a_grid_that_no_gpu_has_is_refused(plan) -> None:
    found = plan(batch=1 << 20, heads_q=1 << 20, seqlen_q=1, dim_qk=1)
    assert found["code"] == 3 and "q: batch, heads and seqlen" in found["error"]
