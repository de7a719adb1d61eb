"""Evaluation: the right view for each sample, scores by task, likelihoods of choices, paired comparisons, reports."""

import json

import pytest
import torch
import yaml
from PIL import Image
from tiny_genieblue import change_adapter
from training_setup import make_base, make_model
from transformers import AutoModelForCausalLM

from genieblue.evaluation.answering import ModelAnswerer
from genieblue.evaluation.evaluate import Evaluation, ScoredAnswer, compare, evaluate
from genieblue.evaluation.report import record_in_model, write_report
from genieblue.evaluation.samples import EvaluationDataset
from modeling_genieblue.model_files_genieblue import CARD_NAME

SETTINGS = {"max_new_tokens": 5, "precision": "float32", "dataset_id": "you/held-out"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def pair(base):
    model, processor = make_model(base)
    return change_adapter(model).eval(), processor


def picture(colour, columns=1):
    return Image.new("RGB", (24 * columns, 24), colour)


def sample(text="What is 1?", images=(), **keys):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content if images else text}], "answers": "x", **keys}


def answers(pair, samples, batch_size=8, **options):
    evaluation = evaluate(ModelAnswerer(*pair, batch_size=batch_size, **options), EvaluationDataset(samples),
                          max_new_tokens=5)  # fmt: skip
    return [answer.answer for answer in evaluation.answers]


def test_texts_are_answered_by_the_base_itself(pair, base):
    model, processor = pair
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    chat = [{"role": "user", "content": "What is 1?"}]
    inputs = processor.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = plain.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answers(pair, [sample()]) == [said]
    assert answers(pair, [sample()], view="multimodal") != [said]


def test_a_batch_gives_the_answers_of_single_samples_in_the_order_of_the_data(pair):
    samples = [
        sample("Which colour is it, please?", [picture("red", 2)]),
        sample(),
        sample("Which?", [picture("blue")]),
        sample("What is 1 and 2 and 3?"),
        sample("Which two?", [picture("red"), picture("green", 2)]),
    ]
    assert answers(pair, samples) == answers(pair, samples, batch_size=1)


def test_the_view_of_each_answer_is_recorded(pair):
    dataset = EvaluationDataset([sample(), sample(images=[picture("red")])])
    evaluation = evaluate(ModelAnswerer(*pair), dataset, max_new_tokens=2)
    assert [answer.view for answer in evaluation.answers] == ["text", "multimodal"]


