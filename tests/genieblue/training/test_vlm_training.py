"""Training a GenieBlue with a VLM: what is learned, what stays, and what is refused."""

import pytest
import torch
from training_setup import AtStep, losses, make_settings
from vlm_training_setup import extract_tiny, load, make_image_data

from conversion.chat_ids import IGNORED
from genieblue.data.vlm_collation import VlmChatCollator
from genieblue.training.frozen_weights import tensor_digests
from genieblue.training.stages import plan, train
from genieblue.training.vlm_structure import VlmStructure, structure_of
from modeling_genieblue import GenieBlueForConditionalGeneration


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return extract_tiny(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def model_and_processor(made):
    return load(made)


def collator(processor, **options) -> VlmChatCollator:
    return VlmChatCollator(processor, stop_ids=[2], **options)


def values(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def changed(model, before) -> set[str]:
    return {name for name, each in model.named_parameters() if not each.equal(before[name])}


def test_a_row_begins_with_the_ids_that_generation_gets(model_and_processor):
    _, processor = model_and_processor
    sample = make_image_data()[0]
    row = collator(processor).encode(sample)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}],
        images=sample["images"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids = prompt["input_ids"][0].tolist()
    assert row["input_ids"][: len(ids)] == ids
    assert row["labels"][: len(ids)] == [IGNORED] * len(ids)
    assert torch.equal(row["pixel_values"], prompt["pixel_values"])
    answer = processor.vlm_processor.tokenizer.decode(row["input_ids"][len(ids) :])
    assert answer == "It is red.</s>" and row["labels"][len(ids) :] == row["input_ids"][len(ids) :]


def test_two_answers_about_two_images_share_a_row(model_and_processor):
    _, processor = model_and_processor
    (row,) = collator(processor).rows(make_image_data()[8])
    assert len(row["pixel_values"]) == 2
    assert row["labels"].count(2) == 2


@torch.no_grad()
def test_a_batch_has_the_logits_of_each_row_alone(model_and_processor):
    model, processor = model_and_processor
    batches = [collator(processor)([make_image_data()[place]]) for place in (0, 8)]
    both = collator(processor)([make_image_data()[0], make_image_data()[8]])
    alone = [model(**each).logits[0] for each in batches]
    for together, single in zip(model(**both).logits, alone, strict=True):
        assert torch.allclose(together[: len(single)], single, atol=1e-5)


def test_training_changes_all_that_is_added_and_no_byte_of_the_base(model_and_processor, tmp_path):
    model, processor = model_and_processor
    before, digests = values(model), tensor_digests(model.language_model, "")
    text = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model(text).logits
    structure = structure_of(model)
    train(structure, processor, make_image_data(), tmp_path / "out", make_settings(steps=3))
    assert {structure.group_of(name) for name in changed(model, before)} == set(VlmStructure.groups)
    assert tensor_digests(model.language_model, "") == digests
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, logits)
    assert all(torch.equal(each, dict(model.named_parameters())[name]) for name, each in loaded.named_parameters())


def test_parts_with_a_rate_of_zero_stay(model_and_processor, tmp_path):
    model, processor = model_and_processor
    before, structure = values(model), structure_of(model)
    rates = {"vision_tower": 0.0, "multi_modal_projector": 0.0, "own_language": 0.0}
    train(structure, processor, make_image_data(), tmp_path / "out", make_settings(steps=2, learning_rates=rates))
    assert {structure.group_of(name) for name in changed(model, before)} == {"replicated_blocks", "lora"}


def test_training_lowers_the_loss(model_and_processor, tmp_path):
    result = train(
        *model_and_processor, make_image_data(), tmp_path / "out",
        make_settings(epochs=12, learning_rate=3e-3, batch_size=3),
    )  # fmt: skip
    values = list(losses(result).values())
    assert values[-1] < 0.7 * values[0]
    assert result.num_samples == 9  # the text is left out


class Interrupted(Exception):
    pass


def interrupt(_model) -> None:
    raise Interrupted


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(made, tmp_path):
    settings = make_settings(epochs=2, save_steps=2)
    whole, processor = load(made)
    train(whole, processor, make_image_data(), tmp_path / "whole", settings)
    cut, _ = load(made)
    with pytest.raises(Interrupted):
        train(cut, processor, make_image_data(), tmp_path / "cut", settings, callbacks=[AtStep(5, interrupt)])
    again, _ = load(made)
    train(again, processor, make_image_data(), tmp_path / "cut", settings, resume=True)
    others = dict(whole.named_parameters())
    assert all(torch.equal(each, others[name]) for name, each in again.named_parameters())


def test_gradient_checkpointing_trains_to_the_same_weights(made, tmp_path):
    found = []
    for checkpointing in (False, True):
        model, processor = load(made)
        settings = make_settings(steps=2, gradient_checkpointing=checkpointing, shuffle=False)
        train(model, processor, make_image_data(), tmp_path / str(checkpointing), settings)
        found.append(dict(model.named_parameters()))
    assert all(torch.allclose(each, found[1][name], atol=1e-5) for name, each in found[0].items())


def test_the_plan_counts_each_part_once(model_and_processor):
    model, processor = model_and_processor
    found = plan(structure_of(model), processor, make_image_data(), make_settings(steps=2))
    assert sum(found.parameters.values()) == sum(each.numel() for each in model.parameters())
    assert set(found.trained) == set(VlmStructure.groups) and all(found.trained.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stage": 1}, "trained already: train stage 2"),
        ({"pack": True}, "keep samples of one row apart"),
        ({"max_tiles": 4}, "the VLM's own processor cuts images"),
        ({"cache_image_features": True}, "code of its own"),
    ],
)
def test_what_a_vlm_has_no_place_for_is_refused(options, reason, model_and_processor, tmp_path):
    with pytest.raises(ValueError, match=reason):
        train(*model_and_processor, make_image_data(), tmp_path / "out", make_settings(**options))
    assert not (tmp_path / "out").exists()


def test_texts_alone_are_refused(model_and_processor, tmp_path):
    with pytest.raises(ValueError, match="None of the 1 samples has an image"):
        train(*model_and_processor, make_image_data()[-1:], tmp_path / "out", make_settings())


def test_a_text_with_the_vlms_placeholder_is_refused(model_and_processor):
    _, processor = model_and_processor
    sample = make_image_data()[0]
    sample["messages"][1]["content"] = "It is <image>."
    with pytest.raises(ValueError, match="marks media: reword it"):
        collator(processor).rows(sample)
