"""The structures that the lab compares: equal to the base at first, trained where they should be, saved and loaded."""

import shutil

import pytest
import torch
from tiny_genieblue import IMAGE, prompt, row, tiles
from tiny_models import save_tiny_base, tiny_base, tiny_vision_tower
from training_setup import make_base, make_data, make_settings
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from genieblue.data.chats import ChatDataset
from genieblue.lab.structures import STRUCTURES, load_structure, structure_kind
from genieblue.lab.structures.structure import trained_count
from genieblue.training.stages import plan, train
from modeling_genieblue import GenieBlueProcessor

IDS, PIXELS = row(5, IMAGE, 9, 11, 13), tiles()


def make(name, base=None, tower=None, **options):
    kind, placement = structure_kind(name)
    torch.manual_seed(3)
    return kind.make(base or tiny_base("llama"), tower or tiny_vision_tower(), placement, lora_rank=4, **options)


def multimodal_logits(structure, ids=IDS, pixels=PIXELS):
    with torch.no_grad():
        return structure.model(ids, pixel_values=pixels, view="multimodal").logits


@pytest.fixture(scope="module", params=STRUCTURES)
def trained(request, tmp_path_factory):
    """A structure after a few steps of both kinds of samples, its folder, and the base's bytes before."""
    folder = tmp_path_factory.mktemp(request.param)
    base = AutoModelForCausalLM.from_pretrained(make_base(folder / "base"))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    structure = make(request.param, base)
    config = structure.model.config
    processor = GenieBlueProcessor.from_base(
        AutoTokenizer.from_pretrained(folder / "base"), image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length, tile_size=24, max_tiles=4,
    )  # fmt: skip
    train(structure, processor, make_data(), folder / "model", make_settings(steps=2))
    return structure, folder / "model", before


def test_before_training_every_structure_answers_images_alike():
    expected = multimodal_logits(make("genieblue-skip"))
    for name in STRUCTURES:
        torch.testing.assert_close(multimodal_logits(make(name)), expected)


def test_training_changes_the_answers_to_images_and_no_byte_of_the_base(trained):
    structure, _, before = trained
    after = structure.model.language_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.allclose(multimodal_logits(structure), multimodal_logits(make(structure.name)))


def test_the_plan_of_a_run_counts_the_base_and_what_is_trained_apart(trained):
    structure, folder, _ = trained
    costs = plan(
        structure, GenieBlueProcessor.from_pretrained(folder), ChatDataset(make_data()), make_settings(steps=2)
    )
    assert costs.parameters["base"] == sum(parameter.numel() for parameter in structure.frozen.parameters())
    assert costs.trained == trained_count(structure) and min(costs.memory.values()) >= 0


def test_a_saved_structure_answers_as_it_did(trained):
    structure, folder, _ = trained
    loaded = load_structure(folder)
    assert loaded.name == structure.name and trained_count(loaded) == trained_count(structure)
    assert torch.equal(multimodal_logits(loaded), multimodal_logits(structure))
    assert torch.equal(multimodal_logits(loaded, prompt(), None), multimodal_logits(structure, prompt(), None))


def test_texts_run_the_base_bit_for_bit_and_after_a_save_where_it_is_kept(trained):
    structure, folder, before = trained
    base = tiny_base("llama")
    base.load_state_dict(before)
    with torch.no_grad():
        expected = base(prompt()).logits
        assert torch.equal(structure.model(prompt()).logits, expected)
        assert torch.equal(load_structure(folder).model(prompt()).logits, expected) == structure.keeps_base


def test_generation_from_images_equals_whole_passes(trained):
    structure, _, _ = trained
    generated = structure.model.generate(IDS, pixel_values=PIXELS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids = IDS
    for _ in range(generated.shape[1] - IDS.shape[1]):
        ids = torch.cat([ids, multimodal_logits(structure, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_another_base_is_refused_unless_the_structure_needs_none(trained, tmp_path):
    structure, folder, _ = trained
    other = save_tiny_base("llama", tmp_path / "other", seed=5)
    if structure.name == "full":
        assert torch.equal(multimodal_logits(load_structure(folder, other)), multimodal_logits(structure))
    else:
        with pytest.raises(ValueError, match="base"):
            load_structure(folder, other)


def test_full_fine_tuning_is_saved_as_an_ordinary_model_that_needs_no_other_base(trained, tmp_path):
    structure, folder, _ = trained
    if structure.name != "full":
        pytest.skip("of one structure")
    shutil.copytree(folder, tmp_path / "moved")  # away from the base
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moved/language_model")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "moved", trust_remote_code=True)
    with torch.no_grad():
        text = multimodal_logits(structure, prompt(), None)
        assert torch.equal(plain(prompt()).logits, text) and torch.equal(whole(prompt()).logits, text)
        torch.testing.assert_close(whole(IDS, pixel_values=PIXELS).logits, multimodal_logits(structure))


def set_experts(structure, value):
    with torch.no_grad():
        for name, parameter in structure.model.named_parameters():
            if structure.group_of(name) == "visual_experts":
                parameter.copy_(value(parameter))


def test_visual_experts_see_image_tokens_alone():
    structure = make("cogvlm-skip")
    text, image = multimodal_logits(structure, prompt(), None), multimodal_logits(structure)
    set_experts(structure, lambda parameter: parameter + 0.1)
    assert torch.equal(multimodal_logits(structure, prompt(), None), text)
    assert torch.equal(multimodal_logits(structure)[:, 0], image[:, 0])  # before the image
    assert not torch.allclose(multimodal_logits(structure)[:, -1], image[:, -1])


def test_visual_experts_route_each_token_like_both_layers_and_a_choice():
    structure = make("cogvlm-pre")
    set_experts(structure, lambda parameter: parameter + torch.randn_like(parameter))
    layer = structure.model.multimodal_language_model.model.layers[0].self_attn.q_proj
    states, mask = torch.randn(2, 5, 32), torch.rand(2, 5) < 0.5
    layer._image_tokens.mask = mask
    both = layer.original_module(states), layer.modules_to_save["default"](states)
    torch.testing.assert_close(layer(states), torch.where(mask[..., None], both[1], both[0]))


def test_visual_experts_refuse_a_pass_that_is_not_the_one_they_were_told_of():
    structure = make("cogvlm-skip")
    with pytest.raises(ValueError, match="beams"):
        structure.model.generate(IDS, pixel_values=PIXELS, num_beams=2, max_new_tokens=2, pad_token_id=0)


def test_gradient_checkpointing_gives_visual_experts_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        structure = make("cogvlm-skip")
        if checkpointing:
            structure.model.gradient_checkpointing_enable({"use_reentrant": False})
        structure.model.requires_grad_(True).train()
        structure.model(IDS, pixel_values=PIXELS, labels=IDS).loss.backward()
        gradients.append(
            {name: each.grad for name, each in structure.model.named_parameters() if each.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_unknown_structure_or_placement_is_refused_with_the_choices():
    for name in ("moe", "cogvlm", "cogvlm-middle", "full-skip"):
        with pytest.raises(ValueError, match=f"Unknown structure '{name}': choose from full, lora, cogvlm-post"):
            structure_kind(name)


def test_a_folder_without_a_structure_is_refused(tmp_path):
    with pytest.raises(OSError, match="holds no structure"):
        load_structure(tmp_path)
