"""A GenieBlue on a newer revision of its base: taken if nothing that it shares changed, otherwise refused."""

import shutil
from pathlib import Path

import pytest
import torch
from command_line import error_of, run, run_json
from safetensors.torch import load_file, save_file
from tiny_genieblue import IMAGE, prompt, row, save_tiny_pair, tiles
from tiny_models import tiny_tokenizer
from tiny_quantized import contents, leftovers, quantized_pair
from transformers import AutoModelForCausalLM
from vlm_training_setup import extract_tiny, load, make_image_data

from conversion.stack import stack_on
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.model_files_genieblue import read_settings, write_json

OF_A_COPIED_BLOCK = "model.layers.3.mlp.up_proj.weight"
SHARED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path) -> Path:
    """`base`, `genieblue` on it, and `newer`, to be changed."""
    save_tiny_pair(tmp_path / "pair")
    shutil.copytree(tmp_path / "pair/base", tmp_path / "pair/newer")
    return tmp_path / "pair"


def change(base: Path, name: str) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def logits(folder: Path):
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    image = model(row(5, IMAGE, 9, 40), pixel_values=tiles(), use_cache=False).logits
    return model(prompt(9), use_cache=False).logits, image


def test_text_runs_the_new_base_and_images_give_what_they_gave(pair):
    change(pair / "newer", OF_A_COPIED_BLOCK)
    before = contents(pair)
    stacked = stack_on(pair / "genieblue", pair / "newer", pair / "stacked")
    assert stacked.changed == [OF_A_COPIED_BLOCK]
    assert {name: content for name, content in contents(pair).items() if not name.startswith("stacked")} == before
    text, image = logits(pair / "stacked")
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(pair / "newer")
        assert torch.equal(text, base(prompt(9), use_cache=False).logits)
    old_text, old_image = logits(pair / "genieblue")
    assert torch.equal(image, old_image) and not torch.equal(text, old_text)


def test_it_passes_verify(pair):
    change(pair / "newer", OF_A_COPIED_BLOCK)
    run("stack", pair / "genieblue", "--base", pair / "newer", "--out", pair / "stacked")
    run("verify", pair / "stacked", "--trust-remote-code")


def test_the_new_bases_tokenizer_and_template_are_taken(pair):
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|", "<|new-")
    tokenizer.save_pretrained(pair / "newer")
    stack_on(pair / "genieblue", pair / "newer", pair / "stacked")
    assert "<|new-" in GenieBlueProcessor.from_pretrained(pair / "stacked").chat_template


def test_a_shared_tensor_that_changed_is_named(pair):
    change(pair / "newer", OF_A_COPIED_BLOCK)
    change(pair / "newer", SHARED)
    with pytest.raises(ValueError, match=rf"1 tensors that its multimodal view shares differ \({SHARED}\)"):
        stack_on(pair / "genieblue", pair / "newer", pair / "stacked")
    assert leftovers(pair) == ["base", "genieblue", "newer"]


def test_a_setting_that_changed_is_named(pair):
    config = read_settings(pair / "newer/config.json")
    write_json(pair / "newer/config.json", config | {"rms_norm_eps": 0.1})
    with pytest.raises(ValueError, match="rms_norm_eps 0.1, expected"):
        stack_on(pair / "genieblue", pair / "newer", pair / "stacked")


def test_code_of_the_base_that_changed_is_named(tmp_path):
    source = save_tiny_pair(tmp_path / "pair", "bluelm")
    newer = shutil.copytree(tmp_path / "pair/base", tmp_path / "newer")
    stack_on(source, newer, tmp_path / "stacked", trust_remote_code=True)
    path = newer / "modeling_bluelm.py"
    path.write_text(path.read_text().replace("class BlueLMForCausalLM", "EPSILON = 1\n\n\nclass BlueLMForCausalLM"))
    with pytest.raises(ValueError, match=r"its own code differs \(modeling_bluelm.py\)"):
        stack_on(source, newer, tmp_path / "other", trust_remote_code=True)
    assert not (tmp_path / "other").exists()


def test_another_vocabulary_is_refused(pair):
    path = pair / "newer/tokenizer.json"
    path.write_text(path.read_text().replace('"<|user|>"', '"<|human|>"'))
    with pytest.raises(ValueError, match="another vocabulary"):
        stack_on(pair / "genieblue", pair / "newer", pair / "stacked")


