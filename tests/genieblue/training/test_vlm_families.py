"""A GenieBlue of each family of VLMs is trained, resumed, evaluated and asked, by that family's own processor."""

import pytest
import torch
from PIL import Image
from test_vlm_training import Interrupted, interrupt
from tiny_vlm_processors import PROCESSORS, tiny_genieblue_of
from tiny_vlms import tiny_vlm_pair
from training_setup import AtStep, make_settings
from vlm_training_setup import generated, make_image_data

from genieblue.data.vlm_collation import VlmChatCollator
from genieblue.evaluation.answering import answerer_of
from genieblue.evaluation.evaluate import evaluate
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.serving.conversation import VlmChat
from genieblue.training.frozen_weights import tensor_digests
from genieblue.training.stages import train
from modeling_genieblue import GenieBlueForConditionalGeneration


@torch.no_grad()
@pytest.mark.parametrize("family", PROCESSORS)
def test_a_batch_of_images_of_other_sizes_has_the_logits_of_each_row_alone(family):
    model, processor = tiny_genieblue_of(family)
    data = make_image_data()
    data[0]["images"] = [Image.new("RGB", (84, 28), "red")]
    collator = VlmChatCollator(processor, stop_ids=[2])
    rows = [data[0], data[1], data[8]]
    together = model(**collator(rows)).logits
    for row, logits in zip(rows, together, strict=True):
        alone = model(**collator([row])).logits[0]
        assert torch.allclose(logits[: len(alone)], alone, atol=1e-5)


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_family_is_trained_resumed_evaluated_and_asked(family, tmp_path):
    data, settings = make_image_data()[:-1], make_settings(steps=3, save_steps=2, batch_size=2)
    model, processor = tiny_genieblue_of(family)
    text, base = torch.arange(3, 40)[None], tensor_digests(model.language_model, "")
    with torch.no_grad():
        logits = model(text).logits
    train(model, processor, data, tmp_path / "whole", settings)
    assert tensor_digests(model.language_model, "") == base

    cut, _ = tiny_genieblue_of(family)
    with pytest.raises(Interrupted):
        train(cut, processor, data, tmp_path / "cut", settings, callbacks=[AtStep(2, interrupt)])
    again, _ = tiny_genieblue_of(family)
    train(again, processor, data, tmp_path / "cut", settings, resume=True)
    trained = dict(model.named_parameters())
    assert all(torch.equal(each, trained[name]) for name, each in again.named_parameters())

    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "cut", base_model=tiny_vlm_pair(family)[1])
    assert all(torch.equal(each, trained[name]) for name, each in loaded.named_parameters())
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, logits)
    expected = generated(loaded, processor, data[0])
    found = evaluate(answerer_of(loaded, processor), EvaluationDataset(data[:1]), max_new_tokens=5)
    assert found.answers[0].answer == expected.strip()
    asked = VlmChat(loaded, processor).ask("Colour?", data[0]["images"], max_new_tokens=5)
    assert (asked["view"], asked["text"]) == ("multimodal", expected)


def test_a_text_with_a_familys_placeholder_of_videos_is_refused():
    _, processor = tiny_genieblue_of("internvl")
    sample = make_image_data()[0]
    sample["messages"][1]["content"] = "It is a <video>."
    with pytest.raises(ValueError, match="'<video>', by which this VLM's processor marks media"):
        VlmChatCollator(processor, stop_ids=[2]).rows(sample)
