"""A GenieBlue of an existing PEFT adapter and a SigLIP."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_genieblue import prompt, save_tiny_pair
from tiny_models import save_tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM

from conversion.from_peft import create_from_peft
from conversion.lora_form import export_lora
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.model_files_genieblue import read_settings, write_json


@pytest.fixture
def sources(tmp_path):
    tiny_vision_tower().save_pretrained(tmp_path / "siglip")
    return save_tiny_base("qwen2", tmp_path / "base"), tmp_path / "siglip"


def save_adapter(base, folder, **settings):
    """An adapter with random values on a saved base."""
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


ADAPTERS = {
    "LoRA on some layers": {},
    "ranks that differ": {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "whole blocks": {"modules_to_save": ["layers.1"], "layers_to_transform": [0, 2, 3], "layers_pattern": "layers"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_multimodal_view_gives_the_adapters_logits(sources, tmp_path, kind):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    result = create_from_peft(adapter, siglip, tmp_path / "mine")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(model(prompt()).logits, plain(prompt()).logits)
    expected = PeftModel.from_pretrained(plain, adapter)(prompt()).logits
    assert torch.allclose(model(prompt(), view="multimodal").logits, expected, atol=1e-4)
    assert result.replicated_layers == ([1] if kind == "whole blocks" else [3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "also has lm_head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "also has lm_head"),
        ({"modules_to_save": ["self_attn"]}, r"also has model.layers.0.self_attn, .* and 1 more"),
    ],
)
def test_what_a_genieblue_has_no_place_for_is_refused(sources, tmp_path, settings, message):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=message):
        create_from_peft(adapter, siglip, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def rename(adapter, change):
    """Writes an adapter's tensors under other names; those that `change` gives none are left out."""
    path = adapter / "adapter_model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path, {"format": "pt"})


def of_vlm(name):
    return name.replace(".model.layers.", ".model.language_model.layers.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_vlm, "24 tensors are missing"),
        (lambda name: name.replace(".2.self_attn.v_proj.", ".2.self_attn.w_proj."), "2 tensors are not expected"),
        (lambda name: name if ".layers.3." not in name else None, "6 tensors are missing"),
    ],
)
def test_an_adapter_of_which_not_all_loads_is_refused(sources, tmp_path, change, message):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter")
    rename(adapter, change)
    with pytest.raises(ValueError, match=message):
        create_from_peft(adapter, siglip, tmp_path / "mine", base=base)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3", "r": None}, "of type IA3: expected LORA"),
        ({"r": "much"}, "r is 'much' in .*adapter_config.json, expected a positive number"),
        ({"r": 0}, "r is 0 in "),
        ({"lora_alpha": None}, "lora_alpha is None in "),
        ({"rank_pattern": {"v_proj": "many"}}, "does not fit its base"),
    ],
)
def test_settings_that_are_damaged_are_refused_by_name(sources, tmp_path, settings, message):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter")
    write_json(adapter / "adapter_config.json", read_settings(adapter / "adapter_config.json") | settings)
    with pytest.raises(ValueError, match=message):
        create_from_peft(adapter, siglip, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_values_that_are_no_numbers_are_refused_by_name(sources, tmp_path):
    base, siglip = sources
    path = save_adapter(base, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".layers.2.self_attn.v_proj.lora_B." in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"contains NaN or infinity \({name}\)"):
        create_from_peft(tmp_path / "adapter", siglip, tmp_path / "mine")


def test_a_tensor_of_nothing_is_refused_by_name(sources, tmp_path):
    base, siglip = sources
    path = save_adapter(base, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.other": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are not expected \(base_model.model.other\)"):
        create_from_peft(tmp_path / "adapter", siglip, tmp_path / "mine")


def test_an_adapter_that_is_not_there_is_named(sources, tmp_path):
    with pytest.raises(FileNotFoundError, match="^The adapter .*nowhere is not a folder"):
        create_from_peft(tmp_path / "nowhere", sources[1], tmp_path / "mine")


def test_a_block_without_its_weights_is_refused(sources, tmp_path):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS["whole blocks"])
    rename(adapter, lambda name: None if ".layers.1.mlp." in name else name)
    with pytest.raises(ValueError, match=r"3 tensors are missing \(base_model.model.model.layers.1.mlp"):
        create_from_peft(adapter, siglip, tmp_path / "mine")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.(q|v)_proj"])
def test_the_names_of_a_vlm_are_refused_with_the_way_to_rename_them(sources, tmp_path, targets):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    rename(adapter, of_vlm)
    path = adapter / "adapter_model.safetensors"
    vision = {f"base_model.model.model.visual.layers.0.self_attn.q_proj.lora_{kind}.weight": torch.ones(3, 3)
              for kind in "AB"}  # fmt: skip
    save_file(load_file(path) | vision, path, {"format": "pt"})
    settings = read_settings(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"target_modules": targets})
    way = r"rename base_model.model.model.language_model.layers.… to base_model.model.model.layers.…"
    with pytest.raises(ValueError, match=way):
        create_from_peft(adapter, siglip, tmp_path / "mine", base=base)


