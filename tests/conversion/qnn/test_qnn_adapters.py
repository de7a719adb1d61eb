"""Adapters of one bundle: LoRA as inputs of the graphs, exported from other models, run, and refused."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

from tiny_qnn import SETTINGS, requests, save_pair, two_blocks
from typer.testing import CliRunner

from conversion.qnn.adapters import export_adapter
from conversion.qnn.agreement import agreement
from conversion.qnn.bundle.digests import tensors_digest, trained_digests
from conversion.qnn.bundle.runner import QnnRunner
from conversion.qnn.export import export_bundle
from conversion.qnn.verify import verify_bundle
from genieblue.cli.app import app
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters
from modeling_genieblue.quantized_settings_genieblue import QUANTIZED_PARTS


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def bundle(pair, tmp_path_factory):
    """One bundle whose LoRA are constants, to be read only."""
    return export_bundle(pair, tmp_path_factory.mktemp("out") / "bundle", calibration=requests(), **SETTINGS)


@pytest.fixture(scope="module")
def with_inputs(pair, tmp_path_factory):
    """One bundle whose LoRA are inputs, to be read only."""
    folder = tmp_path_factory.mktemp("inputs") / "bundle"
    return export_bundle(pair, folder, calibration=requests(), lora="inputs", **SETTINGS)


@pytest.fixture(scope="module")
def sibling(pair, tmp_path_factory):
    """A GenieBlue that differs from the one of the pair in its LoRA alone."""
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for name, _, parameter in adapter_parameters(model.multimodal_language_model):
            if ".lora_" in name:
                shuffled = parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)]
                parameter.copy_(shuffled.view_as(parameter))
    folder = tmp_path_factory.mktemp("sibling") / "genieblue"
    model.save_pretrained(folder)
    return folder


def test_digests_are_of_the_values_in_whatever_precision_they_are_loaded():
    model = two_blocks(dtype=torch.bfloat16)
    before = trained_digests(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert trained_digests(model) == before
    with torch.no_grad():
        next(model.vision_tower.parameters()).flatten()[0] += 1
    changed_keys = {key for key, digest in trained_digests(model).items() if digest != before[key]}
    assert changed_keys == {"sha256", "vision_sha256"}
    values = torch.arange(6.0)
    assert tensors_digest([("a", values)]) != tensors_digest([("a", values.reshape(2, 3))])
    assert tensors_digest([("a", values)]) != tensors_digest([("b", values)])


@pytest.mark.slow
def test_one_bundle_serves_several_adapters(with_inputs, bundle, sibling, tmp_path):
    request = requests(1)[1]

    def logits(path, **options):
        return QnnRunner(path, **options).logits(request["input_ids"], request["pixel_values"].numpy())

    adapter = export_adapter(sibling, with_inputs, tmp_path / "b")
    first, second = logits(with_inputs), logits(with_inputs, adapter=adapter)
    own = export_bundle(sibling, tmp_path / "own", calibration=requests(), **SETTINGS)
    assert agreement(first, logits(bundle)).cosine > 0.99
    assert agreement(second, logits(own)).cosine > 0.99
    assert agreement(second, first).cosine < 0.9
    text = requests(1)[0]["input_ids"]
    runners = QnnRunner(with_inputs), QnnRunner(with_inputs, adapter=adapter)
    assert np.array_equal(*(runner.logits(text) for runner in runners))  # LoRA is nothing to the text view
    assert [check for check in verify_bundle(with_inputs) if not check.ok] == []


@pytest.mark.slow
def test_adapters_that_do_not_fit_a_bundle_are_refused(with_inputs, bundle, sibling, pair, tmp_path):
    with pytest.raises(ValueError, match="--lora inputs"):
        export_adapter(sibling, bundle, tmp_path / "a")
    with pytest.raises(ValueError, match="takes no other adapter"):
        QnnRunner(bundle, adapter=tmp_path / "a")
    with pytest.raises(FileExistsError, match="already exists"):
        export_adapter(sibling, with_inputs, with_inputs / "adapter.npz")
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    with torch.no_grad():
        for name, _, parameter in adapter_parameters(model.multimodal_language_model):
            parameter.mul_(1.0 if ".lora_" in name else -1.0)
    model.save_pretrained(tmp_path / "other-copies")
    with pytest.raises(ValueError, match="does not have the bundle's replicated blocks"):
        export_adapter(tmp_path / "other-copies", with_inputs, tmp_path / "a")
    with pytest.raises(ValueError, match="different bases"):
        export_adapter(save_pair(tmp_path / "qwen2", "qwen2"), with_inputs, tmp_path / "a")
    (tmp_path / "broken").write_bytes(b"no archive")
    np.savez(tmp_path / "strange.npz", **{"0/blocks.0.o_lora.lora_a": np.zeros((3, 3), np.int8)})
    with np.load(with_inputs / "adapter.npz") as file:
        rescaled = {key: value * np.float32(1.01) if key.endswith("scale") else value for key, value in file.items()}
    np.savez(tmp_path / "other.npz", **rescaled)
    sentences = {"broken": "not an adapter", "strange.npz": "not fit part 0", "no": "cannot be read"}
    for name, sentence in {**sentences, "other.npz": "another bundle"}.items():
        with pytest.raises((ValueError, OSError), match=sentence):
            QnnRunner(with_inputs, adapter=tmp_path / name)
    assert not (tmp_path / "a").exists()


def changed(pair, folder, change):
    """The GenieBlue of the pair with each parameter in the hands of `change(name, parameter)`."""
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_models_that_differ_in_more_than_lora_are_refused(with_inputs, pair, tmp_path, caplog):
    def norm_of_a_copy(name, parameter):
        if "modules_to_save" in name and "input_layernorm" in name:
            parameter.add_(0.1)

    def projector(name, parameter):
        if name.startswith("multi_modal_projector"):
            parameter.mul_(0.9)

    def larger(name, parameter):
        if ".lora_A." in name:
            parameter.mul_(10)

    def one_larger(name, parameter):
        if ".lora_B." in name and "layers.0" in name and "q_proj" in name:  # a first factor's would be rotated
            parameter[0, 0] = 100

    for change, sentence in (
        (norm_of_a_copy, "does not have the bundle's replicated blocks"),
        (projector, "does not have the bundle's vision tower and projector"),
        (larger, r"LoRA values of .* \(\d+\.\d+%\) exceed.*at most 1%"),
    ):
        other = changed(pair, tmp_path / change.__name__, change)
        with pytest.raises(ValueError, match=sentence):
            export_adapter(other, with_inputs, tmp_path / "a")
    export_adapter(changed(pair, tmp_path / "few", one_larger), with_inputs, tmp_path / "few.npz")
    assert "and were clipped" in caplog.text
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export_adapter(pair, with_inputs, tmp_path / "no" / "a")
    with pytest.raises(ValueError, match="is inside the bundle"):
        export_adapter(pair, with_inputs, with_inputs / "a")
    config = json.loads((pair / "config.json").read_text())
    quantized = shutil.copytree(pair, tmp_path / "quantized")
    config["quantization"] = {**dict.fromkeys(QUANTIZED_PARTS, "w8a16"), "activations": "float32"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized"):
        export_adapter(quantized, with_inputs, tmp_path / "a")
    assert not list(tmp_path.glob("a*"))


@pytest.mark.slow
def test_a_write_that_fails_leaves_nothing(with_inputs, pair, tmp_path, monkeypatch):
    def full(file, **_arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(pair, with_inputs, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_adapter_writes_a_file_that_chat_takes(with_inputs, sibling, tmp_path):
    out = tmp_path / "other.npz"
    command = ["export", "adapter", sibling, "--bundle", with_inputs, "--out", out]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0 and str(out) in result.stdout
    command = ["chat", "--qnn", with_inputs, "--adapter", out, "--view", "multimodal", "--json", "--max-new-tokens", 2]
    result = CliRunner().invoke(app, list(map(str, [*command, "--prompt", "hi"])))
    assert json.loads(result.stdout)["view"] == "multimodal"
