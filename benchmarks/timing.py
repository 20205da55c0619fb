"""How time is taken: candidates interleaved in one process, medians of several rounds, on the CPU's clock or with CUDA events."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

Candidates = dict[str, Callable[[], object]]

SLOW_SECONDS = 3.0


def machine(device: str) -> dict:
    """What the figures were measured on: the kind of machine, never which one."""
    from flash_attn_c import _C

    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_tier": json.loads(_C.describe())["cpu"]["tier"],
        "torch_cpu": torch.backends.cpu.get_cpu_capability().lower(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def describe(facts: dict) -> str:
    where = facts.get("gpu") or f"{facts['cores']} cores of {facts['cpu']}, {facts['threads']} threads, tier {facts['cpu_tier']}"
    return f"{where}; torch {facts['torch']}; {facts['date']}"


def seconds_cpu(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def seconds_cuda(call: Callable[[], object], repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def seconds_to_launch(call: Callable[[], object], repeats: int) -> float:
    """The CPU's clock on calls that a GPU works off later. It starts idle: behind a full queue of launches the CPU waits."""
    torch.cuda.synchronize()
    return seconds_cpu(call, repeats)


CLOCKS = {"cpu": seconds_cpu, "cuda": seconds_cuda, "launch": seconds_to_launch}


def interleaved_medians(candidates: Candidates, clock_name: str, rounds: int = 5, at_least: float = 0.05) -> dict[str, float]:
    """Seconds a call of each candidate: every round times each of them once, for `at_least` seconds, so that drift hits all alike. The
    order changes from round to round, so that none always follows the one that heats the chip most.

    The first call does not count: it compiles, allocates, starts threads. Of a candidate that takes seconds, the second is enough.
    """
    clock = CLOCKS[clock_name]
    samples: dict[str, list[float]] = {}
    repeats = {}
    for name, call in candidates.items():
        call()
        second = clock(call, 1)
        if second > SLOW_SECONDS:
            samples[name] = [second]
        else:
            samples[name], repeats[name] = [], max(1, round(at_least / max(second, 1e-7)))
    order, shuffle = list(repeats), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(clock(candidates[name], repeats[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def in_graph(call: Callable[[], object], times: int) -> Callable[[], object]:
    """`times` calls as one CUDA graph. The first calls run outside: they compile and load, which a capture must not."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


class Matmul(NamedTuple):
    """A square matrix product through torch, to be timed beside attention: the machine's own limit, as far as a user can reach it."""

    call: Callable[[], object]
    flops: float


def fastest_matmul(dtypes: set[torch.dtype], device: str, largest: int) -> Matmul:
    """Of these dtypes and sizes up to `largest` the product with the best rate. The size grows while a product is quick."""
    best, best_rate = None, 0.0
    for dtype in dtypes:
        size, seconds = 128, 0.0
        while size < largest and seconds < 0.03:
            size *= 2
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            call = partial(torch.matmul, a, b)
            seconds = interleaved_medians({"matmul": call}, device, rounds=3)["matmul"]
            if 2 * size**3 / seconds > best_rate:
                best, best_rate = Matmul(call, 2 * size**3), 2 * size**3 / seconds
    return best


def attention_flops(batch: int, heads: int, seqlen: int, dim: int, causal: bool, backward: bool) -> float:
    """4 b h s^2 d forward, half of it under a causal mask, two and a half times that backward."""
    forward = 4 * batch * heads * seqlen**2 * dim / (2 if causal else 1)
    return 2.5 * forward if backward else forward
