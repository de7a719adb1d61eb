"""How much memory a run has needed: of its GPU, or resident in its process."""

import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
HIGH_WATER_MARK = "VmHWM:"  # in kB, by proc(5)


def peak_memory(device: Any) -> int | None:
    """Bytes that this process has used at the most: allocated on a CUDA `torch.device`, else resident.

    None where the system does not say.
    """
    if device.type != "cuda":
        return peak_resident_memory()
    import torch

    return torch.cuda.max_memory_allocated(device)


def peak_resident_memory() -> int | None:
    """Bytes that were resident in this process at the most, by the system's count; None where it keeps none.

    On Linux not `ru_maxrss`, which a process inherits from the one that starts it.
    """
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes there
    status = STATUS.read_text(encoding="utf-8") if STATUS.is_file() else ""
    _, found, rest = status.partition(HIGH_WATER_MARK)
    return int(rest.split()[0]) * 1024 if found else None