@pytest.mark.parametrize("images", [[], [picture("red", 2)]], ids=["text", "image"])
def test_the_likelihood_of_a_choice_is_that_of_its_tokens_and_its_end(pair, images):
    model, processor = pair
    choices = ["It is red.", "green"]
    dataset = EvaluationDataset([sample(images=images, choices=choices, answers="green")])
    found = ModelAnswerer(model, processor, batch_size=2).log_likelihoods(dataset[0])
    for choice, value in zip(choices, found, strict=True):
        chat = [*dataset[0].prompt, {"role": "assistant", "content": choice}]
        prompt = processor.apply_chat_template(
            dataset[0].prompt, images=images or None, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        text = processor.apply_chat_template(chat, tokenize=False)
        after = processor.apply_chat_template(dataset[0].prompt, add_generation_prompt=True, tokenize=False)
        own = processor.tokenizer(text[len(after) :].rstrip("\n"), add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([prompt["input_ids"], own["input_ids"]], dim=1)
        with torch.no_grad():
            logits = model(ids, pixel_values=prompt.get("pixel_values")).logits[0, :-1].log_softmax(-1)
        length = own["input_ids"].shape[1]
        expected = logits[-length:].gather(1, own["input_ids"][0][:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)


def test_the_likeliest_choice_is_the_answer(pair):
    choices = ["It is red.", "green", "a number"]
    samples = [sample(choices=choices, answers=choice) for choice in choices]
    dataset = EvaluationDataset(samples)
    likelihoods = ModelAnswerer(*pair).log_likelihoods(dataset[0])
    best = choices[likelihoods.index(max(likelihoods))]
    evaluation = evaluate(ModelAnswerer(*pair), dataset)
    assert [(answer.answer, answer.score) for answer in evaluation.answers] == [
        (best, float(choice == best)) for choice in choices
    ]


def test_an_image_that_cannot_be_read_is_named_with_its_sample(pair, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(sample(images=[name])) + "\n" for name in ("good.png", "broken.png"))
    )
    picture("red").save(tmp_path / "good.png")
    with pytest.raises(ValueError, match=r"data.jsonl:2: .*broken.png"):
        evaluate(ModelAnswerer(*pair), EvaluationDataset(tmp_path / "data.jsonl"), max_new_tokens=2)


def scored(*rows):
    """Answers of (task, score)."""

    def answer(number, task, score):
        return ScoredAnswer(f"data:{number}", task, "exact", "text", "q", ("x",), "y", score)

    return Evaluation([answer(number, *row) for number, row in enumerate(rows)])


def test_scores_are_means_by_task_behind_one_for_all():
    scores = scored(("a", 1), ("b", 0), ("a", 0), ("all", 1)).scores()
    assert [(score.task, score.mean, score.count) for score in scores] == [
        ("all", 0.5, 4), ("a", 0.5, 2), ("b", 0, 1), ("other", 1, 1)
    ]  # fmt: skip
    assert scores[1].standard_error == pytest.approx(0.5) and scores[2].standard_error is None


def test_a_comparison_is_paired():
    (difference,) = compare(scored(("a", 1), ("a", 0), ("a", 1)), scored(("a", 1), ("a", 1), ("a", 1)))
    assert (difference.better, difference.worse) == (1, 0)
    assert difference.difference == pytest.approx(1 / 3)
    assert difference.standard_error == pytest.approx(1 / 3)  # of 0, 1, 0; unpaired it would be 0.33 and 0 together


def test_evaluations_of_different_samples_are_not_compared():
    with pytest.raises(ValueError, match="different samples"):
        compare(scored(("a", 1), ("a", 1)), scored(("a", 1)))


@pytest.fixture(scope="module")
def report(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "report"
    dataset = EvaluationDataset([sample(task="words"), sample(images=[picture("red", 2)], task="colours")])
    evaluation = evaluate(ModelAnswerer(*pair), dataset, max_new_tokens=5)

    def write():
        image_processor = pair[1].image_processor
        write_report(folder, evaluation, dataset, image_processor, name="held-out", settings=SETTINGS)

    write()
    return folder, write


def test_a_report_has_all_answers_and_what_went_wrong(report):
    folder, _ = report
    names = {path.name for path in folder.iterdir()}
    assert names == {"answers.jsonl", "wrong.jsonl", "wrong.png", "evaluation.json", "measurements.json",
                     ".eval_results"}  # fmt: skip
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 2
    colours = Image.open(folder / "wrong.png").convert("RGB").getcolors(1 << 20)
    assert dict((colour, count) for count, colour in colours)[(255, 0, 0)] > 1000


def test_results_for_the_hub_name_the_data_and_the_task(report):
    entries = yaml.safe_load((report[0] / ".eval_results/held-out.yaml").read_text())
    assert [entry["dataset"] for entry in entries] == [
        {"id": "you/held-out", "task_id": task} for task in ("default", "colours", "words")
    ]


def test_a_second_report_replaces_the_first_and_keeps_foreign_files(report):
    folder, write = report
    (folder / "notes.txt").write_text("mine")
    (folder / "wrong.jsonl").write_text("old")
    write()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "wrong.jsonl").read_text() != "old"


def test_a_report_does_not_take_the_place_of_a_model(pair, report, tmp_path):
    pair[0].save_pretrained(tmp_path / "model", processor=pair[1])
    dataset = EvaluationDataset([sample()])
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(ValueError, match="something other than an evaluation"):
        write_report(tmp_path / "model", scored(("a", 1)), dataset, None, name="x", settings=SETTINGS)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


def test_recorded_scores_stand_in_the_models_card_once(pair, report, tmp_path):
    model = tmp_path / "model"
    pair[0].save_pretrained(model, processor=pair[1])
    (model / "measurements.json").write_text('[{"name": "other", "value": "1", "how": "by hand"}]')
    for _ in range(2):
        record_in_model(model, report[0])
    card = (model / CARD_NAME).read_text()
    assert card.count("held-out, words: exact") == 1 and "| other | 1 | by hand |" in card
    assert (model / ".eval_results/held-out.yaml").is_file()


def test_a_card_that_was_edited_stays_as_it_is(pair, report, tmp_path):
    model = tmp_path / "model"
    pair[0].save_pretrained(model, processor=pair[1])
    (model / CARD_NAME).write_text("my own card")
    record_in_model(model, report[0])
    assert (model / CARD_NAME).read_text() == "my own card"


def test_evaluation_leaves_the_base_as_it_was(pair, base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    answers(pair, [sample(), sample(images=[picture("red")])])
    state = pair[0].language_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
