"""The compiler's process: reads a job as JSON from stdin, with graphs and context files in its working folder.

Equal graphs should become equal bytes. So files are named without a path (which would become part of names in the
binary), and the compiler runs on one processor at fixed memory addresses: it walks some of its tables in the order of
addresses, and its threads race. Its environment is padded to one size for the same reason. What remains is the place
where Python and this program are installed, and rarely chance: both only change the order inside a binary.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

FAILED = "FAILED: "  # starts the line with the reason for a failure
ADDR_NO_RANDOMIZE = 0x0040000  # of Linux, personality(2)


def fix_addresses() -> None:
    """Restarts this process without address randomization, unless it is off already or must stay on.

    Some containers forbid it. The binary is just as good then, but equal less often.
    """
    personality = ctypes.CDLL(None).personality
    current = personality(0xFFFFFFFF)
    if not current & ADDR_NO_RANDOMIZE and personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, [sys.executable, "-m", "conversion.qnn.npu.compile_worker"])


def main() -> int:
    """Compiles the graphs of one job into one binary; 0 if that succeeds."""
    fix_addresses()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from conversion.qnn.npu.sessions import npu_session
    from conversion.qnn.npu.soc import find_soc

    job = json.load(sys.stdin)
    soc = find_soc(job["soc"])
    alive = []  # a session that ends takes its part of the shared binary with it
    names = list(job["graphs"])
    shares = len(names) > 1
    for name, graph in job["graphs"].items():
        context, is_last = Path(f"{name}_ctx.onnx"), shares and name == names[-1]
        try:
            alive.append(npu_session(graph, soc, context=context, shares_weights=shares, is_last=is_last))
        except (RuntimeError, OSError) as error:
            print(FAILED + " ".join(str(error).split()), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    # Skips the plugin's teardown, which has nothing left to do.
    status = main()
    sys.stdout.flush()
    os._exit(status)
