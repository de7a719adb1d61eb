"""A GenieBlue's own weight files are recorded by sha256 at every save, and compared where that costs nothing."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_genieblue import change_adapter, save_tiny_pair, tiny_genieblue
from tiny_models import save_tiny_base
from tiny_quantized import large_pair, quantize, quantized_pair
from transformers import AutoModelForCausalLM

from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.model_files_genieblue import changed_weights, file_sha256, read_settings

BASE, REPO = "you/base-llm", "you/genieblue-tiny"
OWN, ADAPTER = "model.safetensors", "language_adapter/adapter_model.safetensors"
QUANTIZED = "language_adapter/quantized_adapter.safetensors"


def load(folder, **kwargs):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, **kwargs)


@pytest.fixture
def folder(tmp_path):
    return save_tiny_pair(tmp_path)


@pytest.fixture
def pushed(hub, tmp_path):
    """A Hub with a GenieBlue; the files of its repository, by name."""
    hub.commit_folder(BASE, save_tiny_base("llama", tmp_path / "base"))
    tiny_genieblue(base=AutoModelForCausalLM.from_pretrained(BASE)).push_to_hub(REPO)
    return hub.files(REPO)


def recorded(folder):
    return read_settings(folder / "config.json")["weight_fingerprint"]


def changed(folder):
    return changed_weights(folder, read_settings(folder / "config.json"))


def as_on_disk(folder, *places):
    return {place: file_sha256(folder / place) for place in places}


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


# What is recorded


def test_every_own_weight_file_is_recorded(folder):
    assert recorded(folder) == as_on_disk(folder, OWN, ADAPTER)


def test_a_checkpoint_of_training_is_recorded_too(folder):
    load(folder).save_pretrained(folder / "checkpoint-7")
    assert recorded(folder / "checkpoint-7") == as_on_disk(folder / "checkpoint-7", OWN, ADAPTER)


def test_a_quantized_model_records_its_files_and_its_inner_base_in_the_bases_fingerprint(tmp_path):
    quantize(large_pair(), tmp_path, {"self_contained": True}, rounding="rtn")
    folder = tmp_path / "genieblue"
    assert recorded(folder) == as_on_disk(folder, OWN, QUANTIZED)
    inner = read_settings(folder / "config.json")["base_model_fingerprint"]
    assert inner == as_on_disk(folder / "base", "quantized_model.safetensors")


def test_a_save_over_a_folder_records_the_new_files(folder):
    before = recorded(folder)
    change_adapter(load(folder)).save_pretrained(folder, dtype="bfloat16")
    assert recorded(folder) == as_on_disk(folder, OWN, ADAPTER)
    assert not recorded(folder).items() & before.items()


def test_a_16_bit_save_over_a_quantized_one_forgets_its_files(tmp_path):
    shutil.copytree(quantized_pair(), tmp_path / "pair")
    load(large_pair()).save_pretrained(tmp_path / "pair/genieblue")
    assert recorded(tmp_path / "pair/genieblue") == as_on_disk(tmp_path / "pair/genieblue", OWN, ADAPTER)


@pytest.mark.parametrize("first, second", [(None, "fp16"), ("fp16", None), ("fp16", "mine")])
def test_variants_in_one_folder_are_recorded_together(first, second, folder, tmp_path):
    model = load(folder)
    for variant in (first, second):
        model.save_pretrained(tmp_path / "both", variant=variant, dtype="float32" if variant is None else "float16")
    names = [name if variant is None else name.replace(".safe", f".{variant}.safe")
             for variant in (first, second) for name in (OWN, ADAPTER)]  # fmt: skip
    assert recorded(tmp_path / "both") == as_on_disk(tmp_path / "both", *names)


# What is compared at load


@pytest.mark.parametrize("place", [OWN, ADAPTER])
def test_a_changed_weight_on_the_hub_is_refused(place, hub, pushed):
    hub.commit(REPO, {place: flipped(pushed[place])})
    with pytest.raises(ValueError, match=f"{place} of {REPO} has sha256 .* save it again"):
        load(REPO)


@pytest.mark.parametrize("place", [OWN, QUANTIZED])
def test_a_changed_code_of_a_quantized_model_on_the_hub_is_refused(place, hub, tmp_path):
    pair = shutil.copytree(quantized_pair(), tmp_path / "pair")
    hub.commit_folder(REPO, pair / "genieblue")
    base = pair / "base"
    load(REPO, base_model=base)
    hub.commit(REPO, {place: flipped((pair / "genieblue" / place).read_bytes())})
    with pytest.raises(ValueError, match=f"{place} of {REPO} has sha256"):
        load(REPO, base_model=base)


def test_files_that_people_edit_are_free(hub, pushed):
    config = json.loads(pushed["config.json"])
    edits = {
        "README.md": b"# Mine",
        "generation_config.json": b'{"max_new_tokens": 5}',
        "config.json": json.dumps(config | {"my_note": "edited by hand"}).encode(),
        "processor_config.json": pushed["processor_config.json"].replace(b'"max_tiles": 9', b'"max_tiles": 4'),
    }
    hub.commit(REPO, edits)
    assert load(REPO).generation_config.max_new_tokens == 5
    GenieBlueProcessor.from_pretrained(REPO)


def test_a_folder_of_an_earlier_version_loads(hub, pushed):
    config = json.loads(pushed["config.json"])
    del config["weight_fingerprint"]
    hub.commit(REPO, {"config.json": json.dumps(config).encode(), OWN: flipped(pushed[OWN])})
    load(REPO)


def test_weights_that_a_user_sharded_anew_load(hub, pushed, tmp_path):
    (tmp_path / "whole").write_bytes(pushed[OWN])
    tensors = load_file(tmp_path / "whole")
    shards = {f"model-0000{part}-of-00002.safetensors": sorted(tensors)[part - 1 :: 2] for part in (1, 2)}
    files = {}
    for name, names in shards.items():
        save_file({key: tensors[key] for key in names}, tmp_path / name, metadata={"format": "pt"})
        files[name] = (tmp_path / name).read_bytes()
    weight_map = {key: name for name, names in shards.items() for key in names}
    index = {"metadata": {"total_size": len(pushed[OWN])}, "weight_map": weight_map}
    hub.commit(REPO, {**files, "model.safetensors.index.json": json.dumps(index).encode()}, [OWN])
    state = load(REPO).state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())


def test_weights_that_another_program_changed_load_from_a_folder_and_are_recorded_by_the_next_save(folder):
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    stock = PeftModel.from_pretrained(base, folder / "language_adapter", is_trainable=True)
    with torch.no_grad():
        next(value for name, value in stock.named_parameters() if ".lora_B." in name).add_(1)
    stock.save_pretrained(folder / "language_adapter")
    assert [problem.split()[2] for problem in changed(folder)] == [ADAPTER]
    load(folder).save_pretrained(folder)
    assert changed(folder) == []


@pytest.mark.parametrize("content", ["a sha256", [OWN], 5])
def test_a_damaged_record_is_named(content, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"weight_fingerprint": content}))
    with pytest.raises(OSError, match="weight_fingerprint"):
        load(folder)
    with pytest.raises(OSError, match="weight_fingerprint"):
        changed_weights(folder, config | {"weight_fingerprint": content})
