"""Compiling for the NPU: every chip, a compiler that dies or has no space, equal bytes."""

import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

import onnx
from onnx import TensorProto, helper, numpy_helper

from conversion.qnn.graphs.float_onnx import OPSET
from conversion.qnn.npu import compile as compile_module
from conversion.qnn.npu.compile import CompileError, compile_graphs
from conversion.qnn.npu.compile_worker import FAILED
from conversion.qnn.npu.soc import SOCS, find_soc
from conversion.qnn.qdq.quantize import encodings_of, quantize_graph, round_weights


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A product with an int4 matrix between 16-bit activations, as a QDQ file."""
    info = helper.make_tensor_value_info
    weight = np.random.default_rng(3).normal(size=(32, 16)).astype(np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "weight"], ["y"])],
            "product",
            [info("x", TensorProto.FLOAT, [4, 32])],
            [info("y", TensorProto.FLOAT, [4, 16])],
            [numpy_helper.from_array(weight, "weight")],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    codes = round_weights(model, lambda _name: 4)
    encodings = encodings_of(model, {"x": (-1.0, 1.0), "y": (-9.0, 9.0)})
    path = tmp_path_factory.mktemp("graph") / "product.onnx"
    onnx.save(quantize_graph(model, encodings, codes, name="product"), path)
    return path


@pytest.mark.parametrize("soc", SOCS)
def test_every_chip_of_the_list_takes_a_graph_with_4_bits(graph, tmp_path, soc):
    compile_graphs({"product": graph}, find_soc(soc), tmp_path / "out", "product.bin")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["product.bin", "product_ctx.onnx"]


def test_a_compiler_that_dies_leaves_nothing_and_says_of_what(graph, tmp_path, monkeypatch):
    def killed(*_arguments, **_options):
        return subprocess.CompletedProcess([], -signal.SIGKILL, "", "last words")

    arguments = ({"product": graph}, find_soc("sm8750"), tmp_path / "out", "out.bin")
    with monkeypatch.context() as patched:
        patched.setattr(compile_module.subprocess, "run", killed)
        with pytest.raises(CompileError, match="(?s)signal 9.*more parts.*last words"):
            compile_graphs(*arguments)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.compiling-x").mkdir()  # of a process that was killed outright
    compile_graphs(*arguments)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["out.bin", "product_ctx.onnx"]
    compile_graphs(*arguments)  # again: replaces it


def test_bytes_depend_neither_on_the_environment_nor_on_the_place(graph, tmp_path, monkeypatch):
    found = set()
    for size in (0, 30, 240):
        monkeypatch.setenv("LONGER", "x" * 10 * size)
        source = tmp_path / ("y" * size) / "qdq"  # nor on the path of the graphs
        source.mkdir(parents=True)
        shutil.copy(graph, source)
        compile_graphs({"product": source / graph.name}, find_soc("sm8750"), tmp_path / str(size), "out.bin")
        found.add((tmp_path / str(size) / "out.bin").read_bytes())
        sizes = sum(len(f"{name}={value}") for name, value in compile_module._worker_environment().items())
        assert sizes + 3 * len(sys.executable) == compile_module.ENVIRONMENT_BYTES + len("PADDING=")
    assert len(found) == 1


def test_a_full_folder_of_the_compiler_is_named(graph, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        return subprocess.CompletedProcess([], 1, f"{FAILED}EP_FAIL : {compile_module.NOT_WRITTEN}.\n", "")

    monkeypatch.setattr(compile_module.subprocess, "run", full)
    with pytest.raises(OSError, match=f"could not write to {tempfile.gettempdir()}.*TMPDIR"):
        compile_graphs({"product": graph}, find_soc("sm8750"), tmp_path / "out", "out.bin")
    assert list(tmp_path.iterdir()) == []
