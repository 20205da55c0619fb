"""Devices, the accuracy table printed at the end, and a fixed seed for every test."""

from __future__ import annotations

import collections

import pytest
import torch


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() and cuda_engine_is_built() else ["cpu"]


def cuda_engine_is_built() -> bool:
    """False only where the library itself says that it has no engine for this GPU. Anything else must show as failures."""
    import binding
    from cases import Case, build

    try:
        binding.forward(build(Case("probe", dtype="float16", seqlen_q=1, seqlen_k=1), "cuda"))
    except NotImplementedError:
        return False
    return True


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: the reduced list that runs once for each CPU tier")
    config.accuracy = collections.defaultdict(lambda: (0.0, ""))


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


@pytest.fixture
def accuracy(request):
    """(tensor, dtype) -> (worst error over that of the unfused run, where)."""
    return request.config.accuracy


def pytest_terminal_summary(terminalreporter, config):
    if not config.accuracy:
        return
    terminalreporter.section("worst error, as a multiple of the unfused run's error (at least 1e-5; 1e-11 for float64)")
    for (name, dtype), (ratio, where) in sorted(config.accuracy.items()):
        terminalreporter.write_line(f"{name:>14} {dtype:>9} {ratio:6.2f}   {where}")
