"""Exports to QNN: what is refused and when, stopped and continued, compiled for every chip, and by the command."""

import errno
import json
import logging
import os
import shutil
import signal
import sys

import pytest
import torch

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

from PIL import Image
from tiny_qnn import CHUNK, CONTEXT, SETTINGS, requests, save_pair, two_blocks
from typer.testing import CliRunner

from conversion.qnn import export as export_module
from conversion.qnn import export_settings
from conversion.qnn.bundle.export_state import UnfinishedExport
from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.export import export_bundle
from conversion.qnn.export_settings import divide_blocks
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.npu import sessions as npu
from conversion.qnn.qdq.calibration import prepare_calibration
from conversion.qnn.qdq.vision import quantize_vision
from conversion.qnn.verify import verify_bundle
from conversion.staging import lock_output
from genieblue.cli.app import app
from genieblue.data.calibration_chats import read_calibration, read_chats
from modeling_genieblue import GenieBlueProcessor
from modeling_genieblue.quantized_settings_genieblue import QUANTIZED_PARTS


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def dies_at_the_vision_tower(monkeypatch):
    """An export gets as far as its first step."""

    def dies(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "quantize_vision", dies)


# Stopped and continued


@pytest.mark.slow
def test_a_stopped_export_goes_on_with_the_next_part(pair, tmp_path, monkeypatch):
    whole = export_bundle(pair, tmp_path / "whole", calibration=requests(), parts=2, **SETTINGS)
    real, compiled = export_module.compile_graphs, []

    def dies_at_the_second_part(graphs, soc, output, binary):
        compiled.append(binary)
        if binary == "language_1.bin" and compiled.count(binary) == 1:
            raise KeyboardInterrupt
        real(graphs, soc, output, binary)

    monkeypatch.setattr(export_module, "compile_graphs", dies_at_the_second_part)
    out = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export_bundle(pair, out, calibration=requests(), parts=2, **SETTINGS)
    assert not out.exists()
    export_bundle(pair, out, calibration=requests(), parts=2, **SETTINGS)
    assert compiled == ["vision.bin", "language_0.bin", "language_1.bin", "language_1.bin"]
    stable = [name for name in Bundle(whole).metadata["files"] if name.startswith(("qdq/", "embeddings", "probe"))]
    files = Bundle(out).metadata["files"]
    assert all(files[name] == Bundle(whole).metadata["files"][name] for name in stable)
    assert Bundle(out).changed_files() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("function", ["write_runtime_files", "signed"])
def test_an_export_that_was_stopped_at_the_end_compiles_nothing_again(pair, tmp_path, monkeypatch, function):
    def dies(*_arguments):
        raise KeyboardInterrupt

    out = tmp_path / "bundle"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(export_module, function, dies)
        export_bundle(pair, out, calibration=requests(), lora="inputs", **SETTINGS)
    monkeypatch.setattr(export_module, "compile_graphs", dies)
    # Once more: stopped when all was written, and nothing but the name was left to do.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(UnfinishedExport, "hand_over", dies)
        export_bundle(pair, out, calibration=requests(), lora="inputs", **SETTINGS)
    monkeypatch.setattr(export_module, "write_runtime_files", dies)
    export_bundle(pair, out, calibration=requests(), lora="inputs", **SETTINGS)
    assert Bundle(out).changed_files() == [] and (out / "adapter.npz").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unfinished_export_goes_on_with_the_same_settings_only(pair, tmp_path, dies_at_the_vision_tower):
    def export(count=1, **changes):
        export_bundle(pair, tmp_path / "bundle", calibration=requests(count), **{**SETTINGS, **changes})

    with pytest.raises(KeyboardInterrupt):
        export()
    marker = tmp_path / "bundle.unfinished" / "marker"
    marker.touch()
    with pytest.raises(KeyboardInterrupt):
        export()
    with pytest.raises(FileExistsError, match=r"differs in calibration: remove it, or use the same settings"):
        export(count=2)
    with pytest.raises(FileExistsError, match=r"differs in cache_bits \(16 there, 8 now\), soc \(sm8750 .*: remove"):
        export(cache_bits=8, soc="sm8650")
    assert marker.exists()


