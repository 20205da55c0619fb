"""The benchmarks run, measure what they say, and write what the README shows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plan_tool import PlanTool

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report
    import timing

    return timing, report


def run_bench(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "bench.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_medians_are_seconds_of_one_call(modules) -> None:
    timing, _ = modules
    seconds = timing.interleaved_medians({"slow": lambda: time.sleep(0.004), "fast": lambda: None}, "cpu", rounds=3, at_least=0.01)
    assert 0.004 <= seconds["slow"] < 0.1
    assert 0 < seconds["fast"] < seconds["slow"] / 10


def test_flops(modules) -> None:
    timing, _ = modules
    full = timing.attention_flops(2, 3, 100, 64, causal=False, backward=False)
    assert full == 4 * 2 * 3 * 100 * 100 * 64
    assert timing.attention_flops(2, 3, 100, 64, causal=True, backward=True) == full * 2.5 / 2


def test_table_is_aligned(modules, capsys) -> None:
    _, report = modules
    report.print_table(["name", "value"], [["a", 1.23456], ["longer", 12345.6], ["none", None]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name    value", "------  -----", "a        1.23", "longer  12346", "none        -"]


def test_json_round_trip(modules, tmp_path) -> None:
    _, report = modules
    rows = [{"a": 1, "b": None}, {"a": 2.5, "b": "x"}]
    path = report.save_json(tmp_path / "new", "name", {"cpu": "some"}, rows, unit="s")
    assert json.loads(path.read_text()) == {"machine": {"cpu": "some"}, "unit": "s", "rows": rows}


def test_cpu_speed(tmp_path) -> None:
    small = ("--dtypes", "fp32", "--dims", "64", "--seqlens", "64", "128", "--tokens", "128", "--rounds", "1")
    printed = run_bench("cpu", *small, "--out", str(tmp_path))
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert len(result["rows"]) == 8  # forward and backward, full and causal, two lengths
    for row in result["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["torch"])
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "mean ratio" in printed
    assert str(Path.home()) not in json.dumps(result)


def test_ablation_switches_off_what_the_plan_uses(modules, tmp_path) -> None:
    import ablation

    plan = PlanTool(tmp_path)("H200", dtype=4, batch=16, heads_q=16, heads_k=16, seqlen_q=1024, seqlen_k=1024)
    assert set(ablation.techniques_of(plan["constants"], plan["workspace_bytes"])) == set(ablation.WITHOUT) - {"queue"}
    assert "queue" in ablation.techniques_of(plan["constants"], 256)
    one_stage = {**plan["constants"], "Q_STAGES": 1, "TMA_STORE": 0}
    assert not {"store by TMA", "second stage of Q"} & set(ablation.techniques_of(one_stage, 0))


def test_host_cost(tmp_path) -> None:
    printed = run_bench("host", "--rounds", "1", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert {row["call"] for row in rows} >= {"attention", "torch's own"}
    assert all(0 < row["microseconds"] < 100_000 for row in rows)
    assert "Microseconds a call" in printed


def test_accuracy_ratio_of_one_case(modules) -> None:
    """The whole list takes minutes: one case shows that the ratio is the tests' own measure."""
    import accuracy
    from cases import Case

    ratios = accuracy.ratios(Case("one", dtype="bfloat16", causal=True), "cpu")
    assert ratios.keys() == {"out", "dq", "dk", "dv"}
    assert all(0 < ratio <= 3 for ratio in ratios.values())


def test_a_gpu_command_says_what_it_needs() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, str(BENCHMARKS / "bench.py"), "fwd"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "needs a GPU" in done.stderr