def test_a_base_on_the_hub_is_recorded_at_its_commit(hub, pair):
    hub.commit_folder("you/base", pair / "base")
    change(pair / "newer", OF_A_COPIED_BLOCK)
    commit = hub.commit_folder("you/base", pair / "newer")
    stack_on(pair / "genieblue", "you/base", pair / "stacked")
    config = read_settings(pair / "stacked/config.json")
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("you/base", commit)


def with_index(base: Path) -> None:
    (base / "model.safetensors").unlink()
    index = {"weight_map": {OF_A_COPIED_BLOCK: "model-00002-of-00002.safetensors"}}
    write_json(base / "model.safetensors.index.json", index)


def with_tensor(base: Path, change_to) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[OF_A_COPIED_BLOCK] = change_to(tensors[OF_A_COPIED_BLOCK])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def quantized(base: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_json(base / "config.json", read_settings(base / "config.json") | settings)


def pickled(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (with_index, "model-00002-of-00002.safetensors, which is not there"),
        (pickled, "has no safetensors files"),
        (quantized, "are quantized, so it cannot be compared"),
        (lambda base: (base / "model.safetensors").write_bytes(b"12345678"), "weights of .*newer cannot be read"),
        (lambda base: with_tensor(base, lambda weight: weight * float("nan")), "contains NaN or infinity"),
        (lambda base: with_tensor(base, lambda weight: weight.to(torch.float8_e4m3fn)), "holds F8_E4M3, expected"),
        (lambda base: (base / "tokenizer.json").unlink(), "The base's tokenizer .*newer could not be loaded"),
        (lambda base: [change(base, SHARED), write_json(base / "config.json", {"model_type": "genieblue"})],
         "is already a GenieBlue"),
    ],
    ids=["missing shard", "pickled", "quantized", "cut off", "nan", "fp8", "no tokenizer", "no base"],
)  # fmt: skip
def test_a_new_base_that_is_damaged_or_of_another_kind_is_refused_by_name(pair, spoil, told):
    spoil(pair / "newer")
    with pytest.raises((ValueError, OSError), match=told):
        stack_on(pair / "genieblue", pair / "newer", pair / "stacked")
    assert not (pair / "stacked").exists()


def test_a_quantized_one_and_an_output_that_exists_are_refused(pair):
    assert "already exists" in error_of("stack", pair / "genieblue", "--base", pair / "newer", "--out", pair / "base")
    quantized = quantized_pair() / "genieblue"
    assert "already quantized" in error_of("stack", quantized, "--base", pair / "newer", "--out", pair / "stacked")
    assert "is not a folder" in error_of("stack", pair / "genieblue", "--base", "./gone", "--out", pair / "stacked")


def test_stack_as_json_has_the_base_and_its_changed_tensors(pair):
    found = run_json("stack", pair / "genieblue", "--base", pair / "newer", "--out", pair / "stacked", "--json")
    assert set(found) == {"output", "base", "revision", "changed"}
    assert found["output"] == str(pair / "stacked")


@torch.no_grad()
def test_what_is_a_vlms_own_may_differ(tmp_path):
    source = extract_tiny(tmp_path)
    newer = shutil.copytree(tmp_path / "base", tmp_path / "newer")
    old, processor = load(source)
    norm = (old.config.own_language_tensors or [])[0]
    changed = {norm, *(f"model.layers.{index}.mlp.up_proj.weight" for index in old.config.replicated_layers or [])}
    for name in changed:
        change(newer, name)
    assert set(stack_on(source, newer, tmp_path / "stacked").changed) == changed
    model, _ = load(tmp_path / "stacked")
    part = {"type": "image", "image": make_image_data()[0]["images"][0]}
    request = processor.apply_chat_template(
        [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(model(**request).logits, old(**request).logits)
    base = AutoModelForCausalLM.from_pretrained(newer)
    assert torch.equal(model(prompt(9)).logits, base(prompt(9)).logits)


def test_a_tensor_that_a_vlm_shares_is_named(tmp_path):
    source = extract_tiny(tmp_path)
    newer = shutil.copytree(tmp_path / "base", tmp_path / "newer")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        change(newer, name)
    with pytest.raises(ValueError, match="2 tensors that its multimodal view shares differ"):
        stack_on(source, newer, tmp_path / "stacked")
