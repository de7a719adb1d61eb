"""The warning about threads that do not fit the cores."""

import logging
import os

import pytest
import torch

from conversion import cpu_threads
from conversion.cpu_threads import usable_cores, warn_of_threads


@pytest.mark.parametrize(
    ("processes", "threads", "cores", "message"),
    [
        (1, 2, 2, None),
        (1, 8, 2, "1 × 8 threads (processes × threads) compete for 2 cores: set OMP_NUM_THREADS=2."),
        (2, 8, 8, "2 × 8 threads (processes × threads) compete for 8 cores: set OMP_NUM_THREADS=4."),
        (4, 1, 2, None),  # one thread is the least
        (2, 1, 16, "2 × 1 threads (processes × threads) use only a part of 16 cores: set OMP_NUM_THREADS=8."),
        (1, 4, 8, None),  # one thread by physical core
    ],
    ids=("fits", "quota", "processes", "more processes than cores", "torchrun", "half"),
)
def test_threads_that_do_not_fit_the_cores_are_named(monkeypatch, caplog, processes, threads, cores, message):
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with caplog.at_level(logging.WARNING):
        warn_of_threads()
    assert [record.getMessage() for record in caplog.records] == ([] if message is None else [message])


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
    ids=("no cgroup", "no quota", "quota", "less than a core", "cgroup 1", "cgroup 1 without quota"),
)
def test_the_quota_of_a_container_limits_the_cores(monkeypatch, tmp_path, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores
