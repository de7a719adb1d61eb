"""Compiles QDQ graphs to context binaries for the NPU: strict and atomic."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

import conversion
from conversion.qnn.npu.compile_worker import FAILED
from conversion.qnn.npu.sessions import CompileError
from conversion.qnn.npu.soc import Soc
from modeling_genieblue.staging_genieblue import NewFolder

logger = logging.getLogger(__name__)
ENVIRONMENT_BYTES = 4096
NOT_WRITTEN = "Failed to write context cache file"  # the compiler's words


def compile_graphs(graphs: Mapping[str, Path], soc: Soc, output: Path, binary: str) -> None:
    """Compiles `graphs` (QDQ files of one folder, by name) into one binary that holds the weights they share once.

    The folder `output`, which is replaced if it exists, gets the file `binary` and for each graph `<name>_ctx.onnx`,
    with which ONNX Runtime runs it from that binary. The compiler works in a process of its own: what it compiled
    earlier would change the bytes, and a crash would end this process.

    Raises `CompileError`, and leaves nothing behind, if a node cannot run on the NPU or the compiler fails.
    """
    (source,) = {path.resolve().parent for path in graphs.values()}
    tensors = [
        tensor for path in graphs.values() for tensor in onnx.load(path, load_external_data=False).graph.initializer
    ]
    constants = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    needed = constants | {path.name for path in graphs.values()}
    # The length of this folder's path influences the layout of the compiler's memory and so some of its choices, so
    # the folder is not beside the output.
    with NewFolder(output, "compiling") as new, TemporaryDirectory(prefix="qnn-") as work:
        for name in sorted(needed):
            _link_or_copy(source / name, Path(work) / name)
        job = {"graphs": {name: path.name for name, path in graphs.items()}, "soc": soc.name}
        done = subprocess.run(
            [sys.executable, "-m", "conversion.qnn.npu.compile_worker"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=work,
            env=_worker_environment(),
        )
        for name in needed:
            (Path(work) / name).unlink()
        if done.returncode:
            reason = _reason(done, list(graphs))
            if NOT_WRITTEN in reason:
                raise OSError(
                    f"The compiler could not write to {Path(work).parent}, which is probably full: free space there, "
                    f"or name another folder by the environment variable TMPDIR, and start again ({reason})."
                )
            raise CompileError(reason)
        for path in Path(work).iterdir():
            shutil.move(path, new.staging / path.name)
        logger.info("Compiled %s for %s.", ", ".join(graphs), soc.name)
        _check_contexts(new.staging, list(graphs), binary)
        new.put_in_place()


def _worker_environment() -> dict[str, str]:
    """The environment of the compiler's process, always of the same size.

    It is at the top of the stack: a longer variable would move everything below, and change the bytes.
    """
    roots = [os.fspath(Path(conversion.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, roots)), "PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    # The path of Python is on the stack three times: as the program, as its first argument, and for the loader.
    taken = sum(len(os.fsencode(f"{name}={value}")) for name, value in environment.items())
    taken += 3 * len(os.fsencode(sys.executable))
    return {**environment, "PADDING": "x" * max(ENVIRONMENT_BYTES - taken, 0)}


def _link_or_copy(source: Path, target: Path) -> None:
    """Puts a file into another folder; not as a symbolic link, since the path of its target would matter as well."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or another user's file
        shutil.copyfile(source, target)


def _reason(done: subprocess.CompletedProcess, names: list[str]) -> str:
    """Why a compilation ended without a result."""
    reasons = [line.removeprefix(FAILED) for line in done.stdout.splitlines() if line.startswith(FAILED)]
    if reasons:
        return reasons[-1]
    cause = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    last = "\n".join(done.stderr.splitlines()[-3:])
    hint = " It was probably out of memory: divide the blocks into more parts." if done.returncode == -9 else ""
    return f"The compiler died of {cause} on {', '.join(names)}.{hint}\n{last}"


def _check_contexts(folder: Path, names: list[str], binary: str) -> None:
    """`CompileError` unless each graph is one node on the NPU, all from one binary, which is renamed to `binary`."""
    wrappers = {name: onnx.load(folder / f"{name}_ctx.onnx") for name in names}
    found = set()
    for name, wrapper in wrappers.items():
        kinds = [node.op_type for node in wrapper.graph.node]
        if kinds != ["EPContext"]:
            listed = ", ".join(sorted(set(kinds)))
            raise CompileError(f"{name} was split into {len(kinds)} nodes ({listed}), expected one on the NPU.")
        found.add(_cache_attribute(wrapper).s.decode())
    if len(found) != 1:
        raise CompileError(f"The graphs are in {len(found)} binaries ({', '.join(sorted(found))}), expected one.")
    os.rename(folder / found.pop(), folder / binary)
    for name, wrapper in wrappers.items():
        _cache_attribute(wrapper).s = binary.encode()
        (folder / f"{name}_ctx.onnx").write_bytes(wrapper.SerializeToString(deterministic=True))
    extra = {path.name for path in folder.iterdir()} - {binary, *(f"{name}_ctx.onnx" for name in names)}
    if extra:
        raise CompileError(f"The compiler wrote files that nothing refers to: {', '.join(sorted(extra))}.")


def _cache_attribute(wrapper: onnx.ModelProto) -> onnx.AttributeProto:
    (node,) = wrapper.graph.node
    return next(attribute for attribute in node.attribute if attribute.name == "ep_cache_context")


def read_context(path: Path) -> tuple[str, str]:
    """A graph's name in its binary, and the version of Qualcomm's SDK that made it, from a `…_ctx.onnx`."""
    (node,) = onnx.load(path).graph.node
    texts = {attribute.name: attribute.s.decode() for attribute in node.attribute}
    return texts["partition_name"], texts["ep_sdk_version"]