def test_tensors_of_another_rank_than_configured_are_refused(sources, tmp_path):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter")
    settings = read_settings(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"r": 4})
    with pytest.raises(ValueError, match=r"has shape \[3, 64\], expected \[4, 64\]"):
        create_from_peft(adapter, siglip, tmp_path / "mine")


def test_every_layer_keeps_the_rank_that_the_adapter_gives_it(sources, tmp_path):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", rank_pattern={"v_proj": 5})
    create_from_peft(adapter, siglip, tmp_path / "mine")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine")
    block = model.multimodal_language_model.get_submodule("model.layers.0.self_attn")
    ranks = {name: block.get_submodule(name).r["default"] for name in ("q_proj", "k_proj", "v_proj")}
    assert ranks == {"q_proj": 3, "k_proj": 3, "v_proj": 5}


def test_layers_that_the_adapter_leaves_out_can_be_trained(sources, tmp_path):
    base, siglip = sources
    create_from_peft(save_adapter(base, tmp_path / "adapter"), siglip, tmp_path / "mine")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine")
    lora = model.multimodal_language_model.get_submodule("model.layers.0.self_attn.k_proj")
    (a,), (b,) = lora.lora_A.values(), lora.lora_B.values()
    assert a.weight.abs().min() > 0 and not b.weight.any()


@torch.no_grad()
def test_the_lora_form_comes_back_beside_its_base_from_any_folder(tmp_path, monkeypatch):
    pair = save_tiny_pair(tmp_path / "pair").parent
    tiny_vision_tower().save_pretrained(tmp_path / "siglip")
    export_lora(pair / "genieblue", pair / "form")
    # What the path in the adapter leads to from here is another model.
    shutil.copytree(save_tiny_base("llama", tmp_path / "base", seed=1), tmp_path / "elsewhere/base")
    (tmp_path / "elsewhere/here").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere/here")
    create_from_peft(pair / "form", tmp_path / "siglip", tmp_path / "back", placement="pre")
    back = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "back")
    model = GenieBlueForConditionalGeneration.from_pretrained(pair / "genieblue")
    assert torch.equal(back(prompt()).logits, model(prompt()).logits)
    expected = model(prompt(), view="multimodal").logits
    assert torch.allclose(back(prompt(), view="multimodal").logits, expected, atol=1e-3)
    of_the_copy = {name.split(".")[2] for name in back.config.rank_pattern}
    assert back.config.lora_rank == 4 and of_the_copy == {"3"}


def test_a_base_that_is_not_beside_the_adapter_is_named(sources, tmp_path):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter")
    settings = read_settings(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": "../gone"})
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/gone, and there is no such folder"):
        create_from_peft(adapter, siglip, tmp_path / "mine")


def test_the_base_is_taken_at_the_revision_that_the_adapter_names(hub, sources, tmp_path):
    base, siglip = sources
    commit = hub.commit_folder("you/base", base)
    hub.commit_folder("you/base", save_tiny_base("qwen2", tmp_path / "newer", seed=1))
    adapter = save_adapter(base, tmp_path / "adapter")
    settings = read_settings(adapter / "adapter_config.json")
    recorded = {"base_model_name_or_path": "you/base", "revision": commit}
    write_json(adapter / "adapter_config.json", settings | recorded)
    create_from_peft(adapter, siglip, tmp_path / "mine")
    assert read_settings(tmp_path / "mine/config.json")["base_model_revision"] == commit


@pytest.mark.parametrize(
    ("named", "is_other"),
    [("you/base", True), ("../base", False), ("../another", True), (None, False)],
)
def test_another_base_than_the_adapter_names_is_warned_of_by_both_names(sources, tmp_path, caplog, named, is_other):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter")
    settings = read_settings(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": named})
    create_from_peft(adapter, siglip, tmp_path / "mine", base=base)
    assert (f"names {named} as its base and is put on {base}" in caplog.text) == is_other


def test_another_revision_than_the_adapter_names_is_warned_of(hub, sources, tmp_path, caplog):
    base, siglip = sources
    first = hub.commit_folder("you/base", base)
    second = hub.commit_folder("you/base", save_tiny_base("qwen2", tmp_path / "newer", seed=1))
    adapter = save_adapter(base, tmp_path / "adapter")
    settings = read_settings(adapter / "adapter_config.json")
    recorded = {"base_model_name_or_path": "you/base", "revision": first}
    write_json(adapter / "adapter_config.json", settings | recorded)
    create_from_peft(adapter, siglip, tmp_path / "one", base="you/base", base_revision=first)
    assert "as its base" not in caplog.text
    create_from_peft(adapter, siglip, tmp_path / "two", base="you/base", base_revision=second)
    assert f"names you/base at {first} as its base and is put on you/base at {second}" in caplog.text


def test_a_folder_that_is_no_adapter_is_refused(sources, tmp_path):
    base, siglip = sources
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        create_from_peft(base, siglip, tmp_path / "mine")
