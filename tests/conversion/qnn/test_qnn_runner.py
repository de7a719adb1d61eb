"""What a bundle's runner needs and refuses, without a compiled bundle: metadata, adapter files, chunks, options."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime", reason="needs an extra with ONNX Runtime")

from conversion.qnn.bundle.metadata import Bundle, list_files, read_adapter, signed
from conversion.qnn.bundle.runner import QnnRunner
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, DecoderShape
from genieblue.cli.app import app

REPOSITORY = Path(__file__).parents[3]
SHAPE = DecoderShape(1, 4, 1, 1, 2, 5, (1.0,), 1.0)
TENSOR = {"name": "x", "shape": [1], "dtype": "uint16", "scale": 0.5, "offset": 0}
LORA = {"a.lora_a": {**TENSOR, "name": "a.lora_a", "shape": [2, 3], "dtype": "int8", "scale": 0.1}}


def metadata():
    """Metadata of a bundle of two blocks in one part."""
    graph = {"context": "ctx.onnx", "qdq": "qdq.onnx", "inputs": [TENSOR], "outputs": [TENSOR]}
    views = {"text": {"view": "text"}, "multimodal": {"view": "multimodal"}}
    stages = {"prefill": 8, "decode": 1}
    graphs = {f"{v}_{s}": {**graph, **views[v], "tokens": tokens} for v in views for s, tokens in stages.items()}
    names = ("ctx.onnx", "qdq.onnx", "vision.bin", "language.bin", "embeddings.raw")
    return {
        "format_version": 3,
        "soc": {"name": "sm8750"},
        "compiler": "none",
        "base": {"name_or_path": None, "revision": None, "fingerprint": None},
        "adapter": {"copies_sha256": "", "vision_sha256": "", "lora_rank": 4, "lora": "constants"},
        "chunk_length": 8,
        "context_length": 64,
        "rounding": "rtn",
        "decoder": {**SHAPE.__dict__, "num_blocks": 2, "rotary_frequencies": [1.0]},
        "image_token_id": 9,
        "image_seq_length": 4,
        "embeddings": {"file": "embeddings.raw", "shape": [5, 4], "dtype": "uint16", "scale": 0.5, "offset": 0},
        "generation": {"eos_token_ids": [2]},
        "vision": {"binary": "vision.bin", "tiles": 1, "graph": graph},
        "parts": [{"blocks": [0, 2], "binary": "language.bin", "base_weight_codes": "", "graphs": graphs}],
        "files": {name: {"bytes": 0, "sha256": ""} for name in names},
    }


def save(folder, document):
    (folder / "metadata.json").write_text(json.dumps(document))
    return folder


def test_the_runner_needs_numpy_and_onnxruntime_only():
    code = "import sys, conversion.qnn.bundle.runner; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"numpy", "onnxruntime"} <= loaded
    assert not loaded & {"torch", "onnx", "transformers", "peft", "PIL"}


def test_metadata_as_they_are_written_are_taken(tmp_path):
    bundle = Bundle(save(tmp_path, signed(metadata())))
    assert bundle.decoder == DecoderShape(2, 4, 1, 1, 2, 5, (1.0,), 1.0)


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has format 1, this program reads 3"):
        Bundle(save(tmp_path, signed({**metadata(), "format_version": 1})))


@pytest.mark.parametrize(
    "change", [{"parts": []}, {"chunk_length": "8"}, {"more": 1}, {"sha256": "0"}, {"vision": {"tiles": 0}}]
)
def test_metadata_with_other_contents_than_were_exported_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="metadata.json has other contents than were exported"):
        Bundle(save(tmp_path, {**signed(metadata()), **change}))


@pytest.mark.parametrize("name", ["../language.bin", "/etc/passwd", "qdq/../../x", "..\\x"])
def test_no_file_outside_of_a_bundle_is_opened(tmp_path, name):
    bundle = Bundle(save(tmp_path, signed({**metadata(), "files": {name: {"bytes": 0, "sha256": ""}}})))
    with pytest.raises(ValueError, match="outside the bundle"):
        bundle.changed_files()


@pytest.mark.parametrize("text", ["no JSON", "[]", "null"])
def test_a_file_that_is_no_metadata_is_refused(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match="damaged|has format None"):
        Bundle(tmp_path)


def test_files_of_others_are_named(tmp_path):
    (tmp_path / "mine.txt").touch()
    (tmp_path / ".gitattributes").touch()  # of a download
    problems = Bundle(save(tmp_path, signed(metadata()))).changed_files()
    assert problems[-1] == "mine.txt is not a file of the bundle (remove it)"
    assert not any(".gitattributes" in problem for problem in problems)


def test_a_readme_may_be_edited(tmp_path):
    (tmp_path / "README.md").write_text("as exported")
    Bundle(save(tmp_path, signed({**metadata(), "files": list_files(tmp_path)})))
    (tmp_path / "README.md").write_text("with notes of mine")
    assert Bundle(tmp_path).changed_files() == []


def test_an_adapter_file_is_taken_by_its_own_bundle_only(tmp_path):
    codes = np.ones((2, 3), np.int8)
    good = {"0/a.lora_a": codes, "0/a.lora_a/scale": np.float32(0.1)}
    path = tmp_path / "adapter.npz"
    np.savez(path, **good)
    assert np.array_equal(read_adapter(path, 0, LORA)["a.lora_a"], codes)
    for changes, sentence in (
        ({"0/a.lora_a/scale": np.float32(0.2)}, "made for another bundle"),
        ({"0/a.lora_a": codes.T}, "does not fit part 0"),
        ({"0/a.lora_a": codes.astype(np.float32)}, "does not fit part 0"),
        ({"0/b.lora_a": codes}, "does not fit part 0"),
    ):
        np.savez(path, **{**good, **changes})
        with pytest.raises(ValueError, match=sentence):
            read_adapter(path, 0, LORA)
    np.savez(path, **{"0/a.lora_a": codes})  # of an older format
    with pytest.raises(ValueError, match="made for another bundle"):
        read_adapter(path, 0, LORA)


@pytest.mark.parametrize("contents", [b"", b"no archive", b"PK\x03\x04 cut", b"npy"])
def test_what_is_no_adapter_file_is_refused(tmp_path, contents):
    path = tmp_path / "adapter.npz"
    if contents == b"npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(contents)
    with pytest.raises(OSError, match="not an adapter of a bundle, or is damaged: make one"):  # nothing about pickles
        read_adapter(path, 0, LORA)


def test_an_adapter_that_is_no_file_is_named(tmp_path):
    for path, reason in ((tmp_path / "none.npz", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=rf"The adapter {path} cannot be read \({reason}"):
            read_adapter(path, 0, LORA)


def decoder(context_length):
    """A decoder whose logits are the first numbers of its inputs."""

    def run(tokens, feeds):
        new = {"past_key_0_out": np.zeros((1, 1, 2, tokens)), "past_value_0_out": np.zeros((1, 1, tokens, 2))}
        return {"logits": feeds["inputs_embeds"][..., :1], **new}

    return ChunkedDecoder(SHAPE, run, 4, context_length)


def test_chunks_that_do_not_fit_are_refused_before_anything_is_read():
    found = decoder(10)
    with pytest.raises(ValueError, match="9 tokens after 0 cached ones take 12 places.*the context has 10"):
        found.read(np.zeros((9, 4), np.float32), only_chunks=True)
    assert found.length == 0
    assert len(found.read(np.zeros((7, 4), np.float32), only_chunks=True)) == 7
    assert len(found.read(np.zeros((3, 4), np.float32))) == 3  # the end, token by token


def test_the_last_row_alone_is_the_last_row():
    embeddings = np.arange(36, dtype=np.float32).reshape(9, 4)
    for length in (1, 4, 7, 9):
        whole, last = (decoder(16).read(embeddings[:length], last_only=only) for only in (False, True))
        assert last.shape == (1, 1) and last[0] == whole[-1]


@pytest.mark.parametrize(
    ("context", "limit", "ends", "given", "length"),
    [
        (16, 3, [], 3, 7),  # the limit: the last token is not read any more
        (16, 0, [], 0, 5),
        (8, 9, [], 4, 8),  # the end of the context
        (16, 3, [0], 0, 5),  # an end token, which is neither given nor read
    ],
)
def test_no_graph_runs_behind_the_last_token_that_is_given(context, limit, ends, given, length):
    bundle = SimpleNamespace(metadata={"generation": {"eos_token_ids": ends}})
    runner = SimpleNamespace(bundle=bundle, embed=lambda ids, _pixels=None: np.zeros((len(ids), 4), np.float32))
    found = decoder(context)
    assert list(QnnRunner.continue_from(runner, found, [1] * 5, max_new_tokens=limit)) == [0] * given
    assert found.length == length


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["chat", "--qnn", "bundle", "--prompt", "x", "--temperature", "0.5"], "--temperature"),
        (["chat", "--qnn", "bundle", "--prompt", "x", "--base", "b"], "--base"),
        (["chat", "--qnn", "bundle", "--prompt", "x", "--dtype", "auto"], "--dtype"),
        (["chat", "--qnn", "bundle", "--prompt", "x", "--trust-remote-code"], "--trust-remote-code"),
        (["chat", "model", "--adapter", "other.npz"], "--adapter"),
        (["chat", "model", "--npu", "cpu"], "--npu"),
        (["verify", "bundle", "--device", "cpu"], "--device"),
        (["verify", "bundle", "--trust-remote-code"], "--trust-remote-code"),
    ],
)
def test_options_that_have_no_meaning_are_refused(tmp_path, monkeypatch, arguments, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    save(tmp_path / "bundle", signed(metadata()))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}: It does not apply to a" in " ".join(result.stderr.split())
