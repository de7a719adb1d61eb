"""Notices when the threads of a long computation do not fit the cores that it may use."""

import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# What a container may use: quota and period in microseconds, in one file (cgroup 2) or two (cgroup 1).
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use, by its affinity and by the quota of its container; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in QUOTAS:
        if all((cgroup / name).is_file() for name in names):
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def warn_of_threads() -> None:
    """Logs a warning if threads compete for the cores of this computer, or leave more than half of them idle."""
    cores, threads, processes = usable_cores(), torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fitting = max(1, cores // processes)
    if threads > fitting:
        what = "compete for"
    elif processes * threads < cores / 2:
        what = "use only a part of"  # `torchrun` gives each of several processes one thread
    else:
        return
    logger.warning(
        "%d × %d threads (processes × threads) %s %d cores: set OMP_NUM_THREADS=%d.",
        processes, threads, what, cores, fitting,
    )  # fmt: skip
