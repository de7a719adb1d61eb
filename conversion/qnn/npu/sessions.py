"""Sessions on the NPU's compiler and emulator, both part of Qualcomm's plugin for ONNX Runtime.

The libraries are imported where they are used, so that a missing one can be named.
"""

import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.qnn.npu.soc import Soc

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "QNNExecutionProvider"
EXTRA = "pip install 'genieblue[qnn]'"
LIBRARIES = ("onnxruntime", "onnxruntime_qnn", "onnx", "onnxscript")  # of that extra, by the names of their modules


class CompileError(OSError):
    """The compiler refuses a graph, or crashes."""


def check_platform() -> None:
    """`OSError` if Qualcomm's compiler cannot run here; pip has checked Python and glibc when it was installed."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise OSError(
            f"This is {sys.platform} on {platform.machine()}, but the compiler runs on Linux on x86-64 only: export "
            "there (a container will do), and use the bundle anywhere."
        )


def check_libraries_installed(names: Iterable[str] = LIBRARIES) -> None:
    """`ModuleNotFoundError` that names the extra if one of its libraries is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"This needs the library {name}, which is not installed: {EXTRA}.", name=name)


@functools.cache
def npu_devices() -> tuple:
    """ONNX Runtime's devices of the plugin, registered once per process; `OSError` if there are none."""
    check_platform()
    try:
        import onnxruntime
        import onnxruntime_qnn
    except ImportError as error:
        raise OSError(f"Qualcomm's compiler is not installed ({error}): {EXTRA}") from error
    devices = _listed_devices()
    if not devices:  # otherwise already registered in this process
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        devices = _listed_devices()
    if not devices:
        raise OSError(f"onnxruntime-qnn {onnxruntime_qnn.__version__} offers no device: install it again, {EXTRA}")
    return devices


def _listed_devices() -> tuple:
    import onnxruntime

    return tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER)


def compiler_version() -> str:
    """Versions of ONNX Runtime and the plugin, for the record."""
    import onnxruntime
    import onnxruntime_qnn

    return f"onnxruntime {onnxruntime.__version__}, onnxruntime-qnn {onnxruntime_qnn.__version__}"


def npu_session(
    model: str | os.PathLike,
    soc: Soc,
    *,
    context: Path | None = None,
    shares_weights: bool = False,
    is_last: bool = False,
) -> "onnxruntime.InferenceSession":
    """A session with every node on the NPU (here its emulator), never on the CPU.

    Args:
        context: new file for the compiled graph (`…_ctx.onnx`, with its binary beside it).
        shares_weights: adds the graph to one binary with those compiled before it in this way, whose sessions must
            still be alive; `is_last` closes the group and writes the binary.

    Raises `CompileError` if a node cannot run on the NPU, or the compiler fails otherwise.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    entries = {"session.disable_cpu_ep_fallback": "1"}
    if context is not None:
        entries |= {
            "ep.context_enable": "1",
            "ep.context_file_path": os.fspath(context),
            "ep.context_embed_mode": "0",
        }
    if shares_weights:
        entries["ep.share_ep_contexts"] = "1"
    if is_last:
        entries["ep.stop_share_ep_contexts"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads = 1
    backend = {"backend_type": "htp", "soc_model": str(soc.model), "htp_arch": str(soc.arch)}
    options.add_provider_for_devices(list(npu_devices()), backend)
    try:
        return onnxruntime.InferenceSession(os.fspath(model), options)
    except Exception as error:  # ONNX Runtime's own kinds of error have no common base
        raise CompileError(
            f"{Path(model).name} could not be compiled for {soc.name} with every node on the NPU: {error}"
        ) from error


def cpu_options() -> "onnxruntime.SessionOptions":
    """Options of a session that computes the graph exactly, without approximations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The level "basic" folds weights, and changes no numbers otherwise.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def cpu_session(model: str | os.PathLike) -> "onnxruntime.InferenceSession":
    """The same QDQ graph on the CPU, the reference for the emulator."""
    import onnxruntime

    return onnxruntime.InferenceSession(os.fspath(model), cpu_options(), providers=["CPUExecutionProvider"])
