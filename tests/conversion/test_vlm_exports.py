"""The language side of a GenieBlue of a VLM as a language model or an adapter: exact on images, or refused by name."""

import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from tiny_quantized import leftovers
from tiny_vlm_processors import tiny_genieblue_of
from tiny_vlms import tiny_vlm_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from vlm_training_setup import extract_tiny, load

from conversion.language_exports import PLAIN_LANGUAGE, embed_requests
from conversion.lora_form import export_lora
from conversion.merge import export_merged
from conversion.quantization.error import logits_error
from genieblue.data.vlm_collation import VlmChatCollator
from hub_cards.exports import read_export, render_export_card
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.vlm_configuration_genieblue import FAMILIES

CHAT = {
    "messages": [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A sign on the door."},
    ],
    "images": [Image.linear_gradient("L").convert("RGB").resize((84, 28))],
}


def encoded_chat(processor):
    """A chat with an image of several tiles, as the VLM's processor encodes it."""
    batch = VlmChatCollator(processor)([CHAT])
    return {name: value for name, value in batch.items() if name != "labels"}


def pair_that_differs_in_matrices_alone(family):
    """A VLM and its base with the same tokens, norms, biases, embedding and head."""
    vlm, base = tiny_vlm_pair(family, vocab_size=200)
    with torch.no_grad():
        for name, value in base.get_decoder().named_parameters():
            if value.ndim == 1 or name.startswith("embed_tokens"):
                vlm.get_decoder().get_parameter(name).copy_(value)
        vlm.get_output_embeddings().weight.copy_(base.get_output_embeddings().weight)
    return vlm, base


@torch.no_grad()
def error(model, request, plain) -> float:
    """Of the logits for a request with an image, whose features come to the plain model as embeddings."""
    exact, embedded = model.vlm(**request).logits[0], embed_requests(model, [request])[0]
    return logits_error(exact, plain(**embedded, use_cache=False).logits[0][:, : exact.shape[-1]])[0]


@pytest.mark.parametrize(("family", "tied"), [("idefics3", "both"), ("internvl", "none"), ("internvl", "base")])
def test_the_merged_model_gives_the_vlms_logits_with_images(family, tied, tmp_path):
    pair = tiny_vlm_pair(family, tie_word_embeddings=tied == "both")
    if tied == "base":
        pair[1].config.tie_word_embeddings = True
        pair[1].tie_weights()
    model, processor = tiny_genieblue_of(family, tmp_path / "base", pair)
    model.save_pretrained(tmp_path / "mine", processor=processor)
    export_merged(tmp_path / "mine", tmp_path / "merged", calibration=[encoded_chat(processor)])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(model.language_model) and merged.config.tie_word_embeddings == (tied == "both")
    assert error(model, encoded_chat(processor), merged) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == processor.vlm_processor.tokenizer.get_vocab()
    assert merged.generation_config.eos_token_id == model.vlm.generation_config.eos_token_id


MERGED_BLOCKS = {(): "LoRA merged into all blocks.", (0, 1, 2, 3): "all blocks whole.",
                 (1, 3): "blocks 1, 3 whole and LoRA merged into all others."}  # fmt: skip


