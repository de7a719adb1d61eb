"""QDQ graphs → context binaries of the NPU: strict, and either whole or not there at all."""

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime

from conversion.qnn.npu import npu_session
from conversion.qnn.soc import Soc

logger = logging.getLogger(__name__)
UNFINISHED = ".unfinished"


@contextmanager
def staged_folder(target: Path):
    """A folder to build in, which becomes `target` when nothing went wrong; leftovers of a killed run are cleared."""
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it, or give another folder.")
    staging = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def compile_graphs(
    graphs: Mapping[str, Path], soc: Soc, output: Path, binary: str
) -> dict[str, onnxruntime.InferenceSession]:
    """Compiles `graphs` (QDQ files by name) into one binary that holds the weights they share once.

    The new folder `output` gets the file `binary` and for each graph `<name>_ctx.onnx`, with which ONNX Runtime runs
    it from that binary. Returns the sessions by graph, alive, to check numbers with: the emulator cannot load a shared
    binary again.

    Raises `RuntimeError`, and leaves nothing behind, if a node cannot run on the NPU or the compiler fails.
    """
    sessions: dict[str, onnxruntime.InferenceSession] = {}
    with staged_folder(output) as folder:
        last = list(graphs)[-1]
        for name, path in graphs.items():
            several = len(graphs) > 1
            sessions[name] = npu_session(
                path,
                soc,
                context=folder / f"{name}_ctx.onnx",
                shares_weights=several,
                is_last=several and name == last,
            )
            logger.info("Compiled %s for %s.", name, soc.name)
        _check_contexts(folder, list(graphs), binary)
    return sessions


def _check_contexts(folder: Path, names: list[str], binary: str) -> None:
    """Each graph must be one node on the NPU, all of one binary; that file gets the name `binary`."""
    wrappers = {name: onnx.load(folder / f"{name}_ctx.onnx") for name in names}
    found = set()
    for name, wrapper in wrappers.items():
        kinds = [node.op_type for node in wrapper.graph.node]
        if kinds != ["EPContext"]:
            listed = ", ".join(sorted(set(kinds)))
            raise RuntimeError(f"{name} was split in {len(kinds)} nodes ({listed}), expected one on the NPU.")
        found.add(_cache_attribute(wrapper).s.decode())
    if len(found) != 1:
        raise RuntimeError(f"The graphs lie in {len(found)} binaries ({', '.join(sorted(found))}), expected one.")
    os.rename(folder / found.pop(), folder / binary)
    for name, wrapper in wrappers.items():
        _cache_attribute(wrapper).s = binary.encode()
        (folder / f"{name}_ctx.onnx").write_bytes(wrapper.SerializeToString(deterministic=True))
    extra = {path.name for path in folder.iterdir()} - {binary, *(f"{name}_ctx.onnx" for name in names)}
    if extra:
        raise RuntimeError(f"The compiler wrote files that nothing refers to: {', '.join(sorted(extra))}.")


def _cache_attribute(wrapper: onnx.ModelProto) -> onnx.AttributeProto:
    (node,) = wrapper.graph.node
    return next(attribute for attribute in node.attribute if attribute.name == "ep_cache_context")


__all__ = ["compile_graphs", "staged_folder"]
