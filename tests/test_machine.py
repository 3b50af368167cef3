"""machine.py: the cores that a model computes with, and the memory that there is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bot_fixtures import HANG_S

from streaming_bots import settings
from streaming_bots.operations import machine
from streaming_bots.settings import BotSettings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("allowed", "files", "expected"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (16, {}, 16),
        (16, {"cpu.max": "max 100000\n"}, 16),
        (16, {"cpu.max": "400000 100000\n"}, 4),
        (16, {"cpu.max": "250000 100000\n"}, 2),
        (16, {"cpu.max": "50000 100000\n"}, 1),
        (2, {"cpu.max": "400000 100000\n"}, 2),
        (16, {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (16, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    ],
)
def test_the_cores_are_those_of_taskset_and_of_the_containers_limit(
    tmp_path: Path, monkeypatch, allowed, files, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.cores() == expected


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs torch with MKL")
def test_each_thread_takes_its_part_of_the_outputs():
    ask = (
        "import ctypes, pathlib, torch; from streaming_bots.operations.machine import set_threads; "
        "set_threads(3); folder = pathlib.Path(torch.__file__).parent / 'lib'; "
        "mkl = ctypes.CDLL(str(folder / 'libtorch_cpu.so')); "
        "print(torch.get_num_threads(), mkl.mkl_serv_get_num_stripes())"
    )
    command = [sys.executable, "-c", ask]  # since it is of the whole process
    printed = subprocess.check_output(command, text=True, timeout=HANG_S)
    assert printed.split() == ["3", "3"]


@pytest.mark.parametrize(
    ("arguments", "threads"),
    [
        ({}, 8),
        ({"num_replicas": 2}, 1),
        ({"num_replicas": "auto"}, 1),
        ({"num_cpus": 0.4}, 1),
        ({"num_cpus": 0}, 1),
        ({"num_cpus": 3}, 3),
        ({"num_cpus": 3, "num_replicas": 2}, 3),
    ],
)
def test_a_single_replica_computes_with_all_cores_unless_it_is_told_how_many(
    monkeypatch, arguments, threads
):
    monkeypatch.setattr(settings, "cores", lambda: 8)
    given = BotSettings(**arguments)
    assert given.threads() == threads
    reserved = given.deployment_options()["ray_actor_options"]["num_cpus"]
    assert reserved == arguments.get("num_cpus", 1)


def test_free_memory_respects_a_containers_limit_and_counts_inactive_files_as_free(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    everything = machine.free_memory(CPU)
    for name, content in (
        ("memory.max", "300000\n"),
        ("memory.current", "180000\n"),
        ("memory.stat", "anon 90000\ninactive_file 40000\n"),
    ):
        (tmp_path / name).write_text(content)
    assert machine.free_memory(CPU) == 160_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory(CPU) > everything // 2
    (tmp_path / "memory").mkdir()
    for name, content in (
        ("memory.limit_in_bytes", "200000\n"),
        ("memory.usage_in_bytes", "210000\n"),
        ("memory.stat", "inactive_file 5000\n"),
    ):
        (tmp_path / "memory" / name).write_text(content)
    assert machine.free_memory(CPU) == 0


FREES = """
import psutil, torch
from streaming_bots.operations.machine import returning_freed_memory

resident = lambda: psutil.Process().memory_info().rss
with returning_freed_memory():
    torch.ones(1)
    before = resident()
    blocks = [torch.ones(50_000) for _ in range(400)]  # 80 MB, in blocks of 200 kB
    assert resident() > before + 60_000_000
    kept = blocks[::20]
    del blocks
    assert resident() < before + 20_000_000
"""


@pytest.mark.skipif(sys.platform != "linux", reason="for glibc")
def test_freed_memory_returns_to_the_system_even_between_what_stays():
    subprocess.run([sys.executable, "-c", FREES], check=True, timeout=HANG_S)