@pytest.mark.parametrize("copied", MERGED_BLOCKS)
def test_the_card_of_the_merged_model_tells_which_blocks_are_whole(copied, tmp_path):
    model, processor = tiny_genieblue_of("idefics3", tmp_path / "base", replicated_layers=list(copied))
    model.save_pretrained(tmp_path / "mine", processor=processor)
    export_merged(tmp_path / "mine", tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    assert MERGED_BLOCKS[copied] in card
    assert ("LoRA was merged in float32" in card) == (len(copied) < 4)
    facts: dict = read_export(tmp_path / "merged") or {}
    facts["base"]["name"], facts["vlm"]["name"] = "maker/base", "maker/vlm"
    card = render_export_card(tmp_path / "merged", "you/merged", facts)
    assert "base_model:\n- maker/base\n- maker/vlm\n" in card


def test_the_merged_model_of_an_extraction_has_the_vlms_template(tmp_path):
    export_merged(extract_tiny(tmp_path), tmp_path / "merged")
    model, processor = load(tmp_path / "mine")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert error(model, encoded_chat(processor), merged) < 1e-5
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert template == processor.vlm_processor.chat_template
    assert "type `llava`" in (tmp_path / "merged/README.md").read_text()


def test_an_adapter_on_the_plain_base_gives_the_vlms_logits_with_images(tmp_path):
    pair, ranks = pair_that_differs_in_matrices_alone("idefics3"), {"model.layers.0.mlp.up_proj": 7}
    model, processor = tiny_genieblue_of("idefics3", tmp_path / "base", pair, rank_pattern=ranks)
    model.save_pretrained(tmp_path / "mine", processor=processor)
    form = export_lora(tmp_path / "mine", tmp_path / "lora", calibration=[encoded_chat(processor)])
    assert form.left_behind == {}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert error(model, encoded_chat(processor), PeftModel.from_pretrained(base, tmp_path / "lora")) < 1e-4
    assert "a VLM's own blocks" in (tmp_path / "lora/README.md").read_text()


@pytest.mark.parametrize("choice", [{}, {"max_bytes": 500_000}, {"error": 0.01}], ids=lambda each: " ".join(each))
def test_an_adapter_of_a_view_without_copied_blocks_is_its_lora(choice, tmp_path):
    pair = pair_that_differs_in_matrices_alone("idefics3")
    model, processor = tiny_genieblue_of("idefics3", tmp_path / "base", pair, replicated_layers=[])
    model.save_pretrained(tmp_path / "mine", processor=processor)
    form = export_lora(tmp_path / "mine", tmp_path / "lora", **choice)
    assert form.matrices == []
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert error(model, encoded_chat(processor), PeftModel.from_pretrained(base, tmp_path / "lora")) < 1e-5
    assert not (tmp_path / "lora/spectrum.png").exists()
    card = (tmp_path / "lora/README.md").read_text()
    assert "LoRA adapts all blocks" in card
    assert not [word for word in ("take the place", "higher rank", "copied blocks", "| matrix |") if word in card]


@pytest.mark.parametrize("family", ["idefics3", "internvl"])
def test_an_adapter_of_a_view_with_all_blocks_copied_gives_the_vlms_logits_with_images(family, tmp_path):
    pair = pair_that_differs_in_matrices_alone(family)
    if family == "internvl":  # the biases of q, k and v are none of a matrix
        assert pair[1].config.model_type == "qwen2"
    model, processor = tiny_genieblue_of(family, tmp_path / "base", pair, replicated_layers=[0, 1, 2, 3])
    model.save_pretrained(tmp_path / "mine", processor=processor)
    form = export_lora(tmp_path / "mine", tmp_path / "lora")
    assert form.left_behind == {} and len(form.matrices) == 4 * 7
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert error(model, encoded_chat(processor), PeftModel.from_pretrained(base, tmp_path / "lora")) < 1e-4
    card = (tmp_path / "lora/README.md").read_text()
    assert "take the place of all blocks; here" in card and "all other blocks" not in card
    names = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert names == sorted({matrix.name.rpartition(".")[2] for matrix in form.matrices})


def test_an_adapter_is_refused_if_more_than_matrices_differ(tmp_path):
    source = extract_tiny(tmp_path)
    with pytest.raises(ValueError, match="of its own, .* LoRA changes: .*export merged` keeps it"):
        export_lora(source, tmp_path / "lora")
    assert "lora" not in leftovers(tmp_path)


def test_an_adapter_is_refused_if_the_settings_differ(tmp_path):
    pair = pair_that_differs_in_matrices_alone("idefics3")
    model, processor = tiny_genieblue_of("idefics3", tmp_path / "base", pair)
    model.vlm.config.text_config.rms_norm_eps = model.config.vlm_config.text_config.rms_norm_eps = 1.0
    model.save_pretrained(tmp_path / "mine", processor=processor)
    with pytest.raises(ValueError, match="other settings than its base"):
        export_lora(tmp_path / "mine", tmp_path / "lora")
    export_merged(tmp_path / "mine", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.rms_norm_eps == 1.0


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*PLAIN_LANGUAGE}))
@pytest.mark.parametrize("export", [export_lora, export_merged])
def test_a_language_model_that_gets_more_of_an_image_is_refused(family, export, tmp_path):
    vlm, base = tiny_vlm_pair(family)
    GenieBlueForConditionalGeneration.from_vlm(vlm, base).save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"of type '{family}' .* gets more of an image than embeddings"):
        export(tmp_path / "mine", tmp_path / "out")
    assert leftovers(tmp_path) == ["mine"]
