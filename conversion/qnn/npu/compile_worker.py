"""The compiler's process: reads a job as JSON from stdin, with graphs and context files in its working folder.

Equal graphs shall become equal bytes. So files are named without a path (that would become part of the names in the
binary), and it runs on one processor, at memory addresses that are always the same: the compiler goes through some of
its tables in the order of addresses, and its threads race. Its environment is padded to one size for the same reason.
What is left is the place where Python and this program are installed, and rarely chance: both change the order of
things inside of a binary, and no more.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

FAILED = "FAILED: "  # begins the line that tells why there is no result


ADDR_NO_RANDOMIZE = 0x0040000  # of Linux, personality(2)


def fix_addresses() -> None:
    """Starts this process anew without random addresses, unless it is without already, or that is forbidden.

    Some containers forbid it. The binary is as good then, but less often the same.
    """
    personality = ctypes.CDLL(None).personality
    current = personality(0xFFFFFFFF)
    if not current & ADDR_NO_RANDOMIZE and personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, [sys.executable, "-m", "conversion.qnn.npu.compile_worker"])


def main() -> int:
    """Compiles the graphs of one job into one binary; 0 if all of them were."""
    fix_addresses()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from conversion.qnn.npu.sessions import npu_session
    from conversion.qnn.npu.soc import find_soc

    job = json.load(sys.stdin)
    soc = find_soc(job["soc"])
    alive = []  # a session that ends takes its part of the shared binary with it
    names = list(job["graphs"])
    for name, graph in job["graphs"].items():
        shares = len(names) > 1
        context = Path(f"{name}_ctx.onnx")
        try:
            alive.append(
                npu_session(graph, soc, context=context, shares_weights=shares, is_last=shares and name == names[-1])
            )
        except (RuntimeError, OSError) as error:
            print(FAILED + " ".join(str(error).split()), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    # Without the teardown of the plugin, which has nothing left to do.
    status = main()
    sys.stdout.flush()
    os._exit(status)