@pytest.mark.parametrize("changed", ["torch", "base", "format"])
def test_an_export_of_another_program_or_base_is_no_beginning(
    pair, tmp_path, dies_at_the_vision_tower, monkeypatch, changed
):
    for path in (pair, pair.parent / "base"):
        shutil.copytree(path, tmp_path / "pair" / path.name)
    config = tmp_path / "pair/genieblue/config.json"
    # A base of which nothing is recorded.
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_fingerprint": None}))
    arguments = (tmp_path / "pair/genieblue", tmp_path / "bundle")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(*arguments, calibration=requests(1), **SETTINGS)
    if changed == "torch":
        monkeypatch.setattr(export_settings, "_version", lambda _package: "0.0")
    elif changed == "format":
        monkeypatch.setattr(export_settings, "FORMAT_VERSION", 0)
    else:
        real = export_module.GenieBlueForConditionalGeneration.from_pretrained

        def other_base(*positional, **options):
            model = real(*positional, **options)
            with torch.no_grad():
                model.language_model.model.layers[0].mlp.up_proj.weight[0].mul_(-1)
            return model

        monkeypatch.setattr(export_module.GenieBlueForConditionalGeneration, "from_pretrained", other_base)
    with pytest.raises(FileExistsError, match=f"differs in .*{changed}"):
        export_bundle(*arguments, calibration=requests(1), **SETTINGS)


def test_a_folder_of_somebody_else_is_left_alone(pair, tmp_path):
    theirs = tmp_path / "bundle.unfinished"
    theirs.mkdir()
    (theirs / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="is not an unfinished export: move it"):
        export_bundle(pair, tmp_path / "bundle", calibration=requests(1), **SETTINGS)
    assert (theirs / "letter.txt").read_text() == "dear"
    (theirs / "export.json").write_text("no JSON")
    with pytest.raises(FileExistsError, match="damaged"):
        export_bundle(pair, tmp_path / "bundle", calibration=requests(1), **SETTINGS)


