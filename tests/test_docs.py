"""What the documents say is so: snippets and commands run, links and files exist, and the table of variables is complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/data/README.md"]
FOLDERS = "csrc|tests|flash_attn_c|benchmarks|examples|docs"


def run(*command: str, timeout: int = 300) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), ids=lambda s: s.split("\n")[0])
def test_readme_snippet_runs(snippet: str) -> None:
    run(sys.executable, "-c", snippet)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    named = re.findall(rf"`((?:{FOLDERS})/[\w./]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_make_command_is_a_target() -> None:
    targets = {match for document in DOCUMENTS for match in re.findall(r"\bmake ([a-z-]+)\b", document.read_text(encoding="utf-8"))}
    targets &= set(re.findall(r"`make ([a-z-]+)", README)) | {"demo", "test"}
    assert {"demo", "test", "lint", "sanitize", "wheel", "bench-cpu"} <= targets
    for target in sorted(targets):
        run("make", "-n", target, "VENV=none", f"PYTHON={sys.executable}")


SCRIPTS = sorted({" ".join(c.split()[:3]) for c in re.findall(r"`python ((?:-m )?[\w./]+(?: [a-z]+)?)", README)})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_python_command_exists(script: str) -> None:
    words = [sys.executable, *script.split()]
    if script.endswith("doctor"):
        assert "cpu" in run(*words)
    else:
        assert "usage" in run(*words, "--help").lower()


def test_environment_variables_are_all_listed() -> None:
    listed = set(re.findall(r"^\| `(FLASH_ATTN_C_\w+)` \|", README, flags=re.MULTILINE))
    sources = [*ROOT.glob("csrc/**/*.c"), *ROOT.glob("flash_attn_c/*.py")]
    used = {name for path in sources for name in re.findall(r'"(FLASH_ATTN_C_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    assert used == listed
    assert len(listed) < 6


def test_demo_trains_both_ways_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    printed = run(sys.executable, "examples/demo.py", "--steps", "3", "--seqlens", "64", "128", "--out", str(picture))
    losses = re.search(r"validation loss +nats/char +([\d.]+) +([\d.]+)", printed)
    assert losses, printed
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=2e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measured_figures_are_those_of_the_results(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import summary

    shown = README.split(summary.BEGIN)[1].split(summary.END)[0]
    assert shown == summary.measured(ROOT / "benchmarks/results")
    assert "Speed on a CPU" in shown
