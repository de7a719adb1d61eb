"""Making a new GenieBlue from files: what it consists of, what it records, what is refused."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genieblue import prompt
from tiny_models import save_tiny_base, tiny_tokenizer, tiny_vision_tower
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, SiglipConfig, SiglipModel

from conversion.create import create_genieblue
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

VISION_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with `base`, `vision` (the image half of a SigLIP alone) and `siglip` (the whole one)."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_base("llama", folder / "base")
    tower = tiny_vision_tower()
    tower.save_pretrained(folder / "vision")
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    siglip = SiglipModel(SiglipConfig(vision_config=VISION_SHAPE, text_config=text))
    siglip.vision_model.load_state_dict(tower.state_dict())
    siglip.save_pretrained(folder / "siglip")
    return folder


@pytest.fixture
def pair(sources, tmp_path) -> Path:
    """A copy of the sources that a test may damage, and in which it may make its GenieBlue."""
    return shutil.copytree(sources, tmp_path / "pair")


def hashes(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_new_genieblue_loads_and_its_two_views_agree_with_the_base(pair):
    folder = create_genieblue(pair / "base", pair / "vision", pair / "reader")
    model = AutoModel.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(pair / "base")
    ids = prompt()
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(model(ids).logits, expected)
        torch.testing.assert_close(model(ids, view="multimodal").logits, expected, rtol=1e-5, atol=1e-5)
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "GenieBlueProcessor"


def test_the_sources_are_only_read(pair):
    before = hashes(pair)
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    after = {path: digest for path, digest in hashes(pair).items() if "/reader/" not in path}
    assert after == before


@pytest.mark.parametrize("vision", ["vision", "siglip"])
def test_a_whole_siglip_and_its_image_half_give_the_same_tower(pair, vision):
    create_genieblue(pair / "base", pair / vision, pair / "reader")
    tensors = load_file(pair / "reader" / "model.safetensors")
    expected = {f"vision_tower.{name}": value for name, value in tiny_vision_tower().state_dict().items()}
    found = {name: value for name, value in tensors.items() if name.startswith("vision_tower.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_settings_are_recorded(pair):
    create_genieblue(
        pair / "base", pair / "vision", pair / "reader", placement="pre", lora_rank=3, lora_alpha=5, max_tiles=4
    )
    config = json.loads((pair / "reader/config.json").read_text())
    assert (config["placement"], config["replicated_layers"]) == ("pre", [0])
    assert (config["lora_rank"], config["lora_alpha"]) == (3, 5)
    image_processor = GenieBlueProcessor.from_pretrained(pair / "reader").image_processor
    assert (image_processor.max_tiles, image_processor.tile_size) == (4, 24)


def test_a_base_in_16_bits_gives_everything_in_16_bits(pair, tmp_path):
    save_tiny_base("llama", tmp_path / "half", dtype=torch.bfloat16)
    create_genieblue(tmp_path / "half", pair / "vision", tmp_path / "reader")
    for file in ("model.safetensors", "language_adapter/adapter_model.safetensors"):
        assert {value.dtype for value in load_file(tmp_path / "reader" / file).values()} == {torch.bfloat16}


def test_dtype_can_be_asked_for(pair):
    create_genieblue(pair / "base", pair / "vision", pair / "reader", dtype="bfloat16")
    assert load_file(pair / "reader/model.safetensors")["multi_modal_projector.norm.weight"].dtype == torch.bfloat16


def test_a_local_base_is_found_again_when_both_folders_move(pair, tmp_path):
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    pair.rename(tmp_path / "elsewhere")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "elsewhere/reader")
    assert model.config.base_model_name_or_path == str((tmp_path / "elsewhere/base").resolve())


def test_hub_ids_are_recorded_with_the_commit(hub, sources, tmp_path):
    commit = hub.commit_folder("maker/base", sources / "base")
    hub.commit_folder("maker/siglip", sources / "siglip")
    create_genieblue("maker/base", "maker/siglip", tmp_path / "reader")
    config = json.loads((tmp_path / "reader/config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("maker/base", commit)


def test_token_and_cache_reach_the_identity_of_the_base(hub, sources, tmp_path, monkeypatch):
    commit = hub.commit_folder("maker/base", sources / "base")
    hub.storage.repos["model", "maker/base"].private = True
    monkeypatch.delenv("HF_TOKEN")
    access = {"token": hub.token, "cache_dir": tmp_path / "cache"}
    create_genieblue("maker/base", sources / "vision", tmp_path / "reader", **access)
    config = json.loads((tmp_path / "reader/config.json").read_text())
    sha256 = hashlib.sha256((sources / "base/model.safetensors").read_bytes()).hexdigest()
    assert config["base_model_revision"] == commit
    assert config["base_model_fingerprint"] == {"model.safetensors": sha256}


def test_a_revision_of_the_base_is_loaded_and_recorded(hub, sources, tmp_path):
    first = hub.commit_folder("maker/base", sources / "base")
    save_tiny_base("llama", tmp_path / "other", seed=1)
    hub.commit_folder("maker/base", tmp_path / "other")
    create_genieblue("maker/base", sources / "vision", tmp_path / "reader", base_revision=first)
    assert json.loads((tmp_path / "reader/config.json").read_text())["base_model_revision"] == first
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "reader")
    expected = AutoModelForCausalLM.from_pretrained(sources / "base")
    assert torch.equal(model.language_model.lm_head.weight, expected.lm_head.weight)


def test_a_chat_template_can_be_given_to_a_base_without_one(pair):
    (pair / "base/chat_template.jinja").unlink()
    template = "{% for message in messages %}{{ message['content'] }};{% endfor %}"
    create_genieblue(pair / "base", pair / "vision", pair / "reader", chat_template=template)
    assert GenieBlueProcessor.from_pretrained(pair / "reader").chat_template == template


STOPS = {
    "another token than the template's": (
        {"eos_token_id": 3}, "Generation stops at '<unk>', but the chat template ends an answer with '</s>'"
    ),
    "none": ({"eos_token_id": None}, "never stops"),
    "the template's": ({"eos_token_id": [3, 2]}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_a_base_whose_generation_does_not_stop_at_the_end_of_a_turn_is_told(pair, case, caplog):
    settings, told = STOPS[case]
    change_config(pair / "base", **settings)
    path = pair / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told in "".join(warnings) if told else not [warning for warning in warnings if "enerat" in warning]


def test_a_chat_template_of_the_base_is_not_replaced(pair):
    with pytest.raises(ValueError, match="already has a chat template"):
        create_genieblue(pair / "base", pair / "vision", pair / "reader", chat_template="{{ messages }}")


BAD_TEMPLATES = {
    "syntax": ("{% for x in %}", "fails on a question .TemplateSyntaxError in line 1: Expected an expression"),
    "undefined": ("{{ messages[0]['content'] + no_token }}", "UndefinedError: 'no_token' is undefined"),
    "refusal": ("{{ raise_exception('not with me') }}", "TemplateError: not with me"),
    "Python": ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate"),
    "empty": (" \n", "is empty"),
    "no text": ("user: {{ bos_token }}", "drops 'Which colour is this.' from a question"),
    "no image": ("{% for m in messages %}{{ m['content'].split('\n')[-1] }}{% endfor %}", "drops '<image>' from"),
    "no answer": ("{{ messages[0]['content'] }}", "drops 'Blue, I think.' from an answer"),
}


@pytest.mark.parametrize(
    ("case", "origin"), [*((case, "given") for case in BAD_TEMPLATES), (next(iter(BAD_TEMPLATES)), "base")]
)
def test_a_chat_template_that_cannot_be_used_is_refused_before_weights_are_read(pair, case, origin):
    template, message = BAD_TEMPLATES[case]
    (pair / "base/model.safetensors").write_bytes(b"no weights")
    (pair / "base/chat_template.jinja").unlink() if origin == "given" else (
        pair / "base/chat_template.jinja"
    ).write_text(template)
    name = "The given chat template .--chat-template." if origin == "given" else f"The chat template of {pair}/base"
    options = {"chat_template": template} if origin == "given" else {}
    with pytest.raises(ValueError, match=f"^{name} .*{message}"):
        create_genieblue(pair / "base", pair / "vision", pair / "reader", **options)


def test_a_chat_template_may_not_ask_for_a_token_that_the_tokenizer_lacks(pair):
    change_json(pair / "base/tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="fails on a question .UndefinedError: 'eos_token' is undefined"):
        create_genieblue(pair / "base", pair / "vision", pair / "reader")


def test_remote_code_of_a_base_runs_only_if_it_is_allowed(sources, tmp_path):
    save_tiny_base("bluelm", tmp_path / "base")
    ran = tmp_path / "ran"
    for code in (tmp_path / "base").glob("*.py"):
        code.write_text(f"open({str(ran)!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(ValueError, match="--trust-remote-code"):
        create_genieblue(tmp_path / "base", sources / "vision", tmp_path / "reader")
    assert not ran.exists() and not (tmp_path / "reader").exists()
    create_genieblue(tmp_path / "base", sources / "vision", tmp_path / "reader", trust_remote_code=True)
    assert (tmp_path / "reader/config.json").is_file()


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_config(folder: Path, **changes) -> None:
    change_json(folder / "config.json", **changes)


def keep_half_of_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["embeddings.position_embedding.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard_with_integers(folder: Path) -> None:
    change_tensor(folder, "model.norm.weight", lambda tensor: tensor.to(torch.int64))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FC1 = "encoder.layers.1.mlp.fc1.weight"
BAD_NUMBERS = {
    "integers in the base": ("base", "lm_head.weight", lambda tensor: tensor.long(), "lm_head.weight holds I64"),
    "NaN in the base": ("base", "model.norm.weight", lambda tensor: tensor * torch.nan, "norm.weight contains NaN"),
    "infinity in the base": ("base", "lm_head.weight", lambda tensor: tensor / 0, "lm_head.weight contains NaN"),
    "integers in the vision model": ("vision", FC1, lambda tensor: tensor.char(), f"{FC1} holds I8"),
    "NaN in the vision model": ("vision", FC1, lambda tensor: tensor * torch.nan, f"{FC1} contains NaN"),
    "integers in a whole SigLIP": (
        "siglip", f"vision_model.{FC1}", lambda tensor: tensor.char(), f"{FC1} holds I8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(pair, case):
    source, name, change, message = BAD_NUMBERS[case]
    change_tensor(pair / source, name, change)
    vision = "vision" if source == "base" else source
    with pytest.raises(ValueError, match=f"weights of the (base|vision model) .*{source} cannot be used.*{message}"):
        create_genieblue(pair / "base", pair / vision, pair / "reader")
    assert not (pair / "reader").exists()


def test_integers_in_a_base_that_are_no_weights_are_no_fault(pair):
    tensors = load_file(pair / "base/model.safetensors") | {"model.layers.0.self_attn.bias": torch.ones(3).bool()}
    save_file(tensors, pair / "base/model.safetensors", metadata={"format": "pt"})
    assert create_genieblue(pair / "base", pair / "vision", pair / "reader").is_dir()


BAD = {
    "integers in a shard": (lambda pair: shard_with_integers(pair / "base"), {}, "model.norm.weight holds I64"),
    "a smaller vocabulary than its weights'": (
        lambda pair: change_config(pair / "base", vocab_size=100), {}, r"lm_head.weight.*\[128, 32\], .*\[100, 32\]"
    ),
    "a larger image than the vision model's weights'": (
        lambda pair: change_config(pair / "vision", image_size=48), {}, "position_embedding.weight.*wrong shape"
    ),
    "a list for generation settings": (
        lambda pair: (pair / "base/generation_config.json").write_text("[]"), {}, "generation_config.json holds a JSON"
    ),
    "a short base": (lambda pair: change_config(pair / "base", num_hidden_layers=3), {}, "at least 4 blocks"),
    "a quantized base": (
        lambda pair: change_config(pair / "base", quantization_config={"quant_method": "bitsandbytes"}),
        {},
        "quantized",
    ),
    "a base without tokenizer": (lambda pair: (pair / "base/tokenizer.json").unlink(), {}, "base's tokenizer"),
    "damaged weights of the base": (lambda pair: keep_half_of_the_weights(pair / "base"), {}, "cannot be read"),
    "damaged weights of the vision model": (
        lambda pair: keep_half_of_the_weights(pair / "vision"), {}, "cannot be read"
    ),
    "an incomplete vision tower": (lambda pair: drop_tensor(pair / "vision"), {}, "position_embedding"),
    "no base": (lambda pair: shutil.rmtree(pair / "base"), {}, "base .* is not a folder"),
    "no vision model": (lambda pair: shutil.rmtree(pair / "vision"), {}, "vision model .* is not a folder"),
    "an unknown placement": (lambda pair: None, {"placement": "middle"}, "skip, pre, post"),
    "a rank of zero": (lambda pair: None, {"lora_rank": 0}, "expected at least 1"),
    "tiles that are no square": (lambda pair: None, {"max_tiles": 15}, "square"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_nothing(pair, case):
    damage, settings, message = BAD[case]
    damage(pair)
    with pytest.raises((ValueError, OSError), match=message):
        create_genieblue(pair / "base", pair / "vision", pair / "reader", **settings)
    assert not (pair / "reader").exists()


def test_kinds_of_models_that_cannot_be_the_base_or_the_vision_model_are_refused(pair):
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    for base, message in (("reader", "already a GenieBlue"), ("vision", "decoder-only"), ("siglip", "decoder-only")):
        with pytest.raises(ValueError, match=message):
            create_genieblue(pair / base, pair / "vision", pair / "other")
    with pytest.raises(ValueError, match="expected a SigLIP"):
        create_genieblue(pair / "base", pair / "base", pair / "other")


def test_pickled_weights_are_not_read(pair):
    (pair / "base/model.safetensors").unlink()
    torch.save({}, pair / "base/pytorch_model.bin")
    with pytest.raises(OSError, match="has no safetensors files: only these are read"):
        create_genieblue(pair / "base", pair / "vision", pair / "reader")


def test_what_is_there_is_not_overwritten_unasked(pair):
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    before = hashes(pair)
    (pair / "file").touch()
    for output, message in (
        ("reader", "--overwrite"),
        ("base", "is also an input"),
        ("siglip", "not empty"),
        ("file", "is a file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            create_genieblue(pair / "base", pair / "vision", pair / output)
    (pair / "file").unlink()
    assert hashes(pair) == before


@pytest.mark.parametrize("output", ["base", "vision", "siglip", "photos"])
def test_what_is_no_genieblue_is_never_overwritten(pair, output):
    (pair / "photos").mkdir()
    (pair / "photos/a.jpg").touch()
    before = hashes(pair)
    with pytest.raises((ValueError, OSError)):
        create_genieblue(pair / "base", pair / "vision", pair / output, overwrite=True)
    assert hashes(pair) == before


def test_overwriting_replaces_the_model_and_what_it_said_about_itself(pair):
    create_genieblue(pair / "base", pair / "vision", pair / "reader", lora_rank=2)
    reader = pair / "reader"
    (reader / "measurements.json").write_text('[{"name": "exact match", "value": "91 %", "how": "scans"}]')
    (reader / "training_recipe.json").write_text('{"stage 1": {"steps": 5}}')
    create_genieblue(pair / "base", pair / "vision", reader, lora_rank=6, overwrite=True)
    assert json.loads((reader / "config.json").read_text())["lora_rank"] == 6
    assert not (reader / "measurements.json").exists() and not (reader / "training_recipe.json").exists()
    assert "rank 6" in (reader / "README.md").read_text()


def test_overwriting_keeps_a_card_that_somebody_edited(pair):
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    (pair / "reader/README.md").write_text("# Mine\n")
    create_genieblue(pair / "base", pair / "vision", pair / "reader", overwrite=True)
    assert (pair / "reader/README.md").read_text() == "# Mine\n"


def test_tokenizer_of_the_base_is_copied_as_it_is(pair):
    create_genieblue(pair / "base", pair / "vision", pair / "reader")
    assert (pair / "reader/tokenizer.json").read_bytes() == (pair / "base/tokenizer.json").read_bytes()
    assert len(GenieBlueProcessor.from_pretrained(pair / "reader").tokenizer) == len(tiny_tokenizer())


def test_a_base_with_a_missing_tensor_is_refused(tmp_path):
    base = save_tiny_base("llama", tmp_path / "base")
    tiny_vision_tower().save_pretrained(tmp_path / "vision")
    tensors = load_file(base / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="incomplete: 1 tensors .* model.layers.1.mlp.up_proj.weight"):
        create_genieblue(base, tmp_path / "vision", tmp_path / "out")
    assert not (tmp_path / "out").exists()
