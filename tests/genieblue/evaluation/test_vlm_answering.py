"""Evaluating and chatting with a GenieBlue with a VLM: images run the VLM as its own processor encodes them."""

import pytest
import torch
from vlm_training_setup import extract_tiny, generated, load, make_image_data

from genieblue.evaluation.answering import VlmAnswerer, answerer_of
from genieblue.evaluation.evaluate import evaluate
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.serving.conversation import Chat


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return extract_tiny(tmp_path_factory.mktemp("pair"))


def test_an_answer_about_an_image_is_the_vlms_and_one_to_a_text_the_bases(made):
    model, processor = load(made)
    data = make_image_data()
    answerer = answerer_of(model, processor)
    found = evaluate(answerer, EvaluationDataset([data[0], data[-1]]), max_new_tokens=5)
    assert [answer.view for answer in found.answers] == ["multimodal", "text"]
    assert found.answers[0].answer == generated(model, processor, data[0]).strip()
    inputs = processor.tokenizer.apply_chat_template(
        data[-1]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    base = model.language_model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = processor.tokenizer.decode(base[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.answers[1].answer == expected.strip()


@torch.no_grad()
def test_the_likelihood_of_a_choice_is_the_vlms(made):
    model, processor = load(made)
    raw = {**make_image_data()[0], "choices": ["It is red.", "It is blue."]}
    answerer = VlmAnswerer(model, processor)
    sample = EvaluationDataset([raw])[0]
    likelihoods = answerer.log_likelihoods(sample)
    prompt = processor.apply_chat_template(
        sample.prompt, images=sample.images, add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    answer = processor.vlm_processor.tokenizer("It is red.</s>", add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([prompt["input_ids"], answer["input_ids"]], dim=1)
    logits = model.vlm(input_ids=ids, pixel_values=prompt["pixel_values"]).logits[0].log_softmax(-1)
    count = answer["input_ids"].shape[1]
    expected = logits[-count - 1 : -1].gather(1, ids[0, -count:, None]).sum()
    assert likelihoods[0] == pytest.approx(float(expected), rel=1e-5)
    assert likelihoods[0] != likelihoods[1]


def test_a_chat_runs_the_base_until_the_first_image_and_then_the_vlm(made):
    chat = Chat.from_pretrained(made)
    first = chat.ask("What is 3?", max_new_tokens=4)
    pieces: list[str] = []
    second = chat.ask("Colour?", [make_image_data()[0]["images"][0]], max_new_tokens=4, on_text=pieces.append)
    third = chat.ask("Sure?", max_new_tokens=4)
    assert [turn["view"] for turn in (first, second, third)] == ["text", "multimodal", "multimodal"]
    assert "".join(pieces) == second["text"]
    chat.reset()
    alone = chat.ask("Colour?", [make_image_data()[0]["images"][0]], max_new_tokens=5)
    assert alone["text"] == generated(chat.model, chat.processor, make_image_data()[0])


def test_a_text_in_the_multimodal_view_is_refused(made):
    chat = Chat.from_pretrained(made)
    with pytest.raises(ValueError, match="its VLM is asked with an image only"):
        chat.ask("What is 3?", view="multimodal")
