"""Weights that are not those that were recorded: no command makes anything of them, and each names the file."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import error_of
from tiny_quantized import large_pair, leftovers, own_copy, quantize, quantized_pair

from conversion import unchanged
from conversion.language_exports import load_source
from conversion.origin import find_origin
from conversion.qnn.export import export_bundle
from conversion.quantization import quantize as quantize_module
from conversion.quantization.healing import put_on_quantized_base
from conversion.stack import stack_on
from conversion.unchanged import check_unchanged
from conversion.verification.saved_model import SavedModel
from conversion.verification.verify_quantized import check_quantization
from modeling_genieblue import GenieBlueForConditionalGeneration, model_files_genieblue

FILES = ("genieblue/language_adapter/adapter_model.safetensors", "genieblue/model.safetensors",
         "base-llm/model.safetensors")  # fmt: skip
W8 = {"llm": "w8a16", "rounding": "rtn"}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture
def pair(tmp_path):
    return shutil.copytree(large_pair().parent, tmp_path / "pair")


@pytest.fixture(params=FILES)
def damaged(request, pair):
    flip_a_bit(pair / request.param)
    return pair, Path(request.param).name


def test_a_damaged_source_is_not_quantized(damaged, tmp_path, monkeypatch):
    folder, file = damaged
    monkeypatch.setattr(quantize_module.GenieBlueForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(ValueError, match=f"sha256 of .*{file}"):
        quantize(folder / "genieblue", tmp_path, **W8)
    assert leftovers(tmp_path) == ["pair"]


def test_nothing_else_is_made_of_a_damaged_source(damaged, tmp_path):
    folder, file = damaged
    with pytest.raises(ValueError, match=f"sha256 of .*{file}"):
        load_source(folder / "genieblue", tmp_path / "out")
    with pytest.raises(ValueError, match=f"sha256 of .*{file}"):
        stack_on(folder / "genieblue", large_pair().parent / "base-llm", tmp_path / "out")
    with pytest.raises(ValueError, match=f"sha256 of .*{file}"):
        export_bundle(folder / "genieblue", tmp_path / "out", soc="sm8750", calibration=[])
    with pytest.raises(OSError, match=f"sha256 of .*{file}"):
        find_origin({"name": "pair/genieblue"}, tmp_path)
    assert leftovers(tmp_path) == ["pair"]


def test_a_damaged_model_is_not_trained(damaged, tmp_path):
    folder, file = damaged
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    command = "train", "--stage", 2, "--model", folder / "genieblue", "--data", tmp_path / "chats.jsonl"
    assert file in error_of(*command, "--steps", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", FILES)
def test_a_quantized_model_is_not_measured_against_one_that_was_damaged_since(place, pair, tmp_path):
    quantize(pair / "genieblue", tmp_path, **W8)
    flip_a_bit(pair / place)
    subject = SavedModel(str(tmp_path / "genieblue"), None, None, {}, False, "auto", None)
    told = check_quantization(subject)
    assert "as recorded, not measured again" in told and Path(place).name in told


def test_another_base_that_is_named_is_told_by_its_values_alone(pair):
    flip_a_bit(pair / "base-llm/model.safetensors")
    check_unchanged(pair / "genieblue", base_model=pair / "elsewhere")


def test_a_folder_without_recorded_sha256_is_taken_as_it_is(pair):
    path = pair / "genieblue/config.json"
    settings = json.loads(path.read_text())
    del settings["weight_fingerprint"], settings["base_model_fingerprint"]
    path.write_text(json.dumps(settings))
    for file in FILES:
        flip_a_bit(pair / file)
    check_unchanged(pair / "genieblue")


def test_every_file_is_read_once(pair, monkeypatch):
    read, digest = [], unchanged.file_sha256
    for module in (unchanged, model_files_genieblue):
        monkeypatch.setattr(module, "file_sha256", lambda path, *options: read.append(path) or digest(path, *options))
    check_unchanged(pair / "genieblue")
    assert sorted(path.relative_to(pair).as_posix() for path in read) == sorted(FILES)


def test_a_damaged_quantized_base_is_not_used(pair, tmp_path):
    copy = own_copy(quantized_pair(**W8), tmp_path)
    flip_a_bit(copy / "base/quantized_model.safetensors")
    with pytest.raises(ValueError, match="sha256 of quantized_model.safetensors"):
        quantize(pair / "genieblue", tmp_path, {"quantized_base": copy / "base"}, **W8)
    model = GenieBlueForConditionalGeneration.from_pretrained(pair / "genieblue")
    with pytest.raises(ValueError, match="sha256 of quantized_model.safetensors"):
        put_on_quantized_base(model, copy / "base")
    assert leftovers(tmp_path) == ["copy", "pair"]
