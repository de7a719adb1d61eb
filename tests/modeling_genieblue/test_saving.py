"""Saving: only what is ours, complete, in the stated layout, and whole or not at all."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_genieblue import IMAGE, change_adapter, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import save_tiny_base, tiny_base, tiny_tokenizer, tiny_vision_tower
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, SiglipVisionModel

from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue import language_adapter_genieblue as adapter_module

ROOT = Path(__file__).parents[2]
REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
ADAPTER = "language_adapter/adapter_model.safetensors"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder, **kwargs):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, **kwargs)


@pytest.fixture
def folder(tmp_path):
    return save_tiny_pair(tmp_path)


def header(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name) for name in file.keys()}


# What is written


def test_folder_has_the_stated_layout(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "language_adapter", "README.md"} <= names
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert {path.name for path in (folder / "language_adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert "adapter_config.json" not in names
    code = {path.name for path in (ROOT / "modeling_genieblue").glob("*_genieblue.py")}
    assert {name for name in names if name.endswith(".py")} == {
        name for name in code if not name.startswith(("quantized_", "vlm_"))
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_config_says_which_base(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    assert config["base_model_revision"] is None
    assert list(config["base_model_fingerprint"]) == ["model.safetensors"]
    assert len(config["base_model_fingerprint"]["model.safetensors"]) == 64
    assert config["image_token_id"] == 128
    for auto_class in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
                       "AutoProcessor", "AutoImageProcessor"):  # fmt: skip
        module, _ = config["auto_map"][auto_class].split(".")
        assert (folder / f"{module}.py").is_file()
    adapter = json.loads((folder / "language_adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "../base"
    assert adapter["task_type"] == "CAUSAL_LM" and adapter["inference_mode"]
    assert adapter["auto_mapping"] is None


def test_no_path_of_this_computer_is_written(tmp_path):
    save_tiny_base("llama", tmp_path / "base")
    tiny_vision_tower().save_pretrained(tmp_path / "vision")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    vision_tower = SiglipVisionModel.from_pretrained(tmp_path / "vision")
    model = GenieBlueForConditionalGeneration.from_base(base, vision_tower, lora_rank=4)
    model.save_pretrained(tmp_path / "genieblue")
    for name, content in contents(tmp_path / "genieblue").items():
        assert str(tmp_path).encode() not in content, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_weight_of_the_base_is_written_and_bytes_are_parameters(dtype, tmp_path):
    base_sizes = {"hidden_size": 64, "intermediate_size": 256}
    model = tiny_genieblue(base=tiny_base("llama", dtype=dtype, **base_sizes)).to(dtype)
    model.save_pretrained(tmp_path / "genieblue")
    own, adapter = header(tmp_path / "genieblue/model.safetensors"), header(tmp_path / "genieblue" / ADAPTER)
    assert {name.split(".")[0] for name in own} == {"vision_tower", "multi_modal_projector"}
    assert not [name for name in adapter if ".lora_" not in name and ".layers.3." not in name]
    counted = {
        "model.safetensors": sum(p.numel() for part in (model.vision_tower, model.multi_modal_projector)
                                 for p in part.parameters()),
        ADAPTER: sum(p.numel() for _, _, p in adapter_module.adapter_parameters(model.multimodal_language_model)),
    }  # fmt: skip
    for name, count in counted.items():
        size = (tmp_path / "genieblue" / name).stat().st_size
        assert count * dtype.itemsize <= size <= count * dtype.itemsize * 1.01 + 12_000
    total = sum(len(content) for content in contents(tmp_path / "genieblue").values())
    assert total < sum(counted.values()) * 4 + 500_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_precision_can_be_chosen(dtype, tmp_path):
    model = tiny_genieblue()
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    for name in ("model.safetensors", ADAPTER):
        assert {piece.get_dtype() for piece in header(tmp_path / "half" / name).values()} == {
            {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        }
    assert model.dtype == torch.float32
    assert load(tmp_path / "half", base_model=tiny_base("llama")).language_model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
def test_precision_can_be_given_by_name(dtype, tmp_path):
    tiny_genieblue().save_pretrained(tmp_path / "half", dtype=dtype)
    assert {piece.get_dtype() for piece in header(tmp_path / "half" / ADAPTER).values()} == {"BF16"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "banana", "Tensor", 5], ids=str)
def test_precision_that_would_destroy_the_weights_is_refused(dtype, tmp_path):
    with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16"):
        tiny_genieblue().save_pretrained(tmp_path / "out" / "genieblue", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file/x", "/proc/x", "x" * 300], ids=["file", "proc", "long"])
def test_place_that_cannot_be_written_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(OSError, match="cannot be written .*give a folder in which you may create files") as error:
        tiny_genieblue().save_pretrained(place)
    assert place in str(error.value) and ".saving" not in str(error.value)


def test_folder_with_a_long_name_can_be_saved(tmp_path):
    for _ in range(2):
        tiny_genieblue().save_pretrained(tmp_path / ("x" * 250))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 250]


def test_same_model_is_saved_as_the_same_bytes(folder, tmp_path):
    code = (f"import torch\nfrom modeling_genieblue import *\n"
            f"m = GenieBlueForConditionalGeneration.from_pretrained({str(folder)!r})\n"
            f"m.save_pretrained({str(tmp_path / 'again')!r})")  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, capture_output=True)
    first, second = contents(folder), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name] and name != "README.md"]
    assert not different


def test_saving_leaves_the_model_as_it_was(folder, tmp_path):
    model = load(folder)
    before = model.config.to_json_string(use_diff=False), model.generation_config.to_dict()
    logits = model(REQUEST, pixel_values=PIXELS).logits
    model.save_pretrained(tmp_path / "elsewhere" / "again", dtype=torch.bfloat16)
    assert (model.config.to_json_string(use_diff=False), model.generation_config.to_dict()) == before
    assert torch.equal(model(REQUEST, pixel_values=PIXELS).logits, logits)


def test_tokenizer_is_the_bases_own(folder, tmp_path):
    ours, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "base")
    assert ours.get_vocab() == base.get_vocab()
    chat = [{"role": "user", "content": "Read the number <image> aloud."}]
    assert ours.apply_chat_template(chat) == base.apply_chat_template(chat)
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    processor = AutoProcessor.from_pretrained(folder)
    assert (processor.image_token_id, processor.image_seq_length) == (128, 4)
    assert processor.image_processor.tile_size == 24


def test_processor_can_be_given(tmp_path):
    processor = GenieBlueProcessor.from_base(
        tiny_tokenizer(), image_token_id=128, image_seq_length=4, tile_size=24, max_tiles=4
    )
    tiny_genieblue().save_pretrained(tmp_path / "genieblue", processor=processor)
    assert AutoProcessor.from_pretrained(tmp_path / "genieblue").image_processor.max_tiles == 4
    # It came with the model and goes with it.
    load(tmp_path / "genieblue", base_model=tiny_base("llama")).save_pretrained(tmp_path / "again")
    assert AutoProcessor.from_pretrained(tmp_path / "again").image_processor.max_tiles == 4


def test_processor_stays_when_the_folder_it_came_from_is_gone(tmp_path):
    folder = save_tiny_pair(tmp_path)
    model = load(folder)
    folder.rename(tmp_path / "renamed")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/processor_config.json").is_file()


def test_base_without_a_tokenizer_can_be_saved(tmp_path, caplog):
    save_tiny_base("llama", tmp_path / "base")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    model = tiny_genieblue(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "genieblue")
    assert "processor=" in caplog.text
    assert torch.equal(load(tmp_path / "genieblue")(prompt()).logits, model(prompt()).logits)


@pytest.mark.parametrize("flags", [{"temperature": 0.6}, {"top_p": 0.9, "temperature": 0.6}, {"num_beams": 1,
                                   "early_stopping": True}], ids=str)  # fmt: skip
def test_generation_flags_that_transformers_frowns_on_are_saved(flags, tmp_path):
    """Published bases have them, Llama 2 among others; loading such a base only warns."""
    base = tiny_base("llama")
    base.generation_config.update(do_sample=False, **flags)
    model = tiny_genieblue(base=base)
    model.save_pretrained(tmp_path / "genieblue")
    loaded = load(tmp_path / "genieblue", base_model=base)
    for name, value in flags.items():
        assert getattr(loaded.generation_config, name) == value
    assert base.generation_config.temperature == flags.get("temperature", base.generation_config.temperature)


def test_trained_model_is_saved_as_trained(tmp_path):
    model = tiny_genieblue(trained=False)
    model.save_pretrained(tmp_path / "genieblue")
    change_adapter(model)
    with torch.no_grad():
        model.vision_tower.embeddings.patch_embedding.weight.add_(0.1)
        model.multi_modal_projector.linear_2.weight.add_(0.1)
    model.save_pretrained(tmp_path / "genieblue")
    loaded = load(tmp_path / "genieblue", base_model=tiny_base("llama"))
    assert torch.equal(loaded(REQUEST, pixel_values=PIXELS).logits, model(REQUEST, pixel_values=PIXELS).logits)


# Where it is written


def test_what_is_not_ours_stays(folder):
    (folder / "README.md").write_text("# Mine\n")
    (folder / "notes").mkdir()
    foreign = {"notes/a.txt": b"a", "training_log.jsonl": b"{}", "my_own.safetensors": b"mine", "demo.py": b"pass",
               "language_adapter/notes.md": b"b", "checkpoint-1/optimizer.pt": b"c", ".git/HEAD": b"ref"}  # fmt: skip
    for name, content in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    load(folder).save_pretrained(folder)
    after = contents(folder)
    assert {name: after.get(name) for name in foreign} == foreign
    assert after["README.md"] == b"# Mine\n"


def test_shards_of_an_earlier_save_do_not_stay(folder):
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"{}")
    model = load_after_removal(folder)
    model.save_pretrained(folder)
    assert not [name for name in contents(folder) if "index.json" in name or "-of-" in name]


def load_after_removal(folder):
    (folder / "model.safetensors.index.json").rename(folder.parent / "index")
    model = load(folder)
    (folder.parent / "index").rename(folder / "model.safetensors.index.json")
    return model


def test_saving_onto_itself_is_saving(folder):
    model = load(folder)
    expected = model(REQUEST, pixel_values=PIXELS).logits
    before = contents(folder)
    model.save_pretrained(folder)
    assert contents(folder).keys() == before.keys()
    assert contents(folder)[ADAPTER] == before[ADAPTER]
    assert torch.equal(load(folder)(REQUEST, pixel_values=PIXELS).logits, expected)
    assert torch.equal(model(REQUEST, pixel_values=PIXELS).logits, expected)


def test_base_is_never_replaced(folder, tmp_path):
    model = load(folder)
    before = contents(tmp_path / "base")
    with pytest.raises(ValueError, match="base"):
        model.save_pretrained(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(ValueError, match="base|link"):
        model.save_pretrained(tmp_path / "link")
    assert contents(tmp_path / "base") == before


def test_working_directory_is_not_pulled_away(folder, monkeypatch):
    model = load(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="is the current folder"):
        model.save_pretrained(".")
    assert Path.cwd() == folder
    assert "config.json" in os.listdir(".")


def test_link_to_a_folder_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    model = change_adapter(load(folder))
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load(folder)(REQUEST, pixel_values=PIXELS).logits, model(REQUEST, pixel_values=PIXELS).logits)


def test_relative_base_is_counted_from_the_new_folder(folder, tmp_path, monkeypatch):
    model = load(folder)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("deep/er/copy")
    config = json.loads((tmp_path / "deep/er/copy/config.json").read_text())
    assert config["base_model_name_or_path"] == "../../../base"
    assert torch.equal(load("deep/er/copy")(prompt()).logits, model(prompt()).logits)


def test_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        tiny_genieblue().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_model_without_a_base_cannot_be_saved(tmp_path):
    empty = GenieBlueForConditionalGeneration(tiny_genieblue().config)
    with pytest.raises(ValueError, match="from_base"):
        empty.save_pretrained(tmp_path / "genieblue")
    assert not (tmp_path / "genieblue").exists()


def test_a_processor_that_cannot_be_read_is_not_replaced_by_another(folder, caplog):
    model = load(folder)
    (folder / "processor_config.json").write_text('{"image_token_id": 3')
    model.save_pretrained(folder)
    assert (folder / "processor_config.json").read_text() == '{"image_token_id": 3'
    assert "No processor is saved" in caplog.text and "is damaged" in caplog.text


def test_a_damaged_configuration_in_the_way_is_named(folder, tmp_path):
    model = load(folder)
    for content in ('{"model_type": "gen', "[]"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/config.json").write_text(content)
        with pytest.raises(OSError, match=r"out/config.json .*damaged"):
            model.save_pretrained(tmp_path / "out")


def test_a_broken_installation_is_not_taken_for_a_missing_one(folder, tmp_path, monkeypatch):
    model = load(folder)
    monkeypatch.setitem(sys.modules, "hub_cards.model_card", None)  # as if something that it imports were missing
    with pytest.raises(ModuleNotFoundError, match="hub_cards.model_card"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


EDITS = {
    "lora_alpha": ("config", "lora_alpha", 32), "replicated_layers": ("config", "replicated_layers", [0]),
    "image_token_id": ("config", "image_token_id", 5), "text_config": ("config", "text_config", None),
    "a setting of the base": ("config.text_config", "rms_norm_eps", 0.1),
    "a setting of the tower": ("config.vision_config", "image_size", 32),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_configuration_is_not_saved_over_a_good_folder(edit, tmp_path):
    """The weights in memory are those of other settings: the folder could not be loaded any more."""
    part, name, value = edit
    folder = save_tiny_pair(tmp_path)
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    setattr(operator.attrgetter(part)(model), name, value)
    with pytest.raises(ValueError, match=f"`{part}.{name}.* was .* and is "):
        model.save_pretrained(folder)
    GenieBlueForConditionalGeneration.from_pretrained(folder)


def test_model_on_a_base_that_was_changed_is_not_saved(tmp_path):
    model = tiny_genieblue()
    get_peft_model(model.language_model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
                   ).merge_and_unload()  # fmt: skip
    with pytest.raises(ValueError, match="base is not as it was .*q_proj.weight contains"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    again = tiny_genieblue(trained=False)
    again.load_state_dict(model.state_dict())  # the way that it names
    again.save_pretrained(tmp_path / "new")
