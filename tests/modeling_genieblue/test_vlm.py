"""A GenieBlue of a VLM: images run the VLM exactly, text runs the base, over one set of weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlms import (
    BASE_ROWS,
    FAMILIES,
    ROWS,
    assert_answers_as_the_vlm,
    before_the_head,
    image_request,
    tiny_vlm_pair,
)

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters, is_adapter_name
from modeling_genieblue.vlm_language_genieblue import decoder_path

ALL, SOME = [0, 1, 2, 3], [1]


def words(count: int = 6, seed: int = 4) -> torch.Tensor:
    return torch.randint(3, BASE_ROWS, (1, count), generator=torch.Generator().manual_seed(seed))


def tiny_vlm_genieblue(family: str = "internvl", replicated=SOME, **options):
    vlm, base = tiny_vlm_pair(family)
    return GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=replicated, lora_rank=4, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 3])
def test_with_all_blocks_copied_logits_with_images_are_the_vlms(family, images):
    vlm, base = tiny_vlm_pair(family)
    request = image_request(family, images)
    expected = before_the_head(vlm, vlm.get_output_embeddings(), request)
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=ALL)
    assert_answers_as_the_vlm(model, model.vlm.get_output_embeddings(), expected, request)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_answers_as_before_and_its_text_is_the_bases(family, tmp_path):
    vlm, base = tiny_vlm_pair(family)
    text = base(words()).logits
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=SOME, lora_rank=4)
    request = image_request(family)
    expected = model(**request).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "saved", base_model=tiny_vlm_pair(family)[1])
    assert torch.equal(loaded(**request).logits, expected)
    assert torch.equal(loaded(words()).logits, text)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_blocks_of_the_vlm_hold_the_bases_own_parameters(family):
    model = tiny_vlm_genieblue(family)
    own = set(map(id, model.language_model.parameters()))
    held = {
        name.replace(".base_layer", "") for name, each in model.vlm.get_decoder().named_parameters() if id(each) in own
    }
    linears = {
        f"layers.{index}.{name}.weight"
        for index in (0, 2, 3)
        for name, module in model.language_model.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linears < held
    assert not any(name.startswith("layers.1.") for name in held)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_of_the_base_is_in_the_state_dict(family):
    model = tiny_vlm_genieblue(family)
    base = {each.data_ptr() for each in model.language_model.parameters()}
    assert not any(each.data_ptr() in base for each in model.state_dict().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_vlm_is_accounted_for(family):
    vlm, base = tiny_vlm_pair(family)
    of_language = (f"{decoder_path(vlm)}.", "lm_head.")
    outside = {name for name in vlm.state_dict() if not name.startswith(of_language)}
    inside = dict(vlm.get_decoder().named_parameters())
    changed = {name for name, each in inside.items() if name != "embed_tokens.weight"
               and not torch.equal(each, base.get_decoder().get_parameter(name))}  # fmt: skip
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=SOME)
    adapter = {stock.removeprefix("base_model.model.model.").replace(".lora_A", "")
               for _, stock, _ in adapter_parameters(model.multimodal_language_model)}  # fmt: skip
    own = {name.removeprefix("model.") for name, _ in model.own_language.tensors.named_parameters()}
    assert {name for name in model.state_dict() if name.startswith("vlm.")} == {f"vlm.{name}" for name in outside}
    assert changed <= adapter | own
    assert outside and changed
    assert model.own_language.embedding.indices.tolist() == [7, *range(BASE_ROWS, ROWS)]
    assert model.own_language.head.indices.tolist() == list(range(BASE_ROWS, ROWS))


@torch.no_grad()
def test_a_base_and_a_vlm_that_tie_their_heads_share_the_rows_of_their_own():
    vlm, base = tiny_vlm_pair("idefics3", tie_word_embeddings=True)
    request = image_request("idefics3")
    expected = vlm(**request).logits
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=ALL)
    assert model.own_language.head is None
    assert torch.allclose(model(**request).logits, expected, atol=1e-6)


@torch.no_grad()
def test_full_rank_of_all_other_blocks_gives_the_vlm():
    vlm, base = tiny_vlm_pair("llava")
    request = image_request("llava")
    expected = vlm(**request).logits
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=[], lora_rank=64)
    assert (model(**request).logits - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", ["idefics3", "gemma3"])
def test_a_mixed_batch_runs_each_row_in_its_own_view(family):
    model = tiny_vlm_genieblue(family)
    request = image_request(family)
    alone = model(**request).logits[0, -1]
    length = request["input_ids"].shape[1]
    both = {name: torch.cat([each, torch.zeros_like(each)]) if name not in ("pixel_values",) or family == "idefics3"
            else each for name, each in request.items()}  # fmt: skip
    both["input_ids"][1], both["attention_mask"][1] = words(length), 1
    output = model(**both, use_cache=True)
    text, image = output.logits.flip(0)
    assert torch.equal(text[:, :BASE_ROWS], model.language_model(words(length)).logits[0])
    assert text[:, BASE_ROWS:].isneginf().all()
    assert torch.allclose(image[-1], alone, atol=1e-5)
    steps = {"attention_mask": torch.ones(2, length + 1, dtype=torch.long), "past_key_values": output.past_key_values}
    following = model(torch.tensor([[5], [7]]), **steps).logits
    whole = torch.cat([words(length), torch.tensor([[7]])], dim=1)
    assert torch.allclose(following[1, -1, :BASE_ROWS], model.language_model(whole).logits[0, -1], atol=1e-5)


def test_generation_with_an_image_is_the_vlms_own_and_marks_its_cache():
    model = tiny_vlm_genieblue("llava")
    request = image_request("llava")
    output = model.generate(**request, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences, model.vlm.generate(**request, max_new_tokens=3, do_sample=False))
    with pytest.raises(ValueError, match="cannot be continued in the text view"):
        model(words(1), past_key_values=output.past_key_values, view="text")


def test_a_cache_of_a_vlm_that_keeps_positions_beside_it_is_refused():
    model = tiny_vlm_genieblue("qwen2_5_vl")
    request = image_request("qwen2_5_vl")
    cache = model(**request, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="prefill the whole conversation again"):
        model(words(1), past_key_values=cache)


def test_a_text_with_the_image_token_of_a_base_that_has_one_runs_the_base():
    vlm, base = tiny_vlm_pair("llava")
    vlm.config.image_token_id = 5
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=SOME, lora_rank=4)
    ids = torch.tensor([[5, 7, 9]])
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_only_the_adapter_and_the_vlms_own_parts_are_trained():
    model = tiny_vlm_genieblue().train()
    request = image_request("internvl")
    model(**request, labels=request["input_ids"]).loss.backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    assert not any(each.grad is not None or each.requires_grad for each in model.language_model.parameters())
    assert any(name.startswith("vlm.model.vision_tower.") for name in trained)
    assert any(is_adapter_name(name) for name in trained)


def test_the_vlm_alone_is_neither_cast_nor_saved():
    model = tiny_vlm_genieblue()
    with pytest.raises(ValueError, match="the base's own weights"):
        model.vlm.half()
    with pytest.raises(ValueError, match="most of its weights are the base's own"):
        model.vlm.save_pretrained("anywhere")


@pytest.mark.parametrize("missing", ["pixel_values", "image_sizes"])
def test_images_that_are_half_there_are_refused(missing):
    model = tiny_vlm_genieblue("llava_onevision")
    request = {name: each for name, each in image_request("llava_onevision").items() if name != missing}
    with pytest.raises(ValueError, match="pass all that the processor returned"):
        model(**request)


def test_a_vlm_of_another_base_is_refused_with_the_difference():
    vlm, _ = tiny_vlm_pair("llava", change=2.0)
    _, base = tiny_vlm_pair("llava")
    with pytest.raises(ValueError, match=r"differ by \d\.\d+ of their size"):
        GenieBlueForConditionalGeneration.from_vlm(vlm, base)


@pytest.mark.parametrize(
    "change",
    [lambda ids: ids + 1000, lambda ids: ids - 1000, lambda ids: ids.flip(0), lambda ids: ids.float()],
    ids=["too large", "negative", "in another order", "no integers"],
)
@pytest.mark.parametrize("part", ["embedding", "head"])
def test_damaged_places_of_own_rows_are_named(part, change, tmp_path):
    tiny_vlm_genieblue().save_pretrained(tmp_path / "mine")
    path, name = tmp_path / "mine/model.safetensors", f"own_language.{part}.indices"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path, {"format": "pt"})
    with pytest.raises(OSError, match=rf"{name} in .*mine .* expected increasing ones from 0 to {ROWS - 1}.*damaged"):
        GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine", base_model=tiny_vlm_pair("internvl")[1])


def test_a_vlm_of_another_shape_is_refused_with_both_shapes():
    vlm, _ = tiny_vlm_pair("llava")
    _, base = tiny_vlm_pair("llava", intermediate_size=48)
    with pytest.raises(ValueError, match=r"has shape \[64, 32\], in the base \[48, 32\]"):
        GenieBlueForConditionalGeneration.from_vlm(vlm, base)


@pytest.mark.parametrize("which", [0, 1], ids=["VLM", "base"])
def test_a_head_with_a_bias_is_refused(which):
    pair = tiny_vlm_pair("llava")
    pair[which].get_output_embeddings().bias = torch.nn.Parameter(torch.ones(BASE_ROWS))
    with pytest.raises(ValueError, match=f"The LM head of the {('VLM', 'base')[which]} has a bias"):
        GenieBlueForConditionalGeneration.from_vlm(*pair)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.qproj", "model.layers.3.self_attn.q_proj"])
def test_a_rank_for_no_layer_with_lora_is_refused(name):
    vlm, base = tiny_vlm_pair("llava")
    with pytest.raises(ValueError, match=f"{name}: none is a linear layer of a block with LoRA"):
        GenieBlueForConditionalGeneration.from_vlm(vlm, base, rank_pattern={name: 2})


def test_options_of_loading_that_would_have_no_effect_are_refused(tmp_path):
    tiny_vlm_genieblue().save_pretrained(tmp_path / "mine")
    with pytest.raises(TypeError, match="cannot be loaded with lora_dropout"):
        GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine", lora_dropout=0.3)


def test_an_unknown_family_is_refused_with_what_it_would_need():
    vlm, base = tiny_vlm_pair("llava")
    vlm.config.model_type = "other"
    with pytest.raises(ValueError, match="expected one of gemma3.*needs a class of"):
        GenieBlueForConditionalGeneration.from_vlm(vlm, base)


@pytest.mark.parametrize("given", [None, "a/vlm", torch.nn.Linear(2, 2)], ids=["none", "name", "layer"])
def test_what_is_no_loaded_vlm_is_refused(given):
    with pytest.raises(TypeError, match="^The VLM is .*: expected a loaded model, as `AutoModelForImageTextToText"):
        GenieBlueForConditionalGeneration.from_vlm(given, tiny_vlm_pair("llava")[1])