def test_two_exports_to_one_place_are_kept_apart(pair, tmp_path, dies_at_the_vision_tower):
    with lock_output(tmp_path / "bundle", "export"), pytest.raises(OSError, match="Another export is writing to"):
        export_bundle(pair, tmp_path / "bundle", calibration=requests(1), **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        export_bundle(pair, tmp_path / "bundle", calibration=requests(1), **SETTINGS)


# Refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"soc": "sm9999"}, "Unknown SoC 'sm9999'.*sm8750"),
        ({"context_length": CHUNK}, "longer than a chunk"),
        ({"context_length": 0}, "context length is 0"),
        ({"context_length": 4096}, "at most 1024"),
        ({"parts": 3}, "Cannot make 3 parts of the base's 2 blocks"),
        ({"parts": 0}, r"`parts` \(--parts\) is 0"),
        ({"lora": "merged"}, r"`lora` \(--lora\) is 'merged'"),
        ({"cache_bits": 4}, r"`cache_bits` \(--cache-bits\) is 4"),
        ({"vision_tiles": 0}, r"`vision_tiles` \(--vision-tiles\) is 0"),
        ({"llm": "w2a16"}, r"`llm` \(--llm\) is 'w2a16'"),
        ({"group_size": 48}, r"`group_size` \(--group-size\) is 48"),
        ({"llm": "w4a16", "group_size": 64}, "intermediate_size of 96 is no multiple of the group size 64"),
        ({"llm": "w4a16", "group_size": 128}, "hidden_size of 64 is no multiple of the group size 128"),
        ({"bits_per_weight": 5}, r"belongs to `llm='mixed'` \(--llm mixed\): w8a16"),
        ({"llm": "mixed", "bits_per_weight": 4.1}, r"`bits_per_weight` \(--bits-per-weight\) is 4.1: expected 4.25"),
        ({"max_bytes": 10**6}, r"`max_bytes` \(--max-bytes\) belongs to `llm='mixed'`"),
        ({"llm": "mixed", "bits_per_weight": 5, "max_bytes": 10**6}, "either `bits_per_weight`.* or `max_bytes`"),
        ({"embedding_bits": 4}, r"`embedding_bits` \(--embedding-bits\) is 4"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_weights_are_read(
    pair, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.setattr(export_module.GenieBlueForConditionalGeneration, "from_pretrained", None)
    encoded = iter([None])
    with pytest.raises(ValueError, match=sentence):
        export_bundle(pair, tmp_path / "out", **{**SETTINGS, "calibration": encoded, **changes})
    assert list(tmp_path.iterdir()) == [] and list(encoded) == [None]


@pytest.mark.parametrize(
    ("calibration", "sentence"), [([{"input_ids": [5, 6, 7]}], "no images"), ([], "no requests with text")]
)
def test_requests_that_do_not_calibrate_are_refused_and_leave_nothing(pair, tmp_path, calibration, sentence):
    with pytest.raises(ValueError, match=sentence):
        export_bundle(pair, tmp_path / "out", calibration=calibration, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_genieblue_is_refused_by_its_configuration(pair, tmp_path):
    (tmp_path / "quantized").mkdir()
    config = json.loads((pair / "config.json").read_text())
    config["quantization"] = {**dict.fromkeys(QUANTIZED_PARTS, "w8a16"), "activations": "float32"}
    (tmp_path / "quantized/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized: export the 16-bit GenieBlue that it was made from"):
        export_bundle(tmp_path / "quantized", tmp_path / "out", calibration=[], **SETTINGS)


def test_a_taken_output_is_refused(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="already exists"):
        export_bundle(pair, tmp_path / "out", calibration=requests(1), **SETTINGS)


def test_a_computer_on_which_the_compiler_does_not_run_is_told_why(monkeypatch):
    monkeypatch.setattr(npu.platform, "machine", lambda: "aarch64")
    with pytest.raises(OSError, match="Linux on x86-64 only"):
        npu.check_platform()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    npu.npu_devices.cache_clear()
    try:
        with pytest.raises(OSError, match=r"pip install 'genieblue\[qnn\]'"):
            npu.npu_devices()
    finally:
        monkeypatch.undo()


def test_blocks_are_divided_evenly_and_without_gaps():
    assert divide_blocks(7, 3) == [range(0, 2), range(2, 4), range(4, 7)]
    assert divide_blocks(4, 1) == [range(0, 4)]


# Compared with PyTorch


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.2)])
def test_a_vision_tower_that_computes_something_else_is_refused(tmp_path, dtype, factor):
    model = two_blocks(dtype=dtype)
    tiles = [request["pixel_values"][0].numpy() for request in requests(1) if "pixel_values" in request]
    model.multi_modal_projector.register_forward_hook(lambda _module, _inputs, output: output * factor)
    with pytest.raises(ValueError, match="something other than a SigLIP"):
        quantize_vision(model, tiles, 1, Rotation(64), tmp_path)


def test_the_longest_requests_are_the_probe_and_short_ones_are_warned_of(caplog):
    model = two_blocks()
    short, long = requests(1), requests(2)[2:]
    short = [{**request, "input_ids": list(request["input_ids"])[:9]} for request in short]
    found = prepare_calibration(model, [*short, *long], Rotation(64), CHUNK, CONTEXT).requests
    assert [len(array) for array in found["text"]] == [24, 24, 9, 5]
    assert [len(array) for array in found["multimodal"]] == [28, 9] and not caplog.records
    with caplog.at_level(logging.WARNING):
        prepare_calibration(model, short, Rotation(64), CHUNK, CONTEXT)
    assert [record.getMessage()[:30] for record in caplog.records] == [
        "The longest text request of th", "The longest multimodal request",
    ]  # fmt: skip


# Disks and places


def test_a_full_disk_is_told_and_the_export_can_go_on(pair, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "quantize_vision", full)
        with pytest.raises(OSError, match=r"No space left.*free space in .*start again.*out\.unfinished"):
            export_bundle(pair, tmp_path / "out", calibration=requests(), **SETTINGS)
    assert (tmp_path / "out.unfinished").is_dir() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file/out", "/proc/out"])
def test_an_output_that_cannot_be_is_told(pair, tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot write to .*: give another output"):
        export_bundle(pair, tmp_path / out, calibration=requests(), **SETTINGS)


def test_a_size_that_cannot_be_is_refused_with_the_least_that_can(pair, tmp_path, dies_at_the_vision_tower):
    def export(max_bytes):
        settings = {**SETTINGS, "llm": "mixed", "max_bytes": max_bytes}
        export_bundle(pair, tmp_path / "out", calibration=requests(), **settings)

    with pytest.raises(ValueError, match=r"cannot take 10,000 bytes: the least is [0-9,]+, with") as refused:
        export(10_000)
    assert list(tmp_path.iterdir()) == []
    least = int(str(refused.value).partition("the least is ")[2].partition(", with")[0].replace(",", ""))
    with pytest.raises(ValueError, match="cannot take"):
        export(least - 1)
    with pytest.raises(KeyboardInterrupt):
        export(least)


def test_a_folder_without_a_genieblue_is_told(chats, tmp_path):
    (tmp_path / "empty").mkdir()
    result = invoke(tmp_path / "empty", "--soc", "sm8750", "--calibration", chats, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "empty has no config.json" in result.output


@pytest.mark.slow
def test_half_a_cache_and_two_tiles_verify(tmp_path):
    bundle = export_bundle(
        save_pair(tmp_path), tmp_path / "bundle", calibration=requests(), cache_bits=8, vision_tiles=2, **SETTINGS
    )
    facts = Bundle(bundle).metadata
    assert facts["vision"]["graph"]["inputs"][0]["shape"][0] == 2
    outputs = {tensor["name"]: tensor for tensor in facts["parts"][0]["graphs"]["text_decode"]["outputs"]}
    assert outputs["past_key_0_out"]["dtype"] == "uint8"
    assert [check for check in verify_bundle(bundle) if not check.ok] == []


@pytest.mark.slow
def test_a_model_in_16_bits_verifies(tmp_path):
    pair = save_pair(tmp_path)
    bundle = export_bundle(pair, tmp_path / "bundle", calibration=requests(), dtype=torch.bfloat16, **SETTINGS)
    assert [check for check in verify_bundle(bundle) if not check.ok] == []


# The command


@pytest.fixture
def chats(tmp_path):
    """A JSONL of chats, those with images last."""
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    lines = []
    for number in range(20):
        question = {"role": "user", "content": ("<image>\n" if number > 17 else "") + f"What is it, number {number}?"}
        answer = {"role": "assistant", "content": "It is what it is, and nothing else at all."}
        lines.append({"messages": [question, answer], **({"images": ["red.png"]} if number > 17 else {})})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_texts_and_images_are_chosen_whatever_the_order(chats):
    found = [bool(sample.images) for sample in read_chats(chats, 3)]
    assert found == [False, True, True]
    assert [bool(sample.images) for sample in read_chats(chats, 6)] == [False] * 4 + [True] * 2
    assert [bool(sample.images) for sample in read_chats(chats, 1)] == [True]
    assert len(read_chats(chats, 50)) == 20


def test_quantize_finds_images_at_the_end_of_a_file_too(pair, chats):
    samples = read_calibration([chats], GenieBlueProcessor.from_pretrained(pair), count=2, length=16)
    assert len(samples.multimodal) == 2 and all(len(request["pixel_values"]) for request in samples.multimodal)
    assert [tuple(row.shape) for row in samples.text] == [(1, 16)] * 2


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", "qnn", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_exports_a_bundle_and_says_so_in_json(pair, chats, tmp_path):
    command = (
        pair, "--out", tmp_path / "bundle", "--soc", "sm8750", "--calibration", chats, "--samples", 4,
        "--chunk-length", CHUNK, "--context-length", CONTEXT, "--json",
    )  # fmt: skip
    # A random model of 64 channels has little left in 4 bits.
    result = invoke(*command, "--eval-data", chats)
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    assert told["verdict"]["result"] == "failed" and not told["verdict"]["accepted"]
    assert (
        set(told["verdict"]["logits"]) == {"text", "multimodal"}
        and sum(score["count"] for score in told["verdict"]["answers"] if score["task"] == "all") == 20
    )
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert "do not ship it" in readme and "bits a weight on average" in readme
    assert os.path.samefile(told["bundle"], tmp_path / "bundle")
    assert {"metadata.json", "vision/vision.bin", "language_0/language_0.bin"} <= set(told["files"])
    assert Bundle(told["bundle"]).changed_files() == []
    assert "[1/4] vision tower" in result.stderr
    assert "Less is lost with --llm mixed --bits-per-weight 5, then with" in result.stderr


def test_the_command_refuses_before_it_reads_an_image(pair, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("genieblue.data.collation.ChatCollator.encode", None)
    common = ("--soc", "sm8750", "--calibration", chats, "--out")
    result = invoke(pair, *common, chats)
    assert result.exit_code == 1 and "already exists" in result.stderr and "looked up on the Hub" not in result.stderr
    result = invoke(pair, *common, tmp_path / "out", "--context-length", "4096")
    assert result.exit_code == 1 and "at most 1024" in result.stderr


def test_the_command_hands_on_that_it_was_calibrated_on_the_held_out_chats(pair, chats, tmp_path, monkeypatch):
    given = {}

    def note(*_arguments, **options):
        given.update(options)
        raise OSError("noted")

    monkeypatch.setattr(export_module, "export_bundle", note)
    command = (pair, "--soc", "sm8750", "--calibration", chats, "--out", tmp_path / "out", "--eval-data", chats)
    assert "noted" in invoke(*command).stderr
    assert given["remarks"] == ["20 held-out samples or paragraphs are in the calibration data too, so it is too kind"]


def test_an_export_that_is_ended_leaves_no_lock(pair, chats, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(export_module, "check_unchanged", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    result = invoke(pair, "--soc", "sm8750", "--calibration", chats, "--out", tmp_path / "ended/out")
    assert result.exit_code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "ended").exists()


def test_a_bug_is_not_taken_for_the_compiler_s(pair, chats, tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(export_module, "export_bundle", broken)
    result = invoke(pair, "--soc", "sm8750", "--calibration", chats, "--out", tmp_path / "out")
    assert isinstance(result.exception, RuntimeError)


def test_a_bundle_in_the_model_s_own_folder_is_refused(pair):
    with pytest.raises(ValueError, match="is inside the model's folder"):
        export_bundle(pair, pair / "bundle", soc="sm8750", calibration=requests())
    assert not list(pair.glob("*bundle*"))


def test_the_context_is_by_default_no_longer_than_the_base_s(pair, tmp_path, dies_at_the_vision_tower):
    with pytest.raises(KeyboardInterrupt):
        export_bundle(pair, tmp_path / "out", soc="sm8750", calibration=requests(), chunk_length=CHUNK)
    state = json.loads((tmp_path / "out.unfinished" / "export.json").read_text())
    assert state["context_length"] == 1024
